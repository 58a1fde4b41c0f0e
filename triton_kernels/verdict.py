"""`verdict`: what a step of a bucket has come to, in one launch: is it finite, what was repaired, what is balanced."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

import torch
from torch import Tensor

from psilora.triton_kernels._compat import tl, triton
from psilora.triton_kernels.layout import ADDRESSES, COUNT, UNALIGNED
from psilora.triton_kernels.variants import Variant

#: Layers that are looked at together; there is one program.
BLOCK = 128


@triton.jit(
    do_not_specialize=["layers", "turns", "burn_in", "largest"],
    do_not_specialize_on_alignment=[*UNALIGNED, "flags_ptr", "norms_ptr"],
)
def _verdict_kernel(
    addresses_ptr, flags_ptr, info_ptr, busy_ptr, norms_ptr, refused_ptr, repaired_ptr, shifts_ptr,
    layers, turns, burn_in, largest, BALANCE: tl.constexpr, BLOCK: tl.constexpr,
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
            norm_a = tl.load(norms_ptr + layer, mask=inside, other=0.0)
            norm_b = tl.load(norms_ptr + layers + layer, mask=inside, other=0.0)
            usable = (norm_a > 0.0) & (norm_a < float("inf")) & (norm_b < float("inf"))
            ratio = tl.where(usable, norm_b, 0.0) / tl.where(usable, norm_a, 1.0)
            ratio = ratio * ratio
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


def verdict(
    addresses: Tensor, flags: Tensor, info: Tensor, busy: Tensor, norms: Tensor, refused: Tensor, repaired: Tensor,
    shifts: Tensor, *, balance: bool, burn_in: int, largest: int,
) -> None:  # fmt: skip
    """Launch `_verdict_kernel`.

    Takes:
        addresses: (L, ADDRESSES) int64.
        flags: (L,) int32, above 0 where something of a layer is not finite.
        info, busy: (turns, 2, L) int32: failed attempts of the weight's and the momentum's solves, and whether their
            right-hand sides are not zero.
        norms: (2, L) fp64, ‖A‖ and ‖B‖ before the step; not read unless `balance`.
        refused, repaired: 0-d bool and int64, written.
        shifts: (L,) int32, k as `psilora.steps.gauge.shifts` has it, written if `balance`.
        balance: Whether factors are balanced.
        burn_in: Steps before the first balancing.
        largest: The largest |k|.
    """
    _verdict_kernel[(1,)](
        addresses, flags, info, busy, norms, refused.view(torch.uint8), repaired, shifts, addresses.shape[0],
        info.shape[0], burn_in, largest, BALANCE=balance, BLOCK=BLOCK, num_warps=4, num_stages=1,
    )  # fmt: skip


def verdict_ref(
    flags: Tensor, info: Tensor, busy: Tensor, norms: Tensor, steps: Tensor, *, burn_in: int, largest: int
) -> tuple[bool, int, Tensor]:
    """Return whether any flag is set, the repaired solves, and k of every layer; `steps` (L,) are their counts."""
    ratio = (norms[1] / norms[0]).double().square()
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
            "addresses_ptr": "*i64", "flags_ptr": "*i32", "info_ptr": "*i32", "busy_ptr": "*i32", "norms_ptr": "*fp64",
            "refused_ptr": "*u8", "repaired_ptr": "*i64", "shifts_ptr": "*i32", "layers": "i32", "turns": "i32",
            "burn_in": "i32", "largest": "i32",
        },
        constexprs={"BALANCE": True, "BLOCK": BLOCK},
        aligned=(),
        num_warps=4,
        num_stages=1,
        max_registers=128,
    )
]  # fmt: skip
