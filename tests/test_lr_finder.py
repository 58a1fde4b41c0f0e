"""The range test: it goes over the rates, suggests one that trains, and leaves no trace."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy
import pytest
import torch
from models import bare, data, mse, plain_mlp, train
from torch import nn

from psilora import LRSweep, PSILoRA, lr_find

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "spectral": lambda model: PSILoRA(model, 0.05, adamw_lr=1e-3),
    "gradient": lambda model: bare(model, 0.05),
    "tensor rate": lambda model: PSILoRA(model, torch.tensor(0.05)),
    "adamw": lambda model: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3),
}


class Noisy(nn.Module):
    """Dropout, and a buffer that every forward changes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.norm = model, nn.BatchNorm1d(24, affine=False, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(nn.functional.dropout(self.norm(x), 0.2))


def noisy() -> nn.Module:
    model = plain_mlp()
    model.l3.base.bias.requires_grad_()
    return Noisy(model)


def states() -> list[Any]:
    """Of the random number generators."""
    return [torch.get_rng_state(), random.getstate(), torch.from_numpy(numpy.random.get_state()[1].astype("int64"))]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_it_leaves_no_trace(name: str, trained: bool, fails: bool) -> None:
    model, batches = noisy(), [data() for _ in range(3)]
    optimizer = OPTIMIZERS[name](model)
    if trained:
        for batch in batches:
            optimizer.zero_grad()
            mse(model, batch).backward()
            optimizer.step()
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    rates, numbers = [group["lr"] for group in optimizer.param_groups], states()
    seen: list[float] = []

    def loss_of(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        if fails and len(seen) == 7:
            raise KeyboardInterrupt
        loss = mse(model, batch) + 1e-3 * random.random() + 1e-3 * numpy.random.rand()
        seen.append(float(loss.detach()))
        return loss

    if fails:
        with pytest.raises(KeyboardInterrupt):
            lr_find(optimizer, model, loss_of, batches, steps=12)
    else:
        sweep = lr_find(optimizer, model, loss_of, batches, steps=12)
        assert list(sweep.losses) == seen and len(set(seen)) == 12
    assert same(weights, model.state_dict()) and same(state, optimizer.state_dict())
    assert same(numbers, states()) and all(p.grad is None for p in model.parameters())
    for before, now in zip(rates, (group["lr"] for group in optimizer.param_groups), strict=True):
        assert now is before or (not isinstance(now, torch.Tensor) and now == before)


@pytest.mark.parametrize("trained", [False, True])
def test_the_choice_of_auto_is_as_before(trained: bool) -> None:
    """The trap: a few rows in the sweep decide how the gradients of long batches are kept."""
    model, batches = plain_mlp(), [data(400) for _ in range(2)]
    optimizer = PSILoRA(model, 0.05, step="gradient", gradient="auto")
    if trained:
        train(model, optimizer, batches[:1])
    before = optimizer.gradients()
    lr_find(optimizer, model, lambda batch: mse(model, batch), [data(2)], steps=4)
    assert optimizer.gradients() == before
    twin = copy.deepcopy(model)
    fresh = PSILoRA(twin, 0.05, step="gradient", gradient="auto")
    fresh.load_state_dict(optimizer.state_dict())
    train(model, optimizer, batches)
    train(twin, fresh, batches)
    assert optimizer.gradients() == fresh.gradients() == {"l1": "dense", "l2": "dense", "l3": "dense"}
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_suggestion_trains_and_the_rates_keep_their_ratios(name: str) -> None:
    model, batch = noisy().eval(), data(256)
    optimizer = OPTIMIZERS[name](model)
    rates: list[list[float]] = []

    def loss_of(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        rates.append([float(group["lr"]) for group in optimizer.param_groups])
        return mse(model, batch)

    start = float(mse(model, batch).detach())
    sweep = lr_find(optimizer, model, loss_of, [batch], low=1e-3, high=3.0, steps=60)
    own = [float(group["lr"]) for group in optimizer.param_groups]
    assert sweep.lrs[0] == 1e-3 and list(sweep.lrs) == sorted(sweep.lrs)
    assert all(r[-1] / r[0] == pytest.approx(own[-1] / own[0], rel=1e-6) for r in rates)
    for group, rate in zip(optimizer.param_groups, own, strict=True):
        group["lr"] = rate * sweep.suggestion() / own[0]
    for _ in range(40):
        optimizer.zero_grad()
        mse(model, batch).backward()
        optimizer.step()
    assert float(mse(model, batch).detach()) < 0.9 * start


def test_it_stops_where_the_loss_doubles_and_where_it_is_not_finite() -> None:
    model, batch = plain_mlp(), data()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    sweep = lr_find(optimizer, model, lambda b: mse(model, b), [batch], low=1e-2, high=1e6, steps=80)
    assert 5 < len(sweep.lrs) < 80 and sweep.suggestion() < 10
    losses = iter([1.0, 0.5, float("nan"), 0.1])
    sweep = lr_find(optimizer, model, lambda b: mse(model, b) * 0 + next(losses), [batch], steps=4)
    assert len(sweep.losses) == 3 and len(sweep.smoothed) == 2


def test_iterators_are_used_up_and_lists_are_repeated() -> None:
    model = plain_mlp()
    optimizer = PSILoRA(model, 0.05)
    batches = [data() for _ in range(3)]
    assert len(lr_find(optimizer, model, lambda b: mse(model, b), iter(batches), steps=5, high=0.1).lrs) == 3
    assert len(lr_find(optimizer, model, lambda b: mse(model, b), batches, steps=5, high=0.1).lrs) == 5


def test_bad_input_and_a_loss_that_never_falls() -> None:
    model = plain_mlp()
    optimizer = PSILoRA(model, 0.05)
    for settings, message in (
        ({"low": 0.0}, r"Invalid low=0.0, high=1.0. Must be 0 < low < high < inf."),
        ({"low": 2.0}, r"Invalid low=2.0, high=1.0."),
        ({"steps": 1}, r"Invalid steps=1. Must be >= 2."),
    ):
        with pytest.raises(ValueError, match=message):
            lr_find(optimizer, model, lambda b: mse(model, b), [data()], **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no batch"):
        lr_find(optimizer, model, lambda b: mse(model, b), [])
    with pytest.raises(ValueError, match=r"Invalid rates \[0.0\]"):
        lr_find(PSILoRA(model, 0.0), model, lambda b: mse(model, b), [data()])
    with pytest.raises(ValueError, match="did not fall at any rate from 0.1 to 0.2"):
        LRSweep((0.1, 0.2), (1.0, 2.0), (1.0, 1.5)).suggestion()


def test_the_plot_shows_the_losses_and_the_suggestion() -> None:
    matplotlib.use("Agg")
    sweep = LRSweep((0.1, 0.2, 0.4), (1.0, 0.5, float("inf")), (1.0, 0.8))
    ax = sweep.plot()
    assert ax.get_xscale() == "log" and len(ax.lines) == 3
    assert list(ax.lines[1].get_ydata()) == [1.0, 0.8]
    assert f"suggestion {sweep.suggestion():.2g}" in [text.get_text() for text in ax.get_legend().get_texts()]
    assert sweep.suggestion() == 0.08
    assert sweep.plot(ax) is ax
    matplotlib.pyplot.close("all")
