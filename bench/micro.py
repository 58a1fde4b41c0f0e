"""Micro-benchmarks of the pieces of a reference step, with pytest-benchmark; each checks its result first.

    pytest bench/micro.py --benchmark-autosave          # and later --benchmark-compare

Not collected by `make test`. The suites of `python -m bench` time whole steps; these tell which piece has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from psilora import lorsum
from psilora.linalg import native, spd
from psilora.lowrank.gradient_operator import ActivationGradient, TangentGradient
from psilora.steps.update import all_finite

Benchmark = Callable[..., Any]
LAYERS, WIDTH, TOKENS = 24, 768, 1024
SOLVES = {"pytorch": spd.spd_solve, "native": native.spd_solve}


def agree(got: Tensor, want: Tensor, tolerance: float = 1e-4) -> None:
    assert float((got.double() - want.double()).norm() / want.double().norm()) < tolerance


@pytest.mark.parametrize("code", SOLVES)
@pytest.mark.parametrize("rank", [8, 32, 128])
def test_solve(benchmark: Benchmark, rank: int, code: str) -> None:
    if code == "native" and not native.available():
        pytest.skip(f"needs the extension: {native.unavailable_reason()}")
    factor = torch.randn(LAYERS, rank, 4 * rank)
    gram, rhs = factor @ factor.mT / (4 * rank), torch.randn(LAYERS, rank, WIDTH)
    agree(SOLVES[code](gram, rhs)[0], torch.linalg.solve(gram.double(), rhs.double()))
    benchmark(SOLVES[code], gram, rhs)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shared", [True, False], ids=["one X for two layers", "one X each"])
@pytest.mark.parametrize("rank", [8, 16])
def test_product_with_the_exact_gradient(benchmark: Benchmark, rank: int, shared: bool, side: str) -> None:
    X = [torch.randn(TOKENS, WIDTH) for _ in range(4)]
    S = [torch.randn(TOKENS, WIDTH) for _ in range(4)]
    if shared:
        X = [X[0], X[0], X[2], X[2]]
    gradient = ActivationGradient([[pair] for pair in zip(X, S, strict=True)], torch.ones(4))
    factor = torch.randn(4, WIDTH, rank) if side == "left" else torch.randn(4, rank, WIDTH)
    G = [s.double().mT @ x.double() for x, s in zip(X, S, strict=True)]
    want = [f.double().mT @ g if side == "left" else g @ f.double().mT for f, g in zip(factor, G, strict=True)]
    agree(getattr(gradient, side)(factor), torch.stack(want))
    benchmark(getattr(gradient, side), factor)


def test_tangent_gradient(benchmark: Benchmark) -> None:
    B, A = torch.randn(LAYERS, WIDTH, 8), torch.randn(LAYERS, 8, WIDTH)
    left, right = torch.randn(LAYERS, 8, WIDTH), torch.randn(LAYERS, WIDTH, 8)
    # Two projections of one G agree where both see it: BᵀG·Aᵀ.
    right = right - B @ torch.linalg.solve(B.mT @ B, B.mT @ right - left @ A.mT)
    agree(TangentGradient(B, A, left, right).left(B), left, 1e-3)
    benchmark(lambda: TangentGradient(B, A, left, right).right(A))


def test_all_finite(benchmark: Benchmark) -> None:
    tensors: Sequence[Tensor] = [torch.randn(WIDTH, 8) for _ in range(2 * LAYERS)]
    assert not bool(all_finite([*tensors, torch.tensor([float("inf")])], torch.device("cpu")))
    benchmark(all_finite, tensors, torch.device("cpu"))


@pytest.mark.parametrize("num_iters", [1, 2, 4])
def test_lorsum(benchmark: Benchmark, num_iters: int) -> None:
    terms = [
        (torch.randn(WIDTH, 8), torch.randn(8, WIDTH)),
        (torch.randn(TOKENS, WIDTH).mT, torch.randn(TOKENS, WIDTH)),
    ]
    B, A = lorsum(terms, (1.0, -1e-2), num_iters=num_iters)
    wide = [(left.double(), right.double()) for left, right in terms]
    exact_B, exact_A = lorsum(wide, (1.0, -1e-2), num_iters=num_iters)
    agree(B @ A, exact_B @ exact_A)
    benchmark(lorsum, terms, (1.0, -1e-2), num_iters=num_iters)
