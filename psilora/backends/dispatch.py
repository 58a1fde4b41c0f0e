"""All layers at once: bucket the problems of a step, compute every bucket on its backend, then commit together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from psilora import runtime
from psilora.backends import self_check
from psilora.backends.triton import backend as triton_backend
from psilora.distributed.communicator import Communicator
from psilora.options.base import BACKENDS
from psilora.steps import STEPS
from psilora.steps.problem import Problem, Scales, grouped
from psilora.steps.update import Bucket

#: Why "auto" had to do without the kernels on CUDA, said once.
_SAID: set[str] = set()


def check_backend(backend: str) -> None:
    """Raise for a backend that does not exist or cannot run here; "auto" always can."""
    if backend not in BACKENDS:
        raise ValueError(f"Invalid backend={backend!r}. Must be one of {', '.join(map(repr, BACKENDS))}.")
    reason = backend_unavailable(backend)
    if reason is not None:
        raise ValueError(f"backend={backend!r} is not available: {reason}; use 'auto' or 'reference'")


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
    by_device: dict[torch.device, list[Problem]] = {}
    rest: list[Problem] = []
    settled: dict[int, str | None] = {}
    here: dict[torch.device, bool] = {}
    for problem in problems:
        device = problem.pair.lora_A.device
        if device not in here:
            here[device] = _takes_kernels(backend, device)
        takes = here[device] and triton_backend.unsupported(problem, settled) is None
        takes = takes and not (shared and problem.record is not None)
        (by_device.setdefault(device, []) if takes else rest).append(problem)
    buckets: list[Bucket] = []
    for group in by_device.values():
        if backend == "auto":
            group, wrong = self_check.parted(group)
            rest += wrong
        taken = self_check if backend == "auto" else triton_backend
        executions = taken.compute(*_at_rate(group, scales), backends) if group else []
        if executions is None:
            rest += group
        else:
            buckets += [Bucket(execution.problems, execution) for execution in executions]
    for step, kind in STEPS.items():
        updates = kind.updates(grouped([p for p in rest if p.options.step == step]), scales, communicator)
        buckets += [Bucket(update.problems, update) for update in updates]
    return buckets


def _at_rate(problems: Sequence[Problem], scales: Scales) -> tuple[list[Problem], Scales]:
    """The problems with a controller's factor inside their own lr, which the kernels read from the device."""
    if scales.rate is None:
        return list(problems), scales
    products: dict[object, Tensor] = {}  # layers of one lr share one tensor: a launch for each would add up
    rated = []
    for p in problems:
        lr = p.options.lr
        name = id(lr) if isinstance(lr, Tensor) else lr
        if name not in products:
            products[name] = lr * scales.rate
        rated.append(replace(p, options=replace(p.options, lr=products[name])))
    return rated, replace(scales, rate=None)


def _takes_kernels(backend: str, device: torch.device) -> bool:
    if backend == "auto":
        if device.type != "cuda":
            return False
        reason = triton_backend.unavailable_reason()
        if reason is not None and reason not in _SAID:
            _SAID.add(reason)
            runtime.warn(
                f"the reference backend takes the steps on {device}, because the Triton kernels cannot be used: "
                f"{reason}. backend='reference' says that this is meant"
            )
        return reason is None
    return backend == "triton"


def nonfinite(buckets: Sequence[Bucket]) -> list[str]:
    """Return the names of the layers whose gradient or update is not finite; waits for the device."""
    names = []
    for bucket in buckets:
        results = torch.stack([torch.isfinite(t).flatten(1).all(1) for t in bucket.tensors()]).all(0)
        for problem, finite in zip(bucket.problems, results.tolist(), strict=True):
            if not (finite and bool(torch.isfinite(problem.dA).all()) and bool(torch.isfinite(problem.dB).all())):
                names.append(problem.pair.name)
    return names


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
