"""`finish`: the polar factor of a joint step and its coefficients on the raw rows; see `joint_algebra`."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

from torch import Tensor

from psilora.triton_kernels._compat import INTERPRET, tl, triton
from psilora.triton_kernels.joint_algebra import (
    ALONG,
    BAD,
    BASIS,
    EXPONENT,
    FAILED,
    FAILED_OUTSIDE,
    FOUR,
    KNOWN,
    LARGEST_SHIFT,
    LEAST_EXPONENT,
    LINV,
    LRES,
    NEXT,
    ONE,
    OUT_BAD,
    OUT_FAILED,
    OUT_MOVED,
    OUT_SHIFT,
    OUTCOME,
    SIZE,
    SMALL,
    STEP,
    TRACE,
    TRACE_EXPONENT,
    TRACES,
    TURN,
    TURN_DECAY,
    TWO,
    UNIT,
    WAYS,
    W,
    combine,
    factorise,
    mean_diagonal,
    options,
    place,
    scaled,
    terms_of,
    variant,
)
from psilora.triton_kernels.joint_layout import (
    ADDRESSES,
    DECAY,
    LOOSE,
    LR,
    RATE_FACTOR,
    RIDGE,
    SCALING,
    SEEN,
    SETTINGS,
    SHARE,
)
from psilora.triton_kernels.layout import UNALIGNED, address, sizes
from psilora.triton_kernels.twofold import exponent_of, load, power, product, store


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
            x, _ = scaled(x, x, e)
            tl.store(out_ptr + place(side, j, block * RP + i, RP), x)
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
    combine(side + STEP * Q, side + STEP * Q, -rate, side, 0.0, PLANE, N, RP, 1)
    tl.debug_barrier()


@triton.jit
def _shift(traces_ptr, layers, problem):
    """Return k for (B·2⁻ᵏ, 2ᵏ·A) where the norms are more than 2⁴ apart, see `psilora.steps.gauge`."""
    a = tl.load(traces_ptr + problem * TRACES + TRACE)
    b = tl.load(traces_ptr + (layers + problem) * TRACES + TRACE)
    apart = tl.load(traces_ptr + (layers + problem) * TRACES + TRACE_EXPONENT)
    apart -= tl.load(traces_ptr + problem * TRACES + TRACE_EXPONENT)
    both = (a > 0.0) & (b > 0.0)
    ratio = tl.where(both, b, 1.0) / tl.where(both, a, 1.0)
    e = exponent_of(ratio) + 2 * apart.to(tl.int32)
    mantissa = ratio * power(-exponent_of(ratio))
    due = both & ((e > 9) | ((e == 9) & (mantissa > 0.5)) | (e < -7))
    k = (e + 2) >> 2
    return tl.where(due, tl.minimum(tl.maximum(k, -LARGEST_SHIFT), LARGEST_SHIFT), 0)


@triton.jit(do_not_specialize=["layers"], do_not_specialize_on_alignment=UNALIGNED)
def _finish_kernel(
    addresses_ptr, settings_ptr, dims_ptr, seen_ptr, traces_ptr, gram_ptr, small_ptr, known_ptr,
    polar_ptr, schulz_ptr, out_ptr, outcome_ptr, layers,
    RP: tl.constexpr, STEPS: tl.constexpr, FIRST: tl.constexpr, HAS_DECAY: tl.constexpr, BALANCE: tl.constexpr,
    MOST_A: tl.constexpr, MOST_B: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """The polar factor O, LoRSum of (1 + decay)·(B, A) − η·c·O with FIRST (0 A, 1 B) moving first, the coefficients."""
    problem = tl.program_id(0).to(tl.int64)
    r, _, _ = sizes(dims_ptr, problem, 0)
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
    size_a = tl.load(traces_ptr + problem * TRACES + SIZE)
    size_b = tl.load(traces_ptr + (layers + problem) * TRACES + SIZE)
    rate = lr * tl.load(own + RATE_FACTOR) * tl.load(seen_ptr + problem * SEEN + SHARE)
    rate = rate / (tl.sqrt_rn(size_a) * tl.sqrt_rn(size_b) * tl.load(own + SCALING))
    rate, _ = scaled(rate, rate, -tl.load(known_a + EXPONENT) - tl.load(known_b + EXPONENT))
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
        combine(moving + STEP * Q, moving + STEP * Q, 1.0, fixed + TURN_DECAY * Q, decay, PLANE, RP, RP, 2)
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
    combine(moving + TWO * Q, moving + NEXT * Q, 1.0, moving, 0.0, PLANE, RP, RP, 1)
    product(moving + TWO * Q, PLANE, RP, moving + STEP * Q, PLANE, 1, RP, moving + NEXT * Q, PLANE, RP, 1, RP, N, 1.0,
            RP, True, DOUBLE)  # fmt: skip
    kept = 1.0 + decay if HAS_DECAY else 1.0
    combine(moving + (W + 1) * Q, moving + NEXT * Q, kept, moving + TWO * Q, -1.0, PLANE, RP, RP, 2)
    mean = mean_diagonal(moving + TWO * Q, RP, r, RP)
    # Σ x²·Γ of F + step, whose coefficients on F are I + step.
    k = tl.arange(0, RP)
    terms = terms_of(moving + STEP * Q, gram, N, RP)
    diagonal = tl.load(gram + k * (N + 1))
    terms += tl.sum(diagonal * (1.0 + 2.0 * tl.load(moving + STEP * Q + k * (RP + 1))), axis=0)
    alive = mean > power(LEAST_EXPONENT - 2 * tl.load(known_moving + EXPONENT))
    ridge = tl.load(own + RIDGE) * mean + N * UNIT * (terms / r)
    failed = factorise(
        moving + ONE * Q, PLANE, moving + TWO * Q, PLANE, RP, moving + W * Q, ridge, alive, r, RP, DOUBLE
    )
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
    combine(moving + (FOUR + 2) * Q, fixed + (FOUR + 2) * Q, 1.0, fixed, 0.0, PLANE, S, RP, 1)
    _spread(
        fixed, FOUR + 2, moving, P, P_PLANE, S if FIRST == 0 else 1, 1 if FIRST == 0 else S, rate, PLANE, RP, DOUBLE
    )
    combine(fixed + STEP * Q, fixed + STEP * Q, 1.0, moving + (W + 3) * Q, 1.0, PLANE, RP, RP, 2)
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
        size = tl.sqrt_rn(mean_diagonal(gram, N, r, RP) * r)
        bound_moving += tl.abs(decay) * _norm_bound(fixed + TURN_DECAY * Q, RP, RP) * size
    gram_fixed = gram_ptr + (layers + problem if FIRST == 0 else problem) * (2 * N * N)
    size = tl.sqrt_rn(mean_diagonal(gram_fixed, N, r, RP) * r)
    bound_fixed = rate * _norm_bound(fixed + FOUR * Q, S, RP) + _norm_bound(moving + (W + 3) * Q, RP, RP) * size
    # An entry of the new factor is at most the old one's largest and the norm of its row's increment.
    loose = tl.load(own + LOOSE)
    step_moving, _ = scaled(bound_moving * loose, 0.0, tl.load(known_moving + EXPONENT))
    step_fixed, _ = scaled(bound_fixed * loose, 0.0, tl.load(known_fixed + EXPONENT))
    old_a = power(tl.load(traces_ptr + problem * TRACES + TRACE_EXPONENT).to(tl.int32))
    old_b = power(tl.load(traces_ptr + (layers + problem) * TRACES + TRACE_EXPONENT).to(tl.int32))
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


def finish(
    addresses: Tensor, settings: Tensor, dims: Tensor, found: Tensor, traces: Tensor,
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
        addresses, settings, dims, found, traces, gram, small, known, polar, schulz, out, outcome, layers,
        RP=small.shape[-1], STEPS=schulz.shape[0], FIRST=0 if first == "A" else 1, HAS_DECAY=decay, BALANCE=balance,
        MOST_A=most[0], MOST_B=most[1], **options(small.shape[-1], double),
    )  # fmt: skip


_CASE = {"STEPS": 11, "FIRST": 0, "HAS_DECAY": True, "BALANCE": True, "MOST_A": 65504.0, "MOST_B": 3e38}
VARIANTS = [
    variant("joint_finish", _finish_kernel, padded, _CASE, double) for padded in (8, 16, 32, 64, 128) for double in WAYS
]
