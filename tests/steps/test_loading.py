"""What loading a state shares with torch's optimizers: hooks, empty groups, and numbers that any file may hold."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy
import pytest
import torch
from models import data, plain_mlp, train
from states import State, assert_equal, everything, headed, stepped

from psilora import PSILoRA


def test_hooks_on_loading_see_and_change_what_is_loaded() -> None:
    """As with torch's optimizers: the dict that a hook returns is loaded, and what a later one does stays."""
    model = headed()
    optimizer, saved, seen = stepped(model), everything(stepped(headed())), []

    def halve(_: torch.optim.Optimizer, state: State) -> State:
        state = copy.deepcopy(state)
        for entry in state["state"].values():
            for value in entry.values():
                value.mul_(0.5)
        state["param_groups"][0]["lr"] = 0.3
        return state

    def look(loaded: torch.optim.Optimizer) -> None:
        seen.append(everything(loaded))
        loaded.state[model.l1.lora_A.weight]["momentum"].zero_()

    optimizer.register_load_state_dict_pre_hook(halve)
    optimizer.register_load_state_dict_post_hook(look)
    before = copy.deepcopy(saved)
    for _ in range(2):
        optimizer.load_state_dict(saved)
    wanted = halve(optimizer, saved)
    assert_equal(wanted, seen[0])
    assert_equal(wanted, seen[1])
    assert_equal(before, saved)
    assert not optimizer.state[model.l1.lora_A.weight]["momentum"].any()
    before = everything(optimizer)
    optimizer.register_load_state_dict_pre_hook(lambda _, state: {**state, "param_groups": []})
    with pytest.raises(ValueError, match=r"of the kinds \[\]"):
        optimizer.load_state_dict(saved)
    assert_equal(before, everything(optimizer))
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 2  # of ours nothing is left


def test_a_group_that_rebind_has_emptied_at_the_end_may_be_missing() -> None:
    model = headed()
    optimizer = stepped(model)
    model.l3.base.bias.requires_grad_(False)
    optimizer.rebind()
    rebound = everything(optimizer)
    assert [len(group["params"]) for group in rebound["param_groups"]] == [6, 0]
    fresh = stepped(plain_mlp())
    fresh.load_state_dict(rebound)
    loaded = everything(fresh)
    assert_equal({**rebound, "param_groups": rebound["param_groups"][:1]}, loaded)
    train(model, optimizer, [data()])
    optimizer.param_groups[1]["lr"] = 0.4
    optimizer.load_state_dict(loaded)
    assert_equal(loaded, {**everything(optimizer), "param_groups": everything(optimizer)["param_groups"][:1]})
    assert optimizer.param_groups[1]["lr"] == 0.4
    optimizer.load_state_dict(rebound)
    assert_equal(rebound, everything(optimizer))


def test_one_emptied_before_others_may_not() -> None:
    """The trap: a scheduler's rates go by position, and would be those of another group."""
    settings: State = {"groups": [{"layers": "l1", "lr": 0.3}]}
    model = headed()
    optimizer = stepped(model, **settings)
    model.l1.requires_grad_(False)
    optimizer.rebind()
    rebound = everything(optimizer)
    assert [len(group["params"]) for group in rebound["param_groups"]] == [4, 0, 1]
    fresh = PSILoRA(model, 0.05)
    with pytest.raises(ValueError, match=r"'lora', 'adamw'\], this optimizer \['lora', 'adamw'\]"):
        fresh.load_state_dict(rebound)
    model.l1.lora_A.requires_grad_()
    model.l1.lora_B.requires_grad_()
    again = PSILoRA(model, 0.05, **settings)  # built as the first, and taken the same way
    model.l1.requires_grad_(False)
    again.rebind()
    again.load_state_dict(rebound)
    assert_equal(rebound, everything(again))


def test_numbers_of_numpy_are_plain_in_a_state(tmp_path: Path) -> None:
    """A rate from numpy.logspace is one of them; torch does not load it with weights_only=True."""
    betas = (numpy.float64(0.8), numpy.float64(0.9))
    optimizer = PSILoRA(headed(), numpy.logspace(-2, 0, 3)[1], prox=numpy.float32(0.5), adamw_betas=betas)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: numpy.float64(0.5))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    first, last = loaded["param_groups"]
    assert first["lr"] == optimizer.param_groups[0]["lr"] == 0.05 and first["prox"] == 0.5
    assert [type(number) for number in (first["lr"], first["prox"], last["lr"], *last["betas"])] == [float] * 5
    PSILoRA(headed(), 0.1).load_state_dict(loaded)
