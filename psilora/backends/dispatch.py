"""All layers at once: bucket the problems of a step, compute every bucket on its backend, then commit together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from psilora import runtime
from psilora.backends import self_check
from psilora.backends.triton import backend as triton_backend
from psilora.distributed.communicator import Communicator
from psilora.options.base import BACKENDS
from psilora.steps import STEPS
from psilora.steps.problem import Problem, Problems, Scales, grouped
from psilora.steps.update import Bucket, all_finite

#: Why pairs on CUDA had to do without the kernels, said once.
_SAID: set[str] = set()
_FAILED = "the kernels failed, as was warned about"
_UNCHECKED = "there is no memory to check the kernels with"


def check_backend(backend: str) -> None:
    """Raise for a backend that does not exist or cannot run here; "auto" always can."""
    if backend not in BACKENDS:
        raise ValueError(f"Invalid backend={backend!r}. Must be one of {', '.join(map(repr, BACKENDS))}.")
    reason = backend_unavailable(backend)
    if reason is not None:
        raise ValueError(f"backend={backend!r} is not available: {reason}; use 'auto' or 'reference'")


def automatic(device: torch.device) -> str:
    """Return in words what "auto" takes on a device, and why."""
    reason = _without_kernels("auto", device)
    return f"the kernels on {device}" if reason is None else f"the reference on {device}: {reason}"


def backend_unavailable(backend: str) -> str | None:
    """Return why a backend cannot run here, or None when it can."""
    return triton_backend.unavailable_reason() if backend == "triton" else None


def compute(
    problems: Sequence[Problem],
    scales: Scales,
    backend: str,
    communicator: Communicator | None = None,
    backends: triton_backend.Backends | None = None,
) -> list[Bucket]:
    """Compute the updates of all problems without changing any parameter or state.

    "auto" takes the Triton kernels for problems on CUDA whose kind has proved right there (see `self_check`), and the
    reference elsewhere; "triton" takes them wherever they run. Problems that the kernels do not support
    (`triton_backend.unsupported`, e.g. fp64) go to the reference, and so do those with captured activations where a
    communicator of several processes is given: there the products are summed between the turns. `backends` is what the
    kernels keep from step to step.
    """
    shared = communicator is not None and communicator.world_size > 1
    problems = Problems.of(problems)
    route = route_of(problems, backend, shared)
    rest = route.rest
    buckets: list[Bucket] = []
    for group in route.groups:
        taken = self_check if backend == "auto" else triton_backend
        executions = taken.compute(*_at_rate(group, scales), backends)
        if executions is None:
            rest = [*rest, *group]
            route.fail(group)
        else:
            buckets += [Bucket(execution.problems, execution) for execution in executions]
    for step, kind in STEPS.items() if rest else ():
        updates = kind.updates(grouped([p for p in rest if p.options.step == step]), scales, communicator)
        buckets += [Bucket(update.problems, update) for update in updates]
    return buckets


@dataclass
class Route:
    """Who takes which problems, and why: what a list of problems keeps from step to step.

    Attributes:
        backend, shared, formats: What it was made for: the setting, whether captures are summed over processes, and the
            formats of X and S.
        groups: What the kernels take, by device.
        rest: What the reference takes.
        reasons: Why the reference takes what it takes, with how many pairs.
    """

    backend: str
    shared: bool
    formats: Sequence[object]
    groups: list[Problems]
    rest: list[Problem]
    reasons: Counter[str]
    _verdicts: int = field(default_factory=self_check.verdicts)

    def serves(self, backend: str, shared: bool, formats: Sequence[object]) -> bool:
        """Whether it still holds."""
        asked = (self.backend, self.shared, self._verdicts) == (backend, shared, self_check.verdicts())
        return asked and self.formats == formats

    def retry(self) -> None:
        """Have the next step find its route anew."""
        self._verdicts = -1

    def fail(self, group: Problems) -> None:
        """Note that the kernels did not take what they were to take; the next step finds another route."""
        self.groups = [other for other in self.groups if other is not group]
        self.reasons[_FAILED] += len(group)
        self._verdicts = -1

    @property
    def said(self) -> list[str]:
        """Who takes how many pairs and, of the reference, why: a line for each device and reason."""
        lines = [f"triton on {group[0].pair.lora_A.device}: {len(group)} pairs" for group in self.groups]
        return [*lines, *(f"reference: {count} pairs, {reason}" for reason, count in self.reasons.items())]


def route_of(problems: Problems, backend: str, shared: bool) -> Route:
    """Return who takes these problems: as in the last step with them, if nothing speaks against it."""
    layouts = [p.layout for p in problems if p.record is not None]
    formats = [form for calls in layouts for _, form in calls]
    route: Route | None = problems.prepared.get("route")
    if route is None or not route.serves(backend, shared, formats):
        route = problems.prepared["route"] = _route(problems, backend, shared, formats)
    if len(layouts) == len(problems):
        for group in route.groups:
            if len(group) == len(problems):
                group.prepared["layouts"] = tuple(layouts)  # for this step alone, where it is taken out
    return route


def _route(problems: Problems, backend: str, shared: bool, formats: Sequence[object]) -> Route:
    by_device: dict[torch.device, list[Problem]] = {}
    rest: list[Problem] = []
    reasons: Counter[str] = Counter()
    settled: dict[int, str | None] = {}
    here: dict[torch.device, str | None] = {}
    for problem in problems:
        device = problem.pair.lora_A.device
        if device not in here:
            here[device] = _without_kernels(backend, device)
        reason = here[device] or triton_backend.unsupported(problem, settled)
        if reason is None and shared and problem.record is not None:
            reason = "captured activations are summed over processes between the turns"
        if reason is None:
            by_device.setdefault(device, []).append(problem)
        else:
            rest.append(problem)
            reasons[reason] += 1
    groups = []
    for group in by_device.values():
        if backend == "auto":
            group, wrong = self_check.parted(group)
            rest += wrong
            unchecked = self_check.undecided(wrong)
            reasons[_UNCHECKED] += unchecked
            reasons[_FAILED] += len(wrong) - unchecked
        if group:
            groups.append(Problems(group))
    route = Route(backend, shared, formats, groups, rest, +reasons)
    if reasons[_UNCHECKED]:
        route.retry()
    _say(problems, reasons, backend)
    return route


def _say(problems: Problems, reasons: Counter[str], backend: str) -> None:
    """Warn, once for each reason, where pairs on CUDA go to the reference though nobody has asked for it."""
    if backend == "reference":
        return
    on_cuda = sum(p.pair.lora_A.device.type == "cuda" for p in problems)
    for reason, count in reasons.items():
        if on_cuda and count and reason not in _SAID and reason != _FAILED:  # of which the check has told
            _SAID.add(reason)
            runtime.warn(
                f"the reference backend takes {count} of {len(problems)} LoRA pairs on CUDA: {reason}. "
                "backend='reference' says that this is meant"
            )


def _at_rate(problems: Problems, scales: Scales) -> tuple[Problems, Scales]:
    """The problems with a controller's factor inside their own lr, which the kernels read from the device."""
    if scales.rate is None:
        return problems, scales
    products: dict[object, Tensor] = {}  # layers of one lr share one tensor: a launch for each would add up
    rated = []
    for p in problems:
        lr = p.options.lr
        name = id(lr) if isinstance(lr, Tensor) else lr
        if name not in products:
            products[name] = lr * scales.rate
        rated.append(replace(p, options=replace(p.options, lr=products[name])))
    return Problems(rated), replace(scales, rate=None)


def _without_kernels(backend: str, device: torch.device) -> str | None:
    """Why the kernels take nothing on a device, or None where they do."""
    if backend == "reference":
        return "backend='reference'"
    if backend == "triton":
        return None
    if device.type != "cuda":
        return f"backend='auto' takes the kernels on CUDA, not on {device.type}"
    reason = triton_backend.unavailable_reason()
    return None if reason is None else f"the Triton kernels cannot be used: {reason}"


def refused(buckets: Sequence[Bucket], others: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return whether a gradient, or what will be written, is not finite; 0-d bool on `device`, nothing waits for it.

    Args:
        buckets: What was computed.
        others: Gradients of parameters outside the pairs.
        device: Where the answer is wanted.
    """
    own = [bucket for bucket in buckets if bucket.update.refused is None]
    tensors = [grad for bucket in own for p in bucket.problems for grad in (p.dA, p.dB)]
    tensors += [*others, *(tensor for bucket in own for tensor in bucket.tensors())]
    flags = [bucket.update.refused.to(device) for bucket in buckets if bucket.update.refused is not None]
    if tensors or not flags:
        flags.append(~all_finite(tensors, device))
    return flags[0] if len(flags) == 1 else torch.stack(flags).any()


def nonfinite(buckets: Sequence[Bucket], others: Sequence[Tensor]) -> list[str]:
    """Return the names of what has a gradient that is not finite or, if nothing has, of layers whose update is not.

    One such gradient makes the common factor of clipping NaN, and with it every update. Waits for the device.

    Args:
        buckets: What was computed.
        others: Gradients of parameters outside the pairs.
    """
    problems = [problem for bucket in buckets for problem in bucket.problems]
    names = [p.pair.name for p in problems if not (_finite(p.dA) and _finite(p.dB))]
    if not all(map(_finite, others)):
        names.append("parameters outside the LoRA pairs")
    if names:
        return names
    for bucket in buckets:
        results = torch.stack([torch.isfinite(t).flatten(1).all(1) for t in bucket.tensors()]).all(0)
        names += [p.pair.name for p, finite in zip(bucket.problems, results.tolist(), strict=True) if not finite]
    return names


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def stage(buckets: Sequence[Bucket], ok: Tensor) -> list[Callable[[], object]]:
    """Return what writes every update where `ok`, a 0-d bool, holds, and changes no bit where it does not.

    Memory is asked for here and not by the writing, so that a lack of it cannot leave some layers written.
    """
    if runtime.at_hand(ok.device) and not bool(ok):
        return []
    writes: list[Callable[[], object]] = []
    for bucket in buckets:
        writes += bucket.update.stage(ok)
    return writes
