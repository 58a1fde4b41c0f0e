"""Backward passes inside others, beside others, and such as leave `.grad` alone or fail."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from captures import assert_exact
from models import bare, data, layer_of, mse, plain_mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from psilora import PSILoRA

Run = Callable[[nn.Module, Tensor], Tensor]

#: Uses of one layer inside a region, by `run`, and outside of it.
AROUND: dict[str, Callable[[nn.Module, Tensor, Run], Tensor]] = {
    "before": lambda layer, x, run: run(layer, layer(x)),
    "after": lambda layer, x, run: layer(run(layer, x)),
    "both": lambda layer, x, run: layer(run(layer, layer(x))),
    "beside": lambda layer, x, run: layer(x) + run(layer, x) + layer(2 * x),
    "two regions": lambda layer, x, run: layer(run(layer, layer(run(layer, x)))),
    "nested": lambda layer, x, run: run(lambda z: run(layer, layer(z)), x) + layer(x),
}
KINDS: dict[str, dict[str, Any]] = {
    "exact": {},
    "kfac": {"metric": "kfac"},
    "dense": {"gradient": "dense"},
    "dense kfac": {"gradient": "dense", "metric": "kfac"},
    "tangent kfac": {"gradient": "tangent", "metric": "kfac"},
}


def reentrant(layer: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(layer, x, use_reentrant=True)


def without_reentry(layer: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(layer, x, use_reentrant=False)


# torch warns of the region inside, which at first is run without gradients
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("run", [reentrant, without_reentry])
@pytest.mark.parametrize("around", AROUND)
def test_a_layer_inside_and_outside_of_a_checkpointed_region(around: str, run: Run, kind: str) -> None:
    """The trap: the pass inside begins while `.grad` is None, as if nothing had been captured for the one around it."""
    layer = layer_of(8, 8)
    twin = copy.deepcopy(layer)
    ours, theirs = bare(layer, **KINDS[kind]), bare(twin, **KINDS[kind])
    for _ in range(3):
        x = torch.randn(5, 8).double().requires_grad_()
        for m, optimizer, how in ((layer, ours, run), (twin, theirs, lambda inner, z: inner(z))):
            optimizer.zero_grad()
            AROUND[around](m, x, how).square().mean().backward()
        assert [record.calls for record in ours.captured()] == [record.calls for record in theirs.captured()]
        if kind in ("exact", "kfac"):
            assert_exact(ours)
        ours.step()
        theirs.step()
        for a, b in zip(layer.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_call_of_lora_B_alone_is_not_forgotten_for_a_pass_inside() -> None:
    layer = layer_of(8, 8)
    optimizer = bare(layer, metric="kfac")
    x = torch.randn(5, 8).double().requires_grad_()
    (reentrant(layer, x) + layer.lora_B(x[:, :3])).square().mean().backward()
    with pytest.raises(RuntimeError, match="none were captured in this step: a fused or compiled kernel bypasses"):
        optimizer.step()


class Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise ValueError("broken")


def saliency(model: nn.Module, x: Tensor, y: Tensor) -> None:
    torch.autograd.grad(mse(model, (x, y)), x)


def penalty(model: nn.Module, x: Tensor, y: Tensor) -> None:
    (grad,) = torch.autograd.grad(mse(model, (x, y)), x, create_graph=True)
    torch.autograd.grad(grad.square().sum(), x)


def elsewhere(model: nn.Module, x: Tensor, y: Tensor) -> None:
    mse(model, (x, y)).backward(inputs=[x])


def failing(model: nn.Module, x: Tensor, y: Tensor) -> None:
    with pytest.raises(ValueError, match="broken"):
        mse(model, (Broken.apply(x), y)).backward(inputs=[x])


def retained(model: nn.Module, x: Tensor, y: Tensor) -> None:
    loss = mse(model, (x, y))
    torch.autograd.grad(loss, x, retain_graph=True)
    torch.autograd.grad(loss, x)


@pytest.mark.parametrize("kind", ["exact", "dense", "tangent kfac"])
@pytest.mark.parametrize("how", [saliency, penalty, elsewhere, failing, retained])
@pytest.mark.parametrize("threaded", [False, True])
def test_a_pass_that_leaves_grad_alone_leaves_nothing(
    how: Callable[[nn.Module, Tensor, Tensor], None], kind: str, threaded: bool
) -> None:
    """Also between a step and the next zero_grad, where `.grad` is that of the step."""
    model = plain_mlp()
    twin = copy.deepcopy(model)
    ours, theirs = bare(model, **KINDS[kind]), bare(twin, **KINDS[kind])
    for _ in range(2):
        batch = data()
        for m, optimizer in ((model, ours), (twin, theirs)):
            optimizer.zero_grad()
            mse(m, batch).backward()
            optimizer.step()
        x, y = data()
        x = x.requires_grad_()
        if threaded:
            thread = threading.Thread(target=how, args=(model, x, y))
            thread.start()
            thread.join()
        else:
            how(model, x, y)
        seen, x = weakref.ref(x), None
        assert seen() is None and ours.capture_bytes() == 0
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_passes_in_several_threads() -> None:
    """Each with regions that are run again, and with passes between them that no step is to see."""
    model = plain_mlp()
    optimizer = PSILoRA(model, 0.1, step="gradient")
    batches = [data(rows) for rows in (5, 6, 7, 8)]
    mse(model, data(4)).backward()

    def run(x: Tensor, y: Tensor) -> None:
        for _ in range(3):
            saliency(model, x.clone().requires_grad_(), y)
            (reentrant(model, x.clone().requires_grad_()) + model(x) - y).square().mean().backward()

    threads = [threading.Thread(target=run, args=batch) for batch in batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_exact(optimizer, 1e-9)
    assert all(record.calls == 1 + 2 * 3 * 4 for record in optimizer.captured())
    optimizer.step()
