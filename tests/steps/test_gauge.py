"""Factors that have drifted apart are balanced by powers of two: the weight keeps its bits and goes on as it would."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import mse, randomise_B
from torch import Tensor, nn

from psilora import LoRALinear, PSILoRA
from psilora.backends.triton import backend as triton_backend
from psilora.options import GradientOptions

FP32, FP64 = torch.float32, torch.float64
#: Norms at most 16 times apart when a step begins, and what one step adds.
APART = 32.0
BACKENDS = ["reference"] if triton_backend.unavailable_reason() else ["reference", "triton"]
KINDS: list[dict[str, Any]] = [
    {},
    {"metric": None, "first": "B"},
    {"joint": False},
    {"controller": "slope"},
    {"step": "gradient", "prox": 0.0},
    {"step": "gradient", "prox": 0.0, "num_iters": 2, "metric": "kfac"},
    {"step": "gradient", "prox": 0.0, "gradient": "tangent"},
]


@pytest.fixture
def burn_in(backend: str, kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> int:
    """Steps before the kind balances; fewer of them with kernels, whose interpreter takes a second for each."""
    if kind.get("step") != "gradient":
        return 0
    if backend == "triton":
        monkeypatch.setattr(GradientOptions, "burn_in", 1)
    return GradientOptions.burn_in


def layers(dtype: torch.dtype = FP32, apart: float = 2.0**7) -> nn.Sequential:
    """Two layers; |A| is about `apart` times |B| in the first and the other way round in the second."""
    torch.manual_seed(3)
    model = nn.Sequential(LoRALinear(nn.Linear(12, 16), 4), nn.Tanh(), LoRALinear(nn.Linear(16, 10), 4)).to(dtype)
    randomise_B(model)
    with torch.no_grad():
        for layer, t in ((model[0], apart**0.5), (model[2], apart**-0.5)):
            layer.lora_A.weight.mul_(t)
            layer.lora_B.weight.div_(t)
    return model


def weight(layer: LoRALinear) -> Tensor:
    return layer.lora_B.weight.detach().double() @ layer.lora_A.weight.detach().double()


def apart(layer: LoRALinear) -> float:
    a, b = (float(p.weight.detach().double().norm()) for p in (layer.lora_A, layer.lora_B))
    return max(a / b, b / a)


def trained(model: nn.Module, optimizer: PSILoRA, steps: int) -> nn.Module:
    torch.manual_seed(4)
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        optimizer.zero_grad()
        mse(model, (torch.randn(24, 12).to(dtype), torch.randn(24, 10).to(dtype))).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [{}, {"joint": False}, {"step": "gradient"}], ids=str)
def test_the_weight_keeps_every_bit(kind: dict[str, Any], dtype: torch.dtype, backend: str, burn_in: int) -> None:
    model = layers(dtype)
    plain = copy.deepcopy(model)
    for each, balance in ((model, True), (plain, False)):
        trained(each, PSILoRA(each, 1e-3, backend=backend, balance=balance, **kind), burn_in + 1)
    for layer, other in ((model[0], plain[0]), (model[2], plain[2])):
        assert apart(other) > 64, "the case has something to balance"
        assert apart(layer) < 4
        t = float(layer.lora_A.weight.detach().double().norm() / other.lora_A.weight.detach().double().norm())
        assert abs(torch.log2(torch.tensor(t)).round() - torch.log2(torch.tensor(t))) < 1e-6
        power = 2.0 ** round(float(torch.log2(torch.tensor(t))))
        assert torch.equal(layer.lora_A.weight.detach(), other.lora_A.weight.detach() * power)
        assert torch.equal(layer.lora_B.weight.detach(), other.lora_B.weight.detach() / power)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_steps_after_it_are_those_of_the_factors_as_they_were(
    kind: dict[str, Any], backend: str, burn_in: int
) -> None:
    """With momentum, metric and the controller's last change: what lives on the factors follows them."""
    dtype = FP64 if backend == "reference" else FP32
    model = layers(dtype)
    plain, start = copy.deepcopy(model), copy.deepcopy(model)
    for each, balance in ((model, True), (plain, False)):
        ridge = {"prox": 1e-11} if kind.get("step") != "gradient" and dtype == FP64 else {}
        trained(each, PSILoRA(each, 0.02, backend=backend, balance=balance, **{**ridge, **kind}), max(3, burn_in + 2))
    for i in (0, 2):
        assert apart(model[i]) < 0.5 * apart(plain[i])
        moved = (weight(plain[i]) - weight(start[i])).norm()
        assert (weight(model[i]) - weight(plain[i])).norm() < (1e-6 if dtype == FP64 else 2e-2) * moved


#: The rate reaches the kernels of a step in one place, whatever else is set.
CAUSES = [
    (backend, cause, kind)
    for backend in BACKENDS
    for cause in ("lr", "gradient")
    for kind in (KINDS if (backend, cause) != ("triton", "lr") else (KINDS[0], KINDS[4]))
]


@pytest.mark.parametrize(("backend", "cause", "kind"), CAUSES, ids=str)
def test_a_step_that_changes_nothing_balances_nothing(
    cause: str, kind: dict[str, Any], backend: str, burn_in: int
) -> None:
    model = layers()
    optimizer = PSILoRA(model, 0.0 if cause == "lr" else 0.05, backend=backend, **kind)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(burn_in + 1):
        optimizer.zero_grad()
        (mse(model, (torch.randn(24, 12), torch.randn(24, 10))) * (0.0 if cause == "gradient" else 1.0)).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [{"step": "gradient"}], ids=str)
def test_a_gradient_step_begins_as_published(kind: dict[str, Any], backend: str, burn_in: int) -> None:
    model = layers()
    plain = copy.deepcopy(model)
    for each, balance in ((model, True), (plain, False)):
        trained(each, PSILoRA(each, 0.01, backend=backend, balance=balance, **kind), burn_in)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("settings", [{}, {"first": "B"}, {"metric": None}, {"joint": False}], ids=str)
def test_at_a_constant_rate_the_factors_stay_together(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(6, 6), 2)
    optimizer, target = PSILoRA(layer, 0.2, **settings), torch.randn(6, 6) / 6**0.5
    largest = 0.0
    for t in range(400):  # not balanced, they are too far apart within 260
        x = torch.randn(16, 6)
        y = layer.base(x).detach() + x @ target.T + 0.5 * torch.randn(16, 6)
        optimizer.zero_grad()
        (layer(x) - y).square().sum(1).mean().backward()
        optimizer.step()
        largest = max(largest, apart(layer)) if t else largest
    assert largest < APART
    assert optimizer.stats() == {"skipped_steps": 0, "repaired_pivots": 0}


def test_the_first_rate_of_a_warm_up_does_not_set_the_size_of_B() -> None:
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(64, 64), 8)
    optimizer = PSILoRA(layer, 0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, (t + 1) / 200))
    x = torch.randn(256, 64)
    y = layer.base(x).detach() + x @ torch.randn(64, 64) / 8
    for _ in range(300):
        optimizer.zero_grad()
        (layer(x) - y).square().mean().backward()
        optimizer.step()
        schedule.step()
    assert apart(layer) < APART


@pytest.mark.parametrize("metric", ["lora", None])
@pytest.mark.parametrize("factor", [1e2, 1e3, 1e6])
def test_one_gradient_spike_does_not_throw_the_weight(metric: str | None, factor: float) -> None:
    losses = _with_a_spike(metric, factor)
    assert max(losses[60:]) < 3 * losses[59]
    assert sum(loss > 2 * losses[59] for loss in losses[60:]) <= 5
    assert losses[-1] < 1.2 * losses[59]


def test_without_a_cap_one_does() -> None:
    losses = _with_a_spike("lora", 1e3, cap=None)
    assert max(losses[60:]) > 20 * losses[59]


def _with_a_spike(metric: str | None, factor: float, **settings: Any) -> list[float]:
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(16, 16), 4)
    optimizer = PSILoRA(layer, 0.05, metric=metric, **settings)
    target, losses = torch.randn(16, 4) @ torch.randn(4, 16) / 16, []
    for t in range(140):
        x = torch.randn(64, 16)
        optimizer.zero_grad()
        error = layer(x) - layer.base(x) - x @ target.T
        losses.append(float(error.detach().square().mean()))
        noisy = (error + 0.5 * torch.randn_like(error)).square().mean()
        (noisy * (factor if t == 60 else 1.0)).backward()
        optimizer.step()
    return losses
