"""One prepared gradient step of the Triton backend: the products with X and S and the turns of all buckets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from psilora.backends.triton.gradient.bucket import BucketRun, Workspace
from psilora.backends.triton.gradient.plan import PRODUCT, SIDES, StepPlan, Turn, columns, most_rows
from psilora.backends.triton.launch import on
from psilora.steps.problem import Problem, Problems, Scales
from psilora.triton_kernels.squares import SquaresPlan
from psilora.triton_kernels.stz import STZPlan
from psilora.triton_kernels.tables import PointerTable, Scratch, partial_buffers
from psilora.triton_kernels.xv import XVPlan


class Run:
    """The prepared launches of a plan for one set of captured shapes.

    Args:
        plan: The plan.
        workspaces: One per bucket.
        problems: The step's problems, for the layouts of X and S.
        scratch: Memory that the backend's runs share.
    """

    def __init__(
        self, plan: StepPlan, workspaces: Sequence[Workspace], problems: Sequence[Problem], scratch: Scratch
    ) -> None:
        scratch.begin()
        self.plan = plan
        self.device = workspaces[0].device
        self.table = PointerTable(self.device)
        self.ones = torch.ones(2, device=self.device)
        self._compiled = False
        self.buckets = [
            BucketRun(bucket, workspace, self.table, [problems[m] for m in bucket.members])
            for bucket, workspace in zip(plan.buckets, workspaces, strict=True)
        ]
        self.products = [
            TurnProduct([b for b in self.buckets if b.asks(t)], t, self.table, scratch) if plan.asking(t) else None
            for t in range(plan.num_turns)
        ]
        self.statistics = Statistics([b for b in self.buckets if b.own_statistics], self.table, scratch)

    def forget(self) -> None:
        """Have the next step form the Grams of the factors anew."""
        for bucket in self.buckets:
            bucket.workspace.fresh = None

    def start(self, parts: Sequence[Problems], scales: Scales) -> None:
        """Launch everything but the commit; `parts` are the problems of each bucket."""
        with on(self.device):
            self.scale = self._scale(scales)
            for bucket, problems in zip(self.buckets, parts, strict=True):
                bucket.stage(problems, scales)
            if any(self.products) or self.statistics.plan is not None:
                self._stage_calls()
            self.table.upload()
            if not self._compiled:
                for bucket in self.buckets:
                    bucket.compile_commit(self.scale)
                self._compiled = True
            self.statistics.launch()
            for bucket in self.buckets:
                bucket.launch_grams(self.scale)
            for t, product in enumerate(self.products):
                if product is not None:
                    product.launch()
                for bucket in self.buckets:
                    if t < len(bucket.plan.schedule.turns):
                        bucket.launch_turn(t, self.scale)
            for bucket in self.buckets:
                bucket.launch_verdict()

    def _stage_calls(self) -> None:
        """Put the addresses of X and S of every call, and their rows, into the table."""
        calls = {id(bucket): Calls(bucket.problems) for bucket in self.buckets}
        for product in filter(None, self.products):
            product.stage(calls)
        self.statistics.stage()

    def _scale(self, scales: Scales) -> Tensor:
        """[clip, external] as fp32 on the device."""
        if scales.clip is None and scales.external is None:
            return self.ones
        one = self.ones[0]
        factors = (scales.clip, scales.external)
        return torch.stack([one if f is None else f.to(self.device, torch.float32) for f in factors])

    def flags(self, index: int) -> Tensor:
        """(L,) int32: above 0 where a gradient or result of the layer is not finite."""
        return self.buckets[index].flags

    def repaired(self, index: int) -> Tensor:
        """Number of repaired solves whose right-hand side was not zero, 0-d int64."""
        return self.buckets[index].repaired

    def increments(self, index: int) -> tuple[list[Tensor], list[Tensor]]:
        """√s times the increments of A, and those of B as rows, with the momentum's below."""
        steps_A, steps_B = self.buckets[index].workspace.steps
        return steps_A, steps_B

    def refused(self, index: int) -> Tensor | None:
        """See `psilora.steps.update.Computed`: the solves look at gradients and increments, but not at their sums."""
        bucket = self.buckets[index]
        layer = bucket.plan.layers[0]
        return bucket.refused if min(layer.A_dtype.itemsize, layer.B_dtype.itemsize) > 2 else None

    def shifts(self, index: int) -> Tensor | None:
        """See `psilora.steps.gauge`; a layer moves where a solve of its projection had a right-hand side."""
        return self.buckets[index].shifts

    def commit(self, index: int, ok: Tensor, shifts: Tensor | None) -> None:
        """Launch the commit of a bucket."""
        with on(self.device):
            self.buckets[index].launch_commit(self.scale, ok, shifts)


class Calls:
    """The captured calls of a bucket's problems, in order.

    Attributes:
        X, S: Their addresses.
        rows: Their numbers of rows.
    """

    def __init__(self, problems: Problems) -> None:
        chunks = [chunk for p in problems for chunk in p.chunks]
        self.X, self.S = [x.data_ptr() for x, _ in chunks], [s.data_ptr() for _, s in chunks]
        self.rows = [x.shape[0] for x, _ in chunks]


class TurnProduct:
    """xv and stz of one turn, over all buckets that ask for it."""

    def __init__(self, buckets: Sequence[BucketRun], t: int, table: PointerTable, scratch: Scratch) -> None:
        self.buckets, self.t = list(buckets), t
        narrow, rows, wide, layers, shapes = self._operands()
        device = buckets[0].workspace.device
        room = [most_rows(x.shape[0]) for x in narrow]
        shapes_p = [(n, f.shape[0]) for n, f in zip(room, rows, strict=True)]
        self.p = [p for p in partial_buffers(shapes_p, device, scratch) if p is not None]
        self.xv = XVPlan(narrow, rows, self.p, table=table, rows=room)
        self.stz = STZPlan(
            wide, self.p, layers, None, shapes=shapes, table=table, reduce=False, scratch=scratch, rows=room
        )
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
            turn = bucket.plan.schedule.turns[self.t]
            for i, (layer, problem) in enumerate(zip(bucket.plan.layers, bucket.problems, strict=True)):
                size = layer.d_in if turn.side == "A" else layer.d_out
                factor = _asked(turn, bucket.workspace.rows[1 - SIDES[turn.side]][i], layer.rank)
                for x, s in problem.chunks:
                    narrow.append(s if turn.side == "A" else x)
                    wide.append(x if turn.side == "A" else s)
                    rows.append(factor)
                    layers.append(len(shapes))
                shapes.append((size, columns(turn, layer)))
        return narrow, rows, wide, layers, shapes

    def stage(self, calls: Mapping[int, Calls]) -> None:
        """Put the addresses and numbers of rows of this step's X and S into the table; `calls` by id of the bucket."""
        narrow: list[int] = []
        wide: list[int] = []
        rows: list[int] = []
        for bucket in self.buckets:
            own = calls[id(bucket)]
            of_A = bucket.plan.schedule.turns[self.t].side == "A"
            narrow += own.S if of_A else own.X
            wide += own.X if of_A else own.S
            rows += own.rows
        self.xv.follow(narrow, rows)
        self.stz.follow(wide, rows)

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

    def __init__(self, buckets: Sequence[BucketRun], table: PointerTable, scratch: Scratch) -> None:
        self.buckets = list(buckets)
        self.plan: SquaresPlan | None = None
        if self.buckets:
            x, outputs, out = self._operands()
            rows = [most_rows(t.shape[0]) for t in x]
            self.plan = SquaresPlan(x, outputs, out, table=table, scratch=scratch, rows=rows)

    def _operands(self) -> tuple[list[Tensor], list[int], list[Tensor]]:
        x: list[Tensor] = []
        outputs: list[int] = []
        out: list[Tensor] = []
        for bucket in self.buckets:
            for i, problem in enumerate(bucket.problems):
                for side in (0, 1):
                    for chunk in problem.chunks:
                        x.append(chunk[side])
                        outputs.append(len(out))
                    out.append(bucket.workspace.squares[side][i])
        return x, outputs, out

    def stage(self) -> None:
        """Put the addresses and numbers of rows of this step's X and S into the table."""
        if self.plan is None:
            return
        addresses: list[int] = []
        rows: list[int] = []
        for bucket in self.buckets:
            for problem in bucket.problems:
                own = Calls(Problems([problem]))
                addresses += [*own.X, *own.S]
                rows += [*own.rows, *own.rows]
        self.plan.follow(addresses, rows)

    def launch(self) -> None:
        """Run the kernel, if anything asks for it."""
        if self.plan is not None:
            self.plan.launch()
