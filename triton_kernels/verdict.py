"""`verdict`: what a step of a bucket has come to, in one launch: is it finite, what was repaired, what is balanced.

What is balanced depends on the norms of the stored factors, whose squares `norms` sums by tile in a launch before.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from psilora.triton_kernels._compat import tl, triton
from psilora.triton_kernels.layout import ADDRESSES, COUNT, PARAM, UNALIGNED, address, sizes, tile_at
from psilora.triton_kernels.variants import Variant

#: Layers that are looked at together by the one program of a verdict, and entries by those of the norms.
BLOCK = 128


@triton.jit
def _squared(x, TYPE: tl.constexpr):
    """Return x² in float64; of 16-bit numbers, whose squares fp32 holds to the bit, through fp32."""
    if TYPE == tl.float32:
        return x.to(tl.float64) * x.to(tl.float64)
    else:
        return (x.to(tl.float32) * x.to(tl.float32)).to(tl.float64)


@triton.jit
def _square(addresses_ptr, dims_ptr, problem, start, end, SIDE: tl.constexpr, TYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Return Σ F² over the columns start … end − 1 of a side, in float64."""
    r, _, d = sizes(dims_ptr, problem, SIDE)
    param = address(addresses_ptr, problem, PARAM + SIDE, TYPE, ADDRESSES)
    total = tl.zeros((BLOCK,), tl.float64)  # [BLOCK]
    if SIDE == 0:
        row = param
        for _ in range(r):
            for first in range(start, end, BLOCK):
                n = first + tl.arange(0, BLOCK)
                total += _squared(tl.load(row + n, mask=n < end, other=0.0), TYPE)
            row += d
    else:
        stop = end.to(tl.int64) * r
        for first in range(start.to(tl.int64) * r, stop, BLOCK):
            n = first + tl.arange(0, BLOCK)
            total += _squared(tl.load(param + n, mask=n < stop, other=0.0), TYPE)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def _norms_kernel(
    addresses_ptr, dims_ptr, tiles_ptr, sums_ptr, A_TYPE: tl.constexpr, B_TYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Σ F² of the stored factor over a tile of columns of one layer."""
    tile = tl.program_id(0).to(tl.int64)
    side, problem, start, end = tile_at(tiles_ptr, tile)
    if side == 0:
        tl.store(sums_ptr + tile, _square(addresses_ptr, dims_ptr, problem, start, end, 0, A_TYPE, BLOCK))
    else:
        tl.store(sums_ptr + tile, _square(addresses_ptr, dims_ptr, problem, start, end, 1, B_TYPE, BLOCK))


@triton.jit
def _gathered(sums_ptr, parts_ptr, layer, inside, longest, BLOCK: tl.constexpr):
    """Return the sums of layers [BLOCK] on a side, whose tiles, at most `longest`, are added in order."""
    first = tl.load(parts_ptr + layer * 2, mask=inside, other=0)
    count = tl.load(parts_ptr + layer * 2 + 1, mask=inside, other=0)
    total = tl.zeros((BLOCK,), tl.float64)
    for t in range(longest):
        total += tl.load(sums_ptr + first + t, mask=inside & (t < count), other=0.0)
    return total


@triton.jit(
    do_not_specialize=["layers", "turns", "longest", "burn_in", "largest"],
    do_not_specialize_on_alignment=[*UNALIGNED, "flags_ptr"],
)
def _verdict_kernel(
    addresses_ptr, flags_ptr, info_ptr, busy_ptr, sums_ptr, parts_a_ptr, parts_b_ptr, refused_ptr, repaired_ptr,
    shifts_ptr, layers, turns, longest, burn_in, largest, BALANCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Any flag; the failed attempts of solves that had something to solve; and k of every layer that has moved."""
    bad = tl.zeros((BLOCK,), tl.int32)
    repaired = tl.zeros((BLOCK,), tl.int64)
    for first in range(0, layers, BLOCK):
        layer = first + tl.arange(0, BLOCK)
        inside = layer < layers
        bad = tl.maximum(bad, tl.where(tl.load(flags_ptr + layer, mask=inside, other=0) > 0, 1, 0))
        moved = tl.zeros((BLOCK,), tl.int32)
        for turn in range(turns):
            for own in tl.static_range(2):
                at = (turn * 2 + own) * layers + layer
                busy = tl.load(busy_ptr + at, mask=inside, other=0)
                failed = tl.load(info_ptr + at, mask=inside, other=0)
                repaired += tl.where((busy > 0) & (failed > 0), 1, 0).to(tl.int64)
                if own == 0:
                    moved = tl.maximum(moved, busy)
        if BALANCE:
            square_a = _gathered(sums_ptr, parts_a_ptr, layer, inside, longest, BLOCK)
            square_b = _gathered(sums_ptr, parts_b_ptr, layer, inside, longest, BLOCK)
            usable = (square_a > 0.0) & (square_a < float("inf")) & (square_b < float("inf"))
            ratio = tl.where(usable, square_b, 0.0) / tl.where(usable, square_a, 1.0)
            count = tl.load(addresses_ptr + layer * ADDRESSES + COUNT, mask=inside, other=0)
            steps = tl.load(count.to(tl.pointer_type(tl.float32)), mask=inside, other=0.0)
            far = (ratio > 256.0) | (ratio < 0.00390625)
            due = far & (ratio > 0.0) & (ratio < float("inf")) & (moved > 0) & (steps >= burn_in)
            # ratio is in [2ᵉ⁻¹, 2ᵉ): e from the bits of a float64.
            exponent = ((ratio.to(tl.int64, bitcast=True) >> 52) & 2047).to(tl.int32) - 1022
            shift = tl.minimum(tl.maximum((exponent + 2) >> 2, -largest), largest)
            tl.store(shifts_ptr + layer, tl.where(due, shift, 0), mask=inside)
    tl.store(refused_ptr, tl.max(bad, axis=0).to(tl.uint8))
    tl.store(repaired_ptr, tl.sum(repaired, axis=0))


def norms(
    addresses: Tensor, dims: Tensor, tiles: Tensor, sums: Tensor, *, A_TYPE: Any, B_TYPE: Any,
) -> None:  # fmt: skip
    """Launch `_norms_kernel` on the tiles of both sides; `sums` (tiles,) fp64 is written."""
    _norms_kernel[(tiles.shape[0],)](
        addresses, dims, tiles, sums, A_TYPE=A_TYPE, B_TYPE=B_TYPE, BLOCK=BLOCK, num_warps=4, num_stages=1,
    )  # fmt: skip


def verdict(
    addresses: Tensor, flags: Tensor, info: Tensor, busy: Tensor, sums: Tensor, parts: Sequence[Tensor],
    refused: Tensor, repaired: Tensor, shifts: Tensor, *, longest: int, balance: bool, burn_in: int, largest: int,
) -> None:  # fmt: skip
    """Launch `_verdict_kernel`.

    Takes:
        addresses: (L, ADDRESSES) int64.
        flags: (L,) int32, above 0 where something of a layer is not finite.
        info, busy: (turns, 2, L) int32: failed attempts of the weight's and the momentum's solves, and whether their
            right-hand sides are not zero.
        sums: What `norms` has left; not read unless `balance`.
        parts: Per side, the first tile and the number of tiles of each layer, (L, 2) int32.
        refused, repaired: 0-d bool and int64, written.
        shifts: (L,) int32, k as `psilora.steps.gauge.shifts` has it, written if `balance`.
        longest: The largest number of tiles of a layer on a side.
        balance: Whether factors are balanced.
        burn_in: Steps before the first balancing.
        largest: The largest |k|.
    """
    _verdict_kernel[(1,)](
        addresses, flags, info, busy, sums, parts[0], parts[1], refused.view(torch.uint8), repaired, shifts,
        addresses.shape[0], info.shape[0], longest, burn_in, largest, BALANCE=balance, BLOCK=BLOCK, num_warps=4,
        num_stages=1,
    )  # fmt: skip


def verdict_ref(
    flags: Tensor, info: Tensor, busy: Tensor, squares: Tensor, steps: Tensor, *, burn_in: int, largest: int
) -> tuple[bool, int, Tensor]:
    """Return whether any flag is set, the repaired solves, and k of every layer.

    `squares` (2, L) are ‖A‖² and ‖B‖², `steps` (L,) the counts of steps.
    """
    ratio = (squares[1] / squares[0]).double()
    far = (ratio > 256) | (ratio < 1 / 256)
    due = far & (ratio > 0) & torch.isfinite(ratio) & (busy[:, 0] > 0).any(0) & (steps >= burn_in)
    shift = (torch.frexp(ratio).exponent + 2).div(4, rounding_mode="floor").clamp(-largest, largest)
    repaired = ((info > 0) & (busy > 0)).sum()
    return bool((flags > 0).any()), int(repaired), torch.where(due, shift, 0).int()


VARIANTS = [
    Variant(
        name="verdict",
        kernel=_verdict_kernel,
        signature={
            "addresses_ptr": "*i64", "flags_ptr": "*i32", "info_ptr": "*i32", "busy_ptr": "*i32", "sums_ptr": "*fp64",
            "parts_a_ptr": "*i32", "parts_b_ptr": "*i32", "refused_ptr": "*u8", "repaired_ptr": "*i64",
            "shifts_ptr": "*i32", "layers": "i32", "turns": "i32", "longest": "i32", "burn_in": "i32", "largest": "i32",
        },
        constexprs={"BALANCE": True, "BLOCK": BLOCK},
        aligned=("sums_ptr", "parts_a_ptr", "parts_b_ptr"),
        num_warps=4,
        num_stages=1,
        max_registers=128,
    ),
    Variant(
        name="norms",
        kernel=_norms_kernel,
        signature={"addresses_ptr": "*i64", "dims_ptr": "*i32", "tiles_ptr": "*i32", "sums_ptr": "*fp64"},
        constexprs={"A_TYPE": tl.bfloat16, "B_TYPE": tl.float32, "BLOCK": BLOCK},
        aligned=("dims_ptr", "tiles_ptr", "sums_ptr"),
        num_warps=4,
        num_stages=1,
        max_registers=64,
    ),
]  # fmt: skip
