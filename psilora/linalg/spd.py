"""The r×r solves that every turn of LoRSum shares: in plain PyTorch, and by the fastest code here.

`bench/results/cpu/solve.json` holds the measurement behind the choice on the CPU, and tests/linalg/test_spd.py that the
two agree. On CUDA the reference takes plain PyTorch and the Triton backend its own kernels: whether the native operator
serves some ranks better there is undecided, because it has not been measured on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from psilora.linalg import native

#: Ridges tried after a failed Cholesky factorisation, in units of 8·r·eps·max|diag|.
RIDGE_LADDER = (1.0, 1024.0, 1024.0**2)


def spd_solve(gram: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor]:
    """Solve `gram @ x = rhs` for symmetric positive semidefinite `gram`, repairing failed pivots on the device.

    Cholesky is tried on `gram` as it is, then with ridge_j = 8·r·eps·1024^(j−1)·max_i |gram_ii|, j = 1, 2, 3, on its
    diagonal; each system takes the first factorisation whose pivots are all positive and finite. A system that never
    factorises, and every system whose right-hand side is identically zero, gets the solution 0 exactly, so a zero
    gradient stays an exact no-op even where the Gram matrix is singular (B = 0).

    Args:
        gram: (…, r, r), float32 or float64; only its lower triangle is read.
        rhs: (…, r, n), same dtype and leading dimensions.

    Returns:
        The solution (…, r, n) and `info` (…), int32: the number of failed attempts per system (0 clean, 1–3 repaired,
        4 given up), 0 where the right-hand side is zero.
    """
    factor, failed = _cholesky(gram)
    info = failed.to(torch.int32)
    idle = (rhs == 0).flatten(-2).all(-1)
    if gram.device.type == "cpu" and not bool((failed | idle).any()):
        return torch.cholesky_solve(rhs, factor), info
    factor, failed, info = _repaired(gram, factor, failed, info)
    solution = torch.cholesky_solve(rhs, factor)
    return solution.masked_fill((failed | idle)[..., None, None], 0.0), info.masked_fill(idle, 0)


def _repaired(gram: Tensor, factor: Tensor, failed: Tensor, info: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Climb the ladder of ridges where the factorisation failed; what never succeeds gets the identity."""
    rank = gram.shape[-1]
    size = gram.diagonal(dim1=-2, dim2=-1).abs().amax(-1, keepdim=True) if rank else gram.new_zeros(0)
    unit = 8 * rank * torch.finfo(gram.dtype).eps * size
    usable = torch.isfinite(size).squeeze(-1) & (size > 0).squeeze(-1)
    for step in RIDGE_LADDER:
        trial, trial_failed = _cholesky(gram + torch.diag_embed((step * unit).expand(gram.shape[:-1])))
        take = failed & usable & ~trial_failed
        factor = torch.where(take[..., None, None], trial, factor)
        failed = failed & ~take
        info = info + failed.to(torch.int32)
    eye = torch.eye(rank, dtype=gram.dtype, device=gram.device)
    return torch.where(failed[..., None, None], eye, factor), failed, info


def _cholesky(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lower factor and a mask of the systems whose pivots are not all positive and finite."""
    factor, info = torch.linalg.cholesky_ex(gram, check_errors=False)
    finite = torch.isfinite(factor.diagonal(dim1=-2, dim2=-1)).all(-1)
    return factor, (info != 0) | ~finite


def relative_ridge(gram: Tensor) -> Tensor:
    """Return `gram` with 8·r·eps·(mean diagonal) added to its diagonal: a pseudo-inverse by Cholesky.

    Directions below the rounding of the Gram matrix itself are damped instead of amplified; a zero matrix stays zero.
    """
    rank = gram.shape[-1]
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    ridge = 8 * rank * torch.finfo(gram.dtype).eps * diagonal.mean(-1, keepdim=True)
    return gram + torch.diag_embed(ridge.expand(diagonal.shape))


#: Largest rank that the native operator takes on the CPU: it was faster at every rank that it supports.
NATIVE_RANKS = {torch.float32: 128, torch.float64: 128}


def takes_native(gram: Tensor) -> bool:
    """Whether `spd_solve` hands systems like `gram` to the native operator."""
    return (
        gram.device.type == "cpu"
        and gram.dim() == 3
        and 1 <= gram.shape[-1] <= NATIVE_RANKS.get(gram.dtype, 0)
        and native.available()
    )


def fastest_spd_solve(gram: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor]:
    """Solve `gram @ x = rhs` as `spd_solve`, with the same repairs and `info`, by the fastest code.

    Args:
        gram: (L, r, r), float32 or float64; only its lower triangle is read.
        rhs: (L, r, n), same dtype.

    Returns:
        The solution (L, r, n) and `info` (L,), int32.
    """
    return native.spd_solve(gram, rhs) if takes_native(gram) else spd_solve(gram, rhs)
