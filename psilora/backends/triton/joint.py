"""The default spectral step on the Triton backend in eight launches, whatever the number of layers and their widths.

Gram of the factors, their roots, moments of the gradient, Gram of all rows, then the algebra in three launches, and one
that writes. Beside tables and small matrices nothing is as large as the state: parameters, momentum and metric are
updated in place, once it is known that the whole step is finite.
"""

from __future__ import annotations

import math
import operator
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from psilora.backends.triton.launch import device_rates, note_written, on, tile_map
from psilora.linalg.polar import SMALLEST, newton_schulz_coefficients
from psilora.linalg.polar import STEPS as SCHULZ_STEPS
from psilora.options import Options, SpectralOptions
from psilora.steps.problem import Problem, Problems, Scales
from psilora.steps.spectral.reference import factor_ridge, rate_factor
from psilora.triton_kernels import (
    joint_algebra,
    joint_apply,
    joint_collect,
    joint_finish,
    joint_gram,
    joint_layout,
    joint_moments,
    joint_tangent,
    slots,
)
from psilora.triton_kernels.split import TRITON_DTYPES
from psilora.triton_kernels.tables import PointerTable, int32_table

#: Columns of a tile, at most, in units of r: the partial Grams of a tile are then small beside the momentum it covers.
SPAN_PER_RANK = 96


def takes(options: SpectralOptions) -> bool:
    """Whether these settings have the default's structure, whatever their numbers."""
    return options.joint and options.momentum > 0 and options.metric == "lora" and options.num_iters == 1


def narrow(problem: Problem) -> bool:
    """Whether a step of the default's structure is on a side of fewer than 2r columns.

    The r rows that a step orthonormalises beside those of the factor are dependent there. What rows of 24 bits leave
    of them is noise of about 2⁻¹², where Grams of fp32 rows in float64 leave 2⁻²⁶: other kernels take the layer.
    """
    pair = problem.pair
    return min(pair.d_in, pair.d_out) < 2 * pair.rank and takes(SpectralOptions.of(problem.options))


def _numbers(o: SpectralOptions) -> tuple[tuple[int, float], ...]:
    """Return what options are in the table, but for the rate, as pairs of a column and its number."""
    least = min(1.0, o.delta**o.gamma)
    return (
        (slots.S_BETA, o.metric_beta),
        (slots.S_BETA_REST, 1 - o.metric_beta),
        (slots.S_DAMPING, o.delta),
        (slots.S_POWER, o.gamma),
        (slots.S_MU, o.momentum),
        (slots.S_MU_REST, 1 - o.momentum),
        (slots.S_FRESH, 1 - o.tau),
        (slots.S_DECAY, o.weight_decay),
        (slots.S_RIDGE, o.rho),
        (slots.S_FACTOR, o.factor),
        (slots.S_SIGN, -1.0 if o.maximize else 1.0),
        (slots.S_CAP, o.largest),
        (slots.S_LOOSE, 1 / math.sqrt(least) if least > 0 else 1.0),
    )


def _carved(memory: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return an fp32 tensor in the memory of another one, which is needed at other times; new memory if it is small."""
    size = math.prod(shape)
    if size > memory.numel():
        return torch.zeros(shape, dtype=torch.float32, device=memory.device)
    return memory.flatten()[:size].view(shape)


class JointRun:
    """Tables and workspaces of layers of one rank and equal settings, of any widths; kept from step to step.

    Args:
        problems: A first step's problems, for their shapes.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        pairs = [p.pair for p in problems]
        self.rank, self.count, self.device = pairs[0].rank, len(pairs), pairs[0].lora_A.device
        self.options = options = SpectralOptions.of(problems[0].options)
        self.follows = options.follows
        self.padded = padded = max(8, 1 << (self.rank - 1).bit_length())
        sizes = [[pair.d_in for pair in pairs], [pair.d_out for pair in pairs]]
        longest = max(8 * joint_gram.SPAN.value, SPAN_PER_RANK * self.rank)
        tiles, parts = tile_map(sizes, joint_gram.SPAN.value, longest)
        device, count = self.device, self.count
        self.tiles = int32_table(tiles, 4, device)
        self.parts = torch.stack([int32_table(side, 2, device) for side in parts])
        dims = [(self.rank, 2 * self.rank, pair.d_in, pair.d_out) for pair in pairs]
        self.dims = int32_table(dims, 4, device)
        self.types = tuple(
            TRITON_DTYPES[t.dtype] for t in (pairs[0].lora_A, pairs[0].lora_B, problems[0].dA, problems[0].dB)
        )
        most = {torch.float16: 65504.0}
        self.most = (most.get(pairs[0].lora_A.dtype, 3e38), most.get(pairs[0].lora_B.dtype, 3e38))
        self.table = PointerTable(device)
        self.addresses = self.table.reserve(count, slots.J_ADDRESSES)
        self.settings = self.table.reserve(count, slots.S_SETTINGS // 2)

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        def floats(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        self.alone = joint_layout.pieces_table(padded, 1, device)
        self.pieces = joint_layout.pieces_table(padded, 4, device)
        self.partials, self.exponents, self.flags_found = self._partials(len(tiles), 4, self.pieces)
        self.partials_alone, self.exponents_alone, self.flags_alone = self._partials(len(tiles), 1, self.alone)
        self.sums = floats(len(tiles), int(joint_layout.SUMS.value))
        self.frozen, self.seen = ints(count), floats(count, int(joint_layout.SEEN.value))
        self.gram, self.traces = (
            floats(2, count, 2, 4 * padded, 4 * padded),
            floats(2, count, int(joint_algebra.TRACES.value)),
        )
        self.roots = _carved(self.gram, (2, count, padded, padded))  # read before Γ is written
        self.small = floats(2, count, 2, int(joint_algebra.SMALL.value), padded, padded)
        self.known, self.outcome = (
            ints(2, count, int(joint_algebra.KNOWN.value)),
            ints(count, int(joint_algebra.OUTCOME.value)),
        )
        self.polar = floats(count, 4, 2 * padded, 2 * padded)
        self.coefficients = _carved(self.partials, (2, count, 3 * padded, 4 * padded))  # written after those are read
        schulz = newton_schulz_coefficients(SMALLEST, SCHULZ_STEPS)
        self.schulz = torch.tensor(schulz, dtype=torch.float32, device=device)
        self.fresh = self._rows(sizes, 1)
        self.sizes = sizes
        #: Whether neither rank nor widths need masks; whether addresses allow to do without is seen in every step.
        self.even = self.rank == padded and not any(size % joint_gram.EVEN for side in sizes for size in side)
        self.whole = False
        self.double = joint_algebra.doubles(self.device)
        self.one = torch.ones((), dtype=torch.float32, device=device)
        self.yes = torch.ones((), dtype=torch.uint8, device=device)
        for side in (0, 1):
            self.addresses.set(slots.J_FRESH + side, self.fresh[side])
        self.problems: Sequence[Problem] = []
        self.kept: list[object] = []
        self._staged: weakref.ref[Problems] | None = None  # those whose addresses lie in the table
        self.known_options: list[Options] = []
        self.known_settings: list[tuple[float, tuple[tuple[int, float], ...]]] = []
        self.rates_on_device = False

    def _partials(self, tiles: int, blocks: int, pieces: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Partial Grams of every tile, the exponents of its rows, and flags."""
        rows = joint_layout.rows_of_piece(self.padded, blocks)
        groups = -(-self.padded * blocks // rows)
        shape = (tiles, pieces.shape[0], 2, rows, rows)
        # The partial Grams of the factors alone are read before those of all rows are written.
        if blocks == 1:
            partials = _carved(self.partials, shape)
        else:
            partials = torch.zeros(shape, dtype=torch.float32, device=self.device)
        exponents = torch.zeros(tiles, groups, rows, dtype=torch.int32, device=self.device)
        return partials, exponents, torch.zeros(tiles, groups, dtype=torch.int32, device=self.device)

    def _rows(self, sizes: Sequence[Sequence[int]], rows: int) -> list[list[Tensor]]:
        """Fp32 rows of the sizes of each side, each aligned to 16 bytes."""
        lengths = [-(-rows * size // 4) * 4 for side in sizes for size in side]
        pool = torch.empty(sum(lengths), dtype=torch.float32, device=self.device).split(lengths)
        flat = [piece[: rows * size] for piece, size in zip(pool, (s for side in sizes for s in side), strict=True)]
        return [flat[: self.count], flat[self.count :]]

    def workspace_bytes(self) -> int:
        """Return the bytes held beside parameters and state."""
        held = [t for t in vars(self).values() if isinstance(t, Tensor)] + [t for side in self.fresh for t in side]
        return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in held}.values())

    # ---- a step -------------------------------------------------------------------------------------------------

    def start(self, problems: Sequence[Problem], scales: Scales) -> None:
        """Launch everything but what writes."""
        self.problems = Problems.of(problems)
        with on(self.device):
            self._stage()
            self.table.upload()
            clip = self.one if scales.clip is None else scales.clip.to(self.device, torch.float32)
            addresses, settings = self.addresses.device, self.settings.device.view(torch.float32)
            self.views = addresses, settings
            joint_gram.gram(
                addresses, settings, self.dims, self.tiles, self.parts, self.alone, self.sums, self.frozen,
                self.partials_alone, self.exponents_alone, self.flags_alone,
                padded=self.padded, alone=True, follows=False, whole=self.whole, types=self.types,
            )  # fmt: skip
            joint_collect.roots(
                settings, self.dims, self.parts, self.alone, self.partials_alone, self.exponents_alone, self.small,
                self.roots, self.traces, self.frozen, double=self.double,
            )  # fmt: skip
            joint_moments.moments(
                addresses, settings, self.dims, self.tiles, self.roots, clip, self.sums,
                padded=self.padded, whole=self.whole, types=self.types,
            )  # fmt: skip
            joint_gram.gram(
                addresses, settings, self.dims, self.tiles, self.parts, self.pieces, self.sums, self.frozen,
                self.partials, self.exponents, self.flags_found,
                padded=self.padded, alone=False, follows=self.follows, whole=self.whole, types=self.types,
            )  # fmt: skip
            joint_collect.collect(
                addresses, settings, self.dims, self.parts, self.pieces, self.sums, self.frozen, self.partials,
                self.exponents, self.flags_found, self.gram, self.small, self.known, self.seen, self.traces,
                follows=self.follows, fades=self.options.fade, double=self.double,
            )  # fmt: skip
            joint_tangent.tangent(
                settings, self.dims, clip, self.seen, self.gram, self.small, self.known, self.coefficients,
                nesterov=self.options.nesterov, double=self.double,
            )  # fmt: skip
            joint_finish.finish(
                addresses, settings, self.dims, self.seen, self.traces, self.gram, self.small, self.known, self.polar,
                self.schulz, self.coefficients, self.outcome,
                first=self.options.first, decay=self.options.weight_decay > 0, balance=self.options.balance,
                most=self.most, double=self.double,
            )  # fmt: skip

    def _stage(self) -> None:
        """Put the addresses and numbers of a step into the table."""
        problems = Problems.of(self.problems)
        gradients = [[p.dA.contiguous() for p in problems], [p.dB.contiguous() for p in problems]]
        self.kept = [gradients]
        put = self.addresses.set
        for side in (0, 1):
            put(slots.J_GRAD + side, gradients[side])
        staged = self._staged() if self._staged is not None else None
        if staged is not problems:  # the same problems lie where they did
            for side in (0, 1):
                states = [p.state_B if side else p.state_A for p in problems]
                put(slots.J_FACTOR + side, [p.pair.lora_B if side else p.pair.lora_A for p in problems])
                put(slots.J_MOMENTUM + side, [state["momentum"] for state in states])
                put(slots.J_METRIC + side, [state["metric"] for state in states])
                put(slots.J_COUNT + side, [state["step"] for state in states])
            if self.follows:
                put(slots.J_NORMS, [p.state_B["norms"] for p in problems])
            self._staged = weakref.ref(problems)
            self.known_options = []
        self.whole = self.even and not self._unaligned()
        self._stage_settings()

    def _unaligned(self) -> bool:
        """Whether the address of a factor, gradient or momentum is no multiple of 16."""
        block = self.addresses
        staged = self.table.staged(block.offset, block.rows, block.columns)
        return bool((staged[:, slots.J_FACTOR : slots.J_METRIC] & 15).any())

    def _stage_settings(self) -> None:
        """Put the settings into the table; of those that a step usually leaves alone, only what has changed."""
        block, problems = self.settings, self.problems
        options = [p.options for p in problems]
        if len(self.known_options) == len(options) and all(map(operator.is_, options, self.known_options)):
            if not self.rates_on_device:
                return
        self.known_options = options
        staged = self.table.staged(block.offset, block.rows, block.columns).view(np.float32)
        each = {id(o): o for o in options}
        numbers = {name: _numbers(SpectralOptions.of(o)) for name, o in each.items()}
        kept = {values: values for _, values in self.known_settings}  # the same tuple, so that lists compare quickly
        numbers = {name: kept.get(values, values) for name, values in numbers.items()}
        known = [(p.pair.scaling, numbers[id(o)]) for p, o in zip(problems, options, strict=True)]
        if known != self.known_settings:
            self.known_settings = known
            for row, p, (scaling, values) in zip(staged, problems, known, strict=True):
                for slot, value in values:
                    row[slot] = value
                row[slots.S_RIDGE] = factor_ridge(p)
                row[slots.S_FACTOR] *= rate_factor(p.pair.d_out, p.pair.d_in, p.pair.rank)
                row[slots.S_SCALING] = scaling
        rates = [o.lr for o in options]
        self.rates_on_device = any(isinstance(o.lr, Tensor) for o in each.values())
        staged[:, slots.S_RATE] = [0.0 if isinstance(rate, Tensor) else rate for rate in rates]
        base, stride = self.settings.device.data_ptr() + 4 * slots.S_RATE, 4 * slots.S_SETTINGS
        own = base + stride * np.arange(self.count, dtype=np.int64)
        column = self.table.staged(self.addresses.offset, self.addresses.rows, self.addresses.columns)
        column[:, slots.J_LR] = own
        if self.rates_on_device:
            held = device_rates(rates, self.device)
            self.kept.append(held)
            column[:, slots.J_LR] = [at if t is None else t.data_ptr() for at, t in zip(own, held, strict=True)]

    def _apply(self, ok: Tensor, commit: bool) -> None:
        addresses, settings = self.views
        joint_apply.apply(
            addresses, settings, self.dims, self.tiles, self.coefficients, self.seen, self.frozen, self.outcome, ok,
            commit=commit, follows=self.follows, whole=self.whole, types=self.types,
        )  # fmt: skip

    # ---- what an Execution asks for -----------------------------------------------------------------------------

    def refused(self, index: int) -> Tensor:
        """See `psilora.steps.update.Computed`."""
        return self.outcome[:, 0].any()

    def flags(self, index: int) -> Tensor:
        """(L,) int32: above 0 where a gradient or result of the layer is not finite."""
        return self.outcome[:, 0]

    def repaired(self, index: int) -> Tensor:
        """Number of factorisations that failed, 0-d int64."""
        return self.outcome[:, 1].sum()

    def shifts(self, index: int) -> Tensor | None:
        """(L,) int32, see `psilora.steps.gauge`; None where nothing is to be balanced."""
        return self.outcome[:, 3] if self.options.balance else None

    def increments(self, index: int) -> tuple[list[Tensor], list[Tensor]]:
        """√s times the increments of A, and those of B as rows (r, d_out); computed for this call."""
        steps = self._rows(self.sizes, self.rank)
        roots = [math.sqrt(p.pair.scaling) for p in self.problems]
        with on(self.device):
            for side in (0, 1):
                self.addresses.set(slots.J_STEPS + side, steps[side])
            self.table.upload()
            self._apply(self.yes, False)
        found = [[t.view(self.rank, -1) * root for t, root in zip(side, roots, strict=True)] for side in steps]
        return found[0], found[1]

    def commit(self, index: int, ok: Tensor, shifts: Tensor | None) -> None:
        """Launch what writes; the shifts are the kernels' own."""
        with on(self.device):
            self._apply(ok.view(torch.uint8), True)
        note_written(self.problems)
        self.problems, self.kept = [], []  # the launches are in stream order; gradients need not wait for a next step
