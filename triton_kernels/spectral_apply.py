"""What a spectral step makes of the columns [F, M, D] of a side: the increment of F and the new momentum.

With coefficients C over the whitened blocks (see `span`), v the squared weights of the columns and u = 1/v,

    ΔF = C_F F + (C_M M + C_D D) diag(u),     M⁺ = C_F F diag(v) + C_M M + C_D D,

in fp32, into workspaces: the commit launch writes parameters and state. Scalar factors are in C already.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

from typing import Any

from torch import Tensor

from psilora.triton_kernels import tables
from psilora.triton_kernels._compat import tl, triton
from psilora.triton_kernels.layout import (
    ADDRESSES,
    ROWS,
    STEPS,
    UNALIGNED,
    WEIGHT,
    address,
    element,
    sizes,
    tile_at,
)
from psilora.triton_kernels.spectral_gram import blocks
from psilora.triton_kernels.variants import EVERYWHERE, SLOW_TARGET, TARGETS, Variant

#: Columns of a block and warps, by padded rank.
BLOCKS = {16: (32, 4), 32: (32, 4), 64: (32, 4), 128: (32, 4)}
REGISTERS = 208


@triton.jit
def _product(
    c_ptr, n, z_ptr, z_leading, row, columns, rank, end,
    T: tl.constexpr, RP: tl.constexpr, KS: tl.constexpr, CHUNK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Return C·Z for the rows `row` of C (·, rank) with leading dimension n, and columns of Z (rank, d)."""
    total = tl.zeros((CHUNK, BN), tl.float32)  # [CHUNK, BN]
    for first in range(0, RP, KS):
        k = first + tl.arange(0, KS)
        c = tl.load(c_ptr + row[:, None] * n + k[None, :], mask=(row[:, None] < rank) & (k[None, :] < rank), other=0.0)
        at = element(k[:, None], columns[None, :], z_leading, T)  # [KS, BN]
        z = tl.load(z_ptr + at, mask=(k[:, None] < rank) & (columns[None, :] < end), other=0.0)
        total = tl.dot(c, z, total, input_precision="ieee")
    return total


@triton.jit
def _spread_side(
    addresses_ptr, dims_ptr, c_ptr, layers, problem, start, end,
    SIDE: tl.constexpr, RP: tl.constexpr, BN: tl.constexpr, KS: tl.constexpr,
    OWN: tl.constexpr, HAS_METRIC: tl.constexpr,
):  # fmt: skip
    r, _, d = sizes(dims_ptr, problem, SIDE)
    f, g, ld, m, second, own = blocks(addresses_ptr, dims_ptr, problem, SIDE)
    weight = address(addresses_ptr, problem, WEIGHT + SIDE, tl.float64, ADDRESSES)
    steps = address(addresses_ptr, problem, STEPS + SIDE, tl.float32, ADDRESSES)
    rows = address(addresses_ptr, problem, ROWS + SIDE, tl.float32, ADDRESSES)
    T: tl.constexpr = SIDE == 1
    OUTPUTS: tl.constexpr = OWN + 1
    CHUNK: tl.constexpr = RP if RP < 32 else 32
    n = (OWN + 2) * r
    c = c_ptr + (SIDE * layers + problem) * (OUTPUTS * r * n)
    for first in range(start, end, BN):
        columns = first + tl.arange(0, BN)
        for output in range(OUTPUTS):
            for top in range(0, RP, CHUNK):
                row = top + tl.arange(0, CHUNK)
                at = c + output * r * n
                plain = _product(at, n, f, ld, row, columns, r, end, T, RP, KS, CHUNK, BN)
                rest = _product(at + n - r, n, g, ld, row, columns, r, end, T, RP, KS, CHUNK, BN)
                # fma: a plain sum of products becomes a chain into one accumulator, miscompiled on sm_103
                if OWN == 2:
                    own_2 = _product(at + 2 * r, n, second, own, row, columns, r, end, T, RP, KS, CHUNK, BN)
                    rest = tl.fma(own_2, 1.0, rest)
                if OWN >= 1:
                    own_1 = _product(at + r, n, m, own, row, columns, r, end, T, RP, KS, CHUNK, BN)
                    rest = tl.fma(own_1, 1.0, rest)
                if HAS_METRIC:
                    v = tl.load(weight + columns, mask=columns < end, other=0.0).to(tl.float32)
                    u = tl.load(weight + d + columns, mask=columns < end, other=0.0).to(tl.float32)
                    plain = plain * tl.where(output == 0, 1.0, v)[None, :]
                    rest = rest * tl.where(output == 0, u, 1.0)[None, :]
                inside = (row[:, None] < r) & (columns[None, :] < end)
                # rows holds [F; M₁; M₂]; the increment of F goes to steps instead of its first r rows
                out = tl.where(output == 0, steps, rows + output * r * d)
                tl.store(out + row[:, None] * d + columns[None, :], tl.fma(plain, 1.0, rest), mask=inside)


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def _spread_kernel(
    addresses_ptr, dims_ptr, tiles_ptr, c_ptr, layers,
    RP: tl.constexpr, BN: tl.constexpr, KS: tl.constexpr, OWN: tl.constexpr, HAS_METRIC: tl.constexpr,
):  # fmt: skip
    """ΔF into STEPS and M⁺ into ROWS from row r on, for one tile of columns of one side."""
    tile = tl.program_id(0).to(tl.int64)
    side, problem, start, end = tile_at(tiles_ptr, tile)
    if side == 0:
        _spread_side(addresses_ptr, dims_ptr, c_ptr, layers, problem, start, end, 0, RP, BN, KS, OWN, HAS_METRIC)
    else:
        _spread_side(addresses_ptr, dims_ptr, c_ptr, layers, problem, start, end, 1, RP, BN, KS, OWN, HAS_METRIC)


def spread(addresses: Tensor, dims: Tensor, tiles: Tensor, coefficients: Tensor, *, own: int, metric: bool) -> None:
    """Launch `_spread_kernel`.

    Args:
        addresses: Of the step, as for `span`; the workspaces STEPS (r, d) and ROWS ((1 + own)·r, d) are written.
        dims: As for `span`.
        tiles: As for `span`.
        coefficients: C (2, L, (1 + own)·r, (2 + own)·r) fp32 of sides A and B, rows ΔF, M₁⁺, M₂⁺, columns F, M₁, M₂, D.
        own: Blocks of r rows of the momentum, 0 (none), 1 or 2.
        metric: Whether to read the weights that `span` has left.
    """
    padded = tables.padded(coefficients.shape[2] // (1 + own))
    BN, warps = BLOCKS[padded]
    _spread_kernel[(tiles.shape[0],)](
        addresses, dims, tiles, coefficients, coefficients.shape[1],
        RP=padded, BN=BN, KS=16, OWN=own, HAS_METRIC=metric, num_warps=warps, num_stages=1, maxnreg=REGISTERS,
    )  # fmt: skip


def _variants() -> list[Variant]:
    found = []
    signature: dict[str, Any] = {
        "addresses_ptr": "*i64", "dims_ptr": "*i32", "tiles_ptr": "*i32", "c_ptr": "*fp32", "layers": "i32",
    }  # fmt: skip
    for padded, (BN, warps) in BLOCKS.items():
        for name, own in (("spread", 2), ("spread_single", 1)):
            found.append(
                Variant(
                    name=f"{name}_r{padded}",
                    kernel=_spread_kernel,
                    signature=signature,
                    constexprs={"RP": padded, "BN": BN, "KS": 16, "OWN": own, "HAS_METRIC": own == 2},
                    aligned=("dims_ptr", "tiles_ptr", "c_ptr"),
                    num_warps=warps,
                    num_stages=1,
                    max_registers=REGISTERS,
                    maxnreg=REGISTERS,
                    targets=TARGETS if padded in EVERYWHERE else (SLOW_TARGET,),
                )
            )
    return found


VARIANTS = _variants()
