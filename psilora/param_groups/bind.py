"""Which param group trains which parameters of a model: at construction, and again once its adapters have changed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from psilora.adapters.find import find_pairs
from psilora.adapters.model import check_model
from psilora.adapters.pair import LoRAPair
from psilora.options import OPTION_NAMES
from psilora.param_groups.lora import checked_pairs, lora_groups, share_depth
from psilora.param_groups.others import adamw_groups

#: Where a group comes from: its kind, and the number of its entry in `groups=`, 0 for the rest.
Slot = tuple[str, int]
#: Settings of other optimizers that a step on the weight has no place for.
_FACTOR_RATES = ("lr_ratio", "loraplus_lr_ratio", "lr_A", "lr_B")


@dataclass(frozen=True)
class Bound:
    """A model's trainable parameters in groups: the pairs, the groups by slot, and the others by name.

    `unsaid` are those of the others that nobody asked for by a setting: AdamW trains them because they are trainable.
    """

    pairs: list[LoRAPair]
    groups: dict[Slot, dict[str, Any]]
    outside: dict[str, nn.Parameter]
    unsaid: dict[str, nn.Parameter]


@dataclass(frozen=True)
class Recipe:
    """What decides the groups, whatever the model looks like.

    Attributes:
        settings: Those of all pairs, as given to `PSILoRA`.
        groups: Its `groups=`: entries with "layers" are for pairs, those with "parameters" for the others.
        adamw: Settings of the other parameters.
        unsupported: "raise" or "adamw".
        also: A module outside the model, or None.
    """

    settings: Mapping[str, Any]
    groups: Sequence[Mapping[str, Any]]
    adamw: Mapping[str, Any]
    unsupported: str
    also: nn.Module | None
    layers: list[Mapping[str, Any]] = field(init=False)
    parameters: list[Mapping[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        if isinstance(self.groups, str) or not isinstance(self.groups, Sequence):
            raise ValueError(f"Invalid groups={self.groups!r}. Must be a sequence of {{'layers': …, **settings}}.")
        named = [isinstance(entry, Mapping) and "parameters" in entry for entry in self.groups]
        for name in ("layers", "parameters"):
            chosen = [e for e, other in zip(self.groups, named, strict=True) if other == (name == "parameters")]
            object.__setattr__(self, name, chosen)
        for entry in self.layers:
            if not isinstance(entry, Mapping):
                raise ValueError(f"Invalid group {entry!r} in groups. Must be a dict {{'layers': …, **settings}}.")
            of_factors = sorted(set(entry) & set(_FACTOR_RATES))
            if of_factors:
                raise ValueError(
                    f"a group has {of_factors}: the step is one on the weight s·B·A, whichever way it is split, so its "
                    "factors have no rates of their own; set 'lr'"
                )
            unknown = sorted(set(entry) - set(OPTION_NAMES) - {"layers"})
            if "layers" not in entry or unknown:
                problem = f"has unknown keys {unknown}" if unknown else "has no 'layers' (or 'parameters')"
                raise ValueError(f"a group {problem}; allowed are 'layers' and {', '.join(OPTION_NAMES)}")

    def counts_depth(self, slot: Slot) -> bool:
        """Whether a group of pairs has depth_scale="auto"."""
        own = self.layers[slot[1] - 1] if slot[1] else {}
        return bool({**self.settings, **own}["depth_scale"] == "auto")

    def bind(self, model: nn.Module, *, strict: bool = True) -> Bound:
        """Find what `model` trains, and sort it into groups, LoRA's first and without empty ones.

        Args:
            model: Checked by `check_model`.
            strict: Whether an entry of `groups` for which nothing is left is an error.

        Raises:
            ValueError: Nothing can be trained here, or settings do not fit; says which.
        """
        pairs = checked_pairs(model, self.unsupported)
        taken = {id(p) for pair in pairs for p in (pair.lora_A, pair.lora_B)}
        outside = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in taken}
        if self.also is not None:
            held = {id(p) for p in model.parameters()}
            more = check_model(self.also, sharded=True).named_parameters()
            outside |= {f"also.{name}": p for name, p in more if p.requires_grad and id(p) not in held}
        groups: dict[Slot, dict[str, Any]] = {
            ("lora", i): group for i, group in lora_groups(pairs, self.settings, self.layers, strict=strict)
        }
        share_depth(list(groups.values()))
        others = adamw_groups(outside, self.adamw, self.parameters, strict=strict)
        groups |= {("adamw", i): group for i, group in others}
        said = {id(p) for (_, i), group in groups.items() if i for p in group["params"]}
        if self.unsupported == "adamw":
            said |= {id(p) for adapter in find_pairs(model)[1] for p in adapter.parameters}
        asked = re.compile(r"^also\.|\.modules_to_save\.")  # by the argument, and by that of PEFT's configuration
        unsaid = {n: p for n, p in outside.items() if id(p) not in said and not asked.search(n)}
        return Bound(pairs, groups, outside, unsaid)


def regroup(
    bound: Bound, slots: Sequence[Slot], groups: Sequence[Mapping[str, Any]], recipe: Recipe
) -> list[tuple[Slot, dict[str, Any]]]:
    """Return the groups that there are, with newly found parameters, and after them those that need one of their own.

    Rates and settings of the groups stay as they are now, so that schedules go on; a group may become empty. The number
    of layers in `depth_scale="auto"` is counted anew. Nothing is changed.

    Args:
        bound: What the model has now.
        slots: Of each of `groups`; ("added", 0) for one that `add_param_group` made, which keeps what it has.
        groups: The optimizer's param groups.
        recipe: That the groups were built by.
    """
    there = list(zip(slots, groups, strict=True))
    added = {id(p) for slot, group in there if slot[0] == "added" for p in group["params"]}
    regrouped = []
    for slot, group in there:
        new = dict(group)
        if slot[0] != "added":
            found = bound.groups.get(slot, {"params": []})
            new["params"] = [p for p in found["params"] if id(p) not in added]
            if "depth_scale" in found and recipe.counts_depth(slot):
                new["depth_scale"] = found["depth_scale"]
        regrouped.append((slot, new))
    return regrouped + [
        (slot, {**group, "params": rest})
        for slot, group in bound.groups.items()
        if slot not in slots and (rest := [p for p in group["params"] if id(p) not in added])
    ]
