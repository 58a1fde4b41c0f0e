"""A metric matrix held by its eigenvectors, so that M, M⁻¹ and M^½ cost thin products alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class EigenMetric:
    """M = V·diag(m)·Vᵀ + f·(I − V·Vᵀ) of L layers, symmetric positive definite.

    Attributes:
        vectors: V, (L, d, k), orthonormal columns; one that is zero has m = f.
        values: m, (L, k), positive.
        rest: f, (L, 1), positive; None where k = d leaves nothing for it.
    """

    vectors: Tensor
    values: Tensor
    rest: Tensor | None = None

    def apply(self, factor: Tensor) -> Tensor:
        """Return M·F for F (L, d, r)."""
        return self._scaled(self.values, self.rest, factor)

    def unapply(self, factor: Tensor) -> Tensor:
        """Return M⁻¹·F for F (L, d, r)."""
        return self._scaled(1 / self.values, None if self.rest is None else 1 / self.rest, factor)

    def root(self) -> EigenMetric:
        """Return M^½."""
        return EigenMetric(self.vectors, self.values.sqrt(), None if self.rest is None else self.rest.sqrt())

    def _scaled(self, values: Tensor, rest: Tensor | None, factor: Tensor) -> Tensor:
        within = self.vectors.mT @ factor
        if rest is None:
            return self.vectors @ (values[..., None] * within)
        return rest[..., None] * factor + self.vectors @ ((values - rest)[..., None] * within)


def eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues (L, d), ascending, and eigenvectors (L, d, d) of symmetric matrices (L, d, d).

    A matrix that is not finite has eigenvalues NaN. Computed in fp64: of fp32 statistics whose spectrum reaches down to
    the damping, an fp32 decomposition lost four to seven times as much in the preconditioned gradient. CUDA is waited
    for.
    """
    broken = ~torch.isfinite(matrices).flatten(1).all(1)
    values, vectors = torch.linalg.eigh(matrices.masked_fill(broken[:, None, None], 0.0).double())
    return values.masked_fill(broken[:, None], torch.nan).to(matrices.dtype), vectors.to(matrices.dtype)
