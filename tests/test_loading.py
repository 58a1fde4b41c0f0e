"""Loading a state that does not fit: refused by name, with nothing changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import data, factors, plain_mlp, train
from torch import nn

from psilora import PSILoRA
from psilora.options import OPTION_NAMES

State = dict[str, Any]


def headed(rank: int = 4) -> nn.Module:
    """With a bias for AdamW."""
    model = plain_mlp(rank=rank)
    model.l3.base.bias.requires_grad_()
    return model


def stepped(model: nn.Module, **settings: Any) -> PSILoRA:
    optimizer = PSILoRA(model, 0.05, **settings)
    train(model, optimizer, [data()])
    return optimizer


def everything(optimizer: PSILoRA) -> State:
    return copy.deepcopy(optimizer.state_dict())


def assert_equal(a: State, b: State) -> None:
    assert a["param_groups"] == b["param_groups"] and a["state"].keys() == b["state"].keys()
    for i, state in a["state"].items():
        assert state.keys() == b["state"][i].keys()
        assert all(torch.equal(value, b["state"][i][key]) for key, value in state.items())


EXACT: State = {"step": "gradient"}
TANGENT: State = {"step": "gradient", "gradient": "tangent"}
DENSE: State = {"step": "gradient", "gradient": "dense"}


@pytest.mark.parametrize(
    ("saved", "loading"),
    [
        (EXACT, {}),
        ({}, EXACT),
        (TANGENT, EXACT),
        (EXACT, TANGENT),
        (DENSE, EXACT),
        ({**DENSE, "metric": "kfac"}, DENSE),
        ({**TANGENT, "metric": "kfac"}, TANGENT),
    ],
    ids=str,
)
def test_settings_that_need_other_hooks_are_refused(saved: State, loading: State) -> None:
    """The trap: the groups say "exact" and nothing is captured, so that the step takes the tangent gradient."""
    state = everything(stepped(headed(), **saved))
    optimizer = stepped(headed(), **loading)
    before = everything(optimizer)
    with pytest.raises(ValueError, match=r"l1: step=.* needs other captures than step=.*, with which the optimizer"):
        optimizer.load_state_dict(state)
    assert_equal(before, everything(optimizer))


@pytest.mark.parametrize(
    ("built", "change"),
    [
        ({}, EXACT | {"gradient": "exact", "metric": None}),
        (EXACT, {"step": "spectral", "gradient": "tangent"}),
        (TANGENT, {"gradient": "exact"}),
        (EXACT, {"gradient": "tangent"}),
        (DENSE, {"metric": "kfac"}),
    ],
    ids=str,
)
def test_groups_changed_by_hand_to_need_other_hooks_are_refused(built: State, change: State) -> None:
    model = headed()
    optimizer = stepped(model, **built)
    optimizer.param_groups[0].update(change)
    before = factors(model)
    with pytest.raises(ValueError, match="needs other captures"):
        train(model, optimizer, [data()])
    assert all(torch.equal(before[name], value) for name, value in factors(model).items())


def test_what_the_hooks_serve_may_be_loaded() -> None:
    """Rows of X and S serve every metric."""
    source = headed()
    state = everything(stepped(source, step="gradient", metric="kfac"))
    model = headed()
    model.load_state_dict(source.state_dict())
    optimizer = PSILoRA(model, 0.05, step="gradient")
    optimizer.load_state_dict(state)
    assert_equal(state, everything(optimizer))
    train(model, optimizer, [data()])


@pytest.mark.parametrize("kind", [{}, {"step": "gradient", "metric": "kfac"}, {"controller": "slope"}], ids=str)
def test_options_that_a_state_lacks_stay_as_they_are(kind: State) -> None:
    model = headed()
    state = everything(stepped(model, **kind))
    for names in (["fade"], ["nesterov", "joint", "prox"], [name for name in OPTION_NAMES if name != "lr"]):
        older = copy.deepcopy(state)
        for group in older["param_groups"]:
            for name in names:
                group.pop(name, None)
        older["param_groups"][1].pop("amsgrad")
        twins = [copy.deepcopy(model) for _ in range(2)]
        batch = data()
        for twin, loaded in zip(twins, (state, older), strict=True):
            optimizer = PSILoRA(twin, 0.05, **kind)
            optimizer.load_state_dict(loaded)
            assert_equal(state, everything(optimizer))
            train(twin, optimizer, [batch])
        assert all(torch.equal(a, b) for a, b in zip(twins[0].parameters(), twins[1].parameters(), strict=True))


def adamw() -> State:
    model = headed()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    train(model, optimizer, [data()])
    return everything(optimizer)


def without_head() -> State:
    return everything(stepped(plain_mlp()))


def fewer_layers() -> State:
    model = headed()
    model.l2.requires_grad_(False)
    return everything(stepped(model))


def other_rank() -> State:
    return everything(stepped(headed(rank=3)))


def other_head() -> State:
    state = everything(stepped(headed()))
    state["state"][6]["exp_avg"] = torch.zeros(5)
    return state


def bad_value() -> State:
    state = everything(stepped(headed()))
    state["param_groups"][0]["momentum"] = 1.5
    return state


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (adamw, r"param groups of the kinds \[None\], this optimizer \['lora', 'adamw'\]: it is not"),
        (dict, r"of the kinds \[\], this optimizer \['lora', 'adamw'\]"),
        (without_head, r"of the kinds \['lora'\], this optimizer \['lora', 'adamw'\]"),
        (fewer_layers, r"param group 0 has 6 parameters, but 4 were saved"),
        (other_rank, r"l1.lora_B: the state 'momentum' has shape \(20, 6\). Must be \(20, 8\)."),
        (other_head, r"parameter 0 of param group 1: the state 'exp_avg' has shape \(5,\). Must be \(6,\)."),
        (bad_value, r"Invalid momentum=1.5"),
    ],
)
def test_a_state_of_something_else_is_refused(make: Callable[[], State], message: str) -> None:
    """The trap: torch replaces the groups before it looks at anything else."""
    state = make()
    model = headed()
    optimizer = stepped(model)
    before = everything(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert_equal(before, everything(optimizer))
    train(model, optimizer, [data()])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (EXACT, r"l1.lora_B: the state 'momentum' has shape \(20, 3\). Must be \(20, 4\)."),
        ({"step": "gradient", "metric": "kfac-low-rank", "momentum": 0.0}, r"'metric' has shape \(20, 3\). Must be"),
        ({"controller": "slope", "momentum": 0.0}, r"l1.lora_B: the state 'change' has shape \(20, 3\). Must be"),
    ],
    ids=str,
)
def test_every_state_of_another_rank_is_refused_by_layer_and_sizes(settings: State, message: str) -> None:
    state = everything(stepped(headed(rank=3), **settings))
    optimizer = stepped(headed(), **settings)
    before = everything(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert_equal(before, everything(optimizer))
