"""The stacked problems of a gradient step with their gradient: what the projection and its metric both start from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from torch import Tensor

from psilora.capture.record import Record
from psilora.capture.storage import Cross
from psilora.lowrank.gradient_operator import Chunks, CrossGradient, DenseGradient, Gradient, TangentGradient
from psilora.options import GradientOptions
from psilora.steps.batch import Batch
from psilora.steps.problem import Problem, Scales

# What makes the gradient of captured X and S, as `psilora.lowrank.gradient_operator.ActivationGradient` does.
FromActivations: TypeAlias = Callable[[Sequence[Chunks], Tensor], Gradient]


class GradientBatch(Batch):
    """L problems stacked with equal keys, and their gradient.

    Attributes:
        mu, fresh, ridge: μ, 1 − τ and λ = η·ρ, (L, 1, 1).
        external: Share and external scale of what was captured.
        gradient: G of the true weights, as thin products.
    """

    options: GradientOptions

    def __init__(self, problems: Sequence[Problem], scales: Scales, activation_gradient: FromActivations) -> None:
        super().__init__(problems, scales)
        self.options = GradientOptions.of(problems[0].options)
        self.mu = self.column([p.options.momentum for p in problems])
        self.fresh = self.column([1 - p.options.tau for p in problems])
        self.ridge = self.lr * self.column([p.options.rho for p in problems])
        self.external = scales.share * (1.0 if scales.external is None else scales.external.to(self.device, self.dtype))
        self.gradient = self._gradient(activation_gradient)

    def _gradient(self, activation_gradient: FromActivations) -> Gradient:
        if not self.problems[0].exact:
            return TangentGradient(self.B, self.A, self.left, self.right)
        records = [p.record for p in self.problems if p.record is not None]
        scale = self.clip * self.external / self.scaling
        if self.problems[0].holds == "dense":
            return DenseGradient([matrix for record in records for matrix in record.held.tensors()], scale.flatten())
        if self.problems[0].holds == "cross":
            return self._cross_gradient(records, scale)
        return activation_gradient([record.chunks for record in records], scale.flatten())

    def _cross_gradient(self, records: Sequence[Record], scale: Tensor) -> Gradient:
        held = [record.held for record in records if isinstance(record.held, Cross)]
        kept = [h.left for h in held if h.left is not None]
        return CrossGradient(
            scale * self.root * self.stack(kept) if len(kept) == len(held) else self.left,
            scale * self.root * self.stack([h.right for h in held if h.right is not None]),
            scale**2 * self.root * self.stack([h.cross for h in held if h.cross is not None]),
            B=self.B,
            rate=-self.lr * self.fresh,
            prox=self.ridge,
            decay=self.decay,
        )

    @property
    def reuse(self) -> bool:
        """See `Problem`."""
        return self.problems[0].reuse
