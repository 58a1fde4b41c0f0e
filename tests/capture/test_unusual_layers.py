"""What a layer may do to what its linears take and give: with the hooks, all that it may do without them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from captures import assert_exact
from models import Checkpointed, bare, randomise_B
from torch import Tensor, nn

KINDS: list[dict[str, Any]] = [
    {},
    {"metric": "kfac"},
    {"gradient": "dense"},
    {"gradient": "backward", "momentum": 0.0},
    {"gradient": "tangent", "metric": "kfac"},
]


def scaled_in_place(h: Tensor, base: Tensor) -> Tensor:
    h *= 2.0
    return base + h


def added_to(h: Tensor, base: Tensor) -> Tensor:
    h += base
    return h


def methods(h: Tensor, base: Tensor) -> Tensor:
    return h.mul_(2.0).add_(base)


def out_of_place(h: Tensor, base: Tensor) -> Tensor:
    return base + 2.0 * h


FORWARDS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], float]] = {
    "*=": (scaled_in_place, 2.0),
    "+=": (added_to, 1.0),
    "mul_": (methods, 2.0),
    "out of place": (out_of_place, 2.0),
}


class Layer(nn.Module):
    """Two linears of a low rank beside a linear layer, put together by a function of (lora_B's output, the base's)."""

    def __init__(self, forward: str = "out of place", bias: bool = False) -> None:
        super().__init__()
        self.base = nn.Linear(6, 6).requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=bias)
        self.together, self.scaling = FORWARDS[forward]

    def forward(self, x: Tensor) -> Tensor:
        return self.together(self.lora_B(self.lora_A(x)), self.base(x))


def layers(*args: Any) -> nn.Module:
    model = nn.Sequential(*(Layer(*args) for _ in range(2))).double()
    randomise_B(model, 0.5)
    return model


def grads(model: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("checkpointed", [None, False, True])
@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6), (6,)], ids=str)
@pytest.mark.parametrize("bias", [False, True])  # with one, more than two dimensions make the output a view
@pytest.mark.parametrize("forward", FORWARDS)
def test_the_output_may_be_changed_in_place(
    forward: str, bias: bool, shape: tuple[int, ...], checkpointed: bool | None
) -> None:
    """The trap: autograd forbids it on the output of a function of one's own that is a view."""
    plain = layers(forward, bias)
    model = copy.deepcopy(plain)
    optimizer = bare(model)
    run = model if checkpointed is None else Checkpointed(model, checkpointed)
    for x in (torch.randn(shape).double(), torch.randn(shape).double()):  # accumulates
        run(x.clone().requires_grad_()).square().mean().backward()
        plain(x).square().mean().backward()
    assert_exact(optimizer)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(grads(model), grads(plain), strict=True))
    assert all(record.calls == 2 for record in optimizer.captured())


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_vector_is_one_row(kind: dict[str, Any]) -> None:
    """A linear layer takes a vector, too; the step is that of a matrix with one row."""
    model = layers()
    twin = copy.deepcopy(model)
    ours, theirs = bare(model, **kind), bare(twin, **kind)
    for x in torch.randn(2, 6).double():
        for m, optimizer, rows in ((model, ours, x), (twin, theirs, x[None])):
            optimizer.zero_grad()
            m(rows).square().mean().backward()
            assert all(record.rows == 1 for record in optimizer.captured())
            optimizer.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base, self.scaling = nn.Conv2d(3, 4, 3).requires_grad_(False), 1.0
        self.lora_A, self.lora_B = nn.Conv2d(3, 2, 3, bias=False), nn.Conv2d(2, 4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.lora_B(self.lora_A(x))
        h += self.base(x)
        return h


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("batched", [True, False])
def test_convolutions_alike(batched: bool, memory_format: torch.memory_format) -> None:
    """Without a batch dimension the output is a view, whose base is what an operation in place changes."""
    model = nn.Sequential(Convolution()).double().to(memory_format=memory_format)
    optimizer = bare(model)
    x = torch.randn(2, 3, 6, 7).double().to(memory_format=memory_format)
    model(x if batched else x[0]).square().mean().backward()
    assert_exact(optimizer)


def test_a_hook_that_changes_the_gradient_at_the_output_is_seen() -> None:
    """Whenever it was registered: S_B is what goes on to lora_B."""
    model = layers()
    optimizer = bare(model)
    model[0].lora_B.register_forward_hook(lambda _m, _args, h: h.register_hook(lambda s: 3 * s) and None)
    model(torch.randn(5, 6).double()).square().mean().backward()
    assert_exact(optimizer)


class Cut(torch.autograd.Function):
    """A function that gives no gradient, not even zeros."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


def test_a_call_that_gets_no_gradient_has_no_part_in_the_step() -> None:
    model = layers()
    optimizer, x = bare(model), torch.randn(5, 6).double()
    Cut.apply(model(x)).sum().backward()
    assert grads(model) == [None] * 4 and optimizer.capture_bytes() == 0
    (Cut.apply(model(x)).sum() + model(2 * x).square().mean()).backward()
    assert_exact(optimizer)
    assert all(record.calls == 1 for record in optimizer.captured())
