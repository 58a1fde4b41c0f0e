"""What a kind of step consists of, for those that have to do with every kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from psilora.adapters.pair import LoRAPair
from psilora.distributed.communicator import Communicator
from psilora.options import Options
from psilora.steps.problem import Problem, Scales
from psilora.steps.update import Update


@dataclass(frozen=True)
class StepKind:
    """One kind of step.

    Attributes:
        options: Its settings; their `step` names it.
        init_state: Creates what a pair's (options, state of lora_B, state of lora_A) lack beside "step".
        updates: The reference: the updates of groups of problems with equal keys, changing nothing; what comes from
            captured activations is summed over the communicator's processes.
        remembers_gradient: Whether the state "momentum" is the pair (B_m, A_m) of μ·B_m·A_m + (1−τ)·G.
        balances: Whether a step with these options may move the factors without moving the weight.
    """

    options: type[Options]
    init_state: Callable[[LoRAPair, Options, dict[str, Any], dict[str, Any]], None]
    updates: Callable[[Sequence[Sequence[Problem]], Scales, Communicator | None], list[Update]]
    remembers_gradient: bool = False
    balances: Callable[[Options], bool] = lambda options: False
