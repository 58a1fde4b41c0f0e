"""What the kernels of a step share: the columns of their tables, the kinds of Grams, their blocks and variants."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from psilora.triton_kernels import slots
from psilora.triton_kernels._compat import tl, triton
from psilora.triton_kernels.variants import TARGETS, Variant

# Columns of the address block (one row per layer); column c of lora_A's side is c, of lora_B's side c + 1.
PARAM = tl.constexpr(0)
GRAD = tl.constexpr(2)
MOMENTUM = tl.constexpr(4)  # A_m (r_m, d_in) and B_m (d_out, r_m), fp32
METRIC = tl.constexpr(6)  # the running average D, fp32
SQUARES = tl.constexpr(8)  # the sums behind the new statistics, fp32
FACTOR = tl.constexpr(8)  # of a spectral step, which has no squares: A and B as fp32, or fp32 copies of them
ROWS = tl.constexpr(10)  # workspace: new rows [F; F_m] (r + r_m, d), fp32
STEPS = tl.constexpr(12)  # workspace: their increments, fp32
AVERAGE = tl.constexpr(14)  # workspace: the new D (d,), fp32
WEIGHT = tl.constexpr(16)  # workspace: M = (D + δ)^γ (d,), fp32; of a spectral step v and 1/v (2, d), fp64
COUNT = tl.constexpr(18)  # the state's "step", fp32
LR = tl.constexpr(20)  # η, fp32: the layer's scalar RATE, or the caller's own device tensor
ADDRESSES = tl.constexpr(22)

# Columns of the dims table.
RANK = tl.constexpr(0)
MOMENTUM_RANK = tl.constexpr(1)
SIZE = tl.constexpr(2)  # d_in, d_out
DIMS = tl.constexpr(4)

# Columns of the scalars (fp32, one row per layer).
PROX = tl.constexpr(0)
FRESH = tl.constexpr(1)  # 1 − τ
MU = tl.constexpr(2)
DECAY = tl.constexpr(3)  # weight decay
SCALING = tl.constexpr(4)
ROOT = tl.constexpr(5)  # √s
BETA = tl.constexpr(6)
DAMPING = tl.constexpr(7)
POWER = tl.constexpr(8)
STATISTIC = tl.constexpr(9)  # factor on the squares of each side, 9 and 10
LOG_BETA = tl.constexpr(11)
RATE = tl.constexpr(12)
SCALARS = tl.constexpr(14)

# Columns of the tile table: side (0 A, 1 B), layer, first column, end column.
TILE = tl.constexpr(4)

# Run-time arguments that are windows of larger buffers: one compilation serves every alignment of theirs.
UNALIGNED = [
    "addresses_ptr",
    "scalars_ptr",
    "product_ptr",
    "flag_ptr",
    "info_ptr",
    "busy_ptr",
    "sizes_ptr",
    "shifts_ptr",
    "ok_ptr",
]

# Kinds of Grams, as slots of the partials: F are the current rows, F₁ those before the step, F_s = F − F₁, F_m the
# momentum's rows with start F_m1 and increment F_ms, L the rows of `.grad` (BᵀG, AGᵀ), M the metric of the side.
WEIGHTED = tl.constexpr(slots.WEIGHTED)  # F M Fᵀ
WEIGHTED_STEP = tl.constexpr(slots.WEIGHTED_STEP)  # F M F_sᵀ
CROSS = tl.constexpr(slots.CROSS)  # F F_m1ᵀ
OWN = tl.constexpr(slots.OWN)  # F_m F_mᵀ
OWN_STEP = tl.constexpr(slots.OWN_STEP)  # F_m F_msᵀ
START = tl.constexpr(slots.START)  # F F₁ᵀ
SLOPE = tl.constexpr(slots.SLOPE)  # F Lᵀ
OWN_START = tl.constexpr(slots.OWN_START)  # F_m F₁ᵀ
OWN_SLOPE = tl.constexpr(slots.OWN_SLOPE)  # F_m Lᵀ

#: Columns of a block, columns summed at a time, tiles of Grams added at a time, and warps, by padded rank.
BLOCKS = {16: (32, 16, 4, 4), 32: (32, 16, 1, 8), 64: (32, 16, 1, 8), 128: (16, 16, 1, 8)}

#: Columns of a block of a solve, columns summed at a time and warps, by padded rank.
SOLVE_BLOCKS = {16: (32, 16, 8), 32: (32, 16, 4), 64: (32, 16, 8), 128: (16, 16, 8)}
#: Registers per thread of the gram and commit kernels. Without a bound ptxas spills for the sake of occupancy.
STREAM_REGISTERS = 168


@triton.jit
def element(k, n, leading, TRANSPOSED: tl.constexpr):
    """Return the offset of entry (k, n) of rows stored as (k, n), or TRANSPOSED as (n, k)."""
    return n * leading + k if TRANSPOSED else k * leading + n


@triton.jit
def address(addresses_ptr, problem, COLUMN: tl.constexpr, DTYPE: tl.constexpr, WIDTH: tl.constexpr):
    """Return a typed pointer from the address block."""
    return tl.load(addresses_ptr + problem * WIDTH + COLUMN).to(tl.pointer_type(DTYPE))


@triton.jit
def tile_at(tiles_ptr, tile):
    """Return the side, layer, first column and end column of a tile."""
    at = tiles_ptr + tile * TILE
    return tl.load(at), tl.load(at + 1).to(tl.int64), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def sizes(dims_ptr, problem, SIDE: tl.constexpr):
    """Return a layer's rank, its momentum's, and the columns of a side."""
    at = dims_ptr + problem * DIMS
    return tl.load(at + RANK), tl.load(at + MOMENTUM_RANK), tl.load(at + SIZE + SIDE)


#: Types of the run-time parameters that the kernels of a step share.
SIGNATURE = {
    "addresses_ptr": "*i64", "scalars_ptr": "*fp32", "dims_ptr": "*i32", "tiles_ptr": "*i32", "parts_ptr": "*i32",
    "own_parts_ptr": "*i32", "product_ptr": "*i64", "coefficients_ptr": "*fp32", "scale_ptr": "*fp32",
    "weight_grams_ptr": "*fp32", "momentum_grams_ptr": "*fp32", "base_grams_ptr": "*fp32", "out_ptr": "*fp32",
    "flag_ptr": "*i32", "info_ptr": "*i32", "busy_ptr": "*i32", "sizes_ptr": "*fp32",
    "shifts_ptr": "*i32", "ok_ptr": "*u8", "problems": "i32", "first_tile": "i32",
}  # fmt: skip


def variant(
    name: str,
    kernel: Any,
    padded: int,
    warps: int,
    constexprs: Mapping[str, Any],
    registers: int,
    targets: tuple[int, ...] = TARGETS,
) -> Variant:
    """Return a variant of a kernel of a step, whose whole-tensor arguments are aligned as torch aligns them."""
    signature = {n: SIGNATURE[n] for n in kernel.arg_names if n in SIGNATURE}
    whole = {"tiles_ptr", "parts_ptr", "own_parts_ptr", "coefficients_ptr", "scale_ptr", "dims_ptr", "out_ptr"}
    return Variant(
        name=f"{name}_r{padded}",
        kernel=kernel,
        signature=signature,
        constexprs={"RP": padded, **constexprs},
        aligned=tuple(n for n in signature if n in whole or n.endswith("grams_ptr")),
        num_warps=warps,
        num_stages=1,
        max_registers=registers,
        targets=targets,
        maxnreg=registers,
    )
