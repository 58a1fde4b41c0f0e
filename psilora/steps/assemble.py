"""The problems of a step: every pair that has gradients, with the best representation of G that is at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from psilora.adapters.pair import LoRAPair, is_sparse
from psilora.capture.discards import all_zero, present
from psilora.capture.hooks import Capture
from psilora.distributed.sharding import Gathered, whole
from psilora.options.base import Options
from psilora.runtime import capturing
from psilora.steps.counts import GlobalCounts
from psilora.steps.problem import Problem
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
    """

    problems: list[Problem] = field(default_factory=list)
    blind: list[str] = field(default_factory=list)
    halved: list[str] = field(default_factory=list)
    still: list[LoRAPair] = field(default_factory=list)
    moving: list[LoRAPair] = field(default_factory=list)


def assemble(
    settings: Sequence[tuple[LoRAPair, Options]],
    capture: Capture,
    joints: Mapping[int, GlobalCounts],
    states: Mapping[Tensor, dict[str, Any]],
    gathered: Gathered,
) -> Collected:
    """Return the problems, and what there is to say about pairs.

    A pair is left alone, by None in `.grad` as by zeros, where no call of its layer has reached backward since the last
    step: it saw no rows. Without captures a zero cannot be told from the gradient of a call, and is one. A pair with a
    frozen factor is left alone whatever its gradients are. Creates state where it is missing. The same pairs are taken
    in all processes: `joints`, by id of the pair, decide.

    Raises:
        RuntimeError: A metric has no activations, gradient="backward" saw several calls, K-FAC's sums one call in two
            backward passes, or a gradient is sparse.
    """
    found = Collected()
    unreached = _unreached([pair for pair, _ in settings], capture, joints)
    for pair, options in settings:
        dA, dB, joint = pair.lora_A.grad, pair.lora_B.grad, joints[id(pair)]
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
        if record is not None and joint.captured and not record.captured:
            record.stand_in()
        if record is not None and not joint.captured:
            if options.metric is not None:
                raise RuntimeError(
                    f"{pair.name}: the metric needs activations, but none were captured in this step: "
                    f"{_why_none(joint, capture)}"
                )
            found.blind.append(pair.name)
            record = None
        if record is not None and record.holds == "cross" and joint.calls > 1:
            raise RuntimeError(
                f"{pair.name}: gradient='backward' takes one call of a layer per step, there were {joint.calls}; "
                "for accumulation and several forwards use gradient='dense' or 'exact'"
            )
        if record is not None and joint.overlaid:
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
                work, options, _matrix(dA), _matrix(dB), record, exact, state_A=state_A, state_B=state_B, joint=joint
            )
        )
    return found


def _unreached(pairs: Sequence[LoRAPair], capture: Capture, joints: Mapping[int, GlobalCounts]) -> set[int]:
    """The ids of captured pairs with gradients of zero that no backward pass has reached in any process.

    On CUDA, to look at gradients that no pass has left there waits for the device.
    """
    asked = [
        pair
        for pair in pairs
        if capture.attached and capture.record(pair) is not None and joints[id(pair)].unreached
        if len(present(pair)) == 2 and not any(map(is_sparse, present(pair))) and not capturing(pair.lora_A.device)
    ]
    return {id(pair) for pair, zero in zip(asked, all_zero(asked), strict=True) if zero}


def _why_none(joint: GlobalCounts, capture: Capture) -> str:
    """Why a gradient came without activations."""
    if not capture.attached:
        return "the optimizer was detached; build a new one"
    if joint.unreached:
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
