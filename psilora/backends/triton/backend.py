"""The Triton backend: executes a step's plan on all layers at once, without waiting for the device.

One upload carries every address and scalar; workspaces and tables are kept per set of shapes. Everything is computed
into workspaces; parameters and state are written by the commit launch alone, where the step is accepted.
"""

from __future__ import annotations

import collections
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from psilora.backends.triton.launch import PADDED_RANKS
from psilora.options import GradientOptions, Options, SpectralOptions
from psilora.runtime import capturing
from psilora.steps.problem import Problem, Problems, Scales

if TYPE_CHECKING:
    from psilora.backends.triton.gradient.bucket import Workspace
    from psilora.backends.triton.gradient.plan import Layer
    from psilora.backends.triton.gradient.ritz import PreparedProducts, RitzUpdate
    from psilora.backends.triton.gradient.run import Run
    from psilora.backends.triton.joint import JointRun
    from psilora.backends.triton.spectral import SpectralRun
    from psilora.triton_kernels.tables import Scratch

    Spectral: TypeAlias = JointRun | SpectralRun

#: The update of problems that share their launches.
Computed: TypeAlias = "Execution | RitzUpdate"
#: What an optimizer keeps from step to step, by device.
Backends: TypeAlias = "dict[torch.device, Backend]"
#: Executions kept per optimizer: one per set of captured shapes.
KEPT_RUNS = 16
#: Layouts of X and S, with every number of rows, whose run is found without a look at the layers.
KEPT_KEYS = 1024
#: Runs of spectral steps kept: adapters that take turns each have their own.
KEPT_SPECTRAL = 4
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def unavailable_reason() -> str | None:
    """Return why no kernel can run here, or None where they can (on CUDA, or in Triton's interpreter on the CPU)."""
    try:
        from psilora.triton_kernels import _compat
    except ImportError as error:
        return f"the kernels are not installed: {error}"
    reason: str | None = _compat.unavailable_reason()
    if reason is None and not _compat.interpreted() and not torch.cuda.is_available():
        reason = "there is no CUDA device (on the CPU the kernels only run in Triton's interpreter, TRITON_INTERPRET=1)"
    return reason


def unsupported(problem: Problem, settled: dict[int, str | None] | None = None) -> str | None:
    """Return why the kernels cannot take a problem, or None; such problems are left to the reference backend.

    Args:
        problem: The problem.
        settled: What is known of settings, by id, for the many problems that share theirs; extended.
    """
    options = problem.options
    settled = {} if settled is None else settled
    if id(options) not in settled:
        settled[id(options)] = _settings_unsupported(options)
    reason = settled[id(options)]
    if reason is not None:
        return reason
    pair = problem.pair
    A, B, dA, dB = pair.lora_A, pair.lora_B, problem.dA, problem.dB
    device = A.device
    if A.dtype == torch.float64:
        return "fp64 parameters"
    if problem.exact and problem.holds != "rows":
        return "a gradient that is not kept as X and S"
    if _ritz(problem) and not problem.exact:
        return "solver='ritz' without X and S"
    tensors = [A, B, dA, dB]
    if problem.exact and problem.record is not None:
        chunks = problem.record.chunks
        tensors += [t for chunk in chunks for t in chunk]
        if len({(x.dtype, s.dtype) for x, s in chunks}) > 1:
            return "captured calls of different dtypes"
    for t in tensors:
        if t.dtype not in _FLOATS:
            return "a dtype other than fp32, bf16 and fp16"
        if t.device != device:
            return "tensors on several devices"
    if not (A.is_contiguous() and B.is_contiguous()):
        return "parameters that are not contiguous"
    if max(pair.rank, _momentum_rank(problem)) > PADDED_RANKS[-1]:
        return f"a rank above {PADDED_RANKS[-1]}"
    return None if device.type == ("cpu" if _interpreted() else "cuda") else f"device {device}"


def _settings_unsupported(options: Options) -> str | None:
    if options.step not in _KERNELS:
        return f"step={options.step!r}"
    row = options.metric_row
    return None if row is None or row.kernels else f"metric={options.metric!r}"


def _interpreted() -> bool:
    from psilora.triton_kernels import _compat

    return bool(_compat.interpreted())


def _momentum_rank(problem: Problem) -> int:
    """The rank of a gradient step's momentum; a spectral step's follows from the pair's."""
    remembers = isinstance(problem.options, GradientOptions) and problem.options.momentum > 0
    return problem.state_A["momentum"].shape[0] if remembers else 0


def _ritz(problem: Problem) -> bool:
    return isinstance(problem.options, GradientOptions) and problem.options.solver == "ritz"


def layer_of(problem: Problem) -> Layer:
    """Return what the plan knows of a problem."""
    from psilora.backends.triton.gradient.plan import Layer, Structure, most_rows

    o, pair = GradientOptions.of(problem.options), problem.pair
    chunks = problem.chunks
    return Layer(
        pair.d_out,
        pair.d_in,
        pair.rank,
        _momentum_rank(problem),
        Structure(
            num_iters=o.num_iters,
            first=o.first,
            momentum=o.momentum > 0,
            metric=o.metric,
            corrected=o.metric_bias_correction,
            decay=o.weight_decay > 0,
            exact=problem.exact,
            reuse=problem.reuse,
            balance=o.balance,
        ),
        pair.lora_A.dtype,
        pair.lora_B.dtype,
        problem.dA.dtype,
        problem.dB.dtype,
        chunks[0][0].dtype if chunks else torch.float32,
        chunks[0][1].dtype if chunks else torch.float32,
        pair.lora_A.device,
        tuple(most_rows(x.shape[0]) for x, _ in chunks),
    )


class Execution:
    """A bucket whose update lies in workspaces, waiting for its commit; stands for `psilora.steps.update.Update`.

    Attributes:
        problems: The bucket's problems, in order.
    """

    def __init__(self, run: Run | Spectral, index: int, problems: list[Problem]) -> None:
        self.problems = problems
        self._run, self._index = run, index

    def tensors(self) -> list[Tensor]:
        """Return (L, 1): NaN for a layer with a non-finite gradient or result, else 0."""
        return [torch.where(self._run.flags(self._index) > 0, math.nan, 0.0).view(-1, 1)]

    def increments(self) -> list[tuple[Tensor, Tensor]]:
        """Return (step of B (d_out, r), step of A (r, d_in)) per problem, as they will be added to the parameters."""
        ranks, roots = [p.pair.rank for p in self.problems], [p.pair.scaling**0.5 for p in self.problems]
        steps_A, steps_B = (
            torch._foreach_div([step[:rank] for step, rank in zip(side, ranks, strict=True)], roots)
            for side in self._run.increments(self._index)
        )
        return [(step_B.mT, step_A) for step_B, step_A in zip(steps_B, steps_A, strict=True)]

    @property
    def repaired(self) -> Tensor:
        """Number of r×r solves with a repaired pivot and a right-hand side that is not zero, 0-d int64."""
        return self._run.repaired(self._index)

    def stage(self, ok: Tensor) -> list[Callable[[], object]]:
        """See `psilora.steps.update.Computed`."""
        return [functools.partial(self.commit, ok.to(self.problems[0].pair.lora_A.device), self.shifts)]

    @functools.cached_property
    def shifts(self) -> Tensor | None:
        """See `psilora.steps.update.Computed`."""
        return self._run.shifts(self._index)

    @functools.cached_property
    def refused(self) -> Tensor | None:
        """See `psilora.steps.update.Computed`."""
        return self._run.refused(self._index)

    def commit(self, ok: Tensor, shifts: Tensor | None = None) -> None:
        """Write parameters and state where `ok`, a 0-d bool on the same device, holds.

        `shifts`, (L,) int32, balances the factors that are written; see `psilora.steps.gauge`.
        """
        self._run.commit(self._index, ok, shifts)


def compute(problems: Sequence[Problem], scales: Scales, backends: Backends | None = None) -> list[Computed]:
    """Compute the updates of problems on one device, of any shapes and settings, without changing any of them.

    Args:
        problems: The problems.
        scales: Of this step.
        backends: What earlier steps have left, extended by this one; None prepares everything for this step alone.
    """
    device = problems[0].pair.lora_A.device
    backend = Backend() if backends is None else backends.setdefault(device, Backend())
    return backend.compute(problems, scales)


class Backend:
    """The workspaces and prepared executions of one optimizer's problems on one device.

    Args:
        narrow: Whether the kernels for narrow layers take all spectral steps, as their check asks; see `joint.narrow`.
    """

    def __init__(self, narrow: bool = False) -> None:
        self._narrow = narrow
        self._runs: collections.OrderedDict[object, Run] = collections.OrderedDict()
        self._keys: dict[object, int] = {}  # of what runs are prepared for: numbers, which are found more quickly
        self._numbers = itertools.count()
        self._workspaces: dict[object, list[Workspace]] = {}
        self._spectral: collections.OrderedDict[object, Spectral] = collections.OrderedDict()
        self._products: PreparedProducts | None = None
        self._scratch: Scratch | None = None
        self._captured: list[Run | Spectral] = []  # a CUDA graph replays with their memory

    def compute(self, problems: Sequence[Problem], scales: Scales) -> list[Computed]:
        """See the function `compute`."""
        problems = Problems.of(problems)
        kinds: dict[str, Problems] | None = problems.prepared.get("kinds")
        if kinds is None:
            own = {step: problems.where(functools.partial(_takes_step, step)) for step in _KERNELS}
            kinds = problems.prepared["kinds"] = {step: found for step, found in own.items() if found}
        return [done for step, own in kinds.items() for done in _KERNELS[step](self, own, scales)]

    def _gradient_kind(self, problems: Problems, scales: Scales) -> list[Computed]:
        if "solvers" not in problems.prepared:
            own = problems.where(lambda p: not _ritz(p))
            problems.prepared["solvers"] = own, [p for p in problems if _ritz(p)]
        alternating, ritz = problems.prepared["solvers"]
        found: list[Computed] = [*self._gradient_steps(alternating, scales)] if alternating else []
        return [*found, *self._ritz_steps(ritz, scales)] if ritz else found

    def _ritz_steps(self, problems: Sequence[Problem], scales: Scales) -> list[RitzUpdate]:
        from psilora.backends.triton.gradient.ritz import PreparedProducts, ritz_updates

        if self._products is None:
            self._products = PreparedProducts()
        return ritz_updates(problems, scales, self._products)

    def _spectral_kind(self, problems: Problems, scales: Scales) -> list[Computed]:
        groups: dict[object, Problems] | None = problems.prepared.get("runs")
        if groups is None:
            parts: dict[object, list[Problem]] = {}
            for problem in problems:
                parts.setdefault(self._spectral_key(problem), []).append(problem)
            groups = problems.prepared["runs"] = {
                (key, tuple((p.pair.d_out, p.pair.d_in) for p in members)): Problems(members)
                for key, members in parts.items()
            }
        executions: list[Computed] = []
        for whole, members in groups.items():
            run = self._spectral.get(whole)
            if run is None:
                run = self._spectral[whole] = self._spectral_run(members)
                while len(self._spectral) > max(KEPT_SPECTRAL, len(groups)):
                    self._spectral.popitem(last=False)
            self._spectral.move_to_end(whole)
            self._note_capture(run)
            run.start(members, scales)
            executions.append(Execution(run, 0, members))
        return executions

    def _spectral_key(self, problem: Problem) -> tuple[object, ...]:
        """What spectral steps that share their launches have in common."""
        pair = problem.pair
        types = (pair.lora_A.dtype, pair.lora_B.dtype, problem.dA.dtype, problem.dB.dtype)
        return (pair.rank, *types, problem.options.structure, self._joint(problem))

    def _spectral_run(self, problems: Sequence[Problem]) -> Spectral:
        """Return a run of the kernels for spectral steps of one key."""
        from psilora.backends.triton.joint import JointRun
        from psilora.backends.triton.spectral import SpectralRun

        return JointRun(problems) if self._joint(problems[0]) else SpectralRun(problems)

    def _joint(self, problem: Problem) -> bool:
        """Whether the default's kernels take a spectral step."""
        from psilora.backends.triton import joint

        narrow = self._narrow or joint.narrow(problem)
        return not narrow and joint.takes(SpectralOptions.of(problem.options))

    def _note_capture(self, run: Run | Spectral) -> None:
        if capturing(run.device):
            self._captured.append(run)

    def _key(self, problems: Problems) -> int:
        """A number for what a run is prepared for: layers, and the layouts of X and S with about as many rows."""
        from psilora.backends.triton.gradient.plan import most_rows

        layouts = problems.prepared.pop("layouts", None) or tuple([p.layout for p in problems])
        keys: dict[object, int] = problems.prepared.setdefault("keys", {})
        key = keys.get(layouts)
        if key is None:
            calls = tuple(tuple((most_rows(n), form) for n, form in layout) for layout in layouts)
            whole = (tuple(layer_of(p) for p in problems), calls)
            for known in (keys, self._keys):
                if len(known) >= KEPT_KEYS:
                    known.clear()
            if whole not in self._keys:
                self._keys[whole] = next(self._numbers)
            key = keys[layouts] = self._keys[whole]
        return key

    def _gradient_steps(self, problems: Problems, scales: Scales) -> list[Execution]:
        from psilora.backends.triton.gradient import plan
        from psilora.backends.triton.gradient.bucket import Workspace
        from psilora.backends.triton.gradient.run import Run
        from psilora.triton_kernels.tables import Scratch

        key = self._key(problems)
        run = self._runs.get(key)
        if self._scratch is None:
            self._scratch = Scratch(problems[0].pair.lora_A.device)
        if run is None:
            layers = [layer_of(p) for p in problems]
            step = plan.make_plan(layers)
            shapes = tuple((*layer.key, layer.d_out, layer.d_in, layer.rank, layer.momentum_rank) for layer in layers)
            if shapes not in self._workspaces:
                self._workspaces = {shapes: [Workspace(bucket) for bucket in step.buckets]}
            run = Run(step, self._workspaces[shapes], problems, self._scratch)
            if self._scratch.short:
                del run
                self._runs.clear()  # what is captured in a graph keeps its own
                self._scratch.grow()
                run = Run(step, self._workspaces[shapes], problems, self._scratch)
            self._runs[key] = run
            while len(self._runs) > KEPT_RUNS:
                self._runs.popitem(last=False)
        self._runs.move_to_end(key)
        self._note_capture(run)
        if self._captured:  # a replay changes factors that keep their version, and has to form their Grams itself
            run.forget()
        members = tuple(bucket.members for bucket in run.plan.buckets)
        parts: dict[object, list[Problems]] = problems.prepared.setdefault("buckets", {})
        if members not in parts:
            parts[members] = [Problems(problems[m] for m in own) for own in members]
        run.start(parts[members], scales)
        return [Execution(run, i, own) for i, own in enumerate(parts[members])]


#: Who launches the kernels of each kind of step.
_KERNELS = {SpectralOptions.step: Backend._spectral_kind, GradientOptions.step: Backend._gradient_kind}


def _takes_step(step: str, problem: Problem) -> bool:
    return problem.options.step == step
