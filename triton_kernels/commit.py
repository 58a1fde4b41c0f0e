"""The last launch of a step: write the new factors and state where the step is accepted, and the Grams for the next.

A separate launch because a step is all or nothing: whether any layer produced a non-finite number is known only after
every solve has run.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

from typing import Any

from torch import Tensor

from psilora.triton_kernels import slots
from psilora.triton_kernels._compat import tl, triton
from psilora.triton_kernels.factor import COEFFICIENTS, SPLIT, SPLIT_INVERSE
from psilora.triton_kernels.gram import emit_rows, stored_grams
from psilora.triton_kernels.layout import (
    ADDRESSES,
    AVERAGE,
    BLOCKS,
    COUNT,
    METRIC,
    MOMENTUM,
    PARAM,
    ROOT,
    ROWS,
    SCALARS,
    STEPS,
    STREAM_REGISTERS,
    UNALIGNED,
    address,
    element,
    sizes,
    tile_at,
    variant,
)
from psilora.triton_kernels.split import rounded
from psilora.triton_kernels.variants import FP32_UP_TO, SLOW_TARGET, Variant


@triton.jit
def _balance(size_B, size_A, SIDE: tl.constexpr, IMBALANCE: tl.constexpr):
    """Return what the momentum's factor is multiplied with, t for A, 1/t for B, where ‖B_m‖² > IMBALANCE·‖A_m‖²."""
    ratio = size_B / size_A
    exponent = ((ratio.to(tl.int32, bitcast=True) >> 23) - 127) >> 2
    exponent = tl.where((ratio > IMBALANCE) & (ratio < float("inf")), exponent, 0)
    exponent = exponent if SIDE == 0 else -exponent
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _resplit(
    coefficients_ptr, rows_ptr, problem, n, end, rm, d, SIDE: tl.constexpr, RP: tl.constexpr, BN: tl.constexpr
):
    """L⁻¹·rows of A_m, Lᵀ·rows of B_mᵀ, (RP, BN), for columns n (1, BN)."""
    square = coefficients_ptr + (problem * COEFFICIENTS + (SPLIT_INVERSE if SIDE == 0 else SPLIT)) * RP * RP
    i = tl.arange(0, RP)[:, None]
    total = tl.zeros((RP, BN), tl.float32)
    for first in range(0, RP, 16):
        k = first + tl.arange(0, 16)
        at = i * RP + k[None, :] if SIDE == 0 else k[None, :] * RP + i
        rows = tl.load(rows_ptr + k[:, None] * d + n, mask=(k[:, None] < rm) & (n < end), other=0.0)
        total += tl.dot(tl.load(square + at), rows, input_precision="ieee")
    return total


@triton.jit
def _commit_side(
    addresses_ptr, scalars_ptr, dims_ptr, coefficients_ptr, sizes_ptr, shifts_ptr, problem, problems, start, end,
    SIDE: tl.constexpr, RP: tl.constexpr, BN: tl.constexpr, PARAM_TYPE: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr, IMBALANCE: tl.constexpr, HAS_METRIC: tl.constexpr, OWN: tl.constexpr,
    SHIFTED: tl.constexpr, ON_FACTORS: tl.constexpr, RESPLIT: tl.constexpr,
):  # fmt: skip
    """F ← t·(F + F_s/√s), F_m and D ← their workspaces, step ← step + 1, for the columns of a tile.

    t = 2ᵏ for A and 2⁻ᵏ for B, k of `shifts_ptr`; entries with F_s = 0 and t = 1 are not written. ON_FACTORS: F_m/t.
    RESPLIT: where the factor launch has found it due, A_m ← L⁻¹A_m and B_m ← B_mL, and no sizes are balanced.
    """
    r, rm, d = sizes(dims_ptr, problem, SIDE)
    root = tl.load(scalars_ptr + problem * SCALARS + ROOT)
    param = address(addresses_ptr, problem, PARAM + SIDE, PARAM_TYPE, ADDRESSES)
    steps = address(addresses_ptr, problem, STEPS + SIDE, tl.float32, ADDRESSES)
    rows = address(addresses_ptr, problem, ROWS + SIDE, tl.float32, ADDRESSES)
    own = address(addresses_ptr, problem, MOMENTUM + SIDE, tl.float32, ADDRESSES)
    k = tl.arange(0, RP)[:, None]
    weight = 1.0
    power = 1.0
    if IMBALANCE > 0:
        weight = _balance(tl.load(sizes_ptr + problems + problem), tl.load(sizes_ptr + problem), SIDE, IMBALANCE)
    split = 0.0
    if RESPLIT:
        split = tl.load(sizes_ptr + 2 * problems + problem)
        weight = tl.where(split > 0.0, 1.0, weight)
    if SHIFTED:
        shift = tl.load(shifts_ptr + problem)
        shift = shift if SIDE == 0 else -shift
        power = ((shift + 127) << 23).to(tl.float32, bitcast=True)
        if ON_FACTORS:
            weight = ((127 - shift) << 23).to(tl.float32, bitcast=True)
    for first in range(start, end, BN):
        n = (first + tl.arange(0, BN))[None, :]
        inside = (n < end) & (k < r)  # [RP, BN]
        at = param + element(k, n, d if SIDE == 0 else r, SIDE == 1)
        old = tl.load(at, mask=inside, other=0.0)
        step = tl.load(steps + k * d + n, mask=inside, other=0.0)
        new = rounded(old.to(tl.float32) + tl.div_rn(step, root), PARAM_TYPE)
        inside &= tl.where(step != 0.0, 1.0, power - 1.0) != 0.0
        if SHIFTED:
            new = tl.where(step != 0.0, new, old)  # keeps a −0
            new = rounded(new.to(tl.float32) * power, PARAM_TYPE)
        tl.store(at, new, mask=inside)
        if HAS_MOMENTUM:
            for block in tl.static_range(OWN):
                j = k + block * RP
                inside = (n < end) & (j < rm)  # [RP, BN]
                new = tl.load(rows + (j + r) * d + n, mask=inside, other=0.0) * weight
                if RESPLIT:
                    if split > 0.0:
                        new = _resplit(coefficients_ptr, rows + r * d, problem, n, end, rm, d, SIDE, RP, BN)
                tl.store(own + element(j, n, d if SIDE == 0 else rm, SIDE == 1), new, mask=inside)
        if HAS_METRIC:
            column = first + tl.arange(0, BN)  # [BN]
            new = tl.load(
                address(addresses_ptr, problem, AVERAGE + SIDE, tl.float32, ADDRESSES) + column, mask=column < end
            )
            tl.store(
                address(addresses_ptr, problem, METRIC + SIDE, tl.float32, ADDRESSES) + column, new, mask=column < end
            )
    if start == 0:
        count = address(addresses_ptr, problem, COUNT + SIDE, tl.float32, ADDRESSES)
        steps_before = tl.load(count)  # by every thread, and the store is one thread's
        tl.debug_barrier()
        tl.store(count, steps_before + 1.0)


@triton.jit
def _commit_tile(
    addresses_ptr, scalars_ptr, dims_ptr, scale_ptr, coefficients_ptr, sizes_ptr, shifts_ptr, ok, out_ptr, problem,
    problems, start, end,
    SIDE: tl.constexpr, RP: tl.constexpr, BN: tl.constexpr, KS: tl.constexpr, PARAM_TYPE: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr, IMBALANCE: tl.constexpr, HAS_METRIC: tl.constexpr, OWN: tl.constexpr,
    SHIFTED: tl.constexpr, ON_FACTORS: tl.constexpr, RESPLIT: tl.constexpr, EMIT: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    if ok:
        _commit_side(
            addresses_ptr, scalars_ptr, dims_ptr, coefficients_ptr, sizes_ptr, shifts_ptr, problem, problems, start,
            end, SIDE, RP, BN, PARAM_TYPE, HAS_MOMENTUM, IMBALANCE, HAS_METRIC, OWN, SHIFTED, ON_FACTORS, RESPLIT,
        )  # fmt: skip
        tl.debug_barrier()  # the Grams read what other threads have written
    if EMIT:
        emit_rows(addresses_ptr, scalars_ptr, dims_ptr, problem, start, end, SIDE, RP, BN, PARAM_TYPE, HAS_MOMENTUM)
    stored_grams(
        addresses_ptr, scalars_ptr, dims_ptr, scale_ptr, out_ptr, problem, start, end,
        SIDE, RP, KS, PARAM_TYPE, tl.float32, False, MASK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["problems"], do_not_specialize_on_alignment=UNALIGNED)
def _commit_kernel(
    addresses_ptr, scalars_ptr, dims_ptr, tiles_ptr, scale_ptr, coefficients_ptr, sizes_ptr, shifts_ptr, ok_ptr,
    out_ptr, problems,
    RP: tl.constexpr, BN: tl.constexpr, KS: tl.constexpr, KINDS: tl.constexpr,
    A_TYPE: tl.constexpr, B_TYPE: tl.constexpr, HAS_MOMENTUM: tl.constexpr, IMBALANCE: tl.constexpr,
    HAS_METRIC: tl.constexpr, OWN: tl.constexpr, SHIFTED: tl.constexpr, ON_FACTORS: tl.constexpr,
    RESPLIT: tl.constexpr, EMIT_A: tl.constexpr, EMIT_B: tl.constexpr, MASK_A: tl.constexpr, MASK_B: tl.constexpr,
):  # fmt: skip
    """Commit one tile of columns of one factor and its state where ok (uint8) holds, bitwise nothing elsewhere."""
    tile = tl.program_id(0).to(tl.int64)
    side, problem, start, end = tile_at(tiles_ptr, tile)
    out = out_ptr + tile * KINDS * RP * RP
    ok = tl.load(ok_ptr) != 0
    if side == 0:
        _commit_tile(
            addresses_ptr, scalars_ptr, dims_ptr, scale_ptr, coefficients_ptr, sizes_ptr, shifts_ptr, ok, out, problem,
            problems, start, end, 0, RP, BN, KS, A_TYPE, HAS_MOMENTUM, IMBALANCE, HAS_METRIC, OWN, SHIFTED, ON_FACTORS,
            RESPLIT, EMIT_A, MASK_A,
        )  # fmt: skip
    else:
        _commit_tile(
            addresses_ptr, scalars_ptr, dims_ptr, scale_ptr, coefficients_ptr, sizes_ptr, shifts_ptr, ok, out, problem,
            problems, start, end, 1, RP, BN, KS, B_TYPE, HAS_MOMENTUM, IMBALANCE, HAS_METRIC, OWN, SHIFTED, ON_FACTORS,
            RESPLIT, EMIT_B, MASK_B,
        )  # fmt: skip


def commit(
    addresses: Tensor, scalars: Tensor, dims: Tensor, tiles: Tensor, scale: Tensor, ok: Tensor, out: Tensor,
    *, sizes: Tensor | None = None, imbalance: float = 0.0, coefficients: Tensor | None = None,
    shifts: Tensor | None = None, OWN: int = 1, ON_FACTORS: bool = False, **constexprs: Any,
) -> None:  # fmt: skip
    """Launch `_commit_kernel` on the tiles of both sides; `ok` uint8 on the device, `out` as for `gram`.

    A momentum has up to OWN times as many rows as the padded rank. It is balanced by its `sizes` (2, L) of A and B
    where their ratio is above `imbalance`, unless that is 0, and split anew by the `coefficients` of the factor launch,
    if given, where that has said so in a third row of `sizes`. The factors are balanced by `shifts` k (L,) int32, as
    2ᵏ·A and 2⁻ᵏ·B, and a momentum ON_FACTORS the other way.
    """
    BN, KS, _, warps = BLOCKS[out.shape[-1]]
    _commit_kernel[(tiles.shape[0],)](
        addresses, scalars, dims, tiles, scale, scale if coefficients is None else coefficients,
        scale if sizes is None else sizes,
        dims if shifts is None else shifts, ok, out, dims.shape[0],
        RP=out.shape[-1], BN=BN, KS=KS, KINDS=out.shape[1], OWN=OWN, IMBALANCE=imbalance,
        SHIFTED=shifts is not None, ON_FACTORS=ON_FACTORS, RESPLIT=coefficients is not None, **constexprs,
        num_warps=warps, num_stages=1, maxnreg=STREAM_REGISTERS,
    )  # fmt: skip


def _variants() -> list[Variant]:
    found = []
    for padded, (BN, KS, _, warps) in BLOCKS.items():
        constexprs = {
            "BN": BN, "KS": KS, "KINDS": 5, "A_TYPE": tl.bfloat16, "B_TYPE": tl.float32, "HAS_MOMENTUM": True,
            "IMBALANCE": slots.IMBALANCE, "HAS_METRIC": True, "OWN": 1, "SHIFTED": True, "ON_FACTORS": False,
            "RESPLIT": True, "EMIT_A": True, "EMIT_B": True, "MASK_A": 0b1101, "MASK_B": 0b1101,
        }  # fmt: skip
        found.append(variant("commit", _commit_kernel, padded, warps, constexprs, STREAM_REGISTERS))
        if padded <= FP32_UP_TO:
            fp32, targets = {**constexprs, "A_TYPE": tl.float32}, (SLOW_TARGET,)
            found.append(variant("commit_fp32", _commit_kernel, padded, warps, fp32, STREAM_REGISTERS, targets=targets))
        spectral = {
            **constexprs, "IMBALANCE": 0.0, "OWN": 2, "RESPLIT": False, "EMIT_A": False, "EMIT_B": False,
            "MASK_A": 0, "MASK_B": 0,
        }  # fmt: skip
        found.append(variant("commit_spectral", _commit_kernel, padded, warps, spectral, STREAM_REGISTERS))
    return found


VARIANTS = _variants()
