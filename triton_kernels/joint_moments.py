"""`moments`: the root mean square of a gradient's columns, in the orthonormal basis of the other factor."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

from typing import Any

from torch import Tensor

from psilora.triton_kernels._compat import tl, triton
from psilora.triton_kernels.joint_gram import EVEN, WARPS
from psilora.triton_kernels.joint_layout import (
    ADDRESSES,
    FRESH_ROOT,
    GRAD,
    METRIC,
    NEW_UNIT,
    OLD_UNIT,
    SCALING,
    SETTINGS,
    SUMS,
    TYPES,
    variant,
)
from psilora.triton_kernels.layout import UNALIGNED, address, element, sizes, tile_at
from psilora.triton_kernels.split import add_product, split3
from psilora.triton_kernels.twofold import exponent_of, power


@triton.jit
def _gradient(g, k, n, end, r, d, SIDE: tl.constexpr, RP: tl.constexpr, WHOLE: tl.constexpr):
    """Return rows k of `.grad` at columns n in fp32, rows along axis 0."""
    if WHOLE and k.shape[0] <= RP:
        at = g + element(k[:, None], n[None, :], RP if SIDE == 1 else d, SIDE == 1)
        if SIDE == 1:
            at = tl.multiple_of(tl.max_contiguous(at, (8, 1)), (16, 1))
        else:
            at = tl.multiple_of(tl.max_contiguous(at, (1, 8)), (1, 16))
        return tl.load(at).to(tl.float32)
    else:
        at = g + element(k[:, None], n[None, :], r if SIDE == 1 else d, SIDE == 1)
        return tl.load(at, mask=(k[:, None] < r) & (n[None, :] < end), other=0.0).to(tl.float32)


@triton.jit
def _root(roots_ptr, c, k, r, RP: tl.constexpr):
    """Return rows c and columns k of a root in three parts."""
    inside = (c[:, None] < r) & (k[None, :] < r)
    return split3(tl.load(roots_ptr + c[:, None] * RP + k[None, :], mask=inside, other=0.0), tl.bfloat16)


@triton.jit
def _moments_side(
    addresses_ptr, settings_ptr, dims_ptr, roots_ptr, scale, sums_ptr, problem, start, end,
    SIDE: tl.constexpr, RP: tl.constexpr, BN: tl.constexpr, WHOLE: tl.constexpr, G_TYPE: tl.constexpr,
):  # fmt: skip
    r, _, d = sizes(dims_ptr, problem, SIDE)
    g = address(addresses_ptr, problem, GRAD + SIDE, G_TYPE, ADDRESSES)
    old_ptr = address(addresses_ptr, problem, METRIC + SIDE, tl.float32, ADDRESSES)
    fresh = address(addresses_ptr, problem, FRESH_ROOT + SIDE, tl.float32, ADDRESSES)
    K: tl.constexpr = RP if RP > 16 else 16
    C: tl.constexpr = K if K < 32 else 32
    new_unit = tl.full((), 0.0, tl.float32)
    new_sum = tl.full((), 0.0, tl.float32)
    old_unit = tl.full((), 0.0, tl.float32)
    old_sum = tl.full((), 0.0, tl.float32)
    k = tl.arange(0, C)
    x1, x2, x3 = _root(roots_ptr, k, k, r, RP)
    for begin in range(start, end, BN):
        n = begin + tl.arange(0, BN)
        inside = n < end
        # The triangular root times a column of `.grad`: rows of the root in chunks, each with its columns in chunks.
        top = tl.zeros((BN,), tl.float32)
        squares = tl.zeros((BN,), tl.float32)
        for first in range(0, K, C):
            c = first + tl.arange(0, C)
            t = tl.zeros((C, BN), tl.float32)
            for k0 in range(0, K, C):
                k = k0 + tl.arange(0, C)
                if C < K:
                    x1, x2, x3 = _root(roots_ptr, c, k, r, RP)
                y1, y2, y3 = split3(_gradient(g, k, n, end, r, d, SIDE, RP, WHOLE), tl.bfloat16)
                t = add_product(x1, x2, x3, y1, y2, y3, t)
            # Σ t² with a power of two taken out, so that neither tiny nor huge gradients leave the range of fp32.
            largest = tl.max(tl.abs(t), axis=0)
            grown = tl.maximum(top, largest)
            unit = power(-exponent_of(grown))
            scaled = t * unit[None, :]
            before = power(exponent_of(top) - exponent_of(grown))
            squares = squares * before * before + tl.sum(scaled * scaled, axis=0)
            top = grown
        root_new = tl.sqrt_rn(squares / r) * power(exponent_of(top)) * scale
        root_new = tl.where(inside, root_new, 0.0)
        tl.store(fresh + n, root_new, mask=inside)
        root_old = tl.load(old_ptr + n, mask=inside, other=0.0)
        new_unit, new_sum = _grown(new_unit, new_sum, root_new)
        old_unit, old_sum = _grown(old_unit, old_sum, root_old)
    tl.store(sums_ptr + NEW_UNIT, new_unit)
    tl.store(sums_ptr + NEW_UNIT + 1, new_sum)
    tl.store(sums_ptr + OLD_UNIT, old_unit)
    tl.store(sums_ptr + OLD_UNIT + 1, old_sum)


@triton.jit
def _grown(unit, total, roots):
    """Return (unit', Σ/unit'²) with the squares of `roots` added, unit' a power of two above them all."""
    top = tl.max(roots, axis=0)
    new = tl.maximum(unit, tl.where(top > 0.0, power(exponent_of(top)), 0.0))
    safe = tl.where(new > 0.0, new, 1.0)
    share = unit / safe
    scaled = roots / safe
    return new, total * share * share + tl.sum(scaled * scaled, axis=0)


@triton.jit(do_not_specialize=["layers"], do_not_specialize_on_alignment=UNALIGNED)
def _moments_kernel(
    addresses_ptr, settings_ptr, dims_ptr, tiles_ptr, roots_ptr, clip_ptr, sums_ptr, layers,
    RP: tl.constexpr, BN: tl.constexpr, WHOLE: tl.constexpr, G_A: tl.constexpr, G_B: tl.constexpr,
):  # fmt: skip
    """√mean_k (g_k)² per column of a tile, g the gradient in the orthonormal basis of the other factor; tile sums."""
    tile = tl.program_id(0).to(tl.int64)
    side, problem, start, end = tile_at(tiles_ptr, tile)
    scale = tl.abs(tl.load(clip_ptr)) / tl.load(settings_ptr + problem * SETTINGS + SCALING)
    sums = sums_ptr + tile * SUMS
    if side == 0:
        roots = roots_ptr + (layers + problem) * RP * RP
        _moments_side(
            addresses_ptr, settings_ptr, dims_ptr, roots, scale, sums, problem, start, end, 0, RP, BN, WHOLE, G_A
        )  # fmt: skip
    else:
        roots = roots_ptr + problem * RP * RP
        _moments_side(
            addresses_ptr, settings_ptr, dims_ptr, roots, scale, sums, problem, start, end, 1, RP, BN, WHOLE, G_B
        )  # fmt: skip


def moments(
    addresses: Tensor, settings: Tensor, dims: Tensor, tiles: Tensor, roots: Tensor, clip: Tensor, sums: Tensor,
    *, padded: int, whole: bool, types: tuple[Any, Any, Any, Any],
) -> None:  # fmt: skip
    """Launch `_moments_kernel`.

    Takes, beside what `joint_gram.gram` describes:
        roots: (2, L, RP, RP) fp32, L⁻¹ of AAᵀ and of BᵀB.
        clip: 0-d fp32, what multiplies `.grad`.
        sums: (tiles, 4) fp32, written.
    """
    _moments_kernel[(tiles.shape[0],)](
        addresses, settings, dims, tiles, roots, clip, sums, dims.shape[0],
        RP=padded, BN=EVEN, WHOLE=whole, G_A=types[2], G_B=types[3], num_warps=WARPS, num_stages=1,
    )  # fmt: skip


VARIANTS = [
    variant(
        f"joint_moments{kind}",
        _moments_kernel,
        padded,
        {key: types[key] for key in ("G_A", "G_B", "WHOLE")},
        {"BN": EVEN, "num_warps": WARPS, "num_stages": 1},
        max_registers=255,
    )
    for padded in (8, 16, 32, 64, 128)
    for kind, types in TYPES.items()
]
