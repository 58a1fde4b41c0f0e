"""What every form of metric answers, and what an update of one starts from and returns."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from psilora.lowrank.lorsum import Metric
from psilora.steps.gradient.batch import GradientBatch


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


class Numbers:
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


class Form(Protocol):
    """How much of a metric's two matrices is kept: the form of a row of `psilora.options.METRIC_ROWS`."""

    def shape(self, size: int, rank: int) -> tuple[int, ...]:
        """Return the shape of the state "metric" of a side `size` wide; `rank` is metric_rank, or r."""
        ...

    def initial(
        self, size: int, rank: int, start: float, *, dtype: torch.dtype, device: torch.device
    ) -> dict[str, Tensor]:
        """Return the state of a running average that starts at `start` times the identity."""
        ...

    def update(
        self, batch: GradientBatch, statistics: str, numbers: Numbers
    ) -> Generator[list[Tensor], list[Tensor], Updated]:
        """Update the running averages and raise them; yield what has to be summed over the processes."""
        ...
