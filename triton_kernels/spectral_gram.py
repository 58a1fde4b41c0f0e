"""Grams of a spectral step: what the columns [F, M, D] of a side have to do with each other, in float64.

F (r, d) is a factor as rows, A or Bᵀ; M its momentum, of one or two blocks M₁, M₂ of r rows; D (r, d) its gradient as
rows. With v > 0 the squared weights of the side's columns, the whitened blocks are F·√v, M/√v and D/√v; their Grams are

    F diag(v) Fᵀ,   F Mᵀ,   F Dᵀ,   M diag(1/v) Mᵀ,   M diag(1/v) Dᵀ,   D diag(1/v) Dᵀ.

Every tile of columns writes partial sums, which a second launch adds in a fixed order. Scalar factors on F, M and D are
left to the caller, who has them on the small result for nothing. Products of fp32 numbers are exact in float64.

Everything is read as fp32: a 16-bit operand that is widened to float64 on its way into a product is more than Triton's
compiler can take on sm_80 and sm_90. Callers copy 16-bit factors and gradients first.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from psilora.triton_kernels import slots
from psilora.triton_kernels._compat import tl, triton
from psilora.triton_kernels.layout import (
    ADDRESSES,
    AVERAGE,
    FACTOR,
    GRAD,
    METRIC,
    MOMENTUM,
    UNALIGNED,
    WEIGHT,
    address,
    element,
    sizes,
    tile_at,
)
from psilora.triton_kernels.variants import EVERYWHERE, SLOW_TARGET, TARGETS, Variant

# Columns of the numbers (float64, one row per layer) that these kernels read; the rest is their caller's.
BETA = tl.constexpr(slots.BETA)
DAMPING = tl.constexpr(slots.DAMPING)
COUNTING = tl.constexpr(slots.COUNTING)
POWER = tl.constexpr(slots.POWER)
NUMBERS = tl.constexpr(slots.NUMBERS)

#: Pairs of blocks of [F, M₁, M₂, D] whose Grams are formed, in the order of the partials.
PAIRS = ((0, 0), (0, 3), (3, 3), (0, 1), (1, 1), (1, 3), (0, 2), (1, 2), (2, 2), (2, 3))
#: How many of them: of F alone, and with D and a momentum of no, one and two blocks of r rows.
ALONE, PLAIN, SINGLE, FULL = 1, 3, 6, len(PAIRS)
#: Blocks in Γ by the number of kinds.
SPANNED = {ALONE: 1, PLAIN: 2, SINGLE: 3, FULL: 4}

#: Columns of a block of weights or moments, columns summed at a time, and warps, by padded rank.
BLOCKS = {16: (64, 32, 4), 32: (64, 16, 4), 64: (32, 16, 8), 128: (16, 16, 8)}
REGISTERS = 168


@triton.jit
def _partial(
    out_ptr, x_ptr, x_leading, y_ptr, y_leading, u_ptr, rank, start, end,
    T: tl.constexpr, WEIGHTED: tl.constexpr, RP: tl.constexpr, KS: tl.constexpr,
):  # fmt: skip
    """out[i, j] = Σ_{start ≤ n < end} x[i, n] (u[n]) y[j, n] in float64; one square of at most 32 × 32 at a time."""
    SQUARE: tl.constexpr = RP if RP < 32 else 32
    for block in range((RP // SQUARE) * (RP // SQUARE)):
        row = block // (RP // SQUARE) * SQUARE + tl.arange(0, SQUARE)
        column = block % (RP // SQUARE) * SQUARE + tl.arange(0, SQUARE)
        total = tl.zeros((SQUARE, SQUARE), tl.float64)  # [SQUARE, SQUARE]
        for first in range(start, end, KS):
            n = first + tl.arange(0, KS)
            inside = n < end
            x_at = element(row[:, None], n[None, :], x_leading, T)  # [SQUARE, KS]
            x = tl.load(x_ptr + x_at, mask=(row[:, None] < rank) & inside[None, :], other=0.0).to(tl.float64)
            y_at = element(column[None, :], n[:, None], y_leading, T)  # [KS, SQUARE]
            y = tl.load(y_ptr + y_at, mask=(column[None, :] < rank) & inside[:, None], other=0.0).to(tl.float64)
            if WEIGHTED:
                x *= tl.load(u_ptr + n, mask=inside, other=0.0)[None, :]
            total += tl.dot(x, y, out_dtype=tl.float64)
        tl.store(out_ptr + row[:, None] * RP + column[None, :], total)


@triton.jit
def _weights(addresses_ptr, numbers_ptr, inverse, problem, d, start, end, SIDE: tl.constexpr, BN: tl.constexpr):
    """Write v = (D·inverse + δ)^γ (1 where inverse < 0) and 1/v for a tile, D the new average.

    Return Σ p/v and Σ p, see `psilora.lowrank.spectral.spread`; p = 1 where inverse < 0.
    """
    average = address(addresses_ptr, problem, AVERAGE + SIDE, tl.float32, ADDRESSES)
    weight = address(addresses_ptr, problem, WEIGHT + SIDE, tl.float64, ADDRESSES)
    damping = tl.load(numbers_ptr + problem * NUMBERS + DAMPING)
    power = tl.load(numbers_ptr + problem * NUMBERS + POWER).to(tl.float32)
    inverses = tl.zeros((BN,), tl.float64)  # [BN]
    counted = tl.zeros((BN,), tl.float64)  # [BN]
    for first in range(start, end, BN):
        n = first + tl.arange(0, BN)
        inside = n < end
        root = tl.load(average + n, mask=inside, other=0.0).to(tl.float64)
        share = root * root * inverse
        base = (share + damping).to(tl.float32)
        raised = tl.where(power == 1.0, base, tl.exp2(power * tl.log2(base)))
        v = tl.where(inverse < 0.0, 1.0, raised).to(tl.float64)
        tl.store(weight + n, v, mask=inside)
        tl.store(weight + d + n, 1.0 / v, mask=inside)
        p = tl.where(inverse < 0.0, 1.0, (1.0 + COUNTING) * share / (tl.maximum(share, 0.0) + COUNTING))
        p = tl.where(inside, p, 0.0)
        counted += p
        inverses += p / v
    return tl.sum(inverses, axis=0), tl.sum(counted, axis=0)


@triton.jit
def blocks(addresses_ptr, dims_ptr, problem, SIDE: tl.constexpr):
    """Return F, D and their leading dimension, M₁, M₂ and theirs."""
    r, rm, d = sizes(dims_ptr, problem, SIDE)
    f = address(addresses_ptr, problem, FACTOR + SIDE, tl.float32, ADDRESSES)
    g = address(addresses_ptr, problem, GRAD + SIDE, tl.float32, ADDRESSES)
    m = address(addresses_ptr, problem, MOMENTUM + SIDE, tl.float32, ADDRESSES)
    return f, g, d if SIDE == 0 else r, m, m + (r * d if SIDE == 0 else r), d if SIDE == 0 else rm


@triton.jit
def _span_side(
    addresses_ptr, numbers_ptr, dims_ptr, inverse_ptr, sums_ptr, out_ptr, tile, problem, start, end,
    SIDE: tl.constexpr, RP: tl.constexpr, BN: tl.constexpr, KS: tl.constexpr, KINDS: tl.constexpr,
    HAS_METRIC: tl.constexpr,
):  # fmt: skip
    r, _, d = sizes(dims_ptr, problem, SIDE)
    f, g, ld, m, second, own = blocks(addresses_ptr, dims_ptr, problem, SIDE)
    up = address(addresses_ptr, problem, WEIGHT + SIDE, tl.float64, ADDRESSES)
    down = up + d
    T: tl.constexpr = SIDE == 1
    W: tl.constexpr = HAS_METRIC
    Q: tl.constexpr = RP * RP
    if HAS_METRIC:
        inverse = tl.load(inverse_ptr + problem * 2 + SIDE)
        inverses, counted = _weights(addresses_ptr, numbers_ptr, inverse, problem, d, start, end, SIDE, BN)
        tl.store(sums_ptr + tile * 2, inverses)
        tl.store(sums_ptr + tile * 2 + 1, counted)
        tl.debug_barrier()  # the Grams read the weights that other threads have written
    _partial(out_ptr, f, ld, f, ld, up, r, start, end, T, W, RP, KS)
    if KINDS >= 3:
        _partial(out_ptr + Q, f, ld, g, ld, up, r, start, end, T, False, RP, KS)
        _partial(out_ptr + 2 * Q, g, ld, g, ld, down, r, start, end, T, W, RP, KS)
    if KINDS >= 6:
        _partial(out_ptr + 3 * Q, f, ld, m, own, up, r, start, end, T, False, RP, KS)
        _partial(out_ptr + 4 * Q, m, own, m, own, down, r, start, end, T, W, RP, KS)
        _partial(out_ptr + 5 * Q, m, own, g, ld, down, r, start, end, T, W, RP, KS)
    if KINDS == 10:
        _partial(out_ptr + 6 * Q, f, ld, second, own, up, r, start, end, T, False, RP, KS)
        _partial(out_ptr + 7 * Q, m, own, second, own, down, r, start, end, T, W, RP, KS)
        _partial(out_ptr + 8 * Q, second, own, second, own, down, r, start, end, T, W, RP, KS)
        _partial(out_ptr + 9 * Q, second, own, g, ld, down, r, start, end, T, W, RP, KS)


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def _span_kernel(
    addresses_ptr, numbers_ptr, dims_ptr, tiles_ptr, inverse_ptr, sums_ptr, out_ptr,
    RP: tl.constexpr, BN: tl.constexpr, KS: tl.constexpr, KINDS: tl.constexpr, HAS_METRIC: tl.constexpr,
):  # fmt: skip
    """The weights of a tile's columns, with HAS_METRIC, and its partial Grams: one tile per program."""
    tile = tl.program_id(0).to(tl.int64)
    side, problem, start, end = tile_at(tiles_ptr, tile)
    out = out_ptr + tile * KINDS * RP * RP
    if side == 0:
        _span_side(
            addresses_ptr, numbers_ptr, dims_ptr, inverse_ptr, sums_ptr, out, tile, problem, start, end,
            0, RP, BN, KS, KINDS, HAS_METRIC,
        )  # fmt: skip
    else:
        _span_side(
            addresses_ptr, numbers_ptr, dims_ptr, inverse_ptr, sums_ptr, out, tile, problem, start, end,
            1, RP, BN, KS, KINDS, HAS_METRIC,
        )  # fmt: skip


def span(
    addresses: Tensor, numbers: Tensor, dims: Tensor, tiles: Tensor, inverse: Tensor, sums: Tensor, out: Tensor,
    *, metric: bool,
) -> None:  # fmt: skip
    """Launch `_span_kernel`; `out` (tiles, kinds, RP, RP) float64 sets the padded rank and the kinds of Grams.

    Args:
        addresses: The address block of a step (see layout.py), FACTOR and GRAD in fp32.
        dims: (L, 4) int32, r, rows of the momentum, d_in and d_out.
        tiles: (tiles, 4) int32, side, layer, first and end column.
        numbers: (L, 12) float64, beginning with β₂, δ and γ.
        inverse: (L, 2) float64, per side 1/mean(D), or −1 where the side's weights are 1.
        sums: (tiles, 2) float64, Σ p/v and Σ p of each tile's columns, written with `metric`.
        out: The partial Grams.
        metric: Whether to form v and 1/v, into the workspace WEIGHT (2, d) float64, and to weight by them.
    """
    BN, KS, warps = BLOCKS[out.shape[-1]]
    _span_kernel[(tiles.shape[0],)](
        addresses, numbers, dims, tiles, inverse, sums, out,
        RP=out.shape[-1], BN=BN, KS=KS, KINDS=out.shape[1], HAS_METRIC=metric, num_warps=warps, num_stages=1,
        maxnreg=REGISTERS,
    )  # fmt: skip


@triton.jit
def _sum_kernel(
    partials_ptr, parts_ptr, places_ptr, out_ptr, layers, r, n,
    RP: tl.constexpr, ROWS: tl.constexpr, KINDS: tl.constexpr,
):  # fmt: skip
    """Γ[side, layer] (n, n): ROWS rows of one kind of Gram, summed over its tiles, in its place and transposed.

    Of a block with itself only the lower triangle is taken: with weights the two halves of the sum round differently,
    and every entry must have one writer.
    """
    job = tl.program_id(0).to(tl.int64)
    top = job % (RP // ROWS) * ROWS
    kind = job // (RP // ROWS) % KINDS
    which = job // (RP // ROWS * KINDS)  # side · layers + layer
    first = tl.load(parts_ptr + which * 2).to(tl.int64)
    count = tl.load(parts_ptr + which * 2 + 1)
    row = top + tl.arange(0, ROWS)
    column = tl.arange(0, RP)
    at = partials_ptr + (first * KINDS + kind) * (RP * RP) + row[:, None] * RP + column[None, :]
    total = tl.zeros((ROWS, RP), tl.float64)  # [ROWS, RP]
    for _ in range(count):
        total += tl.load(at)
        at += KINDS * RP * RP
    above = tl.load(places_ptr + kind * 2)
    beside = tl.load(places_ptr + kind * 2 + 1)
    i = above * r + row[:, None]
    j = beside * r + column[None, :]
    inside = (row[:, None] < r) & (column[None, :] < r)
    out = out_ptr + which * n * n
    tl.store(out + i * n + j, total, mask=inside & ((above != beside) | (i >= j)))
    tl.store(out + j * n + i, total, mask=inside & ((above != beside) | (i > j)))


def summed(partials: Tensor, parts: Tensor, places: Tensor, rank: int) -> Tensor:
    """Return Γ (2, L, n, n) float64 from partial Grams (tiles, kinds, RP, RP), adding tiles in order.

    Args:
        partials: What `span` wrote.
        parts: (2, L, 2) int32, per side and layer the first of its tiles and their number.
        places: (kinds, 2) int32, the row and column of blocks that a kind fills: see `places`.
        rank: r, the size of a block.
    """
    kinds, padded = partials.shape[1:3]
    layers, n = parts.shape[1], rank * SPANNED[kinds]
    out = torch.empty(2, layers, n, n, dtype=torch.float64, device=partials.device)
    rows = 16
    _sum_kernel[(2 * layers * kinds * (padded // rows),)](
        partials, parts, places, out, layers, rank, n, RP=padded, ROWS=rows, KINDS=kinds, num_warps=4, num_stages=1,
    )  # fmt: skip
    return out


def places(kinds: int, device: torch.device) -> Tensor:
    """Return the (kinds, 2) int32 table of blocks for `summed`: D follows the last block that is there."""
    last = SPANNED[kinds] - 1
    table = [[min(i, last), min(j, last)] for i, j in PAIRS[:kinds]]
    return torch.tensor(table, dtype=torch.int32, device=device)


@triton.jit
def _moments_side(
    addresses_ptr, numbers_ptr, dims_ptr, roots_ptr, frozen_ptr, problem, start, end,
    SIDE: tl.constexpr, RP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    r, _, d = sizes(dims_ptr, problem, SIDE)
    g = address(addresses_ptr, problem, GRAD + SIDE, tl.float32, ADDRESSES)
    old = address(addresses_ptr, problem, METRIC + SIDE, tl.float32, ADDRESSES)
    average = address(addresses_ptr, problem, AVERAGE + SIDE, tl.float32, ADDRESSES)
    beta = tl.load(numbers_ptr + problem * NUMBERS + BETA)
    frozen = tl.load(frozen_ptr + problem * 2 + SIDE) != 0
    ROWS: tl.constexpr = RP if RP < 32 else 32
    KS: tl.constexpr = 16
    total = tl.zeros((BN,), tl.float64)  # [BN]
    for first in range(start, end, BN):
        n = first + tl.arange(0, BN)
        inside = n < end
        new = tl.zeros((BN,), tl.float64)
        for top in range(0, RP, ROWS):
            row = top + tl.arange(0, ROWS)
            t = tl.zeros((ROWS, BN), tl.float64)
            for k0 in range(0, RP, KS):
                k = k0 + tl.arange(0, KS)
                root = tl.load(
                    roots_ptr + row[:, None] * r + k[None, :], mask=(row[:, None] < r) & (k[None, :] < r), other=0.0
                )
                at = element(k[:, None], n[None, :], d if SIDE == 0 else r, SIDE == 1)
                rows = tl.load(g + at, mask=(k[:, None] < r) & inside[None, :], other=0.0).to(tl.float64)
                t += tl.dot(root, rows, out_dtype=tl.float64)
            new += tl.sum(t * t, axis=0)
        before = tl.load(old + n, mask=inside, other=0.0).to(tl.float64)
        before *= before
        after = beta * before + (1.0 - beta) * (new / r)
        after = tl.where(frozen, before, after)
        tl.store(average + n, tl.sqrt(after).to(tl.float32), mask=inside)
        total += tl.where(inside, after, 0.0)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def _moments_kernel(
    addresses_ptr, numbers_ptr, dims_ptr, tiles_ptr, roots_ptr, frozen_ptr, sums_ptr, layers,
    RP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """√(β₂·D + (1 − β₂)·mean_k (R·G)²) for a tile's columns of the rows G of `.grad`, R = roots[side, layer]."""
    tile = tl.program_id(0).to(tl.int64)
    side, problem, start, end = tile_at(tiles_ptr, tile)
    r, _, _ = sizes(dims_ptr, problem, 0)
    if side == 0:
        roots = roots_ptr + problem * r * r
        total = _moments_side(addresses_ptr, numbers_ptr, dims_ptr, roots, frozen_ptr, problem, start, end, 0, RP, BN)
    else:
        roots = roots_ptr + (layers + problem) * r * r
        total = _moments_side(addresses_ptr, numbers_ptr, dims_ptr, roots, frozen_ptr, problem, start, end, 1, RP, BN)
    tl.store(sums_ptr + tile, total)


def moments(
    addresses: Tensor, numbers: Tensor, dims: Tensor, tiles: Tensor, roots: Tensor, frozen: Tensor, sums: Tensor
) -> None:  # fmt: skip
    """Launch `_moments_kernel`: the metric's new average, as its root, into the workspace AVERAGE.

    Args:
        addresses: As for `span`.
        numbers: As for `span`.
        dims: As for `span`.
        tiles: As for `span`.
        roots: R (2, L, r, r) float64, what the gradient's rows of each side are multiplied with.
        frozen: (L, 2) uint8, where the old average stays.
        sums: (tiles,) float64, Σ D of each tile's columns, written.
    """
    rank = roots.shape[-1]
    padded = max(16, 1 << (rank - 1).bit_length())
    BN, _, warps = BLOCKS[padded]
    _moments_kernel[(tiles.shape[0],)](
        addresses, numbers, dims, tiles, roots, frozen, sums, roots.shape[1],
        RP=padded, BN=BN, num_warps=warps, num_stages=1, maxnreg=REGISTERS,
    )  # fmt: skip


_SIGNATURE = {
    "addresses_ptr": "*i64", "numbers_ptr": "*fp64", "dims_ptr": "*i32", "tiles_ptr": "*i32", "inverse_ptr": "*fp64",
    "sums_ptr": "*fp64", "out_ptr": "*fp64", "roots_ptr": "*fp64", "frozen_ptr": "*u8", "partials_ptr": "*fp64",
    "parts_ptr": "*i32", "places_ptr": "*i32", "layers": "i32", "r": "i32", "n": "i32",
}  # fmt: skip


def _variant(name: str, kernel: Any, padded: int, warps: int, constexprs: dict[str, Any], bounded: bool) -> Variant:
    signature = {n: _SIGNATURE[n] for n in kernel.arg_names if n in _SIGNATURE}
    whole = {"dims_ptr", "tiles_ptr", "inverse_ptr", "sums_ptr", "out_ptr", "partials_ptr", "parts_ptr", "roots_ptr"}
    return Variant(
        name=f"{name}_r{padded}",
        kernel=kernel,
        signature=signature,
        constexprs={"RP": padded, **constexprs},
        aligned=tuple(n for n in signature if n in whole),
        num_warps=warps,
        num_stages=1,
        max_registers=REGISTERS,
        maxnreg=REGISTERS if bounded else None,
        targets=TARGETS if padded in EVERYWHERE else (SLOW_TARGET,),
    )


def _variants() -> list[Variant]:
    found = []
    for padded, (BN, KS, warps) in BLOCKS.items():
        constexprs = {"BN": BN, "KS": KS, "KINDS": FULL, "HAS_METRIC": True}
        found.append(_variant("span", _span_kernel, padded, warps, constexprs, True))
        single = {**constexprs, "KINDS": SINGLE, "HAS_METRIC": False}
        found.append(_variant("span_single", _span_kernel, padded, warps, single, True))
        found.append(_variant("moments", _moments_kernel, padded, warps, {"BN": BN}, True))
        found.append(_variant("span_sum", _sum_kernel, padded, 4, {"ROWS": 16, "KINDS": FULL}, False))
    return found


VARIANTS = _variants()
