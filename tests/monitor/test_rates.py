"""An AdamW group that a schedule of absolute rates set to LoRA's rate is named once; other schedules are not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    CyclicLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    SequentialLR,
)

from psilora import LoRALinear, PSILoRA

STEPS = 20
Schedule = Callable[[PSILoRA], Any]


def said(schedule: Schedule, lr: float | Tensor = 0.05, **settings: Any) -> tuple[list[str], list[float]]:
    """What is said about rates in a training under a schedule, and the head's rate in each step."""
    torch.manual_seed(0)
    model = nn.Sequential(LoRALinear(nn.Linear(6, 5), 2), nn.Linear(5, 3))
    optimizer, heads = PSILoRA(model, lr, **settings), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scheduler = schedule(optimizer)
        for _ in range(STEPS):
            optimizer.zero_grad()
            model(torch.randn(4, 6)).square().mean().backward()
            heads.append(float(optimizer.param_groups[-1]["lr"]))
            optimizer.step()
            if isinstance(scheduler, LRScheduler):
                scheduler.step()
    return [str(w.message) for w in caught if "AdamW's param group" in str(w.message)], heads


ABSOLUTE: dict[str, Schedule] = {
    "OneCycleLR": lambda optimizer: OneCycleLR(optimizer, max_lr=0.05, total_steps=STEPS + 1),
    "CosineAnnealingLR": lambda optimizer: CosineAnnealingLR(optimizer, T_max=STEPS - 1, eta_min=5e-3),
    "CyclicLR": lambda optimizer: CyclicLR(optimizer, 1e-3, 0.05, step_size_up=5, cycle_momentum=False),
    "by hand": lambda optimizer: [group.update(lr=0.05) for group in optimizer.param_groups],
}
RELATIVE: dict[str, Schedule] = {
    "none": lambda optimizer: None,
    "LambdaLR": lambda optimizer: LambdaLR(optimizer, lambda t: 1 - t / STEPS),
    "warm-up from 0": lambda optimizer: LambdaLR(optimizer, lambda t: min(1.0, t / 10)),
    "upwards": lambda optimizer: LambdaLR(optimizer, lambda t: 1.0 + t),
    "to 0": lambda optimizer: CosineAnnealingLR(optimizer, T_max=STEPS - 1),
    "warm-up, then cosine": lambda optimizer: SequentialLR(
        optimizer, [LinearLR(optimizer, 0.01, total_iters=5), CosineAnnealingLR(optimizer, STEPS)], [5]
    ),
    "restart": lambda optimizer: ConstantLR(optimizer, 0.1, total_iters=10),
    "a list": lambda optimizer: OneCycleLR(optimizer, max_lr=[0.05, 1e-3], total_steps=STEPS + 1),
}


@pytest.mark.parametrize("name", ABSOLUTE)
def test_one_absolute_rate_for_all_groups_is_named_once(name: str) -> None:
    messages, heads = said(ABSOLUTE[name])
    assert max(heads) > 4e-3, "the head's rate left what it was built with"
    assert len(messages) == 1
    assert "they were built with 0.001 and 0.05." in messages[0]
    assert "max_lr=[0.05, 0.001]" in messages[0]


def test_the_rates_found_are_named() -> None:
    (message,), _ = said(ABSOLUTE["by hand"], 0.04, adamw_lr=2e-3)
    assert "has lr=0.05 beside a LoRA group's 0.05; they were built with 0.002 and 0.04." in message


def test_any_of_several_groups_counts_and_the_list_has_all() -> None:
    (message,), _ = said(ABSOLUTE["by hand"], groups=[{"layers": ["0"], "lr": 0.02}])
    assert "built with 0.001 and 0.02." in message
    assert "max_lr=[0.02, 0.001]" in message


@pytest.mark.parametrize("name", RELATIVE)
def test_schedules_that_keep_the_ratio_are_not(name: str) -> None:
    assert said(RELATIVE[name])[0] == []


@pytest.mark.parametrize("name", ["OneCycleLR", "by hand", "warm-up from 0", "upwards", "to 0", "restart"])
def test_equal_rates_by_choice_are_not(name: str) -> None:
    assert said({**ABSOLUTE, **RELATIVE}[name], adamw_lr=0.05)[0] == []


@pytest.mark.parametrize("name", ["OneCycleLR", "CosineAnnealingLR"])
def test_rates_in_tensors_are_not_read(name: str) -> None:
    assert said(ABSOLUTE[name], torch.tensor(0.05))[0] == []


def test_no_other_parameters_no_warning() -> None:
    model = LoRALinear(nn.Linear(6, 5), 2)
    optimizer = PSILoRA(model, 1e-3)
    optimizer.param_groups[0]["lr"] = 0.05
    model(torch.randn(4, 6)).square().mean().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
