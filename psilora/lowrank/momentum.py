"""The low-rank momentum: where it starts, and how its factors are kept in balance."""

from __future__ import annotations

import torch
from torch import Tensor

from psilora.triton_kernels.slots import IMBALANCE, SPREAD

#: The greatest K at which it is balanced.
BALANCED_ITERS = 1


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
    rows = torch.randn(rank, A.shape[1], generator=generator, dtype=torch.float64, device="cpu")
    return B.new_zeros(B.shape[0], rank, dtype=dtype), rows.to(A.device, dtype)


def balance(B: Tensor, A: Tensor, size_B: Tensor, size_A: Tensor) -> tuple[Tensor, Tensor]:
    """Return (B_m/t, t·A_m) with t = 2^⌊log₂(‖B_m‖²/‖A_m‖²)/4⌋ where ‖B_m‖² > 2^16·‖A_m‖², else both unchanged.

    Alternating turns of μ·(B_m, A_m) + (1−τ)·G, A_m first, shrink A_m and grow B_m by a few per cent a step for ever;
    once A_m·A_mᵀ is as small as λ, the proximal term holds the momentum where it is. With K ≤ 1 the published method
    then stops at an excess a hundred times that of K = 2 (linear task). With K ≥ 2 the hold only damps the momentum, to
    the good of a long run at a constant rate, and nothing is changed. t is a power of two, so the product does not
    change by a bit.

    Args:
        B: B_m (L, d_out, r_m).
        A: A_m (L, r_m, d_in).
        size_B: The trace of B_mᵀB_m, (L,), as the step's last A-turn has seen it.
        size_A: The trace of A_mA_mᵀ, (L,), as the last B-turn has.
    """
    ratio = size_B / size_A
    outweighed = (ratio > IMBALANCE) & torch.isfinite(ratio)
    if outweighed.device.type == "cpu" and not bool(outweighed.any()):  # elsewhere a look would wait for the device
        return B, A
    exponent = torch.where(outweighed, (torch.frexp(ratio).exponent - 1) // 4, 0)[:, None, None]
    return torch.ldexp(B, -exponent), torch.ldexp(A, exponent)


#: A condition of A_m·A_mᵀ, times eps, above which `conditioned` acts: 2e3 in fp32, 1e12 in fp64.
DOUBTFUL = SPREAD * torch.finfo(torch.float32).eps


def drifted(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return L (L, r_m, r_m) fp64 with LLᵀ = gram, I where it is not due, and whether it is: (L,) bool.

    Due where the pivots of L say that the condition of gram exceeds DOUBTFUL/eps of its dtype.

    Args:
        gram: A_mA_mᵀ (L, r_m, r_m), as the step's last B-turn has seen it.
    """
    factor, info = torch.linalg.cholesky_ex(gram.double())
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    spread = (pivots.amax(-1) / pivots.amin(-1)).square()  # at most the condition
    due = (info == 0) & (spread * torch.finfo(gram.dtype).eps > DOUBTFUL)
    return torch.where(
        due[:, None, None], factor, torch.eye(gram.shape[-1], dtype=factor.dtype, device=gram.device)
    ), due


def conditioned(B: Tensor, A: Tensor, factor: Tensor, due: Tensor) -> tuple[Tensor, Tensor]:
    """Return (B_m·L, L⁻¹·A_m) with LLᵀ = A_m·A_mᵀ where that Gram is ill-conditioned, else both unchanged.

    The turns do not only change the sizes of the two factors (see `balance`): each direction of the momentum drifts by
    itself. In fp32 the Grams reach a condition of 1e12 within some hundred steps, the solves are repaired pivot by
    pivot, and a training run ends at chance (MNIST, K = 1 and 2). Orthonormal rows of A_m leave to B_m the singular
    values of the momentum itself; where an A-turn has come after the last B-turn they are nearly so. The product stays
    the same to rounding. L is found in fp64, by the kernels in fp32, there with a Newton step from L⁻¹ to L.

    Args:
        B: B_m (L, d_out, r_m).
        A: A_m (L, r_m, d_in).
        factor: L as `drifted` returns it.
        due: The layers that it says are due, (L,) bool.
    """
    if due.device.type == "cpu" and not bool(due.any()):  # elsewhere a look would wait for the device
        return B, A
    rows = torch.linalg.solve_triangular(factor, A.double(), upper=False)
    chosen = due[:, None, None]
    return torch.where(chosen, (B.double() @ factor).to(B.dtype), B), torch.where(chosen, rows.to(A.dtype), A)
