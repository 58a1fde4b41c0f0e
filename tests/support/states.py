"""Optimizers whose states are loaded into each other."""

from __future__ import annotations

import copy
from typing import Any

import torch
from models import data, plain_mlp, train
from torch import nn

from psilora import PSILoRA

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
