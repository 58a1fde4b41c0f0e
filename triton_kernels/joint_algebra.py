"""What the launches of a joint step's algebra share: their workspaces, and products and factorisations in memory.

Everything is in the rows' own units: row i of a side counts as 2^(E_b)·Z′_i with one exponent E_b per block, so that
neither tiny nor huge gradients leave the range of fp32; h is in units of 2^H. L⁻¹ is the inverse Cholesky factor of
FFᵀ + λI, T = L⁻ᵀ, and Q = L⁻¹·F has orthonormal rows. All is twofold (see `twofold`), or float64 where that is fast,
but for the polar factor. In order:

- roots (`joint_collect`), one program per side and layer: L⁻¹ of the factors as they are, for the metric's moments;
- collect (`joint_collect`), one per side and layer: Γ from the partial sums, L⁻¹ of the whitened factor, W = Γ_F·T, and
  how large a step with these weights would be;
- tangent (`joint_tangent`), one per side and layer: m and h in the tangent space, the part of h outside the factor's
  span and its basis;
- finish (`joint_finish`), one per layer: the polar factor, both turns of LoRSum, and the coefficients of the raw rows.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

import math
from typing import Any

import torch

from psilora.triton_kernels import slots
from psilora.triton_kernels._compat import DOUBLE_PRODUCTS, tl, triton
from psilora.triton_kernels.layout import UNALIGNED
from psilora.triton_kernels.tables import capability_of
from psilora.triton_kernels.twofold import add, invert_factor_at, load, multiply, power, store
from psilora.triton_kernels.variants import DOUBLE_TARGETS, SLOW_TARGET, Variant, joint_targets

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

# Columns of the sizes of a side (fp32): Σ of the raw factor's squares in units of 4^E, E, and N, see
# `psilora.lowrank.spectral.size`.
TRACE = tl.constexpr(0)
TRACE_EXPONENT = tl.constexpr(1)
SIZE = tl.constexpr(2)
TRACES = tl.constexpr(4)

#: Rounding of a twofold Gram matrix in units of rows·Σ x²Γ.
UNIT = tl.constexpr(2.0**-47)

# What the reference has, too.
RESIDUAL_RIDGE = tl.constexpr(slots.RESIDUAL_RIDGE)
LEAST_EXPONENT = tl.constexpr(int(math.log2(slots.LEAST_SQUARE)))
LARGEST_SHIFT = tl.constexpr(slots.LARGEST_SHIFT)

#: Warps by padded rank, and registers per thread: without a bound ptxas spills for the sake of occupancy.
WARPS = {8: 8, 16: 8, 32: 8, 64: 8, 128: 8}
REGISTERS = {8: 168, 16: 168, 32: 255, 64: 255, 128: 255}


@triton.jit
def combine(
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
def terms_of(x_ptr, gram_ptr, n: tl.constexpr, columns: tl.constexpr):
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
def mean_diagonal(matrix_ptr, leading, r, RP: tl.constexpr):
    """Return the mean of the first r entries of a diagonal, of the leading plane."""
    k = tl.arange(0, RP)
    return tl.sum(tl.load(matrix_ptr + k * (leading + 1), mask=k < r, other=0.0), axis=0) / r


@triton.jit
def factorise(
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
def scaled(hi, lo, exponent):
    """Return a twofold number times 2^exponent, in two factors: either may be beyond what one can be."""
    half = exponent // 2
    f = power(half)
    g = power(exponent - half)
    return hi * f * g, lo * f * g


@triton.jit
def place(side, output, row, RP: tl.constexpr):
    """Return where the coefficient of an output for a row is: in (3·RP, 4·RP) for A, transposed for B."""
    return output * tl.where(side == 0, 4 * RP, 1) + row * tl.where(side == 0, 1, 3 * RP)


def doubles(device: torch.device) -> bool:
    """Whether float64 is worth its while on a device: where it has half of fp32's speed, and products of it compile."""
    return capability_of(device) in DOUBLE_TARGETS and DOUBLE_PRODUCTS


def options(padded: int, double: bool) -> dict[str, Any]:
    """How the kernels are compiled."""
    return {
        "DOUBLE": double,
        "num_warps": WARPS[padded], "num_stages": 1, "maxnreg": REGISTERS[padded], "enable_fp_fusion": False,
    }  # fmt: skip


_TYPES = {
    "addresses_ptr": "*i64", "settings_ptr": "*fp32", "dims_ptr": "*i32", "parts_ptr": "*i32", "pieces_ptr": "*i32",
    "sums_ptr": "*fp32", "frozen_ptr": "*i32", "partials_ptr": "*fp32", "exponents_ptr": "*i32", "flags_ptr": "*i32",
    "gram_ptr": "*fp32", "small_ptr": "*fp32", "work_ptr": "*fp32", "known_ptr": "*i32", "seen_ptr": "*fp32",
    "roots_ptr": "*fp32", "traces_ptr": "*fp32", "clip_ptr": "*fp32", "out_ptr": "*fp32", "polar_ptr": "*fp32",
    "schulz_ptr": "*fp32", "outcome_ptr": "*i32", "layers": "i32",
}  # fmt: skip


def _targets(padded: int, double: bool) -> tuple[int, ...]:
    targets = joint_targets(padded)
    if padded != 16 and not double:
        return (SLOW_TARGET,)  # which launches them where products in float64 do not compile
    return tuple(t for t in targets if (t in DOUBLE_TARGETS and DOUBLE_PRODUCTS) == double)


def variant(name: str, kernel: Any, padded: int, constexprs: dict[str, Any], double: bool) -> Variant:
    """Return a variant of one of these kernels, with products in float64 or twofold."""
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
        targets=_targets(padded, double),
    )


#: Whether DOUBLE, as far as this Triton compiles it.
WAYS = (True, False) if DOUBLE_PRODUCTS else (False,)
