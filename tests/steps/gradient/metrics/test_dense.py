"""Dense K-FAC and Shampoo: the projection they mean, their statistics, and what must not break them."""

from __future__ import annotations

import math

import pytest
import torch
from models import assert_nonfinite_is_skipped, bare, data, factors, layer_of, peft_mlp, plain_mlp, train
from oracles import dense_gradient, raised
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from psilora import LoRALinear, PSILoRA, doctor, options
from psilora.adapters import find_pairs
from psilora.adapters.pair import mebibytes
from psilora.backends.triton import backend as triton_backend
from psilora.doctor import survey
from psilora.linalg.eigen import EigenMetric, eigh
from psilora.lowrank.lorsum import apply_metric, unapply_metric

F64 = torch.float64
DENSE = ("kfac-dense", "shampoo-dense")


def states(optimizer: PSILoRA, layer: LoRALinear) -> tuple[Tensor, Tensor]:
    """(D_B, D_A)."""
    return optimizer.state[layer.lora_B.weight]["metric"], optimizer.state[layer.lora_A.weight]["metric"]


@pytest.mark.parametrize("metric", DENSE)
@pytest.mark.parametrize("solver", ["als", "ritz"])
def test_it_is_the_cut_of_the_preconditioned_step_in_the_norm_of_the_metric(metric: str, solver: str) -> None:
    """M_B^½ (W − ηM_B⁻¹GM_A⁻¹) M_A^½ cut to rank r by an SVD, which the step approaches as K grows and ρ is 0."""
    layer = layer_of()
    iterations = 400 if solver == "als" else 4
    kind = {"metric": metric, "momentum": 0.0, "prox": 0.0, "num_iters": iterations, "solver": solver, "damping": 1e-2}
    optimizer = bare(layer, 3.0, **kind)
    x, y = torch.randn(30, 9, dtype=F64), torch.randn(30, 12, dtype=F64)
    G = dense_gradient(layer, x, y)
    W = layer.scaling * (layer.lora_B.weight @ layer.lora_A.weight).detach()
    (layer(x) - y).square().mean().backward()
    optimizer.step()
    corrected = [D / (1 - 0.99) for D in states(optimizer, layer)]
    M_B, M_A = (raised(D, 1e-2, 0.5) for D in corrected)
    root_B, root_A = (raised(D, 1e-2, 0.25) for D in corrected)
    U, sigma, Vt = torch.linalg.svd(root_B @ (W - 3.0 * M_B.inverse() @ G @ M_A.inverse()) @ root_A)
    best = root_B.inverse() @ (U[:, :3] * sigma[:3]) @ Vt[:3] @ root_A.inverse()
    got = layer.scaling * (layer.lora_B.weight @ layer.lora_A.weight).detach()
    torch.testing.assert_close(got, best, rtol=1e-6, atol=1e-6)
    U, sigma, Vt = torch.linalg.svd(W - 3.0 * M_B.inverse() @ G @ M_A.inverse())
    assert float((got - (U[:, :3] * sigma[:3]) @ Vt[:3]).norm() / got.norm()) > 1e-2  # another norm, another cut


@pytest.mark.parametrize("statistics", ["kfac", "shampoo"])
@pytest.mark.parametrize("corrected", [True, False])
def test_with_diagonal_matrices_it_is_the_diagonal_metric(statistics: str, corrected: bool) -> None:
    """Every row of X and of S lies along one axis, and no axis meets two of the other side: nothing is off it."""

    def run(metric: str, mixed: bool) -> tuple[LoRALinear, PSILoRA]:
        torch.manual_seed(0)
        layer = layer_of(8, 8)
        optimizer = bare(layer, 0.2, metric=metric, metric_bias_correction=corrected, loss_reduction="sum")
        for _ in range(3):
            axes = torch.eye(8, dtype=F64)
            x, S = (torch.rand(8, 1, dtype=F64) + 0.5) * axes, (torch.rand(8, 1, dtype=F64) + 0.5) * axes
            optimizer.zero_grad()
            (layer(x @ torch.full_like(x, 0.3) + x if mixed else x) * S).sum().backward()
            optimizer.step()
        return layer, optimizer

    diagonal, kept = run(statistics, mixed=False)
    dense, full = run(f"{statistics}-dense", mixed=False)
    torch.testing.assert_close(factors(dense), factors(diagonal), rtol=1e-9, atol=1e-12)
    for D, d in zip(states(full, dense), states(kept, diagonal), strict=True):
        torch.testing.assert_close(D, torch.diag(d), rtol=1e-12, atol=1e-14)
    one, other = run(statistics, mixed=True)[0], run(f"{statistics}-dense", mixed=True)[0]
    assert float((one.lora_A.weight - other.lora_A.weight).detach().norm()) > 1e-3  # off the axes they differ


@pytest.mark.parametrize("gradient", ["exact", "dense", "tangent", "auto"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_kfac_statistics_of_every_representation(gradient: str, reduction: str) -> None:
    """D_A = XᵀX/N and D_B = N·SᵀS (mean) or SᵀS/N (sum), over all calls since the last step."""
    layer, N = layer_of(dtype=torch.float32), 20
    optimizer = bare(
        layer, 0.1, metric="kfac-dense", metric_beta=0.0, gradient=gradient, loss_reduction=reduction, tokens=10_000
    )
    x, S = torch.randn(N, 9), torch.randn(N, 12) / N
    for part, s in zip(x.split([5, 15]), S.split([5, 15]), strict=True):
        (layer(part) * s).sum().backward()
    held = 4 * (9**2 + 12**2 if gradient != "exact" else 0)
    held += 4 * (9 * 12 if gradient in ("dense", "auto") else N * (9 + 12) if gradient == "exact" else 0)
    assert optimizer.capture_bytes() == held
    optimizer.step()
    D_B, D_A = states(optimizer, layer)
    torch.testing.assert_close(D_A, x.T @ x / N, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(D_B, (N if reduction == "mean" else 1 / N) * S.T @ S, rtol=1e-5, atol=1e-7)
    assert torch.equal(D_A, D_A.T) and torch.equal(D_B, D_B.T)


def test_negative_eigenvalues_of_rounded_statistics_are_survived() -> None:
    layer = layer_of(40, 60, dtype=torch.float32)
    optimizer = bare(layer, 1e-3, metric="kfac-dense", damping=1e-12)
    x, y = 100 * torch.randn(4, 60), torch.randn(4, 40)
    train(layer, optimizer, [(x, y)] * 2)
    for D in states(optimizer, layer):
        values = torch.linalg.eigvalsh(D / (1 - 0.99**2) + 1e-12 * torch.eye(len(D)))
        assert bool((values**0.5).isnan().any())  # what a power of them as they are would do
    assert optimizer.stats()["skipped_steps"] == 0
    assert all(bool(torch.isfinite(p).all()) for p in factors(layer).values())


def test_what_is_not_finite_is_skipped_with_everything_unchanged() -> None:
    """The trap: an eigenvalue routine raises where other operations hand NaN on."""
    broken = torch.full((3, 3), torch.nan)
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.eigh(broken)
    values, vectors = eigh(torch.stack([torch.eye(3), broken]))
    assert torch.equal(values[0], torch.ones(3)) and bool(values[1].isnan().all() and vectors.isfinite().all())
    assert_nonfinite_is_skipped("kfac-dense", (math.nan, math.nan))


@pytest.mark.parametrize("metric", DENSE)
def test_state_is_fp32_matrices_that_a_state_dict_carries(metric: str) -> None:
    model = peft_mlp(dtype=torch.bfloat16)
    optimizer = bare(model, 0.1, metric=metric)
    optimizer.init_state()
    for group in optimizer.param_groups:
        for lora_A, lora_B in zip(group["params"][::2], group["params"][1::2], strict=True):
            for parameter, size in ((lora_A, lora_A.shape[1]), (lora_B, lora_B.shape[0])):
                D = optimizer.state[parameter]["metric"]
                assert D.shape == (size, size) and D.dtype == torch.float32 and not D.any()
    train(model, optimizer, [data(dtype=torch.bfloat16)] * 2)
    saved = get_optimizer_state_dict(model, optimizer)
    other = peft_mlp(dtype=torch.bfloat16)
    fresh = bare(other, 0.1, metric=metric)
    fresh.init_state()  # or torch would create it by a step without activations
    set_optimizer_state_dict(other, fresh, saved)
    for p, q in zip(optimizer.param_groups[0]["params"], fresh.param_groups[0]["params"], strict=True):
        D, loaded = optimizer.state[p]["metric"], fresh.state[q]["metric"]
        assert D.any() and loaded.dtype == torch.float32 and torch.equal(D, loaded)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("metric", [*DENSE, "kfac-low-rank"])
def test_fp32_agrees_with_fp64(metric: str, device: str) -> None:
    model, exact = plain_mlp(dtype=torch.float32), plain_mlp()
    exact.load_state_dict(model.state_dict())
    model.to(device)
    start = factors(exact)
    batches = [data() for _ in range(3)]
    train(exact, bare(exact, 0.1, metric=metric, damping=1e-3), batches)
    rounded = [(x.float().to(device), y.float().to(device)) for x, y in batches]
    train(model, bare(model, 0.1, metric=metric, damping=1e-3), rounded)
    got, wanted = factors(model), factors(exact)
    for name in wanted:
        moved = float((wanted[name] - start[name]).norm())
        assert float((got[name].cpu().double() - wanted[name]).norm()) < 1e-3 * moved


def test_without_bias_correction_it_starts_at_the_identity() -> None:
    model = plain_mlp()
    optimizer = bare(model, 0.1, metric="kfac-dense", metric_bias_correction=False)
    optimizer.init_state()
    assert all(torch.equal(s["metric"], torch.eye(len(s["metric"]), dtype=F64)) for s in optimizer.state.values())


def test_layers_that_are_too_wide_are_refused_by_name() -> None:
    limit = options.DENSE_LIMIT
    model = nn.Sequential(LoRALinear(nn.Linear(limit + 1, 8), 2, 4), LoRALinear(nn.Linear(8, 8), 2, 4))
    with pytest.raises(
        ValueError, match=rf"^0 is 8×{limit + 1}: metric='kfac-dense' .* d <= {limit} only; use metric="
    ):
        bare(model, 0.1, metric="kfac-dense")
    bare(model, 0.1, metric="kfac-dense", groups=[{"layers": "^0$", "metric": "kfac"}])


def test_the_kernels_and_the_doctor_know_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from problems import make_problem

    assert triton_backend.unsupported(make_problem((20, 24, 4), metric="kfac-dense")) == "metric='kfac-dense'"
    pairs, _ = find_pairs(plain_mlp((32, 16, 8, 4)))
    size = 4 * (32**2 + 16**2 + 16**2 + 8**2 + 8**2 + 4**2)
    assert doctor.memory(pairs, 64, 4)[-1] == f"metric='kfac-dense' or 'shampoo-dense': {mebibytes(size)}"
    monkeypatch.setattr(survey, "DENSE_LIMIT", 16)
    assert doctor.memory(pairs, 64, 4)[-1].endswith("without 1 layer wider than 16, which it cannot take")


def test_another_metric_than_that_of_the_state_or_the_capture_is_refused_with_nothing_changed() -> None:
    """The trap: (d, d) and (d,) broadcast against each other where there is one layer, or as many as columns."""
    model = layer_of(9, 9)
    batch = torch.randn(20, 9, dtype=F64), torch.randn(20, 9, dtype=F64)
    optimizer = bare(model, 0.1, metric="kfac")
    train(model, optimizer, [batch])
    before = factors(model)
    optimizer.param_groups[0]["metric"] = "kfac-dense"
    with pytest.raises(RuntimeError, match=r"holds a metric of shape \(9,\), not that of metric='kfac-dense'"):
        train(model, optimizer, [batch])
    other = bare(model, 0.1, metric="kfac", gradient="tangent")
    source = bare(layer_of(9, 9), 0.1, metric="kfac-dense", gradient="tangent")
    source.init_state()
    with pytest.raises(ValueError, match=r"metric='kfac-dense' needs other captures than .*metric='kfac', with which"):
        other.load_state_dict(source.state_dict())
    train(model, other, [batch])
    before = factors(model)
    other.param_groups[0]["metric"] = "kfac-dense"
    with pytest.raises(ValueError, match=r"metric='kfac-dense' needs other captures"):
        train(model, other, [batch])
    assert all(torch.equal(before[name], value) for name, value in factors(model).items())


@pytest.mark.parametrize("rest", [None, 0.3])
def test_an_eigenmetric_is_the_matrix_it_stands_for(rest: float | None) -> None:
    k = 6 if rest is None else 4
    V = torch.linalg.qr(torch.randn(2, 6, k, dtype=F64))[0]
    m, F = torch.rand(2, k, dtype=F64) + 0.5, torch.randn(2, 6, 3, dtype=F64)
    M = V @ torch.diag_embed(m) @ V.mT
    off = None
    if rest is not None:
        off = torch.full((2, 1), rest, dtype=F64)
        M = M + rest * (torch.eye(6, dtype=F64) - V @ V.mT)
    metric = EigenMetric(V, m, off)
    torch.testing.assert_close(apply_metric(metric, F), M @ F)
    torch.testing.assert_close(unapply_metric(metric, F), torch.linalg.solve(M, F))
    torch.testing.assert_close(apply_metric(metric.root(), apply_metric(metric.root(), F)), M @ F)
    assert not apply_metric(metric, 0 * F).any() and not unapply_metric(metric, 0 * F).any()
