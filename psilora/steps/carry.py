"""What of an optimizer's state outlives a change of the model's adapters."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor, nn

from psilora.adapters.pair import LoRAPair
from psilora.options import Options
from psilora.steps.state import check_pair_state

State = MutableMapping[Any, dict[str, Any]]


def carry_over(
    state: State,
    settings: Sequence[tuple[LoRAPair, Options]],
    others: Sequence[nn.Parameter],
    *,
    reset: bool = False,
) -> list[str]:
    """Drop from `state`, in place, what no longer fits, and return the names of the pairs that begin anew.

    A pair keeps its state while both its factors are the parameters that they were and have the shapes that they had.
    Parameters outside the pairs keep theirs while their shape stays. All else is forgotten.

    Args:
        state: By parameter.
        settings: The pairs that there are now, with their settings.
        others: The other trained parameters.
        reset: Forget the state of every pair.
    """
    anew = []
    kept: dict[int, dict[str, Any]] = {}
    held = {id(parameter): entry for parameter, entry in state.items() if entry}
    for pair, options in settings:
        own = {id(p): held.get(id(p), {}) for p in (pair.lora_A, pair.lora_B)}
        if not reset and all(own.values()) and _fits(pair, options, own):
            kept |= own
        else:
            anew.append(pair.name)
    kept |= {id(p): held[id(p)] for p in others if id(p) in held and _same_shapes(p, held[id(p)])}
    for parameter in list(state):
        if id(parameter) not in kept:
            del state[parameter]
    return anew


def _fits(pair: LoRAPair, options: Options, states: Mapping[int, Mapping[str, Any]]) -> bool:
    try:
        check_pair_state(pair, options, states)
    except ValueError:
        return False
    return True


def _same_shapes(parameter: nn.Parameter, state: Mapping[str, Any]) -> bool:
    return all(t.shape == parameter.shape for t in state.values() if isinstance(t, Tensor) and t.dim() > 0)
