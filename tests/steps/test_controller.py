"""The step-size controller against a scalar transcription of its rule, and when it must not move."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from models import bare, data, factors, mse, peft_mlp, plain_mlp, randomise_B, train
from problems import make_problem
from torch import Tensor, nn

from psilora import LoRALinear
from psilora.steps.controller import NUMBERS, START, advanced, slope

F64 = torch.float64
KINDS = [{"step": "spectral", "metric": "lora"}, {"step": "spectral"}, {"step": "gradient"}]


class Scalar:
    """The rule in Python numbers, one step at a time."""

    def __init__(self) -> None:
        self.s, self.z0, self.z1, self.p0, self.t, self.hit = 0.03, 0.0, 0.0, 0.0, 0, None
        self.floor = 0.0

    def move(self, p1: float, theta: float = 0.08) -> float:
        if self.p0 == 0 or p1 == 0:
            return self.s
        self.t += 1
        self.z0 = 0.7 * self.z0 + 0.3 * abs(self.p0)
        self.z1 = 0.7 * self.z1 + 0.3 * p1
        rho = self.z1 / self.z0
        first = self.hit is None and rho > theta
        if first:
            self.hit = self.t
            self.s /= 2
        u = min(1.0, max(-1.0, (theta - rho) / theta))
        kappa = 0.3 if u < 0 else 0.25 if self.hit is None else 1 / (10 + self.t - self.hit)
        self.s = min(20.0, self.s * math.exp(kappa * u))
        if first:
            self.floor = self.s / 4
        self.s = max(self.s, self.floor)
        return self.s

    def as_list(self) -> list[float]:
        return [self.s, self.z0, self.z1, self.p0, self.t, -1 if self.hit is None else self.hit, self.floor]


def start() -> Tensor:
    return torch.tensor([START, 0, 0, 0, 0, -1, 0], dtype=F64)


def test_the_rule_over_a_sequence_with_growth_a_hit_and_the_cap() -> None:
    rule, numbers = Scalar(), start()
    generator = torch.Generator().manual_seed(0)
    for step in range(120):
        noise = float(torch.randn((), generator=generator))
        p1 = (-1.0 if step < 30 else 0.3 if step < 60 else -1.0) + 0.2 * noise
        if step in (0, 7):  # nothing known yet; a step at lr = 0
            p0 = 0.0
        else:
            p0 = -1.0 - 0.1 * noise
        rule.move(p1)
        numbers = advanced(numbers, torch.tensor(p1, dtype=F64))
        rule.p0 = p0
        numbers[3] = p0
        assert numbers.tolist() == pytest.approx(rule.as_list(), rel=1e-12)
    assert rule.hit is not None and rule.t == 117
    rule, numbers = Scalar(), start()
    for _ in range(40):  # never an overshoot: up to the cap
        rule.move(-1.0)
        numbers = advanced(numbers, torch.tensor(-1.0, dtype=F64))
        rule.p0 = numbers[3] = -1.0
    assert numbers.tolist() == pytest.approx(rule.as_list(), rel=1e-12) and rule.s == 20.0 and rule.hit is None


def test_a_slope_that_is_mostly_noise_does_not_sink_the_factor() -> None:
    """The loss still falls along the steps (mean ρ = −.3); without a floor s ends below 1e-4 of where it was."""
    generator = torch.Generator().manual_seed(0)
    numbers, bare = start(), start()
    highest = 0.0
    for noise in torch.randn(500, generator=generator, dtype=F64):
        numbers, bare = (advanced(n, -0.3 + 2 * noise) for n in (numbers, bare))
        highest = max(highest, float(numbers[0]))
        numbers[3] = bare[3] = -1.0
        bare[6] = 0.0
    assert float(numbers[0]) >= float(numbers[6]) > highest / 20
    assert float(bare[0]) < 1e-4 * highest


@pytest.mark.parametrize(("p0", "p1"), [(0.0, -1.0), (-1.0, 0.0), (-1.0, math.inf), (-1.0, math.nan)])
def test_it_does_not_move_without_information(p0: float, p1: float) -> None:
    numbers = torch.tensor([0.5, 1.0, -1.0, p0, 4, 2, 0.1], dtype=F64)
    assert torch.equal(advanced(numbers, torch.tensor(p1, dtype=F64)), numbers)


def test_the_slope_is_the_sum_over_all_adapters_whatever_their_shapes() -> None:
    problems = [
        make_problem((7, 5, 3), momentum_rank=3),
        make_problem((7, 5, 3), momentum_rank=3),
        make_problem((9, 11, 2), momentum_rank=2, dtype=torch.float64, maximize=True),
        make_problem((7, 5, 3), momentum_rank=3, dtype=torch.bfloat16),
    ]
    changes = [(torch.randn(p.dB.shape, dtype=p.dtype), torch.randn(p.dA.shape, dtype=p.dtype)) for p in problems]
    want = 0.0
    for p, (change_B, change_A) in zip(problems, changes, strict=True):
        sign = -1 if p.options.maximize else 1
        want += sign * float((p.dB.double() * change_B.double()).sum() + (p.dA.double() * change_A.double()).sum())
    clip = torch.tensor(0.25, dtype=F64)
    got = slope(problems, changes, clip, torch.device("cpu"))
    assert got.dtype == F64 and float(got) == pytest.approx(0.25 * want, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("alpha", [4.0, 32.0])
def test_training_follows_the_rule(kind: dict, alpha: float) -> None:
    """Every step is that of an optimizer without controller at the rate which the rule finds from the slopes."""
    model, other = plain_mlp(alpha=alpha), plain_mlp(alpha=alpha)
    other.load_state_dict(model.state_dict())
    lr = 2.0
    optimizer = bare(
        model, lr, controller="slope", balance=False, **kind
    )  # balanced factors have moved by more than a step
    plain = bare(other, lr, balance=False, **kind)
    rule = Scalar()
    before: dict[str, Tensor] = {}
    rates = []
    for _ in range(25):
        batch = data(8)
        train(model, optimizer, [batch])
        plain.zero_grad()
        mse(other, batch).backward()
        grads = {name: p.grad.clone() for name, p in other.named_parameters() if p.grad is not None}
        here = factors(other)
        rule.move(sum(float((grads[n] * (here[n] - before[n])).sum()) for n in here) if before else 0.0)
        rates.append(rule.s)
        plain.param_groups[0]["lr"] = rule.s * lr
        plain.step()
        before, after = here, factors(other)
        rule.p0 = sum(float((grads[n] * (after[n] - before[n])).sum()) for n in here)
    numbers = optimizer.state[optimizer.param_groups[0]["params"][0]]["controller"]
    assert numbers.tolist() == pytest.approx(rule.as_list(), rel=1e-3)
    a, b = factors(model), factors(other)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5)
    assert len(set(rates)) > 20  # it did move


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("still", ["lr", "gradient"])
def test_lr_zero_and_zero_gradients_move_nothing(kind: dict, still: str) -> None:
    model = peft_mlp(dtype=torch.float32)
    optimizer = bare(model, 0.0 if still == "lr" else 0.5, controller="slope", **kind)
    before = factors(model)
    for _ in range(3):
        optimizer.zero_grad()
        (mse(model, data(dtype=torch.float32)) * (0.0 if still == "gradient" else 1.0)).backward()
        optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in factors(model).items())
    assert torch.equal(optimizer.state[optimizer.param_groups[0]["params"][0]]["controller"], start())


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_skipped_step_leaves_the_controller_as_it_was(kind: dict) -> None:
    model = peft_mlp(dtype=torch.float32)
    optimizer = bare(model, 0.3, controller="slope", **kind)
    train(model, optimizer, [data(dtype=torch.float32)] * 3)
    before = copy.deepcopy([dict(state) for state in optimizer.state.values()])
    optimizer.zero_grad()
    mse(model, data(dtype=torch.float32)).backward()
    next(p for n, p in model.named_parameters() if "l2" in n and "lora_B" in n).grad[0, 0] = math.inf
    with pytest.warns(UserWarning, match="a step was skipped"):
        optimizer.step()
    for old, new in zip(before, optimizer.state.values(), strict=True):
        assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_is_bit_exact(kind: dict, dtype: torch.dtype, tmp_path) -> None:
    batches = [data(dtype=dtype) for _ in range(8)]
    model, resumed = peft_mlp(dtype=dtype), peft_mlp(dtype=dtype)
    optimizer = bare(model, 0.5, controller="slope", **kind)
    train(model, optimizer, batches[:4])
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    fresh = bare(resumed, 0.5, controller="slope", **kind)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed.load_state_dict(saved["model"])
    fresh.load_state_dict(saved["optimizer"])
    train(model, optimizer, batches[4:])
    train(resumed, fresh, batches[4:])
    a, b = factors(model), factors(resumed)
    assert all(torch.equal(a[name], b[name]) for name in a)
    first = optimizer.param_groups[0]["params"][0]
    assert optimizer.state[first]["controller"].dtype == F64 and float(optimizer.state[first]["controller"][4]) == 7
    for p, q in zip(optimizer.state.values(), fresh.state.values(), strict=True):
        assert p.keys() == q.keys() and all(torch.equal(p[key], q[key]) for key in p)


def test_init_state_is_complete() -> None:
    model = peft_mlp(dtype=torch.bfloat16)
    optimizer = bare(model, 0.1, step="spectral", controller="slope")
    optimizer.init_state()
    keys = {id(p): set(state) for p, state in optimizer.state.items()}
    train(model, optimizer, [data(dtype=torch.bfloat16)])
    assert keys == {id(p): set(state) for p, state in optimizer.state.items()}
    for p, state in optimizer.state.items():
        assert state["change"].shape == p.shape and state["change"].dtype == torch.float32
    assert len(NUMBERS) == len(start())


def test_an_adapter_without_a_gradient_has_not_moved() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (LoRALinear(nn.Linear(24, 6), 3) for _ in range(2))
            self.use_b = True

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x) if self.use_b else self.a(x)

    model = Two().double()
    randomise_B(model)
    optimizer = bare(model, 0.1, step="spectral", controller="slope")
    train(model, optimizer, [data()])
    assert optimizer.state[model.b.lora_A.weight]["change"].any()
    model.use_b = False
    train(model, optimizer, [data()])
    assert not optimizer.state[model.b.lora_A.weight]["change"].any()
    assert optimizer.state[model.a.lora_A.weight]["change"].any()


def test_it_tames_a_rate_that_is_far_too_large() -> None:
    torch.manual_seed(3)
    batch = data(64)
    losses = {}
    for controller in (None, "slope"):
        torch.manual_seed(4)
        model = plain_mlp()
        optimizer = bare(model, 3.0, step="spectral", controller=controller)
        train(model, optimizer, [batch] * 60)
        losses[controller] = mse(model, batch).item()
    assert losses["slope"] < 0.5 * losses[None]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_alpha_does_not_change_what_it_does(kind: dict) -> None:
    """Adapters with equal √s-scaled factors have equal slopes, so equal rates and equal weights."""
    batches = [data() for _ in range(8)]
    start = peft_mlp(lora_alpha=4).state_dict()  # s = 1
    numbers = []
    for alpha in (4, 64):
        model = peft_mlp(lora_alpha=alpha)
        model.load_state_dict(start)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.div_((alpha / 4) ** 0.5)
        optimizer = bare(model, 0.3, controller="slope", **kind)
        train(model, optimizer, batches)
        numbers.append(optimizer.state[optimizer.param_groups[0]["params"][0]]["controller"])
    torch.testing.assert_close(numbers[0], numbers[1], rtol=1e-5, atol=0)
    assert float(numbers[0][0]) != START


def test_an_unknown_controller_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Invalid controller='pid'. Must be one of None, 'slope'."):
        bare(plain_mlp(), 0.1, controller="pid")
