"""The settings of a gradient step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from psilora.options.base import Options
from psilora.options.checks import flag, integer, one_of

SOLVERS = ("als", "ritz")
GRADIENTS = ("exact", "tangent", "dense", "backward", "auto")


@dataclass(frozen=True)
class GradientOptions(Options, step="gradient"):
    """What a step along the gradient has beside the common settings; see `psilora.PSILoRA`."""

    automatic_metric: ClassVar[str | None] = None
    default_prox: ClassVar[float] = 1e-2
    default_power: ClassVar[float] = 0.5
    default_damping: ClassVar[float] = 1e-5
    #: B starts at 0 and is small at first as published; λ weighs both factors alike, so the split has a part in all.
    burn_in: ClassVar[int] = 16

    solver: str = "als"
    momentum_rank: int | None = None
    metric_rank: int | None = None
    metric_bias_correction: bool = True
    gradient: str = "exact"
    loss_reduction: str = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("solver", self.solver, SOLVERS)
        if self.solver == "ritz" and self.num_iters < 1:
            raise ValueError(f"Invalid num_iters={self.num_iters}. Must be >= 1 with solver='ritz'.")
        for name in ("momentum_rank", "metric_rank"):
            if getattr(self, name) is not None:
                integer(name, getattr(self, name), 1)
        flag("metric_bias_correction", self.metric_bias_correction)
        one_of("gradient", self.gradient, GRADIENTS)
        row = self.metric_row
        if row is not None and row.gradients and self.gradient not in row.gradients:
            raise ValueError(
                f"Invalid gradient={self.gradient!r} with metric={self.metric!r}. Must be "
                f"{' or '.join(map(repr, row.gradients))}: the step multiplies X and S with the metric's directions."
            )
        one_of("loss_reduction", self.loss_reduction, ("mean", "sum"))
        if self.gradient == "backward":
            self._check_backward()

    def _check_backward(self) -> None:
        for name, needed in (("num_iters", 1), ("solver", "als"), ("momentum", 0), ("metric", None), ("first", "A")):
            value = getattr(self, name)
            if value != needed:
                raise ValueError(
                    f"Invalid {name}={value!r} with gradient='backward'. Must be {needed!r}; gradient='exact', 'dense' "
                    "and 'tangent' serve every setting."
                )

    @property
    def tau(self) -> float:
        """τ: the dampening, by default 0 without a metric (heavy ball), else μ (an average)."""
        return 0.0 if self.dampening is None and self.metric is None else super().tau

    @property
    def captures(self) -> str | None:
        """See `Options`."""
        if self.gradient != "tangent":
            return "activations"
        return None if self.metric is None else "statistics"

    @property
    def sums(self) -> str | None:
        """See `Options`."""
        return None if self.metric_row is None else self.metric_row.sums

    @property
    def structure(self) -> tuple[object, ...]:
        """See `Options`."""
        kind = (self.solver, self.metric_rank, self.metric_bias_correction, self.gradient, self.loss_reduction)
        return (*super().structure, *kind)

    def rank_of_momentum(self, rank: int, d_out: int, d_in: int) -> int:
        """Return r_m: as set, or the rank of the pair as far as its matrix allows it."""
        limit = min(d_out, d_in)
        if self.momentum_rank is None:
            return min(rank, limit)
        if self.momentum_rank > limit:
            raise ValueError(f"invalid momentum_rank={self.momentum_rank}. Must be in [1, {limit}].")
        return self.momentum_rank

    @property
    def momentum_setting(self) -> str:
        """See `Options`."""
        return f"momentum_rank={self.momentum_rank}"
