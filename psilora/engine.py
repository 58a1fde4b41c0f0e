"""All layers at once: bucket the problems of a step, compute every bucket on its backend, then commit together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from psilora import triton_backend, trust
from psilora.distributed import Communicator, lockstep
from psilora.options import BACKENDS
from psilora.problem import Problem, Scales, Update, grouped
from psilora.reference import reference_steps
from psilora.spectral import spectral_updates


@dataclass
class Bucket:
    """Problems computed together, and their update, which may still lie in a backend's workspaces."""

    problems: list[Problem]
    update: Update | triton_backend.Execution

    def increments(self) -> list[tuple[Tensor, Tensor]]:
        """Return (step of B (d_out, r), step of A (r, d_in)) per problem, as they will be added to the parameters."""
        return self.update.increments()

    def tensors(self) -> list[Tensor]:
        """Return tensors (L, …) that are finite where what will be written is, in the parameters' own dtypes too.

        A sum in 16 bits is bounded by the largest entries of parameter and increment together.
        """
        found = self.update.tensors()
        sides = [[p.pair.lora_B for p in self.problems], [p.pair.lora_A for p in self.problems]]
        if all(parameters[0].dtype.itemsize > 2 for parameters in sides):
            return found
        for parameters, steps in zip(sides, zip(*self.increments(), strict=True), strict=True):
            old = torch.stack(torch._foreach_norm([p.detach() for p in parameters], float("inf")))
            change = torch.stack(torch._foreach_norm(list(steps), float("inf")))
            found.append((old + change).to(old.dtype)[:, None])
        return found


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

    "auto" takes the Triton kernels for problems on CUDA, once they have proved right there (see `trust`), and the
    reference elsewhere; "triton" takes them wherever they run. Problems that the kernels do not support
    (`triton_backend.unsupported`, e.g. fp64) go to the reference, and so do those with captured activations where a
    communicator of several processes is given: there the products are summed between the turns. `backends` is what the
    kernels keep from step to step.
    """
    shared = communicator is not None and communicator.world_size > 1
    by_device: dict[torch.device, list[Problem]] = {}
    rest: list[Problem] = []
    for problem in problems:
        device = problem.pair.lora_A.device
        takes = _takes_kernels(backend, device) and triton_backend.unsupported(problem) is None
        takes = takes and not (shared and problem.record is not None)
        (by_device.setdefault(device, []) if takes else rest).append(problem)
    buckets = []
    for group in by_device.values():
        taken = trust if backend == "auto" else triton_backend
        executions = taken.compute(*_at_rate(group, scales), backends)
        if executions is None:
            rest += group
        else:
            buckets += [Bucket(execution.problems, execution) for execution in executions]
    gradient = grouped([p for p in rest if p.options.step == "gradient"])
    updates = lockstep([reference_steps(group, scales) for group in gradient], communicator)
    spectral = grouped([p for p in rest if p.options.step == "spectral"])
    updates += spectral_updates(spectral, scales)
    return buckets + [Bucket(*pair) for pair in zip(gradient + spectral, updates, strict=True)]


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
        return device.type == "cuda" and triton_backend.unavailable_reason() is None
    return backend == "triton"


def all_finite(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return whether every entry of every tensor is finite, as a 0-d bool on `device`, without waiting for it."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            by_device.setdefault(tensor.device, []).append(tensor)
    flags = [_group_finite(group).to(device) for group in by_device.values()]
    return torch.stack(flags).all() if flags else torch.ones((), dtype=torch.bool, device=device)


def _group_finite(tensors: list[Tensor]) -> Tensor:
    """Whether all entries of tensors on one device are finite.

    On the CPU ‖·‖_∞ is eight times slower than ‖·‖₂, whose overflow of finite entries is looked at again.
    """
    if tensors[0].device.type != "cpu":
        return torch.isfinite(torch.stack([norm.double() for norm in torch._foreach_norm(tensors, float("inf"))])).all()
    finite = torch.isfinite(torch.stack(list(torch._foreach_norm(tensors)))).all()
    if not bool(finite):
        finite = torch.isfinite(torch.stack([bound for tensor in tensors for bound in tensor.aminmax()])).all()
    return finite


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
    if ok.device.type == "cpu" and not bool(ok):
        return []
    writes: list[Callable[[], object]] = []
    for bucket in buckets:
        if isinstance(bucket.update, triton_backend.Execution):
            writes.append(partial(bucket.update.commit, ok.to(bucket.problems[0].pair.lora_A.device)))
        else:
            writes += _staged(bucket.problems, bucket.update, ok)
    return writes


def _staged(problems: Sequence[Problem], update: Update, ok: Tensor) -> list[Callable[[], object]]:
    here = ok.to(update.step_A.device)
    writes: list[Callable[[], object]] = []
    for step, parameters in (
        (update.step_A, [p.pair.lora_A for p in problems]),
        (update.step_B, [p.pair.lora_B for p in problems]),
    ):
        # x − (+0) is x bitwise for every x, and 0 − (±0) is +0: an increment of zero leaves even a −0 as it is.
        negated = (0.0 - step).view(len(parameters), *parameters[0].shape)
        if here.device.type != "cpu":  # there `stage` has looked already
            negated = torch.where(here, negated, 0.0)
        writes.append(partial(torch._foreach_sub_, [p.detach() for p in parameters], list(negated.unbind(0))))
    for name, new_B, new_A in (
        ("momentum", update.momentum_B, update.momentum_A),
        ("metric", update.metric_B, update.metric_A),
        ("metric_rest", update.rest_B, update.rest_A),
        ("norms", update.norms, None),
    ):
        for states, new in (([p.state_B for p in problems], new_B), ([p.state_A for p in problems], new_A)):
            if new is not None:
                targets = [state[name] for state in states]
                chosen = new if ok.device.type == "cpu" else torch.where(ok, new, torch.stack(targets))
                writes.append(partial(torch._foreach_copy_, targets, list(chosen.unbind(0))))
    steps = [state["step"] for p in problems for state in (p.state_A, p.state_B)]
    return [*writes, partial(torch._foreach_add_, steps, here.to(steps[0]))]
