"""Param groups of LoRA pairs: which layer takes which settings."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from psilora.adapters.find import find_pairs, none_found
from psilora.adapters.pair import LoRAPair, describe
from psilora.options import (
    GROUP_KEYS,
    Options,
    SpectralOptions,
    as_group,
    inherited,
    refuse_foreign,
    resolved,
)
from psilora.options.checks import check_rate
from psilora.options.metrics import DENSE_LIMIT
from psilora.param_groups.chosen import Chosen

#: So many pairs take the whole rate; of more, each takes less.
FULL_RATE_PAIRS = 12


def checked_pairs(model: nn.Module, unsupported: str) -> list[LoRAPair]:
    """Return the pairs of `model`, or raise by name; `unsupported` is "raise" or "adamw"."""
    pairs, refused = find_pairs(model)
    if refused and (unsupported == "raise" or not pairs):
        advice = "freeze them, or train them with AdamW by unsupported='adamw'"
        if not pairs:
            advice = "no other pair is trainable: where that is meant, train this model with torch.optim.AdamW"
        raise ValueError(f"these adapters cannot be trained as ΔW = s·B·A: {describe(refused)}; {advice}")
    if not pairs:
        raise ValueError(f"no trainable LoRA pair (lora_A, lora_B) found in the model: {none_found(model)}")
    return pairs


def lora_groups(
    pairs: Sequence[LoRAPair],
    settings: Mapping[str, Any],
    overrides: Sequence[Mapping[str, Any]],
    *,
    strict: bool = True,
) -> list[tuple[int, dict[str, Any]]]:
    """Split the pairs into param groups, without empty ones: number 0 for the rest, then one per override.

    Args:
        pairs: Of the model.
        settings: Those of all pairs.
        overrides: {"layers": …, **settings}, with known keys.
        strict: Whether an override for which no pair is left, or a name in its list that no pair has, is an error.
    """
    groups = [{**as_group(resolved(settings)), "kind": "lora", "params": []}]
    choices: list[Chosen] = []
    for override in overrides:
        chosen = inherited(settings, override)
        group = {**as_group(resolved(chosen)), "kind": "lora", "params": []}
        refuse_foreign(override, chosen["step"])
        choices.append(Chosen("layers", group.pop("layers")))
        Options.from_group(group)
        groups.append(group)
    for group in groups:
        check_rate(group["lr"])
    for pair in pairs:
        # The path of the module alone will do, where the name ends in the adapter's.
        index = next((i for i, chosen in enumerate(choices, start=1) if chosen.means(pair.path, pair.name)), 0)
        check_pair(pair, Options.from_group(groups[index]))
        groups[index]["params"] += [pair.lora_A, pair.lora_B]
    names = [pair.name for pair in pairs]
    for choice in choices if strict else ():
        choice.check([*names, *(pair.path for pair in pairs)], names)
    for override, group in zip(overrides, groups[1:], strict=True):
        if strict and not group["params"]:
            raise ValueError(f"no layer is left for layers={override['layers']!r}; there are {', '.join(names[:8])}…")
    return [(i, group) for i, group in enumerate(groups) if group["params"]]


def share_depth(groups: Sequence[dict[str, Any]]) -> None:
    """Replace depth_scale="auto" by min(1, √(12/n)), n pairs with a spectral step, so that √n·depth_scale has a bound.

    With it the norm of all steps together, η·(Σ‖c·O‖²)^½, does not grow with n.
    """
    spectral = [group for group in groups if group[GROUP_KEYS["step"]] == SpectralOptions.step]
    count = sum(len(group["params"]) // 2 for group in spectral)
    for group in spectral:
        if group["depth_scale"] == "auto":
            group["depth_scale"] = min(1.0, (FULL_RATE_PAIRS / count) ** 0.5)


def pair_options(groups: Sequence[Mapping[str, Any]], pairs: Mapping[int, LoRAPair]) -> list[tuple[LoRAPair, Options]]:
    """Return every pair of the LoRA groups with the settings of its group; `pairs` by id of their lora_A."""
    found: list[tuple[LoRAPair, Options]] = []
    for group in groups:
        if group["kind"] == "lora":
            options = Options.from_group(group)
            own = [pairs[id(p)] for p in group["params"][::2] if id(p) in pairs]
            if len(group["params"]) != 2 * len(own):
                raise RuntimeError(
                    "the LoRA parameters of a group were replaced after construction, as DeepSpeed ZeRO does; "
                    "use DDP or a single device"
                )
            found += [(pair, options) for pair in own]
    return found


class Settings:
    """The settings of every pair as the param groups hold them now, read anew only where something in them changed.

    Args:
        pairs: By id of their lora_A.
    """

    def __init__(self, pairs: Mapping[int, LoRAPair]) -> None:
        self._pairs = pairs
        self._seen: list[list[Any]] = []
        self._found: list[tuple[LoRAPair, Options]] = []

    def read(self, groups: Sequence[Mapping[str, Any]]) -> list[tuple[LoRAPair, Options]]:
        """Return what `pair_options` does: the same list, not to be changed, for as long as nothing has changed."""
        seen = [[*group, *group.values(), *group["params"]] for group in groups if group["kind"] == "lora"]
        same = len(seen) == len(self._seen) and all(map(_identical, seen, self._seen))
        if not same:
            self._found = pair_options(groups, self._pairs)
            self._seen = seen
        return self._found


def _identical(one: Sequence[object], other: Sequence[object]) -> bool:
    return len(one) == len(other) and all(map(operator.is_, one, other))


def check_pair(pair: LoRAPair, options: Options) -> None:
    """Raise ValueError, by name, for settings that a pair of this shape cannot have."""
    momentum_rank(pair, options)
    if options.form == "dense" and max(pair.d_out, pair.d_in) > DENSE_LIMIT:
        raise ValueError(
            f"{pair.name} is {pair.d_out}×{pair.d_in}: metric={options.metric!r} keeps and decomposes matrices d×d, "
            f"for d <= {DENSE_LIMIT} only; use metric={options.statistics!r}, or give this layer one by `groups`"
        )


def momentum_rank(pair: LoRAPair, options: Options) -> int:
    """Return the rank of a pair's momentum, or raise ValueError by the pair's name for one that it cannot have."""
    try:
        return options.rank_of_momentum(pair.rank, pair.d_out, pair.d_in)
    except ValueError as error:
        raise ValueError(f"{pair.name}: {error}") from error
