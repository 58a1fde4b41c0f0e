"""`roots` and `collect`: L⁻¹ of the factors, and Γ from the partial sums of its tiles; see `joint_algebra`."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

from torch import Tensor

from psilora.triton_kernels._compat import tl, triton
from psilora.triton_kernels.joint_algebra import (
    ALIVE,
    BAD,
    EXPONENT,
    FAILED,
    KNOWN,
    LEAST_EXPONENT,
    LINV,
    ONE,
    SIZE,
    SMALL,
    TRACE,
    TRACE_EXPONENT,
    TRACES,
    TWO,
    UNIT,
    WAYS,
    W,
    factorise,
    mean_diagonal,
    options,
    scaled,
    variant,
)
from psilora.triton_kernels.joint_layout import (
    NEW_STEPS,
    RIDGE,
    SEEN,
    SETTINGS,
    SHARE,
    SIGMA,
    TAKEN,
    pieces_of,
    rows_of_piece,
    seen,
    spread,
)
from psilora.triton_kernels.layout import UNALIGNED, sizes
from psilora.triton_kernels.twofold import add, load, power, product, store
from psilora.triton_kernels.variants import Variant

#: Columns that `collect` weighs at once.
SPAN = tl.constexpr(2048)


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


@triton.jit
def _inner(x_ptr, y_ptr, RP: tl.constexpr):
    """Return Σ x·y over the entries of two contiguous (RP, RP), of their leading planes."""
    HEIGHT: tl.constexpr = RP if RP < 16 else 16
    total = tl.full((), 0.0, tl.float32)
    col = tl.arange(0, RP)[None, :]
    for top in range(0, RP, HEIGHT):
        at = (top + tl.arange(0, HEIGHT)[:, None]) * RP + col
        total += tl.sum(tl.sum(tl.load(x_ptr + at) * tl.load(y_ptr + at), axis=1), axis=0)
    return total


@triton.jit(do_not_specialize=["layers"])
def _roots_kernel(
    settings_ptr, dims_ptr, parts_ptr, pieces_ptr, partials_ptr, exponents_ptr, work_ptr, roots_ptr, traces_ptr,
    frozen_ptr, layers,
    RP: tl.constexpr, ROWS: tl.constexpr, PIECES: tl.constexpr, STRIDE: tl.constexpr,
    DOUBLE: tl.constexpr,
):  # fmt: skip
    """FFᵀ, left in ONE, L⁻¹ of FFᵀ + λI as it is, in fp32, ‖F‖² and, for B, whether it is 0."""
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
    mean = mean_diagonal(own + ONE * RP * RP, RP, r, RP)
    ridge = (tl.load(settings_ptr + problem * SETTINGS + RIDGE) + RP * UNIT) * mean
    factorise(
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
    tl.store(traces_ptr + job * TRACES + TRACE, mean * r)
    tl.store(traces_ptr + job * TRACES + TRACE_EXPONENT, top.to(tl.float32))
    if side == 1:
        tl.store(frozen_ptr + problem, tl.where(mean > 0.0, 0, 1))


@triton.jit(do_not_specialize=["layers"], do_not_specialize_on_alignment=UNALIGNED)
def _collect_kernel(
    addresses_ptr, settings_ptr, dims_ptr, parts_ptr, pieces_ptr, sums_ptr, frozen_ptr, partials_ptr, exponents_ptr,
    flags_ptr, gram_ptr, small_ptr, known_ptr, seen_ptr, traces_ptr, layers,
    RP: tl.constexpr, ROWS: tl.constexpr, PIECES: tl.constexpr, STRIDE: tl.constexpr,
    FOLLOWS: tl.constexpr, FADES: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """Γ, L⁻¹, W and N of a side of a layer; with A's side, what the size of its gradient means."""
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
    mean = mean_diagonal(gram, N, r, RP)
    alive = mean > power(LEAST_EXPONENT - 2 * e0)
    ridge = (tl.load(settings_ptr + problem * SETTINGS + RIDGE) + N * UNIT) * mean
    failed = factorise(own + LINV * Q, PLANE, gram, N * N, N, own + TWO * Q, ridge, alive, r, RP, DOUBLE)
    product(own + W * Q, PLANE, RP, gram, N * N, N, 1, own + LINV * Q, PLANE, 1, RP, N, RP, 1.0, RP, False, DOUBLE)
    known = known_ptr + job * KNOWN
    tl.store(known + EXPONENT, tl.where(e0 == -126, 0, e0))
    tl.store(known + EXPONENT + 1, e1)
    tl.store(known + EXPONENT + 2, e2)
    tl.store(known + EXPONENT + 3, e3)
    tl.store(known + ALIVE, tl.where(alive, 1, 0))
    tl.store(known + FAILED, failed)
    tl.store(known + BAD, bad)
    taken, share, sigma_a, sigma_b, steps, recent, average = seen(
        addresses_ptr, settings_ptr, dims_ptr, parts_ptr, sums_ptr, frozen_ptr, layers, problem, FOLLOWS, FADES
    )
    # N = ½(N_F + N_U), see `psilora.lowrank.spectral.size`; FFᵀ is what `roots` has left.
    product(own + TWO * Q, PLANE, RP, own + LINV * Q, PLANE, RP, 1, own + ONE * Q, PLANE, RP, 1, RP, RP, 1.0,
            RP, False, DOUBLE)  # fmt: skip
    of_factor = _inner(own + LINV * Q, own + TWO * Q, RP) / r
    traces = traces_ptr + job * TRACES
    apart = tl.load(traces + TRACE_EXPONENT).to(tl.int32) - e0
    of_factor, _ = scaled(of_factor, 0.0, 2 * apart)
    if side == 0:
        waits = tl.load(frozen_ptr + problem) != 0
        others = spread(addresses_ptr, settings_ptr, dims_ptr, problem, taken, sigma_a, waits, 0, SPAN)
    else:
        others = spread(addresses_ptr, settings_ptr, dims_ptr, problem, taken, sigma_b, taken < 0.0, 1, SPAN)
    tl.store(traces + SIZE, tl.where(of_factor > 0.0, 0.5 * (of_factor + others), others))
    if side == 0:
        found = seen_ptr + problem * SEEN
        tl.store(found + TAKEN, taken)
        tl.store(found + SHARE, share)
        tl.store(found + SIGMA, sigma_a)
        tl.store(found + SIGMA + 1, sigma_b)
        tl.store(found + NEW_STEPS, steps)
        tl.store(found + NEW_STEPS + 1, recent)
        tl.store(found + NEW_STEPS + 2, average)


def roots(
    settings: Tensor, dims: Tensor, parts: Tensor, pieces: Tensor, partials: Tensor, exponents: Tensor, small: Tensor,
    out: Tensor, traces: Tensor, frozen: Tensor, *, double: bool,
) -> None:  # fmt: skip
    """Launch `_roots_kernel`.

    Takes, beside what `joint_gram.gram` describes:
        pieces, partials, exponents: Of the Grams of F alone, as `joint_gram.gram` has left them.
        small: (2, L, 2, SMALL, RP, RP) fp32; FFᵀ is left in ONE, in units of 4^E.
        out: (2, L, RP, RP) fp32, L⁻¹ of FFᵀ, written.
        traces: (2, L, 4) fp32, Σ F² in units of 4^E, and E, written.
        frozen: (L,) int32, 1 where B = 0, written.
        double: Whether products and factorisations are formed in float64, see `doubles`.
    """
    layers = dims.shape[0]
    _roots_kernel[(2 * layers,)](
        settings, dims, parts, pieces, partials, exponents, small, out, traces, frozen, layers,
        RP=out.shape[-1], ROWS=partials.shape[-1], PIECES=pieces.shape[0],
        STRIDE=exponents.shape[1] * exponents.shape[2], **options(out.shape[-1], double),
    )  # fmt: skip


def collect(
    addresses: Tensor, settings: Tensor, dims: Tensor, parts: Tensor, pieces: Tensor, sums: Tensor, frozen: Tensor,
    partials: Tensor, exponents: Tensor, flags: Tensor, gram: Tensor, small: Tensor, known: Tensor, found: Tensor,
    traces: Tensor, *, follows: bool, fades: bool, double: bool,
) -> None:  # fmt: skip
    """Launch `_collect_kernel`.

    Takes, beside what `joint_gram.gram` describes:
        pieces, partials, exponents, flags: Of the Grams of all rows, as `joint_gram.gram` has left them.
        gram: (2, L, 2, 4·RP, 4·RP) fp32, Γ, written.
        small: (2, L, 2, SMALL, RP, RP) fp32, as `roots` has left it; written in part.
        known: (2, L, 8) int32, exponents and flags of each side, written.
        found: (L, 8) fp32, what `seen` returns, written.
        traces: (2, L, 4) fp32, as `roots` has left them; N is written.
        follows, fades: Whether the gradient's norm caps it, and lets the rate fade.
    """
    layers = dims.shape[0]
    _collect_kernel[(2 * layers,)](
        addresses, settings, dims, parts, pieces, sums, frozen, partials, exponents, flags, gram, small, known, found,
        traces, layers, RP=small.shape[-1], ROWS=partials.shape[-1], PIECES=pieces.shape[0],
        STRIDE=exponents.shape[1] * exponents.shape[2], FOLLOWS=follows, FADES=fades,
        **options(small.shape[-1], double),
    )  # fmt: skip


def _variants() -> list[Variant]:
    found = []
    for padded in (8, 16, 32, 64, 128):
        for name, kernel, blocks, more in (
            ("joint_roots", _roots_kernel, 1, {}),
            ("joint_collect", _collect_kernel, 4, {"FOLLOWS": True, "FADES": True}),
        ):
            rows, pieces = rows_of_piece(padded, blocks), pieces_of(padded, blocks)
            tiled = {"ROWS": rows, "PIECES": len(pieces), "STRIDE": (1 + pieces[-1][0]) * rows}
            found += [variant(name, kernel, padded, {**tiled, **more}, double) for double in WAYS]
    return found


VARIANTS = _variants()
