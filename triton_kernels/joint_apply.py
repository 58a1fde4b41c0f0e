"""The last launch of the joint spectral step: new factors and state in place, where the step is accepted.

With coefficients C over the rows Y = [F·v; M₁; M₂; D] of a side, P = C·Y gives ΔF = P_F/v and M⁺ = P_M. A program owns
its columns: it reads all rows of a block of them, then writes. Nothing is written where the step is refused.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

from typing import Any

from torch import Tensor

from psilora.triton_kernels._compat import tl, triton
from psilora.triton_kernels.joint_core import OUT_SHIFT, OUTCOME
from psilora.triton_kernels.joint_layout import (
    ADDRESSES,
    COUNT,
    FACTOR,
    METRIC,
    MOMENTUM,
    NEW_STEPS,
    NORMS,
    SEEN,
    SIGMA,
    STEPS,
    TAKEN,
    rows_of,
    weights,
)
from psilora.triton_kernels.layout import UNALIGNED, address, element, sizes, tile_at
from psilora.triton_kernels.split import rounded, split3
from psilora.triton_kernels.twofold import power
from psilora.triton_kernels.variants import JOINT_TARGETS, SLOW_TARGET, Variant

#: Columns of a block and warps, by padded rank.
BLOCKS = {8: (64, 4), 16: (64, 8), 32: (64, 8), 64: (32, 8), 128: (16, 8)}


@triton.jit
def _parts(c_ptr, top, first, RP: tl.constexpr, ROWS: tl.constexpr, SIDE: tl.constexpr):
    """Return the coefficients of ROWS rows from `first` on for the RP outputs from `top` on, in three parts."""
    o = top + tl.arange(0, RP)
    k = first + tl.arange(0, ROWS)
    at = o[:, None] * (4 * RP) + k[None, :] if SIDE == 0 else o[None, :] + k[:, None] * (3 * RP)
    return split3(tl.load(c_ptr + at), tl.bfloat16)


@triton.jit
def _product(c1, c2, c3, y1, y2, y3, total, SIDE: tl.constexpr):
    """Return total + C·Y, or Yᵀ·Cᵀ of B's side, of what has been cut into three parts each: off by 2⁻²⁴ of |C|·|Y|."""
    if SIDE == 1:
        c1, c2, c3, y1, y2, y3 = y1, y2, y3, c1, c2, c3
    # fma: a plain sum of products becomes a chain into one accumulator, miscompiled on sm_103.
    low = tl.fma(tl.dot(c3, y1), 1.0, tl.dot(c1, y3))
    low = tl.fma(tl.dot(c2, y2), 1.0, low)
    low = tl.fma(tl.dot(c2, y1), 1.0, low)
    low = tl.fma(tl.dot(c1, y2), 1.0, low)
    return tl.fma(tl.dot(c1, y1), 1.0, low) + total


@triton.jit
def _apply_side(
    addresses_ptr, settings_ptr, dims_ptr, c_ptr, taken, sigma, frozen, shift, problem, start, end,
    SIDE: tl.constexpr, RP: tl.constexpr, BN: tl.constexpr, COMMIT: tl.constexpr, WHOLE: tl.constexpr,
    F_TYPE: tl.constexpr, G_TYPE: tl.constexpr,
):  # fmt: skip
    r, _, d = sizes(dims_ptr, problem, SIDE)
    T: tl.constexpr = SIDE == 1
    f = address(addresses_ptr, problem, FACTOR + SIDE, F_TYPE, ADDRESSES)
    m = address(addresses_ptr, problem, MOMENTUM + SIDE, tl.float32, ADDRESSES)
    steps = address(addresses_ptr, problem, STEPS + SIDE, tl.float32, ADDRESSES)
    metric = address(addresses_ptr, problem, METRIC + SIDE, tl.float32, ADDRESSES)
    if WHOLE:
        f, m, r = tl.multiple_of(f, 16), tl.multiple_of(m, 16), RP
        d = tl.multiple_of(d, 64)
    factor = power(shift if SIDE == 0 else -shift)
    ROWS: tl.constexpr = 4 * RP if RP < 16 else 64 if RP < 128 else 32
    f1, f2, f3 = _parts(c_ptr, 0, 0, RP, ROWS, SIDE)
    a1, a2, a3 = _parts(c_ptr, RP, 0, RP, ROWS, SIDE)
    b1, b2, b3 = _parts(c_ptr, 2 * RP, 0, RP, ROWS, SIDE)
    for begin in range(start, end, BN):
        columns = begin + tl.arange(0, BN)
        v, root = weights(addresses_ptr, settings_ptr, problem, taken, sigma, frozen, columns, columns < end, SIDE)
        n = columns[:, None] if T else columns[None, :]
        w = v[:, None] if T else v[None, :]
        shape: tl.constexpr = (BN, RP) if T else (RP, BN)
        of_f = tl.zeros(shape, tl.float32)
        of_1 = tl.zeros(shape, tl.float32)
        of_2 = tl.zeros(shape, tl.float32)
        for first in range(0, 4 * RP, ROWS):
            row = first + tl.arange(0, ROWS)
            z, own = rows_of(addresses_ptr, dims_ptr, problem, row, columns, end, SIDE, RP, SIDE, WHOLE, F_TYPE, G_TYPE)
            y1, y2, y3 = split3(z * tl.where(own, w, 1.0), tl.bfloat16)
            if ROWS < 4 * RP:
                f1, f2, f3 = _parts(c_ptr, 0, first, RP, ROWS, SIDE)
            of_f = _product(f1, f2, f3, y1, y2, y3, of_f, SIDE)
            if COMMIT:
                if ROWS < 4 * RP:
                    a1, a2, a3 = _parts(c_ptr, RP, first, RP, ROWS, SIDE)
                of_1 = _product(a1, a2, a3, y1, y2, y3, of_1, SIDE)
                if ROWS < 4 * RP:
                    b1, b2, b3 = _parts(c_ptr, 2 * RP, first, RP, ROWS, SIDE)
                of_2 = _product(b1, b2, b3, y1, y2, y3, of_2, SIDE)
        k = tl.arange(0, RP)[None, :] if T else tl.arange(0, RP)[:, None]
        step = of_f / w
        if COMMIT:
            at = f + element(k, n, r if T else d, T)
            of_1_at = m + element(k, n, 2 * r if T else d, T)
            of_2_at = m + element(r + k, n, 2 * r if T else d, T)
            if WHOLE:
                at = tl.multiple_of(tl.max_contiguous(at, (1, 8)), (1, 16))
                of_1_at = tl.multiple_of(tl.max_contiguous(of_1_at, (1, 8)), (1, 16))
                of_2_at = tl.multiple_of(tl.max_contiguous(of_2_at, (1, 8)), (1, 16))
                old = tl.load(at)
            else:
                old = tl.load(at, mask=(k < r) & (n < end), other=0.0)
            new = rounded(old.to(tl.float32) + step, F_TYPE)
            new = tl.where(step != 0.0, new, old)  # keeps a −0
            new = rounded(new.to(tl.float32) * factor, F_TYPE)
            tl.debug_barrier()  # other threads still read what is written now
            if WHOLE:
                tl.store(at, new)
                tl.store(of_1_at, of_1)
                tl.store(of_2_at, of_2)
            else:
                inside = (k < r) & (n < end)
                tl.store(at, new, mask=inside)
                tl.store(of_1_at, of_1, mask=inside)
                tl.store(of_2_at, of_2, mask=inside)
            tl.store(metric + columns, root, mask=columns < end)
        else:
            tl.store(steps + k * d + n, step, mask=(k < r) & (n < end))


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def _apply_kernel(
    addresses_ptr, settings_ptr, dims_ptr, tiles_ptr, c_ptr, seen_ptr, frozen_ptr, outcome_ptr, ok_ptr, layers,
    RP: tl.constexpr, BN: tl.constexpr, COMMIT: tl.constexpr, FOLLOWS: tl.constexpr, WHOLE: tl.constexpr,
    F_A: tl.constexpr, F_B: tl.constexpr, G_A: tl.constexpr, G_B: tl.constexpr,
):  # fmt: skip
    """New factor, momentum and metric of a tile's columns in place where ok (uint8) holds, or ΔF into STEPS."""
    tile = tl.program_id(0).to(tl.int64)
    side, problem, start, end = tile_at(tiles_ptr, tile)
    found = seen_ptr + problem * SEEN
    taken = tl.load(found + TAKEN)
    shift = tl.load(outcome_ptr + problem * OUTCOME + OUT_SHIFT)
    if tl.load(ok_ptr) != 0:
        if side == 0:
            frozen = tl.load(frozen_ptr + problem) != 0
            _apply_side(
                addresses_ptr, settings_ptr, dims_ptr, c_ptr + problem * (12 * RP * RP), taken,
                tl.load(found + SIGMA), frozen, shift, problem, start, end, 0, RP, BN, COMMIT, WHOLE, F_A, G_A,
            )  # fmt: skip
        else:
            _apply_side(
                addresses_ptr, settings_ptr, dims_ptr, c_ptr + (layers + problem) * (12 * RP * RP), taken,
                tl.load(found + SIGMA + 1), taken < 0.0, shift, problem, start, end, 1, RP, BN, COMMIT, WHOLE, F_B, G_B,
            )  # fmt: skip
        if COMMIT:
            if start == 0:
                count = tl.load(addresses_ptr + problem * ADDRESSES + COUNT + side).to(tl.pointer_type(tl.float32))
                steps = tl.load(count) + 1.0
                tl.debug_barrier()
                tl.store(count, steps)
                if FOLLOWS:
                    if side == 1:
                        norms = address(addresses_ptr, problem, NORMS, tl.float64, ADDRESSES)
                        tl.store(norms, tl.load(found + NEW_STEPS).to(tl.float64))
                        tl.store(norms + 1, tl.load(found + NEW_STEPS + 1).to(tl.float64))
                        tl.store(norms + 2, tl.load(found + NEW_STEPS + 2).to(tl.float64))


def apply(
    addresses: Tensor, settings: Tensor, dims: Tensor, tiles: Tensor, coefficients: Tensor, found: Tensor,
    frozen: Tensor, outcome: Tensor, ok: Tensor, *, commit: bool, follows: bool, whole: bool,
    types: tuple[Any, Any, Any, Any],
) -> None:  # fmt: skip
    """Launch `_apply_kernel`.

    Takes, beside what `joint_gram.gram` describes:
        coefficients: (2, L, 3·RP, 4·RP) fp32, rows ΔF, M₁⁺, M₂⁺, columns F, M₁, M₂, D; those of B transposed.
        found, outcome: What `joint_core.collect` and `joint_core.finish` have left.
        ok: 0-d uint8, whether anything is written.
        commit: Whether parameters and state are written; else the increments of F, into the rows STEPS.
        follows: Whether the norms of gradients are state.
    """
    padded = coefficients.shape[-1] // 4
    BN, warps = BLOCKS[padded]
    _apply_kernel[(tiles.shape[0],)](
        addresses, settings, dims, tiles, coefficients, found, frozen, outcome, ok, dims.shape[0],
        RP=padded, BN=BN, COMMIT=commit, FOLLOWS=follows, WHOLE=whole, F_A=types[0], F_B=types[1], G_A=types[2], G_B=types[3],
        num_warps=warps, num_stages=1,
    )  # fmt: skip


def _variants() -> list[Variant]:
    found = []
    types = {
        "addresses_ptr": "*i64", "settings_ptr": "*fp32", "dims_ptr": "*i32", "tiles_ptr": "*i32", "c_ptr": "*fp32",
        "seen_ptr": "*fp32", "frozen_ptr": "*i32", "outcome_ptr": "*i32", "ok_ptr": "*u8", "layers": "i32",
    }  # fmt: skip
    for padded, (BN, warps) in BLOCKS.items():
        constexprs = {
            "RP": padded, "BN": BN, "COMMIT": True, "FOLLOWS": True, "WHOLE": False, "F_A": tl.bfloat16, "F_B": tl.float32,
            "G_A": tl.bfloat16, "G_B": tl.float32,
        }  # fmt: skip
        found.append(
            Variant(
                name=f"joint_apply_r{padded}",
                kernel=_apply_kernel,
                signature=types,
                constexprs=constexprs,
                aligned=("dims_ptr", "tiles_ptr", "c_ptr", "seen_ptr", "frozen_ptr", "outcome_ptr"),
                num_warps=warps,
                num_stages=1,
                max_registers=255,
                targets=JOINT_TARGETS if padded == 16 else (SLOW_TARGET,),
            )
        )
    return found


VARIANTS = _variants()
