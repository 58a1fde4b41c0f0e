"""`tangent`: the momentum of a joint step in the tangent space, and what of it lies outside; see `joint_algebra`."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

from torch import Tensor

from psilora.triton_kernels._compat import tl, triton
from psilora.triton_kernels.joint_algebra import (
    ALIVE,
    ALONG,
    BASIS,
    CAR,
    EXPONENT,
    FAILED_OUTSIDE,
    FOUR,
    KNOWN,
    LINV,
    LRES,
    ONE,
    OUT,
    RES,
    RESIDUAL_RIDGE,
    SMALL,
    STEP,
    TURN,
    TURN_DECAY,
    TWO,
    UNIT,
    WAYS,
    V,
    W,
    combine,
    factorise,
    options,
    place,
    scaled,
    terms_of,
    variant,
)
from psilora.triton_kernels.joint_layout import FRESH, MU, SCALING, SEEN, SETTINGS, SIGN, TAKEN
from psilora.triton_kernels.layout import sizes
from psilora.triton_kernels.twofold import exponent_of, load, multiply, power, product, store


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
        hi, lo = scaled(hi, lo, exponent)
        tl.store(out_ptr + place(side, row_out * RP + j, block * RP + i, RP), hi + lo)


@triton.jit(do_not_specialize=["layers"])
def _tangent_kernel(
    settings_ptr, dims_ptr, clip_ptr, seen_ptr, gram_ptr, small_ptr, known_ptr, out_ptr, layers,
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
                hi, lo = scaled(hi, lo, gain_exponent + e - tl.load(its_known + EXPONENT) - unit)
            else:
                hi, lo = load(its + W * Q + (block * RP + row) * RP + col, PLANE, row >= 0)
                hi, lo = scaled(hi, lo, e + tl.load(its_known + EXPONENT + block) - unit)
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
    combine(own + ALONG * Q, own + ONE * Q, of_old, own + TWO * Q, of_new, PLANE, RP, RP, 2)
    combine(own + FOUR * Q, own + ONE * Q, mu, own + TWO * Q, 1.0, PLANE, RP, RP, 2)  # Q·m
    combine(own + V * Q, own + V * Q, of_old, own + OUT * Q, of_new, PLANE, N, RP, 2)
    tl.debug_barrier()
    size = of_old * _dot_of(own + CAR * Q, own + (V + 1) * Q, 2 * RP, RP)
    size = (size + of_new * _dot_of(own + (CAR + 2) * Q, own + (V + 3) * Q, RP, RP)) / r
    product(
        own + OUT * Q, PLANE, RP, own + LINV * Q, PLANE, 1, RP, own + ALONG * Q, PLANE, RP, 1, RP, RP, -1.0,
        RP, False, DOUBLE,
    )  # fmt: skip
    combine(own + (OUT + 1) * Q, own + CAR * Q, of_old, own + CAR * Q, 0.0, PLANE, 2 * RP, RP, 1)
    combine(own + (OUT + 3) * Q, own + (CAR + 2) * Q, of_new, own + CAR * Q, 0.0, PLANE, RP, RP, 1)
    product(
        own + V * Q, PLANE, RP, own + W * Q, PLANE, RP, 1, own + ALONG * Q, PLANE, RP, 1, N, RP, -1.0, RP, True, DOUBLE
    )
    product(
        own + TWO * Q, PLANE, RP, own + OUT * Q, PLANE, 1, RP, own + V * Q, PLANE, RP, 1, RP, N, 1.0, RP, False, DOUBLE
    )
    size = tl.maximum(size, 0.0)
    ridge = RESIDUAL_RIDGE * size + N * UNIT * (terms_of(own + OUT * Q, gram, N, RP) / r)
    failed = factorise(own + RES * Q, PLANE, own + TWO * Q, PLANE, RP, own + ONE * Q, ridge, size > 0.0, r, RP, DOUBLE)
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
    out = out_ptr + job * (3 * RP * N)
    basis = tl.where(side == 0, 2, 1)
    moved = 3 - basis
    _write_block(out, side, own + LINV * Q, PLANE, 1, RP, 1.0, -e_f, basis, 0, RP)
    _write_block(out, side, own + TWO * Q, PLANE, RP, 1, tl.where(side == 0, 0.0, 1.0), unit - e_f, moved, 0, RP)
    for block in range(1, 4):
        factor = tl.where(block == 3, 1.0, mu)
        e = unit - tl.load(known + EXPONENT + block)
        _write_block(out, side, own + (CAR + block - 1) * Q, PLANE, RP, 1, factor, e, moved, block, RP)
        _write_block(out, side, own + CAR * Q, PLANE, RP, 1, 0.0, 0, basis, block, RP)
    tl.store(known + FAILED_OUTSIDE, failed)


def tangent(
    settings: Tensor, dims: Tensor, clip: Tensor, found: Tensor, gram: Tensor,
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
        settings, dims, clip, found, gram, small, known, out, layers,
        RP=small.shape[-1], NESTEROV=nesterov, **options(small.shape[-1], double),
    )  # fmt: skip


VARIANTS = [
    variant("joint_tangent", _tangent_kernel, padded, {"NESTEROV": True}, double)
    for padded in (8, 16, 32, 64, 128)
    for double in WAYS
]
