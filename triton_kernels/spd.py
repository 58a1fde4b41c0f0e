"""The r×r systems of a turn: Cholesky, its repair on the device, and the explicit inverse factor L⁻¹ (r ≤ 128).

Device functions, called by one program per system, in fp32. L⁻¹ instead of substitution costs at most a factor 1.8 in
error and turns a solve into two products.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

import torch
from torch import Tensor

from psilora.triton_kernels._compat import tl, triton
from psilora.triton_kernels.variants import Variant

ATTEMPTS = tl.constexpr(4)


@triton.jit
def _root_scale(diagonal):
    """Return the power of two nearest below 1/√d per entry: a scaling that rounds nothing. 1 where d is not normal."""
    normal = (diagonal > 1.2e-38) & (diagonal < float("inf"))
    bits = tl.where(normal, diagonal, 1.0).to(tl.int32, bitcast=True)
    half = ((bits >> 23) - 127) >> 1
    return ((127 - half) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _eliminate(work, RP: tl.constexpr):
    """Return (L⁻¹, good) for work = LLᵀ (RP, RP): Gaussian elimination on [work | I], both halves in one square.

    Before step k columns j < k hold L⁻¹ so far and the others the remaining Schur complement; `good` is 1 if every
    pivot was positive and finite. What ends up above the diagonal is meaningless.
    """
    index = tl.arange(0, RP)
    row = index[:, None]
    col = index[None, :]
    good = tl.full((), 1, tl.int32)
    for k in range(RP):
        column = tl.sum(tl.where(col == k, work, 0.0), axis=1)  # [RP]
        across = tl.sum(tl.where(row == k, work, 0.0), axis=0)
        pivot = tl.sum(tl.where(index == k, column, 0.0), axis=0)
        usable = (pivot > 0.0) & (pivot < float("inf"))
        good = tl.where(usable, good, 0)
        inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.where(usable, pivot, 1.0)))
        across = tl.where(index == k, 1.0, across) * inverse
        below = tl.where(index > k, column, 0.0) * inverse
        work = tl.where(col == k, 0.0, work) - below[:, None] * across[None, :]
        work = tl.where(row == k, across[None, :], work)
    return work, good


@triton.jit
def multiply(
    out_ptr, x_ptr, y_ptr, out_leading, x_leading, y_leading,
    X_FLIP: tl.constexpr, Y_FLIP: tl.constexpr, SIZE: tl.constexpr, MINUS: tl.constexpr,
):  # fmt: skip
    """Out = x·y, or out − x·y with MINUS, for square matrices in memory; FLIP reads one transposed.

    One square of at most 64 × 64 at a time, to fit the registers; out must be neither x nor y. A barrier stands before
    and after.
    """
    tl.debug_barrier()
    SQUARE: tl.constexpr = SIZE if SIZE < 64 else 64
    for block in tl.static_range((SIZE // SQUARE) * (SIZE // SQUARE)):
        row = block // (SIZE // SQUARE) * SQUARE + tl.arange(0, SQUARE)
        column = block % (SIZE // SQUARE) * SQUARE + tl.arange(0, SQUARE)
        total = tl.zeros((SQUARE, SQUARE), tl.float32)  # [SQUARE, SQUARE]
        for first in range(0, SIZE, 16):
            k = first + tl.arange(0, 16)
            x_at = k[None, :] * x_leading + row[:, None] if X_FLIP else row[:, None] * x_leading + k[None, :]
            y_at = column[None, :] * y_leading + k[:, None] if Y_FLIP else k[:, None] * y_leading + column[None, :]
            total += tl.dot(tl.load(x_ptr + x_at), tl.load(y_ptr + y_at), input_precision="ieee")
        at = out_ptr + row[:, None] * out_leading + column[None, :]
        if MINUS:
            total = tl.load(at) - total
        tl.store(at, total)
    tl.debug_barrier()


@triton.jit
def _eliminate_at(matrix_ptr, leading, SIZE: tl.constexpr):
    """Replace a square matrix in memory by the lower triangle of its L⁻¹ and return whether every pivot was good."""
    index = tl.arange(0, SIZE)
    at = matrix_ptr + index[:, None] * leading + index[None, :]
    result, good = _eliminate(tl.load(at), SIZE)
    tl.debug_barrier()
    tl.store(at, tl.where(index[:, None] >= index[None, :], result, 0.0))
    tl.debug_barrier()
    return good


@triton.jit
def _blocked_attempt(matrix_ptr, work_ptr, RP: tl.constexpr):
    """As `_eliminate_at` with half of the matrix in registers at a time; `work` holds one (RP/2, RP/2) block.

    With L = [[L₁, 0], [M, L₂]]: M = G₂₁L₁⁻ᵀ, L₂L₂ᵀ = G₂₂ − MMᵀ, and the lower left block of L⁻¹ is −L₂⁻¹ M L₁⁻¹.
    """
    HALF: tl.constexpr = RP // 2
    left = matrix_ptr + HALF * RP
    corner = left + HALF
    good = _eliminate_at(matrix_ptr, RP, HALF)
    multiply(work_ptr, left, matrix_ptr, HALF, RP, RP, False, True, HALF, False)
    multiply(corner, work_ptr, work_ptr, RP, HALF, HALF, False, True, HALF, True)
    good = good & _eliminate_at(corner, RP, HALF)
    multiply(left, corner, work_ptr, RP, RP, HALF, False, False, HALF, False)
    index = tl.arange(0, HALF)
    at = index[:, None] * RP + index[None, :]
    tl.store(work_ptr + index[:, None] * HALF + index[None, :], tl.load(left + at))
    tl.debug_barrier()  # the two layouts may differ: a thread may clear what another one still has to read
    tl.store(left + at, tl.zeros((HALF, HALF), tl.float32))
    multiply(left, work_ptr, matrix_ptr, RP, HALF, RP, False, False, HALF, True)
    return good


@triton.jit
def inverse_factor_to(out_ptr, gram_ptr, work_ptr, ridge, rank, RP: tl.constexpr):
    """Write L⁻¹ with LLᵀ = gram + ridge·I for the leading `rank` rows and columns; return the failed attempts.

    Both are (RP, RP) in memory. What is repaired has further ridges of 8·r·eps·1024^(j−1)·max|diag|, j = 1, 2, 3, until
    every pivot is positive and finite; after the fourth attempt L⁻¹ = 0, so that the solution is exactly 0. Padding is
    0. `work` holds (RP/2, RP/2) for RP = 128. Barriers stand before and after.
    """
    tl.debug_barrier()
    index = tl.arange(0, RP)
    ROWS: tl.constexpr = RP if RP < 32 else 32
    diagonal = tl.where(index < rank, tl.load(gram_ptr + index * (RP + 1)) + ridge, 0.0)
    unit = rank.to(tl.float32) * 9.5367431640625e-07 * tl.max(tl.abs(diagonal), axis=0)
    scale = _root_scale(diagonal)
    repair = unit * 0.0
    info = tl.full((), 0, tl.int32)
    searching = tl.full((), 1, tl.int32)
    col = index[None, :]
    while searching == 1:
        tl.debug_barrier()
        for top in range(0, RP, ROWS):
            row = (top + tl.arange(0, ROWS))[:, None]
            gram = tl.load(gram_ptr + row * RP + col)
            gram = tl.where(row == col, gram + ridge + repair, gram)
            down = tl.where(row < rank, tl.load(gram_ptr + row * (RP + 1)) + ridge, 0.0)
            gram = gram * _root_scale(down) * scale[None, :]
            gram = tl.where((row < rank) & (col < rank), gram, tl.where(row == col, 1.0, 0.0))
            tl.store(out_ptr + row * RP + col, gram)
        tl.debug_barrier()
        if RP <= 64:
            good = _eliminate_at(out_ptr, RP, RP)
        else:
            good = _blocked_attempt(out_ptr, work_ptr, RP)
        info += 1 - good
        searching = tl.where((good == 0) & (info < ATTEMPTS), 1, 0)
        repair = tl.where(info == 1, unit, repair * 1024.0)
    tl.debug_barrier()
    for top in range(0, RP, ROWS):
        row = (top + tl.arange(0, ROWS))[:, None]
        at = out_ptr + row * RP + col
        keep = (row >= col) & (row < rank) & (info < ATTEMPTS)
        tl.store(at, tl.where(keep, tl.load(at) * scale[None, :], 0.0))
    tl.debug_barrier()
    return info


@triton.jit
def _inverse_factor_kernel(gram_ptr, ranks_ptr, out_ptr, work_ptr, info_ptr, RP: tl.constexpr):
    """L⁻¹ of one system per program; gram, out (L, RP, RP), work (L, RP/2, RP/2) fp32, ranks, info (L,) int32."""
    problem = tl.program_id(0).to(tl.int64)
    rank = tl.load(ranks_ptr + problem)
    gram_ptr += problem * RP * RP
    out_ptr += problem * RP * RP
    info = inverse_factor_to(out_ptr, gram_ptr, work_ptr + problem * (RP // 2) * (RP // 2), 0.0, rank, RP)
    tl.store(info_ptr + problem, info)


def factor_warps(padded: int) -> int:
    """Return the warps of a program that factorises one system of padded rank 16 … 128."""
    return {16: 1, 32: 4, 64: 8, 128: 8}[padded]


def factor_registers(padded: int) -> int:
    """Return the registers per thread of such a program. Without a bound ptxas spills for the sake of occupancy."""
    return 128 if padded <= 32 else 168


def inverse_factors(gram: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """Return L⁻¹ (L, RP, RP) of every system and `info` (L,) int32, the number of failed attempts (4: gave up, 0).

    Args:
        gram: (L, RP, RP) fp32, contiguous, RP in {16, 32, 64, 128}; entries at or beyond the rank are ignored.
        ranks: (L,) int32.
    """
    count, size = gram.shape[0], gram.shape[-1]
    out = torch.empty_like(gram)
    work = gram.new_empty(count, size // 2, size // 2)
    info = torch.empty(count, dtype=torch.int32, device=gram.device)
    if count:
        options = {"num_warps": factor_warps(size), "maxnreg": factor_registers(size)}
        _inverse_factor_kernel[(count,)](gram, ranks, out, work, info, RP=size, **options)
    return out, info


def inverse_factors_ref(gram: Tensor, ranks: Tensor) -> Tensor:
    """Return L⁻¹ (L, RP, RP) in float64 for positive definite systems, zero beyond the rank."""
    out = torch.zeros_like(gram, dtype=torch.float64)
    for i, rank in enumerate(ranks.tolist()):
        factor = torch.linalg.cholesky(gram[i, :rank, :rank].double())
        eye = torch.eye(rank, dtype=torch.float64, device=gram.device)
        out[i, :rank, :rank] = torch.linalg.solve_triangular(factor, eye, upper=False)
    return out


VARIANTS = [
    Variant(
        name=f"spd_r{padded}",
        kernel=_inverse_factor_kernel,
        signature={
            "gram_ptr": "*fp32",
            "ranks_ptr": "*i32",
            "out_ptr": "*fp32",
            "work_ptr": "*fp32",
            "info_ptr": "*i32",
        },
        constexprs={"RP": padded},
        aligned=("gram_ptr", "ranks_ptr", "out_ptr", "work_ptr", "info_ptr"),
        num_warps=factor_warps(padded),
        num_stages=1,
        max_registers=factor_registers(padded),
        maxnreg=factor_registers(padded),
    )
    for padded in (16, 32, 64, 128)
]
