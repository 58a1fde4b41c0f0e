"""The low-rank momentum's starting point (METHOD §4)."""

from __future__ import annotations

import torch
from torch import Tensor


def initial_momentum(B: Tensor, A: Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return B_m = 0 (d_out, r_m) and A_m (r_m, d_in) with orthonormal rows that begin with the row space of A.

    Any full-rank A_m is allowed. Early in training B is small, the proximal term keeps A near its start and updates
    enter along A's rows: a momentum that sees them is useful from the first step, a random one is not. They are
    completed from a fixed pseudo-random matrix: the same everywhere, and independent of the LoRA scaling.

    Args:
        B: The factor as a matrix (d_out, r).
        A: The factor as a matrix (r, d_in).
        rank: r_m, 1 ≤ r_m ≤ d_in.
        dtype: dtype of the state, at least fp32.
    """
    generator = torch.Generator().manual_seed(0)
    extra = torch.randn(rank, A.shape[1], generator=generator, dtype=torch.float64)
    rows = torch.cat([A.to("cpu", torch.float64), extra])[: max(rank, A.shape[0])]
    if A.shape[0] > 0 and not bool(rows[: A.shape[0]].any()):
        rows = extra
    basis = torch.linalg.qr(rows.mT)[0].mT[:rank]
    return B.new_zeros(B.shape[0], rank, dtype=dtype), basis.to(A.device, dtype).contiguous()
