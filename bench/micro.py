"""Micro-benchmarks of the pieces of a reference step, with pytest-benchmark; each checks its result first.

    pytest bench/micro.py --benchmark-autosave          # and later --benchmark-compare

Not collected by `make test`. The suites of `python -m bench` time whole steps; these tell which piece has changed.
"""

from __future__ import annotations

import functools
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


class Truncation:
    """Sums T_l = B_l·A_l − c·S_lᵀX_l of L layers, 384 wide, both parts of one norm, to be cut back to rank 8.

    Attributes:
        T: (L, 384, 384), in float64.
        best: ‖T_l − its best rank-8 matrix‖ (L,), from the singular values.
    """

    def __init__(self, layers: int, width: int = 384, rank: int = 8, tokens: int = 256) -> None:
        torch.manual_seed(0)
        self.rank = rank
        self.B, self.A = torch.randn(layers, width, rank), torch.randn(layers, rank, width)
        self.X, self.S = torch.randn(layers, tokens, width), torch.randn(layers, tokens, width)
        product, gradient = self.B.double() @ self.A.double(), self.S.double().mT @ self.X.double()
        self.c = float(product.norm() / gradient.norm())
        self.T = product - self.c * gradient
        self.best = torch.linalg.svdvals(self.T)[:, rank:].norm(dim=1)
        self.dense = self.T.float()

    def lorsum(self, num_iters: int) -> tuple[Tensor, Tensor]:
        """From the factors and X and S, without T."""
        return lorsum(((self.B, self.A), (self.S.mT, self.X)), (1.0, -self.c), num_iters=num_iters)

    def svd(self) -> tuple[Tensor, Tensor]:
        """From T, which is at hand and costs it nothing here."""
        U, sigma, Vh = torch.linalg.svd(self.dense, full_matrices=False)
        return U[..., : self.rank] * sigma[..., None, : self.rank], Vh[..., : self.rank, :]

    def svd_lowrank(self) -> tuple[Tensor, Tensor]:
        """From T likewise, with two power iterations."""
        U, sigma, V = torch.svd_lowrank(self.dense, q=self.rank, niter=2)
        return U * sigma[..., None, :], V.mT

    def excess(self, left: Tensor, right: Tensor) -> float:
        """The largest ‖T_l − left·right‖ / ‖T_l − T_l,r‖ − 1 of any layer."""
        errors = (self.T - left.double() @ right.double()).norm(dim=(1, 2))
        return float((errors / self.best - 1).max())


truncation = functools.cache(Truncation)
METHODS: dict[str, Callable[[Truncation], tuple[Tensor, Tensor]]] = {
    "LoRSum, K=1": lambda sums: sums.lorsum(1),
    "LoRSum, K=2": lambda sums: sums.lorsum(2),
    "LoRSum, K=4": lambda sums: sums.lorsum(4),
    "torch.linalg.svd": Truncation.svd,
    "torch.svd_lowrank": Truncation.svd_lowrank,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layers", [1, LAYERS])
def test_truncation_of_a_sum(benchmark: Benchmark, layers: int, method: str) -> None:
    """The case that the library is for: what is left over beyond the optimum stands in the benchmark's extra info."""
    sums, cut = truncation(layers), METHODS[method]
    benchmark.group = f"{layers} sums of rank 8 and of 256 rows, 384 x 384, cut back to rank 8"
    left, right = cut(sums)
    excess = sums.excess(left, right)
    benchmark.extra_info["excess error"] = excess
    assert excess > -1e-5, "nothing beats the best matrix of its rank"
    # Better than the start, and the decomposition as good as it gets.
    assert excess <= {"torch.linalg.svd": 1e-5}.get(method, sums.excess(sums.B, sums.A))
    if method.startswith("LoRSum"):
        wide = lorsum(
            ((sums.B.double(), sums.A.double()), (sums.S.double().mT, sums.X.double())),
            (1.0, -sums.c),
            num_iters=int(method[-1]),
        )
        agree(left @ right, wide[0] @ wide[1])
    benchmark(cut, sums)
