"""The spectral step against its formulas in dense float64, its invariances, and what it does at singular Grams."""

from __future__ import annotations

import math

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models import randomise_B
from test_lorsum import literal as lorsum_literal
from torch import Tensor, nn

from psilora import LoRALinear, PSILoRA

F64 = torch.float64


def msign(M: Tensor) -> Tensor:
    """U Vᵀ; what lies below the resolution of the iteration is not a case for comparison."""
    U, sigma, Vh = torch.linalg.svd(M, full_matrices=False)
    keep = sigma > 1e-9 * sigma[0]
    assume(bool((sigma[keep] > 5e-3 * sigma[0]).all()))
    return U[:, keep] @ Vh[keep]


def root(gram: Tensor) -> Tensor:
    """gram^(−1/2); 0 for 0. Worse conditioned factors are not a case for comparison."""
    values, vectors = torch.linalg.eigh(gram)
    if not values[-1]:
        return torch.zeros_like(gram)
    assume(bool(values[0] > 1e-5 * values[-1]))
    return vectors @ torch.diag(values**-0.5) @ vectors.T


def spectral_literal(
    B: Tensor, A: Tensor, d_B: Tensor, d_A: Tensor, memory: dict[str, Tensor], lr: float, *, mu: float = 0.9,
    nesterov: bool = True, metric: str | None = None, beta: float = 0.99, delta: float = 1e-2, gamma: float = 1.0,
    wd: float = 0.0, num_iters: int = 1, first: str = "A",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition, with dense matrices: M (d_out, d_in) is kept whole and projected, T is decomposed by an SVD."""
    (d_out, _), d_in = B.shape, A.shape[1]
    at_zero = bool((B == 0).all())
    w_B, w_A = torch.ones(d_out, 1, dtype=F64), torch.ones(1, d_in, dtype=F64)
    if metric:
        new_B, new_A = (d_B @ root(A @ A.T)).square().mean(1), (root(B.T @ B) @ d_A).square().mean(0)
        memory["D_B"] = beta * memory.get("D_B", 0) + (1 - beta) * new_B
        w_B = (memory["D_B"] / memory["D_B"].mean() + delta)[:, None] ** (gamma / 2)
        if not at_zero:
            memory["D_A"] = beta * memory.get("D_A", 0) + (1 - beta) * new_A
            w_A = (memory["D_A"] / memory["D_A"].mean() + delta)[None] ** (gamma / 2)
        w_B, w_A = w_B / w_B.square().mean().sqrt(), w_A / w_A.square().mean().sqrt()
    B, A, d_B, d_A = w_B * B, A * w_A, d_B / w_B, d_A / w_A
    R_B, R_A = root(B.T @ B), root(A @ A.T)
    Q_B, Q_A, g_B, g_A = B @ R_B, R_A @ A, d_B @ R_A, R_B @ d_A
    P_B = Q_B @ Q_B.T
    M = memory.get("M", torch.zeros(d_out, d_in, dtype=F64)) / w_B / w_A
    m_B, m_A = mu * M @ Q_A.T + (1 - mu) * g_B, mu * Q_B.T @ M + (1 - mu) * g_A
    memory["M"] = w_B * (Q_B @ m_A + (m_B - P_B @ m_B) @ Q_A) * w_A
    h_B, h_A = (mu * m_B + (1 - mu) * g_B, mu * m_A + (1 - mu) * g_A) if nesterov else (m_B, m_A)
    sign = msign(Q_B @ h_A + (h_B - P_B @ h_B) @ Q_A)
    rate = lr * math.sqrt(max(d_out, d_in) / min(d_out, d_in))
    if at_zero:  # LoRSum's B-turn alone: its A-turn divides by BᵀB
        B = -rate * sign @ A.T @ torch.linalg.inv(A @ A.T)
    else:
        B, A = lorsum_literal(
            [(B, A), (sign, torch.eye(d_in, dtype=F64))], [1 - lr * wd, -rate], num_iters, 0.0, None, first
        )
    return B / w_B, A / w_A


def one_layer(d_out: int, d_in: int, rank: int, alpha: float, std: float = 0.3) -> LoRALinear:
    layer = LoRALinear(nn.Linear(d_in, d_out, bias=False), rank, alpha).double()
    randomise_B(layer, std)
    return layer


@settings(max_examples=80, deadline=None)
@given(
    shape=st.tuples(st.integers(4, 12), st.integers(4, 12)),
    rank=st.integers(1, 4),
    num_iters=st.integers(0, 2),
    first=st.sampled_from("AB"),
    metric=st.sampled_from([None, "lora"]),
    mu=st.sampled_from([0.0, 0.6]),
    nesterov=st.booleans(),
    wd=st.sampled_from([0.0, 0.3]),
    alpha=st.sampled_from([1.0, 16.0]),
    B_zero=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_three_steps_match_the_formulas(
    shape, rank, num_iters, first, metric, mu, nesterov, wd, alpha, B_zero, seed
) -> None:
    torch.manual_seed(seed)
    layer = one_layer(*shape, rank, alpha, 0.0 if B_zero else 0.3)
    lr, beta, delta, gamma = 0.1, 0.8, 0.05, 0.7
    optimizer = PSILoRA(
        layer, lr, step="spectral", num_iters=num_iters, first=first, metric=metric, momentum=mu, nesterov=nesterov,
        weight_decay=wd, metric_beta=beta, damping=delta, metric_power=gamma, prox=0.0,
    )  # fmt: skip
    s = layer.scaling**0.5
    B, A = layer.lora_B.weight.detach() * s, layer.lora_A.weight.detach() * s
    memory: dict[str, Tensor] = {}
    for t in (1, 2, 3):
        optimizer.zero_grad()
        x, y = torch.randn(20, shape[1], dtype=F64), torch.randn(20, shape[0], dtype=F64)
        (layer(x) - y).square().mean().backward()
        d_B, d_A = layer.lora_B.weight.grad / s, layer.lora_A.weight.grad / s
        B, A = spectral_literal(
            B, A, d_B, d_A, memory, lr, mu=mu, nesterov=nesterov and mu > 0, metric=metric, beta=beta, delta=delta,
            gamma=gamma, wd=wd, num_iters=num_iters, first=first,
        )  # fmt: skip
        for factor in (B, A):
            sigma = torch.linalg.svdvals(factor)
            assume(bool(sigma[-1] > 3e-3 * sigma[0]))
        optimizer.step()
        torch.testing.assert_close(layer.lora_B.weight.detach() * s, B, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.lora_A.weight.detach() * s, A, rtol=1e-5, atol=1e-6)
        state_B, state_A = optimizer.state[layer.lora_B.weight], optimizer.state[layer.lora_A.weight]
        if mu:
            M = state_B["momentum"] @ state_A["momentum"]
            torch.testing.assert_close(M, memory["M"], rtol=1e-5, atol=1e-8)
        if metric:
            torch.testing.assert_close(state_B["metric"].square(), memory["D_B"])
            torch.testing.assert_close(state_A["metric"].square(), memory.get("D_A", 0 * state_A["metric"]))
        B, A = layer.lora_B.weight.detach() * s, layer.lora_A.weight.detach() * s  # each step on its own
        assert float(state_A["step"]) == float(state_B["step"]) == t
    assert optimizer.stats() == {"skipped_steps": 0, "repaired_pivots": 0}
