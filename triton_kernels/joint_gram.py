"""Grams of the joint spectral step without float64: exact sums of products of fp32 rows, on tensor cores.

Each row is written as 2^E·(s₁/2⁷ + s₂/2¹⁵ + s₃/2²³) with integers |s| ≤ 128, E from the row's largest entry so far.
bf16 holds such integers exactly, and sums of 256 products of them stay below 2²⁴, so that fp32 accumulators are exact:
what is summed is the Gram matrix of rows that are off by 2⁻²⁴ of their largest entry, not a Gram matrix that is off.
These sums are added to twofold ones, in units 2^(E_i + E_j); where E grows, both go on in the new units.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

from typing import Any

from torch import Tensor

from psilora.triton_kernels._compat import INTERPRET, tl, triton
from psilora.triton_kernels.joint_layout import (
    ADDRESSES,
    FACTOR,
    TYPES,
    aligned,
    pieces_of,
    rows_of,
    rows_of_piece,
    seen,
    variant,
    weights,
)
from psilora.triton_kernels.layout import UNALIGNED, address, element, sizes, tile_at
from psilora.triton_kernels.tables import capability_of
from psilora.triton_kernels.twofold import exponent_of, power, two_sum
from psilora.triton_kernels.variants import JOINT_TARGETS, Variant

#: Columns of a tile are a multiple of this: what a program does once should be little beside them.
SPAN = tl.constexpr(256)
#: Where all widths are a multiple of this loads need no masks.
EVEN = 64
#: Columns whose integer sums stay below 2²⁴ in one accumulator: of single products, and of three of them.
FULL = tl.constexpr(512)
FULL_CROSS = tl.constexpr(256)
WARPS = 2
#: Adding and subtracting it rounds an fp32 number below 2²² to an integer.
_ROUND = tl.constexpr(12582912.0)


#: Targets whose products read both operands from shared memory, and the others.
WIDE_TARGETS = (90, 100)
NARROW = tuple(target for target in JOINT_TARGETS if target not in WIDE_TARGETS)


def _shape(rows: int, target: int) -> dict[str, Any]:
    """Return the columns of a chunk, fewer where operands of products are in registers, and how it is compiled."""
    chunk = 64 if target in WIDE_TARGETS or rows < 64 else 32
    return {"KC": chunk, "num_warps": {16: 2, 32: 4, 64: 8}[rows], "num_stages": 1, "maxnreg": 255}


@triton.jit
def _top(most):
    """Return E of rows: an exponent above their entries; at least −120, for 2^(7 − E) to be a number of fp32."""
    e = exponent_of(tl.max(most, axis=0))
    return tl.where(e > -126, tl.maximum(e, -120), e)


@triton.jit
def _slices(z, e):
    """Return integers s₁, s₂, s₃ with z ≈ 2^e·(s₁/2⁷ + s₂/2¹⁵ + s₃/2²³), as operands of a product."""
    x = z * power(7 - e)
    s1 = (x + _ROUND) - _ROUND
    x = (x - s1) * 256.0
    s2 = (x + _ROUND) - _ROUND
    x = (x - s2) * 256.0
    s3 = (x + _ROUND) - _ROUND
    if INTERPRET:  # whose products of bf16 are wrong
        return s1, s2, s3
    else:
        return s1.to(tl.bfloat16), s2.to(tl.bfloat16), s3.to(tl.bfloat16)


@triton.jit
def _whitened(
    addresses_ptr, dims_ptr, problem, row, n, end, root,
    SIDE: tl.constexpr, RP: tl.constexpr, ALONE: tl.constexpr, WHOLE: tl.constexpr, F_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
):  # fmt: skip
    """Return rows Z of a side, or of F alone; rows run along axis 1."""
    if ALONE:
        r, _, d = sizes(dims_ptr, problem, SIDE)
        k = row[None, :]
        columns = n[:, None]
        f = address(addresses_ptr, problem, FACTOR + SIDE, F_TYPE, ADDRESSES)
        if WHOLE:
            at = aligned(f, element(k, columns, d if SIDE == 0 else RP, SIDE == 1), 1, SIDE == 1, True)
            if row.shape[0] > RP:
                return tl.load(at, mask=k < RP, other=0.0).to(tl.float32)
            else:
                return tl.load(at).to(tl.float32)
        at = element(k, columns, d if SIDE == 0 else r, SIDE == 1)
        return tl.load(f + at, mask=(k < r) & (columns < end), other=0.0).to(tl.float32)
    else:
        z, of_f = rows_of(addresses_ptr, dims_ptr, problem, row, n, end, SIDE, RP, 1, WHOLE, F_TYPE, G_TYPE)
        return z * tl.where(of_f, root[:, None], (1.0 / root)[:, None])


@triton.jit
def _roots_of(
    addresses_ptr, settings_ptr, problem, taken, sigma, frozen, first, end, SIDE: tl.constexpr, ALONE: tl.constexpr
):  # fmt: skip
    """Return √v of SPAN columns, one for each thread and not for each entry."""
    if ALONE:
        return tl.full((SPAN,), 1.0, tl.float32)
    else:
        n = first + tl.arange(0, SPAN)
        v, _, _ = weights(addresses_ptr, settings_ptr, problem, taken, sigma, frozen, n, n < end, SIDE)
        return tl.sqrt_rn(v)


@triton.jit
def _part(values, first, SIZE: tl.constexpr, ALONE: tl.constexpr):
    """Return SIZE of a vector's entries from `first` on."""
    if ALONE:
        return tl.full((SIZE,), 1.0, tl.float32)
    else:
        return tl.gather(values, first + tl.arange(0, SIZE), 0)


@triton.jit
def _cut(
    addresses_ptr, dims_ptr, problem, row, begin, end, roots, first, top,
    SIDE: tl.constexpr, RP: tl.constexpr, KC: tl.constexpr, ALONE: tl.constexpr, WHOLE: tl.constexpr,
    F_TYPE: tl.constexpr, G_TYPE: tl.constexpr,
):  # fmt: skip
    """Return the slices of rows at the KC columns from `begin` on, whose weights begin at entry `first` of `roots`."""
    n = begin + tl.arange(0, KC)
    root = _part(roots, first, KC, ALONE)
    z = _whitened(addresses_ptr, dims_ptr, problem, row, n, end, root, SIDE, RP, ALONE, WHOLE, F_TYPE, G_TYPE)
    return _slices(z, top[None, :])


@triton.jit
def _both(sums):
    """Return sums over i, j and over j, i together: of integers below 2²³, exact."""
    return sums + tl.trans(sums)


@triton.jit
def _flush(at, plane, first, second, third, more, fourth, fifth, inside, begun):
    """Store sums of integers, 2⁸ apart, as twofold numbers; add them to what is there if `begun`.

    `third` has two terms.
    """
    h, low = two_sum(first, second * (1.0 / 256))
    h, rest = two_sum(h, third * (1.0 / 65536))
    low += rest
    h, rest = two_sum(h, more * (1.0 / 65536))
    low += rest
    h, rest = two_sum(h, fourth * (1.0 / 16777216))
    low += rest + fifth * (1.0 / 4294967296)
    if begun:
        h, rest = two_sum(tl.load(at, mask=inside, other=0.0), h)
        low = tl.load(at + plane, mask=inside, other=0.0) + (rest + low)
        tl.debug_barrier()
    tl.store(at, h, mask=inside)
    tl.store(at + plane, low, mask=inside)
    return h


@triton.jit
def _gram_side(
    addresses_ptr, settings_ptr, dims_ptr, out_ptr, plane, exponents_ptr, flags_ptr,
    taken, sigma, frozen, problem, start, end, left, right,
    SIDE: tl.constexpr, RP: tl.constexpr, ROWS: tl.constexpr, KC: tl.constexpr, ALONE: tl.constexpr,
    WHOLE: tl.constexpr, CROSS: tl.constexpr, F_TYPE: tl.constexpr, G_TYPE: tl.constexpr,
):  # fmt: skip
    """A piece of Γ: of rows with themselves, or with CROSS of rows `left` with rows `right`."""
    i = left * ROWS + tl.arange(0, ROWS)
    j = right * ROWS + tl.arange(0, ROWS)
    shape: tl.constexpr = (KC, ROWS)
    # The largest entry of every row first: products of a row are then sums in one unit.
    most_i = tl.zeros(shape, tl.float32)
    most_j = tl.zeros(shape, tl.float32)
    for block in range(start, end, SPAN):
        roots = _roots_of(addresses_ptr, settings_ptr, problem, taken, sigma, frozen, block, end, SIDE, ALONE)
        for begin in range(block, tl.minimum(block + SPAN, end), KC):
            n = begin + tl.arange(0, KC)
            root = _part(roots, begin - block, KC, ALONE)
            x = _whitened(addresses_ptr, dims_ptr, problem, i, n, end, root, SIDE, RP, ALONE, WHOLE, F_TYPE, G_TYPE)
            most_i = tl.maximum(most_i, tl.abs(x))
            if CROSS:
                x = _whitened(addresses_ptr, dims_ptr, problem, j, n, end, root, SIDE, RP, ALONE, WHOLE, F_TYPE, G_TYPE)
                most_j = tl.maximum(most_j, tl.abs(x))
    top_i = _top(most_i)
    top_j = _top(most_j)
    row = tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, ROWS)[None, :]
    at = out_ptr + row * ROWS + col
    inside = (row // 8 >= col // 8) | CROSS  # whole sectors
    LENGTH: tl.constexpr = FULL_CROSS if CROSS else FULL
    hi = tl.zeros((ROWS, ROWS), tl.float32)
    for whole in range(start, end, LENGTH):
        first = tl.zeros((ROWS, ROWS), tl.float32)
        second = tl.zeros((ROWS, ROWS), tl.float32)
        third = tl.zeros((ROWS, ROWS), tl.float32)
        middle = tl.zeros((ROWS, ROWS), tl.float32)
        fourth = tl.zeros((ROWS, ROWS), tl.float32)
        fifth = tl.zeros((ROWS, ROWS), tl.float32)
        last = tl.minimum(whole + LENGTH, end)
        roots = _roots_of(addresses_ptr, settings_ptr, problem, taken, sigma, frozen, whole, end, SIDE, ALONE)
        x1, x2, x3 = _cut(
            addresses_ptr, dims_ptr, problem, i, whole, end, roots, 0, top_i, SIDE, RP, KC, ALONE, WHOLE, F_TYPE, G_TYPE
        )
        y1, y2, y3 = x1, x2, x3
        if CROSS:
            y1, y2, y3 = _cut(
                addresses_ptr, dims_ptr, problem, j, whole, end, roots, 0, top_j, SIDE, RP, KC, ALONE, WHOLE, F_TYPE,
                G_TYPE,
            )  # fmt: skip
        for begin in range(whole, last, KC):
            # The next chunk is loaded before this one's products. Operands that come out of a loop's last turn are also
            # what sm_90 takes from shared memory; from registers its products are miscompiled.
            following = begin + KC
            inner = (following - whole) % SPAN
            z1, z2, z3 = x1, x2, x3
            u1, u2, u3 = y1, y2, y3
            if following < last:
                if inner == 0:
                    roots = _roots_of(
                        addresses_ptr, settings_ptr, problem, taken, sigma, frozen, following, end, SIDE, ALONE
                    )
                z1, z2, z3 = _cut(
                    addresses_ptr, dims_ptr, problem, i, following, end, roots, inner, top_i, SIDE, RP, KC, ALONE,
                    WHOLE, F_TYPE, G_TYPE,
                )  # fmt: skip
                if CROSS:
                    u1, u2, u3 = _cut(
                        addresses_ptr, dims_ptr, problem, j, following, end, roots, inner, top_j, SIDE, RP, KC, ALONE,
                        WHOLE, F_TYPE, G_TYPE,
                    )  # fmt: skip
            t1, t2, t3 = tl.trans(x1), tl.trans(x2), tl.trans(x3)
            # Sums of integers below 2²⁴; fma: a plain sum becomes a chain into one accumulator, miscompiled on sm_103.
            first = tl.dot(t1, y1, first)
            second = tl.dot(t1, y2, second)
            third = tl.dot(t1, y3, third)
            middle = tl.dot(t2, y2, middle)
            fourth = tl.dot(t2, y3, fourth)
            fifth = tl.dot(t3, y3, fifth)
            if CROSS:
                second = tl.fma(tl.dot(t2, y1), 1.0, second)
                third = tl.fma(tl.dot(t3, y1), 1.0, third)
                fourth = tl.fma(tl.dot(t3, y2), 1.0, fourth)
                y1, y2, y3 = u1, u2, u3
            else:
                y1, y2, y3 = z1, z2, z3
            x1, x2, x3 = z1, z2, z3
        if not CROSS:
            second = _both(second)
            third = _both(third)
            fourth = _both(fourth)
        hi = _flush(at, plane, first, second, third, middle, fourth, fifth, inside, whole > start)
    if not CROSS:
        tl.store(exponents_ptr + i, top_i)
        # An entry that is not finite has made all that it was multiplied with NaN.
        tl.store(flags_ptr + left, tl.max(tl.max(tl.where(tl.abs(hi) < float("inf"), 0, 1), axis=1), axis=0))


@triton.jit(do_not_specialize=["layers"], do_not_specialize_on_alignment=UNALIGNED)
def _gram_kernel(
    addresses_ptr, settings_ptr, dims_ptr, tiles_ptr, parts_ptr, pieces_ptr, sums_ptr, frozen_ptr, out_ptr,
    exponents_ptr, flags_ptr, layers,
    RP: tl.constexpr, ROWS: tl.constexpr, PIECES: tl.constexpr, GROUPS: tl.constexpr,
    KC: tl.constexpr, ALONE: tl.constexpr, FOLLOWS: tl.constexpr, WHOLE: tl.constexpr,
    F_A: tl.constexpr, F_B: tl.constexpr, G_A: tl.constexpr, G_B: tl.constexpr,
):  # fmt: skip
    """One piece of the partial Gram matrix of a tile's columns per program, and the exponents of its rows."""
    job = tl.program_id(0).to(tl.int64)
    tile = job // PIECES
    piece = job % PIECES
    left = tl.load(pieces_ptr + piece * 2)
    right = tl.load(pieces_ptr + piece * 2 + 1)
    side, problem, start, end = tile_at(tiles_ptr, tile)
    out = out_ptr + job * (2 * ROWS * ROWS)
    exponents = exponents_ptr + tile * (GROUPS * ROWS)
    flags = flags_ptr + tile * GROUPS
    taken = tl.full((), 1.0, tl.float32)
    sigma_a = taken
    sigma_b = taken
    if not ALONE:
        taken, _, sigma_a, sigma_b, _, _, _ = seen(
            addresses_ptr, settings_ptr, dims_ptr, parts_ptr, sums_ptr, frozen_ptr, layers, problem, FOLLOWS, False
        )
    for SIDE in tl.static_range(2):
        if side == SIDE:
            sigma = sigma_a if SIDE == 0 else sigma_b
            frozen = taken < 0.0
            if SIDE == 0 and not ALONE:
                frozen = tl.load(frozen_ptr + problem) != 0
            F_TYPE: tl.constexpr = F_A if SIDE == 0 else F_B
            G_TYPE: tl.constexpr = G_A if SIDE == 0 else G_B
            if GROUPS == 1:
                _gram_side(
                    addresses_ptr, settings_ptr, dims_ptr, out, ROWS * ROWS, exponents, flags, taken,
                    sigma, frozen, problem, start, end, left, right, SIDE, RP, ROWS, KC, ALONE, WHOLE, False,
                    F_TYPE, G_TYPE,
                )  # fmt: skip
            elif left == right:
                _gram_side(
                    addresses_ptr, settings_ptr, dims_ptr, out, ROWS * ROWS, exponents, flags, taken,
                    sigma, frozen, problem, start, end, left, right, SIDE, RP, ROWS, KC, ALONE, WHOLE, False,
                    F_TYPE, G_TYPE,
                )  # fmt: skip
            else:
                _gram_side(
                    addresses_ptr, settings_ptr, dims_ptr, out, ROWS * ROWS, exponents, flags, taken,
                    sigma, frozen, problem, start, end, left, right, SIDE, RP, ROWS, KC, ALONE, WHOLE, True,
                    F_TYPE, G_TYPE,
                )  # fmt: skip


def gram(
    addresses: Tensor, settings: Tensor, dims: Tensor, tiles: Tensor, parts: Tensor, pieces: Tensor, sums: Tensor,
    frozen: Tensor, out: Tensor, exponents: Tensor, flags: Tensor, *, padded: int, alone: bool, follows: bool,
    whole: bool, types: tuple[Any, Any, Any, Any],
) -> None:  # fmt: skip
    """Launch `_gram_kernel`: of F alone, unweighted, or of all rows of a side, whitened.

    Args:
        addresses: (L, 16) int64, see `slots`.
        settings: (L, 16) fp32.
        dims: (L, 4) int32, r, rows of the momentum, d_in and d_out.
        tiles: (tiles, 4) int32, side, layer, first and end column.
        parts: (2, L, 2) int32, per side and layer the first of its tiles and their number.
        pieces: What `pieces_table` returns.
        sums: (tiles, 4) fp32, what `moments` has left.
        frozen: (L,) int32, whether A's metric waits because B = 0.
        out: (tiles, pieces, 2, ROWS, ROWS) fp32, hi and lo in units of the rows' 2^(E − 7), written; of a piece on the
            diagonal the lower triangle.
        exponents: (tiles, groups, ROWS) int32, E of every row, written.
        flags: (tiles, groups) int32, 1 where an entry is not finite, written.
        padded: r padded to a power of two of at least 8.
        alone: Whether F alone is summed.
        follows: Whether an outlier among the gradients is scaled down.
        whole: Whether r is `padded`, every width a multiple of `EVEN` and every address one of 16 bytes.
        types: Triton's types of A, B, dA and dB.
    """
    rows = out.shape[-1]
    _gram_kernel[(tiles.shape[0] * pieces.shape[0],)](
        addresses, settings, dims, tiles, parts, pieces, sums, frozen, out, exponents, flags, dims.shape[0],
        RP=padded, ROWS=rows, PIECES=pieces.shape[0], GROUPS=exponents.shape[1],
        ALONE=alone, FOLLOWS=follows, WHOLE=whole, F_A=types[0], F_B=types[1], G_A=types[2], G_B=types[3],
        enable_fp_fusion=False, **_shape(rows, capability_of(addresses.device)),
    )  # fmt: skip


def _variants() -> list[Variant]:
    found = []
    for padded in (8, 16, 32, 64, 128):
        for kind, types in TYPES.items():
            for name, blocks in (("joint_gram", 4), ("joint_gram_alone", 1)):
                rows = rows_of_piece(padded, blocks)
                own = {
                    "ROWS": rows, "GROUPS": -(-padded * blocks // rows), "PIECES": len(pieces_of(padded, blocks)),
                    "ALONE": blocks == 1, "FOLLOWS": blocks == 4, **types,
                }  # fmt: skip
                for way, targets in (("", WIDE_TARGETS), ("_narrow", NARROW)):
                    shape = {**_shape(rows, targets[0]), "max_registers": 255, "fusion": False}
                    found.append(variant(f"{name}{kind}{way}", _gram_kernel, padded, own, shape, targets))
    return found


VARIANTS = _variants()
