"""Dense metrics: running averages of whole matrices, raised to a power by their eigenvectors."""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from psilora.linalg.eigen import EigenMetric, eigh
from psilora.lowrank.gradient_operator import TangentGradient
from psilora.steps.gradient.batch import GradientBatch
from psilora.steps.gradient.metrics.base import Numbers, Updated
from psilora.steps.gradient.metrics.diagonal import averaged, raised
from psilora.steps.gradient.metrics.statistics import gathered, layer_products


def raised_dense(average: Tensor, correction: Tensor | None, damping: Tensor, power: Tensor) -> EigenMetric:
    """Return M = (D/(1 − β₂ᵗ) + δI)^γ of symmetric D (L, d, d), by its eigenvectors; the numbers are (L, 1).

    Eigenvalues that rounding made negative count as 0, so M ≥ δ^γ·I. A D that is not finite makes an M of NaN.
    """
    values, vectors = eigh(average)
    return EigenMetric(vectors, raised(values.clamp_min(0), correction, damping, power))


class Dense:
    """D_A (d_in, d_in) and D_B (d_out, d_out), symmetric bit for bit; see `Form` in base.py."""

    def shape(self, size: int, rank: int) -> tuple[int, ...]:
        """See `Form`."""
        return (size, size)

    def initial(
        self, size: int, rank: int, start: float, *, dtype: torch.dtype, device: torch.device
    ) -> dict[str, Tensor]:
        """See `Form`."""
        return {"metric": torch.diag(torch.full((size,), start, dtype=dtype, device=device))}

    def update(
        self, batch: GradientBatch, statistics: str, numbers: Numbers
    ) -> Generator[list[Tensor], list[Tensor], Updated]:
        """See `Form`."""
        new_A, new_B = yield from gathered(batch, statistics, layer_products, TangentGradient.products)
        new_A, new_B = (new_A + new_A.mT) / 2, (new_B + new_B.mT) / 2
        old_B, old_A = batch.states("metric")
        beta = numbers.beta[:, :, None]
        D_B, D_A = averaged(old_B, new_B, beta), averaged(old_A, new_A, beta)
        M_B, M_A = (raised_dense(D, numbers.correction, numbers.damping, numbers.power) for D in (D_B, D_A))
        return Updated((M_B, M_A), D_B, D_A)
