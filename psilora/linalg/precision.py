"""Precision policy: the dtype of computations, and blocks in true fp32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


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
