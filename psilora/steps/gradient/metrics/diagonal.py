"""Diagonal metrics: running averages of squares, damped and raised to a power."""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from psilora.lowrank.gradient_operator import TangentGradient
from psilora.steps.gradient.batch import GradientBatch
from psilora.steps.gradient.metrics.base import Numbers, Updated
from psilora.steps.gradient.metrics.statistics import gathered, layer_squares


def averaged(old: Tensor, new: Tensor, beta: Tensor) -> Tensor:
    """Return β₂·D + (1 − β₂)·new."""
    return old + (1 - beta) * (new - old)


def raised(average: Tensor, correction: Tensor | None, damping: Tensor, power: Tensor) -> Tensor:
    """Return M = (D/(1 − β₂ᵗ) + δ)^γ; `correction` = 1 − β₂ᵗ, or None without bias correction."""
    return ((average if correction is None else average / correction) + damping) ** power


class Diagonal:
    """D_A (d_in,) and D_B (d_out,); see `Form` in base.py."""

    def shape(self, size: int, rank: int) -> tuple[int, ...]:
        """See `Form`."""
        return (size,)

    def initial(
        self, size: int, rank: int, start: float, *, dtype: torch.dtype, device: torch.device
    ) -> dict[str, Tensor]:
        """See `Form`."""
        return {"metric": torch.full((size,), start, dtype=dtype, device=device)}

    def update(
        self, batch: GradientBatch, statistics: str, numbers: Numbers
    ) -> Generator[list[Tensor], list[Tensor], Updated]:
        """See `Form`."""
        new_A, new_B = yield from gathered(batch, statistics, layer_squares, TangentGradient.squares)
        old_B, old_A = batch.states("metric")
        D_B, D_A = averaged(old_B, new_B, numbers.beta), averaged(old_A, new_A, numbers.beta)
        M_B, M_A = (raised(D, numbers.correction, numbers.damping, numbers.power) for D in (D_B, D_A))
        return Updated((M_B, M_A), D_B, D_A)
