"""Compiling ahead: every kernel of the steps to come is launched, and nothing is changed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import data, factors, mse, plain_mlp, train
from torch import nn

from psilora import PSILoRA
from psilora.backends.triton import backend as triton_backend

if triton_backend.unavailable_reason() is not None:
    pytest.skip(str(triton_backend.unavailable_reason()), allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRADIENT = {"step": "gradient", "metric": None}
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "exact": GRADIENT,
    "exact, K-FAC, controller": {**GRADIENT, "metric": "kfac", "controller": "slope"},
    "tangent": {**GRADIENT, "gradient": "tangent", "momentum": 0.0},
    "K-FAC from sums": {**GRADIENT, "gradient": "tangent", "metric": "kfac"},
}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, tuple[Any, ...]]]]:
    """The kernels that are launched, with what they are compiled for."""
    from triton.runtime import interpreter, jit

    found: list[tuple[str, tuple[Any, ...]]] = []
    for cls in (interpreter.InterpretedFunction, jit.JITFunction):
        get = cls.__getitem__

        def spied(kernel: Any, grid: Any, get: Any = get) -> Any:
            def run(*args: Any, **options: Any) -> Any:
                numbers = tuple((name, str(value)) for name, value in options.items())
                found.append((kernel.__name__, numbers))
                return get(kernel, grid)(*args, **options)

            return run

        monkeypatch.setattr(cls, "__getitem__", spied)
    yield found


def network() -> nn.Module:
    torch.manual_seed(0)
    return plain_mlp((12, 10, 8, 6), dtype=torch.float32).to(DEVICE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_launches_only_what_was_compiled_ahead(kind: str, launched: list[Any]) -> None:
    model = network()
    optimizer = PSILoRA(model, 0.05, backend="triton", **KINDS[kind])
    assert any("compiled" in line for line in optimizer.warmup())
    ahead = set(launched)
    launched.clear()
    train(model, optimizer, [tuple(t.to(DEVICE) for t in data(9, 12, 6, torch.float32))])
    assert len(launched) >= 5
    assert not set(launched) - ahead


def test_nothing_is_changed() -> None:
    """Neither before the first step, whose state is not made yet, nor between a forward and its backward pass."""
    model = network()
    twin = copy.deepcopy(model)
    batches = [tuple(t.to(DEVICE) for t in data(9, 12, 6, torch.float32)) for _ in range(2)]
    ours, theirs = (PSILoRA(net, 0.05, backend="triton") for net in (model, twin))
    seed = torch.random.get_rng_state()
    ours.warmup()
    assert torch.equal(seed, torch.random.get_rng_state())
    assert not ours.state and not ours._backends and ours.backends() == []
    train(model, ours, batches[:1])
    train(twin, theirs, batches[:1])
    state = {name: value.clone() for s in ours.state.values() for name, value in s.items()}
    ours.zero_grad()
    loss = mse(model, batches[1])
    ours.warmup()
    loss.backward()  # whose saved tensors are told by their versions
    assert all(torch.equal(value, state[name]) for name, value in list(ours.state.values())[-1].items())
    ours.step()
    train(twin, theirs, batches[1:])
    assert all(torch.equal(value, factors(twin)[name]) for name, value in factors(model).items())


def test_the_reference_has_nothing_to_compile() -> None:
    lines = PSILoRA(network(), 0.05, backend="reference").warmup()
    assert lines[0] == "reference: 3 pairs, backend='reference': nothing to compile" and len(lines) == 2
