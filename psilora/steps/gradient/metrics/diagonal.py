"""Diagonal metrics: running averages, damped and raised to a power."""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from psilora.lowrank.gradient_operator import TangentGradient
from psilora.steps.gradient.batch import GradientBatch
from psilora.steps.gradient.metrics import statistics
from psilora.steps.gradient.metrics.statistics import row_counts, square_scale


def metric_shape(size: int, form: str | None, rank: int) -> tuple[int, ...]:
    """Return the shape of the state "metric": D (d,), dense (d, d), or of a low-rank D = F·Fᵀ + μI F (d, k)."""
    if form == "diagonal":
        return (size,)
    return (size, size if form == "dense" else min(rank, size))


def initial_metric(
    size: int, bias_correction: bool, *, dtype: torch.dtype, device: torch.device, form: str | None, rank: int
) -> dict[str, Tensor]:
    """Return the state of a running average that starts at 0 with bias correction, else at 1 (I), as published.

    "metric", of `metric_shape`, and for a low-rank one "metric_rest", μ (1,).
    """
    start, shape = 0.0 if bias_correction else 1.0, metric_shape(size, form, rank)
    if form == "low-rank":
        rest = torch.full((1,), start, dtype=dtype, device=device)
        return {"metric": torch.zeros(shape, dtype=dtype, device=device), "metric_rest": rest}
    D = torch.full((size,), start, dtype=dtype, device=device)
    return {"metric": torch.diag(D) if form == "dense" else D}


def averaged(old: Tensor, new: Tensor, beta: Tensor) -> Tensor:
    """Return β₂·D + (1 − β₂)·new."""
    return old + (1 - beta) * (new - old)


def raised(average: Tensor, correction: Tensor | None, damping: Tensor, power: Tensor) -> Tensor:
    """Return M = (D/(1 − β₂ᵗ) + δ)^γ; `correction` = 1 − β₂ᵗ, or None without bias correction."""
    return ((average if correction is None else average / correction) + damping) ** power


def diagonal_statistics(
    batch: GradientBatch, kind: str
) -> Generator[list[Tensor], list[Tensor], tuple[Tensor, Tensor]]:
    """The new D_A (L, d_in) and D_B (L, d_out)."""
    rows = row_counts(batch)[:, 0]
    if isinstance(batch.gradient, TangentGradient) and kind == "shampoo":
        squares_A, squares_B = batch.gradient.squares()
        (rows,) = yield [rows]
    else:
        squares = [statistics.layer_squares(p, batch.dtype) for p in batch.problems]
        scale = square_scale(batch)[:, 0]
        squares_A = torch.stack([a for a, _ in squares]) * (scale if kind == "shampoo" else 1)
        squares_B = torch.stack([b for _, b in squares]) * scale
        squares_A, squares_B, rows = yield [squares_A, squares_B, rows]
    return statistics.normalised(kind, squares_A, squares_B, rows.clamp_min(1), batch.options.loss_reduction)
