"""Dense metrics: whole matrices, raised to a power by their eigenvectors."""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from psilora.linalg.eigen import EigenMetric, eigh
from psilora.lowrank.gradient_operator import TangentGradient
from psilora.steps.gradient.batch import GradientBatch
from psilora.steps.gradient.metrics import statistics
from psilora.steps.gradient.metrics.diagonal import raised
from psilora.steps.gradient.metrics.statistics import row_counts, square_scale


def raised_dense(average: Tensor, correction: Tensor | None, damping: Tensor, power: Tensor) -> EigenMetric:
    """Return M = (D/(1 − β₂ᵗ) + δI)^γ of symmetric D (L, d, d), by its eigenvectors; the numbers are (L, 1).

    Eigenvalues that rounding made negative count as 0, so M ≥ δ^γ·I. A D that is not finite makes an M of NaN.
    """
    values, vectors = eigh(average)
    return EigenMetric(vectors, raised(values.clamp_min(0), correction, damping, power))


def dense_statistics(batch: GradientBatch, kind: str) -> Generator[list[Tensor], list[Tensor], tuple[Tensor, Tensor]]:
    """The new D_A (L, d_in, d_in) and D_B (L, d_out, d_out), symmetric bit for bit."""
    rows = row_counts(batch)
    if isinstance(batch.gradient, TangentGradient) and kind == "shampoo":
        products_A, products_B = batch.gradient.products()
        (rows,) = yield [rows]
    else:
        products = [statistics.layer_products(p, batch.dtype) for p in batch.problems]
        scale = square_scale(batch)
        products_A = torch.stack([a for a, _ in products]).mul_(scale if kind == "shampoo" else 1)
        products_B = torch.stack([b for _, b in products]).mul_(scale)
        products_A, products_B, rows = yield [products_A, products_B, rows]
    new_A, new_B = statistics.normalised(kind, products_A, products_B, rows.clamp_min(1), batch.options.loss_reduction)
    return (new_A + new_A.mT) / 2, (new_B + new_B.mT) / 2
