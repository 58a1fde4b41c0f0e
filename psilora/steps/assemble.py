"""The problems of a step: every pair that has gradients, with the best representation of G that is at hand.

A step looks at thousands of tensors, of which hardly anything changes but the addresses of the gradients: what a step
has found is kept for the next one (`Assembler`), and looked at again as whole lists, without work for each layer.
"""

from __future__ import annotations

import collections
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from psilora.adapters.pair import LoRAPair, is_sparse
from psilora.capture.discards import all_zero, present
from psilora.capture.hooks import Capture
from psilora.distributed.sharding import Gathered, whole
from psilora.options.base import Options
from psilora.runtime import capturing
from psilora.steps.counts import GlobalCounts
from psilora.steps.problem import Problem, Problems
from psilora.steps.state import init_state


@dataclass
class Collected:
    """The pairs of a step.

    Attributes:
        problems: Those that are trained by it.
        blind: Names of those among them whose gradient came without the activations that were to come.
        halved: Names of those that are not, because one factor has no gradient or is frozen.
        still: All that are not.
        moving: The pairs of the problems, as the optimizer knows them.
        device_types: Of the problems' tensors.
    """

    problems: Problems = field(default_factory=Problems)
    blind: list[str] = field(default_factory=list)
    halved: list[str] = field(default_factory=list)
    still: list[LoRAPair] = field(default_factory=list)
    moving: list[LoRAPair] = field(default_factory=list)
    device_types: set[str] = field(default_factory=set)


#: Sets of pairs whose problems are kept: adapters that take turns each have their own.
KEPT = 4


class Assembler:
    """The problems of an optimizer's steps, kept from one to the next for as long as they hold."""

    def __init__(self) -> None:
        self._kept: collections.OrderedDict[tuple[bool, ...], _Kept] = collections.OrderedDict()
        self._settings: Sequence[tuple[LoRAPair, Options]] = []
        self._parameters: list[Tensor] = []
        self._last: _Kept | None = None

    def collect(
        self,
        settings: Sequence[tuple[LoRAPair, Options]],
        capture: Capture,
        all_counts: Callable[[], Mapping[int, GlobalCounts]],
        states: Mapping[Tensor, dict[str, Any]],
        gathered: Gathered,
        shared: bool = False,
    ) -> Collected:
        """Return what `assemble` does: the very problems of an earlier step where nothing but numbers has changed.

        `settings` is the same list as before where they have not changed. `all_counts` is asked where it has to be.
        `shared` says that several processes decide together what is taken, as where captures are summed, and then every
        step is assembled anew.
        """
        if settings is not self._settings:
            self._settings = settings
            self._parameters = [p for pair, _ in settings for p in (pair.lora_A, pair.lora_B)]
        grads = [p.grad for p in self._parameters]
        there = tuple([grad is not None for grad in grads])
        kept = None if shared else self._kept.get(there)
        if kept is not None and kept.holds(settings, states, grads):
            self._last = kept
            self._kept.move_to_end(there)
            return kept.found
        found = assemble(settings, capture, all_counts(), states, gathered)
        found.device_types = {p.pair.lora_A.device.type for p in found.problems}
        self._last = None
        self._kept.pop(there, None)
        if not shared and _lasts(found, capture):
            self._last = self._kept[there] = _Kept(found, settings, states, grads)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return found

    def release(self) -> None:
        """Let go of the last step's gradients."""
        for problem in self._last.found.problems if self._last is not None else ():
            problem.release()

    def forget(self) -> None:
        """Keep nothing."""
        self._kept.clear()
        self._last = None


def _lasts(found: Collected, capture: Capture) -> bool:
    """Whether what was found can be told by `_Kept` from what would be found anew."""
    plain = all(problem.pair is pair for problem, pair in zip(found.problems, found.moving, strict=True))
    simple = all(p.pair.scale is None and isinstance(p.pair.stated_scaling, (int, float)) for p in found.problems)
    # A captured pair with both gradients that stands still may have been reached by no backward pass, or be frozen.
    looked_at = any(capture.record(pair) is not None and len(present(pair)) == 2 for pair in found.still)
    return bool(found.problems) and plain and simple and not found.blind and not looked_at


class _Kept:
    """A step's problems, and all that they depend on, as lists whose comparison takes no work for each layer.

    Tensors are told by identity and address, in which a storage shows that was swapped behind a tensor (`.data`).
    """

    def __init__(
        self,
        found: Collected,
        settings: Sequence[tuple[LoRAPair, Options]],
        states: Mapping[Tensor, dict[str, Any]],
        grads: Sequence[Tensor | None],
    ) -> None:
        self.found, self.settings = found, settings
        problems = found.problems
        moving = {id(pair) for pair in found.moving}
        self.places = [i for i, (pair, _) in enumerate(settings) if id(pair) in moving]
        self.every = [p for pair, _ in settings for p in (pair.lora_A, pair.lora_B)]
        self.trainable = [p.requires_grad for p in self.every]
        self.parameters = [p for problem in problems for p in (problem.pair.lora_A, problem.pair.lora_B)]
        self.dicts = [state for problem in problems for state in (problem.state_A, problem.state_B)]
        self.values = [value for state in self.dicts for value in state.values()]
        self.tensors = [*self.parameters, *(value for value in self.values if isinstance(value, Tensor))]
        self.looks = self._looks()
        self.scalings = [pair.stated_scaling for pair in found.moving]
        self.addresses = [t.data_ptr() for t in self.tensors]
        own = self._own(grads)
        self.grad_dtypes = [grad.dtype for grad in own]
        self.matrices = all(p.dim() == 2 for p in self.parameters)
        self.records = [(p.record, p.record.holds) for p in problems if p.record is not None]

    def _own(self, grads: Sequence[Any]) -> list[Tensor]:
        """The gradients of the problems, A and B in turn."""
        if 2 * len(self.places) == len(grads):
            return list(grads)
        return [grad for i in self.places for grad in (grads[2 * i], grads[2 * i + 1])]

    def _looks(self) -> tuple[list[torch.dtype], list[torch.Size], list[bool]]:
        """Dtypes, shapes and layouts of the parameters, which a storage of the same address may have changed."""
        own = self.parameters
        return [p.dtype for p in own], [p.shape for p in own], [p.is_contiguous() for p in own]

    def holds(
        self,
        settings: Sequence[tuple[LoRAPair, Options]],
        states: Mapping[Tensor, dict[str, Any]],
        grads: Sequence[Tensor | None],
    ) -> bool:
        """Give the problems their gradients and settings, and return True, if they still hold."""
        if [p.requires_grad for p in self.every] != self.trainable:
            return False
        own = self._own(grads)
        if (
            [t.data_ptr() for t in self.tensors] != self.addresses
            or self._looks() != self.looks
            or [pair.stated_scaling for pair in self.found.moving] != self.scalings
            or [grad.dtype for grad in own] != self.grad_dtypes
            or any([grad.layout is not torch.strided for grad in own])
        ):
            return False
        # Found again by the parameters, since whoever loads or moves a state may have replaced all of it.
        dicts = [states.get(p) for p in self.parameters]
        if not all(map(operator.is_, dicts, self.dicts)):
            return False
        values = [value for state in self.dicts for value in state.values()]
        if len(values) != len(self.values) or not all(map(operator.is_, values, self.values)):
            return False
        for record, holds in self.records:
            if (
                record.holds != holds
                or not record.captured
                or record.overlaid
                or (holds == "cross" and record.calls > 1)
            ):
                return False
        return self._renew(settings, own)

    def _renew(self, settings: Sequence[tuple[LoRAPair, Options]], own: Sequence[Tensor]) -> bool:
        problems = self.found.problems
        if settings is not self.settings:
            if len(settings) != len(self.settings):
                return False
            structures: dict[tuple[int, int], bool] = {}  # settings are shared by the pairs of a group
            for (pair, options), (known, old) in zip(settings, self.settings, strict=True):
                both = id(options), id(old)
                if both not in structures:
                    structures[both] = _alike(options, old)
                if pair is not known or not structures[both]:
                    return False
            self.settings = settings
            for problem, place in zip(problems, self.places, strict=True):
                problem.options = settings[place][1]
        if not self.matrices:
            own = [_matrix(grad) for grad in own]
        for problem, dA, dB in zip(problems, own[::2], own[1::2], strict=True):
            problem.dA, problem.dB = dA, dB
        return True


def _alike(one: Options, other: Options) -> bool:
    """Whether settings differ in numbers alone, so that problems and their state serve both."""
    return (
        type(one) is type(other)
        and one.structure == other.structure
        and one.hooks == other.hooks
        and one.momentum_setting == other.momentum_setting
    )


def assemble(
    settings: Sequence[tuple[LoRAPair, Options]],
    capture: Capture,
    all_counts: Mapping[int, GlobalCounts],
    states: Mapping[Tensor, dict[str, Any]],
    gathered: Gathered,
) -> Collected:
    """Return the problems, and what there is to say about pairs.

    A pair is left alone, by None in `.grad` as by zeros, where no call of its layer has reached backward since the last
    step: it saw no rows. Without captures a zero cannot be told from the gradient of a call, and is one. A pair with a
    frozen factor is left alone whatever its gradients are. Creates state where it is missing. The same pairs are taken
    in all processes: `all_counts`, by id of the pair, decide.

    Raises:
        RuntimeError: A metric has no activations, gradient="backward" saw several calls, K-FAC's sums one call in two
            backward passes, or a gradient is sparse.
    """
    found = Collected()
    unreached = _unreached([pair for pair, _ in settings], capture, all_counts)
    for pair, options in settings:
        dA, dB, counts = pair.lora_A.grad, pair.lora_B.grad, all_counts[id(pair)]
        if dA is None or dB is None or not pair.trainable or id(pair) in unreached:
            if dA is not dB and (dA is None or dB is None or pair.lora_A.requires_grad != pair.lora_B.requires_grad):
                found.halved.append(pair.name)
            if (
                id(pair) in unreached and pair.trainable
            ):  # torch's distributed checkpoints make a step of zeros to have the state created
                init_state(pair, options, states[pair.lora_B], states[pair.lora_A])
            found.still.append(pair)
            continue
        if is_sparse(dA) or is_sparse(dB):
            raise RuntimeError(f"{pair.name}: sparse gradients are not supported; use dense ones")
        record = capture.record(pair)
        if record is not None and counts.captured and not record.captured:
            record.stand_in()
        if record is not None and not counts.captured:
            if options.metric is not None:
                raise RuntimeError(
                    f"{pair.name}: the metric needs activations, but none were captured in this step: "
                    f"{_why_none(counts, capture)}"
                )
            found.blind.append(pair.name)
            record = None
        if record is not None and record.holds == "cross" and counts.calls > 1:
            raise RuntimeError(
                f"{pair.name}: gradient='backward' takes one call of a layer per step, there were {counts.calls}; "
                "for accumulation and several forwards use gradient='dense' or 'exact'"
            )
        if record is not None and counts.overlaid:
            raise RuntimeError(
                f"{pair.name}: two backward passes went through one forward pass, and the sums that "
                f"gradient={options.gradient!r} keeps of each for metric={options.metric!r} do not add up; take one "
                "backward of the sum of the losses, or gradient='exact'"
            )
        work = gathered.pair(pair)
        state_A, state_B = states[pair.lora_A], states[pair.lora_B]
        init_state(work, options, state_B, state_A)
        exact = record is not None and record.holds != "nothing"
        found.moving.append(pair)
        found.problems.append(
            Problem(
                work, options, _matrix(dA), _matrix(dB), record, exact, state_A=state_A, state_B=state_B, counts=counts
            )
        )
    return found


def _unreached(pairs: Sequence[LoRAPair], capture: Capture, all_counts: Mapping[int, GlobalCounts]) -> set[int]:
    """The ids of captured pairs with gradients of zero that no backward pass has reached in any process.

    On CUDA, to look at gradients that no pass has left there waits for the device.
    """
    asked = [
        pair
        for pair in pairs
        if capture.attached and capture.record(pair) is not None and all_counts[id(pair)].unreached
        if len(present(pair)) == 2 and not any(map(is_sparse, present(pair))) and not capturing(pair.lora_A.device)
    ]
    return {id(pair) for pair, zero in zip(asked, all_zero(asked), strict=True) if zero}


def _why_none(counts: GlobalCounts, capture: Capture) -> str:
    """Why a gradient came without activations."""
    if not capture.attached:
        return "the optimizer was detached; build a new one"
    if counts.unreached:
        return (
            "no backward pass has reached the layer since the last step, and its .grad is not zero: it was set by hand "
            "or is left from an earlier step; call zero_grad() before backward, or use metric=None"
        )
    return (
        "a fused or compiled kernel bypasses lora_A and lora_B; use metric=None for the layer through `groups`, or "
        "have it call its modules"
    )


def _matrix(gradient: Tensor) -> Tensor:
    return whole(gradient.detach()).flatten(1)
