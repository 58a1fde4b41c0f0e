"""The reference backend: one optimizer step on stacked layers in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from psilora.distributed.communicator import Communicator, Steps, lockstep
from psilora.linalg.spd import fastest_spd_solve
from psilora.lowrank.gradient_operator import ActivationGradient
from psilora.lowrank.lorsum import Projection, turns
from psilora.lowrank.momentum import BALANCED_ITERS, balance, conditioned, drifted
from psilora.lowrank.ritz import RitzProjection
from psilora.options import GradientOptions
from psilora.steps.gradient.batch import FromActivations, GradientBatch
from psilora.steps.gradient.metrics import updated_metric
from psilora.steps.problem import Problem, Scales
from psilora.steps.update import Update

# A part of an update that may ask for sums over the processes on its way to a result.
Summed = Generator[list[Tensor], list[Tensor], Tensor]


def reference_update(problems: Sequence[Problem], scales: Scales) -> Update:
    """Return the update of problems with equal keys in one process; see `reference_steps`."""
    return lockstep([reference_steps(problems, scales)])[0]


def gradient_updates(
    groups: Sequence[Sequence[Problem]], scales: Scales, communicator: Communicator | None
) -> list[Update]:
    """Return the updates of groups of problems with equal keys, side by side; see `reference_steps`."""
    return lockstep([reference_steps(group, scales) for group in groups], communicator)


def reference_steps(
    problems: Sequence[Problem],
    scales: Scales,
    activation_gradient: FromActivations = ActivationGradient,
) -> Steps[Update]:
    """Compute the update of problems with equal keys, without changing anything.

    On B̃ = √s·B and Ã = √s·A, with λ = η·ρ and the metric M updated first:

        (B̃, Ã)     ← LoRSum of (1 − η·wd)·(B̃, Ã) − η(1−τ)·(Sᵀ, X) − ημ·(B_m, A_m)   in the metric M
        (B_m, A_m) ← LoRSum of μ·(B_m, A_m) + (1−τ)·(Sᵀ, X)                           Frobenius, old momentum

    and, unless balance=False, for K ≤ 1 B_m/t, t·A_m where the two have drifted apart (see
    `psilora.lowrank.momentum.balance`); for every K other factors of the same B_m·A_m where A_m has become
    ill-conditioned (see `conditioned` there).

    Both projections take their turns in step, so that their products with X and S share one read; the first turn takes
    BᵀG = dA/√s or GÃᵀ = dB/√s from `.grad`. What comes from X and S, products and statistics, is yielded to be summed
    over the processes; `.grad` already is the joint one. `activation_gradient` makes the gradient of captured X and S.
    """
    batch = GradientBatch(problems, scales, activation_gradient)
    options = batch.options
    metric = yield from updated_metric(batch)
    weight = Projection(
        batch.B, batch.A, decay=batch.decay, prox=batch.ridge, metric=metric.weights, solve=fastest_spd_solve
    )
    old = batch.momentum()
    memory = None if old is None else Projection(*old, decay=batch.mu - 1, prox=batch.ridge, solve=fastest_spd_solve)
    both = _Turns(batch, weight, memory)
    if options.num_iters == 0:
        left = yield from both.weight_left()
        right = yield from both.weight_right()
        weight.simultaneous(left, right)
    if options.solver == "ritz":
        yield from both.ritz()
    else:
        for turn in turns(max(options.num_iters, 1), options.first):
            yield from both.take(turn, advance_weight=options.num_iters > 0)
    if weight.step_B is None or weight.step_A is None:
        raise RuntimeError("a LoRSum ended before both factors had a turn")
    momentum_B, momentum_A = (None, None) if memory is None else _remembered(memory, options)
    return Update(
        problems=list(problems),
        step_B=weight.step_B.div_(batch.root),
        step_A=weight.step_A.div_(batch.root),
        momentum_B=momentum_B,
        momentum_A=momentum_A,
        metric_B=metric.D_B,
        metric_A=metric.D_A,
        repaired=weight.repaired if memory is None else weight.repaired + memory.repaired,
        rest_B=metric.rest_B,
        rest_A=metric.rest_A,
    )


def _remembered(memory: Projection, options: GradientOptions) -> tuple[Tensor, Tensor]:
    """The new momentum, with its factors in balance where that is due and wanted."""
    B, A = memory.B, memory.A
    if not options.balance:
        return B, A
    if memory.gram_B is None or memory.gram_A is None:
        raise RuntimeError("a LoRSum ended before both factors had a turn")
    factor, due = drifted(memory.gram_A)
    if options.num_iters <= BALANCED_ITERS:
        size_B, size_A = (gram.diagonal(dim1=-2, dim2=-1).sum(-1) for gram in (memory.gram_B, memory.gram_A))
        B, A = balance(B, A, torch.where(due, size_A, size_B), size_A)
    return conditioned(B, A, factor, due)


@dataclass
class _Turns:
    """The products BᵏᵀG and GAᵏᵀ that the turns of the two projections ask for."""

    batch: GradientBatch
    weight: Projection
    memory: Projection | None

    def weight_left(self) -> Summed:
        """Σ_{i≥2} c_i BᵀT_i of the weight's projection at its current B."""
        if self.batch.reuse and self.weight.step_B is None:
            return self._weight_target("A", self.batch.left, self.weight.B)
        products = yield from self._ask("A", [self.weight.B])
        return self._weight_target("A", products[0], self.weight.B)

    def weight_right(self) -> Summed:
        """Σ_{i≥2} c_i T_iAᵀ of the weight's projection at its current A."""
        if self.batch.reuse and self.weight.step_A is None:
            return self._weight_target("B", self.batch.right, self.weight.A)
        products = yield from self._ask("B", [self.weight.A])
        return self._weight_target("B", products[0], self.weight.A)

    def take(self, turn: str, *, advance_weight: bool) -> Generator[list[Tensor], list[Tensor], None]:
        """Take one turn of the weight's projection (unless it is done) and one of the momentum's."""
        batch, weight, memory = self.batch, self.weight, self.memory
        at_start = (weight.step_B if turn == "A" else weight.step_A) is None
        known = (batch.left if turn == "A" else batch.right) if batch.reuse and at_start else None
        asking = [_fixed(weight, turn)] if advance_weight and known is None else []
        if memory is not None:
            asking.append(_fixed(memory, turn))
        answers = yield from self._ask(turn, asking)
        if advance_weight:
            product = answers.pop(0) if known is None else known
            target = self._weight_target(turn, product, _fixed(weight, turn))
            (weight.turn_A if turn == "A" else weight.turn_B)(target)
        if memory is not None:
            (memory.turn_A if turn == "A" else memory.turn_B)(batch.fresh * answers.pop())

    def ritz(self) -> Generator[list[Tensor], list[Tensor], None]:
        """Take all turns, the weight's by Rayleigh–Ritz, and set the weight's steps."""
        batch, weight, memory, options = self.batch, self.weight, self.memory, self.batch.options
        kept = None if batch.decay is None else 1 + batch.decay
        metric = None if weight.metric_B is None or weight.metric_A is None else (weight.metric_B, weight.metric_A)
        found = RitzProjection(
            batch.B, batch.A, num_iters=options.num_iters, first=options.first, kept=kept, metric=metric
        )
        for turn in turns(options.num_iters, options.first):
            factor = found.factor
            asking = [] if factor is None else [factor]
            if memory is not None:
                asking.append(_fixed(memory, turn))
            answers = yield from self._ask(turn, asking)
            if factor is not None:
                target = self._weight_target(turn, answers.pop(0), factor)
                (found.turn_A if turn == "A" else found.turn_B)(target)
            if memory is not None:
                (memory.turn_A if turn == "A" else memory.turn_B)(batch.fresh * answers.pop())
        still = self._still()
        weight.step_B = (found.B - batch.B).masked_fill(still, 0.0)
        weight.step_A = (found.A - batch.A).masked_fill(still, 0.0)

    def _still(self) -> Tensor:
        """Where nothing but (B, A) is in the sum, (L, 1, 1)."""
        batch, memory = self.batch, self.memory
        nothing = (batch.left == 0).flatten(1).all(1) & (batch.right == 0).flatten(1).all(1)
        if memory is not None:
            nothing = nothing & ((memory.base_B == 0).flatten(1).all(1) | (memory.base_A == 0).flatten(1).all(1))
        nothing = nothing[:, None, None]
        if batch.decay is not None:
            nothing = nothing & (batch.decay == 0)
        return nothing | (batch.lr == 0)

    def _ask(self, turn: str, factors: list[Tensor]) -> Generator[list[Tensor], list[Tensor], list[Tensor]]:
        """One read of X and S, and one sum over the processes, for all the factors: their columns are concatenated."""
        if not factors:
            return []
        axis = -1 if turn == "A" else -2
        ask: Callable[[Tensor], Tensor] = self.batch.gradient.left if turn == "A" else self.batch.gradient.right
        product = ask(torch.cat(factors, axis) if len(factors) > 1 else factors[0])
        if self.batch.problems[0].exact:
            (product,) = yield [product]
        sizes = [factor.shape[axis] for factor in factors]
        return list(product.split(sizes, -2 if turn == "A" else -1))

    def _weight_target(self, turn: str, product: Tensor, factor: Tensor) -> Tensor:
        """−η(1−τ)·product − ημ·(momentum's product with the same factor)."""
        batch = self.batch
        target = -batch.lr * batch.fresh * product
        if self.memory is not None:
            B_m, A_m = self.memory.base_B, self.memory.base_A
            scale = -batch.lr * batch.mu
            if turn == "A":
                target.baddbmm_(scale * (factor.mT @ B_m), A_m)
            else:
                target.baddbmm_(B_m, scale * (A_m @ factor.mT))
        return target


def _fixed(projection: Projection, turn: str) -> Tensor:
    """The factor that a turn multiplies the terms with."""
    return projection.B if turn == "A" else projection.A
