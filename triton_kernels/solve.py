"""`solve_a` and `solve_b`: one turn of LoRSum on all layers of a bucket, weight and momentum together.

With F the rows being updated (A, or Bᵀ), O the other factor's rows, everything scaled by √s and λ = η·ρ::

    F_s  = (O M_O Oᵀ + λI)⁻¹ [ C·F₁ + (−η(1−τ)·T − ημ·(O O_m1ᵀ)·F_m1)·M_F⁻¹ ],   C = O M_O ((−η·wd)·O₁ − O_s)ᵀ
    F_ms = (O_m O_mᵀ + λI)⁻¹ [ C_m·F_m1 + (1−τ)·T_m ],                             C_m = O_m ((μ−1)·O_m1 − O_ms)ᵀ

T = OG and T_m = O_mG come from `.grad`, from the products of xv and stz, or from the tangent gradient as P₁·L + P₂·F₁.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

from typing import Any

from torch import Tensor

from psilora.triton_kernels import slots
from psilora.triton_kernels._compat import tl, triton
from psilora.triton_kernels.factor import (
    BASE,
    COEFFICIENTS,
    INVERSE,
    OLD,
    OWN_BASE,
    OWN_INVERSE,
    OWN_P1,
    OWN_P2,
    P1,
    P2,
)
from psilora.triton_kernels.gram import moved_grams
from psilora.triton_kernels.layout import (
    ADDRESSES,
    FRESH,
    GRAD,
    LR,
    MOMENTUM,
    MU,
    PARAM,
    ROOT,
    ROWS,
    SCALARS,
    SCALING,
    SOLVE_BLOCKS,
    STEPS,
    UNALIGNED,
    WEIGHT,
    address,
    element,
    sizes,
    tile_at,
    variant,
)
from psilora.triton_kernels.variants import FP32_UP_TO, SLOW_TARGET, Variant

# Where a turn's product with the gradient comes from.
NONE = tl.constexpr(slots.NONE)
KNOWN = tl.constexpr(slots.KNOWN)  # `.grad` itself
PRODUCT = tl.constexpr(slots.PRODUCT)  # partial sums left by stz
TANGENT = tl.constexpr(slots.TANGENT)  # P₁·L + P₂·F₁

# Columns of the product block (int64): address of the partials (splits, d, columns), splits, columns.
PRODUCT_BLOCK = tl.constexpr(3)


@triton.jit
def _load_rows(ptr, leading, count, k, n, end, TRANSPOSED: tl.constexpr):
    """Return rows k, columns n of a factor as fp32, zero outside (count, end)."""
    at = ptr + element(k, n, leading, TRANSPOSED)  # [RP, BN]
    return tl.load(at, mask=(k < count) & (n < end), other=0.0).to(tl.float32)


@triton.jit
def _load_product(product_ptr, d, row, count, k, n, end):
    """Return rows row … row + count − 1 of the product, Σ over its splits in order, for columns n of the tile."""
    base = tl.load(product_ptr).to(tl.pointer_type(tl.float32))
    splits = tl.load(product_ptr + 1).to(tl.int32)
    columns = tl.load(product_ptr + 2).to(tl.int32)
    at = base + (n * columns + (k + row))
    inside = (k < count) & (n < end)
    product = tl.load(at, mask=inside, other=0.0)  # [RP, BN]
    for _ in range(1, splits):
        at += d * columns
        product += tl.load(at, mask=inside, other=0.0)
    return product


@triton.jit
def _bad_rows(values):
    """Return 1 for every row with an infinity or a NaN, else 0."""
    return tl.max(tl.where(tl.abs(values) < float("inf"), 0, 1), axis=1)  # [RP]


@triton.jit
def _busy_rows(values):
    """Return 1 for every row with an entry that is not zero, else 0."""
    return tl.max(tl.where(values == 0.0, 0, 1), axis=1)  # [RP]


@triton.jit
def _mark(flag_ptr, rows, RP: tl.constexpr):
    """Set the flag if any row is marked."""
    tl.atomic_or(flag_ptr + tl.zeros((RP,), tl.int32), 1, mask=rows > 0)


@triton.jit
def _times(
    coefficient_ptr, x_ptr, leading, count, k, n, end,
    X_TRANSPOSED: tl.constexpr, RP: tl.constexpr, FLIP: tl.constexpr,
):  # fmt: skip
    """Return a matrix (RP, RP) in memory, FLIP its transpose, times rows of x for columns n."""
    row = tl.arange(0, RP)[:, None]
    total = tl.zeros((RP, n.shape[1]), tl.float32)  # [RP, BN]
    for first in range(0, RP, 16):
        slice_k = first + tl.arange(0, 16)
        at = slice_k[None, :] * RP + row if FLIP else row * RP + slice_k[None, :]
        x = _load_rows(x_ptr, leading, count, slice_k[:, None], n, end, X_TRANSPOSED)  # [16, BN]
        total += tl.dot(tl.load(coefficient_ptr + at), x, input_precision="ieee")
    return total


@triton.jit
def _solved(rhs, coefficient_ptr, scratch, d, count, k, n, end, RP: tl.constexpr):
    """Return L⁻ᵀ(L⁻¹·rhs); above rank 16 the operands are kept in `scratch` (count, d), where the result will go."""
    if RP == 16:
        row = tl.arange(0, RP)[:, None]
        column = tl.arange(0, RP)[None, :]
        half = tl.dot(tl.load(coefficient_ptr + row * RP + column), rhs, input_precision="ieee")
        return tl.dot(tl.load(coefficient_ptr + column * RP + row), half, input_precision="ieee")
    at = scratch + k * d + n
    inside = (k < count) & (n < end)
    tl.store(at, rhs, mask=inside)
    tl.debug_barrier()
    half = _times(coefficient_ptr, scratch, d, count, k, n, end, False, RP, False)
    tl.debug_barrier()
    tl.store(at, half, mask=inside)
    tl.debug_barrier()
    result = _times(coefficient_ptr, scratch, d, count, k, n, end, False, RP, True)
    tl.debug_barrier()
    return result


@triton.jit
def _weight_columns(
    addresses_ptr, scalars_ptr, dims_ptr, product_ptr, coefficients_ptr, scale_ptr, flag_ptr, busy_ptr,
    problem, start, end,
    SIDE: tl.constexpr, RP: tl.constexpr, BN: tl.constexpr,
    PARAM_TYPE: tl.constexpr, GRAD_TYPE: tl.constexpr, SOURCE: tl.constexpr, CHECK: tl.constexpr,
    HAS_BASE: tl.constexpr, HAS_MOMENTUM: tl.constexpr, HAS_METRIC: tl.constexpr, EMIT: tl.constexpr,
):  # fmt: skip
    """F_s and F = F₁ + F_s for the columns start … end − 1."""
    r, rm, d = sizes(dims_ptr, problem, SIDE)
    scalars = scalars_ptr + problem * SCALARS
    root = tl.load(scalars + ROOT)
    clip = tl.load(scale_ptr)
    lr = tl.load(address(addresses_ptr, problem, LR, tl.float32, ADDRESSES))
    param = address(addresses_ptr, problem, PARAM + SIDE, PARAM_TYPE, ADDRESSES)
    grad = address(addresses_ptr, problem, GRAD + SIDE, GRAD_TYPE, ADDRESSES)
    own = address(addresses_ptr, problem, MOMENTUM + SIDE, tl.float32, ADDRESSES)
    metric = address(addresses_ptr, problem, WEIGHT + SIDE, tl.float32, ADDRESSES)
    rows = address(addresses_ptr, problem, ROWS + SIDE, tl.float32, ADDRESSES)
    steps = address(addresses_ptr, problem, STEPS + SIDE, tl.float32, ADDRESSES)
    ld = d if SIDE == 0 else r
    own_ld = d if SIDE == 0 else rm
    T: tl.constexpr = SIDE == 1
    Q: tl.constexpr = RP * RP
    coefficient = coefficients_ptr + problem * COEFFICIENTS * Q
    k = tl.arange(0, RP)[:, None]  # [RP, 1]
    bad = tl.zeros((RP,), tl.int32)
    busy = tl.zeros((RP,), tl.int32)
    for first in range(start, end, BN):
        n = first + tl.arange(0, BN)[None, :]  # [1, BN]
        inside = (k < r) & (n < end)
        f1 = _load_rows(param, ld, r, k, n, end, T) * root  # [RP, BN]
        if CHECK or SOURCE == KNOWN:
            slope = _load_rows(grad, ld, r, k, n, end, T)  # [RP, BN]
            bad = tl.maximum(bad, _bad_rows(slope))
        if SOURCE == KNOWN:
            target = slope * (clip / root)
        elif SOURCE == TANGENT:
            target = (clip / root) * _times(coefficient + P1 * Q, grad, ld, r, k, n, end, T, RP, False)
            target += root * _times(coefficient + P2 * Q, param, ld, r, k, n, end, T, RP, False)
        else:
            scale = clip * tl.load(scale_ptr + 1) / tl.load(scalars + SCALING)
            target = scale * _load_product(product_ptr, d, 0, r, k, n, end)
        rhs = (-lr * tl.load(scalars + FRESH)) * target  # [RP, BN]
        if HAS_MOMENTUM:
            pull = _times(coefficient + OLD * Q, own, own_ld, rm, k, n, end, T, RP, False)
            rhs -= (lr * tl.load(scalars + MU)) * pull
        if HAS_METRIC:
            rhs = rhs / tl.load(metric + n, mask=n < end, other=1.0)
        if HAS_BASE:
            rhs += root * _times(coefficient + BASE * Q, param, ld, r, k, n, end, T, RP, False)
        busy = tl.maximum(busy, _busy_rows(rhs))
        step = _solved(rhs, coefficient + INVERSE * Q, steps, d, r, k, n, end, RP)
        bad = tl.maximum(bad, _bad_rows(step))
        at = k * d + n
        tl.store(steps + at, step, mask=inside)
        if EMIT:
            tl.store(rows + at, f1 + step, mask=inside)
    _mark(flag_ptr + problem, bad, RP)
    _mark(busy_ptr + problem, busy, RP)


@triton.jit
def _momentum_columns(
    addresses_ptr, scalars_ptr, dims_ptr, product_ptr, coefficients_ptr, scale_ptr, flag_ptr, busy_ptr,
    problem, start, end,
    SIDE: tl.constexpr, RP: tl.constexpr, BN: tl.constexpr,
    PARAM_TYPE: tl.constexpr, GRAD_TYPE: tl.constexpr, SOURCE: tl.constexpr, BESIDE: tl.constexpr,
):  # fmt: skip
    """F_ms and F_m = F_m1 + F_ms for the columns; BESIDE: the first r rows of the product are the weight's."""
    r, rm, d = sizes(dims_ptr, problem, SIDE)
    scalars = scalars_ptr + problem * SCALARS
    root = tl.load(scalars + ROOT)
    clip = tl.load(scale_ptr)
    own = address(addresses_ptr, problem, MOMENTUM + SIDE, tl.float32, ADDRESSES)
    param = address(addresses_ptr, problem, PARAM + SIDE, PARAM_TYPE, ADDRESSES)
    grad = address(addresses_ptr, problem, GRAD + SIDE, GRAD_TYPE, ADDRESSES)
    rows = address(addresses_ptr, problem, ROWS + SIDE, tl.float32, ADDRESSES) + r * d
    steps = address(addresses_ptr, problem, STEPS + SIDE, tl.float32, ADDRESSES) + r * d
    ld = d if SIDE == 0 else r
    own_ld = d if SIDE == 0 else rm
    T: tl.constexpr = SIDE == 1
    Q: tl.constexpr = RP * RP
    coefficient = coefficients_ptr + problem * COEFFICIENTS * Q
    k = tl.arange(0, RP)[:, None]  # [RP, 1]
    bad = tl.zeros((RP,), tl.int32)
    busy = tl.zeros((RP,), tl.int32)
    for first in range(start, end, BN):
        n = first + tl.arange(0, BN)[None, :]  # [1, BN]
        inside = (k < rm) & (n < end)
        if SOURCE == TANGENT:
            target = (clip / root) * _times(coefficient + OWN_P1 * Q, grad, ld, r, k, n, end, T, RP, False)
            target += root * _times(coefficient + OWN_P2 * Q, param, ld, r, k, n, end, T, RP, False)
        else:
            scale = clip * tl.load(scale_ptr + 1) / tl.load(scalars + SCALING)
            target = scale * _load_product(product_ptr, d, r if BESIDE else 0, rm, k, n, end)
        rhs = tl.load(scalars + FRESH) * target  # [RP, BN]
        rhs += _times(coefficient + OWN_BASE * Q, own, own_ld, rm, k, n, end, T, RP, False)
        busy = tl.maximum(busy, _busy_rows(rhs))
        step = _solved(rhs, coefficient + OWN_INVERSE * Q, steps, d, rm, k, n, end, RP)
        value = _load_rows(own, own_ld, rm, k, n, end, T) + step
        bad = tl.maximum(bad, _bad_rows(value))
        at = k * d + n
        tl.store(steps + at, step, mask=inside)
        tl.store(rows + at, value, mask=inside)
    _mark(flag_ptr + problem, bad, RP)
    _mark(busy_ptr + problem, busy, RP)


@triton.jit(do_not_specialize=["problems", "first_tile"], do_not_specialize_on_alignment=UNALIGNED)
def _solve_kernel(
    addresses_ptr, scalars_ptr, dims_ptr, tiles_ptr, product_ptr, coefficients_ptr, scale_ptr, out_ptr, flag_ptr,
    busy_ptr, problems, first_tile,
    SIDE: tl.constexpr, RP: tl.constexpr, BN: tl.constexpr, KS: tl.constexpr, KINDS: tl.constexpr,
    PARAM_TYPE: tl.constexpr, GRAD_TYPE: tl.constexpr, SOURCE: tl.constexpr, OWN_SOURCE: tl.constexpr,
    BESIDE: tl.constexpr, CHECK: tl.constexpr, HAS_BASE: tl.constexpr, HAS_MOMENTUM: tl.constexpr,
    HAS_METRIC: tl.constexpr, EMIT: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """One turn on one side (0: A, 1: B), a tile of columns of one layer per program.

    Tables: addresses (L, ADDRESSES) int64, scalars (L, SCALARS) fp32, dims (L, DIMS) int32, tiles (…, TILE) int32 from
    `first_tile` on, product (L, PRODUCT_BLOCK) int64, coefficients as the factor launch has left them. Partial Grams of
    the moved rows go to out (tiles, KINDS, RP, RP) fp32. busy is (2, L) int32: weight, then momentum.
    """
    tile = tl.program_id(0).to(tl.int64) + first_tile
    _, problem, start, end = tile_at(tiles_ptr, tile)
    product = product_ptr + problem * PRODUCT_BLOCK
    _weight_columns(
        addresses_ptr, scalars_ptr, dims_ptr, product, coefficients_ptr, scale_ptr, flag_ptr, busy_ptr,
        problem, start, end, SIDE, RP, BN, PARAM_TYPE, GRAD_TYPE,
        SOURCE, CHECK, HAS_BASE, HAS_MOMENTUM, HAS_METRIC, EMIT,
    )  # fmt: skip
    if OWN_SOURCE != NONE:
        _momentum_columns(
            addresses_ptr, scalars_ptr, dims_ptr, product, coefficients_ptr, scale_ptr, flag_ptr, busy_ptr + problems,
            problem, start, end, SIDE, RP, BN, PARAM_TYPE, GRAD_TYPE, OWN_SOURCE, BESIDE,
        )  # fmt: skip
    if MASK != 0:
        tl.debug_barrier()  # the Grams read rows that other threads of this program have written
        moved_grams(
            addresses_ptr, scalars_ptr, dims_ptr, scale_ptr, out_ptr + tile * KINDS * RP * RP, problem, start, end,
            SIDE, RP, KS, PARAM_TYPE, GRAD_TYPE, HAS_METRIC, MASK,
        )  # fmt: skip


def solve(
    addresses: Tensor, scalars: Tensor, dims: Tensor, tiles: Tensor, product: Tensor, coefficients: Tensor,
    scale: Tensor, out: Tensor, flags: Tensor, busy: Tensor, *, first_tile: int, programs: int, **constexprs: Any,
) -> None:  # fmt: skip
    """Launch `_solve_kernel` on the `programs` tiles of a side that begin at `first_tile`."""
    BN, KS, warps = SOLVE_BLOCKS[out.shape[-1]]
    _solve_kernel[(programs,)](
        addresses, scalars, dims, tiles, product, coefficients, scale, out, flags, busy, dims.shape[0], first_tile,
        RP=out.shape[-1], BN=BN, KS=KS, KINDS=out.shape[1], **constexprs, num_warps=warps, num_stages=1, maxnreg=255,
    )  # fmt: skip


def _variants() -> list[Variant]:
    """Both sides at every rank: the plain first turn, and one with everything that a rank can have at once."""
    found = []
    for padded, (BN, KS, warps) in SOLVE_BLOCKS.items():
        plain = {
            "KINDS": 5, "SOURCE": 1, "OWN_SOURCE": 0, "BESIDE": False, "HAS_BASE": False, "HAS_MOMENTUM": False,
            "HAS_METRIC": False, "MASK": 0b11,
        }  # fmt: skip
        exact = {
            "KINDS": 5, "SOURCE": 2, "OWN_SOURCE": 2, "BESIDE": True, "HAS_BASE": True, "HAS_MOMENTUM": True,
            "HAS_METRIC": True, "MASK": 0b11111,
        }  # fmt: skip
        tangent = {**exact, "KINDS": 9, "SOURCE": 3, "OWN_SOURCE": 3, "BESIDE": False, "MASK": 511}
        for side in (0, 1):
            for name, case in (("plain", plain), ("exact", exact), ("tangent", tangent)):
                blocks = {"SIDE": side, "BN": BN, "KS": KS, "CHECK": True, "EMIT": True}
                types = {"PARAM_TYPE": tl.bfloat16, "GRAD_TYPE": tl.float32}
                title = f"solve_{'ab'[side]}_{name}"
                found.append(variant(title, _solve_kernel, padded, warps, {**blocks, **types, **case}, 255))
                if name == "exact" and padded <= FP32_UP_TO:
                    title, fp32 = f"{title}_fp32", {**blocks, **types, **case, "PARAM_TYPE": tl.float32}
                    targets = (SLOW_TARGET,)
                    found.append(variant(title, _solve_kernel, padded, warps, fp32, 255, targets))
    return found


VARIANTS = _variants()
