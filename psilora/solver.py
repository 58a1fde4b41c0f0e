"""Which code solves the r×r systems of a reference step; the oracle `psilora.lorsum` keeps to plain PyTorch.

`bench/results/cpu/solve.json` holds the measurement behind the choice on the CPU, and tests/test_solver.py that the two
agree. On CUDA the reference takes plain PyTorch and the Triton backend its own kernels: whether the native operator
serves some ranks better there is undecided, because it has not been measured on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from psilora import native, numerics

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


def spd_solve(gram: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor]:
    """Solve `gram @ x = rhs` as `psilora.numerics.spd_solve`, with the same repairs and `info`, by the fastest code.

    Args:
        gram: (L, r, r), float32 or float64; only its lower triangle is read.
        rhs: (L, r, n), same dtype.

    Returns:
        The solution (L, r, n) and `info` (L,), int32.
    """
    return native.spd_solve(gram, rhs) if takes_native(gram) else numerics.spd_solve(gram, rhs)
