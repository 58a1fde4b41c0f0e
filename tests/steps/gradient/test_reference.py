"""The gradient step against its formulas with dense matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import bare, one_layer, train
from oracles import dense_gradient, literal, raised, tangent

from psilora.lowrank.gradient_operator import ActivationGradient

F64 = torch.float64


@settings(max_examples=80, deadline=None)
@given(
    shape=st.tuples(st.integers(4, 10), st.integers(4, 10)),
    rank=st.integers(1, 4),
    num_iters=st.integers(0, 3),
    first=st.sampled_from("AB"),
    metric=st.sampled_from([None, "kfac", "shampoo", "kfac-dense", "shampoo-dense"]),
    corrected=st.booleans(),
    gradient=st.sampled_from(["exact", "tangent"]),
    momentum=st.sampled_from([0.0, 0.6]),
    momentum_rank=st.sampled_from([None, 1, 4]),
    wd=st.sampled_from([0.0, 0.3]),
    alpha=st.sampled_from([1.0, 3.0, 16.0]),
    reduction=st.sampled_from(["mean", "sum"]),
    maximize=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_two_steps_match_the_formulas(
    shape, rank, num_iters, first, metric, corrected, gradient, momentum, momentum_rank, wd, alpha, reduction, maximize,
    seed,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    (d_out, d_in), rows = shape, 12
    layer = one_layer(d_out, d_in, rank, alpha)
    lr, prox, beta, damping, power = 0.05, 0.5, 0.9, 1e-3, 0.5
    optimizer = bare(
        layer, lr, num_iters=num_iters, first=first, metric=metric, metric_bias_correction=corrected,
        gradient=gradient, momentum=momentum, momentum_rank=momentum_rank, weight_decay=wd, prox=prox,
        metric_beta=beta, damping=damping, metric_power=power, loss_reduction=reduction, maximize=maximize,
    )  # fmt: skip
    optimizer.init_state()
    root = layer.scaling**0.5
    B, A = layer.lora_B.weight.detach() * root, layer.lora_A.weight.detach() * root
    state_A, state_B = optimizer.state[layer.lora_A.weight], optimizer.state[layer.lora_B.weight]
    memory = (state_B["momentum"].clone(), state_A["momentum"].clone()) if momentum else None
    dense = metric is not None and metric.endswith("dense")
    D_A, D_B = ((0 if corrected else 1) * torch.eye(n, dtype=F64) for n in (d_in, d_out))
    D_A, D_B = (D_A, D_B) if dense else (D_A.diagonal(), D_B.diagonal())
    tau = momentum if metric else 0.0
    for t in (1, 2):
        x, y = torch.randn(rows, d_in, dtype=F64), torch.randn(rows, d_out, dtype=F64)
        G_true = dense_gradient(layer, x, y)
        out = layer(x).detach().requires_grad_()
        (out - y).square().mean().backward()
        S = out.grad
        optimizer.zero_grad()
        (layer(x) - y).square().mean().backward()
        optimizer.step()

        sign = -1.0 if maximize else 1.0
        G = sign * (G_true if gradient == "exact" else tangent(G_true, B, A))
        weights = None
        if metric:
            scale = rows if reduction == "mean" else 1 / rows
            kfac = metric.startswith("kfac")
            new_A, new_B = (x.T @ x / rows, scale * S.T @ S) if kfac else (scale * G.T @ G, scale * G @ G.T)
            new_A, new_B = (new_A, new_B) if dense else (new_A.diagonal(), new_B.diagonal())
            D_A, D_B = beta * D_A + (1 - beta) * new_A, beta * D_B + (1 - beta) * new_B
            c = 1 - beta**t if corrected else 1.0
            weights = (raised(D_B / c, damping, power), raised(D_A / c, damping, power))
        eye = torch.eye(d_in, dtype=F64)
        terms, coefficients = [(B, A), (G, eye)], [1 - lr * wd, -lr * (1 - tau)]
        if memory is not None:
            terms, coefficients = [*terms, memory], [*coefficients, -lr * momentum]
        new = literal(terms, coefficients, num_iters, lr * prox, weights, first)
        if memory is not None:
            memory = literal([memory, (G, eye)], [momentum, 1 - tau], max(num_iters, 1), lr * prox, None, first)
            torch.testing.assert_close((state_B["momentum"], state_A["momentum"]), memory, rtol=1e-6, atol=1e-8)
        B, A = new
        torch.testing.assert_close(layer.lora_B.weight.detach() * root, B, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(layer.lora_A.weight.detach() * root, A, rtol=1e-6, atol=1e-8)
        if metric:
            torch.testing.assert_close((state_A["metric"], state_B["metric"]), (D_A, D_B), rtol=1e-7, atol=1e-9)
        assert float(state_A["step"]) == float(state_B["step"]) == t


def test_zero_iterations_equals_preconditioned_lora() -> None:
    layer = one_layer(9, 7, 3, alpha=3)
    x, y = torch.randn(20, 7, dtype=F64), torch.randn(20, 9, dtype=F64)
    B, A, lr, prox = layer.lora_B.weight.detach().clone(), layer.lora_A.weight.detach().clone(), 0.1, 0.5
    optimizer = bare(layer, lr, num_iters=0, momentum=0.0, prox=prox)
    (layer(x) - y).square().mean().backward()
    dA, dB = layer.lora_A.weight.grad.clone(), layer.lora_B.weight.grad.clone()
    optimizer.step()
    eye = lr * prox * torch.eye(3, dtype=F64)
    torch.testing.assert_close(layer.lora_A.weight.detach(), A - lr * torch.linalg.solve(B.T @ B + eye, dA))
    torch.testing.assert_close(layer.lora_B.weight.detach(), B - lr * torch.linalg.solve(A @ A.T + eye, dB.T).T)


def test_many_iterations_reach_svdlora() -> None:
    """K → large, prox → 0: W ← the truncated SVD of W − ηG."""
    layer = one_layer(30, 20, 4, alpha=4)
    x, y = torch.randn(40, 20, dtype=F64), torch.randn(40, 30, dtype=F64)
    G, lr = dense_gradient(layer, x, y), 20.0
    W = layer.lora_B.weight.detach() @ layer.lora_A.weight.detach()
    U, sigma, Vt = torch.linalg.svd(W - lr * G)
    best = U[:, :4] @ torch.diag(sigma[:4]) @ Vt[:4]
    optimizer = bare(layer, lr, num_iters=400, momentum=0.0, prox=0.0)
    (layer(x) - y).square().mean().backward()
    optimizer.step()
    got = layer.lora_B.weight.detach() @ layer.lora_A.weight.detach()
    torch.testing.assert_close(got, best, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("kind", "reads"),
    [
        ({"momentum": 0.0}, 1),
        ({"momentum": 0.0, "first": "B"}, 1),
        ({"momentum": 0.0, "num_iters": 0}, 0),
        ({}, 2),
        ({"num_iters": 2, "momentum": 0.0}, 3),
        ({"num_iters": 2}, 4),
        ({"solver": "ritz"}, 2),
        ({"solver": "ritz", "num_iters": 2, "first": "B"}, 4),
        ({"solver": "ritz", "num_iters": 2, "first": "B", "momentum": 0.0}, 3),
    ],
)
def test_activations_are_read_as_rarely_as_possible(kind: dict, reads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[ActivationGradient] = []
    original = ActivationGradient.__init__

    def spy(self: ActivationGradient, *args: object) -> None:
        original(self, *args)
        made.append(self)

    monkeypatch.setattr(ActivationGradient, "__init__", spy)
    layer = one_layer(9, 7, 3, alpha=3)
    optimizer = bare(layer, 0.1, **kind)
    train(layer, optimizer, [(torch.randn(5, 7, dtype=F64), torch.randn(5, 9, dtype=F64))])
    assert [gradient.reads for gradient in made] == [reads]
