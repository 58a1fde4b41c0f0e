"""Steps that are skipped or refused, and what is counted of them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from models import bare, data, factors, mse, plain_mlp, train
from torch import Tensor, nn

from psilora import PSILoRA


@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
def test_sparse_gradients_are_refused_before_anything_changes(name: str) -> None:
    model = plain_mlp()
    optimizer = bare(model, 0.1)
    mse(model, data()).backward()
    before = factors(model)
    weight = getattr(model.l1, name).weight
    weight.grad = weight.grad.to_sparse()
    with pytest.raises(RuntimeError, match="l1: sparse gradients are not supported"):
        optimizer.step()
    assert all(torch.equal(before[key], value) for key, value in factors(model).items())


# ---- non-finite gradients --------------------------------------------------------------------------------------------


def head_and_adapter() -> nn.Module:
    model = plain_mlp(dtype=torch.float32)
    model.l3.base.bias.requires_grad_()
    return model


def everything(model: nn.Module, optimizer: PSILoRA) -> list[Tensor]:
    state = [value.clone() for s in optimizer.state.values() for value in s.values()]
    return [p.detach().clone() for p in model.parameters()] + state


KINDS = [{}, {"metric": "kfac"}, {"gradient": "tangent"}, {"num_iters": 0}, {"num_iters": 2, "first": "B"}]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("where", ["loss", "lora_A", "lora_B", "bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_gradient_skips_the_whole_step(kind: dict[str, Any], where: str, value: float) -> None:
    model = head_and_adapter()
    optimizer = bare(model, 0.1, **kind)
    train(model, optimizer, [data(dtype=torch.float32)] * 2)
    before = everything(model, optimizer)

    def poisoned_step() -> None:
        optimizer.zero_grad()
        (mse(model, data(dtype=torch.float32)) * (value if where == "loss" else 1)).backward()
        if where != "loss":
            parameter = model.l3.base.bias if where == "bias" else getattr(model.l2, where).weight
            parameter.grad.view(-1)[3] = value
        optimizer.step()

    with pytest.warns(UserWarning, match="a step was skipped"):
        poisoned_step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        poisoned_step()
    assert all(torch.equal(a, b) for a, b in zip(before, everything(model, optimizer), strict=True))
    assert optimizer.stats()["skipped_steps"] == 2
    train(model, optimizer, [data(dtype=torch.float32)])
    assert all(bool(torch.isfinite(t).all()) for t in everything(model, optimizer))
    assert optimizer.stats()["skipped_steps"] == 2


def test_non_finite_can_raise_and_name_the_layers() -> None:
    model = head_and_adapter()
    optimizer = bare(model, 0.1, nonfinite="raise")
    train(model, optimizer, [data(dtype=torch.float32)])
    before = everything(model, optimizer)
    for name, weight in (("l2", model.l2.lora_A.weight), ("parameters outside", model.l3.base.bias)):
        optimizer.zero_grad()
        mse(model, data(dtype=torch.float32)).backward()
        weight.grad.view(-1)[0] = float("nan")
        with pytest.raises(RuntimeError, match=f"non-finite gradient or update in {name}.*nothing|no parameter"):
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, everything(model, optimizer), strict=True))


@pytest.mark.parametrize("kind", [{}, {"norm": "full"}, {"step": "spectral", "metric": "auto"}], ids=str)
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("where", ["l2", "parameters outside the LoRA pairs"])
def test_only_what_has_a_non_finite_gradient_is_named(
    kind: dict[str, Any], max_grad_norm: float | None, where: str
) -> None:
    """A NaN in one place makes the factor of clipping NaN, and with it every layer's update."""
    model = head_and_adapter()
    optimizer = bare(model, 0.1, nonfinite="raise", max_grad_norm=max_grad_norm, **kind)
    mse(model, data(dtype=torch.float32)).backward()
    parameter = model.l2.lora_A.weight if where == "l2" else model.l3.base.bias
    parameter.grad.view(-1)[0] = float("nan")
    with pytest.raises(RuntimeError, match=f"non-finite gradient or update in {where}; no parameter"):
        optimizer.step()


def test_a_layer_whose_update_alone_overflows_is_named() -> None:
    model = plain_mlp(dtype=torch.float32)
    groups = [{"layers": "l2", "lr": 1e38, "prox": 0.0}]
    optimizer = bare(model, 0.1, gradient="tangent", nonfinite="raise", groups=groups)
    (mse(model, data(dtype=torch.float32)) * 1e4).backward()
    with pytest.raises(RuntimeError, match="non-finite gradient or update in l2; no parameter"):
        optimizer.step()


def test_repaired_pivots_are_counted_and_warned_about_once() -> None:
    """Equal columns in B make BᵀB singular; without a proximal term Cholesky fails and must be repaired."""
    model = plain_mlp(dtype=torch.float32)
    with torch.no_grad():
        for layer in (model.l1, model.l2, model.l3):
            layer.lora_B.weight.copy_(layer.lora_B.weight[:, :1].expand(-1, 4).clone())
            layer.lora_A.weight.zero_()
            layer.lora_A.weight[0] = 1.0
    optimizer = bare(model, 1e-3, prox=0.0, momentum=0.0)
    with pytest.warns(UserWarning, match="not positive definite"):
        train(model, optimizer, [data(dtype=torch.float32)])
    assert optimizer.stats()["repaired_pivots"] > 0
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, [data(dtype=torch.float32)])
