"""What the optimizer remembers of a LoRA pair: where it begins, and whether a loaded state fits, bit by bit."""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from psilora.adapters.pair import LoRAPair
from psilora.linalg.precision import compute_dtype
from psilora.options.base import GROUP_KEYS, Options
from psilora.param_groups.lora import check_pair, momentum_rank, pair_options
from psilora.steps import STEPS
from psilora.steps.controller import NUMBERS

#: What this package keeps in the state of a LoRA parameter; wrappers of optimizers may keep more there.
NAMES = frozenset({"step", "momentum", "metric", "metric_rest", "norms", "controller", "change"})


#: What torch's AdamW keeps of a parameter, all of it from its first step on.
ADAMW_STATE = ("step", "exp_avg", "exp_avg_sq")


def state_dtype(name: str, parameter: Tensor) -> torch.dtype:
    """Return the dtype of the state `name` of a LoRA parameter: fp32 or better, whatever the parameter's."""
    if name in ("controller", "norms"):
        return torch.float64
    return torch.float32 if name == "step" else compute_dtype(parameter.dtype)


def _dtype_loaded(name: str, value: Tensor, parameter: Tensor) -> torch.dtype:
    """The dtype that a loaded state has; what wrappers of optimizers keep there stays as it is."""
    return state_dtype(name, parameter) if name in NAMES else value.dtype


def init_state(pair: LoRAPair, options: Options, state_B: dict[str, Any], state_A: dict[str, Any]) -> None:
    """Create the state of a pair that its settings need, where it does not exist yet.

    "step" 0-d in fp32, and what the kind of step adds: see `psilora.steps.gradient.state` and
    `psilora.steps.spectral.state`. fp32, or fp64 for fp64 parameters.

    Raises:
        RuntimeError: What is there has other shapes than these settings give, because they were changed since.
    """
    for state in (state_A, state_B):
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=pair.lora_A.device)
    if options.momentum > 0 and "momentum" in state_A:
        _check_momentum(pair, options, state_A["momentum"].shape[0])
    STEPS[options.step].init_state(pair, options, state_B, state_A)


def _check_momentum(pair: LoRAPair, options: Options, held: int) -> None:
    """Raise RuntimeError for a param group whose momentum has been given another rank since it began."""
    wanted = momentum_rank(pair, options)
    if held != wanted:
        raise RuntimeError(
            f"{pair.name}: the state holds a momentum of rank {held}, and {options.momentum_setting} asks for rank "
            f"{wanted}; it cannot be changed in training: set it back, or build a new optimizer"
        )


#: What wrappers put into the paths of modules: DDP, torch.compile, FSDP and checkpointing.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def named(
    groups: Sequence[Mapping[str, Any]], pairs: Mapping[int, LoRAPair], others: Mapping[int, str]
) -> list[list[str]]:
    """Return the names of what each param group trains: pairs (two parameters each), or parameters.

    Args:
        groups: The optimizer's param groups.
        pairs: By id of their lora_A.
        others: Names of the parameters outside, by id.
    """
    return [
        [pairs[id(p)].name for p in group["params"][::2]]
        if group["kind"] == "lora"
        else [others[id(p)] for p in group["params"]]
        for group in groups
    ]


def compatible(
    state_dict: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    pairs: Mapping[int, LoRAPair],
    names: Sequence[Sequence[str]],
) -> tuple[dict[str, Any], list[tuple[LoRAPair, Options]]]:
    """Return the state dict with every option, and its settings, pair by pair.

    Args:
        state_dict: To be loaded.
        groups: The optimizer's param groups; an option that `state_dict` lacks is taken from here.
        pairs: By id of their lora_A.
        names: Of what each group trains, as `named` gives them. A state that holds its own ("names" of its groups) must
            agree; one without, of an earlier version, is taken by position.

    Raises:
        ValueError: It is of another optimizer, other layers, parameters or shapes, or not whole; says which.
    """
    saved = _as_many(_saved_groups(state_dict), groups)
    ours, theirs = ([group.get("kind") for group in found] for found in (groups, saved))
    if ours != theirs:
        raise ValueError(
            f"the state has param groups of the kinds {theirs}, this optimizer {ours}: it is not the state of a "
            "PSILoRA with the same groups"
        )
    for i, (old, new) in enumerate(zip(groups, saved, strict=True)):
        if len(old["params"]) != len(new["params"]):
            raise ValueError(
                f"param group {i} has {len(old['params'])} parameters, but {len(new['params'])} were saved"
            )
        _same_names(i, names[i], new.get("names"))
    complete = [{**old, **_of_this_version(new)} for old, new in zip(groups, saved, strict=True)]
    settings = pair_options(
        [{**new, "params": old["params"]} for old, new in zip(groups, complete, strict=True)], pairs
    )
    states = _by_parameter({**state_dict, "param_groups": complete}, groups)
    for pair, options in settings:
        check_pair(pair, options)
        check_pair_state(pair, options, states)
    for i, group in enumerate(groups):
        for j, parameter in enumerate(group["params"] if group["kind"] != "lora" else ()):
            _check_adamw_state(f"parameter {j} of param group {i}", states[id(parameter)], parameter.shape)
    return {**state_dict, "param_groups": complete}, settings


def as_dict(state_dict: object) -> dict[str, Any]:
    """A shallow copy of a state dict; raises ValueError for what is none."""
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"Invalid state of type {type(state_dict).__name__}. Must be a dict, of state_dict().")
    return dict(state_dict)


def _saved_groups(state_dict: object) -> Sequence[Mapping[str, Any]]:
    """The param groups of a state dict; raises ValueError for what is none."""
    saved = as_dict(state_dict).get("param_groups", ())
    if not (isinstance(saved, (list, tuple)) and all(isinstance(g, Mapping) and "params" in g for g in saved)):
        raise ValueError("Invalid 'param_groups' in the state. Must be a list of dicts, each with 'params'.")
    return saved


def _as_many(saved: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The saved groups, as many as there are here where only empty ones at the end, as `rebind` leaves them, differ.

    Empty ones before others count: without them a scheduler's saved rates, which go by position, would be of others.
    """
    common = min(len(saved), len(groups))
    if any(group["params"] for group in (*saved[common:], *groups[common:])):
        return list(saved)
    return [*saved[:common], *({**group, "params": [], "names": []} for group in groups[common:])]


def _of_this_version(group: Mapping[str, Any]) -> dict[str, Any]:
    """A saved group without its names, and with the kind of step where earlier versions have it under "step"."""
    found = {key: value for key, value in group.items() if key != "names"}
    if isinstance(found.get("step"), str):
        found.setdefault(GROUP_KEYS["step"], found["step"])
        del found["step"]
    return found


def _same_names(i: int, ours: Sequence[str], saved: Sequence[str] | None) -> None:
    """Raise ValueError where the state of one layer would be loaded into another."""
    if saved is None:
        return
    wrong = [(old, new) for old, new in zip(saved, ours, strict=False) if not _same_name(old, new)]
    if wrong or len(saved) != len(ours):
        what = f"of {wrong[0][0]!r} would be loaded into {wrong[0][1]!r}" if wrong else f"has {len(saved)} names"
        more = f", and {len(wrong) - 1} more differ" if len(wrong) > 1 else ""
        raise ValueError(
            f"the state of param group {i} {what}{more}: it was saved for other layers, or in another order; build the "
            "optimizer on the same model, or delete 'names' from the state's param_groups to load it by position"
        )


def _same_name(saved: str, ours: str) -> bool:
    """Whether two names mean one layer, seen from further inside the model by one of them, or through a wrapper."""
    short, long = sorted(
        (".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in (saved, ours)), key=len
    )
    return long == short or not short or long.endswith(("" if short[0] == " " else ".") + short)


def check_pair_state(
    pair: LoRAPair, options: Options, states: Mapping[int, Mapping[str, Any]], *, complete: bool = False
) -> None:
    """Raise ValueError if a state has another shape than its settings give a pair of this shape, or is half of one.

    Args:
        pair: Of the factors that the state is for.
        options: Its settings.
        states: Of its factors, by their ids.
        complete: Whether all that the settings need has to be there; else what both factors lack may still begin.
    """
    lora_A, lora_B = (
        nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta")) for p in (pair.lora_A, pair.lora_B)
    )
    expected: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    init_state(replace(pair, lora_A=lora_A, lora_B=lora_B), options, *expected)
    factors = {"lora_B": pair.lora_B, "lora_A": pair.lora_A}
    held = {key for parameter in factors.values() for key in states[id(parameter)]}
    for (side, parameter), own in zip(factors.items(), expected, strict=True):
        name, found = f"{pair.name}.{side}", states[id(parameter)]
        shapes = {key: value.shape for key, value in own.items()} | {"change": parameter.shape}
        for key, shape in shapes.items():
            if key in found:
                _same_shape(name, key, found[key], shape)
            elif key in held or (complete and key in own):
                reason = "the other factor's has" if key in held else "its settings ask for"
                raise ValueError(f"{name}: the state lacks {key!r}, which {reason}")
        if "controller" in found:
            _same_shape(name, "controller", found["controller"], torch.Size([len(NUMBERS)]))


def _check_adamw_state(name: str, state: Mapping[str, Any], shape: torch.Size) -> None:
    """Raise ValueError for a state of AdamW that is of another shape, or neither whole nor still to begin."""
    held = [key for key in ADAMW_STATE if key in state]
    for key in ADAMW_STATE if held else ():
        if key not in state:
            raise ValueError(f"{name}: the state lacks {key!r}, but has {held[0]!r}")
    for key, value in state.items():
        if value.dim() > 0 if isinstance(value, Tensor) else key in ADAMW_STATE:
            _same_shape(name, key, value, shape)


def _same_shape(name: str, key: str, value: object, shape: torch.Size) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: the state {key!r} is of type {type(value).__name__}. Must be a tensor.")
    if value.shape != shape:
        raise ValueError(f"{name}: the state {key!r} has shape {tuple(value.shape)}. Must be {tuple(shape)}.")


def _by_parameter(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    """The saved state of each of the groups' parameters, by its id."""
    saved = [i for group in state_dict["param_groups"] for i in group["params"]]
    current = [p for group in groups for p in group["params"]]
    state = state_dict.get("state")
    if not (isinstance(state, Mapping) and all(isinstance(own, Mapping) for own in state.values())):
        raise ValueError("the state dict has no 'state', or none that is a dict of dicts, as of state_dict()")
    return {id(p): state.get(i, {}) for i, p in zip(saved, current, strict=True)}


@contextlib.contextmanager
def loading(optimizer: torch.optim.Optimizer, check: Callable[[Mapping[str, Any]], dict[str, Any]]) -> Iterator[None]:
    """Within it, torch's `load_state_dict` loads what `check` returns, exactly, between the hooks of others.

    Args:
        optimizer: Whose groups have a "kind".
        check: Gets the state as it is after all `register_load_state_dict_pre_hook`; what it raises changes nothing.
    """
    checked: list[dict[str, Any]] = []

    def before(_: torch.optim.Optimizer, given: Mapping[str, Any]) -> dict[str, Any]:
        checked.append(check(given))
        return checked[0]

    def after(_: torch.optim.Optimizer) -> None:
        copy_loaded(checked[0], optimizer.param_groups, optimizer.state)

    with optimizer.register_load_state_dict_pre_hook(before):
        with optimizer.register_load_state_dict_post_hook(after, prepend=True):
            yield


def plain(value: Any) -> Any:
    """The same with numpy's numbers, in dicts and tuples too, as Python's, which torch loads with weights_only=True."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    return value.item() if isinstance(value, numbers.Number) and hasattr(value, "item") else value


def copy_loaded(
    state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], state: MutableMapping[Any, dict[str, Any]]
) -> None:
    """Set the state that torch has loaded to what was saved, bit by bit.

    torch rounds it to the parameters' dtype, and where it does not it keeps the tensor itself, which the source would
    go on changing.

    Args:
        state_dict: What was loaded.
        groups: The optimizer's param groups.
        state: Its state, after torch's `load_state_dict`.
    """
    saved = [i for group in state_dict["param_groups"] for i in group["params"]]
    current = [(group["kind"], p) for group in groups for p in group["params"]]
    for i, (kind, parameter) in zip(saved, current, strict=True):
        for key, value in state_dict["state"].get(i, {}).items():
            if not isinstance(value, Tensor):
                continue
            if kind == "lora":
                dtype = _dtype_loaded(key, value, parameter)
                state[parameter][key] = value.detach().to(parameter.device, dtype, copy=True)
            else:
                state[parameter][key] = state[parameter][key].clone()
