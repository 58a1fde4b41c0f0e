"""PSI-LoRA as research code writes it: one adapter at a time, values instead of increments, G's factors as they come.

It is the yardstick of the `step` suite and, in float64, the check of every PSILoRA step there: the two share no code
but the momentum's first A_m.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.workload import Pair
from psilora.lowrank.momentum import initial_momentum

Term = tuple[float, Tensor, Tensor]  # c, B_i, A_i


class PerLayerLoop:
    """The papers' step (s = 1) with X and S at hand; arguments as for `psilora.PSILoRA`.

    Args:
        pairs: (A, B) per adapter, with `.grad`.
        activations: (X, S) per adapter.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        activations: Sequence[tuple[Tensor, Tensor]],
        lr: float,
        *,
        num_iters: int = 1,
        momentum: float = 0.9,
        prox: float = 1e-2,
        metric: str | None = None,
        gradient: str = "exact",
        metric_beta: float = 0.99,
        metric_power: float = 0.5,
        damping: float = 1e-5,
    ) -> None:
        self.pairs, self.activations = list(pairs), list(activations)
        self.lr, self.num_iters, self.momentum, self.prox = lr, num_iters, momentum, prox
        self.metric, self.gradient = metric, gradient
        self.beta, self.power, self.damping = metric_beta, metric_power, damping
        self.fresh = 1.0 if metric is None else 1 - momentum
        self.steps = 0
        self.momenta = [initial_momentum(B, A, A.shape[0], A.dtype) for A, B in self.pairs] if momentum else None
        self.averages = [(torch.zeros_like(B[:, 0]), torch.zeros_like(A[0])) for A, B in self.pairs]

    @torch.no_grad()
    def step(self) -> None:
        """Update every adapter in place, one after the other."""
        self.steps += 1
        for i, ((A, B), (x, s)) in enumerate(zip(self.pairs, self.activations, strict=True)):
            X, S = x.to(A.dtype), s.to(A.dtype)  # a layer at a time: all of them in fp32 would not fit a device
            gradient = (S.mT, X) if self.gradient == "exact" else tangent(A, B)
            metric = self._metric(i, X, S) if self.metric else None
            terms: list[Term] = [(-self.lr * self.fresh, *gradient)]
            if self.momenta is not None:
                terms.append((-self.lr * self.momentum, *self.momenta[i]))
            lam = self.lr * self.prox
            new_B, new_A = lorsum_loop(B, A, 1.0, terms, self.num_iters, lam, metric)
            if self.momenta is not None:
                fresh: list[Term] = [(self.fresh, *gradient)]
                self.momenta[i] = lorsum_loop(*self.momenta[i], self.momentum, fresh, self.num_iters, lam, None)
            A.copy_(new_A)
            B.copy_(new_B)

    def _metric(self, i: int, X: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
        """Update the running averages of one adapter (diagonal K-FAC); return (M_B, M_A)."""
        rows = X.shape[0]
        D_B, D_A = self.averages[i]
        D_B = self.beta * D_B + (1 - self.beta) * rows * S.square().sum(0)
        D_A = self.beta * D_A + (1 - self.beta) * X.square().sum(0) / rows
        self.averages[i] = (D_B, D_A)
        correction = 1 - self.beta**self.steps
        return (D_B / correction + self.damping) ** self.power, (D_A / correction + self.damping) ** self.power

    def state_bytes(self) -> int:
        """Bytes of momentum and averages."""
        kept = [t for pair in self.momenta or () for t in pair]
        kept += [t for pair in self.averages for t in pair] if self.metric else []
        return sum(t.nbytes for t in kept)


def lorsum_loop(
    B1: Tensor, A1: Tensor, c1: float, terms: Sequence[Term], num_iters: int, lam: float,
    metric: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (B, A) of c₁·B₁A₁ + Σ c_i B_iA_i by alternating least squares, A first, from its normal equations."""
    eye = lam * torch.eye(A1.shape[0], dtype=A1.dtype, device=A1.device)
    B, A = B1, A1
    for _ in range(num_iters):
        MB = B if metric is None else metric[0][:, None] * B
        target = sum(c * ((B.mT @ left) @ right) for c, left, right in terms)
        if metric is not None:
            target = target / metric[1]
        A = torch.linalg.solve(MB.mT @ B + eye, lam * A1 + c1 * ((MB.mT @ B1) @ A1) + target)
        MA = A if metric is None else A * metric[1]
        target = sum(c * (left @ (right @ A.mT)) for c, left, right in terms)
        if metric is not None:
            target = target / metric[0][:, None]
        rhs = lam * B1 + c1 * (B1 @ (A1 @ MA.mT)) + target
        B = torch.linalg.solve(MA @ A.mT + eye, rhs.mT).mT
    return B, A


def tangent(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tangent projection of G as one term of rank 2r, from dA = BᵀG and dB = GAᵀ (s = 1)."""
    if A.grad is None or B.grad is None:
        raise ValueError("the tangent gradient needs `.grad` of both factors")
    Z = torch.linalg.pinv(B.mT @ B) @ A.grad
    R = torch.linalg.pinv(A @ A.mT) @ A
    return torch.cat([B, B.grad - B @ (Z @ A.mT)], 1), torch.cat([Z, R], 0)
