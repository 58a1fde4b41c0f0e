"""What a step reads X and S for: the thin products of a turn and the metric's sums, over all buckets together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from psilora.plan import PRODUCT, SIDES, Turn, columns
from psilora.triton_kernels.squares import SquaresPlan
from psilora.triton_kernels.stz import STZPlan
from psilora.triton_kernels.tables import PointerTable, partial_buffers
from psilora.triton_kernels.xv import XVPlan

if TYPE_CHECKING:
    from psilora.execution import BucketRun


class Product:
    """xv and stz of one turn, over all buckets that ask for it."""

    def __init__(self, buckets: Sequence[BucketRun], t: int, table: PointerTable) -> None:
        self.buckets, self.t = list(buckets), t
        narrow, rows, wide, layers, shapes = self._operands()
        device = buckets[0].workspace.device
        shapes_p = [(x.shape[0], f.shape[0]) for x, f in zip(narrow, rows, strict=True)]
        self.p = [p for p in partial_buffers(shapes_p, device) if p is not None]
        self.xv = XVPlan(narrow, rows, self.p, table=table)
        self.stz = STZPlan(wide, self.p, layers, None, shapes=shapes, table=table, reduce=False)
        first = 0
        for bucket in buckets:
            block = bucket.product_blocks[t]
            if block is None:
                raise RuntimeError("a bucket that asks for a product has no block for it")
            staged = table.staged(block.offset, block.rows, block.columns)
            for i in range(bucket.count):
                partials = self.stz.partials(first + i)
                staged[i] = (partials.data_ptr(), partials.shape[0], partials.shape[2])
            first += bucket.count

    def _operands(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[int], list[tuple[int, int]]]:
        narrow: list[Tensor] = []
        rows: list[Tensor] = []
        wide: list[Tensor] = []
        layers: list[int] = []
        shapes: list[tuple[int, int]] = []
        for bucket in self.buckets:
            turn = bucket.plan.course.turns[self.t]
            for i, (layer, problem) in enumerate(zip(bucket.plan.layers, bucket.problems, strict=True)):
                size = layer.d_in if turn.side == "A" else layer.d_out
                factor = _asked(turn, bucket.workspace.rows[1 - SIDES[turn.side]][i], layer.rank)
                for x, s in problem.record.chunks if problem.record is not None else ():
                    narrow.append(s if turn.side == "A" else x)
                    wide.append(x if turn.side == "A" else s)
                    rows.append(factor)
                    layers.append(len(shapes))
                shapes.append((size, columns(turn, layer)))
        return narrow, rows, wide, layers, shapes

    def stage(self) -> None:
        """Put the addresses of this step's X and S into the table."""
        narrow, rows, wide, _, _ = self._operands()
        self.xv.bind(narrow, rows)
        self.stz.bind(wide)

    def launch(self) -> None:
        """Run both kernels."""
        self.xv.launch()
        self.stz.launch()


def _asked(turn: Turn, rows: Tensor, rank: int) -> Tensor:
    """Return the rows of the other factor that a turn multiplies the gradient with."""
    start = 0 if turn.source == PRODUCT else rank
    end = rows.shape[0] if turn.own_source == PRODUCT else rank
    return rows[start:end]


class Statistics:
    """Σx² and Σs² of all buckets whose metric asks for them."""

    def __init__(self, buckets: Sequence[BucketRun], table: PointerTable) -> None:
        self.buckets = list(buckets)
        self.plan: SquaresPlan | None = None
        if self.buckets:
            x, outputs, out = self._operands()
            self.plan = SquaresPlan(x, outputs, out, table=table)

    def _operands(self) -> tuple[list[Tensor], list[int], list[Tensor]]:
        x: list[Tensor] = []
        outputs: list[int] = []
        out: list[Tensor] = []
        for bucket in self.buckets:
            for i, problem in enumerate(bucket.problems):
                for side in (0, 1):
                    for chunk in problem.record.chunks if problem.record is not None else ():
                        x.append(chunk[side])
                        outputs.append(len(out))
                    out.append(bucket.workspace.squares[side][i])
        return x, outputs, out

    def stage(self) -> None:
        """Put the addresses of this step's X and S into the table."""
        if self.plan is not None:
            x, _, out = self._operands()
            self.plan.bind(x, out)

    def launch(self) -> None:
        """Run the kernel, if anything asks for it."""
        if self.plan is not None:
            self.plan.launch()
