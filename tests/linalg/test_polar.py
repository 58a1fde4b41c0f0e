"""The polar factor: its accuracy in fp32 over condition numbers, what it does below them, and its coefficients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from psilora.linalg.polar import SMALLEST, STEPS, newton_schulz_coefficients, polar

F64 = torch.float64


def with_singular_values(values: Tensor, count: int = 3) -> tuple[Tensor, Tensor]:
    """Square matrices with these singular values, and their polar factors."""
    n = len(values)
    U, V = (torch.linalg.qr(torch.randn(count, n, n, dtype=F64))[0] for _ in range(2))
    return (U * values) @ V.mT, U @ V.mT


def spectrum(n: int, condition: float) -> Tensor:
    return torch.logspace(0, -math.log10(condition), n, dtype=F64)


@pytest.mark.parametrize("n", [1, 2, 16, 65, 256])
@pytest.mark.parametrize("condition", [1.0, 10.0, 300.0])
def test_fp32_is_orthogonal_and_right_up_to_condition_300(n: int, condition: float) -> None:
    X, exact = with_singular_values(spectrum(n, condition))
    got = polar(X.float()).double()
    assert (torch.linalg.svdvals(got) - 1).abs().max() < 1e-6
    # the factor itself is only as well determined as X: an error of u‖X‖ turns it by up to u·condition
    assert (got - exact).norm(dim=(1, 2)).max() <= 5e-6 * math.sqrt(n) * (1 + condition**0.5)


def test_fp64_converges_from_the_stated_smallest_value() -> None:
    values = torch.tensor([1.0] + [SMALLEST * 1.01] * 3, dtype=F64)  # the bound exceeds the largest by 1e-12
    X, exact = with_singular_values(values)
    assert (polar(X) - exact).abs().max() < 1e-9
    assert (polar(X, steps=STEPS - 3) - exact).abs().max() > 1e-2  # fewer steps do not reach it


def test_small_singular_values_stay_small_in_proportion() -> None:
    """A direction that only rounding put there must not become a full step."""
    X, exact = with_singular_values(torch.tensor([1.0, 0.5, 1e-5, 1e-7], dtype=F64))
    sigma = torch.linalg.svdvals(polar(X.float()).double())
    assert (sigma[:, :2] - 1).abs().max() < 1e-6
    assert (sigma[:, 2] < 4.2e-2).all() and (sigma[:, 3] < 1e-3).all()
    assert (polar(X, smallest=1e-7, steps=22) - exact).abs().max() < 1e-6


@pytest.mark.parametrize("shape", [(5, 5), (4, 9), (9, 4)])
@pytest.mark.parametrize("size", [1e-38, 1e-30, 1.0, 1e30])
def test_any_magnitude_and_shape(shape: tuple[int, int], size: float) -> None:
    X = torch.randn(2, *shape)
    U, _, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    torch.testing.assert_close(polar(X * size).double(), U @ Vh, rtol=0, atol=2e-5)


def test_zero_and_rank_deficient_matrices() -> None:
    X = torch.zeros(3, 6, 6)
    X[1, 2:, 3:] = torch.randn(4, 3)
    X[2] = torch.randn(6, 1) @ torch.randn(1, 6)
    got = polar(X)
    assert torch.equal(got[0], X[0])
    U, _, Vh = torch.linalg.svd(X[1:].double())
    torch.testing.assert_close(got[1].double(), U[0, :, :3] @ Vh[0, :3], rtol=0, atol=1e-5)
    torch.testing.assert_close(got[2].double(), U[1, :, :1] @ Vh[1, :1], rtol=0, atol=1e-3)


def test_the_result_of_a_matrix_does_not_depend_on_its_neighbours() -> None:
    X = torch.randn(3, 8, 8)
    X[1] = 0
    X[2] *= 1e30
    assert torch.equal(polar(X)[:1], polar(torch.stack([X[0]] * 3))[:1])


def test_the_coefficients_are_the_best_cubics() -> None:
    """Each step's cubic deviates from 1 equally at both ends and inside, and no scaling of it does better."""
    low, high = 0.01, 1.0
    for a, b in newton_schulz_coefficients(0.01, 6):
        x = torch.linspace(low, high, 20_001, dtype=F64)
        p = a * x - b * x**3
        deviation = (p - 1).abs().max()
        ends_and_peak = torch.stack([1 - p[0], 1 - p[-1], p.max() - 1])
        torch.testing.assert_close(ends_and_peak, deviation.expand(3), rtol=1e-5, atol=1e-9)
        if deviation < 1e-6:
            break
        for da, db in ((1.01, 1), (0.99, 1), (1, 1.01), (1, 0.99), (1.01, 1.01), (0.99, 0.99)):
            assert (a * da * x - b * db * x**3 - 1).abs().max() > deviation
        low, high = float(p.min()), float(p.max())
