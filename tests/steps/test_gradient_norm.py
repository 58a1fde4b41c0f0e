"""The full gradient's norm by every route, and clipping by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import data, factors, mse, plain_mlp
from problems import make_problem
from torch import Tensor

from psilora import PSILoRA
from psilora.capture.storage import Dense, Matrix
from psilora.steps import gradient_norm

CPU = torch.device("cpu")


def dense_gradient(problem: Any) -> Tensor:
    return sum(s.double().mT @ x.double() for x, s in problem.record.chunks) / problem.pair.scaling


@pytest.mark.parametrize("rows", [(3,), (5, 2), (200,)])
@pytest.mark.parametrize("shape", [(40, 24, 3), (24, 40, 3), (300, 200, 4)])
def test_exact_routes(rows: tuple[int, ...], shape: tuple[int, int, int]) -> None:
    """A few rows take ⟨XXᵀ, SSᵀ⟩, many the blocks of G."""
    problem = make_problem(shape, rows=rows)
    found = gradient_norm.full_squares([problem], torch.tensor(0.5, dtype=torch.float64), None, CPU)
    assert float(found) == pytest.approx(float(dense_gradient(problem).square().sum()) / 4, rel=1e-5)


def test_the_dense_and_the_tangent_gradient() -> None:
    exact, other = make_problem((40, 24, 3)), make_problem((40, 24, 3), gradient="tangent")
    held = Dense()
    for x, s in exact.record.chunks:
        held.take(Matrix(x), s, exact.pair)
    want = float(dense_gradient(exact).square().sum())
    exact.record.held = held  # type: ignore[union-attr]
    exact.record.chunks = []  # type: ignore[union-attr]
    assert float(gradient_norm.full_squares([exact], None, None, CPU)) == pytest.approx(want, rel=1e-5)
    G, B, A = dense_gradient(other), other.pair.B.double(), other.pair.A.double()
    P_B, P_A = B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A
    tangent = float((P_B @ G + G @ P_A - P_B @ G @ P_A).square().sum())
    both = float(gradient_norm.full_squares([exact, other], None, None, CPU))
    assert both == pytest.approx(want + tangent, rel=1e-4)
    assert tangent < 0.9 * float(G.square().sum())


@pytest.mark.parametrize("shape", [(300, 200, 4), (200, 300, 4)])
def test_the_estimate_is_unbiased_and_as_accurate_as_stated(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over 200 random gradients of rank 1, the worst case for fixed columns, mean and deviation are as documented."""
    monkeypatch.setattr(gradient_norm, "SKETCH_ABOVE", 0)
    ratios = []
    for _ in range(200):
        problem = make_problem(shape, rows=(1,))
        exact = float(dense_gradient(problem).square().sum())
        ratios.append(float(gradient_norm.full_squares([problem], None, None, CPU)) / exact)
    spread = torch.tensor(ratios)
    deviation = (2 / gradient_norm.COLUMNS) ** 0.5
    assert abs(float(spread.mean()) - 1) < 4 * deviation / 200**0.5
    assert 0.8 * deviation < float(spread.std()) < 1.2 * deviation


@pytest.mark.parametrize("gradient", ["exact", "dense"])
@pytest.mark.parametrize("largest", [1e-2, 1e3])
def test_clipping_by_the_full_norm_is_a_smaller_loss(gradient: str, largest: float) -> None:
    """Scaling the loss by max_grad_norm / ‖G‖ clips without any clipping code; ‖G‖ from the dense weights' own grad."""
    model, other = plain_mlp(), plain_mlp()
    other.load_state_dict(model.state_dict())
    settings = {"step": "gradient", "gradient": gradient}
    ours = PSILoRA(model, 0.1, max_grad_norm=largest, norm="full", **settings)
    theirs = PSILoRA(other, 0.1, **settings)
    for _ in range(3):
        batch = data()
        for layer in (other.l1, other.l2, other.l3):
            layer.base.weight.requires_grad_()
        other.zero_grad()
        mse(other, batch).backward()
        total = torch.stack([layer.base.weight.grad.norm() for layer in (other.l1, other.l2, other.l3)]).norm()
        other.zero_grad()
        theirs.zero_grad()
        (mse(other, batch) * (largest / (total + 1e-6)).clamp(max=1)).backward()
        theirs.step()
        ours.zero_grad()
        mse(model, batch).backward()
        ours.step()
    a, b = factors(model), factors(other)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-8, atol=1e-10)
    assert largest > 1 or float(total) > 1.5 * largest  # the small limit clips


@pytest.mark.parametrize("size", [1e-25, 1e22])
@pytest.mark.parametrize("rows", [(3,), (200,)])
def test_squares_neither_overflow_nor_vanish(rows: tuple[int, ...], size: float, monkeypatch: Any) -> None:
    """By blocks, Grams, a sketch, from SᵀX and from `.grad`, in fp32."""
    problem, tangent = make_problem((40, 24, 3), rows=rows), make_problem((40, 24, 3), gradient="tangent")
    usual = float(gradient_norm.full_squares([tangent], None, None, CPU))
    tangent.dA.mul_(size)
    tangent.dB.mul_(size)
    assert float(gradient_norm.full_squares([tangent], None, None, CPU)) == pytest.approx(size**2 * usual, rel=1e-4)
    for _, s in problem.record.chunks:
        s.mul_(size)
    want = float(dense_gradient(problem).square().sum())
    assert float(gradient_norm.full_squares([problem], None, None, CPU)) == pytest.approx(want, rel=1e-5)
    held = Dense()
    for x, s in problem.record.chunks:
        held.take(Matrix(x), s, problem.pair)
    monkeypatch.setattr(gradient_norm, "SKETCH_ABOVE", 0)
    assert float(gradient_norm.full_squares([problem], None, None, CPU)) == pytest.approx(want, rel=1e-5)
    problem.record.held = held
    problem.record.chunks = []
    assert float(gradient_norm.full_squares([problem], None, None, CPU)) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"norm": "full"}, {"step": "gradient", "norm": "full"}], ids=str)
def test_huge_finite_gradients_are_clipped_as_others_are(settings: dict[str, Any]) -> None:
    """The trap: squares that overflow make the norm infinite and the step nothing."""
    moved = []
    for size in (1.0, 1e22):
        torch.manual_seed(0)
        model = plain_mlp(dtype=torch.float32)
        model.l3.base.bias.requires_grad_()
        batch = data(dtype=torch.float32)
        optimizer = PSILoRA(model, 0.1, max_grad_norm=1e-3, metric=None, **settings)
        (mse(model, batch) * size).backward()
        optimizer.step()
        assert optimizer.stats()["skipped_steps"] == 0
        moved.append({**factors(model), "bias": model.l3.base.bias.detach().clone()})
    for name, value in moved[0].items():
        torch.testing.assert_close(value, moved[1][name], rtol=1e-3, atol=1e-6)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"Invalid norm='l1'. Must be one of 'lora', 'full'."):
        PSILoRA(plain_mlp(), 0.1, norm="l1")
    with pytest.raises(ValueError, match="norm='full' needs G, .* use gradient='dense'"):
        PSILoRA(plain_mlp(), 0.1, step="gradient", norm="full", gradient="backward", momentum=0.0)


def test_clipping_takes_as_many_launches_for_many_layers_as_for_a_few() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    from psilora.steps.clipping import gradient_factor

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Count.calls += 1
            return function(*args, **(kwargs or {}))

    problems = [make_problem((12 + i, 10, 3), scaling=1.0 + i) for i in range(20)]
    others = [torch.randn(7), torch.randn(5).double()]
    with Count():
        clip = gradient_factor(problems, others, 0.5, None, torch.device("cpu"))
    squares = sum(float((g.double() ** 2).sum()) / p.pair.scaling for p in problems for g in (p.dA, p.dB))
    norm = (squares + sum(float((g.double() ** 2).sum()) for g in others)) ** 0.5
    assert clip is not None
    torch.testing.assert_close(float(clip), 0.5 / (norm + 1e-6), rtol=1e-12, atol=0)
    assert Count.calls <= 14
