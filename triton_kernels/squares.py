"""`squares`: Σ_n x_n² per column, over all captured calls of every layer, in one launch (diagonal statistics).

A kernel of its own: a metric is updated before the first turn, so its statistics are needed before `xv` and `stz` run.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from psilora.triton_kernels import reduce as sums
from psilora.triton_kernels._compat import tl, triton
from psilora.triton_kernels.reduce import TokenSum
from psilora.triton_kernels.split import TRITON_DTYPES
from psilora.triton_kernels.tables import (
    Launch,
    PointerTable,
    Scratch,
    aligned_matrix,
    fill_target,
    int32_table,
    members,
)
from psilora.triton_kernels.variants import Variant

# Columns of the tables of items, each with the number of them last; those of outputs, tiles and spans are `reduce`'s.
# The rows of an item, of which a span may hold more, lie beside its addresses, since both change from step to step.
X, ROWS, ITEM_POINTERS = map(tl.constexpr, range(3))
X_STRIDE_N, X_STRIDE_D, ITEM_DIMS = map(tl.constexpr, range(3))
BLOCK_N, NUM_WARPS, NUM_STAGES = 32, 4, 4


@triton.jit
def _squares_kernel(
    pointers_ptr,
    dims_ptr,
    out_pointers_ptr,
    output_dims_ptr,
    spans_ptr,
    tiles_ptr,
    X_DTYPE: tl.constexpr,
    X_UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """q[d] = Σ_n x[n, d]² over the spans [item, begin, end) of a tile, BLOCK_D columns per program.

    X_UNIT: entries of X per 16 bytes where its rows are aligned to that, else 0.
    """
    tile = tl.program_id(0).to(tl.int64)
    output = tl.load(tiles_ptr + tile * sums.TILE + sums.TILE_OUTPUT).to(tl.int64)
    offs_d = tl.load(tiles_ptr + tile * sums.TILE + sums.D_BLOCK) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.load(tiles_ptr + tile * sums.TILE + sums.SPLIT).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    d = tl.load(output_dims_ptr + output * sums.OUTPUT + sums.OUT_D)
    # Without these hints on what was loaded from a table, the copies fall back to single elements.
    if X_UNIT > 0:
        d = tl.multiple_of(d, X_UNIT)
    columns = offs_d < d
    total = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for span in range(
        tl.load(tiles_ptr + tile * sums.TILE + sums.FIRST_SPAN),
        tl.load(tiles_ptr + tile * sums.TILE + sums.END_SPAN),
    ):
        item = tl.load(spans_ptr + span * sums.SPAN + sums.ITEM).to(tl.int64)
        begin = tl.load(spans_ptr + span * sums.SPAN + sums.BEGIN)
        rows = tl.load(pointers_ptr + item * ITEM_POINTERS + ROWS).to(tl.int32)
        stop = tl.minimum(tl.load(spans_ptr + span * sums.SPAN + sums.STOP), rows)
        x_ptr = tl.load(pointers_ptr + item * ITEM_POINTERS + X).to(tl.pointer_type(X_DTYPE))
        stride_x_n = tl.load(dims_ptr + item * ITEM_DIMS + X_STRIDE_N)
        offs_b = (begin + offs_n)[:, None].to(tl.int64)
        if X_UNIT > 0:
            x_ptr = tl.multiple_of(x_ptr, 16)
            stride_x_n = tl.multiple_of(stride_x_n, X_UNIT).to(tl.int64)
            x_ptrs = x_ptr + offs_b * stride_x_n + offs_d[None, :]
        else:
            stride_x_n = stride_x_n.to(tl.int64)
            stride_x_d = tl.load(dims_ptr + item * ITEM_DIMS + X_STRIDE_D).to(tl.int64)
            x_ptrs = x_ptr + offs_b * stride_x_n + offs_d[None, :] * stride_x_d
        for n0 in tl.range(begin, stop, BLOCK_N, num_stages=STAGES):
            x = tl.load(x_ptrs, mask=(offs_n < stop - n0)[:, None] & columns[None, :], other=0.0).to(tl.float32)
            total += x * x  # [BN, BD]
            x_ptrs += BLOCK_N * stride_x_n
    out_ptr = tl.load(out_pointers_ptr + output).to(tl.pointer_type(tl.float32))
    tl.store(out_ptr + split * d + offs_d, tl.sum(total, axis=0), mask=columns)


def squares(x: Sequence[Tensor], outputs: Sequence[int], *, out: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Return q_o = Σ_{i: outputs[i] = o} Σ_n X_i[n]² for every output o, for any mixture of X and S matrices.

    Summed in fp32, bitwise reproducible. Nothing waits for the device.

    Args:
        x: X_i, (N_i, d_o), bf16, fp16 or fp32, any strides; one dtype per output.
        outputs: The output of each item, non-decreasing. Without `out`, every output 0 … max must have an item.
        out: q_o, (d_o,), fp32, contiguous, fully overwritten (0 for an output without rows); allocated if None.

    Raises:
        ValueError: shapes that do not match, a dtype, stride or size outside the above.
    """
    if out is None:
        sizes = {o: a.shape[1] for o, a in zip(outputs, x, strict=True)}
        if sorted(sizes) != list(range(len(sizes))):
            raise ValueError(f"squares: outputs {sorted(sizes)} have items; without out it must be 0, 1, 2 …")
        out = [torch.empty(sizes[o], dtype=torch.float32, device=x[0].device) for o in range(len(sizes))]
    if len(out):
        plan = SquaresPlan(x, outputs, out)
        plan.table.upload()
        plan.launch()
    return list(out)


def squares_ref(x: Sequence[Tensor], outputs: Sequence[int]) -> list[Tensor]:
    """Return q_o = Σ x² in float64, for outputs 0 … max that all have an item."""
    totals: dict[int, Tensor] = {}
    for a, o in zip(x, outputs, strict=True):
        part = a.double().square().sum(0)
        totals[o] = totals[o] + part if o in totals else part
    return [totals[o] for o in sorted(totals)]


class SquaresPlan(TokenSum):
    """`squares` prepared for one set of shapes; used like `XVPlan`, the constructor binds too."""

    def __init__(
        self,
        x: Sequence[Tensor],
        outputs: Sequence[int],
        out: Sequence[Tensor],
        *,
        table: PointerTable | None = None,
        programs: int | None = None,
        scratch: Scratch | None = None,
        rows: Sequence[int] | None = None,
    ) -> None:
        """Build the tables.

        Args:
            x: X_i, as in `squares`.
            outputs: The output of each item, as in `squares`.
            out: q_o, as in `squares`.
            table: The pointer table shared by the kernels of a step (None: the plan makes its own).
            programs: How many programs fill the device; default two per multiprocessor.
            scratch: Where the partials lie; default memory of their own.
            rows: The most rows N_i that X_i may ever have; None for as many as now.
        """
        _check(x, outputs, out)
        columns = [q.unsqueeze(1) for q in out]
        super().__init__({"x": x}, outputs, [(q.shape[0], 1) for q in out], columns, table, scratch, rows)
        self._item_dims = int32_table((a.stride() for a in x), ITEM_DIMS.value, self.device)
        groups: dict[tuple[torch.dtype, bool], list[int]] = {}
        for o, items in enumerate(self._members):
            dtype = x[items[0]].dtype if items else torch.float32
            groups.setdefault((dtype, all(aligned_matrix(x[i]) for i in items)), []).append(o)
        launches = []
        for (dtype, fast), group in groups.items():
            tiles = self._cut(group, BLOCK_N, _block_d(fast), 1, programs or fill_target(self.device))
            tile_map = int32_table(tiles, sums.TILE.value, self.device)
            launches.append(Launch(_squares_kernel, tile_map, _constexprs(dtype, fast), NUM_WARPS, NUM_STAGES))
        self._complete(launches, columns)
        self.bind(x, out)

    def bind(self, x: Sequence[Tensor] | None = None, out: Sequence[Tensor] | None = None) -> None:
        """Stage new addresses; ValueError if a tensor's shape, strides, dtype or alignment are not the plan's."""
        self._bind((x,), None if out is None else [q.unsqueeze(1) for q in out])

    def launch(self) -> None:
        """Run the kernels with the addresses last uploaded; no host synchronisation."""
        self._launch(self._item_dims)


def _check(x: Sequence[Tensor], outputs: Sequence[int], out: Sequence[Tensor]) -> None:
    if len(x) != len(outputs):
        raise ValueError(f"squares: got {len(x)} x and {len(outputs)} outputs; one of each per item")
    for o, (q, items) in enumerate(zip(out, members(outputs, len(out)), strict=True)):
        if q.dim() != 1 or q.dtype != torch.float32 or not q.is_contiguous():
            raise ValueError(f"squares: out[{o}] must be a contiguous float32 vector; got {q.dtype}, {tuple(q.shape)}")
        for i in items:
            if x[i].dim() != 2 or x[i].shape[1] != q.shape[0]:
                raise ValueError(f"squares: x[{i}] has shape {tuple(x[i].shape)}; output {o} needs (N, {q.shape[0]})")
            if x[i].dtype not in TRITON_DTYPES or x[i].dtype != x[items[0]].dtype:
                raise ValueError(f"squares: x[{i}] is {x[i].dtype}; must be 16-bit or float32, one per output")


def _block_d(fast: bool) -> int:
    """Return the columns per program: fewer where every entry takes an address of its own."""
    return 128 if fast else 64


def _constexprs(dtype: torch.dtype, fast: bool) -> dict[str, object]:
    return {
        "X_DTYPE": TRITON_DTYPES[dtype],
        "X_UNIT": 16 // dtype.itemsize if fast else 0,
        "BLOCK_N": BLOCK_N,
        "BLOCK_D": _block_d(fast),
        "STAGES": NUM_STAGES,
    }


def _variants() -> list[Variant]:
    names = ("pointers_ptr", "dims_ptr", "out_pointers_ptr", "output_dims_ptr", "spans_ptr", "tiles_ptr")
    return [
        Variant(
            name=f"squares_{str(dtype).removeprefix('torch.')}{'' if fast else '_slow'}",
            kernel=_squares_kernel,
            signature={name: "*i64" if "pointers" in name else "*i32" for name in names},
            constexprs=_constexprs(dtype, fast),
            aligned=names,
            num_warps=NUM_WARPS,
            num_stages=NUM_STAGES,
            streaming=fast,
            max_registers=168,
        )
        for dtype, fast in (
            (torch.bfloat16, True),
            (torch.bfloat16, False),
            (torch.float16, True),
            (torch.float32, True),
        )
    ]


VARIANTS = _variants()
