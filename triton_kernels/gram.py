"""Grams of factor rows as partial sums over tiles of columns, and the launch that forms those of the current factors.

A factor is seen as rows F (r, d): A, or Bᵀ. Every tile of columns of a side writes its own partial products into a
workspace (tiles, kinds, RP, RP) fp32; whoever needs a Gram adds the tiles of its layer in a fixed order. The solve
kernel writes the partials of the factor it has just moved, the gram and commit kernels those of the stored factor.
All factors are scaled by √s.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

from typing import Any

from torch import Tensor

from psilora.triton_kernels._compat import tl, triton
from psilora.triton_kernels.layout import (
    ADDRESSES,
    AVERAGE,
    BETA,
    BLOCKS,
    COUNT,
    CROSS,
    DAMPING,
    GRAD,
    LOG_BETA,
    METRIC,
    MOMENTUM,
    OWN,
    OWN_SLOPE,
    OWN_START,
    OWN_STEP,
    PARAM,
    POWER,
    ROOT,
    ROWS,
    SCALARS,
    SCALING,
    SLOPE,
    SQUARES,
    START,
    STATISTIC,
    STEPS,
    STREAM_REGISTERS,
    UNALIGNED,
    WEIGHT,
    WEIGHTED,
    WEIGHTED_STEP,
    address,
    element,
    sizes,
    tile_at,
    variant,
)
from psilora.triton_kernels.variants import FP32_UP_TO, SLOW_TARGET, Variant


@triton.jit
def partial_gram(
    out_ptr, x_ptr, x_leading, x_count, y_ptr, y_leading, y_count, m_ptr, scale, start, end,
    X_TRANSPOSED: tl.constexpr, Y_TRANSPOSED: tl.constexpr, METRIC: tl.constexpr, RP: tl.constexpr, KS: tl.constexpr,
):  # fmt: skip
    """out[i, j] = scale · Σ_{start ≤ n < end} x[i, n] (m[n]) y[j, n], in fp32; rows beyond the counts are 0.

    One square of at most 64 × 64 at a time, to fit the registers.
    """
    SQUARE: tl.constexpr = RP if RP < 64 else 64
    for block in tl.static_range((RP // SQUARE) * (RP // SQUARE)):
        row = block // (RP // SQUARE) * SQUARE + tl.arange(0, SQUARE)
        column = block % (RP // SQUARE) * SQUARE + tl.arange(0, SQUARE)
        total = tl.zeros((SQUARE, SQUARE), tl.float32)  # [SQUARE, SQUARE]
        for first in range(start, end, KS):
            n = first + tl.arange(0, KS)
            x_at = element(row[:, None], n[None, :], x_leading, X_TRANSPOSED)  # [SQUARE, KS]
            x = tl.load(x_ptr + x_at, mask=(row[:, None] < x_count) & (n[None, :] < end), other=0.0).to(tl.float32)
            if METRIC:
                x = x * tl.load(m_ptr + n, mask=n < end, other=0.0)[None, :]
            y_at = element(column[None, :], n[:, None], y_leading, Y_TRANSPOSED)  # [KS, SQUARE]
            y = tl.load(y_ptr + y_at, mask=(column[None, :] < y_count) & (n[:, None] < end), other=0.0).to(tl.float32)
            total += tl.dot(x, y, input_precision="ieee")
        tl.store(out_ptr + row[:, None] * RP + column[None, :], total * scale)


@triton.jit
def summed(
    partials_ptr, first, count, top,
    KIND: tl.constexpr, KINDS: tl.constexpr, RP: tl.constexpr, ROWS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Return Σ of one kind over the tiles first … first + count − 1, in a fixed order: rows top … top + ROWS − 1."""
    row = top + tl.arange(0, ROWS)
    column = tl.arange(0, RP)
    lane = tl.arange(0, AT_ONCE)
    at = lane[:, None, None] * (KINDS * RP * RP) + (row[:, None] * RP + column[None, :])[None, :, :]
    base = partials_ptr + (first.to(tl.int64) * KINDS + KIND) * (RP * RP)
    added = tl.zeros((ROWS, RP), tl.float32)  # [ROWS, RP]
    for i in range(0, count, AT_ONCE):
        added += tl.sum(tl.load(base + at, mask=(i + lane < count)[:, None, None], other=0.0), axis=0)
        base += AT_ONCE * KINDS * RP * RP
    return added


@triton.jit
def stored_grams(
    addresses_ptr, scalars_ptr, dims_ptr, scale_ptr, out_ptr, problem, start, end,
    SIDE: tl.constexpr, RP: tl.constexpr, KS: tl.constexpr, PARAM_TYPE: tl.constexpr, GRAD_TYPE: tl.constexpr,
    HAS_METRIC: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Write the partial Grams of the stored factors, F = F₁: the kinds in MASK."""
    r, rm, d = sizes(dims_ptr, problem, SIDE)
    scaling = tl.load(scalars_ptr + problem * SCALARS + SCALING)
    root = tl.load(scalars_ptr + problem * SCALARS + ROOT)
    clip = tl.load(scale_ptr)
    param = address(addresses_ptr, problem, PARAM + SIDE, PARAM_TYPE, ADDRESSES)
    grad = address(addresses_ptr, problem, GRAD + SIDE, GRAD_TYPE, ADDRESSES)
    own = address(addresses_ptr, problem, MOMENTUM + SIDE, tl.float32, ADDRESSES)
    metric = address(addresses_ptr, problem, WEIGHT + SIDE, tl.float32, ADDRESSES)
    ld = d if SIDE == 0 else r
    own_ld = d if SIDE == 0 else rm
    T: tl.constexpr = SIDE == 1
    Q: tl.constexpr = RP * RP
    if MASK & 1:
        partial_gram(
            out_ptr + WEIGHTED * Q, param, ld, r, param, ld, r, metric, scaling, start, end, T, T, HAS_METRIC, RP, KS
        )
    if MASK & 4:
        partial_gram(out_ptr + CROSS * Q, param, ld, r, own, own_ld, rm, metric, root, start, end, T, T, False, RP, KS)
    if MASK & 8:
        partial_gram(out_ptr + OWN * Q, own, own_ld, rm, own, own_ld, rm, metric, 1.0, start, end, T, T, False, RP, KS)
    if MASK & 32:
        partial_gram(out_ptr + START * Q, param, ld, r, param, ld, r, metric, scaling, start, end, T, T, False, RP, KS)
    if MASK & 64:
        partial_gram(out_ptr + SLOPE * Q, param, ld, r, grad, ld, r, metric, clip, start, end, T, T, False, RP, KS)
    if MASK & 128:
        partial_gram(
            out_ptr + OWN_START * Q, own, own_ld, rm, param, ld, r, metric, root, start, end, T, T, False, RP, KS
        )
    if MASK & 256:
        partial_gram(
            out_ptr + OWN_SLOPE * Q, own, own_ld, rm, grad, ld, r, metric, clip / root, start, end, T, T, False, RP, KS
        )


@triton.jit
def moved_grams(
    addresses_ptr, scalars_ptr, dims_ptr, scale_ptr, out_ptr, problem, start, end,
    SIDE: tl.constexpr, RP: tl.constexpr, KS: tl.constexpr, PARAM_TYPE: tl.constexpr, GRAD_TYPE: tl.constexpr,
    HAS_METRIC: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Write the partial Grams of the factors just moved, the kinds in MASK, from the rows and steps workspaces."""
    r, rm, d = sizes(dims_ptr, problem, SIDE)
    root = tl.load(scalars_ptr + problem * SCALARS + ROOT)
    slope = tl.load(scale_ptr) / root
    param = address(addresses_ptr, problem, PARAM + SIDE, PARAM_TYPE, ADDRESSES)
    grad = address(addresses_ptr, problem, GRAD + SIDE, GRAD_TYPE, ADDRESSES)
    own = address(addresses_ptr, problem, MOMENTUM + SIDE, tl.float32, ADDRESSES)
    metric = address(addresses_ptr, problem, WEIGHT + SIDE, tl.float32, ADDRESSES)
    rows = address(addresses_ptr, problem, ROWS + SIDE, tl.float32, ADDRESSES)
    steps = address(addresses_ptr, problem, STEPS + SIDE, tl.float32, ADDRESSES)
    skip = r * d
    ld = d if SIDE == 0 else r
    own_ld = d if SIDE == 0 else rm
    T: tl.constexpr = SIDE == 1
    Q: tl.constexpr = RP * RP
    if MASK & 1:
        at = out_ptr + WEIGHTED * Q
        partial_gram(at, rows, d, r, rows, d, r, metric, 1.0, start, end, False, False, HAS_METRIC, RP, KS)
    if MASK & 2:
        at = out_ptr + WEIGHTED_STEP * Q
        partial_gram(at, rows, d, r, steps, d, r, metric, 1.0, start, end, False, False, HAS_METRIC, RP, KS)
    if MASK & 4:
        at = out_ptr + CROSS * Q
        partial_gram(at, rows, d, r, own, own_ld, rm, metric, 1.0, start, end, False, T, False, RP, KS)
    if MASK & 8:
        at = out_ptr + OWN * Q
        partial_gram(at, rows + skip, d, rm, rows + skip, d, rm, metric, 1.0, start, end, False, False, False, RP, KS)
    if MASK & 16:
        at = out_ptr + OWN_STEP * Q
        partial_gram(at, rows + skip, d, rm, steps + skip, d, rm, metric, 1.0, start, end, False, False, False, RP, KS)
    if MASK & 32:
        at = out_ptr + START * Q
        partial_gram(at, rows, d, r, param, ld, r, metric, root, start, end, False, T, False, RP, KS)
    if MASK & 64:
        at = out_ptr + SLOPE * Q
        partial_gram(at, rows, d, r, grad, ld, r, metric, slope, start, end, False, T, False, RP, KS)
    if MASK & 128:
        at = out_ptr + OWN_START * Q
        partial_gram(at, rows + skip, d, rm, param, ld, r, metric, root, start, end, False, T, False, RP, KS)
    if MASK & 256:
        at = out_ptr + OWN_SLOPE * Q
        partial_gram(at, rows + skip, d, rm, grad, ld, r, metric, slope, start, end, False, T, False, RP, KS)


@triton.jit
def _correction(steps, log_beta):
    """Return 1 − β^steps from ln β without cancellation: −expm1(steps·ln β)."""
    x = steps * log_beta
    near = tl.maximum(x, -0.5)
    series = 1.0 + near / 9.0
    for i in tl.static_range(7):
        series = 1.0 + near / (8.0 - i) * series
    return tl.where(x < -0.5, 1.0 - tl.exp(x), -near * series)


@triton.jit
def _update_metric(
    addresses_ptr, scalars_ptr, dims_ptr, scale_ptr, problem, start, end,
    SIDE: tl.constexpr, SCALED: tl.constexpr, CORRECTED: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """D ← D + (1 − β₂)(new − D) and M = (D/(1 − β₂ᵗ) + δ)^γ for the columns of a tile, both into workspaces."""
    scalars = scalars_ptr + problem * SCALARS
    old = address(addresses_ptr, problem, METRIC + SIDE, tl.float32, ADDRESSES)
    squares = address(addresses_ptr, problem, SQUARES + SIDE, tl.float32, ADDRESSES)
    average = address(addresses_ptr, problem, AVERAGE + SIDE, tl.float32, ADDRESSES)
    weight = address(addresses_ptr, problem, WEIGHT + SIDE, tl.float32, ADDRESSES)
    factor = tl.load(scalars + STATISTIC + SIDE)
    if SCALED:
        scale = tl.load(scale_ptr) * tl.load(scale_ptr + 1)
        factor = factor * (scale * scale)
    power = tl.load(scalars + POWER)
    inverse = 1.0
    if CORRECTED:
        steps = tl.load(address(addresses_ptr, problem, COUNT, tl.float32, ADDRESSES))
        inverse = tl.div_rn(1.0, _correction(steps + 1.0, tl.load(scalars + LOG_BETA)))
    for first in range(start, end, BN):
        n = first + tl.arange(0, BN)
        inside = n < end
        before = tl.load(old + n, mask=inside, other=0.0)  # [BN]
        new = tl.load(squares + n, mask=inside, other=0.0) * factor
        after = before + (1.0 - tl.load(scalars + BETA)) * (new - before)
        base = after * inverse + tl.load(scalars + DAMPING)
        raised = tl.exp2(power * tl.log2(base))
        raised = tl.where(power == 0.5, tl.sqrt_rn(base), tl.where(power == 1.0, base, raised))
        tl.store(average + n, after, mask=inside)
        tl.store(weight + n, raised, mask=inside)


@triton.jit
def emit_rows(
    addresses_ptr, scalars_ptr, dims_ptr, problem, start, end,
    SIDE: tl.constexpr, RP: tl.constexpr, BN: tl.constexpr, PARAM_TYPE: tl.constexpr, HAS_MOMENTUM: tl.constexpr,
):  # fmt: skip
    """Write [√s·F₁; F_m1] as rows (r + r_m, d) fp32 for the products at the stored factors."""
    r, rm, d = sizes(dims_ptr, problem, SIDE)
    root = tl.load(scalars_ptr + problem * SCALARS + ROOT)
    param = address(addresses_ptr, problem, PARAM + SIDE, PARAM_TYPE, ADDRESSES)
    rows = address(addresses_ptr, problem, ROWS + SIDE, tl.float32, ADDRESSES)
    k = tl.arange(0, RP)[:, None]
    for first in range(start, end, BN):
        n = (first + tl.arange(0, BN))[None, :]
        inside = (n < end) & (k < r)  # [RP, BN]
        value = tl.load(param + element(k, n, d if SIDE == 0 else r, SIDE == 1), mask=inside, other=0.0)
        tl.store(rows + k * d + n, value.to(tl.float32) * root, mask=inside)
        if HAS_MOMENTUM:
            own = address(addresses_ptr, problem, MOMENTUM + SIDE, tl.float32, ADDRESSES)
            inside = (n < end) & (k < rm)
            value = tl.load(own + element(k, n, d if SIDE == 0 else rm, SIDE == 1), mask=inside, other=0.0)
            tl.store(rows + (k + r) * d + n, value, mask=inside)


@triton.jit
def _gram_side(
    addresses_ptr, scalars_ptr, dims_ptr, scale_ptr, out_ptr, problem, start, end,
    SIDE: tl.constexpr, RP: tl.constexpr, BN: tl.constexpr, KS: tl.constexpr,
    PARAM_TYPE: tl.constexpr, GRAD_TYPE: tl.constexpr, HAS_MOMENTUM: tl.constexpr,
    HAS_METRIC: tl.constexpr, SCALED: tl.constexpr, CORRECTED: tl.constexpr, EMIT: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    if HAS_METRIC:
        _update_metric(
            addresses_ptr, scalars_ptr, dims_ptr, scale_ptr, problem, start, end, SIDE, SCALED, CORRECTED, BN
        )
        tl.debug_barrier()  # the Grams read the weights that other threads have written
    if EMIT:
        emit_rows(addresses_ptr, scalars_ptr, dims_ptr, problem, start, end, SIDE, RP, BN, PARAM_TYPE, HAS_MOMENTUM)
    stored_grams(
        addresses_ptr, scalars_ptr, dims_ptr, scale_ptr, out_ptr, problem, start, end,
        SIDE, RP, KS, PARAM_TYPE, GRAD_TYPE, HAS_METRIC, MASK,
    )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def _gram_kernel(
    addresses_ptr, scalars_ptr, dims_ptr, tiles_ptr, scale_ptr, out_ptr,
    RP: tl.constexpr, BN: tl.constexpr, KS: tl.constexpr, KINDS: tl.constexpr,
    A_TYPE: tl.constexpr, B_TYPE: tl.constexpr, DA_TYPE: tl.constexpr, DB_TYPE: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr, HAS_METRIC: tl.constexpr, SCALED_A: tl.constexpr, SCALED_B: tl.constexpr,
    CORRECTED: tl.constexpr, EMIT_A: tl.constexpr, EMIT_B: tl.constexpr, MASK_A: tl.constexpr, MASK_B: tl.constexpr,
):  # fmt: skip
    """Before the first turn: the metric, the stored factors as rows and their partial Grams, a tile per program."""
    tile = tl.program_id(0).to(tl.int64)
    side, problem, start, end = tile_at(tiles_ptr, tile)
    out = out_ptr + tile * KINDS * RP * RP
    if side == 0:
        _gram_side(
            addresses_ptr, scalars_ptr, dims_ptr, scale_ptr, out, problem, start, end, 0, RP, BN, KS,
            A_TYPE, DA_TYPE, HAS_MOMENTUM, HAS_METRIC, SCALED_A, CORRECTED, EMIT_A, MASK_A,
        )  # fmt: skip
    else:
        _gram_side(
            addresses_ptr, scalars_ptr, dims_ptr, scale_ptr, out, problem, start, end, 1, RP, BN, KS,
            B_TYPE, DB_TYPE, HAS_MOMENTUM, HAS_METRIC, SCALED_B, CORRECTED, EMIT_B, MASK_B,
        )  # fmt: skip


def gram(
    addresses: Tensor, scalars: Tensor, dims: Tensor, tiles: Tensor, scale: Tensor, out: Tensor, **constexprs: Any
) -> None:
    """Launch `_gram_kernel` on the tiles of both sides; `out` (tiles, kinds, RP, RP) fp32 sets the padded rank."""
    BN, KS, _, warps = BLOCKS[out.shape[-1]]
    _gram_kernel[(tiles.shape[0],)](
        addresses, scalars, dims, tiles, scale, out,
        RP=out.shape[-1], BN=BN, KS=KS, KINDS=out.shape[1], **constexprs, num_warps=warps, num_stages=1,
        maxnreg=STREAM_REGISTERS,
    )  # fmt: skip


def _variants() -> list[Variant]:
    found = []
    for padded, (BN, KS, _, warps) in BLOCKS.items():
        constexprs = {
            "BN": BN, "KS": KS, "KINDS": 9, "A_TYPE": tl.bfloat16, "B_TYPE": tl.bfloat16, "DA_TYPE": tl.bfloat16,
            "DB_TYPE": tl.float32, "HAS_MOMENTUM": True, "HAS_METRIC": True, "SCALED_A": False, "SCALED_B": True,
            "CORRECTED": True, "EMIT_A": True, "EMIT_B": True, "MASK_A": 0b111101101, "MASK_B": 0b111101101,
        }  # fmt: skip
        found.append(variant("gram", _gram_kernel, padded, warps, constexprs, STREAM_REGISTERS))
        if padded <= FP32_UP_TO:
            fp32 = {**constexprs, "A_TYPE": tl.float32, "B_TYPE": tl.float32, "DA_TYPE": tl.float32}
            targets = (SLOW_TARGET,)
            found.append(variant("gram_fp32", _gram_kernel, padded, warps, fp32, STREAM_REGISTERS, targets=targets))
    return found


VARIANTS = _variants()
