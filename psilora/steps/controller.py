"""The step-size controller "slope": one factor on every adapter's rate, from the slope of the loss along the last step.

A good rate leaves the loss still falling along the step just taken; one that is too large overshoots. The slope is
measured with the new gradient, p₁ = Σ ⟨dA, ΔA⟩ + ⟨dB, ΔB⟩ over all adapters, before any of them moves, and compared
with what it was when the step was taken, p₀ < 0:

    z₀ ← .7·z₀ + .3·|p₀|,  z₁ ← .7·z₁ + .3·p₁,  ρ = z₁/z₀          (−1: as steep as before; > 0: past the valley)
    the first time that ρ > θ: hit = t, s ← s/2
    u = clip((θ − ρ)/θ, −1, 1),  s ← min(20, s·exp(κ·u)),  κ = .3 if u < 0, else .25 before the hit, 1/(10+t−hit) after
    s ← max(s, f),  f = s/4 right after the hit

and s·η takes the place of η. So s starts low, grows until the first overshoot, and then follows ρ = θ ever more slowly.
Everything is on the device, in float64, and decided there; processes that average `.grad` keep equal numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from psilora import runtime
from psilora.adapters.pair import LoRAPair, as_matrix
from psilora.linalg.precision import compute_dtype
from psilora.steps.problem import Problem
from psilora.steps.update import Bucket

CONTROLLERS = (None, "slope")
THETA = 0.08
START = 0.03
LARGEST = 20.0
MEMORY = 0.7
FLOOR = 0.25
#: Names of the numbers in the state "controller"; t counts the moves of s, and hit is −1 until there is one;
#: floor is f, 0 until then.
NUMBERS = ("s", "z0", "z1", "p0", "t", "hit", "floor")

State = Mapping[Any, dict[str, Any]]


class SlopeController:
    """The controller of one optimizer.

    State: "change" of every LoRA parameter, its last increment, in its shape and compute dtype; "controller" of the
    first, `NUMBERS` in float64. It moves only where both p₀ and p₁ are finite and not zero: neither at the first step
    nor after lr = 0, nor without a gradient; a skipped step leaves everything as it was.

    Args:
        pairs: All pairs of the optimizer; the numbers lie with the first one's `lora_A`.
    """

    def __init__(self, pairs: Sequence[LoRAPair]) -> None:
        self.pairs = list(pairs)
        self._new: Tensor | None = None

    def init_state(self, state: State) -> None:
        """Create the state where it does not exist yet."""
        first = self.pairs[0].lora_A
        if "controller" not in state[first]:
            numbers = torch.tensor([START, 0.0, 0.0, 0.0, 0.0, -1.0, 0.0], dtype=torch.float64, device="cpu")
            state[first]["controller"] = numbers.to(first.device)
        for pair in self.pairs:
            for parameter in (pair.lora_A, pair.lora_B):
                if "change" not in state[parameter]:
                    change = torch.zeros_like(parameter, dtype=compute_dtype(parameter.dtype))
                    state[parameter]["change"] = change

    def kept(self, state: State) -> Tensor | None:
        """Return `NUMBERS` where there are some, else None."""
        first = self.pairs[0].lora_A
        return state[first].get("controller") if first in state else None

    def adopt(self, numbers: Tensor, state: State) -> None:
        """Take the numbers of a controller of other pairs on the same parameters' state."""
        for entry in state.values():
            entry.pop("controller", None)
        first = self.pairs[0].lora_A
        state[first]["controller"] = numbers.to(first.device)

    def numbers(self, state: State) -> Tensor:
        """Return `NUMBERS` as they are after the last step."""
        numbers: Tensor = state[self.pairs[0].lora_A]["controller"]
        return numbers

    def begin(self, problems: Sequence[Problem], clip: Tensor | None, state: State) -> Tensor:
        """Return s (0-d float64) for this step, from its gradients and the last changes; `end` stores it."""
        self.init_state(state)
        old = self.numbers(state)
        changes = [(p.state_B["change"], p.state_A["change"]) for p in problems]
        self._new = advanced(old, slope(problems, changes, clip, old.device))
        return self._new[0]

    def end(self, buckets: Sequence[Bucket], clip: Tensor | None, ok: Tensor, state: State) -> Callable[[], None]:
        """Return what stores the numbers and the increments of this step where `ok`, a 0-d bool, holds."""
        if self._new is None:
            raise RuntimeError("a controller's step ended before it began")
        problems = [problem for bucket in buckets for problem in bucket.problems]
        changes = [increments for bucket in buckets for increments in bucket.increments()]
        old = self.numbers(state)
        new, self._new = self._new.clone(), None
        new[NUMBERS.index("p0")] = slope(problems, changes, clip, old.device)
        kept_changes = [pair for bucket in buckets for pair in _balanced(bucket)]
        moved = {id(problem.pair) for problem in problems}
        kept = [state["change"] for problem in problems for state in (problem.state_B, problem.state_A)]
        idle = [state[p]["change"] for q in self.pairs if id(q) not in moved for p in (q.lora_A, q.lora_B)]
        sources = [t.view(k.shape) for k, t in zip(kept, itertools.chain(*kept_changes), strict=True)]
        sources += [torch.zeros_like(t) for t in idle]  # without a gradient they stayed where they are
        copies = [*_where(ok, [*kept, *idle], sources), ([old], [torch.where(ok, new, old)])]

        def write() -> None:
            for targets, values in copies:
                torch._foreach_copy_(targets, values)

        return write


def _balanced(bucket: Bucket) -> list[tuple[Tensor, Tensor]]:
    """The increments (ΔB, ΔA) of a bucket as the factors that it commits have made them; see `psilora.steps.gauge`."""
    changes, shifts = bucket.increments(), bucket.shifts
    if shifts is None:
        return changes
    return [(torch.ldexp(B, -k), torch.ldexp(A, k)) for (B, A), k in zip(changes, shifts.unbind(), strict=True)]


def slope(
    problems: Sequence[Problem],
    changes: Sequence[tuple[Tensor, Tensor]],
    clip: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Return Σ ⟨dA, ΔA⟩ + ⟨dB, ΔB⟩ (0-d float64) over all problems, with the gradient as the step sees it.

    Args:
        problems: They hold dA and dB.
        changes: Per problem (ΔB, ΔA), in the compute dtype.
        clip: The common factor on the gradients, 0-d, or None for 1; `maximize` turns their sign.
        device: Where to sum up.
    """
    groups: dict[tuple[object, ...], tuple[list[Tensor], list[Tensor]]] = {}
    for problem, (change_B, change_A) in zip(problems, changes, strict=True):
        for gradient, change in ((problem.dB, change_B), (problem.dA, change_A)):
            key = (gradient.shape, gradient.dtype, gradient.device, change.dtype, problem.options.maximize)
            gradients, moves = groups.setdefault(key, ([], []))
            gradients.append(gradient)
            moves.append(as_matrix(change))
    total = torch.zeros((), dtype=torch.float64, device=device)
    for (*_, maximize), (gradients, moves) in groups.items():
        moved = torch.stack(moves)
        part = (torch.stack(gradients).to(moved.dtype) * moved).sum(dtype=torch.float64).to(device)
        total = total - part if maximize else total + part
    return total if clip is None else total * clip.to(device, torch.float64)


def _where(ok: Tensor, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Return (targets, values), to be copied, with each source where `ok` holds; few launches."""
    if runtime.at_hand(ok.device):
        return [(list(targets), list(sources))] if bool(ok) and targets else []
    groups: dict[tuple[object, ...], tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        old, new = groups.setdefault((target.shape, target.dtype, target.device), ([], []))
        old.append(target)
        new.append(source)
    return [
        (old, list(torch.where(ok.to(old[0].device), torch.stack(new), torch.stack(old)).unbind(0)))
        for old, new in groups.values()
    ]


def advanced(numbers: Tensor, p1: Tensor) -> Tensor:
    """Return `NUMBERS` after one move with the slope p₁, or unchanged where there is nothing to learn."""
    s, z0, z1, p0, t, hit, floor = numbers.unbind()
    live = (p0 != 0) & (p1 != 0) & torch.isfinite(p0) & torch.isfinite(p1)
    t = t + 1
    z0 = MEMORY * z0 + (1 - MEMORY) * p0.abs()
    z1 = MEMORY * z1 + (1 - MEMORY) * p1
    rho = z1 / z0
    first = (hit < 0) & (rho > THETA)
    hit = torch.where(first, t, hit)
    s = torch.where(first, s / 2, s)
    u = ((THETA - rho) / THETA).clamp(-1, 1)
    growing = torch.where(hit < 0, 0.25, 1 / (10 + t - hit))
    kappa = torch.where(u < 0, 0.3, growing)
    s = (s * torch.exp(kappa * u)).clamp(max=LARGEST)
    # Down is faster than up, so a slope that is mostly the noise of small batches would sink s without a floor.
    floor = torch.where(first, FLOOR * s, floor)
    s = torch.maximum(s, floor)
    return torch.where(live, torch.stack([s, z0, z1, p0, t, hit, floor]), numbers)
