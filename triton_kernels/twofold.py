"""Numbers as unevaluated sums of two fp32, hi + lo with |lo| ≤ ½ulp(hi): 48 bits without float64.

Consumer cards run float64 at 1/64 of their speed and fp32 at all of it, where a twofold multiply-add is 12 operations.
Kernels that use these functions must be compiled without contraction of products and sums (`enable_fp_fusion=False`):
a rounding error is found by computing it in exactly this order.

Matrices in memory are two planes of fp32, hi and lo, `plane` elements apart.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

from psilora.triton_kernels._compat import INTERPRET, tl, triton


@triton.jit
def power(exponent):
    """Return 2^exponent for int32, 0 below 2⁻¹²⁶ and 2¹²⁷ above."""
    held = tl.minimum(tl.maximum(exponent, -127), 127)
    return ((held + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponent_of(value):
    """Return e with |value| < 2^e, the least for normal numbers; −126 for 0 and subnormal ones, 128 for inf and NaN."""
    return ((value.to(tl.int32, bitcast=True) >> 23) & 255) - 126


@triton.jit
def two_sum(a, b):
    """Return a + b rounded, and the rounding error."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


@triton.jit
def quick_two_sum(a, b):
    """As `two_sum`, for |a| ≥ |b| or a = 0."""
    s = a + b
    return s, b - (s - a)


@triton.jit
def two_product(a, b):
    """Return a·b rounded, and the rounding error."""
    p = a * b
    if INTERPRET:  # whose fma rounds twice
        return p, (a.to(tl.float64) * b.to(tl.float64) - p.to(tl.float64)).to(tl.float32)
    else:
        return p, tl.fma(a, b, -p)


@triton.jit
def add(ah, al, bh, bl):
    """Return a + b."""
    s, e = two_sum(ah, bh)
    return quick_two_sum(s, e + (al + bl))


@triton.jit
def multiply(ah, al, bh, bl):
    """Return a·b."""
    p, e = two_product(ah, bh)
    return quick_two_sum(p, e + (ah * bl + al * bh))


@triton.jit
def inverse_root(ah, al):
    """Return 1/√a for a > 0: one Newton step from the fp32 root, whose residual is formed exactly."""
    y = tl.div_rn(1.0, tl.sqrt_rn(ah))
    sh, sl = two_product(y, y)
    ph, pl = multiply(ah, al, sh, sl)
    rest = (1.0 - ph) - pl
    return quick_two_sum(y, 0.5 * y * rest)


@triton.jit
def load(pointer, plane, mask):
    """Return the two planes at a block of pointers, 0 where not `mask`."""
    return tl.load(pointer, mask=mask, other=0.0), tl.load(pointer + plane, mask=mask, other=0.0)


@triton.jit
def store(pointer, plane, hi, lo, mask):
    """Write both planes."""
    tl.store(pointer, hi, mask=mask)
    tl.store(pointer + plane, lo, mask=mask)


@triton.jit
def dot_columns(
    x_ptr, x_plane, x_row, x_step, y_ptr, y_plane, y_step, y_column, row, column, size, hi, lo,
):  # fmt: skip
    """Return hi + lo + Σ_k x[row, k]·y[k, column], k < size; element (i, k) of x lies at i·x_row + k·x_step."""
    for k in range(size):
        ah, al = load(x_ptr + row * x_row + k * x_step, x_plane, row >= 0)
        bh, bl = load(y_ptr + k * y_step + column * y_column, y_plane, column >= 0)
        p, e = two_product(ah, bh)
        hi, f = two_sum(hi, p)
        lo += f + (e + (ah * bl + al * bh))
    return quick_two_sum(hi, lo)


@triton.jit
def _double(pointer, plane, mask):
    """Return a twofold block as float64, 0 where not `mask`."""
    hi, lo = load(pointer, plane, mask)
    return hi.to(tl.float64) + lo.to(tl.float64)


@triton.jit
def _store_double(pointer, plane, value, mask):
    hi = value.to(tl.float32)
    store(pointer, plane, hi, (value - hi.to(tl.float64)).to(tl.float32), mask)


@triton.jit
def product(
    out_ptr, out_plane, out_row, x_ptr, x_plane, x_row, x_step, y_ptr, y_plane, y_step, y_column, rows: tl.constexpr,
    size: tl.constexpr, sign, N: tl.constexpr, ADD: tl.constexpr, DOUBLE: tl.constexpr,
    AT_ONCE: tl.constexpr = INTERPRET,
):  # fmt: skip
    """Out = sign·x·y, or out + sign·x·y with ADD: x (rows, size), y (size, N), out (rows, N) with rows out_row apart.

    Powers of two, at least 8; out is neither x nor y. A barrier stands before and after. With DOUBLE sums are formed in
    float64. AT_ONCE does that in a single step: for the interpreter, for which loops are slow.
    """
    tl.debug_barrier()
    # Float64 in 64 rows or more would go to a unit of sm_100 that has none.
    MOST: tl.constexpr = 32 if DOUBLE else 64
    ROWS: tl.constexpr = rows if rows < MOST or AT_ONCE else MOST
    COLUMNS: tl.constexpr = N if N < 32 or AT_ONCE else 32
    for top in range(0, rows, ROWS):
        row = top + tl.arange(0, ROWS)[:, None]
        for left in range(0, N, COLUMNS):
            column = left + tl.arange(0, COLUMNS)[None, :]
            at = out_ptr + row * out_row + column
            if DOUBLE or AT_ONCE:
                STEP: tl.constexpr = size if AT_ONCE else 16 if size < 32 else 32
                total = tl.zeros((ROWS, COLUMNS), tl.float64)
                for first in range(0, size, STEP):
                    k = first + tl.arange(0, STEP)
                    inside = k < size
                    x = _double(x_ptr + row * x_row + k[None, :] * x_step, x_plane, (row >= 0) & inside[None, :])
                    y = _double(
                        y_ptr + k[:, None] * y_step + column * y_column, y_plane, (column >= 0) & inside[:, None]
                    )
                    # fma: a plain sum becomes a chain into one accumulator, miscompiled on sm_103.
                    total = tl.fma(tl.dot(x, y, out_dtype=tl.float64), 1.0, total)
                total *= sign
                if ADD:
                    total += _double(at, out_plane, row >= 0)
                    tl.debug_barrier()  # several threads may hold an entry: none writes it before all have read it
                _store_double(at, out_plane, total, row >= 0)
            else:
                hi = tl.zeros((ROWS, COLUMNS), tl.float32)
                lo = tl.zeros((ROWS, COLUMNS), tl.float32)
                if ADD:
                    hi, lo = load(at, out_plane, row >= 0)
                    hi *= sign
                    lo *= sign
                hi, lo = dot_columns(
                    x_ptr, x_plane, x_row, x_step, y_ptr, y_plane, y_step, y_column, row, column, size, hi, lo
                )
                if ADD:
                    tl.debug_barrier()  # as above
                store(at, out_plane, hi * sign, lo * sign, row >= 0)
    tl.debug_barrier()


@triton.jit
def _entry(values, k):
    """Return entry k of every row of a square, as a vector."""
    col = tl.arange(0, values.shape[1])[None, :]
    return tl.sum(tl.where(col == k, values, 0.0), axis=1)


@triton.jit
def eliminate(hi, lo, SIZE: tl.constexpr, DOUBLE: tl.constexpr):
    """Return (L⁻¹ hi, lo, good) for a matrix LLᵀ (SIZE, SIZE): elimination on [matrix | I], both halves in one square.

    `good` is 1 if every pivot was positive and finite. What ends up above the diagonal is meaningless.
    """
    index = tl.arange(0, SIZE)
    row = index[:, None]
    col = index[None, :]
    good = tl.full((SIZE,), 1, tl.int32)  # of the same entries
    if DOUBLE:
        work = hi.to(tl.float64) + lo.to(tl.float64)
        for k in range(SIZE):
            at = tl.full((SIZE, SIZE), k, tl.int32)
            across = tl.gather(work, at, 0)
            below = tl.where(row > k, tl.gather(work, at, 1), 0.0)
            pivot = _entry(across, k)
            usable = (pivot > 0.0) & (pivot < float("inf"))
            good = tl.where(usable, good, 0)
            root = (1.0 / tl.sqrt(tl.where(usable, pivot, 1.0)))[:, None]
            across = tl.where(col == k, 1.0, across) * root
            work = tl.where(col == k, 0.0, work) - (below * root) * across
            work = tl.where(row == k, across, work)
        hi = work.to(tl.float32)
        lo = (work - hi.to(tl.float64)).to(tl.float32)
    else:
        for k in range(SIZE):
            at = tl.full((SIZE, SIZE), k, tl.int32)
            across_h = tl.gather(hi, at, 0)
            across_l = tl.gather(lo, at, 0)
            below_h = tl.where(row > k, tl.gather(hi, at, 1), 0.0)
            below_l = tl.where(row > k, tl.gather(lo, at, 1), 0.0)
            pivot_h = _entry(across_h, k)
            pivot_l = _entry(across_l, k)
            usable = (pivot_h > 0.0) & (pivot_h < float("inf"))
            good = tl.where(usable, good, 0)
            root_h, root_l = inverse_root(tl.where(usable, pivot_h, 1.0), tl.where(usable, pivot_l, 0.0))
            root_h = root_h[:, None]
            root_l = root_l[:, None]
            across_h = tl.where(col == k, 1.0, across_h)
            across_l = tl.where(col == k, 0.0, across_l)
            across_h, across_l = multiply(across_h, across_l, root_h, root_l)
            below_h, below_l = multiply(below_h, below_l, root_h, root_l)
            ph, pl = multiply(below_h, below_l, across_h, across_l)
            hi, lo = add(tl.where(col == k, 0.0, hi), tl.where(col == k, 0.0, lo), -ph, -pl)
            hi = tl.where(row == k, across_h, hi)
            lo = tl.where(row == k, across_l, lo)
    return hi, lo, tl.min(good, axis=0)


@triton.jit
def eliminate_at(
    matrix_ptr, plane, leading, SIZE: tl.constexpr, DOUBLE: tl.constexpr, LOOPS: tl.constexpr = False
):  # fmt: skip
    """Replace a square matrix in memory by L⁻¹, its upper triangle by 0, and return whether every pivot was good.

    The interpreter works in float64 unless it is to do as compiled code would (LOOPS).
    """
    tl.debug_barrier()
    row = tl.arange(0, SIZE)[:, None]
    col = tl.arange(0, SIZE)[None, :]
    at = matrix_ptr + row * leading + col
    hi, lo = load(at, plane, row >= 0)
    hi, lo, good = eliminate(hi, lo, SIZE, DOUBLE or (INTERPRET and not LOOPS))
    tl.debug_barrier()
    store(at, plane, tl.where(row >= col, hi, 0.0), tl.where(row >= col, lo, 0.0), row >= 0)
    tl.debug_barrier()
    return good


@triton.jit
def invert_factor_at(matrix_ptr, plane, work_ptr, work_plane, SIZE: tl.constexpr, DOUBLE: tl.constexpr):
    """Replace a contiguous matrix LLᵀ (SIZE, SIZE) in memory by L⁻¹ and return whether every pivot was good.

    Above 64 in halves, with L = [[L₁, 0], [M, L₂]]: M = G₂₁L₁⁻ᵀ, L₂L₂ᵀ = G₂₂ − MMᵀ, and the lower left block of L⁻¹ is
    −L₂⁻¹ M L₁⁻¹; `work` then holds a block (SIZE/2, SIZE/2).
    """
    if SIZE <= 64:
        return eliminate_at(matrix_ptr, plane, SIZE, SIZE, DOUBLE)
    else:
        H: tl.constexpr = SIZE // 2
        left = matrix_ptr + H * SIZE
        corner = left + H
        good = eliminate_at(matrix_ptr, plane, SIZE, H, DOUBLE)
        product(work_ptr, work_plane, H, left, plane, SIZE, 1, matrix_ptr, plane, 1, SIZE, H, H, 1.0, H, False, DOUBLE)
        product(
            corner, plane, SIZE, work_ptr, work_plane, H, 1, work_ptr, work_plane, 1, H, H, H, -1.0, H, True, DOUBLE
        )
        good = good & eliminate_at(corner, plane, SIZE, H, DOUBLE)
        product(left, plane, SIZE, corner, plane, SIZE, 1, work_ptr, work_plane, H, 1, H, H, 1.0, H, False, DOUBLE)
        product(work_ptr, work_plane, H, left, plane, SIZE, 1, matrix_ptr, plane, SIZE, 1, H, H, -1.0, H, False, DOUBLE)
        row = tl.arange(0, 32)[:, None]
        col = tl.arange(0, H)[None, :]
        for top in range(0, H, 32):
            hi, lo = load(work_ptr + (top + row) * H + col, work_plane, col >= 0)
            store(left + (top + row) * SIZE + col, plane, hi, lo, col >= 0)
            zero = tl.zeros((32, H), tl.float32)
            store(matrix_ptr + (top + row) * SIZE + H + col, plane, zero, zero, col >= 0)
        tl.debug_barrier()
        return good
