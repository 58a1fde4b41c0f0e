"""The metric of a gradient step: its statistics, summed over the processes, and what the projection makes of them."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeAlias

import torch
from torch import Tensor

from psilora import metric
from psilora.gradient import TangentGradient
from psilora.gradient_batch import GradientBatch
from psilora.lorsum import Metric

#: ((M_B, M_A), new D_B, new D_A).
Updated: TypeAlias = tuple[tuple[Metric, Metric] | None, Tensor | None, Tensor | None]


def updated_metric(batch: GradientBatch) -> Generator[list[Tensor], list[Tensor], Updated]:
    """Update the running averages; return ((M_B, M_A), new D_B, new D_A), or Nones without a metric.

    Yields what has to be summed over the processes.
    """
    kind, dense = batch.options.statistics, batch.options.form == "dense"
    if kind is None:
        return None, None, None
    new_A, new_B = yield from _dense_statistics(batch, kind) if dense else _statistics(batch, kind)
    options = [p.options for p in batch.problems]
    beta = batch.column([o.metric_beta for o in options])[:, 0]
    old_B, old_A = batch.states("metric")
    D_B, D_A = (
        metric.averaged(old, new, beta[:, :, None] if dense else beta) for old, new in ((old_B, new_B), (old_A, new_A))
    )
    correction = None
    if batch.options.metric_bias_correction:
        t = batch.stack([p.state_A["step"] for p in batch.problems])[:, None] + 1
        correction = 1 - beta**t
    damping = batch.column([o.delta for o in options])[:, 0]
    power = batch.column([o.gamma for o in options])[:, 0]
    raised = metric.raised_dense if dense else metric.raised
    return (raised(D_B, correction, damping, power), raised(D_A, correction, damping, power)), D_B, D_A


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


def _rows(batch: GradientBatch) -> Tensor:
    """N of this process, (L, 1, 1)."""
    return batch.column([p.record.rows if p.record is not None else 1 for p in batch.problems])


def _scale(batch: GradientBatch) -> Tensor:
    """What squares of S_B are multiplied with to be those of S, (L, 1, 1)."""
    scale: Tensor = (batch.clip * batch.external / batch.scaling) ** 2
    return scale
