"""Two backward passes through one graph are one backward pass of the sum: the rows of a call count once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from convnets import peft_convnet
from models import Checkpointed, bare, plain_mlp
from torch import Tensor, nn

from psilora import PSILoRA, baselines

Losses = tuple[Tensor, Tensor]

KINDS: dict[str, dict[str, Any]] = {
    "exact": {},
    "kfac": {"metric": "kfac"},
    "kfac-dense": {"metric": "kfac-dense"},
    "kfac-low-rank": {"metric": "kfac-low-rank"},
    "shampoo": {"metric": "shampoo"},
    "shampoo-dense": {"metric": "shampoo-dense"},
    "dense": {"gradient": "dense"},
    "dense shampoo": {"gradient": "dense", "metric": "shampoo"},
    "tangent": {"gradient": "tangent"},
    "tangent shampoo": {"gradient": "tangent", "metric": "shampoo"},
    "tangent shampoo-dense": {"gradient": "tangent", "metric": "shampoo-dense"},
    "full norm": {"metric": "kfac", "max_grad_norm": 0.1, "norm": "full"},
    "triton kfac": {"metric": "kfac", "backend": "triton"},
}
SUMS: dict[str, dict[str, Any]] = {
    "dense kfac": {"gradient": "dense", "metric": "kfac"},
    "dense kfac-dense": {"gradient": "dense", "metric": "kfac-dense"},
    "tangent kfac": {"gradient": "tangent", "metric": "kfac"},
}


def losses(model: nn.Module, x: Tensor) -> Losses:
    """Two losses of one forward pass whose gradients overlap."""
    y = model(x)
    return y.square().mean(), (y - 1).abs().mean()


def retained(first: Tensor, second: Tensor) -> None:
    first.backward(retain_graph=True)
    second.backward()


def together(first: Tensor, second: Tensor) -> None:
    (first + second).backward()


def run(model: nn.Module, optimizer: Any, backward: Callable[..., None], batches: list[list[Tensor]]) -> None:
    """Steps of several forward passes each."""
    for step in batches:
        optimizer.zero_grad()
        for x in step:
            backward(*losses(model, x))
        optimizer.step()


def batches(*shape: int, dtype: torch.dtype = torch.float64) -> list[list[Tensor]]:
    return [[torch.randn(rows, *shape, dtype=dtype) for rows in (5, 3)] for _ in range(2)]


def assert_close(model: nn.Module, twin: nn.Module, tolerance: float) -> None:
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


#: What the backend is given does not depend on checkpoints.
PASSES = [(again, kind) for again in (False, True) for kind in KINDS if not (again and kind.startswith("triton"))]


@pytest.mark.parametrize(("checkpointed", "kind"), PASSES)
def test_two_passes_step_as_one_of_the_sum(kind: str, checkpointed: bool) -> None:
    """The trap: N counts the rows twice, and Σ(s₁² + s₂²) is not Σ(s₁ + s₂)²."""
    triton = kind.startswith("triton")
    dtype = torch.float32 if triton else torch.float64
    model = plain_mlp(dtype=dtype)
    models = [model, copy.deepcopy(model)]
    steps = batches(24, dtype=dtype)
    for m, backward in zip(models, (retained, together), strict=True):
        wrapped = Checkpointed(m, use_reentrant=False) if checkpointed else m
        run(wrapped, bare(m, 0.1, **KINDS[kind]), backward, steps[: 1 if triton else 2])
    assert_close(*models, 1e-4 if triton else 1e-9)


@pytest.mark.parametrize("kind", ["kfac", "exact", "dense shampoo"])
def test_convolutions_alike(kind: str) -> None:
    model = peft_convnet().double()
    twin = copy.deepcopy(model)
    steps = batches(3, 8, 8)
    for m, backward in ((model, retained), (twin, together)):
        run(m, bare(m, 0.1, **KINDS[kind]), backward, steps)
    assert_close(model, twin, 1e-9)


def test_the_oracle_alike() -> None:
    model = plain_mlp()
    twin = copy.deepcopy(model)
    steps = batches(24)
    for m, backward in ((model, retained), (twin, together)):
        run(m, baselines.SVDLoRA(m, 0.1), backward, steps)
    assert_close(model, twin, 1e-9)


@pytest.mark.parametrize("kind", SUMS)
def test_sums_that_cannot_be_put_together_are_refused(kind: str) -> None:
    model = plain_mlp()
    optimizer = bare(model, 0.1, **SUMS[kind])
    x = torch.randn(5, 24, dtype=torch.float64)
    run(model, optimizer, together, [[x, x]])
    before = copy.deepcopy(model)
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=r"^l1: two backward passes went through one forward pass, .* the sum"):
        run(model, optimizer, retained, [[x]])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    run(model, optimizer, together, [[x, x]])
    assert not torch.equal(model.l1.lora_A.weight, before.l1.lora_A.weight)


def test_two_passes_are_two_calls_for_the_products_of_one() -> None:
    model = plain_mlp()
    optimizer = PSILoRA(model, 0.1, step="gradient", gradient="backward", momentum=0.0)
    with pytest.raises(RuntimeError, match="l1: gradient='backward' takes one call of a layer per step, there were 2"):
        run(model, optimizer, retained, [[torch.randn(5, 24, dtype=torch.float64)]])


def test_a_pass_after_a_reset_starts_its_call_anew() -> None:
    """What the first pass left is dropped, so the second has nothing to be added to."""
    model = plain_mlp()
    twin = copy.deepcopy(model)
    x = torch.randn(5, 24, dtype=torch.float64)
    for m in (model, twin):
        optimizer = bare(m, 0.1, metric="kfac")
        first, second = losses(m, x)
        if m is model:
            first.backward(retain_graph=True)
            m.zero_grad()
        second.backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
