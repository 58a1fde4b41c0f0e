"""The low-rank K-FAC metric D = F·Fᵀ + μ·I: against the whole running average, and its invariants."""

from __future__ import annotations

import math

import pytest
import torch
from models import assert_nonfinite_is_skipped, bare, data, factors, layer_of, peft_mlp, plain_mlp, train
from oracles import raised
from torch import Tensor

from psilora import LoRALinear, PSILoRA, doctor
from psilora.adapters import find_pairs
from psilora.adapters.pair import mebibytes
from psilora.steps.gradient.metrics.low_rank import directions, raised_low_rank, second_moments, truncated

F64 = torch.float64


def average(optimizer: PSILoRA, parameter: Tensor) -> Tensor:
    """D = F·Fᵀ + μ·I of lora_A's or lora_B's weight."""
    F, rest = (optimizer.state[parameter][name] for name in ("metric", "metric_rest"))
    return F @ F.T + rest * torch.eye(len(F), dtype=F.dtype)


def averages(optimizer: PSILoRA, layer: LoRALinear) -> list[Tensor]:
    return [average(optimizer, layer.lora_B.weight), average(optimizer, layer.lora_A.weight)]


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_at_full_rank_it_is_the_dense_metric(corrected: bool, reduction: str) -> None:
    shared = {"metric_bias_correction": corrected, "loss_reduction": reduction, "damping": 1e-3, "num_iters": 2}
    whole, cut = layer_of(), layer_of()
    cut.load_state_dict(whole.state_dict())
    dense = bare(whole, 0.1, metric="kfac-dense", **shared)
    full = bare(cut, 0.1, metric="kfac-low-rank", metric_rank=50, **shared)
    for _ in range(4):
        batch = torch.randn(30, 9, dtype=F64), torch.randn(30, 12, dtype=F64)
        train(whole, dense, [batch])
        train(cut, full, [batch])
    torch.testing.assert_close(factors(cut), factors(whole), rtol=1e-7, atol=1e-9)
    for D, parameter in zip(averages(full, cut), (whole.lora_B.weight, whole.lora_A.weight), strict=True):
        torch.testing.assert_close(D, dense.state[parameter]["metric"], rtol=1e-8, atol=1e-10)


def update(F: Tensor, rest: Tensor, X: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """One update from rows X, the new statistics being XᵀX/N."""
    Q = directions(F[None])
    product, trace = second_moments(Q[0], list(X.split(7)))
    new = truncated(
        F[None],
        rest[None],
        Q,
        product[None] / len(X),
        trace[None] / len(X),
        torch.tensor(beta, dtype=F64).view(1, 1, 1),
    )
    return new[0][0], new[1][0]


@pytest.mark.parametrize("start", [0.0, 1.0])
def test_statistics_of_low_rank_are_kept_whole(start: float) -> None:
    """X in a subspace of k dimensions, another in each step as long as both fit into k: nothing is cut off."""
    d, k, beta = 30, 6, 0.7
    F, rest = torch.zeros(d, k, dtype=F64), torch.full((1,), start, dtype=F64)
    D = start * torch.eye(d, dtype=F64)
    for _ in range(2):
        X = torch.randn(40, 3, dtype=F64) @ torch.randn(3, d, dtype=F64)
        F, rest = update(F, rest, X, beta)
        D = beta * D + (1 - beta) * X.T @ X / 40
        torch.testing.assert_close(F @ F.T + rest * torch.eye(d, dtype=F64), D, rtol=1e-9, atol=1e-9)
    X = torch.randn(40, d, dtype=F64)
    F, rest = update(F, rest, X, beta)
    D = beta * D + (1 - beta) * X.T @ X / 40
    assert float((F @ F.T + rest * torch.eye(d, dtype=F64) - D).norm()) > 0.01 * float(D.norm())  # this one is cut


def test_the_trace_is_kept_and_the_columns_stay_orthogonal() -> None:
    d, k, beta = 30, 4, 0.8
    F, rest, trace = torch.zeros(d, k, dtype=F64), torch.zeros(1, dtype=F64), 0.0
    for _ in range(20):
        X = torch.randn(50, d, dtype=F64) * torch.logspace(0, -1, d, dtype=F64)
        F, rest = update(F, rest, X, beta)
        trace = beta * trace + (1 - beta) * float(X.square().sum()) / 50
        torch.testing.assert_close(float(F.square().sum() + d * rest), trace, rtol=1e-10, atol=0)
        gram = F.T @ F
        assert float((gram - torch.diag(gram.diagonal())).abs().max()) < 1e-10 * float(gram.max())
    assert float(d * rest) < trace  # the floor is not everything


def test_repeated_statistics_lead_to_their_largest_eigenvectors() -> None:
    """The limit: V_k(Λ_k − ν)V_kᵀ + νI with ν the mean of the other eigenvalues; one update is not there yet."""
    d, k = 40, 5
    X = torch.randn(200, d, dtype=F64) @ torch.diag(torch.logspace(1, -1, d, dtype=F64))
    values, vectors = torch.linalg.eigh(X.T @ X / 200)
    nu = values[:-k].mean()
    best = vectors[:, -k:] @ torch.diag(values[-k:] - nu) @ vectors[:, -k:].T + nu * torch.eye(d, dtype=F64)
    F, rest = torch.zeros(d, k, dtype=F64), torch.zeros(1, dtype=F64)
    errors = []
    for _ in range(40):
        F, rest = update(F, rest, X, 0.0)
        errors.append(float((F @ F.T + rest * torch.eye(d, dtype=F64) - best).norm() / best.norm()))
    assert errors[-1] < 1e-6 < errors[0]


def test_powers_of_it_are_those_of_the_matrix() -> None:
    F = torch.linalg.qr(torch.randn(2, 12, 3, dtype=F64))[0] * torch.tensor([2.0, 1.0, 0.0], dtype=F64)
    numbers = [torch.tensor([[a], [b]], dtype=F64) for a, b in ((0.3, 0.0), (0.5, 0.9), (1e-3, 1e-2), (0.5, 1.0))]
    rest, correction, damping, power = numbers
    M = raised_low_rank(F, *numbers)
    columns = torch.eye(12, dtype=F64).expand(2, 12, 12)
    for i in range(2):
        D = (F[i] @ F[i].T + rest[i] * torch.eye(12, dtype=F64)) / correction[i]
        torch.testing.assert_close(M.apply(columns)[i], raised(D, float(damping[i]), float(power[i])))


def test_state_is_thin_in_fp32_and_starts_at_zero_or_the_identity() -> None:
    for corrected in (True, False):
        model = peft_mlp(dtype=torch.bfloat16)
        optimizer = bare(model, 0.1, metric="kfac-low-rank", metric_rank=8, metric_bias_correction=corrected)
        optimizer.init_state()
        for group in optimizer.param_groups:
            for p in group["params"]:
                d = max(p.shape) if min(p.shape) == 4 else p.shape[0]
                F, rest = optimizer.state[p]["metric"], optimizer.state[p]["metric_rest"]
                assert F.shape == (d, min(8, d)) and rest.shape == (1,) and F.dtype == rest.dtype == torch.float32
                assert torch.equal(average(optimizer, p), (0.0 if corrected else 1.0) * torch.eye(d))
    model = plain_mlp()
    optimizer = bare(model, 0.1, metric="kfac-low-rank")
    train(model, optimizer, [data()])
    assert {state["metric"].shape[1] for state in optimizer.state.values()} == {4}  # r where nothing is said
    size = 4 * sum(state[name].numel() for state in optimizer.state.values() for name in ("metric", "metric_rest"))
    assert f"metric='kfac-low-rank' (rank r): {mebibytes(size)}" in doctor.memory(find_pairs(model)[0], 64, 4)


def test_what_is_not_finite_is_skipped_with_everything_unchanged() -> None:
    assert_nonfinite_is_skipped("kfac-low-rank", (math.inf, math.nan))
