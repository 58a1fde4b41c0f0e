"""The problems of a step: every pair that has gradients, with the best representation of G that is at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from psilora.adapters import LoRAPair, is_sparse
from psilora.capture import Capture
from psilora.consensus import Joint
from psilora.options import Options
from psilora.problem import Problem
from psilora.sharded import Gathered, whole
from psilora.state import init_state


def collect(
    settings: Sequence[tuple[LoRAPair, Options]],
    capture: Capture,
    joints: Mapping[int, Joint],
    states: Mapping[Tensor, dict[str, Any]],
    gathered: Gathered,
) -> tuple[list[Problem], list[str], list[str]]:
    """Return the problems, and the names of two kinds of pairs.

    Those whose gradient came without the activations that were to come, and those of which one factor has none.
    Creates state where it is missing. The same pairs are taken in all processes: `joints`, by id of the pair, decide.

    Raises:
        RuntimeError: A metric has no activations, gradient="backward" saw several calls, or a gradient is sparse.
    """
    problems, blind, halved = [], [], []
    for pair, options in settings:
        dA, dB, joint = pair.lora_A.grad, pair.lora_B.grad, joints[id(pair)]
        if dA is None or dB is None:
            if dA is not dB:
                halved.append(pair.name)
            continue
        if is_sparse(dA) or is_sparse(dB):
            raise RuntimeError(f"{pair.name}: sparse gradients are not supported; use dense ones")
        record = capture.record(pair)
        if record is not None and joint.captured and not record.captured:
            record.stand_in()
        if record is not None and not joint.captured:
            if options.metric is not None:
                raise RuntimeError(f"{pair.name}: the metric needs activations, but none were captured in this step")
            blind.append(pair.name)
            record = None
        if record is not None and record.holds == "cross" and joint.calls > 1:
            raise RuntimeError(
                f"{pair.name}: gradient='backward' takes one call of a layer per step, there were {joint.calls}; "
                "for accumulation and several forwards use gradient='dense' or 'exact'"
            )
        work = gathered.pair(pair)
        state_A, state_B = states[pair.lora_A], states[pair.lora_B]
        init_state(work, options, state_B, state_A)
        exact = record is not None and record.holds != "nothing"
        problems.append(
            Problem(
                work, options, _matrix(dA), _matrix(dB), record, exact, state_A=state_A, state_B=state_B, joint=joint
            )
        )
    return problems, blind, halved


def _matrix(gradient: Tensor) -> Tensor:
    return whole(gradient.detach()).flatten(1)
