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
    {"step": "gradient", "gradient": "tangent", "metric": "kfac"},
    {"step": "gradient", "gradient": "tangent", "metric": "shampoo-dense"},
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


GRADIENTS = (torch.zeros(7, 3), torch.zeros(3, 9))
ROWS = (torch.zeros(5, 9), torch.zeros(5, 7))
EXACTLY: dict[str, Any] = {"step": "gradient", "lora_gradients": None}
BAD = [
    ({"lr": -1.0}, "Invalid lr=-1.0"),
    ({"fade": False, "step": "gradient"}, "Invalid fade=False with step='gradient'"),
    ({"speed": 3}, r"unknown settings \['speed'\]"),
    ({"step": "gradient"}, "gradient='exact' and metric=None needs activations and nothing else"),
    ({"lora_gradients": None}, "gradient='tangent' and metric='lora' needs lora_gradients and nothing else"),
    ({"step": "gradient", "gradient": "dense"}, "gradient='dense'. Must be 'exact' or 'tangent' without a model."),
    (
        {"step": "gradient", "gradient": "tangent", "metric": "kfac"},
        "gradient='tangent' and metric='kfac' needs activations and nothing else",
    ),
    ({"scaling": 0.0}, "Invalid scaling=0.0. Must be finite and > 0."),
    ({"scaling": float("inf")}, "Invalid scaling=inf. Must be finite and > 0."),
    ({"scaling": torch.tensor(-2.0)}, "Invalid scaling=-2.0. Must be finite and > 0."),
    ({"scaling": torch.ones(2)}, r"Invalid scaling of shape \(2,\). Must be a number or a one-element tensor."),
    ({"lora_gradients": (torch.zeros(3, 7), torch.zeros(3, 9))}, r"Invalid dB of shape \(3, 7\). Must be \(7, 3\)."),
    ({"lora_gradients": (GRADIENTS[0], None)}, r"Invalid lora_gradients=\(Tensor, None\). Must be two tensors"),
    ({"lora_gradients": (GRADIENTS[0], GRADIENTS[1].long())}, "Invalid dA of type torch.int64. Must be a tensor of a"),
    ({**EXACTLY, "activations": []}, r"Invalid activations=\(\). Must be \(X, S\), or a list of one or more of them."),
    ({**EXACTLY, "activations": [ROWS, ROWS[:1]]}, r"Invalid activations=\(\(Tensor, Tensor\), \(Tensor\)\). Must be"),
    ({**EXACTLY, "activations": (ROWS[0].cfloat(), ROWS[1])}, "Invalid X of type torch.complex64. Must be a tensor of"),
    (
        {**EXACTLY, "activations": ROWS[::-1]},
        r"Invalid X and S of shapes \(5, 7\) and \(5, 9\). Must be \(N, 9\) and \(N, 7\).",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    B, A = torch.randn(7, 3), torch.randn(3, 9)
    given = {"lr": 0.1, "lora_gradients": GRADIENTS, **change}
    with pytest.raises(ValueError, match=message):
        step(B, A, init(B, A), **given)


BAD_FACTORS = [
    ((7, 3), (4, 9), {}, r"the shapes \(7, 3\) of B and \(4, 9\) of A do not chain"),
    ((7, 0), (0, 9), {}, r"Invalid B and A of shapes \(7, 0\) and \(0, 9\). No side may be 0."),
    ((4097, 1), (1, 3), {"step": "gradient", "metric": "kfac-dense"}, "the pair is 4097×3: metric='kfac-dense'.*4096"),
    ((7, 3), (3, 9), {"step": "gradient", "momentum_rank": 8}, r"invalid momentum_rank=8. Must be in \[1, 7\]."),
    ((7, 3), (3, 9), {"step": "gradient", "gradient": "auto"}, "Invalid gradient='auto'. Must be 'exact' or 'tangent'"),
]


@pytest.mark.parametrize(("B", "A", "kind", "message"), BAD_FACTORS, ids=[message for *_, message in BAD_FACTORS])
def test_factors_that_the_settings_cannot_serve_are_refused(
    B: tuple[int, int], A: tuple[int, int], kind: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        init(torch.zeros(B), torch.zeros(A), **kind)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_factors_are_of_a_floating_dtype(dtype: torch.dtype) -> None:
    B, A = torch.zeros(7, 3), torch.zeros(3, 9)
    for factors, name in (((B.to(dtype), A), "B"), ((B, A.to(dtype)), "A")):
        with pytest.raises(ValueError, match=f"Invalid {name} of type {dtype}. Must be a tensor of a floating dtype."):
            init(*factors)
    with pytest.raises(ValueError, match="Invalid dtypes torch.float64 of B and torch.float32 of A. Must be both"):
        init(B.double(), A)


B7, A9 = torch.ones(7, 3), torch.ones(3, 9)
BAD_STATES: list[tuple[Any, str]] = [
    (None, "Invalid state=None. Must be what init, or the last step, has returned."),
    (init(B7, A9)[:1], r"Invalid state=\(dict\). Must be what init"),
    (init(B7, A9, momentum=0.0), "lora_B: the state lacks 'momentum', which its settings ask for"),
    (init(B7, A9, metric=None), "lora_B: the state lacks 'metric', which its settings ask for"),
    (init(B7, A9, fade=False, cap=None), "lora_B: the state lacks 'norms', which its settings ask for"),
    ((init(B7, A9)[0], {}), "lora_A: the state lacks 'step', which the other factor's has"),
    (({**init(B7, A9)[0], "metric": None}, init(B7, A9)[1]), "the state 'metric' is of type NoneType. Must be a"),
    (init(B7, A9, step="gradient"), r"the state 'momentum' has shape \(7, 3\). Must be \(7, 6\)."),
    (init(B7, A9)[::-1], r"lora_B: the state 'momentum' has shape \(6, 9\). Must be \(7, 6\)."),
    (init(torch.ones(8, 3), A9), r"lora_B: the state 'momentum' has shape \(8, 6\). Must be \(7, 6\)."),
]


@pytest.mark.parametrize(("state", "message"), BAD_STATES, ids=[message for _, message in BAD_STATES])
def test_a_state_of_other_settings_or_factors_is_refused_by_name(state: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        step(B7, A9, state, lr=0.1, lora_gradients=GRADIENTS)


def test_a_scaling_in_a_tensor_is_its_number() -> None:
    B, A = torch.randn(7, 3), torch.randn(3, 9)
    given: dict[str, Any] = {"lr": 0.1, "lora_gradients": (torch.randn(7, 3), torch.randn(3, 9))}
    one, two = (step(B, A, init(B, A), scaling=s, **given) for s in (2.0, torch.tensor(2.0)))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1]) and not torch.equal(one[0], B)
