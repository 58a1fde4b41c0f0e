"""Exact products of a 16-bit matrix with an fp32 one: the fp32 operand is split into three 16-bit parts.

bf16 has 8 significant bits, so x = hi + mid + lo to 2⁻²⁴·|x|, and three tensor-core products with accumulators of their
own give an fp32-grade result at 16-bit speed. fp16 has 11 bits but a narrow range: its operand is first scaled, per
row or column, by a power of two that puts the largest entry into [2¹⁴, 2¹⁵); the parts then reach 2⁻⁴⁰ of that entry.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

import torch
from torch import Tensor

from psilora.triton_kernels._compat import INTERPRET, tl, triton


@triton.jit
def rounded(value, DTYPE: tl.constexpr):
    """Return fp32 values in the storage dtype, to nearest even (the interpreter would truncate to bf16)."""
    if INTERPRET and DTYPE == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        even = bits + 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(tl.abs(value) < float("inf"), even, bits) & 0xFFFF0000
        return bits.to(tl.float32, bitcast=True).to(DTYPE)
    return value.to(DTYPE)


#: Triton's name of each dtype that the streaming kernels read.
TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _rounded(x, DTYPE: tl.constexpr):
    """Return fp32 x rounded to nearest even: in DTYPE, or still in fp32 under the interpreter."""
    if INTERPRET:
        if DTYPE == tl.bfloat16:
            # The interpreter truncates when it casts to bf16, and its products of bf16 are wrong.
            bits = x.to(tl.uint32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
        else:
            return x.to(DTYPE).to(tl.float32)
    else:
        return x.to(DTYPE)


@triton.jit
def split3(x, DTYPE: tl.constexpr):
    """Return (hi, mid, lo) with hi + mid + lo = x to 24 bits; every difference is exact."""
    hi = _rounded(x, DTYPE)
    rest = x - hi.to(tl.float32)
    mid = _rounded(rest, DTYPE)
    lo = _rounded(rest - mid.to(tl.float32), DTYPE)
    return hi, mid, lo


@triton.jit
def add_product(x1, x2, x3, y1, y2, y3, total):
    """Return total + x·y of what has been cut into three bf16 parts each: off by 2⁻²⁴ of |x|·|y|."""
    # fma: a plain sum of products becomes a chain into one accumulator, miscompiled on sm_103.
    low = tl.fma(tl.dot(x3, y1), 1.0, tl.dot(x1, y3))
    low = tl.fma(tl.dot(x2, y2), 1.0, low)
    low = tl.fma(tl.dot(x2, y1), 1.0, low)
    low = tl.fma(tl.dot(x1, y2), 1.0, low)
    return tl.fma(tl.dot(x1, y1), 1.0, low) + total


@triton.jit
def _operand(x):
    """Return a loaded 16-bit tile as an operand for `tl.dot`."""
    if INTERPRET:
        return x.to(tl.float32)
    else:
        return x


@triton.jit
def _power_of_two(top):
    """Return s and 1/s, powers of two, with s·top in [2¹⁴, 2¹⁵) (as near as fp32 allows); 1 where top is not finite."""
    exponent = (top.to(tl.int32, bitcast=True) >> 23) & 255
    up = tl.minimum(tl.maximum(268 - exponent, 1), 253)
    up = tl.where(exponent == 255, 127, up)
    return (up << 23).to(tl.float32, bitcast=True), ((254 - up) << 23).to(tl.float32, bitcast=True)


def split3_ref(x: Tensor, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """Return the parts (hi, mid, lo) of an fp32 tensor in `dtype`, bitwise what `split3` computes."""
    hi = x.to(dtype)
    rest = x - hi.float()
    mid = rest.to(dtype)
    return hi, mid, (rest - mid.float()).to(dtype)


def power_of_two_ref(top: Tensor) -> Tensor:
    """Return the scale s of `_power_of_two` for fp32 `top` ≥ 0."""
    _, exponent = torch.frexp(top)  # top = m·2^e, m in [½, 1): its floor(log2) is e − 1
    exponent = torch.where(top < torch.finfo(torch.float32).tiny, torch.full_like(exponent, -126), exponent)
    scale = torch.ldexp(torch.ones_like(top), (15 - exponent).clamp(-126, 126))
    return torch.where(torch.isfinite(top), scale, torch.ones_like(top))
