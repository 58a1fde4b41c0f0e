"""The low-rank momentum's starting point."""

from __future__ import annotations

import torch
from torch import Tensor


def initial_momentum(B: Tensor, A: Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return B_m = 0 (d_out, r_m) and a full-rank A_m (r_m, d_in) of standard normal entries, as published.

    The entries come from a fixed pseudo-random sequence, so that every process and every run starts alike. Their size
    matters: while the proximal weight λ outweighs B_mᵀB_m, A_m stays where it began and damps what the momentum can
    hold. Orthonormal rows that begin with A's own row space, which let the momentum in at full strength from the first
    step, needed a rate ten times smaller on the MiniLM task and ended with a higher loss.

    Args:
        B: The factor as a matrix (d_out, r).
        A: The factor as a matrix (r, d_in).
        rank: r_m, 1 ≤ r_m ≤ d_in.
        dtype: dtype of the state, at least fp32.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(rank, A.shape[1], generator=generator, dtype=torch.float64)
    return B.new_zeros(B.shape[0], rank, dtype=dtype), rows.to(A.device, dtype)
