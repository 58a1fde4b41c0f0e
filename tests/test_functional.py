"""A step on tensors is the step that the class takes on a model, and it changes nothing that it was given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import one_layer
from torch import Tensor

from psilora import PSILoRA
from psilora.functional import init, step

F64 = torch.float64
SPECTRAL: list[dict[str, Any]] = [
    {},
    {"metric": None, "nesterov": False, "weight_decay": 0.1},
    {"joint": False, "fade": False, "momentum": 0.5},
    {"step": "gradient", "gradient": "tangent", "num_iters": 2, "first": "B"},
    {"step": "gradient", "gradient": "tangent", "maximize": True, "momentum_rank": 2},
]
EXACT: list[dict[str, Any]] = [
    {"step": "gradient"},
    {"step": "gradient", "metric": "kfac", "num_iters": 2},
    {"step": "gradient", "metric": "shampoo-dense", "momentum": 0.0, "loss_reduction": "sum"},
    {"step": "gradient", "metric": "kfac-low-rank", "metric_rank": 2, "momentum_rank": 1},
    {"step": "gradient", "solver": "ritz", "weight_decay": 0.1},
]


@pytest.mark.parametrize("kind", [*SPECTRAL, *EXACT], ids=str)
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_three_steps_are_those_of_the_class_and_bitwise_from_the_same_gradients(
    kind: dict[str, Any], dtype: torch.dtype
) -> None:
    layer = one_layer(7, 9, 3, 6.0, dtype)
    optimizer = PSILoRA(layer, 0.05, backend="reference", **kind)
    B, A, state = layer.lora_B.weight.detach().clone(), layer.lora_A.weight.detach().clone(), None
    state = init(B, A, **kind)
    rows: list[tuple[Tensor, Tensor]] = []
    layer.register_forward_hook(
        lambda module, args, out: out.register_hook(lambda s: rows.append((args[0], s))) and None
    )
    for _ in range(3):
        rows.clear()
        optimizer.zero_grad()
        layer(torch.randn(5, 9, dtype=dtype)).square().mean(1).mean().backward()
        if kind in EXACT:
            given: dict[str, Any] = {"activations": rows[0]}
        else:
            given = {"lora_gradients": (layer.lora_B.weight.grad.clone(), layer.lora_A.weight.grad.clone())}
        kept = [t.clone() for t in (B, A, *state[0].values(), *state[1].values())]
        new_B, new_A, new_state = step(B, A, state, lr=0.05, scaling=layer.scaling, **given, **kind)
        assert all(map(torch.equal, kept, (B, A, *state[0].values(), *state[1].values())))
        assert not torch.equal(new_B, B) and not torch.equal(new_A, A)
        B, A, state = new_B, new_A, new_state
        optimizer.step()
        for mine, parameter in ((B, layer.lora_B.weight), (A, layer.lora_A.weight)):
            # The class reads dA, dB and s·S as autograd has rounded them; here they come from X and S.
            allowed = 0.0 if kind in SPECTRAL else 1e4 * torch.finfo(dtype).eps
            assert (mine - parameter).norm() <= allowed * parameter.norm()
        if kind in SPECTRAL:
            for mine, parameter in zip(state, (layer.lora_B.weight, layer.lora_A.weight), strict=True):
                theirs = optimizer.state[parameter]
                assert set(mine) == set(theirs) and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("kind", [*SPECTRAL, *EXACT], ids=str)
def test_a_rate_of_zero_changes_no_bit_of_the_factors(kind: dict[str, Any]) -> None:
    B, A = torch.randn(7, 3), torch.randn(3, 9)
    X, S = torch.randn(5, 9), torch.randn(5, 7)
    given = {"activations": (X, S)} if kind in EXACT else {"lora_gradients": (S.T @ (X @ A.T), (S @ B).T @ X)}
    new_B, new_A, state = step(B, A, init(B, A, **kind), lr=0.0, **given, **kind)
    assert torch.equal(new_B, B) and torch.equal(new_A, A)
    assert state[0]["step"] == 1 and state[1]["step"] == 1


def test_several_calls_are_their_rows_together() -> None:
    B, A = torch.randn(7, 3, dtype=F64), torch.randn(3, 9, dtype=F64)
    X, S = torch.randn(8, 9, dtype=F64), torch.randn(8, 7, dtype=F64)
    kind: dict[str, Any] = {"step": "gradient", "metric": "kfac"}
    one = step(B, A, init(B, A, **kind), lr=0.1, activations=(X, S), **kind)
    two = step(B, A, init(B, A, **kind), lr=0.1, activations=[(X[:3], S[:3]), (X[3:], S[3:])], **kind)
    torch.testing.assert_close(one[:2], two[:2], rtol=1e-12, atol=1e-12)


BAD = [
    ({"lr": -1.0}, "Invalid lr=-1.0"),
    ({"fade": False, "step": "gradient"}, "Invalid fade=False with step='gradient'"),
    ({"speed": 3}, r"unknown settings \['speed'\]"),
    ({"step": "gradient"}, "step='gradient' with gradient='exact' needs activations and nothing else"),
    ({"lora_gradients": None}, "step='spectral' with gradient='tangent' needs lora_gradients and nothing else"),
    ({"step": "gradient", "gradient": "dense"}, "gradient='dense'"),
    ({"scaling": 0.0}, "Invalid scaling=0.0. Must be > 0."),
    ({"lora_gradients": (torch.zeros(3, 7), torch.zeros(3, 9))}, r"Invalid dB of shape \(3, 7\). Must be \(7, 3\)."),
    (
        {"step": "gradient", "lora_gradients": None, "activations": (torch.zeros(5, 7), torch.zeros(5, 9))},
        r"Invalid X and S of shapes \(5, 7\) and \(5, 9\). Must be \(N, 9\) and \(N, 7\).",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    B, A = torch.randn(7, 3), torch.randn(3, 9)
    given = {"lr": 0.1, "lora_gradients": (torch.zeros(7, 3), torch.zeros(3, 9)), **change}
    with pytest.raises(ValueError, match=message):
        step(B, A, init(B, A), **given)
    with pytest.raises(ValueError, match=r"the shapes \(7, 3\) of B and \(4, 9\) of A do not chain"):
        init(B, torch.randn(4, 9))
