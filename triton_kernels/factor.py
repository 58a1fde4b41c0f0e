"""The factor launch: the r×r coefficients of a turn, one program per system.

A launch of its own because a solve would repeat them in every tile, and a small system is soonest factorised by few
warps that need not wait for each other. Of the tangent gradient the product with the other factor's rows O is, with
N = (FFᵀ)⁺ at the start of the step and L the rows of `.grad` (BᵀG, AGᵀ)::

    O·G_T = P₁·L_F + P₂·F₁,   P₁ = (O O₁ᵀ) N_O,   P₂ = (O L_Oᵀ − P₁ (L_F F₁ᵀ)) N_F
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

from typing import Any

from torch import Tensor

from psilora.triton_kernels import slots
from psilora.triton_kernels._compat import tl, triton
from psilora.triton_kernels.gram import summed
from psilora.triton_kernels.layout import (
    ADDRESSES,
    BLOCKS,
    CROSS,
    DECAY,
    DIMS,
    LR,
    MOMENTUM_RANK,
    MU,
    OWN,
    OWN_SLOPE,
    OWN_START,
    OWN_STEP,
    PROX,
    RANK,
    SCALARS,
    SLOPE,
    START,
    UNALIGNED,
    WEIGHTED,
    WEIGHTED_STEP,
    address,
    variant,
)
from psilora.triton_kernels.spd import factor_warps, inverse_factor_to, multiply
from psilora.triton_kernels.variants import Variant

# Slots of the coefficients (layer, COEFFICIENTS, RP, RP) fp32 that the factor launch leaves for a solve.
INVERSE = tl.constexpr(0)
BASE = tl.constexpr(1)
OLD = tl.constexpr(2)
OWN_INVERSE = tl.constexpr(3)
OWN_BASE = tl.constexpr(4)
P1 = tl.constexpr(5)
P2 = tl.constexpr(6)
OWN_P1 = tl.constexpr(7)
OWN_P2 = tl.constexpr(8)
SCRATCH = tl.constexpr(9)  # three squares for the weight's program, three for the momentum's
SPLIT = tl.constexpr(15)  # L of A_mA_mᵀ, and its inverse, for the commit
SPLIT_INVERSE = tl.constexpr(16)
COEFFICIENTS = tl.constexpr(17)


@triton.jit
def weight_base(
    gram, grams_ptr, first, count, top, scalars, lr,
    RP: tl.constexpr, ROWS: tl.constexpr, KINDS: tl.constexpr, AT_ONCE: tl.constexpr,
    MOVED: tl.constexpr, HAS_DECAY: tl.constexpr,
):  # fmt: skip
    """Return rows of C = O M_O (−η·wd·O₁ − O_s)ᵀ from those of gram = O M_O Oᵀ and the partials of O M_O O_sᵀ."""
    if MOVED:
        moved = summed(grams_ptr, first, count, top, WEIGHTED_STEP, KINDS, RP, ROWS, AT_ONCE)
        base = -moved
        if HAS_DECAY:
            base += (-lr * tl.load(scalars + DECAY)) * (gram - moved)
    elif HAS_DECAY:
        base = (-lr * tl.load(scalars + DECAY)) * gram
    else:
        base = gram * 0.0
    return base


@triton.jit
def momentum_base(
    gram, grams_ptr, first, count, top, scalars,
    RP: tl.constexpr, ROWS: tl.constexpr, KINDS: tl.constexpr, AT_ONCE: tl.constexpr, MOVED: tl.constexpr,
):  # fmt: skip
    """Return rows of C_m = O_m ((μ−1)·O_m1 − O_ms)ᵀ from those of gram = O_m O_mᵀ and the partials of O_m O_msᵀ."""
    keep = tl.load(scalars + MU) - 1.0
    if MOVED:
        moved = summed(grams_ptr, first, count, top, OWN_STEP, KINDS, RP, ROWS, AT_ONCE)
        base = keep * (gram - moved) - moved
    else:
        base = keep * gram
    return base


@triton.jit
def _rows(top, RP: tl.constexpr, ROWS: tl.constexpr):
    """Offsets of the rows top … top + ROWS − 1 of a (RP, RP) matrix."""
    return (top + tl.arange(0, ROWS))[:, None] * RP + tl.arange(0, RP)[None, :]  # [ROWS, RP]


@triton.jit
def _sum_to(
    out_ptr, partials_ptr, first, count,
    KIND: tl.constexpr, KINDS: tl.constexpr, RP: tl.constexpr, ROWS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Write Σ of one kind over the tiles of a layer to out (RP, RP), a few rows at a time."""
    for top in range(0, RP, ROWS):
        total = summed(partials_ptr, first, count, top, KIND, KINDS, RP, ROWS, AT_ONCE)
        tl.store(out_ptr + _rows(top, RP, ROWS), total)


@triton.jit
def _start_factor(
    out_ptr, gram_ptr, work_ptr, partials_ptr, first, count, rank,
    RP: tl.constexpr, ROWS: tl.constexpr, KINDS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """L⁻¹ with LLᵀ = F₁F₁ᵀ + 8·r·eps·mean(diag)·I, zero where that cannot be factorised; gram: scratch."""
    _sum_to(gram_ptr, partials_ptr, first, count, START, KINDS, RP, ROWS, AT_ONCE)
    tl.debug_barrier()
    index = tl.arange(0, RP)
    trace = tl.sum(tl.load(gram_ptr + index * (RP + 1), mask=index < rank, other=0.0), axis=0)
    inverse_factor_to(out_ptr, gram_ptr, work_ptr, trace * 9.5367431640625e-07, rank, RP)


@triton.jit
def _tangent(
    p1_ptr, p2_ptr, scratch_ptr, here_ptr, base_ptr, first, count, own_first, own_count, rank,
    SIDE: tl.constexpr, RP: tl.constexpr, ROWS: tl.constexpr, KINDS: tl.constexpr, AT_ONCE: tl.constexpr,
    START_KIND: tl.constexpr, SLOPE_KIND: tl.constexpr,
):  # fmt: skip
    """P₁ and P₂ of rows O whose Grams with O₁ and L_O are the given kinds of `here`.

    N is applied as L⁻ᵀ and then L⁻¹: its explicit form would square the condition number in the error.
    """
    left = scratch_ptr
    inverse = scratch_ptr + RP * RP
    work = scratch_ptr + 2 * RP * RP
    _start_factor(inverse, work, left, base_ptr, first, count, rank, RP, ROWS, KINDS, AT_ONCE)
    _sum_to(work, here_ptr, first, count, START_KIND, KINDS, RP, ROWS, AT_ONCE)
    multiply(left, work, inverse, RP, RP, RP, False, True, RP, False)
    multiply(p1_ptr, left, inverse, RP, RP, RP, False, False, RP, False)
    _start_factor(inverse, work, left, base_ptr, own_first, own_count, rank, RP, ROWS, KINDS, AT_ONCE)
    if SIDE == 0:  # A₁·(BᵀG)ᵀ stands for L_F F₁ᵀ and, on the other side, for its transpose
        _sum_to(work, base_ptr, own_first, own_count, SLOPE, KINDS, RP, ROWS, AT_ONCE)
        multiply(left, p1_ptr, work, RP, RP, RP, False, True, RP, False)
    else:
        _sum_to(work, base_ptr, first, count, SLOPE, KINDS, RP, ROWS, AT_ONCE)
        multiply(left, p1_ptr, work, RP, RP, RP, False, False, RP, False)
    for top in range(0, RP, ROWS):
        at = _rows(top, RP, ROWS)
        slope = summed(here_ptr, first, count, top, SLOPE_KIND, KINDS, RP, ROWS, AT_ONCE)
        tl.store(work + at, slope - tl.load(left + at))
    multiply(left, work, inverse, RP, RP, RP, False, True, RP, False)
    multiply(p2_ptr, left, inverse, RP, RP, RP, False, False, RP, False)


@triton.jit
def _split(out_ptr, gram_ptr, scratch_ptr, rank, RP: tl.constexpr, SPREAD: tl.constexpr):
    """Write L and L⁻¹ with LLᵀ = gram, and return whether (max/min of L's diagonal)² exceeds SPREAD, 1.0 or 0.0.

    G·L⁻ᵀ is L to eps·cond(G); a Newton step, (2·I − (G·L⁻ᵀ)·L⁻¹)·(G·L⁻ᵀ), leaves eps·cond(L).
    """
    inverse = out_ptr + RP * RP
    rough = scratch_ptr
    info = inverse_factor_to(inverse, gram_ptr, rough, 0.0, rank, RP)
    multiply(rough, gram_ptr, inverse, RP, RP, RP, False, True, RP, False)
    residual = scratch_ptr + RP * RP
    multiply(residual, rough, inverse, RP, RP, RP, False, False, RP, False)
    multiply(out_ptr, residual, rough, RP, RP, RP, False, False, RP, False)
    ROWS: tl.constexpr = RP if RP < 32 else 32
    for top in range(0, RP, ROWS):
        at = _rows(top, RP, ROWS)
        tl.store(out_ptr + at, 2.0 * tl.load(rough + at) - tl.load(out_ptr + at))
    index = tl.arange(0, RP)
    pivot = tl.load(inverse + index * (RP + 1), mask=index < rank, other=1.0)
    largest = tl.max(tl.where(index < rank, pivot, 0.0), axis=0)
    least = tl.min(tl.where(index < rank, pivot, float("inf")), axis=0)
    spread = largest / least
    return tl.where((info == 0) & (spread * spread > SPREAD), 1.0, 0.0)


@triton.jit(do_not_specialize=["problems"], do_not_specialize_on_alignment=UNALIGNED)
def _factor_kernel(
    addresses_ptr, scalars_ptr, dims_ptr, parts_ptr, own_parts_ptr, coefficients_ptr,
    weight_grams_ptr, momentum_grams_ptr, base_grams_ptr, info_ptr, sizes_ptr, problems,
    SIDE: tl.constexpr, RP: tl.constexpr, AT_ONCE: tl.constexpr, KINDS: tl.constexpr, MOVED: tl.constexpr,
    OWN_MOVED: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_MOMENTUM: tl.constexpr, TANGENT: tl.constexpr,
    OWN_TANGENT: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    """The coefficients of one layer's turn on SIDE: of the weight (program axis 1 is 0) or of the momentum (1).

    coefficients: (L, COEFFICIENTS, RP, RP) fp32; other arguments as for the solve kernel, own_parts the tiles of SIDE.
    """
    problem = tl.program_id(0).to(tl.int64)
    first = tl.load(parts_ptr + problem * 2)
    count = tl.load(parts_ptr + problem * 2 + 1)
    own_first = tl.load(own_parts_ptr + problem * 2)
    own_count = tl.load(own_parts_ptr + problem * 2 + 1)
    scalars = scalars_ptr + problem * SCALARS
    lr = tl.load(address(addresses_ptr, problem, LR, tl.float32, ADDRESSES))
    ridge = lr * tl.load(scalars + PROX)
    r = tl.load(dims_ptr + problem * DIMS + RANK)
    Q: tl.constexpr = RP * RP
    ROWS: tl.constexpr = RP if RP < 32 else 32
    out = coefficients_ptr + problem * COEFFICIENTS * Q
    if tl.program_id(1) == 0:
        scratch = out + SCRATCH * Q
        for top in range(0, RP, ROWS):
            at = _rows(top, RP, ROWS)
            gram = summed(weight_grams_ptr, first, count, top, WEIGHTED, KINDS, RP, ROWS, AT_ONCE)
            tl.store(scratch + at, gram)
            if MOVED or HAS_DECAY:
                base = weight_base(
                    gram, weight_grams_ptr, first, count, top, scalars, lr, RP, ROWS, KINDS, AT_ONCE, MOVED, HAS_DECAY
                )
                tl.store(out + BASE * Q + at, base)
        if HAS_MOMENTUM:
            _sum_to(out + OLD * Q, weight_grams_ptr, first, count, CROSS, KINDS, RP, ROWS, AT_ONCE)
        tl.debug_barrier()
        info = inverse_factor_to(out + INVERSE * Q, scratch, scratch + Q, ridge, r, RP)
        tl.store(info_ptr + problem, info)
        if TANGENT:
            _tangent(
                out + P1 * Q, out + P2 * Q, scratch, weight_grams_ptr, base_grams_ptr, first, count,
                own_first, own_count, r, SIDE, RP, ROWS, KINDS, AT_ONCE, START, SLOPE,
            )  # fmt: skip
    else:
        scratch = out + (SCRATCH + 3) * Q
        rm = tl.load(dims_ptr + problem * DIMS + MOMENTUM_RANK)
        for top in range(0, RP, ROWS):
            at = _rows(top, RP, ROWS)
            gram = summed(momentum_grams_ptr, first, count, top, OWN, KINDS, RP, ROWS, AT_ONCE)
            tl.store(scratch + at, gram)
            base = momentum_base(
                gram, momentum_grams_ptr, first, count, top, scalars, RP, ROWS, KINDS, AT_ONCE, OWN_MOVED
            )
            tl.store(out + OWN_BASE * Q + at, base)
        tl.debug_barrier()
        diagonal = tl.load(scratch + tl.arange(0, RP) * (RP + 1))  # [RP]
        tl.store(sizes_ptr + (1 - SIDE) * problems + problem, tl.sum(diagonal, axis=0))
        info = inverse_factor_to(out + OWN_INVERSE * Q, scratch, scratch + Q, ridge, rm, RP)
        tl.store(info_ptr + problems + problem, info)
        if SPREAD > 0:  # before the tangent takes the scratch
            due = _split(out + SPLIT * Q, scratch, scratch + Q, rm, RP, SPREAD)
            tl.store(sizes_ptr + 2 * problems + problem, due)
            tl.debug_barrier()
        if OWN_TANGENT:
            _tangent(
                out + OWN_P1 * Q, out + OWN_P2 * Q, scratch, momentum_grams_ptr, base_grams_ptr,
                first, count, own_first, own_count, r, SIDE, RP, ROWS, KINDS, AT_ONCE, OWN_START, OWN_SLOPE,
            )  # fmt: skip


def factor(
    addresses: Tensor, scalars: Tensor, dims: Tensor, parts: Tensor, own_parts: Tensor, coefficients: Tensor,
    weight_grams: Tensor, momentum_grams: Tensor, base_grams: Tensor, info: Tensor, sizes: Tensor, *, own: bool,
    spread: float = 0.0, **constexprs: Any,
) -> None:  # fmt: skip
    """Launch `_factor_kernel` for all layers; `own`: for the momentum's systems too.

    `spread`, unless 0: the momentum's Gram is factorised without its ridge as well, for the commit to split B_m·A_m
    anew where its condition exceeds that; see `psilora.lowrank.momentum.conditioned`.
    """
    padded = coefficients.shape[-1]
    _factor_kernel[(dims.shape[0], 2 if own else 1)](
        addresses, scalars, dims, parts, own_parts, coefficients, weight_grams, momentum_grams, base_grams, info,
        sizes, dims.shape[0], RP=padded, AT_ONCE=BLOCKS[padded][2], KINDS=weight_grams.shape[1],
        SPREAD=spread, **constexprs, num_warps=factor_warps(padded), num_stages=1, maxnreg=255,
    )  # fmt: skip


def _variants() -> list[Variant]:
    found = []
    for padded, (_, _, at_once, _) in BLOCKS.items():
        for side in (0, 1):
            constexprs = {
                "SIDE": side, "AT_ONCE": at_once, "KINDS": 9, "MOVED": True, "OWN_MOVED": True, "HAS_DECAY": True,
                "HAS_MOMENTUM": True, "TANGENT": True, "OWN_TANGENT": True, "SPREAD": slots.SPREAD if side else 0.0,
            }  # fmt: skip
            name = f"factor_{'ab'[side]}"
            found.append(variant(name, _factor_kernel, padded, factor_warps(padded), constexprs, 255))
    return found


VARIANTS = _variants()
