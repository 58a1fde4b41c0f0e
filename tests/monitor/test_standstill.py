"""Pairs that stand still while others are trained are named, once, after a bounded number of steps, with the reason."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import MLP, data, train
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from psilora import LoRALinear, PSILoRA
from psilora.monitor.warn_once import IDLE_STEPS, STILL_STEPS

KINDS: dict[str, dict[str, Any]] = {
    "spectral": {},
    "exact": {"step": "gradient"},
    "tangent kfac": {"step": "gradient", "gradient": "tangent", "metric": "kfac"},
}


class Experts(nn.Module):
    """Layers of which `using` are called, and `detached` called to no effect."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([LoRALinear(nn.Linear(24, 6), 2) for _ in range(4)])
        self.using, self.detached = [0, 1, 2, 3], []

    def forward(self, x: Tensor) -> Tensor:
        for i in self.detached:
            self.experts[i](x)
        return sum(self.experts[i](x) for i in self.using)


def said(model: nn.Module, optimizer: PSILoRA, steps: int, set_to_none: bool = True) -> list[str]:
    """The warnings of some steps."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(steps):
            optimizer.zero_grad(set_to_none)
            x, y = data()
            (model(x) - y).square().mean().backward()
            optimizer.step()
    return [str(w.message) for w in seen if "psilora" in str(w.message)]


@pytest.mark.parametrize("kind", KINDS)
def test_experts_that_are_never_called_are_named_together_and_once(kind: str) -> None:
    model = Experts().double()
    model.using, model.detached = [0, 1], [3]
    optimizer = PSILoRA(model, 0.01, **KINDS[kind])
    assert said(model, optimizer, STILL_STEPS - 1) == []
    (message,) = said(model, optimizer, 1)
    assert message.startswith(f"psilora: no gradient for {STILL_STEPS} steps, while other LoRA pairs are trained, in ")
    two, three = message.partition(" in experts.2 (")[2].split("), experts.3 (")
    if kind == "spectral":
        assert (
            two
            == three.rstrip(")")
            == "it has never had a gradient: its layer is not called, or the loss does not depend on it"
        )
    else:
        assert two == "no call of its layer with gradients enabled was seen"
        assert three == "its layer is called, but the loss does not depend on it)"
    assert said(model, optimizer, 2 * STILL_STEPS) == []


@pytest.mark.parametrize("set_to_none", [True, False])
def test_an_expert_that_waits_for_less_is_not_named_and_one_that_stops_later_is(set_to_none: bool) -> None:
    model = Experts().double()
    optimizer = PSILoRA(model, 0.01, step="gradient")
    for _ in range(2):
        model.using = [0, 1, 2]
        assert said(model, optimizer, STILL_STEPS - 1, set_to_none) == []
        model.using = [0, 1, 2, 3]
        assert said(model, optimizer, 1, set_to_none) == []
    model.using = [0, 2, 3]
    before = copy.deepcopy(model.experts[1].state_dict())
    (message,) = said(model, optimizer, STILL_STEPS + 3, set_to_none)
    assert message.endswith("in experts.1 (its layer is no longer called, or the loss no longer depends on it)")
    assert all(torch.equal(before[name], value) for name, value in model.experts[1].state_dict().items())


def adapted(*names: str) -> nn.Module:
    """An MLP under PEFT; with these adapters, all of them active, on l1 and l2."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["l1", "l2"])
    model = get_peft_model(MLP((24, 20, 16, 6)), config, names[0]).double()
    for name in names[1:]:
        model.add_adapter(name, config)
    return model.double()


def replace(model: nn.Module) -> None:
    layer = model.base_model.model.l2
    for module in (layer.lora_A["default"], layer.lora_B["default"]):
        module.weight = nn.Parameter(module.weight.detach().clone())


def unload(model: nn.Module) -> None:
    model.base_model.model.l2 = model.base_model.model.l2.base_layer


def merge(model: nn.Module) -> None:
    model.base_model.model.l2.merge()


def disable(model: nn.Module) -> None:
    model.base_model.model.l2.enable_adapters(False)


def deactivate(model: nn.Module) -> None:
    model.base_model.model.l2.set_adapter([])


def freeze(model: nn.Module) -> None:
    model.base_model.model.l2.requires_grad_(False)


CAUSES: dict[Callable[[nn.Module], None], str] = {
    replace: "its parameters are no longer the layer's: the adapter was replaced or deleted",
    unload: "its layer is no longer part of the model",
    merge: "its adapter is merged into the base weight",
    disable: "its adapters are disabled",
    deactivate: "its adapter 'default' is not active",
    freeze: "frozen: lora_A and lora_B",
}


@pytest.mark.parametrize("cause", CAUSES, ids=lambda cause: cause.__name__)
@pytest.mark.parametrize("kind", ["spectral", "exact"])
def test_the_reason_is_told(cause: Callable[[nn.Module], None], kind: str) -> None:
    model = adapted("default")
    optimizer = PSILoRA(model, 0.01, **KINDS[kind])
    train(model, optimizer, [data()])
    cause(model)
    (message,) = said(model, optimizer, STILL_STEPS)
    assert message.endswith(f"in base_model.model.l2 ({CAUSES[cause]})")
    assert said(model, optimizer, STILL_STEPS + 1) == []


def test_a_deleted_adapter_is_told_from_one_that_waits() -> None:
    model = adapted("default", "other", "third")
    model.base_model.set_adapter(["default", "other", "third"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    optimizer = PSILoRA(model, 0.01)
    train(model, optimizer, [data()])
    model.delete_adapter("third")
    model.set_adapter("default")
    (message,) = said(model, optimizer, STILL_STEPS)
    names = [f"base_model.model.l{i}" for i in (1, 2)]
    for name in names:
        assert f"{name} (other) (its adapter 'other' is not active)" in message
        assert (
            f"{name} (third) (its parameters are no longer the layer's: the adapter was replaced or deleted)" in message
        )
        assert f"{name} (its" not in message


def test_nobody_is_named_while_nobody_moves() -> None:
    """Steps without any gradient have their own warning."""
    model = Experts().double()
    optimizer = PSILoRA(model, 0.01)
    with pytest.warns(UserWarning, match="no gradient in any LoRA pair"):
        for _ in range(STILL_STEPS + 1):
            optimizer.step()
    assert said(model, optimizer, 1) == []


@pytest.mark.parametrize("cause", CAUSES, ids=lambda cause: cause.__name__)
def test_where_no_pair_moves_the_reasons_are_told_and_rebind_only_where_it_helps(
    cause: Callable[[nn.Module], None],
) -> None:
    """The trap: who has frozen the adapters is sent to look for one that was merged or replaced."""
    model = adapted("default")
    for parameter in model.base_model.model.l1.parameters():
        parameter.requires_grad_(False)
    model.base_model.model.l3.weight.requires_grad_()
    optimizer = PSILoRA(model, 0.01, groups=[{"parameters": "l3", "lr": 1e-3}])
    train(model, optimizer, [data()])
    cause(model)
    (message,) = said(model, optimizer, IDLE_STEPS + 2)
    advice = "" if cause is freeze else "; after a change of adapters call optimizer.rebind()"
    start = f"psilora: no gradient in any LoRA pair for {IDLE_STEPS} steps, in base_model.model.l2"
    assert message == f"{start} ({CAUSES[cause]}){advice}"
