"""Problems kept from step to step: the very same ones where nothing changed, and never what has changed meanwhile."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import bare, data, factors, mse, plain_mlp
from torch import Tensor, nn

from psilora import LoRALinear, PSILoRA
from psilora.backends.dispatch import backend_unavailable
from psilora.steps.problem import Problem

FP32 = torch.float32
KINDS: dict[str, dict[str, Any]] = {
    "spectral": {"step": "spectral"},
    "exact": {},
    "K-FAC from sums": {"gradient": "tangent", "metric": "kfac"},
    "one call": {"gradient": "backward", "momentum": 0.0},
}
KERNELS = pytest.mark.skipif(backend_unavailable("triton") is not None, reason=str(backend_unavailable("triton")))


def make(kind: str, backend: str, **more: Any) -> tuple[nn.Module, PSILoRA]:
    torch.manual_seed(1)
    model = plain_mlp((12, 10, 8, 6), dtype=FP32)
    settings = {"metric": "auto", **KINDS[kind], **more} if kind == "spectral" else {**KINDS[kind], **more}
    return model, bare(model, 0.05, backend=backend, **settings)


def step(model: nn.Module, optimizer: PSILoRA, batch: tuple[Tensor, Tensor]) -> None:
    optimizer.zero_grad()
    mse(model, batch).backward()
    optimizer.step()


def problems(optimizer: PSILoRA) -> list[Problem]:
    kept = optimizer._assembler._last
    return [] if kept is None else list(kept.found.problems)


# ---- what may happen between two steps ------------------------------------------------------------------------------


def set_rate(model: nn.Module, optimizer: PSILoRA) -> None:
    optimizer.param_groups[0]["lr"] *= 0.5


def set_a_structural_option(model: nn.Module, optimizer: PSILoRA) -> None:
    optimizer.param_groups[0]["weight_decay"] = 0.1


def new_storage(model: nn.Module, optimizer: PSILoRA) -> None:
    model.l1.lora_A.weight.data = model.l1.lora_A.weight.data.clone() * 1.25


def another_layout_of_the_same_storage(model: nn.Module, optimizer: PSILoRA) -> None:
    weight = model.l2.lora_B.weight
    turned = weight.data.new_empty(weight.shape[::-1]).T
    turned.copy_(weight.data)
    weight.data = turned


def freeze(model: nn.Module, optimizer: PSILoRA) -> None:
    model.l3.lora_B.weight.requires_grad_(False)


def thaw(model: nn.Module, optimizer: PSILoRA) -> None:
    model.l3.lora_B.weight.requires_grad_(True)


def rescale(model: nn.Module, optimizer: PSILoRA) -> None:
    model.l2.scaling = 1.0


def change_in_place(model: nn.Module, optimizer: PSILoRA) -> None:
    with torch.no_grad():
        model.l1.lora_B.weight.mul_(1.5)


def replace_a_state(model: nn.Module, optimizer: PSILoRA) -> None:
    state = optimizer.state[model.l1.lora_A.weight]
    for name in ("momentum", "metric"):
        if name in state:
            state[name] = state[name] * 0.5


def replace_all_state_of_a_parameter(model: nn.Module, optimizer: PSILoRA) -> None:
    weight = model.l1.lora_B.weight
    optimizer.state[weight] = {name: value * 0.5 for name, value in optimizer.state[weight].items()}


def reload(model: nn.Module, optimizer: PSILoRA) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def drop_a_state(model: nn.Module, optimizer: PSILoRA) -> None:
    del optimizer.state[model.l2.lora_A.weight], optimizer.state[model.l2.lora_B.weight]


def nothing(model: nn.Module, optimizer: PSILoRA) -> None:
    """Leave all as it is."""


EVENTS: list[Callable[[nn.Module, PSILoRA], None]] = [
    nothing, set_rate, nothing, set_a_structural_option, new_storage, another_layout_of_the_same_storage, freeze,
    nothing, thaw, rescale, change_in_place, replace_a_state, replace_all_state_of_a_parameter, reload, nothing,
    drop_a_state, nothing,
]  # fmt: skip


#: Those in which a kernel would read at an address that is no longer right.
OF_KERNELS = [nothing, set_rate, new_storage, replace_all_state_of_a_parameter, rescale, freeze, thaw, reload]


@pytest.mark.parametrize(
    ("kind", "backend"), [*((kind, "reference") for kind in KINDS), pytest.param("spectral", "triton", marks=KERNELS)]
)
@pytest.mark.filterwarnings("ignore:.*one of its factors has no gradient")
def test_what_is_kept_is_what_would_be_found_anew(kind: str, backend: str) -> None:
    """Whatever happens between two steps, an optimizer that keeps nothing does the same, bit for bit."""
    runs = []
    events = EVENTS if backend == "reference" else OF_KERNELS
    for forgets in (False, True):
        model, optimizer = make(kind, backend)
        torch.manual_seed(2)
        found = []
        for event in events:
            event(model, optimizer)
            if forgets:
                optimizer._assembler.forget()
                optimizer._backends.clear()
                optimizer._settings._seen = []
            step(model, optimizer, data(9, 12, 6, FP32))
            found.append(factors(model))
        runs.append(found)
    for event, kept, anew in zip(events, *runs, strict=True):
        for name, value in anew.items():
            assert torch.equal(kept[name], value), f"{name} after {event.__name__}"


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_problems_serve_every_step(kind: str) -> None:
    """And they hold no gradient between two steps, which `zero_grad` is to free."""
    model, optimizer = make(kind, "reference")
    batch = data(9, 12, 6, FP32)
    step(model, optimizer, batch)
    first = problems(optimizer)
    assert len(first) == 3
    gradient = weakref.ref(model.l1.lora_A.weight.grad)
    optimizer.zero_grad()
    gc.collect()
    assert gradient() is None
    for event in (nothing, set_rate, change_in_place):
        event(model, optimizer)
        step(model, optimizer, batch)
        assert all(a is b for a, b in zip(first, problems(optimizer), strict=True)), event.__name__
    for event in (rescale, new_storage, set_a_structural_option, replace_a_state, reload):
        if event is replace_a_state and kind == "one call":
            continue  # it has none but counts
        before = problems(optimizer)
        event(model, optimizer)
        step(model, optimizer, batch)
        assert not any(a is b for a, b in zip(before, problems(optimizer), strict=True)), event.__name__


def test_a_loaded_state_is_not_kept_beside_the_old_one() -> None:
    model, optimizer = make("spectral", "reference")
    step(model, optimizer, data(9, 12, 6, FP32))
    old = [weakref.ref(state["momentum"]) for state in optimizer.state.values()]
    reload(model, optimizer)
    gc.collect()
    assert all(ref() is None for ref in old)


def test_adapters_that_take_turns_are_kept_each() -> None:
    model = nn.ModuleDict({name: LoRALinear(nn.Linear(12, 6), 4) for name in "ab"})
    optimizer = PSILoRA(model, 0.05, backend="reference")
    seen: dict[str, list[Problem]] = {}
    for turn in range(6):
        name = "ab"[turn % 2]
        optimizer.zero_grad()
        mse(model[name], data(9, 12, 6, FP32)).backward()
        optimizer.step()
        found = problems(optimizer)
        assert [p.pair.name for p in found] == [name]
        if turn > 1:
            assert found[0] is seen[name][0]
        seen[name] = found


def test_rates_of_groups_follow_their_schedules() -> None:
    """One group's rate is 0 in every other step: its layers stand still then, and the other ones move."""
    torch.manual_seed(1)
    model = plain_mlp((12, 10, 8, 6), dtype=FP32)
    optimizer = PSILoRA(model, 0.05, backend="reference", groups=[{"layers": "l2", "lr": 0.02}])
    for turn in range(4):
        optimizer.param_groups[1]["lr"] = 0.02 * (turn % 2)
        before = factors(model)
        step(model, optimizer, data(9, 12, 6, FP32))
        for name, value in factors(model).items():
            assert torch.equal(value, before[name]) == ("l2" in name and turn % 2 == 0), (name, turn)


def test_a_gradient_of_another_kind_is_noticed() -> None:
    model, optimizer = make("spectral", "reference")
    batch = data(9, 12, 6, FP32)
    step(model, optimizer, batch)
    mse(model, batch).backward()
    weight = model.l1.lora_A.weight
    weight.grad = weight.grad.to_sparse()
    with pytest.raises(RuntimeError, match="l1: sparse gradients are not supported"):
        optimizer.step()
