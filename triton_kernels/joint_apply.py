"""The last launch of the joint spectral step: new factors and state in place, where the step is accepted.

With coefficients C over the rows Y = [F·v; M₁; M₂; D] of a side, P = C·Y gives ΔF = P_F/v and M⁺ = P_M. A program owns
its columns: it reads all rows of a block of them, then writes. Nothing is written where the step is refused.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

from typing import Any

from torch import Tensor

from psilora.triton_kernels._compat import tl, triton
from psilora.triton_kernels.joint_algebra import OUT_SHIFT, OUTCOME
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
    aligned,
    rows_of,
    weights,
)
from psilora.triton_kernels.layout import UNALIGNED, address, element, sizes, tile_at
from psilora.triton_kernels.split import add_product, rounded, split3
from psilora.triton_kernels.twofold import power
from psilora.triton_kernels.variants import Variant, joint_targets

#: Columns of a block and warps, by padded rank.
BLOCKS = {8: (64, 4), 16: (64, 8), 32: (64, 8), 64: (32, 8), 128: (32, 8)}


@triton.jit
def _coefficients(c_ptr, top, first, RP: tl.constexpr, ROWS: tl.constexpr, SIDE: tl.constexpr, TURNED: tl.constexpr):
    """Return the coefficients of ROWS rows from `first` on for the RP outputs from `top` on, in three parts."""
    o = top + tl.arange(0, RP)
    k = first + tl.arange(0, ROWS)
    o = o[None, :] if TURNED else o[:, None]
    k = k[:, None] if TURNED else k[None, :]
    return split3(tl.load(c_ptr + (o * (4 * RP) + k if SIDE == 0 else o + k * (3 * RP))), tl.bfloat16)


@triton.jit
def _add(c1, c2, c3, y1, y2, y3, total, TURNED: tl.constexpr):
    """Return total + C·y, or + y·C where both are transposed."""
    if TURNED:
        return add_product(y1, y2, y3, c1, c2, c3, total)
    else:
        return add_product(c1, c2, c3, y1, y2, y3, total)


@triton.jit
def _apply_side(
    addresses_ptr, settings_ptr, dims_ptr, c_ptr, taken, sigma, frozen, shift, problem, start, end,
    SIDE: tl.constexpr, RP: tl.constexpr, BN: tl.constexpr, COMMIT: tl.constexpr, WHOLE: tl.constexpr,
    F_TYPE: tl.constexpr, G_TYPE: tl.constexpr,
):  # fmt: skip
    r, _, d = sizes(dims_ptr, problem, SIDE)
    # Above rank 32 columns come first: of 64 coefficients, asynchronous products would be what sm_90 has for them, and
    # their first operands come from registers.
    TURNED: tl.constexpr = RP > 32
    KEPT: tl.constexpr = RP <= 16  # coefficients
    AXIS: tl.constexpr = 1 if TURNED else 0  # of rows
    T: tl.constexpr = SIDE == 1
    f = address(addresses_ptr, problem, FACTOR + SIDE, F_TYPE, ADDRESSES)
    m = address(addresses_ptr, problem, MOMENTUM + SIDE, tl.float32, ADDRESSES)
    steps = address(addresses_ptr, problem, STEPS + SIDE, tl.float32, ADDRESSES)
    metric = address(addresses_ptr, problem, METRIC + SIDE, tl.float32, ADDRESSES)
    if WHOLE:
        r = RP
    factor = power(shift if SIDE == 0 else -shift)
    ROWS: tl.constexpr = 32 if TURNED or RP == 8 else 64
    if KEPT:
        f1, f2, f3 = _coefficients(c_ptr, 0, 0, RP, ROWS, SIDE, TURNED)
        a1, a2, a3 = _coefficients(c_ptr, RP, 0, RP, ROWS, SIDE, TURNED)
        b1, b2, b3 = _coefficients(c_ptr, 2 * RP, 0, RP, ROWS, SIDE, TURNED)
    for begin in range(start, end, BN):
        columns = begin + tl.arange(0, BN)
        v, root, _share = weights(
            addresses_ptr, settings_ptr, problem, taken, sigma, frozen, columns, columns < end, SIDE
        )
        n = columns[:, None] if AXIS == 1 else columns[None, :]
        w = v[:, None] if AXIS == 1 else v[None, :]
        shape: tl.constexpr = (BN, RP) if AXIS == 1 else (RP, BN)
        of_f = tl.zeros(shape, tl.float32)
        of_1 = tl.zeros(shape, tl.float32)
        of_2 = tl.zeros(shape, tl.float32)
        for first in range(0, 4 * RP, ROWS):
            row = first + tl.arange(0, ROWS)
            z, own = rows_of(addresses_ptr, dims_ptr, problem, row, columns, end, SIDE, RP, AXIS, WHOLE, F_TYPE, G_TYPE)
            y = z * tl.where(own, w, 1.0)
            y1, y2, y3 = split3(y, tl.bfloat16)
            if not KEPT:
                f1, f2, f3 = _coefficients(c_ptr, 0, first, RP, ROWS, SIDE, TURNED)
            of_f = _add(f1, f2, f3, y1, y2, y3, of_f, TURNED)
            if COMMIT:
                if not KEPT:
                    a1, a2, a3 = _coefficients(c_ptr, RP, first, RP, ROWS, SIDE, TURNED)
                of_1 = _add(a1, a2, a3, y1, y2, y3, of_1, TURNED)
                if not KEPT:
                    b1, b2, b3 = _coefficients(c_ptr, 2 * RP, first, RP, ROWS, SIDE, TURNED)
                of_2 = _add(b1, b2, b3, y1, y2, y3, of_2, TURNED)
        k = tl.arange(0, RP)[None, :] if AXIS == 1 else tl.arange(0, RP)[:, None]
        step = of_f / w
        if COMMIT:
            at = aligned(f, element(k, n, r if T else d, T), AXIS, T, WHOLE)
            first_at = aligned(m, element(k, n, 2 * r if T else d, T), AXIS, T, WHOLE)
            second_at = aligned(m, element(r + k, n, 2 * r if T else d, T), AXIS, T, WHOLE)
            if WHOLE:
                old = tl.load(at)
            else:
                old = tl.load(at, mask=(k < r) & (n < end), other=0.0)
            new = rounded(old.to(tl.float32) + step, F_TYPE)
            new = tl.where(step != 0.0, new, old)  # keeps a −0
            new = rounded(new.to(tl.float32) * factor, F_TYPE)
            tl.debug_barrier()  # other threads still read what is written now
            if WHOLE:
                tl.store(at, new)
                tl.store(first_at, of_1)
                tl.store(second_at, of_2)
            else:
                inside = (k < r) & (n < end)
                tl.store(at, new, mask=inside)
                tl.store(first_at, of_1, mask=inside)
                tl.store(second_at, of_2, mask=inside)
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
        found, outcome: What `joint_collect.collect` and `joint_finish.finish` have left.
        ok: 0-d uint8, whether anything is written.
        whole: As for `joint_gram.gram`.
        commit: Whether parameters and state are written; else the increments of F, into the rows STEPS.
        follows: Whether the norms of gradients are state.
    """
    padded = coefficients.shape[-1] // 4
    BN, warps = BLOCKS[padded]
    _apply_kernel[(tiles.shape[0],)](
        addresses, settings, dims, tiles, coefficients, found, frozen, outcome, ok, dims.shape[0],
        RP=padded, BN=BN, COMMIT=commit, FOLLOWS=follows, WHOLE=whole, F_A=types[0], F_B=types[1], G_A=types[2],
        G_B=types[3], num_warps=warps, num_stages=1,
    )  # fmt: skip


def _variants() -> list[Variant]:
    found = []
    types = {
        "addresses_ptr": "*i64", "settings_ptr": "*fp32", "dims_ptr": "*i32", "tiles_ptr": "*i32", "c_ptr": "*fp32",
        "seen_ptr": "*fp32", "frozen_ptr": "*i32", "outcome_ptr": "*i32", "ok_ptr": "*u8", "layers": "i32",
    }  # fmt: skip
    mixed = {"F_A": tl.bfloat16, "F_B": tl.float32, "G_A": tl.bfloat16, "G_B": tl.float32, "WHOLE": False}
    plain = {**dict.fromkeys(("F_A", "F_B", "G_A", "G_B"), tl.float32), "WHOLE": True}
    for padded, (BN, warps) in BLOCKS.items():
        for kind, own in (("", mixed), ("_fp32", plain)):
            found.append(
                Variant(
                    name=f"joint_apply{kind}_r{padded}",
                    kernel=_apply_kernel,
                    signature=types,
                    constexprs={"RP": padded, "BN": BN, "COMMIT": True, "FOLLOWS": True, **own},
                    aligned=("dims_ptr", "tiles_ptr", "c_ptr", "seen_ptr", "frozen_ptr", "outcome_ptr"),
                    num_warps=warps,
                    num_stages=1,
                    max_registers=255,
                    targets=joint_targets(padded),
                )
            )
    return found


VARIANTS = _variants()
