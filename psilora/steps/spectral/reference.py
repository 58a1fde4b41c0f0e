"""The spectral step on stacked layers: −η·c·msign of the tangent momentum instead of the gradient, from `.grad` alone.

The polar factor msign(M) = U Vᵀ of M = U Σ Vᵀ, as in Muon, of the momentum's projection on the tangent space at (B, A)
is itself a low-rank term, which LoRSum adds to the weight. Works on √s-scaled factors; needs no activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from psilora.lowrank.spectral import (
    Coefficients,
    Numbers,
    Roots,
    Seen,
    factor_step,
    followed,
    mean_diagonal,
    spectral_step,
    spread,
)
from psilora.options import SpectralOptions
from psilora.steps.batch import Batch
from psilora.steps.problem import Problem, Scales
from psilora.steps.update import Update
from psilora.triton_kernels.slots import COUNTING

#: The least relative ridge of a factor's Gram; below it float64 factorisations could fail.
LEAST_RIDGE = 1e-12
#: The rank at which a step has spectral norm η·√(d_max/d_min).
REFERENCE_RANK = 8


def spectral_updates(groups: Sequence[Sequence[Problem]], scales: Scales) -> list[Update]:
    """Return the updates of groups of problems with equal keys, without changing anything.

    Groups of equal rank and settings share their small algebra, whatever the shapes of their layers.
    """
    spans = [Span(group, scales) for group in groups]
    joint: dict[tuple[object, ...], list[int]] = {}
    for i, span in enumerate(spans):
        key = (span.numbers.key, span.size, span.batch.device, span.options.joint)
        joint.setdefault(key, []).append(i)
    found: dict[int, Coefficients] = {}
    for members in joint.values():
        step = spectral_step if spans[members[0]].options.joint else factor_step
        together = step(
            torch.cat([spans[i].gram_B for i in members]),
            torch.cat([spans[i].gram_A for i in members]),
            _joined([spans[i].numbers for i in members]),
        )
        sizes = [len(spans[i].batch.problems) for i in members]
        found.update(zip(members, _split(together, sizes), strict=True))
    return [span.update(found[i]) for i, span in enumerate(spans)]


class Span:
    """L layers of one shape: whitened columns Z_B (L, d_out, n) and rows Z_A (L, n, d_in), and the Grams of both."""

    def __init__(self, problems: Sequence[Problem], scales: Scales) -> None:
        self.batch = batch = Batch(problems, scales)
        self.options = SpectralOptions.of(batch.options)
        self.numbers = _numbers(batch)
        self.metric_B: Tensor | None = None
        self.metric_A: Tensor | None = None
        self.w_B: Tensor | None = None
        self.w_A: Tensor | None = None
        if batch.options.metric is not None:
            self._metric()
        B, A, columns, rows = batch.B, batch.A, batch.right, batch.left
        old = batch.momentum()
        if old is not None:
            columns, rows = torch.cat([old[0], columns], -1), torch.cat([old[1], rows], -2)
        if self.w_B is not None and self.w_A is not None:
            B, A, columns, rows = self.w_B * B, A * self.w_A, columns / self.w_B, rows / self.w_A
        self.Z_B, self.Z_A = torch.cat([B, columns], -1), torch.cat([A, rows], -2)
        wide_B, wide_A = self.Z_B.double(), self.Z_A.double()
        self.gram_B, self.gram_A = wide_B.mT @ wide_B, wide_A @ wide_A.mT

    @property
    def size(self) -> int:
        """Return n."""
        return self.Z_B.shape[-1]

    def _metric(self) -> None:
        """Update the running second moments of the orthonormalised LoRA gradients and set the weights.

        D_B ← average of the row means of (d_B·R_A)², D_A ← of the column means of (R_B·d_A)², R = (gram)^−½. The state
        is √D: the squares of gradients at 1e-30 would be lost in fp32. While B = 0, D_A waits and w_A = 1. An outlier
        enters as `followed` has it.
        """
        batch, ridge = self.batch, self.numbers.ridge
        wide_B, wide_A = batch.B.double(), batch.A.double()
        gram_B = wide_B.mT @ wide_B
        gram_A = wide_A @ wide_A.mT
        T_B, T_A = Roots(torch.cat([gram_B, gram_A]), torch.cat([ridge] * 2)).T.to(batch.dtype).chunk(2)
        beta = batch.column([p.options.metric_beta for p in batch.problems]).double()
        old_B, old_A = (old[:, :, None].double() for old in batch.states("metric"))
        new_B = (batch.right @ T_A).double().square().mean(-1, keepdim=True)
        new_A = (batch.left.mT @ T_B).double().square().mean(-1, keepdim=True)
        squares = batch.B.shape[-1] * (new_B.sum((1, 2)) + new_A.sum((1, 2)))
        self.numbers.seen = seen = followed(squares, self.numbers)
        if seen is not None:
            new_B, new_A = new_B * seen.taken.square(), new_A * seen.taken.square()
        D_B, D_A = (beta * old.square() + (1 - beta) * new for old, new in ((old_B, new_B), (old_A, new_A)))
        at_zero = mean_diagonal(gram_B) == 0
        D_A = torch.where(at_zero, old_A.square(), D_A)
        self.metric_B, self.metric_A = (D.sqrt().squeeze(-1).to(batch.dtype) for D in (D_B, D_A))
        (v_B, spread_B), (v_A, spread_A) = self._weights(D_B), self._weights(D_A)
        self.w_B = v_B.sqrt().to(batch.dtype)
        self.w_A = torch.where(at_zero, 1.0, v_A.sqrt()).mT.to(batch.dtype)
        self.numbers.raw_B, self.numbers.raw_A = gram_B, gram_A
        self.numbers.spread_B, self.numbers.spread_A = spread_B, torch.where(at_zero, 1.0, spread_A)

    def _weights(self, D: Tensor) -> tuple[Tensor, Tensor]:
        """Return v = w² = (D/mean(D) + δ)^γ (L, d, 1), and N_U (L, 1, 1), see `psilora.lowrank.spectral.spread`."""
        problems = self.batch.problems
        mean = D.mean(1, keepdim=True)
        share = D / torch.where(mean == 0, 1.0, mean)
        delta = self.batch.column([p.options.delta for p in problems]).double()
        v, least = share + delta, delta
        gamma = [p.options.gamma for p in problems]
        if gamma != [1.0] * len(gamma):  # the default needs no power, the slowest operation of all
            power = self.batch.column(gamma).double()
            v, least = v**power, delta**power
        p = (1 + COUNTING) * share / (share + COUNTING)
        counted, inverse = p.sum(1, keepdim=True), (p / v).sum(1, keepdim=True)
        return v, spread(counted, inverse, least, min(self.numbers.rank, D.shape[1]))

    def update(self, found: Coefficients) -> Update:
        """Return the update with these coefficients."""
        batch, rank = self.batch, self.numbers.rank
        columns = self.Z_B @ torch.cat([found.step_B, found.momentum_B], -1).to(batch.dtype)
        rows = torch.cat([found.step_A, found.momentum_A], -1).mT.to(batch.dtype) @ self.Z_A
        step_B, momentum_B = columns[..., :rank], columns[..., rank:]
        step_A, momentum_A = rows[:, :rank], rows[:, rank:]
        if self.w_B is not None and self.w_A is not None:
            step_B, momentum_B = step_B / self.w_B, momentum_B * self.w_B
            step_A, momentum_A = step_A / self.w_A, momentum_A * self.w_A
        remembers = batch.options.momentum > 0
        return Update(
            problems=list(batch.problems),
            step_B=step_B / batch.root,
            step_A=step_A / batch.root,
            momentum_B=momentum_B if remembers else None,
            momentum_A=momentum_A if remembers else None,
            metric_B=self.metric_B,
            metric_A=self.metric_A,
            repaired=found.repaired.sum(),
            norms=found.norms,
        )


def rate_factor(d_out: int, d_in: int, rank: int) -> float:
    """Return c = √(8/r)·√(max(d_out, d_in) / min(d_out, d_in)).

    msign has singular values 1, so a step's Frobenius norm would grow as √r; with c it does not depend on the rank.
    """
    return float((REFERENCE_RANK / rank * max(d_out, d_in) / min(d_out, d_in)) ** 0.5)


def factor_ridge(problem: Problem) -> float:
    """Return the relative ridge of the factors' Grams: ρ, unless the gradient's rounding asks for more.

    A 16-bit gradient is known to u = ε/2 of its size, and a root amplifies by up to 1/√λ: no noise may outgrow it.
    """
    low = [dtype for dtype in (problem.dA.dtype, problem.dB.dtype) if dtype.itemsize < 4]
    return max(LEAST_RIDGE, problem.options.rho, *((torch.finfo(dtype).eps / 2) ** 2 for dtype in low))


def _numbers(batch: Batch) -> Numbers:
    """The settings of a batch; the rate includes c."""
    problems, options = batch.problems, SpectralOptions.of(batch.options)
    (d_out, rank), d_in = batch.B.shape[1:], batch.A.shape[2]
    factor = batch.column([SpectralOptions.of(p.options).factor for p in problems]).double()
    return Numbers(
        rank=rank,
        mu=batch.column([p.options.momentum for p in problems]).double(),
        fresh=batch.column([1 - p.options.tau for p in problems]).double(),
        nesterov=options.nesterov and options.momentum > 0,
        rate=batch.lr.double() * rate_factor(d_out, d_in, rank) * factor,
        decay=None if batch.decay is None else batch.decay.double(),
        ridge=batch.column([factor_ridge(p) for p in problems]).double(),
        num_iters=options.num_iters,
        first=options.first,
        dtype=batch.dtype,
        fades=options.fade,
        cap=batch.column([SpectralOptions.of(p.options).largest for p in problems]).double(),
        norms=torch.stack([p.state_B["norms"] for p in problems]) if options.follows else None,
    )


#: The tensors of `Numbers`.
_JOINED = ("mu", "fresh", "rate", "decay", "ridge", "cap", "norms", "raw_B", "raw_A", "spread_B", "spread_A")


def _joined(numbers: Sequence[Numbers]) -> Numbers:
    """The settings of several batches, one after the other."""
    tensors = {name: [getattr(n, name) for n in numbers] for name in _JOINED}
    joined: dict[str, Any] = {name: torch.cat(values) for name, values in tensors.items() if values[0] is not None}
    seen = [n.seen for n in numbers if n.seen is not None]
    if seen:
        names = [field.name for field in fields(Seen)]
        joined["seen"] = Seen(*(torch.cat([getattr(part, name) for part in seen]) for name in names))
    return replace(numbers[0], **joined)


def _split(found: Coefficients, sizes: list[int]) -> list[Coefficients]:
    """The coefficients of each batch."""
    each = (found.step_B, found.step_A, found.momentum_B, found.momentum_A, found.repaired, found.norms)
    parts = [[None] * len(sizes) if t is None else t.split(sizes) for t in each]
    return [Coefficients(*part) for part in zip(*parts, strict=True)]
