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
from psilora.triton_kernels.split import rounded
from psilora.triton_kernels.twofold import power
from psilora.triton_kernels.variants import JOINT_TARGETS, SLOW_TARGET, Variant

#: Columns of a block and warps, by padded rank.
BLOCKS = {8: (64, 4), 16: (64, 4), 32: (64, 4), 64: (32, 8), 128: (16, 8)}


@triton.jit
def _product(c_ptr, y, top, first, RP: tl.constexpr, SIDE: tl.constexpr):
    """Return 16 rows Y from `first` on times their coefficients for the RP outputs from `top` on."""
    o = top + tl.arange(0, RP)
    k = first + tl.arange(0, 16)
    if SIDE == 0:
        return tl.dot(tl.load(c_ptr + o[:, None] * (4 * RP) + k[None, :]), y, input_precision="ieee")
    else:
        return tl.dot(y, tl.load(c_ptr + o[None, :] + k[:, None] * (3 * RP)), input_precision="ieee")


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
    factor = power(shift if SIDE == 0 else -shift)
    for begin in range(start, end, BN):
        columns = begin + tl.arange(0, BN)
        v, root = weights(addresses_ptr, settings_ptr, problem, taken, sigma, frozen, columns, columns < end, SIDE)
        n = columns[:, None] if T else columns[None, :]
        w = v[:, None] if T else v[None, :]
        shape: tl.constexpr = (BN, RP) if T else (RP, BN)
        of_f = tl.zeros(shape, tl.float32)
        of_1 = tl.zeros(shape, tl.float32)
        of_2 = tl.zeros(shape, tl.float32)
        for first in range(0, 4 * RP, 16):
            row = first + tl.arange(0, 16)
            z, own = rows_of(addresses_ptr, dims_ptr, problem, row, columns, end, SIDE, RP, WHOLE, F_TYPE, G_TYPE)
            y = z * tl.where(own, w, 1.0)
            # fma: a plain sum of products becomes a chain into one accumulator, miscompiled on sm_103.
            of_f = tl.fma(_product(c_ptr, y, 0, first, RP, SIDE), 1.0, of_f)
            if COMMIT:
                of_1 = tl.fma(_product(c_ptr, y, RP, first, RP, SIDE), 1.0, of_1)
                of_2 = tl.fma(_product(c_ptr, y, 2 * RP, first, RP, SIDE), 1.0, of_2)
        k = tl.arange(0, RP)[None, :] if T else tl.arange(0, RP)[:, None]
        inside = (k < r) & (n < end)
        step = of_f / w
        if COMMIT:
            at = f + element(k, n, r if T else d, T)
            old = tl.load(at, mask=inside, other=0.0)
            new = rounded(old.to(tl.float32) + step, F_TYPE)
            new = tl.where(step != 0.0, new, old)  # keeps a −0
            new = rounded(new.to(tl.float32) * factor, F_TYPE)
            tl.debug_barrier()  # other threads still read what is written now
            tl.store(at, new, mask=inside & (tl.where(step != 0.0, 1, tl.abs(shift)) != 0))
            tl.store(m + element(k, n, 2 * r if T else d, T), of_1, mask=inside)
            tl.store(m + element(r + k, n, 2 * r if T else d, T), of_2, mask=inside)
            tl.store(metric + columns, root, mask=columns < end)
        else:
            tl.store(steps + k * d + n, step, mask=inside)


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
