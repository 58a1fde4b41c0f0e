"""Precision policy and the r×r solve that every turn of LoRSum shares."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

#: Ridges tried after a failed Cholesky factorisation, in units of 8·r·eps·max|diag|.
RIDGE_LADDER = (1.0, 1024.0, 1024.0**2)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a tensor stored as `dtype` is computed with: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@contextlib.contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Run a block with autocast off and fp32 products in true fp32.

    A tf32 or bf16 product inside a Gram matrix costs 1e-2 at factor condition 100, so a global
    `torch.set_float32_matmul_precision("high")` must not reach the solves.
    """
    with torch.autocast(device_type, enabled=False), _full_products():
        yield


@contextlib.contextmanager
def _full_products() -> Iterator[None]:
    try:
        previous = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch 2.9 and later, where `torch.backends.fp32_precision` has been written instead
        backends: Any = torch.backends
        with _ieee(backends.cuda.matmul, backends.mkldnn.matmul):
            yield
        return
    if previous == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(previous)


@contextlib.contextmanager
def full_convolutions() -> Iterator[None]:
    """Run a block with fp32 convolutions in true fp32, by algorithms that give the same bits every time.

    `full_precision` is about matrix products; convolutions have switches of their own, and tf32 is their default.
    """
    backends: Any = torch.backends
    with contextlib.ExitStack() as stack:
        stack.enter_context(_set(backends.cudnn, deterministic=True, benchmark=False))
        if hasattr(backends, "fp32_precision"):  # where the older switch may not even be read beside this one
            stack.enter_context(_ieee(backends.cudnn.conv, backends.mkldnn.conv))
        else:
            stack.enter_context(_set(backends.cudnn, allow_tf32=False))
        yield


@contextlib.contextmanager
def _set(owner: Any, **values: object) -> Iterator[None]:
    """Run a block with these attributes."""
    former = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in former.items():
            setattr(owner, name, value)


@contextlib.contextmanager
def _ieee(*owners: Any) -> Iterator[None]:
    """Run a block with `fp32_precision` of these parts of `torch.backends` at "ieee"; they inherit what is "none"."""
    former = [owner.fp32_precision for owner in owners]
    try:
        for owner in owners:
            owner.fp32_precision = "ieee"
        yield
    finally:
        for owner, value in zip(owners, former, strict=True):
            owner.fp32_precision = "none"
            if owner.fp32_precision != value:
                owner.fp32_precision = value


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
