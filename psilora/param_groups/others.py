"""Param groups of the parameters outside the LoRA pairs: rates, no-decay groups and the like, by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from psilora.adapters.find import find_pairs
from psilora.adapters.model import check_parameter
from psilora.adapters.pair import listed
from psilora.param_groups.adamw import adamw_group, check_adamw
from psilora.param_groups.chosen import Chosen

#: What an entry of `groups` with "parameters" may set; those of torch's AdamW.
ADAMW_SETTINGS = ("lr", "betas", "eps", "weight_decay")
#: Of the largest parameters, as many are named in the warning about too many.
_NAMED = 3


def adamw_groups(
    outside: Mapping[str, nn.Parameter],
    settings: Mapping[str, Any],
    overrides: Sequence[Mapping[str, Any]],
    *,
    strict: bool = True,
) -> list[tuple[int, dict[str, Any]]]:
    """Split the parameters outside the pairs into groups for AdamW, without empty ones: overrides, then the rest.

    Args:
        outside: By name.
        settings: `ADAMW_SETTINGS` and maximize, which the rest takes.
        overrides: {"parameters": regex searched in the name, or a list of names, **settings}; the first match wins.
        strict: Whether an override without a parameter, or with a name in its list that none has, is an error.

    Returns:
        Each group beside the number of its override, counted from 1, and 0 for the rest.

    Raises:
        ValueError: An override has other keys, values out of range, no parameter, or a name that none has.
    """
    members: list[list[nn.Parameter]] = [[] for _ in range(len(overrides) + 1)]
    check_adamw(settings, "adamw_")
    choices = [_chosen(override) for override in overrides]
    for name, parameter in outside.items():
        members[next((i for i, chosen in enumerate(choices, start=1) if chosen.means(name)), 0)].append(parameter)
    for choice in choices if strict else ():
        choice.check(outside, list(outside))
    for override, found in zip(overrides, members[1:], strict=True):
        if strict and not found:
            there = listed(list(outside)) or "none that is trainable"
            raise ValueError(
                f"no parameter is left for parameters={override['parameters']!r}; outside the LoRA pairs there are "
                f"{there}"
            )
    groups = []
    for i in (*range(1, len(members)), 0):
        if members[i]:
            own = {k: v for k, v in overrides[i - 1].items() if k in ADAMW_SETTINGS} if i else {}
            groups.append((i, adamw_group(members[i], **{**settings, **own})))
    return groups


def _chosen(override: Mapping[str, Any]) -> Chosen:
    unknown = sorted(set(override) - {"parameters", *ADAMW_SETTINGS})
    if unknown:
        raise ValueError(f"a group of parameters has unknown keys {unknown}; allowed are {', '.join(ADAMW_SETTINGS)}")
    check_adamw(override)
    return Chosen("parameters", override["parameters"])


def added_group(
    given: Mapping[str, Any], settings: Mapping[str, Any], model: nn.Module | None
) -> tuple[dict[int, str], dict[str, Any]]:
    """Return the names by id, and the group, of parameters that an optimizer is to train with AdamW from now on.

    Args:
        given: A param group as torch takes it: "params", a parameter or several, and settings of AdamW.
        settings: What it lacks of them.
        model: In which to look up the names; None where it is gone.

    Raises:
        ValueError: A setting is unknown or out of range, or a parameter is a LoRA factor, complex or without memory.
        TypeError: It is no dict, or there are no parameters.
    """
    if not isinstance(given, Mapping):
        raise TypeError(
            f"Invalid later group of type {type(given).__name__}. Must be a dict {{'params': …, **settings}}."
        )
    unknown = sorted(set(given) - {"params", *ADAMW_SETTINGS})
    if unknown:
        raise ValueError(f"a later group has unknown keys {unknown}; allowed are params, {', '.join(ADAMW_SETTINGS)}")
    entries = given.get("params")
    if isinstance(entries, Tensor) or not isinstance(entries, Iterable):
        entries = [entries]
    entries = [e if isinstance(e, tuple) and len(e) == 2 else (None, e) for e in entries]
    named = {id(p): name for name, p in entries if name is not None}
    parameters = [p for _, p in entries]
    if not parameters or not all(isinstance(p, nn.Parameter) for p in parameters):
        raise TypeError("a later group needs 'params': nn.Parameters, or pairs of a name and one")
    check_adamw(given)
    if model is not None:
        factors = {id(p): pair.name for pair in find_pairs(model)[0] for p in (pair.lora_A, pair.lora_B)}
        of_pairs = sorted({factors[id(p)] for p in parameters if id(p) in factors})
        if of_pairs:
            raise ValueError(f"these parameters are LoRA factors, of {listed(of_pairs)}; call rebind() to train them")
        known = {id(p): name for name, p in model.named_parameters()}
        named = {**known, **named}
    names = {id(p): named.get(id(p), f"added.{i}") for i, p in enumerate(parameters)}
    for p in parameters:
        check_parameter(names[id(p)], p, sharded=True)
    own = {key: value for key, value in given.items() if key != "params"}
    return names, adamw_group(parameters, **{**settings, **own})


def too_many(pairs: int, outside: Mapping[str, nn.Parameter]) -> str | None:
    """Return what to say where AdamW trains more numbers than the `pairs` have, and nobody said so; else None."""
    sizes = {name: p.numel() for name, p in outside.items()}
    total = sum(sizes.values())
    if total <= pairs:
        return None
    largest = sorted(sizes, key=lambda name: -sizes[name])[:_NAMED]
    return (
        f"AdamW trains {total:,} numbers outside the LoRA pairs, which have {pairs:,}; the largest are "
        f"{', '.join(f'{name} ({sizes[name]:,})' for name in largest)}. Freeze what is not meant to be trained "
        "(requires_grad=False), or say that it is by groups=[{'parameters': regex, 'lr': …}]"
    )
