"""The metrics of a gradient step: statistics, running averages, and what they are raised to."""

from __future__ import annotations

from collections.abc import Generator

from torch import Tensor

from psilora.steps.gradient.batch import GradientBatch
from psilora.steps.gradient.metrics.base import Form, Numbers, Updated
from psilora.steps.gradient.metrics.dense import Dense
from psilora.steps.gradient.metrics.diagonal import Diagonal
from psilora.steps.gradient.metrics.low_rank import LowRank

#: The forms that `psilora.options.METRIC_ROWS` names.
FORMS: dict[str, Form] = {"diagonal": Diagonal(), "dense": Dense(), "low-rank": LowRank()}


def updated_metric(batch: GradientBatch) -> Generator[list[Tensor], list[Tensor], Updated]:
    """Update the running averages and raise them. Yields what has to be summed over the processes."""
    row = batch.options.metric_row
    if row is None:
        return Updated()
    return (yield from FORMS[row.form].update(batch, row.statistics, Numbers(batch)))
