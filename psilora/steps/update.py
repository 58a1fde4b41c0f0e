"""What a backend returns for a batch of problems, whether it is finite, and how it is written."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from psilora import runtime
from psilora.steps import gauge
from psilora.steps.problem import Problem


@dataclass
class Update:
    """The result for L stacked problems, to be committed together.

    Attributes:
        problems: The problems, in order.
        step_B, step_A: Increments of the parameters, (L, d_out, r) and (L, r, d_in), in the compute dtype.
        momentum_B, momentum_A, metric_B, metric_A: New state, or None where there is none.
        repaired: Number of r×r solves with a repaired pivot, 0-d int64.
        rest_B, rest_A: New state of a low-rank metric beside the above, or None.
        norms: New state of a spectral step's gradient norms (L, 3), or None.
    """

    problems: list[Problem]
    step_B: Tensor
    step_A: Tensor
    momentum_B: Tensor | None
    momentum_A: Tensor | None
    metric_B: Tensor | None
    metric_A: Tensor | None
    repaired: Tensor
    rest_B: Tensor | None = None
    rest_A: Tensor | None = None
    norms: Tensor | None = None
    refused = None

    def increments(self) -> list[tuple[Tensor, Tensor]]:
        """Return (step of B (d_out, r), step of A (r, d_in)) per problem."""
        return list(zip(self.step_B, self.step_A, strict=True))

    @functools.cached_property
    def shifts(self) -> Tensor | None:
        """See `Computed`."""
        moved = (self.step_B != 0).flatten(1).any(1) | (self.step_A != 0).flatten(1).any(1)
        return gauge.shifts(self.problems, moved)

    def tensors(self) -> list[Tensor]:
        """The floating tensors that will be written."""
        steps, momentum = (self.step_B, self.step_A), (self.momentum_B, self.momentum_A)
        every = (*steps, *momentum, self.metric_B, self.metric_A, self.rest_B, self.rest_A, self.norms)
        return [t for t in every if t is not None]

    def stage(self, ok: Tensor) -> list[Callable[[], object]]:
        """See `Computed`. Memory is asked for here and not by the writing, so that a lack of it leaves none written."""
        problems = self.problems
        here, shifts = ok.to(self.step_A.device), self.shifts
        if shifts is not None and runtime.at_hand(here.device) and not bool(shifts.any()):
            shifts = None
        writes: list[Callable[[], object]] = []
        for step, parameters, sign in (
            (self.step_A, [p.pair.lora_A for p in problems], 1),
            (self.step_B, [p.pair.lora_B for p in problems], -1),
        ):
            targets = [p.detach() for p in parameters]
            # x − (+0) is x bitwise for every x, and 0 − (±0) is +0: an increment of zero leaves even a −0 as it is.
            negated = 0.0 - step
            if not runtime.at_hand(here.device):  # there `stage` has looked already
                negated = torch.where(here, negated, 0.0)
            write: Callable[..., object] = torch._foreach_sub_
            new = negated
            if shifts is not None:
                old = torch.stack([t.flatten(1) for t in targets])
                power = (sign * shifts * here)[:, None, None]
                write = torch._foreach_copy_
                new = torch.ldexp((old.to(negated.dtype) - negated).to(old.dtype), power)
            # Layers of one bucket share the matrix's shape, not the parameter's: kernels stand beside linears' weights.
            shaped = [matrix.view(p.shape) for matrix, p in zip(new.unbind(0), parameters, strict=True)]
            writes.append(partial(write, targets, shaped))
        momentum_B, momentum_A = self.momentum_B, self.momentum_A
        if shifts is not None and momentum_B is not None and momentum_A is not None and problems[0].options.on_factors:
            momentum_B = torch.ldexp(momentum_B, shifts[:, None, None])
            momentum_A = torch.ldexp(momentum_A, -shifts[:, None, None])
        for name, new_B, new_A in (
            ("momentum", momentum_B, momentum_A),
            ("metric", self.metric_B, self.metric_A),
            ("metric_rest", self.rest_B, self.rest_A),
            ("norms", self.norms, None),
        ):
            for states, found in (([p.state_B for p in problems], new_B), ([p.state_A for p in problems], new_A)):
                if found is not None:
                    targets = [state[name] for state in states]
                    chosen = found if runtime.at_hand(ok.device) else torch.where(ok, found, torch.stack(targets))
                    writes.append(partial(torch._foreach_copy_, targets, list(chosen.unbind(0))))
        steps = [state["step"] for p in problems for state in (p.state_A, p.state_B)]
        return [*writes, partial(torch._foreach_add_, steps, here.to(steps[0]))]


class Computed(Protocol):
    """The update of some problems, wherever it lies; nothing is written yet.

    Attributes:
        problems: The problems, in order.
    """

    problems: list[Problem]

    @property
    def refused(self) -> Tensor | None:
        """Whether anything is not finite, a 0-d bool: a gradient, or what will be written in the parameters' dtypes.

        None where nobody has looked yet.
        """
        ...

    @property
    def repaired(self) -> Tensor:
        """Number of r×r solves with a repaired pivot, 0-d int64."""
        ...

    @property
    def shifts(self) -> Tensor | None:
        """The k of each layer, whose factors are committed as (B·2⁻ᵏ, 2ᵏ·A), or None; see `psilora.steps.gauge`."""
        ...

    def increments(self) -> list[tuple[Tensor, Tensor]]:
        """Return (step of B (d_out, r), step of A (r, d_in)) per problem."""
        ...

    def tensors(self) -> list[Tensor]:
        """Return tensors (L, …) that are finite where what will be written is."""
        ...

    def stage(self, ok: Tensor) -> list[Callable[[], object]]:
        """Return what writes parameters and state where `ok`, a 0-d bool, holds, and changes no bit where it does not.

        On the CPU it is only asked for where `ok` holds.
        """
        ...


@dataclass
class Bucket:
    """Problems computed together, and their update, which may still lie in a backend's workspaces."""

    problems: list[Problem]
    update: Computed

    @property
    def shifts(self) -> Tensor | None:
        """The k of each layer, whose factors are committed as (B·2⁻ᵏ, 2ᵏ·A), or None; see `psilora.steps.gauge`."""
        return self.update.shifts

    def increments(self) -> list[tuple[Tensor, Tensor]]:
        """Return (step of B (d_out, r), step of A (r, d_in)) per problem, as they will be added to the parameters."""
        return self.update.increments()

    def tensors(self) -> list[Tensor]:
        """Return tensors (L, …) that are finite where what will be written is, in the parameters' own dtypes too.

        A sum in 16 bits is bounded by the largest entries of parameter and increment together.
        """
        found = self.update.tensors()
        if self.update.refused is not None:
            return found
        sides = [[p.pair.lora_B for p in self.problems], [p.pair.lora_A for p in self.problems]]
        if all(parameters[0].dtype.itemsize > 2 for parameters in sides):
            return found
        for parameters, steps in zip(sides, zip(*self.increments(), strict=True), strict=True):
            old = torch.stack(torch._foreach_norm([p.detach() for p in parameters], float("inf")))
            change = torch.stack(torch._foreach_norm(list(steps), float("inf")))
            found.append((old + change).to(old.dtype)[:, None])
        return found


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
    if not runtime.at_hand(tensors[0].device):
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
        norms = [torch.stack(torch._foreach_norm(group, float("inf"))) for group in by_dtype.values()]
        return torch.stack([torch.isfinite(group).all() for group in norms]).all()
    finite = torch.isfinite(torch.stack(list(torch._foreach_norm(tensors)))).all()
    if not bool(finite):
        finite = torch.isfinite(torch.stack([bound for tensor in tensors for bound in tensor.aminmax()])).all()
    return finite
