"""The spectral step against its formulas in dense float64, its invariances, and what it does at singular Grams."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models import bare, data, factors, mse, peft_mlp, plain_mlp, randomise_B, train
from oracles import literal as lorsum_literal
from torch import Tensor, nn

from psilora import LoRALinear, PSILoRA
from psilora.backends.triton import backend as triton_backend
from psilora.options import Options

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
    B: Tensor, A: Tensor, d_B: Tensor, d_A: Tensor, memory: dict[str, Any], lr: float, *, mu: float = 0.9,
    nesterov: bool = True, metric: str | None = None, beta: float = 0.99, delta: float = 1e-2, gamma: float = 1.0,
    wd: float = 0.0, num_iters: int = 1, first: str = "A", fade: bool = True, cap: float | None = 4.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition, with dense matrices: M (d_out, d_in) is kept whole and projected, T is decomposed by an SVD."""
    (d_out, _), d_in = B.shape, A.shape[1]
    at_zero = bool((B == 0).all())
    w_B, w_A = torch.ones(d_out, 1, dtype=F64), torch.ones(1, d_in, dtype=F64)
    kappa, phi = measured(memory, (d_B @ root(A @ A.T)).norm(), (root(B.T @ B) @ d_A).norm(), mu, fade, cap)
    d_B, d_A = kappa * d_B, kappa * d_A
    if metric:
        new_B, new_A = (d_B @ root(A @ A.T)).square().mean(1), (root(B.T @ B) @ d_A).square().mean(0)
        memory["D_B"] = beta * memory.get("D_B", 0) + (1 - beta) * new_B
        w_B = (memory["D_B"] / memory["D_B"].mean() + delta)[:, None] ** (gamma / 2)
        if not at_zero:
            memory["D_A"] = beta * memory.get("D_A", 0) + (1 - beta) * new_A
            w_A = (memory["D_A"] / memory["D_A"].mean() + delta)[None] ** (gamma / 2)
    B, A, d_B, d_A = w_B * B, A * w_A, d_B / w_B, d_A / w_A
    R_B, R_A = root(B.T @ B), root(A @ A.T)
    Q_B, Q_A, g_B, g_A = B @ R_B, R_A @ A, d_B @ R_A, R_B @ d_A
    P_B = Q_B @ Q_B.T
    M = memory.get("M", torch.zeros(d_out, d_in, dtype=F64)) / w_B / w_A
    m_B, m_A = mu * M @ Q_A.T + (1 - mu) * g_B, mu * Q_B.T @ M + (1 - mu) * g_A
    memory["M"] = w_B * (Q_B @ m_A + (m_B - P_B @ m_B) @ Q_A) * w_A
    h_B, h_A = (mu * m_B + (1 - mu) * g_B, mu * m_A + (1 - mu) * g_A) if nesterov else (m_B, m_A)
    sign = msign(Q_B @ h_A + (h_B - P_B @ h_B) @ Q_A)
    rate = phi * lr * math.sqrt(8 / A.shape[0] * max(d_out, d_in) / min(d_out, d_in))
    if metric:
        rate = rate / math.sqrt(mean_square(Q_B / w_B, memory["D_B"], delta, gamma))
        if not at_zero:
            rate = rate / math.sqrt(mean_square((Q_A / w_A).mT, memory["D_A"], delta, gamma))
    if at_zero:  # LoRSum's B-turn alone: its A-turn divides by BᵀB
        B = -rate * sign @ A.T @ torch.linalg.inv(A @ A.T)
    else:
        B, A = lorsum_literal(
            [(B, A), (sign, torch.eye(d_in, dtype=F64))], [1 - lr * wd, -rate], num_iters, 0.0, None, first
        )
    return B / w_B, A / w_A


def mean_square(basis: Tensor, D: Tensor, delta: float, gamma: float) -> float:
    """N of a side: of the factor's basis over w (d, r), and of the channels that have a gradient, in equal parts."""
    share, most = D / D.mean(), min(basis.shape)
    p = 1.01 * share / (share + 0.01)
    others = (p * (share + delta) ** -gamma).sum() + max(0.0, most - float(p.sum())) * delta**-gamma
    others = float(others) / max(float(p.sum()), most)
    return others if not basis.any() else (float(basis.square().sum()) / basis.shape[1] + others) / 2


def measured(
    memory: dict[str, Any], side_B: Tensor, side_A: Tensor, mu: float, fade: bool, cap: float | None
) -> tuple[float, float]:
    """κ and φ, from the norms ‖G·Q_A‖ and ‖Q_BᵀG‖ and all norms so far."""
    norm = math.hypot(float(side_B), float(side_A))
    norms: list[float] = memory.setdefault("norms", [])
    kappa = min(1.0, cap * sum(norms) / len(norms) / norm) if norms and cap is not None else 1.0
    norms.append(min(norm, 4 * sum(norms) / len(norms)) if norms else norm)
    weights = [mu**k for k in reversed(range(len(norms)))]
    recent = sum(w * n for w, n in zip(weights, norms, strict=True)) / sum(weights)
    return kappa, min(1.0, recent / (sum(norms) / len(norms))) if fade else 1.0


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
    fade=st.booleans(),
    cap=st.sampled_from([None, 1.0, 4.0]),
    wd=st.sampled_from([0.0, 0.3]),
    alpha=st.sampled_from([1.0, 16.0]),
    B_zero=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_three_steps_match_the_formulas(
    shape, rank, num_iters, first, metric, mu, nesterov, fade, cap, wd, alpha, B_zero, seed
) -> None:
    torch.manual_seed(seed)
    layer = one_layer(*shape, rank, alpha, 0.0 if B_zero else 0.3)
    lr, beta, delta, gamma = 0.1, 0.8, 0.05, 0.7
    optimizer = bare(
        layer, lr, step="spectral", num_iters=num_iters, first=first, metric=metric, momentum=mu, nesterov=nesterov,
        fade=fade, cap=cap, balance=False, weight_decay=wd, metric_beta=beta, damping=delta, metric_power=gamma,
        prox=0.0,
    )  # fmt: skip
    s = layer.scaling**0.5
    B, A = layer.lora_B.weight.detach() * s, layer.lora_A.weight.detach() * s
    memory: dict[str, Any] = {}
    for t, size in ((1, 1.0), (2, 0.1), (3, 20.0)):
        optimizer.zero_grad()
        x, y = torch.randn(20, shape[1], dtype=F64), torch.randn(20, shape[0], dtype=F64)
        (size * (layer(x) - y).square().mean()).backward()
        d_B, d_A = layer.lora_B.weight.grad / s, layer.lora_A.weight.grad / s
        B, A = spectral_literal(
            B, A, d_B, d_A, memory, lr, mu=mu, nesterov=nesterov and mu > 0, metric=metric, beta=beta, delta=delta,
            gamma=gamma, wd=wd, num_iters=num_iters, first=first, fade=fade, cap=cap,
        )  # fmt: skip
        for factor in (B, A):
            sigma = torch.linalg.svdvals(factor)
            assume(bool(sigma[-1] > 2e-2 * sigma[0]))
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


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(4, 12), st.integers(4, 12)),
    rank=st.integers(1, 4),
    mu=st.sampled_from([0.0, 0.6]),
    nesterov=st.booleans(),
    fade=st.booleans(),
    cap=st.sampled_from([None, 1.0, 4.0]),
    wd=st.sampled_from([0.0, 0.3]),
    alpha=st.sampled_from([1.0, 16.0]),
    B_zero=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_steps_of_the_factors_by_themselves_match_their_formulas(
    shape, rank, mu, nesterov, fade, cap, wd, alpha, B_zero, seed
) -> None:
    torch.manual_seed(seed)
    layer = one_layer(*shape, rank, alpha, 0.0 if B_zero else 0.3)
    lr = 0.1
    optimizer = PSILoRA(
        layer, lr, step="spectral", joint=False, momentum=mu, nesterov=nesterov, fade=fade, cap=cap, balance=False,
        weight_decay=wd, prox=0.0,
    )  # fmt: skip
    s = layer.scaling**0.5
    m_B, m_A = torch.zeros(shape[0], rank, dtype=F64), torch.zeros(rank, shape[1], dtype=F64)
    full_rate, keep = 0.5 * lr * math.sqrt(8 / rank * max(shape) / min(shape)), math.sqrt(1 - lr * wd)
    memory: dict[str, Any] = {}
    for size in (1.0, 0.1, 20.0):
        B, A = layer.lora_B.weight.detach() * s, layer.lora_A.weight.detach() * s
        optimizer.zero_grad()
        x, y = torch.randn(20, shape[1], dtype=F64), torch.randn(20, shape[0], dtype=F64)
        (size * (layer(x) - y).square().mean()).backward()
        d_B, d_A = layer.lora_B.weight.grad / s, layer.lora_A.weight.grad / s
        R_B, R_A = root(B.T @ B), root(A @ A.T)
        kappa, phi = measured(memory, (d_B @ R_A).norm(), (R_B @ d_A).norm(), mu, fade, cap)
        rate, d_B, d_A = phi * full_rate, kappa * d_B, kappa * d_A
        m_B, m_A = mu * m_B + (1 - mu) * d_B, mu * m_A + (1 - mu) * d_A
        h_B, h_A = (mu * m_B + (1 - mu) * d_B, mu * m_A + (1 - mu) * d_A) if nesterov and mu else (m_B, m_A)
        want_B, want_A = keep * B - rate * msign(h_B @ R_A) @ R_A, keep * A
        if B.any():
            want_A = want_A - rate * R_B @ msign(R_B @ h_A)
        optimizer.step()
        torch.testing.assert_close(layer.lora_B.weight.detach() * s, want_B, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(layer.lora_A.weight.detach() * s, want_A, rtol=1e-6, atol=1e-8)
        if mu:
            state = [optimizer.state[p.weight]["momentum"] for p in (layer.lora_B, layer.lora_A)]
            torch.testing.assert_close(state, [m_B, m_A])


# ---- invariances -----------------------------------------------------------------------------------------------------

SETTINGS: list[dict[str, Any]] = [{}, {"metric": "lora", "weight_decay": 0.1}, {"controller": "slope", "num_iters": 2}]


def gauge(rank: int, kind: str) -> Tensor:
    """An invertible T: orthogonal, or with singular values from 1/3 to 3."""
    U, V = (torch.linalg.qr(torch.randn(rank, rank, dtype=F64))[0] for _ in range(2))
    return U if kind == "orthogonal" else (U * torch.logspace(-0.5, 0.5, rank, dtype=F64)) @ V.T


@pytest.mark.parametrize("kind", SETTINGS, ids=str)
@pytest.mark.parametrize("T", ["orthogonal", "well-conditioned"])
@pytest.mark.parametrize("B_zero", [False, True])
def test_the_weight_does_not_depend_on_how_it_is_factored(kind: dict, T: str, B_zero: bool) -> None:
    """(B·T, T⁻¹·A) follows the same B·A; under a T that is not orthogonal up to the ridge, which is then made small."""
    model, other = plain_mlp((24, 20, 16, 10)), plain_mlp((24, 20, 16, 10))
    if B_zero:
        randomise_B(model, 0.0)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for layer in (other.l1, other.l2, other.l3):
            change = gauge(4, T)
            layer.lora_B.weight.copy_(layer.lora_B.weight @ change)
            layer.lora_A.weight.copy_(torch.linalg.inv(change) @ layer.lora_A.weight)
    start = products(model)
    batches = [data(d_out=10) for _ in range(6)]
    prox = None if T == "orthogonal" else 1e-11
    train(model, bare(model, 0.1, step="spectral", prox=prox, **kind), batches)
    train(other, bare(other, 0.1, step="spectral", prox=prox, **kind), batches)
    for name, W in products(model).items():
        error = (products(other)[name] - W).norm() / (W - start[name]).norm()
        assert error < 1e-7, (name, float(error))


def test_a_plain_gradient_step_on_the_factors_does_depend_on_it() -> None:
    """The guard above is not vacuous: AdamW moves the weight differently."""
    model, other = plain_mlp(), plain_mlp()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.l2.lora_B.weight.mul_(3.0)
        other.l2.lora_A.weight.div_(3.0)
    batch, start = data(), products(model)["l2"]
    for each in (model, other):
        train(each, torch.optim.AdamW(each.parameters(), 0.01, weight_decay=0.0), [batch])
    a, b = products(model)["l2"], products(other)["l2"]
    assert (a - b).norm() > 0.1 * (a - start).norm()


def products(model: nn.Module) -> dict[str, Tensor]:
    """B·A of every layer."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    return {name: (m.lora_B.weight @ m.lora_A.weight).detach() for name, m in layers.items()}


@pytest.mark.parametrize("metric", [None, "lora"])
@pytest.mark.parametrize("factor", [2.0**-100, 2.0**100, -1.0])
def test_the_size_of_the_gradient_does_not_matter(metric: str | None, factor: float) -> None:
    """From 1e-30 to 1e30 in fp32, bit for bit, whatever scales `.grad`; its sign is that of `maximize`."""
    model, other = (peft_mlp(dtype=torch.float32) for _ in range(2))
    other.load_state_dict(model.state_dict())
    plain = bare(model, 0.1, step="spectral", metric=metric)
    scaled = bare(other, 0.1, step="spectral", metric=metric, maximize=factor < 0)
    for _ in range(4):
        batch = data(dtype=torch.float32)
        train(model, plain, [batch])
        scaled.zero_grad()
        mse(other, batch).backward()
        for p in other.parameters():
            if p.grad is not None:
                p.grad.mul_(factor)
        scaled.step()
    a, b = factors(model), factors(other)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("max_grad_norm", [None, 1e-3])
def test_own_clipping_equals_clipping_outside_in_the_momentum_too(max_grad_norm: float | None) -> None:
    """Without momentum msign ignores a clip; with it, every step weighs by its own factor."""
    model, other = (plain_mlp() for _ in range(2))
    other.load_state_dict(model.state_dict())
    kind = {"step": "spectral", "controller": "slope"}
    a, b = bare(model, 0.3, max_grad_norm=max_grad_norm, **kind), bare(other, 0.3, **kind)
    for size in (1.0, 30.0, 0.1):
        batch = data()
        train(model, a, [batch], lambda m, b, size=size: size * mse(m, b))
        b.zero_grad()
        (size * mse(other, batch)).backward()
        grads = [p.grad for p in other.parameters() if p.grad is not None]
        norm = torch.stack([g.norm() for g in grads]).norm() / 2**0.5  # s = 2
        if max_grad_norm is not None:
            torch._foreach_mul_(grads, (max_grad_norm / (norm + 1e-6)).clamp(max=1))
        b.step()
    for name, value in factors(model).items():  # a Gram knows small singular values to √eps, 1.5e-8
        torch.testing.assert_close(value, factors(other)[name], rtol=1e-7, atol=1e-7)


def test_weight_decay_shrinks_the_weight_itself() -> None:
    model = plain_mlp()
    optimizer = bare(model, 0.2, step="spectral", weight_decay=0.5)
    before = products(model)
    (model(data()[0]) * 0.0).sum().backward()
    optimizer.step()
    for name, W in products(model).items():
        torch.testing.assert_close(W, 0.9 * before[name], rtol=1e-5, atol=1e-8)


# ---- many layers at once ---------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Layers of several widths, ranks, scalings and dtypes, every one fed alone."""

    SHAPES = [(12, 9, 3, torch.float32), (9, 12, 3, torch.float32), (12, 9, 5, torch.float32),
              (12, 9, 3, torch.float64), (12, 9, 3, torch.bfloat16), (30, 7, 3, torch.float32)]  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for i, (d_out, d_in, rank, dtype) in enumerate(self.SHAPES):
            layer = LoRALinear(nn.Linear(d_in, d_out), rank, alpha=float(i + 1)).to(dtype)
            randomise_B(layer, 0.0 if i == 1 else 0.2)
            self.layers.append(layer)

    def loss(self, inputs: list[tuple[Tensor, Tensor]]) -> Tensor:
        return sum((layer(x) - y).double().square().mean() for layer, (x, y) in zip(self.layers, inputs, strict=True))


@pytest.mark.parametrize("metric", [None, "lora"])
def test_layers_of_any_shape_rank_and_dtype_step_together_as_alone(metric: str | None) -> None:
    together, alone = Mixed(), Mixed()
    alone.load_state_dict(together.state_dict())
    kind = {"step": "spectral", "metric": metric}
    one = bare(together, 0.1, **kind)
    many = [bare(layer, 0.1, **kind) for layer in alone.layers]
    for _ in range(3):
        inputs = [(torch.randn(8, i, dtype=t), torch.randn(8, o, dtype=t)) for o, i, _, t in Mixed.SHAPES]
        for model, optimizers in ((together, [one]), (alone, many)):
            model.zero_grad()
            model.loss(inputs).backward()
            for optimizer in optimizers:
                optimizer.step()
    for (name, a), b in zip(together.named_parameters(), alone.parameters(), strict=True):
        tolerance = {"rtol": 1e-2, "atol": 1e-3} if a.dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(a, b, msg=name, **tolerance)
    for state in one.state.values():
        assert all(value.dtype in (torch.float32, F64) for value in state.values())


def test_groups_have_their_own_numbers_and_their_own_kind_of_step() -> None:
    model, other = (peft_mlp((8, 8, 8, 8)) for _ in range(2))
    other.load_state_dict(model.state_dict())
    groups = [
        {"layers": "l1", "lr": 0.02, "momentum": 0.5, "prox": 1e-4},
        {"layers": "l2", "step": "gradient", "gradient": "tangent", "metric": None},
    ]
    batch = data(16, 8, 8)
    start = factors(model)
    optimizer = bare(model, 0.1, step="spectral", groups=groups)
    train(model, optimizer, [batch])
    for layer, kind in (
        ("l1", {"lr": 0.02, "step": "spectral", "momentum": 0.5, "prox": 1e-4}),
        ("l2", {"lr": 0.1, "step": "gradient", "gradient": "tangent"}),
        ("l3", {"lr": 0.1, "step": "spectral"}),
    ):
        other.load_state_dict(start, strict=False)
        for name, parameter in other.named_parameters():
            parameter.requires_grad_("lora_" in name and layer in name)
        train(other, bare(other, **kind), [batch])
        for name, value in factors(other).items():
            torch.testing.assert_close(factors(model)[name], value, rtol=1e-8, atol=1e-9)


# ---- no captures, and where Grams are singular -----------------------------------------------------------------------


def test_nothing_is_attached_and_several_processes_just_work(monkeypatch: pytest.MonkeyPatch) -> None:
    model = plain_mlp()
    optimizer = bare(model, 0.1, step="spectral", metric="lora", controller="slope")
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks and not module._backward_hooks
    for parameter in model.parameters():
        assert not getattr(parameter, "_post_accumulate_grad_hooks", None) and not parameter._backward_hooks
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
    before = factors(model)
    mse(model, data()).backward()
    assert optimizer.capture_bytes() == 0
    optimizer.step()
    assert all(not torch.equal(before[name], value) for name, value in factors(model).items())


def test_any_source_of_gradients_will_do() -> None:
    """Gradients put into `.grad` by hand, with no backward pass of this process behind them."""
    model, other = (plain_mlp() for _ in range(2))
    other.load_state_dict(model.state_dict())
    batch = data()
    train(model, bare(model, 0.1, step="spectral"), [batch])
    optimizer = bare(other, 0.1, step="spectral")
    wanted = [p for p in other.parameters() if p.requires_grad]
    for p, grad in zip(wanted, torch.autograd.grad(mse(other, batch), wanted), strict=True):
        p.grad = grad
    optimizer.step()
    assert all(torch.equal(value, factors(other)[name]) for name, value in factors(model).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("rank", [4, 48])
@pytest.mark.parametrize("metric", [None, "lora"])
def test_long_runs_from_zero_stay_finite_and_bounded(
    dtype: torch.dtype, rows: int, rank: int, metric: str | None
) -> None:
    """B starts at 0 and one row gives gradients of rank 1, so most Grams stay singular for many steps."""
    model = plain_mlp((64, 56, 64, 50), rank=rank, alpha=rank, dtype=dtype)
    randomise_B(model, 0.0)
    optimizer = bare(model, 0.05, step="spectral", metric=metric)
    previous = products(model.double())
    model.to(dtype)
    for _ in range(12):
        train(model, optimizer, [data(rows, 64, 50, dtype)])
        for name, W in (now := {n: p.double() for n, p in products(model).items()}).items():
            assert torch.isfinite(W).all()
            step = torch.linalg.matrix_norm(W - previous[name].double(), 2)
            if metric is None:  # in exact arithmetic A's turn and B's turn each reach at most η·c
                assert step < 4 * 0.05 * (64 / 50) ** 0.5, (name, float(step))
        previous = now
    assert optimizer.stats() == {"skipped_steps": 0, "repaired_pivots": 0}


def test_a_plain_cholesky_does_not_survive_the_same_start() -> None:
    """Why Grams are formed in float64, with a ridge: in fp32 the first B of a batch of one row has none."""
    model = plain_mlp((64, 56, 64, 50), rank=16, dtype=torch.float32)
    randomise_B(model, 0.0)
    optimizer = bare(model, 0.05, step="spectral")
    train(model, optimizer, [data(1, 64, 50, torch.float32)] * 2)
    B = model.l2.lora_B.weight.detach()
    assert int(torch.linalg.cholesky_ex(B.T @ B)[1]) > 0
    assert int(torch.linalg.cholesky_ex(B.T @ B + 1e-8 * (B.T @ B).diagonal().mean() * torch.eye(16))[1]) > 0


@pytest.mark.parametrize("dead", ["rows", "repeated", "zero"])
@pytest.mark.parametrize("metric", [None, "lora"])
def test_a_rank_deficient_A_is_survived(dead: str, metric: str | None) -> None:
    model = plain_mlp(dtype=torch.float32)
    with torch.no_grad():
        for layer in (model.l1, model.l2, model.l3):
            A = layer.lora_A.weight
            if dead == "rows":
                A[1:3] = 0
            elif dead == "repeated":
                A[1:] = A[:1]
            else:
                A.zero_()
    optimizer = bare(model, 0.1, step="spectral", metric=metric)
    train(model, optimizer, [data(dtype=torch.float32)] * 5)
    assert all(torch.isfinite(value).all() for value in factors(model).values())
    assert optimizer.stats()["skipped_steps"] == 0


def test_rank_128() -> None:
    layer = LoRALinear(nn.Linear(160, 144), 128)
    optimizer = bare(layer, 0.05, step="spectral", metric="lora")
    for _ in range(3):
        train(layer, optimizer, [data(64, 160, 144, torch.float32)])
    assert torch.isfinite(products(nn.ModuleDict({"layer": layer}))["layer"]).all()
    assert optimizer.stats() == {"skipped_steps": 0, "repaired_pivots": 0}


def test_zero_gradients_leave_zero_state_and_later_the_momentum_goes_on() -> None:
    model = plain_mlp()
    optimizer = bare(model, 0.1, step="spectral", metric="lora")
    (model(data()[0]) * 0.0).sum().backward()
    optimizer.step()
    for layer in (model.l1, model.l2, model.l3):
        state_B, state_A = optimizer.state[layer.lora_B.weight], optimizer.state[layer.lora_A.weight]
        assert not (state_B["momentum"] @ state_A["momentum"]).any() and not state_A["metric"].any()
    train(model, optimizer, [data()])
    before = factors(model)
    optimizer.zero_grad()
    (model(data()[0]) * 0.0).sum().backward()
    optimizer.step()
    assert all(not torch.equal(before[name], value) for name, value in factors(model).items())


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"step": "newton"}, r"Invalid step='newton'. Must be one of 'gradient', 'spectral'."),
        ({"metric": "kfac"}, r"Invalid metric='kfac'. Must be one of None, 'lora' with step='spectral'."),
        (
            {"step": "gradient", "metric": "lora"},
            r"Invalid metric='lora'. Must be one of None, 'kfac', 'shampoo', .* with step='gradient'.",
        ),
        ({"joint": False, "metric": "lora"}, r"Invalid metric='lora'. Must be None with joint=False."),
        (
            {"momentum_rank": 3},
            r"Invalid momentum_rank=3 with step='spectral'. Must be None: it is a setting of step='gradient'.",
        ),
    ],
)
def test_settings_of_the_other_kind_are_refused(settings_: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bare(plain_mlp(), 0.1, **{"step": "spectral", **settings_})


def test_defaults_follow_the_kind_of_step() -> None:
    gradient, spectral = (Options.of_settings({"lr": 0.1, "step": step}) for step in ("gradient", "spectral"))
    assert (gradient.gamma, gradient.delta, gradient.rho, gradient.tau) == (0.5, 1e-5, 1e-2, 0.0)
    assert (spectral.gamma, spectral.delta, spectral.rho, spectral.tau) == (1.0, 0.1, 1e-6, 0.9)
    assert (gradient.captures, spectral.captures) == ("activations", None)


def test_an_observed_step_has_its_figures() -> None:
    model = plain_mlp()
    optimizer = bare(model, 0.1, step="spectral", metric="lora")
    train(model, optimizer, [data()])
    optimizer.observe_next_step()
    train(model, optimizer, [data()])
    figures = optimizer.stats()
    assert figures["projection_residual"] == 0 and 0 < figures["update_ratio"] < 10 and figures["capture_bytes"] == 0
    assert "momentum_kept" not in figures  # it is carried whole


def test_defaults_are_the_spectral_step_with_its_metric_and_groups_resolve_their_own() -> None:
    model = plain_mlp()
    groups = [{"layers": "l1", "step": "gradient"}, {"layers": "l2", "step": "gradient", "metric": "kfac"}]
    optimizer = PSILoRA(model, 0.1, groups=groups)
    found = [(g["step_kind"], g["metric"], g["gradient"]) for g in optimizer.param_groups]
    assert found == [("spectral", "lora", "tangent"), ("gradient", None, "exact"), ("gradient", "kfac", "exact")]
    assert optimizer._controller is None
    with pytest.raises(ValueError, match=r"Invalid gradient='exact' with step='spectral'\. Must be 'tangent'"):
        PSILoRA(plain_mlp(), 0.1, gradient="exact")
    with pytest.raises(ValueError, match=r"Invalid metric='kfac'\. Must be one of None, 'lora' with step='spectral'\."):
        PSILoRA(plain_mlp(), 0.1, metric="kfac")


# ---- a rate that fades with the gradient -----------------------------------------------------------------------------


class Gated(nn.Module):
    """b(x) + gate·a(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.gate = LoRALinear(nn.Linear(8, 8), 2), LoRALinear(nn.Linear(8, 8), 2), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.b(x) + self.gate * self.a(x)

    @torch.no_grad()
    def delta(self) -> Tensor:
        return self.a.lora_B.weight @ self.a.lora_A.weight


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("joint", [True, False])
def test_a_layer_without_a_gradient_comes_to_rest_and_holds_up_no_other(joint: bool, backend: str) -> None:
    """Its momentum decays to nothing, through the denormals; its direction would stay at full length."""
    if backend == "triton" and triton_backend.unavailable_reason() is not None:
        pytest.skip(str(triton_backend.unavailable_reason()))
    torch.manual_seed(0)
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    model = Gated().to(device)
    x, y = torch.randn(32, 8, device=device), torch.randn(32, 8, device=device)
    optimizer = PSILoRA(model, 0.05, step="spectral", joint=joint, metric=None, backend=backend, momentum=1e-3)
    resting = others = torch.zeros(())
    for step in range(19):  # 1e-3^16 is no number of fp32
        model.gate = 1.0 if step < 2 else 0.0
        optimizer.zero_grad(set_to_none=False)
        (model(x) - y).square().mean().backward()
        optimizer.step()
        if step == 6:
            resting, others = model.delta(), model.b.lora_B.weight.detach().clone()
    torch.testing.assert_close(model.delta(), resting, rtol=0, atol=1e-6)
    assert float((model.b.lora_B.weight - others).detach().norm()) > 1e-3
    assert optimizer.stats()["skipped_steps"] == 0


@pytest.mark.parametrize("size", [1e-30, 1e-36, 1e-38, 1e-40, 1e-44])
def test_a_layer_with_hardly_a_gradient_holds_up_no_other(size: float) -> None:
    torch.manual_seed(0)
    a, b = LoRALinear(nn.Linear(8, 8), 2), LoRALinear(nn.Linear(8, 8), 2)
    optimizer = PSILoRA(nn.ModuleList([a, b]), 0.05)
    x = torch.randn(32, 8)
    for _ in range(5):
        optimizer.zero_grad()
        (b(x).square().mean() + size * a(x).square().mean()).backward()
        optimizer.step()
    assert optimizer.stats()["skipped_steps"] == 0
    assert float(b.lora_B.weight.detach().abs().max()) > 1e-2
    assert bool(a.lora_B.weight.isfinite().all())


@pytest.mark.parametrize("size", [1e-16, 1e-18, 1e-20, 1e-30])
def test_a_factor_that_is_hardly_there_is_taken_for_zero(size: float) -> None:
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(8, 8), 2)
    randomise_B(layer, size)
    optimizer = PSILoRA(layer, 0.05)
    train(layer, optimizer, [(torch.randn(16, 8), torch.randn(16, 8)) for _ in range(3)])
    assert optimizer.stats()["skipped_steps"] == 0
    assert float((layer.lora_B.weight @ layer.lora_A.weight).detach().abs().max()) > 1e-2


def test_one_outlier_does_not_slow_the_steps_after_it() -> None:
    """A gradient a million times the usual counts for four."""

    def moved(outlier: float) -> Tensor:
        torch.manual_seed(0)
        layer = one_layer(12, 10, 2, 2.0)
        optimizer = PSILoRA(layer, 0.01, momentum=0.0)
        for step in range(16):
            optimizer.zero_grad()
            x, y = torch.randn(20, 10, dtype=F64), torch.randn(20, 12, dtype=F64)
            ((outlier if step == 6 else 1.0) * (layer(x) - y).square().mean()).backward()
            before = layer.lora_B.weight.detach().clone()
            optimizer.step()
        return (layer.lora_B.weight.detach() - before).norm()

    assert moved(1e6) > 0.8 * moved(1.0)


def test_a_gradient_that_falls_slows_its_layer_and_one_that_returns_speeds_it_up() -> None:
    torch.manual_seed(0)
    layer = one_layer(12, 10, 2, 2.0)
    optimizer = PSILoRA(layer, 0.01, momentum=0.0, metric=None)
    x, y = torch.randn(20, 10, dtype=F64), torch.randn(20, 12, dtype=F64)
    lengths = []
    for size in (1.0, 1.0, 1.0, 0.01, 1.0):
        optimizer.zero_grad()
        (size * (layer(x) - y).square().mean()).backward()
        before = layer.lora_B.weight.detach() @ layer.lora_A.weight.detach()
        optimizer.step()
        lengths.append(float((layer.lora_B.weight @ layer.lora_A.weight - before).detach().norm()))
    assert lengths[3] < 0.02 * lengths[2] and lengths[4] > 0.8 * lengths[2]
