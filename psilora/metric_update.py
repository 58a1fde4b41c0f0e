"""The metric of a gradient step: its statistics, summed over the processes, and what the projection makes of them."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from psilora import low_rank_metric, metric
from psilora.gradient import TangentGradient
from psilora.gradient_batch import GradientBatch
from psilora.lorsum import Metric


@dataclass
class Updated:
    """The metric of L layers after its update; all None without one.

    Attributes:
        weights: (M_B, M_A).
        D_B, D_A: The new state "metric".
        rest_B, rest_A: The new state "metric_rest", (L, 1), of a low-rank metric.
    """

    weights: tuple[Metric, Metric] | None = None
    D_B: Tensor | None = None
    D_A: Tensor | None = None
    rest_B: Tensor | None = None
    rest_A: Tensor | None = None


def updated_metric(batch: GradientBatch) -> Generator[list[Tensor], list[Tensor], Updated]:
    """Update the running averages and raise them. Yields what has to be summed over the processes."""
    kind, form = batch.options.statistics, batch.options.form
    if kind is None:
        return Updated()
    numbers = _Numbers(batch)
    if form == "low-rank":
        return (yield from _low_rank(batch, kind, numbers))
    dense = form == "dense"
    new_A, new_B = yield from _dense_statistics(batch, kind) if dense else _statistics(batch, kind)
    old_B, old_A = batch.states("metric")
    beta = numbers.beta[:, :, None] if dense else numbers.beta
    D_B, D_A = metric.averaged(old_B, new_B, beta), metric.averaged(old_A, new_A, beta)
    raised = metric.raised_dense if dense else metric.raised
    M_B, M_A = (raised(D, numbers.correction, numbers.damping, numbers.power) for D in (D_B, D_A))
    return Updated((M_B, M_A), D_B, D_A)


class _Numbers:
    """β₂, δ, γ and 1 − β₂ᵗ (None without bias correction) of each layer, (L, 1)."""

    def __init__(self, batch: GradientBatch) -> None:
        options = [p.options for p in batch.problems]
        self.beta = batch.column([o.metric_beta for o in options])[:, 0]
        self.damping = batch.column([o.delta for o in options])[:, 0]
        self.power = batch.column([o.gamma for o in options])[:, 0]
        self.correction: Tensor | None = None
        if batch.options.metric_bias_correction:
            t = batch.stack([p.state_A["step"] for p in batch.problems])[:, None] + 1
            self.correction = 1 - self.beta**t


def _statistics(batch: GradientBatch, kind: str) -> Generator[list[Tensor], list[Tensor], tuple[Tensor, Tensor]]:
    """The new D_A (L, d_in) and D_B (L, d_out)."""
    rows = _rows(batch)[:, 0]
    if isinstance(batch.gradient, TangentGradient) and kind == "shampoo":
        squares_A, squares_B = batch.gradient.squares()
        (rows,) = yield [rows]
    else:
        squares = [metric.layer_squares(p, batch.dtype) for p in batch.problems]
        scale = _scale(batch)[:, 0]
        squares_A = torch.stack([a for a, _ in squares]) * (scale if kind == "shampoo" else 1)
        squares_B = torch.stack([b for _, b in squares]) * scale
        squares_A, squares_B, rows = yield [squares_A, squares_B, rows]
    return metric.normalised(kind, squares_A, squares_B, rows.clamp_min(1), batch.options.loss_reduction)


def _dense_statistics(batch: GradientBatch, kind: str) -> Generator[list[Tensor], list[Tensor], tuple[Tensor, Tensor]]:
    """The new D_A (L, d_in, d_in) and D_B (L, d_out, d_out), symmetric bit for bit."""
    rows = _rows(batch)
    if isinstance(batch.gradient, TangentGradient) and kind == "shampoo":
        products_A, products_B = batch.gradient.products()
        (rows,) = yield [rows]
    else:
        products = [metric.layer_products(p, batch.dtype) for p in batch.problems]
        scale = _scale(batch)
        products_A = torch.stack([a for a, _ in products]).mul_(scale if kind == "shampoo" else 1)
        products_B = torch.stack([b for _, b in products]).mul_(scale)
        products_A, products_B, rows = yield [products_A, products_B, rows]
    new_A, new_B = metric.normalised(kind, products_A, products_B, rows.clamp_min(1), batch.options.loss_reduction)
    return (new_A + new_A.mT) / 2, (new_B + new_B.mT) / 2


def _low_rank(batch: GradientBatch, kind: str, numbers: _Numbers) -> Generator[list[Tensor], list[Tensor], Updated]:
    """The low-rank metric, from products of X and S with a few directions of each layer."""
    (F_B, F_A), (rest_B, rest_A) = batch.states("metric"), batch.states("metric_rest")
    Q_B, Q_A = low_rank_metric.directions(F_B), low_rank_metric.directions(F_A)
    chunks = [p.record.chunks if p.record is not None else [] for p in batch.problems]
    sums_A = [low_rank_metric.second_moments(Q, [x for x, _ in calls]) for Q, calls in zip(Q_A, chunks, strict=True)]
    sums_B = [low_rank_metric.second_moments(Q, [s for _, s in calls]) for Q, calls in zip(Q_B, chunks, strict=True)]
    (moved_A, trace_A), (moved_B, trace_B) = (
        (torch.stack([product for product, _ in sums]), torch.stack([trace for _, trace in sums]))
        for sums in (sums_A, sums_B)
    )
    moved_A, trace_A, moved_B, trace_B, rows = yield [moved_A, trace_A, moved_B, trace_B, _rows(batch)]
    rows, scale, reduction = rows.clamp_min(1), _scale(batch), batch.options.loss_reduction
    moved_A, moved_B = metric.normalised(kind, moved_A, moved_B * scale, rows, reduction)
    trace_A, trace_B = metric.normalised(kind, trace_A, trace_B * scale, rows, reduction)
    beta = numbers.beta[:, :, None]
    F_B, rest_B = low_rank_metric.truncated(F_B, rest_B, Q_B, moved_B, trace_B, beta)
    F_A, rest_A = low_rank_metric.truncated(F_A, rest_A, Q_A, moved_A, trace_A, beta)
    raised = low_rank_metric.raised_low_rank
    M_B = raised(F_B, rest_B, numbers.correction, numbers.damping, numbers.power)
    M_A = raised(F_A, rest_A, numbers.correction, numbers.damping, numbers.power)
    return Updated((M_B, M_A), F_B, F_A, rest_B, rest_A)


def _rows(batch: GradientBatch) -> Tensor:
    """N of this process, (L, 1, 1)."""
    return batch.column([p.record.rows if p.record is not None else 1 for p in batch.problems])


def _scale(batch: GradientBatch) -> Tensor:
    """What squares of S_B are multiplied with to be those of S, (L, 1, 1)."""
    scale: Tensor = (batch.clip * batch.external / batch.scaling) ** 2
    return scale
