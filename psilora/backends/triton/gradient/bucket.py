"""A bucket of a gradient step: its workspaces, tables and launches."""

from __future__ import annotations

import math
import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from psilora.backends.triton.gradient.plan import NONE, SIDES, TANGENT, BucketPlan
from psilora.backends.triton.launch import device_rates, note_written
from psilora.lowrank.gradient_operator import TangentGradient
from psilora.lowrank.momentum import BALANCED_ITERS
from psilora.options import GradientOptions, Options
from psilora.steps.gradient.metrics import statistics
from psilora.steps.problem import Problem, Problems, Scales
from psilora.triton_kernels import commit as commit_kernels
from psilora.triton_kernels import factor as factor_kernels
from psilora.triton_kernels import gram as gram_kernels
from psilora.triton_kernels import layout
from psilora.triton_kernels import solve as solve_kernels
from psilora.triton_kernels import verdict as verdict_kernels
from psilora.triton_kernels.slots import IMBALANCE, LARGEST_SHIFT, SPREAD
from psilora.triton_kernels.split import TRITON_DTYPES
from psilora.triton_kernels.tables import PointerTable, int32_table, partial_buffers


class Workspace:
    """The device memory of a bucket that outlives a step, whatever the captured shapes.

    Attributes:
        rows, steps: Per side and layer, [F; F_m] and its increments, (r + r_m, d) fp32.
        averages, weights, squares: Per side and layer, the metric's new D, M and sums, (d,) fp32; empty without one.
        stored_grams, moved_grams: Partial Grams of the stored factors and of those just moved, (tiles, kinds, RP, RP).
        coefficients: What a factor launch leaves for a solve.
        fresh: What `stored_grams` and the stored rows were formed from (see `signature`), or None if unusable.
    """

    def __init__(self, bucket: BucketPlan) -> None:
        layers, padded = bucket.layers, bucket.padded
        self.device = layers[0].device
        sizes = [[layer.d_out if side else layer.d_in for layer in layers] for side in (0, 1)]
        ranks = [layer.rank + layer.momentum_rank for layer in layers]

        def buffers(shapes: list[tuple[int, ...]]) -> list[Tensor]:
            return [t for t in partial_buffers(shapes, self.device) if t is not None]

        def per_side(make: Callable[[int, int], tuple[int, ...]]) -> list[list[Tensor]]:
            return [buffers([make(k, d) for k, d in zip(ranks, sizes[side], strict=True)]) for side in (0, 1)]

        self.rows, self.steps = (per_side(lambda k, d: (k, d)) for _ in range(2))

        def per_column() -> list[list[Tensor]]:
            return per_side(lambda _, d: (d,)) if bucket.structure.metric is not None else [[], []]

        self.averages, self.weights, self.squares = per_column(), per_column(), per_column()
        partials = (len(bucket.tiles), bucket.kinds, padded, padded)
        self.stored_grams, self.moved_grams = (torch.empty(partials, device=self.device) for _ in range(2))
        slots = (len(layers), int(factor_kernels.COEFFICIENTS.value), padded, padded)
        self.coefficients = torch.empty(slots, device=self.device)
        self.fresh: object = None


def signature(problems: Problems) -> object:
    """Return what changes whenever a factor, a momentum or a scaling does: identities and versions."""
    if "signature" not in problems.prepared:
        tensors = [t for p in problems for t in (p.pair.lora_A, p.pair.lora_B)]
        own = [p for p in problems if p.options.momentum > 0]
        tensors += [t for p in own for t in (p.state_A["momentum"], p.state_B["momentum"])]
        places = [p.pair.scaling for p in problems], [(id(t), t.data_ptr()) for t in tensors]
        problems.prepared["signature"] = places, tensors
    places, tensors = problems.prepared["signature"]
    return places, [t._version for t in tensors]


class BucketRun:
    """A bucket's tables, and the arguments of its launches."""

    def __init__(
        self, bucket: BucketPlan, workspace: Workspace, table: PointerTable, problems: Sequence[Problem]
    ) -> None:
        self.plan, self.workspace, self.table, self.problems = bucket, workspace, table, Problems.of(problems)
        self.structure, self.padded, self.count = bucket.structure, bucket.padded, len(bucket.layers)
        device = workspace.device
        self.addresses = table.reserve(self.count, int(layout.ADDRESSES.value))
        self.scalars = table.reserve(self.count, int(layout.SCALARS.value) // 2)
        turns = len(bucket.schedule.turns)
        self.zeros = table.reserve(1, -(-self.count * (4 + 4 * turns) // 2))
        self.product_blocks = [table.reserve(self.count, 3) if turn.product else None for turn in bucket.schedule.turns]
        layers = bucket.layers
        self.dims = int32_table(
            [(layer.rank, layer.momentum_rank, layer.d_in, layer.d_out) for layer in layers],
            int(layout.DIMS.value),
            device,
        )
        self.tiles = int32_table(bucket.tiles, int(layout.TILE.value), device)
        self.parts = [int32_table(bucket.parts[side], 2, device) for side in (0, 1)]
        self.kept: list[Any] = []
        self.longest = max(count for side in bucket.parts for _, count in side)
        self.squares = torch.zeros(len(bucket.tiles), dtype=torch.float64, device=device)
        self.refused = torch.zeros((), dtype=torch.bool, device=device)
        self.repaired = torch.zeros((), dtype=torch.int64, device=device)
        self.found_shifts = torch.zeros(self.count, dtype=torch.int32, device=device)
        self._staged: weakref.ref[Problems] | None = None  # those whose addresses lie in the table
        self._known: list[Options] = []
        self._rows: list[int] = []
        self._on_device = False

    @property
    def _splitting(self) -> int | None:
        """The turn that says whether the momentum is split anew, the last of B; None where nothing is to."""
        if not (self.structure.momentum and self.structure.balance):
            return None
        return max(t for t, turn in enumerate(self.plan.schedule.turns) if turn.side == "B")

    # ---- what the host knows of a step --------------------------------------------------------------------------

    @property
    def own_statistics(self) -> bool:
        """Whether the squares kernel forms this bucket's statistics, from X and S."""
        return self.structure.metric == "kfac" and self.structure.exact

    def asks(self, t: int) -> bool:
        """Whether turn t needs a product with X and S."""
        turns = self.plan.schedule.turns
        return t < len(turns) and turns[t].product

    def stage(self, problems: Problems, scales: Scales) -> None:
        """Put the addresses and scalars of a step into the table."""
        self.problems = problems
        gradients = [[p.dA.contiguous() for p in problems], [p.dB.contiguous() for p in problems]]
        self.kept = [gradients]
        for side in (0, 1):
            self.addresses.set(layout.GRAD.value + side, gradients[side])
        if self._staged is None or self._staged() is not problems:  # the same problems lie where they did
            self._stage_addresses(problems)
            self._staged, self._known = weakref.ref(problems), []
        if self.structure.metric:
            self._stage_squares(problems, scales)
        self._stage_scalars(problems)

    def _stage_addresses(self, problems: Problems) -> None:
        g, work = layout, self.workspace
        for side in (0, 1):
            states = [p.state_B if side else p.state_A for p in problems]
            self.addresses.set(g.PARAM.value + side, [p.pair.lora_B if side else p.pair.lora_A for p in problems])
            self.addresses.set(g.ROWS.value + side, work.rows[side])
            self.addresses.set(g.STEPS.value + side, work.steps[side])
            self.addresses.set(g.COUNT.value + side, [state["step"] for state in states])
            if self.structure.momentum:
                self.addresses.set(g.MOMENTUM.value + side, [state["momentum"] for state in states])
            if self.structure.metric:
                self.addresses.set(g.METRIC.value + side, [state["metric"] for state in states])
                self.addresses.set(g.AVERAGE.value + side, work.averages[side])
                self.addresses.set(g.WEIGHT.value + side, work.weights[side])

    def _stage_squares(self, problems: Sequence[Problem], scales: Scales) -> None:
        if self.own_statistics:
            squares = self.workspace.squares
        else:
            pairs = [_squares(p, scales) for p in problems]
            squares = [[pair[side].contiguous() for pair in pairs] for side in (0, 1)]
            self.kept.append(squares)
        for side in (0, 1):
            self.addresses.set(layout.SQUARES.value + side, squares[side])

    def _stage_scalars(self, problems: Sequence[Problem]) -> None:
        g = layout
        options = [p.options for p in problems]
        # The statistics of a metric are divided by the rows.
        rows = [p.record.rows for p in problems if p.record is not None] if self.structure.metric else []
        same = len(options) == len(self._known) and all(map(operator.is_, options, self._known))
        if same and rows == self._rows and not self._on_device:
            return
        self._known, self._rows = options, rows
        width = int(g.SCALARS.value)
        values = np.zeros((self.count, width), dtype=np.float32)
        rates = device_rates([p.options.lr for p in problems], self.workspace.device)
        self._on_device = any(rate is not None for rate in rates)
        for row, p in zip(values, problems, strict=True):
            o, s = p.options, p.pair.scaling
            sign = -1.0 if o.maximize else 1.0
            row[g.PROX.value], row[g.FRESH.value], row[g.MU.value] = o.rho, sign * (1 - o.tau), o.momentum
            row[g.DECAY.value], row[g.SCALING.value], row[g.ROOT.value] = o.weight_decay, s, math.sqrt(s)
            row[g.BETA.value], row[g.DAMPING.value], row[g.POWER.value] = o.metric_beta, o.delta, o.gamma
            row[g.LOG_BETA.value] = math.log(o.metric_beta) if o.metric_beta > 0 else -1e30
            row[g.STATISTIC.value : g.STATISTIC.value + 2] = self._statistic_factors(p)
            row[g.RATE.value] = 0.0 if isinstance(o.lr, Tensor) else o.lr
        staged = self.table.staged(self.scalars.offset, self.scalars.rows, self.scalars.columns)
        staged[:] = values.view(np.int64)
        self.kept.append(rates)
        base = self.scalars.device.data_ptr() + 4 * g.RATE.value
        addresses = self.table.staged(self.addresses.offset, self.addresses.rows, self.addresses.columns)
        for i, rate in enumerate(rates):
            addresses[i, g.LR.value] = base + 4 * width * i if rate is None else rate.data_ptr()

    def _statistic_factors(self, p: Problem) -> tuple[float, float]:
        """What the sums of squares of (A's, B's) side are multiplied with, apart from clip and external scale."""
        options = GradientOptions.of(p.options)
        if options.statistics is None:
            return 0.0, 0.0
        rows = max(1, p.record.rows if p.record is not None else 1)
        factor_A, factor_B = statistics.normalisation(options.statistics, float(rows), options.loss_reduction)
        s2 = p.pair.scaling**2
        if options.statistics == "shampoo":
            return (factor_A / s2, factor_B / s2) if p.exact else (factor_A, factor_B)
        return factor_A, factor_B / s2

    # ---- launches -----------------------------------------------------------------------------------------------

    def _zeroed(self) -> Tensor:
        return self.zeros.device.view(torch.int32).flatten()

    @property
    def flags(self) -> Tensor:
        """(L,) int32: above 0 where a gradient or result of the layer is not finite."""
        return self._zeroed()[: self.count]

    @property
    def info(self) -> Tensor:
        """(turns, 2, L) int32: failed attempts of the weight's and the momentum's solves."""
        turns = len(self.plan.schedule.turns)
        return self._zeroed()[self.count : self.count * (1 + 2 * turns)].view(turns, 2, self.count)

    @property
    def busy(self) -> Tensor:
        """(turns, 2, L) int32: whether a solve's right-hand side is not zero."""
        turns = len(self.plan.schedule.turns)
        start = self.count * (1 + 2 * turns)
        return self._zeroed()[start : start + 2 * turns * self.count].view(turns, 2, self.count)

    @property
    def shifts(self) -> Tensor | None:
        """The shift k of each layer (L,) int32, as the verdict has found them, or None where nothing is balanced."""
        return self.found_shifts if self.structure.balance else None

    @property
    def sizes(self) -> Tensor:
        """(3, L) fp32: ‖A_m‖² and ‖B_m‖² as the step's last turns have seen them, and whether to split B_m·A_m anew."""
        start = self.count * (1 + 4 * len(self.plan.schedule.turns))
        return self._zeroed()[start : start + 3 * self.count].view(torch.float32).view(3, self.count)

    def _tables(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.addresses.device, self.scalars.device.view(torch.float32), self.dims

    def _types(self) -> tuple[Any, Any, Any, Any]:
        layer = self.plan.layers[0]
        dtypes = (layer.A_dtype, layer.B_dtype, layer.dA_dtype, layer.dB_dtype)
        return tuple(TRITON_DTYPES[dtype] for dtype in dtypes)

    def launch_grams(self, scale: Tensor) -> None:
        """Form the metric, the stored factors as rows and their Grams, unless the last commit has left them."""
        schedule, work = self.plan.schedule, self.workspace
        fresh = schedule.lasting and work.fresh is not None and work.fresh == signature(self.problems)
        work.fresh = None
        if fresh:
            return
        shampoo = self.structure.metric == "shampoo"
        a, b, da, db = self._types()
        gram_kernels.gram(
            *self._tables(), self.tiles, scale, work.stored_grams,
            A_TYPE=a, B_TYPE=b, DA_TYPE=da, DB_TYPE=db, HAS_MOMENTUM=self.structure.momentum,
            HAS_METRIC=self.structure.metric is not None, SCALED_A=shampoo and self.structure.exact,
            SCALED_B=self.structure.exact or not shampoo, CORRECTED=self.structure.corrected,
            EMIT_A=schedule.rows[0], EMIT_B=schedule.rows[1], MASK_A=schedule.grams[0], MASK_B=schedule.grams[1],
        )  # fmt: skip

    def launch_verdict(self) -> None:
        """What the turns have come to: whether anything is refused, what was repaired, and what is to be balanced."""
        balance = self.structure.balance
        if balance:
            a, b, _, _ = self._types()
            verdict_kernels.norms(self.addresses.device, self.dims, self.tiles, self.squares, A_TYPE=a, B_TYPE=b)
        verdict_kernels.verdict(
            self.addresses.device, self.flags, self.info, self.busy, self.squares, self.parts, self.refused,
            self.repaired, self.found_shifts, longest=self.longest, balance=balance,
            burn_in=self.problems[0].options.burn_in, largest=LARGEST_SHIFT,
        )  # fmt: skip

    def launch_turn(self, t: int, scale: Tensor) -> None:
        """One turn: the factor launch and the solve."""
        turn, work, s = self.plan.schedule.turns[t], self.workspace, self.structure
        side = SIDES[turn.side]
        weight_grams = work.moved_grams if turn.moved else work.stored_grams
        momentum_grams = work.moved_grams if turn.own_moved else work.stored_grams
        info, busy = self.info[t], self.busy[t]
        factor_kernels.factor(
            *self._tables(), self.parts[1 - side], self.parts[side], work.coefficients,
            weight_grams, momentum_grams, work.stored_grams, info, self.sizes, own=turn.own_source != NONE,
            spread=SPREAD if t == self._splitting else 0.0,
            SIDE=side, MOVED=turn.moved, OWN_MOVED=turn.own_moved, HAS_DECAY=s.decay, HAS_MOMENTUM=s.momentum,
            TANGENT=turn.source == TANGENT, OWN_TANGENT=turn.own_source == TANGENT,
        )  # fmt: skip
        block = self.product_blocks[t]
        types = self._types()
        solve_kernels.solve(
            *self._tables(), self.tiles, self.addresses.device if block is None else block.device, work.coefficients,
            scale, work.moved_grams, self.flags, busy,
            first_tile=self.plan.parts[side][0][0], programs=self.plan.programs(side),
            SIDE=side, PARAM_TYPE=types[side], GRAD_TYPE=types[2 + side], SOURCE=turn.source,
            OWN_SOURCE=turn.own_source, BESIDE=turn.beside, CHECK=turn.check, HAS_BASE=turn.moved or s.decay,
            HAS_MOMENTUM=s.momentum, HAS_METRIC=s.metric is not None, EMIT=turn.emit, MASK=turn.grams,
        )  # fmt: skip

    def compile_commit(self, scale: Tensor) -> None:
        """Launch the commit as a refusal: one that does not compile fails here, where nothing has been written yet."""
        device = self.workspace.device
        self._commit(scale, torch.zeros((), dtype=torch.bool, device=device), self.shifts)

    def launch_commit(self, scale: Tensor, ok: Tensor, shifts: Tensor | None) -> None:
        """Write parameters and state, and leave the Grams for the next step where they can last."""
        self._commit(scale, ok, shifts)
        note_written(self.problems)
        if self.plan.schedule.lasting:
            self.workspace.fresh = signature(self.problems)
        self.problems, self.kept = (
            Problems(),
            [],
        )  # the launches are in stream order; gradients need not wait for a next step

    def _commit(self, scale: Tensor, ok: Tensor, shifts: Tensor | None) -> None:
        schedule, work, s = self.plan.schedule, self.workspace, self.structure
        a, b, _, _ = self._types()
        masks = schedule.grams if schedule.lasting else (0, 0)
        rows = schedule.rows if schedule.lasting else (False, False)
        commit_kernels.commit(
            *self._tables(), self.tiles, scale, ok.view(torch.uint8), work.stored_grams,
            sizes=self.sizes, shifts=shifts,
            imbalance=IMBALANCE if s.momentum and s.balance and s.num_iters <= BALANCED_ITERS else 0.0,
            coefficients=None if self._splitting is None else work.coefficients,
            A_TYPE=a, B_TYPE=b, HAS_MOMENTUM=s.momentum, HAS_METRIC=s.metric is not None,
            EMIT_A=rows[0], EMIT_B=rows[1], MASK_A=masks[0], MASK_B=masks[1],
        )  # fmt: skip


def _squares(problem: Problem, scales: Scales) -> tuple[Tensor, Tensor]:
    """The sums behind one layer's statistics where the squares kernel does not form them, in plain PyTorch."""
    if problem.exact or problem.options.metric != "shampoo":
        return statistics.layer_squares(problem, torch.float32)
    root = problem.pair.scaling**0.5
    clip = 1.0 if scales.clip is None else scales.clip.to(problem.dA.device, torch.float32)
    B, A, left, right = (t.detach().float()[None] for t in (problem.pair.B, problem.pair.A, problem.dA, problem.dB))
    columns, rows = TangentGradient(B * root, A * root, left * (clip / root), right * (clip / root)).squares()
    return columns[0], rows[0]
