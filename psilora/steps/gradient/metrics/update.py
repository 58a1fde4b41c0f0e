"""The metric of a gradient step: its statistics, summed over the processes, and what the projection makes of them."""

from __future__ import annotations

from collections.abc import Generator

from torch import Tensor

from psilora.steps.gradient.batch import GradientBatch
from psilora.steps.gradient.metrics import diagonal
from psilora.steps.gradient.metrics.base import Numbers, Updated
from psilora.steps.gradient.metrics.dense import dense_statistics, raised_dense
from psilora.steps.gradient.metrics.diagonal import averaged, diagonal_statistics
from psilora.steps.gradient.metrics.low_rank import low_rank_update


def updated_metric(batch: GradientBatch) -> Generator[list[Tensor], list[Tensor], Updated]:
    """Update the running averages and raise them. Yields what has to be summed over the processes."""
    kind, form = batch.options.statistics, batch.options.form
    if kind is None:
        return Updated()
    numbers = Numbers(batch)
    if form == "low-rank":
        return (yield from low_rank_update(batch, kind, numbers))
    dense = form == "dense"
    new_A, new_B = yield from dense_statistics(batch, kind) if dense else diagonal_statistics(batch, kind)
    old_B, old_A = batch.states("metric")
    beta = numbers.beta[:, :, None] if dense else numbers.beta
    D_B, D_A = averaged(old_B, new_B, beta), averaged(old_A, new_A, beta)
    raised = raised_dense if dense else diagonal.raised
    M_B, M_A = (raised(D, numbers.correction, numbers.damping, numbers.power) for D in (D_B, D_A))
    return Updated((M_B, M_A), D_B, D_A)
