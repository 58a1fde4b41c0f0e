"""The spectral step on the Triton backend: all layers of a rank in a few launches, whatever their widths.

The kernels form the Grams of the columns [F, M, D] of either side and, at the end, products with them; in between
`psilora.lowrank.spectral` works on (L, 4r, 4r) matrices of all layers at once, or (L, 3r, 3r) with `joint=False`.
Nothing waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from psilora.backends.triton.launch import BLOCK_COLUMNS, device_rates, note_written, on, tile_map
from psilora.lowrank.spectral import (
    Coefficients,
    Numbers,
    Roots,
    Seen,
    factor_step,
    followed,
    mean_diagonal,
    spectral_step,
    spread,
)
from psilora.options import SpectralOptions
from psilora.steps import gauge
from psilora.steps.problem import Problem, Scales
from psilora.steps.spectral.reference import factor_ridge, rate_factor
from psilora.triton_kernels import commit as commit_kernels
from psilora.triton_kernels import layout, slots, spectral_apply, spectral_gram
from psilora.triton_kernels.split import TRITON_DTYPES
from psilora.triton_kernels.tables import PointerTable, int32_table, padded, partial_buffers


class SpectralRun:
    """Tables and workspaces of layers of one rank and equal settings, of any widths; kept from step to step.

    Args:
        problems: A first step's problems, for their shapes.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        pairs = [p.pair for p in problems]
        self.rank, self.count, self.device = pairs[0].rank, len(pairs), pairs[0].lora_A.device
        options = SpectralOptions.of(problems[0].options)
        self.metric, self.joint, self.follows = options.metric is not None, options.joint, options.follows
        self.own = 0 if options.momentum == 0 else 2 if self.joint else 1  # blocks of r rows of the momentum
        self.kinds = (spectral_gram.PLAIN, spectral_gram.SINGLE, spectral_gram.FULL)[self.own]
        self.sizes = [[pair.d_in for pair in pairs], [pair.d_out for pair in pairs]]
        self.padded = padded(self.rank)
        tiles, parts = tile_map(self.sizes, BLOCK_COLUMNS[self.padded])
        self.tiles = int32_table(tiles, int(layout.TILE.value), self.device)
        self.parts = torch.stack([int32_table(side, 2, self.device) for side in parts])
        longest = max(count for side in parts for _, count in side)
        within = torch.arange(longest, device=self.device)
        first, count = self.parts.long().unbind(-1)
        # The tiles of a (side, layer), filled up with one tile past the last, whose sum is 0.
        self.own_tiles = torch.where(within < count[..., None], first[..., None] + within, len(tiles))
        dims = [(self.rank, self.own * self.rank, pair.d_in, pair.d_out) for pair in pairs]
        self.dims = int32_table(dims, int(layout.DIMS.value), self.device)
        self.widths = torch.tensor(self.sizes, dtype=torch.float64, device=self.device)
        self.places = {kinds: spectral_gram.places(kinds, self.device) for kinds in {spectral_gram.ALONE, self.kinds}}
        self.table = PointerTable(self.device)
        self.addresses = self.table.reserve(self.count, int(layout.ADDRESSES.value))
        self.numbers = self.table.reserve(self.count, slots.NUMBERS)
        self.scalars = self.table.reserve(self.count, int(layout.SCALARS.value) // 2)
        self._allocate(len(tiles))
        self.old_norms: Tensor | None = None
        self.new_norms: Tensor | None = None
        self.problems: list[Problem] = []
        self.kept: list[list[list[Tensor]]] = []

    def _allocate(self, tiles: int) -> None:
        rank = self.rank

        def buffers(rows: int) -> list[list[Tensor]]:
            shapes = [[(rows, size) for size in side] for side in self.sizes]
            return [[t for t in partial_buffers(side, self.device) if t is not None] for side in shapes]

        self.steps, self.rows = buffers(rank), buffers(rank * (1 + self.own))
        self.averages = buffers(1) if self.metric else [[], []]
        self.weights = [
            [torch.empty(2, size, dtype=torch.float64, device=self.device) for size in side if self.metric]
            for side in self.sizes
        ]
        square = (self.padded, self.padded)
        self.partials = torch.empty(tiles, self.kinds, *square, dtype=torch.float64, device=self.device)
        self.sums = torch.zeros(tiles + 1, dtype=torch.float64, device=self.device)
        self.weight_sums = torch.zeros(tiles + 1, 2, dtype=torch.float64, device=self.device)
        self.no_grams = torch.empty(1, 1, *square, device=self.device)

    # ---- what the host knows of a step --------------------------------------------------------------------------

    def start(self, problems: Sequence[Problem], scales: Scales) -> None:
        """Launch everything but the commit."""
        self.problems = list(problems)
        with on(self.device):
            self._stage()
            self.table.upload()
            numbers = self.numbers.device.view(torch.float64)
            clip = numbers[:, slots.SIGN]
            if scales.clip is not None:
                clip = clip * scales.clip.to(self.device, torch.float64)
            self.old_norms = torch.stack([p.state_B["norms"] for p in problems]) if self.follows else None
            inverse = self._moments(numbers, clip)
            grams, scale = self._grams(numbers, clip, inverse)
            step = spectral_step if self.joint else factor_step
            settings = self._settings(numbers)
            settings.seen = self.seen
            if self.raw is not None:
                settings.raw_A, settings.raw_B = self.raw
                settings.spread_A, settings.spread_B = self._spreads(numbers)
            found = step(grams[1], grams[0], settings)
            self.new_norms = found.norms
            self.coefficients = self._folded(found, scale)
            self.info = found.repaired
            self.finite = torch.isfinite(grams).flatten(2).all(2).all(0)
            self.finite = self.finite & torch.isfinite(self.coefficients).flatten(2).all(2).all(0)
            spectral_apply.spread(
                self.addresses.device, self.dims, self.tiles, self.coefficients,
                own=self.own, metric=self.metric,
            )  # fmt: skip

    def _stage(self) -> None:
        """Put the addresses and numbers of a step into the table."""
        g, problems = layout, self.problems
        parameters = [[p.pair.lora_A for p in problems], [p.pair.lora_B for p in problems]]
        gradients = [[p.dA for p in problems], [p.dB for p in problems]]
        self.kept = [[self._fp32(side) for side in both] for both in (parameters, gradients)]
        for side in (0, 1):
            states = [p.state_B if side else p.state_A for p in problems]
            self.addresses.set(g.PARAM.value + side, parameters[side])
            self.addresses.set(g.FACTOR.value + side, self.kept[0][side])
            self.addresses.set(g.GRAD.value + side, self.kept[1][side])
            self.addresses.set(g.STEPS.value + side, self.steps[side])
            self.addresses.set(g.ROWS.value + side, self.rows[side])
            self.addresses.set(g.COUNT.value + side, [state["step"] for state in states])
            if self.own:
                self.addresses.set(g.MOMENTUM.value + side, [state["momentum"] for state in states])
            if self.metric:
                self.addresses.set(g.METRIC.value + side, [state["metric"] for state in states])
                self.addresses.set(g.AVERAGE.value + side, self.averages[side])
                self.addresses.set(g.WEIGHT.value + side, self.weights[side])
        self._stage_numbers()

    @staticmethod
    def _fp32(tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors, or fp32 copies of 16-bit ones, made together."""
        dense = [t.detach().contiguous() for t in tensors]
        if all(t.dtype == torch.float32 for t in dense):
            return dense
        copies = [torch.empty_like(t, dtype=torch.float32) for t in dense]
        torch._foreach_copy_(copies, dense)
        return copies

    def _stage_numbers(self) -> None:
        staged = self.table.staged(self.numbers.offset, self.numbers.rows, self.numbers.columns).view(np.float64)
        scalars = self.table.staged(self.scalars.offset, self.scalars.rows, self.scalars.columns).view(np.float32)
        for row, scalar, p in zip(staged, scalars, self.problems, strict=True):
            o = p.options
            row[slots.BETA], row[slots.DAMPING], row[slots.POWER] = (
                o.metric_beta,
                o.delta,
                o.gamma,
            )
            row[slots.MU], row[slots.FRESH], row[slots.DECAY], row[slots.RIDGE] = (
                o.momentum,
                1 - o.tau,
                o.weight_decay,
                factor_ridge(p),
            )
            row[slots.FACTOR], row[slots.ROOT] = (
                rate_factor(p.pair.d_out, p.pair.d_in, p.pair.rank) * SpectralOptions.of(o).factor,
                math.sqrt(p.pair.scaling),
            )
            row[slots.SIGN], row[slots.RATE] = -1.0 if o.maximize else 1.0, 0.0 if isinstance(o.lr, Tensor) else o.lr
            row[slots.CAP] = SpectralOptions.of(o).largest
            scalar[layout.ROOT.value] = row[slots.ROOT]

    def _settings(self, numbers: Tensor) -> Numbers:
        options = SpectralOptions.of(self.problems[0].options)
        columns = numbers[:, :, None, None].unbind(1)
        lr = columns[slots.RATE]
        rates = device_rates([p.options.lr for p in self.problems], self.device)
        if any(rate is not None for rate in rates):
            held = [lr[i].float().reshape(()) if rate is None else rate for i, rate in enumerate(rates)]
            lr = torch.stack(held).double()[:, None, None]
        return Numbers(
            rank=self.rank,
            mu=columns[slots.MU],
            fresh=columns[slots.FRESH],
            nesterov=options.nesterov and self.own > 0,
            rate=lr * columns[slots.FACTOR],
            decay=-lr * columns[slots.DECAY] if options.weight_decay > 0 else None,
            ridge=columns[slots.RIDGE],
            num_iters=options.num_iters,
            first=options.first,
            dtype=torch.float32,
            fades=options.fade,
            cap=columns[slots.CAP],
            norms=self.old_norms,
        )

    # ---- launches -----------------------------------------------------------------------------------------------

    def _means(self) -> Tensor:
        """The means over the columns of each (side, layer) of what a launch has summed per tile, (2, L)."""
        return self.sums[self.own_tiles].sum(-1) / self.widths

    def _moments(self, numbers: Tensor, clip: Tensor) -> Tensor:
        """Update the metric; return 1/mean(D) per layer and side, (L, 2), negative where the weights are 1."""
        self.seen: Seen | None = None
        self.traces: Tensor | None = None
        self.raw: Tensor | None = None
        if not self.metric:
            return torch.ones(self.count, 2, dtype=torch.float64, device=self.device)
        alone = self.partials.new_empty(len(self.tiles), spectral_gram.ALONE, self.padded, self.padded)
        self._launch_span(alone, metric=False)
        grams = spectral_gram.summed(alone, self.parts, self.places[spectral_gram.ALONE], self.rank)
        root, ridge = numbers[:, slots.ROOT, None, None], numbers[:, slots.RIDGE, None, None]
        self.raw = grams * root.square()
        A, B = (Roots(gram, ridge) for gram in self.raw)
        roots = torch.stack([B.T.mT, A.T.mT]) * (clip[:, None, None] / root)
        zero = mean_diagonal(grams[1]).flatten() == 0
        frozen = torch.stack([zero, torch.zeros_like(zero)], 1)
        self.traces = grams.diagonal(dim1=-2, dim2=-1).sum(-1)
        roots = roots * self._taken(numbers, roots, frozen)
        self._launch_moments(numbers, roots, frozen)
        mean = self._means().mT
        return torch.where(frozen, -1.0, 1 / torch.where(mean == 0, 1.0, mean)).contiguous()

    def _launch_moments(self, numbers: Tensor, roots: Tensor, frozen: Tensor) -> None:
        spectral_gram.moments(
            self.addresses.device, numbers, self.dims, self.tiles, roots.contiguous(), frozen.view(torch.uint8),
            self.sums,
        )  # fmt: skip

    def _taken(self, numbers: Tensor, roots: Tensor, frozen: Tensor) -> Tensor | float:
        """κ (L, 1, 1), and what else the gradient's size means in `seen`, from its second moments alone."""
        if not self.follows:
            return 1.0
        alone = numbers.clone()
        alone[:, spectral_gram.BETA.value] = 0
        self._launch_moments(alone, roots, torch.zeros_like(frozen))
        squares = self.rank * (self._means() * self.widths).sum(0)
        self.seen = followed(squares, self._settings(numbers))
        return 1.0 if self.seen is None else self.seen.taken

    def _launch_span(self, out: Tensor, *, metric: bool, inverse: Tensor | None = None) -> None:
        spectral_gram.span(
            self.addresses.device, self.numbers.device.view(torch.float64), self.dims, self.tiles,
            self.sums if inverse is None else inverse, self.weight_sums, out, metric=metric,
        )  # fmt: skip

    def _spreads(self, numbers: Tensor) -> Tensor:
        """N_U (2, L, 1, 1) of sides A and B, see `psilora.lowrank.spectral.spread`."""
        inverse, counted = self.weight_sums[self.own_tiles].sum(-2).unbind(-1)
        least = numbers[:, slots.DAMPING] ** numbers[:, slots.POWER]
        return spread(counted, inverse, least, self.widths.clamp(max=self.rank))[..., None, None]

    def _grams(self, numbers: Tensor, clip: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
        """Γ (2, L, n, n) of the whitened blocks of sides A and B, and their scales (2, L, n)."""
        self._launch_span(self.partials, metric=self.metric, inverse=inverse)
        grams = spectral_gram.summed(self.partials, self.parts, self.places[self.kinds], self.rank)
        if not self.metric:
            self.traces = grams.diagonal(dim1=-2, dim2=-1)[..., : self.rank].sum(-1)
        root = numbers[:, slots.ROOT]
        blocks = [(root, self.rank), (torch.ones_like(root), self.own * self.rank), (clip / root, self.rank)]
        scale = torch.cat([value[:, None].expand(-1, size) for value, size in blocks], -1).expand(2, -1, -1)
        return scale[..., :, None] * grams * scale[..., None, :], scale

    def _folded(self, found: Coefficients, scale: Tensor) -> Tensor:
        """The coefficients of the raw blocks, rows [ΔF; M⁺], of sides A and B, as `spectral_apply` takes them."""
        steps = torch.stack([found.step_A.mT, found.step_B.mT])
        if self.own:
            steps = torch.cat([steps, torch.stack([found.momentum_A.mT, found.momentum_B.mT])], -2)
        return (steps * scale[..., None, :]).float().contiguous()

    # ---- what an Execution asks for -----------------------------------------------------------------------------

    def flags(self, index: int) -> Tensor:
        """(L,) int32: above 0 where a gradient or result of the layer is not finite."""
        return (~self.finite).int()

    def repaired(self, index: int) -> Tensor:
        """Number of factorisations that failed, 0-d int64."""
        return self.info.sum()

    def increments(self, index: int) -> tuple[list[Tensor], list[Tensor]]:
        """√s times the increments of A, and those of B as rows (r, d_out)."""
        return self.steps[0], self.steps[1]

    def refused(self, index: int) -> None:
        """See `psilora.steps.update.Computed`."""

    def shifts(self, index: int) -> Tensor | None:
        """See `psilora.steps.gauge`; a layer moves where any coefficient of an increment is not zero."""
        moved = (self.coefficients[:, :, : self.rank] != 0).flatten(2).any(2).any(0)
        return gauge.shifts(self.problems, moved, self.traces)

    def commit(self, index: int, ok: Tensor, shifts: Tensor | None) -> None:
        """Launch the commit."""
        pair = self.problems[0].pair
        with on(self.device):
            commit_kernels.commit(
                self.addresses.device, self.scalars.device.view(torch.float32), self.dims, self.tiles,
                self.no_grams, ok.view(torch.uint8), self.no_grams, shifts=shifts, ON_FACTORS=not self.joint,
                A_TYPE=TRITON_DTYPES[pair.lora_A.dtype], B_TYPE=TRITON_DTYPES[pair.lora_B.dtype],
                HAS_MOMENTUM=self.own > 0, HAS_METRIC=self.metric, OWN=max(self.own, 1),
                EMIT_A=False, EMIT_B=False, MASK_A=0, MASK_B=0,
            )  # fmt: skip
            if self.new_norms is not None and self.old_norms is not None:
                chosen = torch.where(ok, self.new_norms, self.old_norms, out=self.old_norms)
                torch._foreach_copy_([p.state_B["norms"] for p in self.problems], list(chosen.unbind(0)))
        note_written(self.problems)
        self.problems, self.kept = [], []  # the launches are in stream order; gradients need not wait for a next step
