"""The algebra of the joint spectral step on matrices of a side's 4r rows, as four launches; see `lowrank.spectral`.

Everything is in the rows' own units: row i of a side counts as 2^(E_b)·Z′_i with one exponent E_b per block, so that
neither tiny nor huge gradients leave the range of fp32; h is in units of 2^H. L⁻¹ is the inverse Cholesky factor of
FFᵀ + λI, T = L⁻ᵀ, and Q = L⁻¹·F has orthonormal rows. All is twofold (see `twofold`), but for the polar factor.

- roots, one program per side and layer: L⁻¹ of the factors as they are, for the metric's moments;
- collect, one per side and layer: Γ from the partial sums, L⁻¹ of the whitened factor, W = Γ_F·T;
- tangent, one per side and layer: m and h in the tangent space, the part of h outside the factor's span and its basis;
- finish, one per layer: the polar factor, both turns of LoRSum, and the coefficients of the raw rows.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from psilora.triton_kernels._compat import DOUBLE_PRODUCTS, INTERPRET, tl, triton
from psilora.triton_kernels.joint_gram import pieces_of, rows_of_piece
from psilora.triton_kernels.joint_layout import (
    ADDRESSES,
    DECAY,
    FRESH,
    LOOSE,
    LR,
    MU,
    NEW_STEPS,
    RATE_FACTOR,
    RIDGE,
    SCALING,
    SEEN,
    SETTINGS,
    SHARE,
    SIGMA,
    SIGN,
    SUMS,
    TAKEN,
    WEIGHT_SUM,
    parts_of,
    seen,
)
from psilora.triton_kernels.layout import UNALIGNED, address, sizes
from psilora.triton_kernels.tables import capability_of
from psilora.triton_kernels.twofold import (
    add,
    exponent_of,
    invert_factor_at,
    load,
    multiply,
    power,
    product,
    store,
)
from psilora.triton_kernels.variants import DOUBLE_TARGETS, JOINT_TARGETS, SLOW_TARGET, Variant

# Matrices of RP × RP among the small ones of a side, as offsets in that unit; those of 4r rows take four.
LINV = tl.constexpr(0)
W = tl.constexpr(1)
OUT = tl.constexpr(5)  # the part of h outside the span of F, as coefficients
V = tl.constexpr(9)  # Γ·OUT
CAR = tl.constexpr(13)  # of M₁, M₂ and D in the new m: what of the old momentum is carried over, and the gradient
BASIS = tl.constexpr(16)  # OUT·T_res, orthonormal
RES = tl.constexpr(20)  # L⁻¹ of the Gram matrix of OUT
LRES = tl.constexpr(21)
ALONG = tl.constexpr(22)  # Q·h
TURN = tl.constexpr(23)  # [Q; basis]·Fᵀ·(FFᵀ + λI)⁻¹, two
TURN_DECAY = tl.constexpr(25)
ONE = tl.constexpr(26)  # scratch
TWO = tl.constexpr(27)
STEP = tl.constexpr(28)
NEXT = tl.constexpr(32)  # Γ·(F + STEP)
FOUR = tl.constexpr(36)  # scratch
SMALL = tl.constexpr(40)

# Columns of what is known of a side (int32).
EXPONENT = tl.constexpr(0)  # of F, M₁, M₂, D
ALIVE = tl.constexpr(4)
FAILED = tl.constexpr(5)
BAD = tl.constexpr(6)
FAILED_OUTSIDE = tl.constexpr(7)
KNOWN = tl.constexpr(8)

# Columns of a layer's outcome (int32).
OUT_BAD = tl.constexpr(0)
OUT_FAILED = tl.constexpr(1)
OUT_MOVED = tl.constexpr(2)
OUT_SHIFT = tl.constexpr(3)
OUTCOME = tl.constexpr(4)

# Columns of the sizes of a raw factor (fp32): Σ of its squares in units of 4^E, and E.
TRACE = tl.constexpr(0)
TRACE_EXPONENT = tl.constexpr(1)

#: Rounding of a twofold Gram matrix in units of rows·Σ x²Γ, and the ridge of what is left of h outside the span.
UNIT = tl.constexpr(2.0**-47)
RESIDUAL_RIDGE = tl.constexpr(1e-12)
#: A mean squared entry of 2^(−120) counts as none.
LEAST_EXPONENT = tl.constexpr(-120)
#: Norms further apart than 2⁴ are balanced, by at most 2¹⁴.
LARGEST_SHIFT = tl.constexpr(14)
#: Warps by padded rank, and registers per thread: without a bound ptxas spills for the sake of occupancy.
WARPS = {8: 8, 16: 8, 32: 8, 64: 8, 128: 8}
#: Bytes that are spilled nevertheless.
SPILLED = {("joint_finish", 128): 64}
REGISTERS = {8: 168, 16: 168, 32: 168, 64: 255, 128: 255}


@triton.jit
def _combine(
    out_ptr, x_ptr, a, y_ptr, b, plane, rows, columns: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Out = a·x + b·y, or a·x if COUNT is 1, entry by entry, for contiguous (rows, columns)."""
    SPAN: tl.constexpr = 1024
    a = tl.full((), 0.0, tl.float32) + a
    b = tl.full((), 0.0, tl.float32) + b
    for first in range(0, rows * columns, SPAN):
        at = first + tl.arange(0, SPAN)
        inside = at < rows * columns
        hi, lo = load(x_ptr + at, plane, inside)
        hi, lo = multiply(hi, lo, a, 0.0)
        if COUNT == 2:
            yh, yl = load(y_ptr + at, plane, inside)
            yh, yl = multiply(yh, yl, b, 0.0)
            hi, lo = add(hi, lo, yh, yl)
        store(out_ptr + at, plane, hi, lo, inside)


@triton.jit
def _dot_of(x_ptr, y_ptr, rows, columns: tl.constexpr):
    """Return Σ x·y of the leading planes of two contiguous (rows, columns) in fp32."""
    SPAN: tl.constexpr = 1024
    total = tl.zeros((SPAN,), tl.float32)
    for first in range(0, rows * columns, SPAN):
        at = first + tl.arange(0, SPAN)
        inside = at < rows * columns
        total += tl.load(x_ptr + at, mask=inside, other=0.0) * tl.load(y_ptr + at, mask=inside, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _terms_of(x_ptr, gram_ptr, n: tl.constexpr, columns: tl.constexpr):
    """Return Σ x[i, j]²·Γ[i, i] for x (n, columns), in fp32."""
    total = tl.full((), 0.0, tl.float32)
    column = tl.arange(0, columns)[None, :]
    for first in range(0, n, 16):
        row = first + tl.arange(0, 16)
        x = tl.load(x_ptr + row[:, None] * columns + column)
        diagonal = tl.load(gram_ptr + row * (n + 1))
        total += tl.sum(tl.sum(x * x, axis=1) * diagonal, axis=0)
    return total


@triton.jit
def _mean_diagonal(matrix_ptr, leading, r, RP: tl.constexpr):
    k = tl.arange(0, RP)
    return tl.sum(tl.load(matrix_ptr + k * (leading + 1), mask=k < r, other=0.0), axis=0) / r


@triton.jit
def _factor(
    out_ptr, plane, gram_ptr, gram_plane, leading, work_ptr, ridge, alive, r, RP: tl.constexpr, DOUBLE: tl.constexpr
):  # fmt: skip
    """Out = L⁻¹ of gram + ridge·I, 0 where it is not `alive` or fails; return whether it failed, 0 or 1."""
    tl.debug_barrier()
    ROWS: tl.constexpr = RP if RP < 16 else 16
    col = tl.arange(0, RP)[None, :]
    for top in range(0, RP, ROWS):
        row = top + tl.arange(0, ROWS)[:, None]
        inside = (row < r) & (col < r)
        hi, lo = load(gram_ptr + row * leading + col, gram_plane, inside)
        hi, lo = add(hi, lo, tl.where(row == col, tl.where(row < r, ridge, 1.0), 0.0), 0.0)
        store(out_ptr + row * RP + col, plane, hi, lo, row >= 0)
    good = invert_factor_at(out_ptr, plane, work_ptr, plane, RP, DOUBLE)
    limit = tl.where(alive & (good == 1), r, 0)
    for top in range(0, RP, ROWS):
        row = top + tl.arange(0, ROWS)[:, None]
        at = out_ptr + row * RP + col
        hi, lo = load(at, plane, (row < limit) & (col < limit))
        tl.debug_barrier()  # several threads may hold an entry
        store(at, plane, hi, lo, row >= 0)
    tl.debug_barrier()
    return tl.where(alive & (good == 0), 1, 0)


@triton.jit
def _exponent(exponents_ptr, first, count, start, STRIDE: tl.constexpr, RP: tl.constexpr):
    """Return the largest exponent of RP rows from `start` on over the tiles of a side."""
    top = tl.full((), -126, tl.int32)
    row = start + tl.arange(0, RP)
    for t in range(count):
        top = tl.maximum(top, tl.max(tl.load(exponents_ptr + (first + t) * STRIDE + row), axis=0))
    return top


@triton.jit
def _gather(
    out_ptr, out_plane, n, partials_ptr, exponents_ptr, pieces_ptr, first, count, e0, e1, e2, e3,
    RP: tl.constexpr, ROWS: tl.constexpr, PIECES: tl.constexpr, STRIDE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Write Γ (SIZE, SIZE) of a side, in units of its blocks' exponents, from the pieces of its tiles in order."""
    i0 = tl.arange(0, ROWS)
    inner = i0[:, None] * ROWS + i0[None, :]
    for piece in range(PIECES):
        i = tl.load(pieces_ptr + piece * 2) * ROWS + i0
        j = tl.load(pieces_ptr + piece * 2 + 1) * ROWS + i0
        lower = i[:, None] // 8 >= j[None, :] // 8  # whole sectors
        b = i // RP
        unit_i = 7 + tl.where(b == 0, e0, tl.where(b == 1, e1, tl.where(b == 2, e2, e3)))
        b = j // RP
        unit_j = 7 + tl.where(b == 0, e0, tl.where(b == 1, e1, tl.where(b == 2, e2, e3)))
        hi = tl.zeros((ROWS, ROWS), tl.float32)
        lo = tl.zeros((ROWS, ROWS), tl.float32)
        for t in range(count):
            tile = (first + t).to(tl.int64)
            ph, pl = load(partials_ptr + (tile * PIECES + piece) * (2 * ROWS * ROWS) + inner, ROWS * ROWS, lower)
            f = power(tl.load(exponents_ptr + tile * STRIDE + i) - unit_i)[:, None]
            f = f * power(tl.load(exponents_ptr + tile * STRIDE + j) - unit_j)[None, :]
            hi, lo = add(hi, lo, ph * f, pl * f)
        row = i[:, None]
        col = j[None, :]
        inside = (row < SIZE) & (col < SIZE)
        store(out_ptr + row * n + col, out_plane, hi, lo, inside & (row >= col))
        store(out_ptr + col * n + row, out_plane, hi, lo, inside & (row > col))
    tl.debug_barrier()


@triton.jit(do_not_specialize=["layers"])
def _roots_kernel(
    settings_ptr, dims_ptr, parts_ptr, pieces_ptr, partials_ptr, exponents_ptr, work_ptr, roots_ptr, traces_ptr,
    frozen_ptr, layers,
    RP: tl.constexpr, ROWS: tl.constexpr, PIECES: tl.constexpr, STRIDE: tl.constexpr,
    DOUBLE: tl.constexpr,
):  # fmt: skip
    """L⁻¹ of FFᵀ + λI as it is, in fp32, ‖F‖² and, for B, whether it is 0."""
    job = tl.program_id(0).to(tl.int64)
    side = job // layers
    problem = job % layers
    r, _, _ = sizes(dims_ptr, problem, 0)
    first = tl.load(parts_ptr + job * 2)
    count = tl.load(parts_ptr + job * 2 + 1)
    own = work_ptr + job * (2 * SMALL * RP * RP)
    PLANE: tl.constexpr = SMALL * RP * RP
    top = _exponent(exponents_ptr, first, count, 0, STRIDE, RP)
    _gather(
        own + ONE * RP * RP, PLANE, RP, partials_ptr, exponents_ptr, pieces_ptr, first, count, top, top, top, top,
        RP, ROWS, PIECES, STRIDE, RP,
    )  # fmt: skip
    mean = _mean_diagonal(own + ONE * RP * RP, RP, r, RP)
    ridge = (tl.load(settings_ptr + problem * SETTINGS + RIDGE) + RP * UNIT) * mean
    _factor(
        own + LINV * RP * RP,
        PLANE,
        own + ONE * RP * RP,
        PLANE,
        RP,
        own + TWO * RP * RP,
        ridge,
        mean > 0.0,
        r,
        RP,
        DOUBLE,
    )
    # F = 2^E·F′: L⁻¹ of F is 2^(−E) times that of F′.
    unit = power(-top)
    HEIGHT: tl.constexpr = RP if RP < 16 else 16
    col = tl.arange(0, RP)[None, :]
    for start in range(0, RP, HEIGHT):
        row = start + tl.arange(0, HEIGHT)[:, None]
        value = tl.load(own + LINV * RP * RP + row * RP + col)
        tl.store(roots_ptr + job * RP * RP + row * RP + col, value * unit)
    tl.store(traces_ptr + job * 2 + TRACE, mean * r)
    tl.store(traces_ptr + job * 2 + TRACE_EXPONENT, top.to(tl.float32))
    if side == 1:
        tl.store(frozen_ptr + problem, tl.where(mean > 0.0, 0, 1))


@triton.jit(do_not_specialize=["layers"], do_not_specialize_on_alignment=UNALIGNED)
def _collect_kernel(
    addresses_ptr, settings_ptr, dims_ptr, parts_ptr, pieces_ptr, sums_ptr, frozen_ptr, partials_ptr, exponents_ptr,
    flags_ptr, gram_ptr, small_ptr, known_ptr, seen_ptr, layers,
    RP: tl.constexpr, ROWS: tl.constexpr, PIECES: tl.constexpr, STRIDE: tl.constexpr,
    FOLLOWS: tl.constexpr, FADES: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """Γ, L⁻¹ and W of a side of a layer; with A's side, what the size of its gradient means."""
    job = tl.program_id(0).to(tl.int64)
    side = job // layers
    problem = job % layers
    r, _, _ = sizes(dims_ptr, problem, 0)
    N: tl.constexpr = 4 * RP
    Q: tl.constexpr = RP * RP
    PLANE: tl.constexpr = SMALL * Q
    gram = gram_ptr + job * (2 * N * N)
    own = small_ptr + job * (2 * PLANE)
    first = tl.load(parts_ptr + job * 2)
    count = tl.load(parts_ptr + job * 2 + 1)
    e0 = _exponent(exponents_ptr, first, count, 0, STRIDE, RP)
    e1 = _exponent(exponents_ptr, first, count, RP, STRIDE, RP)
    e2 = _exponent(exponents_ptr, first, count, 2 * RP, STRIDE, RP)
    e3 = _exponent(exponents_ptr, first, count, 3 * RP, STRIDE, RP)
    GROUPS: tl.constexpr = STRIDE // ROWS
    bad = tl.full((), 0, tl.int32)
    for f in range(count * GROUPS):
        bad = bad | tl.load(flags_ptr + first * GROUPS + f)
    _gather(
        gram, N * N, N, partials_ptr, exponents_ptr, pieces_ptr, first, count, e0, e1, e2, e3,
        RP, ROWS, PIECES, STRIDE, N,
    )  # fmt: skip
    mean = _mean_diagonal(gram, N, r, RP)
    alive = mean > power(LEAST_EXPONENT - 2 * e0)
    ridge = (tl.load(settings_ptr + problem * SETTINGS + RIDGE) + N * UNIT) * mean
    failed = _factor(own + LINV * Q, PLANE, gram, N * N, N, own + ONE * Q, ridge, alive, r, RP, DOUBLE)
    product(own + W * Q, PLANE, RP, gram, N * N, N, 1, own + LINV * Q, PLANE, 1, RP, N, RP, 1.0, RP, False, DOUBLE)
    known = known_ptr + job * KNOWN
    tl.store(known + EXPONENT, tl.where(e0 == -126, 0, e0))
    tl.store(known + EXPONENT + 1, e1)
    tl.store(known + EXPONENT + 2, e2)
    tl.store(known + EXPONENT + 3, e3)
    tl.store(known + ALIVE, tl.where(alive, 1, 0))
    tl.store(known + FAILED, failed)
    tl.store(known + BAD, bad)
    if side == 0:
        taken, share, sigma_a, sigma_b, steps, recent, average = seen(
            addresses_ptr, settings_ptr, dims_ptr, parts_ptr, sums_ptr, frozen_ptr, layers, problem, FOLLOWS, FADES
        )
        found = seen_ptr + problem * SEEN
        tl.store(found + TAKEN, taken)
        tl.store(found + SHARE, share)
        tl.store(found + SIGMA, sigma_a)
        tl.store(found + SIGMA + 1, sigma_b)
        tl.store(found + NEW_STEPS, steps)
        tl.store(found + NEW_STEPS + 1, recent)
        tl.store(found + NEW_STEPS + 2, average)


@triton.jit
def _weight_of(sums_ptr, parts_ptr, layers, problem, d, SIDE: tl.constexpr):
    """Return the mean of v over a side's columns."""
    first, count = parts_of(parts_ptr, layers, problem, SIDE)
    total = tl.full((), 0.0, tl.float32)
    for t in range(count):
        total += tl.load(sums_ptr + (first + t) * SUMS + WEIGHT_SUM)
    return total / d


@triton.jit
def _gain(settings_ptr, clip_ptr, seen_ptr, problem):
    """Return (1 − τ)·κ·clip/s with the sign of the descent, as a number below 1 and its exponent."""
    own = settings_ptr + problem * SETTINGS
    gain = tl.load(own + SIGN) * tl.load(own + FRESH) * tl.load(seen_ptr + problem * SEEN + TAKEN)
    gain = gain / tl.load(own + SCALING)
    clip = tl.load(clip_ptr)
    e = exponent_of(gain) + exponent_of(clip)
    return gain * power(-exponent_of(gain)) * (clip * power(-exponent_of(clip))), e


@triton.jit
def _unit_of_h(known_a, known_b, gain_exponent):
    """Return H, the largest exponent in h: of the gradients in the factors' bases, and of the momentum's blocks."""
    NONE: tl.constexpr = -1000
    top = tl.full((), NONE, tl.int32)
    d_a = tl.load(known_a + EXPONENT + 3)
    d_b = tl.load(known_b + EXPONENT + 3)
    of_a = d_a - tl.load(known_b + EXPONENT) + gain_exponent
    of_b = d_b - tl.load(known_a + EXPONENT) + gain_exponent
    top = tl.maximum(top, tl.where((d_a > -126) & (tl.load(known_b + ALIVE) != 0), of_a, NONE))
    top = tl.maximum(top, tl.where((d_b > -126) & (tl.load(known_a + ALIVE) != 0), of_b, NONE))
    for block in tl.static_range(1, 3):
        a = tl.load(known_a + EXPONENT + block)
        b = tl.load(known_b + EXPONENT + block)
        top = tl.maximum(top, tl.where((a > -126) & (b > -126), a + b, NONE))
    return tl.where(top == NONE, 0, top)


@triton.jit
def _scaled(hi, lo, exponent):
    """Return a twofold number times 2^exponent, in two factors: either may be beyond what one can be."""
    half = exponent // 2
    f = power(half)
    g = power(exponent - half)
    return hi * f * g, lo * f * g


@triton.jit
def _place(side, output, row, RP: tl.constexpr):
    """Return where the coefficient of an output for a row is: in (3·RP, 4·RP) for A, transposed for B."""
    return output * tl.where(side == 0, 4 * RP, 1) + row * tl.where(side == 0, 1, 3 * RP)


@triton.jit
def _write_block(
    out_ptr, side, x_ptr, plane, x_row, x_step, factor, exponent, row_out, block, RP: tl.constexpr
):  # fmt: skip
    """out[row_out·RP + j, block·RP + i] = factor·2^exponent·x[i, j] in fp32, of coefficients C (3·RP, 4·RP)."""
    ROWS: tl.constexpr = RP if RP < 16 else 16
    factor = tl.full((), 0.0, tl.float32) + factor
    i = tl.arange(0, RP)[None, :]
    for top in range(0, RP, ROWS):
        j = top + tl.arange(0, ROWS)[:, None]
        hi, lo = load(x_ptr + i * x_row + j * x_step, plane, j >= 0)
        hi, lo = multiply(hi, lo, factor, 0.0)
        hi, lo = _scaled(hi, lo, exponent)
        tl.store(out_ptr + _place(side, row_out * RP + j, block * RP + i, RP), hi + lo)


@triton.jit(do_not_specialize=["layers"])
def _tangent_kernel(
    settings_ptr, dims_ptr, parts_ptr, sums_ptr, clip_ptr, seen_ptr, gram_ptr, small_ptr, known_ptr, out_ptr, layers,
    RP: tl.constexpr, NESTEROV: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """Find h outside the factor's span and its basis, what a turn with this side fixed needs, and the new momentum."""
    job = tl.program_id(0).to(tl.int64)
    side = job // layers
    problem = job % layers
    other = (1 - side) * layers + problem
    r, _, _ = sizes(dims_ptr, problem, 0)
    N: tl.constexpr = 4 * RP
    Q: tl.constexpr = RP * RP
    PLANE: tl.constexpr = SMALL * Q
    gram = gram_ptr + job * (2 * N * N)
    own = small_ptr + job * (2 * PLANE)
    its = small_ptr + other * (2 * PLANE)
    known = known_ptr + job * KNOWN
    its_known = known_ptr + other * KNOWN
    gain, gain_exponent = _gain(settings_ptr, clip_ptr, seen_ptr, problem)
    unit = _unit_of_h(known_ptr + problem * KNOWN, known_ptr + (layers + problem) * KNOWN, gain_exponent)
    e_f = tl.load(known + EXPONENT)
    # What is carried of the momentum, M·(M_otherᵀ Q_other), and the gradient D·T_other, on M₁, M₂ and D.
    ROWS: tl.constexpr = RP if RP < 16 else 16
    col = tl.arange(0, RP)[None, :]
    for block in range(1, 4):
        e = tl.load(known + EXPONENT + block)
        for top in range(0, RP, ROWS):
            row = top + tl.arange(0, ROWS)[:, None]
            if block == 3:
                hi, lo = load(its + LINV * Q + col * RP + row, PLANE, row >= 0)
                hi, lo = multiply(hi, lo, gain, 0.0)
                hi, lo = _scaled(hi, lo, gain_exponent + e - tl.load(its_known + EXPONENT) - unit)
            else:
                hi, lo = load(its + W * Q + (block * RP + row) * RP + col, PLANE, row >= 0)
                hi, lo = _scaled(hi, lo, e + tl.load(its_known + EXPONENT + block) - unit)
            store(own + CAR * Q + ((block - 1) * RP + row) * RP + col, PLANE, hi, lo, row >= 0)
    product(
        own + V * Q, PLANE, RP, gram + RP, N * N, N, 1, own + CAR * Q, PLANE, RP, 1, N, 2 * RP, 1.0, RP, False, DOUBLE
    )
    product(
        own + OUT * Q, PLANE, RP, gram + 3 * RP, N * N, N, 1, own + (CAR + 2) * Q, PLANE, RP, 1, N, RP, 1.0,
        RP, False, DOUBLE,
    )  # fmt: skip
    product(
        own + ONE * Q,
        PLANE,
        RP,
        own + LINV * Q,
        PLANE,
        RP,
        1,
        own + V * Q,
        PLANE,
        RP,
        1,
        RP,
        RP,
        1.0,
        RP,
        False,
        DOUBLE,
    )
    product(
        own + TWO * Q, PLANE, RP, own + LINV * Q, PLANE, RP, 1, own + OUT * Q, PLANE, RP, 1, RP, RP, 1.0,
        RP, False, DOUBLE,
    )  # fmt: skip
    mu = tl.load(settings_ptr + problem * SETTINGS + MU)
    of_old = mu
    of_new = mu * 0.0 + 1.0
    if NESTEROV:
        of_old = mu * mu
        of_new = 1.0 + mu
    _combine(own + ALONG * Q, own + ONE * Q, of_old, own + TWO * Q, of_new, PLANE, RP, RP, 2)
    _combine(own + FOUR * Q, own + ONE * Q, mu, own + TWO * Q, 1.0, PLANE, RP, RP, 2)  # Q·m
    _combine(own + V * Q, own + V * Q, of_old, own + OUT * Q, of_new, PLANE, N, RP, 2)
    tl.debug_barrier()
    size = of_old * _dot_of(own + CAR * Q, own + (V + 1) * Q, 2 * RP, RP)
    size = (size + of_new * _dot_of(own + (CAR + 2) * Q, own + (V + 3) * Q, RP, RP)) / r
    product(
        own + OUT * Q, PLANE, RP, own + LINV * Q, PLANE, 1, RP, own + ALONG * Q, PLANE, RP, 1, RP, RP, -1.0,
        RP, False, DOUBLE,
    )  # fmt: skip
    _combine(own + (OUT + 1) * Q, own + CAR * Q, of_old, own + CAR * Q, 0.0, PLANE, 2 * RP, RP, 1)
    _combine(own + (OUT + 3) * Q, own + (CAR + 2) * Q, of_new, own + CAR * Q, 0.0, PLANE, RP, RP, 1)
    product(
        own + V * Q, PLANE, RP, own + W * Q, PLANE, RP, 1, own + ALONG * Q, PLANE, RP, 1, N, RP, -1.0, RP, True, DOUBLE
    )
    product(
        own + TWO * Q, PLANE, RP, own + OUT * Q, PLANE, 1, RP, own + V * Q, PLANE, RP, 1, RP, N, 1.0, RP, False, DOUBLE
    )
    size = tl.maximum(size, 0.0)
    ridge = RESIDUAL_RIDGE * size + N * UNIT * (_terms_of(own + OUT * Q, gram, N, RP) / r)
    failed = _factor(own + RES * Q, PLANE, own + TWO * Q, PLANE, RP, own + ONE * Q, ridge, size > 0.0, r, RP, DOUBLE)
    product(
        own + LRES * Q, PLANE, RP, own + TWO * Q, PLANE, RP, 1, own + RES * Q, PLANE, 1, RP, RP, RP, 1.0,
        RP, False, DOUBLE,
    )  # fmt: skip
    product(
        own + BASIS * Q,
        PLANE,
        RP,
        own + OUT * Q,
        PLANE,
        RP,
        1,
        own + RES * Q,
        PLANE,
        1,
        RP,
        N,
        RP,
        1.0,
        RP,
        False,
        DOUBLE,
    )
    # [Q; basis]·Fᵀ·T, then ·Tᵀ; and FFᵀ·T·Tᵀ.
    product(
        own + STEP * Q,
        PLANE,
        RP,
        own + W * Q,
        PLANE,
        1,
        RP,
        own + LINV * Q,
        PLANE,
        1,
        RP,
        RP,
        RP,
        1.0,
        RP,
        False,
        DOUBLE,
    )
    product(
        own + ONE * Q, PLANE, RP, own + RES * Q, PLANE, RP, 1, own + V * Q, PLANE, 1, RP, RP, RP, 1.0, RP, False, DOUBLE
    )
    product(
        own + (STEP + 1) * Q, PLANE, RP, own + ONE * Q, PLANE, RP, 1, own + LINV * Q, PLANE, 1, RP, RP, RP, 1.0,
        RP, False, DOUBLE,
    )  # fmt: skip
    product(
        own + TURN * Q, PLANE, RP, own + STEP * Q, PLANE, RP, 1, own + LINV * Q, PLANE, RP, 1, 2 * RP, RP, 1.0,
        RP, False, DOUBLE,
    )  # fmt: skip
    product(
        own + TURN_DECAY * Q, PLANE, RP, own + W * Q, PLANE, RP, 1, own + LINV * Q, PLANE, RP, 1, RP, RP, 1.0,
        RP, False, DOUBLE,
    )  # fmt: skip
    # The new momentum [Q_B, m_B⊥]·[m_A; Q_A]: for B, Q and m outside the span; for A, m and Q.
    product(
        own + TWO * Q, PLANE, RP, own + LINV * Q, PLANE, 1, RP, own + FOUR * Q, PLANE, RP, 1, RP, RP, -1.0,
        RP, False, DOUBLE,
    )  # fmt: skip
    # The weights are normalised to a mean square of 1: Q counts √v̄ less, m what the other side's count more.
    _, _, d_in = sizes(dims_ptr, problem, 0)
    _, _, d_out = sizes(dims_ptr, problem, 1)
    v_a = tl.sqrt_rn(_weight_of(sums_ptr, parts_ptr, layers, problem, d_in, 0))
    v_b = tl.sqrt_rn(_weight_of(sums_ptr, parts_ptr, layers, problem, d_out, 1))
    of_basis = 1.0 / tl.where(side == 0, v_a, v_b)
    of_moved = tl.where(side == 0, v_b, v_a)
    out = out_ptr + job * (3 * RP * N)
    basis = tl.where(side == 0, 2, 1)
    moved = 3 - basis
    _write_block(out, side, own + LINV * Q, PLANE, 1, RP, of_basis, -e_f, basis, 0, RP)
    _write_block(out, side, own + TWO * Q, PLANE, RP, 1, tl.where(side == 0, 0.0, of_moved), unit - e_f, moved, 0, RP)
    for block in range(1, 4):
        factor = tl.where(block == 3, 1.0, mu) * of_moved
        e = unit - tl.load(known + EXPONENT + block)
        _write_block(out, side, own + (CAR + block - 1) * Q, PLANE, RP, 1, factor, e, moved, block, RP)
        _write_block(out, side, own + CAR * Q, PLANE, RP, 1, 0.0, 0, basis, block, RP)
    tl.store(known + FAILED_OUTSIDE, failed)


@triton.jit
def _square(
    out_ptr, x_ptr, y_ptr, base_ptr, a, b, SIZE: tl.constexpr, FLIP: tl.constexpr, BASE: tl.constexpr,
    DOUBLE: tl.constexpr,
):  # fmt: skip
    """Out = b·x·y, with FLIP b·x·yᵀ, plus a·base with BASE, in fp32; square matrices. Barriers before and after."""
    tl.debug_barrier()
    SQUARE: tl.constexpr = SIZE if SIZE < 32 or INTERPRET else 32
    for top in range(0, SIZE, SQUARE):
        row = top + tl.arange(0, SQUARE)[:, None]
        for left in range(0, SIZE, SQUARE):
            column = left + tl.arange(0, SQUARE)
            TYPE: tl.constexpr = tl.float64 if DOUBLE else tl.float32
            STEP: tl.constexpr = 32 if DOUBLE and SIZE >= 32 else 16
            total = tl.zeros((SQUARE, SQUARE), TYPE)
            for first in range(0, SIZE, STEP):
                k = first + tl.arange(0, STEP)
                x = tl.load(x_ptr + row * SIZE + k[None, :])
                y = tl.load(
                    y_ptr + (column[None, :] * SIZE + k[:, None] if FLIP else k[:, None] * SIZE + column[None, :])
                )
                total = tl.fma(tl.dot(x.to(TYPE), y.to(TYPE), input_precision="ieee", out_dtype=TYPE), 1.0, total)
            at = row * SIZE + column[None, :]
            total = total.to(tl.float32) * b
            if BASE:
                total = tl.fma(tl.load(base_ptr + at), a, total)
            tl.store(out_ptr + at, total)
    tl.debug_barrier()


@triton.jit
def _polar(polar_ptr, schulz_ptr, SIZE: tl.constexpr, STEPS: tl.constexpr, DOUBLE: tl.constexpr):
    """Turn the matrix at `polar_ptr` into its polar factor, which ends up STEPS % 2 matrices later; two are scratch."""
    AREA: tl.constexpr = SIZE * SIZE
    ROWS: tl.constexpr = 16
    col = tl.arange(0, SIZE)[None, :]
    tl.debug_barrier()
    largest = tl.full((), 0.0, tl.float32)
    for top in range(0, SIZE, ROWS):
        row = top + tl.arange(0, ROWS)[:, None]
        largest = tl.maximum(largest, tl.max(tl.max(tl.abs(tl.load(polar_ptr + row * SIZE + col)), axis=1), axis=0))
    # A power of two first: whatever the unit of the matrix, its squares are then numbers of fp32.
    scale = power(-exponent_of(largest))
    for top in range(0, SIZE, ROWS):
        at = polar_ptr + (top + tl.arange(0, ROWS)[:, None]) * SIZE + col
        tl.store(at, tl.load(at) * scale)
    x = polar_ptr
    y = polar_ptr + AREA
    gram = polar_ptr + 2 * AREA
    _square(gram, x, x, x, 0.0, 1.0, SIZE, True, False, DOUBLE)
    bound = tl.full((), 0.0, tl.float32)
    for top in range(0, SIZE, ROWS):
        g = tl.load(gram + (top + tl.arange(0, ROWS)[:, None]) * SIZE + col)
        bound += tl.sum(tl.sum(g * g, axis=1), axis=0)
    bound = tl.sqrt_rn(bound)
    bound = tl.where(bound > 0.0, bound, 1.0)
    inverse = 1.0 / tl.sqrt_rn(bound)
    for top in range(0, SIZE, ROWS):
        at = (top + tl.arange(0, ROWS)[:, None]) * SIZE + col
        tl.store(x + at, tl.load(x + at) * inverse)
        tl.store(gram + at, tl.load(gram + at) / bound)
    for step in range(STEPS):
        if step > 0:
            _square(gram, x, x, x, 0.0, 1.0, SIZE, True, False, DOUBLE)
        a = tl.load(schulz_ptr + 2 * step)
        _square(y, gram, x, x, a, -tl.load(schulz_ptr + 2 * step + 1), SIZE, False, True, DOUBLE)
        x, y = y, x


@triton.jit
def _norm_bound(matrix_ptr, rows: tl.constexpr, RP: tl.constexpr):
    """Return the largest norm of a column of a contiguous (rows, RP), in fp32."""
    total = tl.zeros((RP,), tl.float32)
    for top in range(0, rows, 8):
        x = tl.load(matrix_ptr + (top + tl.arange(0, 8))[:, None] * RP + tl.arange(0, RP)[None, :])
        total += tl.sum(x * x, axis=0)
    return tl.sqrt_rn(tl.max(total, axis=0))


@triton.jit
def _emit_step(out_ptr, side, step_ptr, known, RP: tl.constexpr):
    """Write the coefficients of ΔF on the raw rows; return whether any is not 0."""
    ROWS: tl.constexpr = RP if RP < 16 else 16
    e_f = tl.load(known + EXPONENT)
    moved = tl.full((), 0, tl.int32)
    i = tl.arange(0, RP)[None, :]
    for block in range(4):
        e = e_f - tl.where(block == 0, e_f, tl.load(known + EXPONENT + block))
        for top in range(0, RP, ROWS):
            j = top + tl.arange(0, ROWS)[:, None]
            x = tl.load(step_ptr + (block * RP + i) * RP + j)
            x, _ = _scaled(x, x, e)
            tl.store(out_ptr + _place(side, j, block * RP + i, RP), x)
            moved = moved | tl.max(tl.max(tl.where(x != 0.0, 1, 0), axis=1), axis=0)
    return moved


@triton.jit
def _any_bad(ptr, rows: tl.constexpr, columns: tl.constexpr):
    bad = tl.full((), 0, tl.int32)
    for top in range(0, rows, 4):
        x = tl.load(ptr + (top + tl.arange(0, 4))[:, None] * columns + tl.arange(0, columns)[None, :])
        bad = bad | tl.max(tl.max(tl.where(tl.abs(x) < float("inf"), 0, 1), axis=1), axis=0)
    return bad


@triton.jit
def _single(ptr, plane, rows, columns: tl.constexpr):
    """Round a contiguous (rows, columns) to its leading plane."""
    SPAN: tl.constexpr = 1024
    for first in range(0, rows * columns, SPAN):
        at = first + tl.arange(0, SPAN)
        inside = at < rows * columns
        hi, lo = load(ptr + at, plane, inside)
        store(ptr + at, plane, hi + lo, tl.zeros((SPAN,), tl.float32), inside)


@triton.jit
def _spread(
    side, turn, its, P, p_plane, p_row, p_step, rate, PLANE: tl.constexpr, RP: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """STEP = −rate·[Q; basis]ᵀ·op(P)·turn as coefficients; turn (2·RP, RP) lies at `its + turn`. Uses FOUR."""
    Q: tl.constexpr = RP * RP
    N: tl.constexpr = 4 * RP
    product(side + FOUR * Q, PLANE, RP, P, p_plane, p_row, p_step, its + turn * Q, PLANE, RP, 1, 2 * RP, 2 * RP, 1.0,
            RP, False, DOUBLE)  # fmt: skip
    product(side + STEP * Q, PLANE, RP, side + BASIS * Q, PLANE, RP, 1, side + (FOUR + 1) * Q, PLANE, RP, 1, N, RP, 1.0,
            RP, False, DOUBLE)  # fmt: skip
    product(side + STEP * Q, PLANE, RP, side + LINV * Q, PLANE, 1, RP, side + FOUR * Q, PLANE, RP, 1, RP, RP, 1.0,
            RP, True, DOUBLE)  # fmt: skip
    _combine(side + STEP * Q, side + STEP * Q, -rate, side, 0.0, PLANE, N, RP, 1)
    tl.debug_barrier()


@triton.jit
def _shift(traces_ptr, layers, problem):
    """Return k for (B·2⁻ᵏ, 2ᵏ·A) where the norms are more than 2⁴ apart, see `psilora.steps.gauge`."""
    a = tl.load(traces_ptr + problem * 2 + TRACE)
    b = tl.load(traces_ptr + (layers + problem) * 2 + TRACE)
    apart = tl.load(traces_ptr + (layers + problem) * 2 + TRACE_EXPONENT)
    apart -= tl.load(traces_ptr + problem * 2 + TRACE_EXPONENT)
    both = (a > 0.0) & (b > 0.0)
    ratio = tl.where(both, b, 1.0) / tl.where(both, a, 1.0)
    e = exponent_of(ratio) + 2 * apart.to(tl.int32)
    mantissa = ratio * power(-exponent_of(ratio))
    due = both & ((e > 9) | ((e == 9) & (mantissa > 0.5)) | (e < -7))
    k = (e + 2) >> 2
    return tl.where(due, tl.minimum(tl.maximum(k, -LARGEST_SHIFT), LARGEST_SHIFT), 0)


@triton.jit(do_not_specialize=["layers"], do_not_specialize_on_alignment=UNALIGNED)
def _finish_kernel(
    addresses_ptr, settings_ptr, dims_ptr, parts_ptr, sums_ptr, seen_ptr, traces_ptr, gram_ptr, small_ptr, known_ptr,
    polar_ptr, schulz_ptr, out_ptr, outcome_ptr, layers,
    RP: tl.constexpr, STEPS: tl.constexpr, FIRST: tl.constexpr, HAS_DECAY: tl.constexpr, BALANCE: tl.constexpr,
    MOST_A: tl.constexpr, MOST_B: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """The polar factor O, LoRSum of (1 + decay)·(B, A) − η·c·O with FIRST (0 A, 1 B) moving first, the coefficients."""
    problem = tl.program_id(0).to(tl.int64)
    r, _, d_in = sizes(dims_ptr, problem, 0)
    _, _, d_out = sizes(dims_ptr, problem, 1)
    N: tl.constexpr = 4 * RP
    Q: tl.constexpr = RP * RP
    S: tl.constexpr = 2 * RP
    AREA: tl.constexpr = S * S
    PLANE: tl.constexpr = SMALL * Q
    ROWS: tl.constexpr = RP if RP < 16 else 16
    a_side = small_ptr + problem * (2 * PLANE)
    b_side = small_ptr + (layers + problem) * (2 * PLANE)
    known_a = known_ptr + problem * KNOWN
    known_b = known_ptr + (layers + problem) * KNOWN
    own = settings_ptr + problem * SETTINGS
    # K = [[H_Aᵀ, L_A], [L_Bᵀ, 0]]
    K = polar_ptr + problem * (4 * AREA)
    col = tl.arange(0, RP)[None, :]
    for top in range(0, RP, ROWS):
        row = top + tl.arange(0, ROWS)[:, None]
        at = K + row * S + col
        tl.store(at, tl.load(a_side + ALONG * Q + col * RP + row))
        tl.store(at + RP, tl.load(a_side + LRES * Q + row * RP + col))
        tl.store(at + RP * S, tl.load(b_side + LRES * Q + col * RP + row))
        tl.store(at + RP * S + RP, tl.zeros((ROWS, RP), tl.float32))
    _polar(K, schulz_ptr, S, STEPS, DOUBLE)
    P = K + (STEPS % 2) * AREA
    P_PLANE: tl.constexpr = (3 - STEPS % 2) * AREA  # the last of the four matrices stays 0
    lr = tl.load(address(addresses_ptr, problem, LR, tl.float32, ADDRESSES))
    v_a = _weight_of(sums_ptr, parts_ptr, layers, problem, d_in, 0)
    v_b = _weight_of(sums_ptr, parts_ptr, layers, problem, d_out, 1)
    rate = lr * tl.load(own + RATE_FACTOR) * tl.load(seen_ptr + problem * SEEN + SHARE)
    rate = rate * tl.sqrt_rn(v_a * v_b) / tl.load(own + SCALING)
    rate, _ = _scaled(rate, rate, -tl.load(known_a + EXPONENT) - tl.load(known_b + EXPONENT))
    decay = -lr * tl.load(own + DECAY)
    # `moving` goes first while `fixed` stays: op(P) = Pᵀ where A moves, P where B does.
    moving = a_side if FIRST == 0 else b_side
    fixed = b_side if FIRST == 0 else a_side
    known_moving = known_a if FIRST == 0 else known_b
    known_fixed = known_b if FIRST == 0 else known_a
    gram = gram_ptr + (problem if FIRST == 0 else layers + problem) * (2 * N * N)
    GRAM_PLANE: tl.constexpr = N * N
    _spread(moving, TURN, fixed, P, P_PLANE, 1 if FIRST == 0 else S, S if FIRST == 0 else 1, rate, PLANE, RP, DOUBLE)
    if HAS_DECAY:
        _combine(moving + STEP * Q, moving + STEP * Q, 1.0, fixed + TURN_DECAY * Q, decay, PLANE, RP, RP, 2)
        tl.debug_barrier()
    _single(moving + STEP * Q, PLANE, N, RP)
    tl.debug_barrier()
    # Γ·(F + step), and the Gram matrix of the new factor.
    for top in range(0, N, ROWS):
        row = top + tl.arange(0, ROWS)[:, None]
        hi, lo = load(gram + row * N + col, GRAM_PLANE, row >= 0)
        store(moving + NEXT * Q + row * RP + col, PLANE, hi, lo, row >= 0)
    product(moving + NEXT * Q, PLANE, RP, gram, GRAM_PLANE, N, 1, moving + STEP * Q, PLANE, RP, 1, N, N, 1.0,
            RP, True, DOUBLE)  # fmt: skip
    _combine(moving + TWO * Q, moving + NEXT * Q, 1.0, moving, 0.0, PLANE, RP, RP, 1)
    product(moving + TWO * Q, PLANE, RP, moving + STEP * Q, PLANE, 1, RP, moving + NEXT * Q, PLANE, RP, 1, RP, N, 1.0,
            RP, True, DOUBLE)  # fmt: skip
    kept = 1.0 + decay if HAS_DECAY else 1.0
    _combine(moving + (W + 1) * Q, moving + NEXT * Q, kept, moving + TWO * Q, -1.0, PLANE, RP, RP, 2)
    mean = _mean_diagonal(moving + TWO * Q, RP, r, RP)
    # Σ x²·Γ of F + step, whose coefficients on F are I + step.
    k = tl.arange(0, RP)
    terms = _terms_of(moving + STEP * Q, gram, N, RP)
    diagonal = tl.load(gram + k * (N + 1))
    terms += tl.sum(diagonal * (1.0 + 2.0 * tl.load(moving + STEP * Q + k * (RP + 1))), axis=0)
    alive = mean > power(LEAST_EXPONENT - 2 * tl.load(known_moving + EXPONENT))
    ridge = tl.load(own + RIDGE) * mean + N * UNIT * (terms / r)
    failed = _factor(moving + ONE * Q, PLANE, moving + TWO * Q, PLANE, RP, moving + W * Q, ridge, alive, r, RP, DOUBLE)
    product(moving + (FOUR + 2) * Q, PLANE, RP, moving + LINV * Q, PLANE, RP, 1, moving + NEXT * Q, PLANE, RP, 1,
            RP, RP, 1.0, RP, False, DOUBLE)  # fmt: skip
    product(moving + (FOUR + 3) * Q, PLANE, RP, moving + BASIS * Q, PLANE, 1, RP, moving + NEXT * Q, PLANE, RP, 1,
            RP, N, 1.0, RP, False, DOUBLE)  # fmt: skip
    product(fixed + FOUR * Q, PLANE, RP, moving + (FOUR + 2) * Q, PLANE, RP, 1, moving + ONE * Q, PLANE, 1, RP,
            S, RP, 1.0, RP, False, DOUBLE)  # fmt: skip
    product(fixed + (FOUR + 2) * Q, PLANE, RP, fixed + FOUR * Q, PLANE, RP, 1, moving + ONE * Q, PLANE, RP, 1,
            S, RP, 1.0, RP, False, DOUBLE)  # fmt: skip
    product(moving + (W + 2) * Q, PLANE, RP, moving + (W + 1) * Q, PLANE, RP, 1, moving + ONE * Q, PLANE, 1, RP,
            RP, RP, 1.0, RP, False, DOUBLE)  # fmt: skip
    product(moving + (W + 3) * Q, PLANE, RP, moving + (W + 2) * Q, PLANE, RP, 1, moving + ONE * Q, PLANE, RP, 1,
            RP, RP, 1.0, RP, False, DOUBLE)  # fmt: skip
    # E is read before FOUR, which the same rows of `fixed` hold, is written: it is copied to `moving` first.
    _combine(moving + (FOUR + 2) * Q, fixed + (FOUR + 2) * Q, 1.0, fixed, 0.0, PLANE, S, RP, 1)
    _spread(
        fixed, FOUR + 2, moving, P, P_PLANE, S if FIRST == 0 else 1, 1 if FIRST == 0 else S, rate, PLANE, RP, DOUBLE
    )
    _combine(fixed + STEP * Q, fixed + STEP * Q, 1.0, moving + (W + 3) * Q, 1.0, PLANE, RP, RP, 2)
    tl.debug_barrier()
    _single(fixed + STEP * Q, PLANE, N, RP)
    tl.debug_barrier()
    out_moving = out_ptr + (problem if FIRST == 0 else layers + problem) * (3 * RP * N)
    out_fixed = out_ptr + (layers + problem if FIRST == 0 else problem) * (3 * RP * N)
    moved = _emit_step(out_moving, problem * 0 + FIRST, moving + STEP * Q, known_moving, RP)
    moved = moved | _emit_step(out_fixed, problem * 0 + (1 - FIRST), fixed + STEP * Q, known_fixed, RP)
    tl.debug_barrier()
    bad = _any_bad(out_moving, 3 * RP, N) | _any_bad(out_fixed, 3 * RP, N)
    bad = bad | tl.load(known_a + BAD) | tl.load(known_b + BAD)
    bound_moving = rate * _norm_bound(moving + FOUR * Q, S, RP)
    if HAS_DECAY:
        size = tl.sqrt_rn(_mean_diagonal(gram, N, r, RP) * r)
        bound_moving += tl.abs(decay) * _norm_bound(fixed + TURN_DECAY * Q, RP, RP) * size
    gram_fixed = gram_ptr + (layers + problem if FIRST == 0 else problem) * (2 * N * N)
    size = tl.sqrt_rn(_mean_diagonal(gram_fixed, N, r, RP) * r)
    bound_fixed = rate * _norm_bound(fixed + FOUR * Q, S, RP) + _norm_bound(moving + (W + 3) * Q, RP, RP) * size
    # An entry of the new factor is at most the old one's largest and the norm of its row's increment.
    loose = tl.load(own + LOOSE)
    step_moving, _ = _scaled(bound_moving * loose, 0.0, tl.load(known_moving + EXPONENT))
    step_fixed, _ = _scaled(bound_fixed * loose, 0.0, tl.load(known_fixed + EXPONENT))
    old_a = power(tl.load(traces_ptr + problem * 2 + TRACE_EXPONENT).to(tl.int32))
    old_b = power(tl.load(traces_ptr + (layers + problem) * 2 + TRACE_EXPONENT).to(tl.int32))
    fits_a = old_a + (step_moving if FIRST == 0 else step_fixed) <= MOST_A
    fits_b = old_b + (step_fixed if FIRST == 0 else step_moving) <= MOST_B
    bad = tl.where(fits_a & fits_b, bad, 1)
    shift = moved * 0
    if BALANCE:
        shift = tl.where(moved != 0, _shift(traces_ptr, layers, problem), 0)
    failed += tl.load(known_a + FAILED) + tl.load(known_b + FAILED)
    failed += tl.load(known_a + FAILED_OUTSIDE) + tl.load(known_b + FAILED_OUTSIDE)
    outcome = outcome_ptr + problem * OUTCOME
    tl.store(outcome + OUT_BAD, bad)
    tl.store(outcome + OUT_FAILED, failed)
    tl.store(outcome + OUT_MOVED, moved)
    tl.store(outcome + OUT_SHIFT, shift)


def doubles(device: torch.device) -> bool:
    """Whether float64 is worth its while on a device: where it has half of fp32's speed, and products of it compile."""
    return capability_of(device) in DOUBLE_TARGETS and DOUBLE_PRODUCTS


def _options(padded: int, double: bool) -> dict[str, Any]:
    """How the kernels are compiled."""
    return {
        "DOUBLE": double,
        "num_warps": WARPS[padded], "num_stages": 1, "maxnreg": REGISTERS[padded], "enable_fp_fusion": False,
    }  # fmt: skip


def roots(
    settings: Tensor, dims: Tensor, parts: Tensor, pieces: Tensor, partials: Tensor, exponents: Tensor, small: Tensor,
    out: Tensor, traces: Tensor, frozen: Tensor, *, double: bool,
) -> None:  # fmt: skip
    """Launch `_roots_kernel`.

    Takes, beside what `joint_gram.gram` describes:
        pieces, partials, exponents: Of the Grams of F alone, as `joint_gram.gram` has left them.
        small: (2, L, 2, SMALL, RP, RP) fp32, scratch.
        out: (2, L, RP, RP) fp32, L⁻¹ of FFᵀ, written.
        traces: (2, L, 2) fp32, Σ F² in units of 4^E, and E, written.
        frozen: (L,) int32, 1 where B = 0, written.
        double: Whether products and factorisations are formed in float64, see `doubles`.
    """
    layers = dims.shape[0]
    _roots_kernel[(2 * layers,)](
        settings, dims, parts, pieces, partials, exponents, small, out, traces, frozen, layers,
        RP=out.shape[-1], ROWS=partials.shape[-1], PIECES=pieces.shape[0],
        STRIDE=exponents.shape[1] * exponents.shape[2], **_options(out.shape[-1], double),
    )  # fmt: skip


def collect(
    addresses: Tensor, settings: Tensor, dims: Tensor, parts: Tensor, pieces: Tensor, sums: Tensor, frozen: Tensor,
    partials: Tensor, exponents: Tensor, flags: Tensor, gram: Tensor, small: Tensor, known: Tensor, found: Tensor,
    *, follows: bool, fades: bool, double: bool,
) -> None:  # fmt: skip
    """Launch `_collect_kernel`.

    Takes, beside what `joint_gram.gram` describes:
        pieces, partials, exponents, flags: Of the Grams of all rows, as `joint_gram.gram` has left them.
        gram: (2, L, 2, 4·RP, 4·RP) fp32, Γ, written.
        small: (2, L, 2, SMALL, RP, RP) fp32, written in part.
        known: (2, L, 8) int32, exponents and flags of each side, written.
        found: (L, 8) fp32, what `seen` returns, written.
        follows, fades: Whether the gradient's norm caps it, and lets the rate fade.
    """
    layers = dims.shape[0]
    _collect_kernel[(2 * layers,)](
        addresses, settings, dims, parts, pieces, sums, frozen, partials, exponents, flags, gram, small, known, found,
        layers, RP=small.shape[-1], ROWS=partials.shape[-1], PIECES=pieces.shape[0],
        STRIDE=exponents.shape[1] * exponents.shape[2], FOLLOWS=follows, FADES=fades,
        **_options(small.shape[-1], double),
    )  # fmt: skip


def tangent(
    settings: Tensor, dims: Tensor, parts: Tensor, sums: Tensor, clip: Tensor, found: Tensor, gram: Tensor,
    small: Tensor, known: Tensor, out: Tensor, *, nesterov: bool, double: bool,
) -> None:  # fmt: skip
    """Launch `_tangent_kernel`.

    Takes, beside what `joint_gram.gram` describes:
        clip: 0-d fp32, what multiplies `.grad`.
        found, gram, small, known: What `collect` has left; `small` and `known` are extended.
        out: (2, L, 3·RP, 4·RP) fp32, coefficients C, those of B transposed; the rows of the new momentum are written.
        nesterov: Whether h = μ·m + (1 − τ)·g replaces m.
    """
    layers = dims.shape[0]
    _tangent_kernel[(2 * layers,)](
        settings, dims, parts, sums, clip, found, gram, small, known, out, layers,
        RP=small.shape[-1], NESTEROV=nesterov, **_options(small.shape[-1], double),
    )  # fmt: skip


def finish(
    addresses: Tensor, settings: Tensor, dims: Tensor, parts: Tensor, sums: Tensor, found: Tensor, traces: Tensor,
    gram: Tensor, small: Tensor, known: Tensor, polar: Tensor, schulz: Tensor, out: Tensor, outcome: Tensor,
    *, first: str, decay: bool, balance: bool, most: tuple[float, float], double: bool,
) -> None:  # fmt: skip
    """Launch `_finish_kernel`.

    Takes, beside what `joint_gram.gram` describes:
        found, gram, small, known: What `collect` and `tangent` have left; `small` is written.
        traces: What `roots` has left.
        polar: (L, 4, 2·RP, 2·RP) fp32, scratch whose last matrix is 0.
        schulz: (steps, 2) fp32, the coefficients of Newton–Schulz.
        out: C, of which the rows of ΔF are written.
        outcome: (L, 4) int32, whether the step is not finite, failed factorisations, whether F moves, its shift k.
        first: "A" or "B".
        decay, balance: Whether there is weight decay, and whether factors are balanced.
        most: The largest numbers of the dtypes of A and B.
    """
    layers = dims.shape[0]
    _finish_kernel[(layers,)](
        addresses, settings, dims, parts, sums, found, traces, gram, small, known, polar, schulz, out, outcome, layers,
        RP=small.shape[-1], STEPS=schulz.shape[0], FIRST=0 if first == "A" else 1, HAS_DECAY=decay, BALANCE=balance,
        MOST_A=most[0], MOST_B=most[1], **_options(small.shape[-1], double),
    )  # fmt: skip


_TYPES = {
    "addresses_ptr": "*i64", "settings_ptr": "*fp32", "dims_ptr": "*i32", "parts_ptr": "*i32", "pieces_ptr": "*i32",
    "sums_ptr": "*fp32", "frozen_ptr": "*i32", "partials_ptr": "*fp32", "exponents_ptr": "*i32", "flags_ptr": "*i32",
    "gram_ptr": "*fp32", "small_ptr": "*fp32", "work_ptr": "*fp32", "known_ptr": "*i32", "seen_ptr": "*fp32",
    "roots_ptr": "*fp32", "traces_ptr": "*fp32", "clip_ptr": "*fp32", "out_ptr": "*fp32", "polar_ptr": "*fp32",
    "schulz_ptr": "*fp32", "outcome_ptr": "*i32", "layers": "i32",
}  # fmt: skip


def _targets(double: bool) -> tuple[int, ...]:
    return tuple(t for t in JOINT_TARGETS if (t in DOUBLE_TARGETS and DOUBLE_PRODUCTS) == double)


def _variant(name: str, kernel: Any, padded: int, constexprs: dict[str, Any], double: bool) -> Variant:
    signature = {n: _TYPES[n] for n in kernel.arg_names if n in _TYPES}
    return Variant(
        name=f"{name}{'' if double else '_twofold'}_r{padded}",
        kernel=kernel,
        signature=signature,
        constexprs={"RP": padded, "DOUBLE": double, **constexprs},
        aligned=tuple(n for n in signature if n.endswith("_ptr") and n not in (*UNALIGNED, "settings_ptr", "clip_ptr")),
        num_warps=WARPS[padded],
        num_stages=1,
        max_registers=REGISTERS[padded],
        maxnreg=REGISTERS[padded],
        fusion=False,
        spilled=SPILLED.get((name, padded), 0),
        targets=_targets(double) if padded == 16 else (SLOW_TARGET,),
    )


#: Whether DOUBLE, as far as this Triton compiles it.
WAYS = (True, False) if DOUBLE_PRODUCTS else (False,)


def _variants() -> list[Variant]:
    found = []
    for padded in (8, 16, 32, 64, 128):
        for name, kernel, blocks, more in (
            ("joint_roots", _roots_kernel, 1, {}),
            ("joint_collect", _collect_kernel, 4, {"FOLLOWS": True, "FADES": True}),
        ):
            rows, pieces = rows_of_piece(padded, blocks), pieces_of(padded, blocks)
            tiled = {"ROWS": rows, "PIECES": len(pieces), "STRIDE": (1 + pieces[-1][0]) * rows}
            found += [_variant(name, kernel, padded, {**tiled, **more}, double) for double in WAYS]
        for double in WAYS:
            found.append(_variant("joint_tangent", _tangent_kernel, padded, {"NESTEROV": True}, double))
        constexprs = {
            "STEPS": 11, "FIRST": 0, "HAS_DECAY": True, "BALANCE": True, "MOST_A": 65504.0, "MOST_B": 3e38,
        }  # fmt: skip
        found += [_variant("joint_finish", _finish_kernel, padded, constexprs, double) for double in WAYS]
    return found


VARIANTS = _variants()
