"""The settings of one parameter group of LoRA pairs, validated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from psilora.options.checks import at_least, flag, in_range, integer, is_real, one_of
from psilora.options.metrics import METRICS

STEPS = ("gradient", "spectral")
SOLVERS = ("als", "ritz")
#: Defaults that differ between the kinds of step: γ, δ, ρ.
GAMMA = {"gradient": 0.5, "spectral": 1.0}
DELTA = {"gradient": 1e-5, "spectral": 1e-2}
RHO = {"gradient": 1e-2, "spectral": 1e-6}
#: What metric="auto" and gradient=None mean.
METRIC = {"gradient": None, "spectral": "lora"}
GRADIENT = {"gradient": "exact", "spectral": "tangent"}
GRADIENTS = ("exact", "tangent", "dense", "backward", "auto")
BACKENDS = ("auto", "reference", "triton")


@dataclass(frozen=True)
class Options:
    """Settings of `psilora.PSILoRA`, where they are documented; letters as there (η, K, μ, τ, ρ, γ, β₂, δ)."""

    lr: float | Tensor
    step: str = "spectral"
    num_iters: int = 1
    solver: str = "als"
    momentum: float = 0.9
    dampening: float | None = None
    momentum_rank: int | None = None
    nesterov: bool = True
    joint: bool = True
    fade: bool = True
    prox: float | None = None
    weight_decay: float = 0.0
    metric: str | None = None
    metric_power: float | None = None
    metric_beta: float = 0.99
    metric_rank: int | None = None
    metric_bias_correction: bool = True
    damping: float | None = None
    gradient: str = "tangent"
    first: str = "A"
    maximize: bool = False
    loss_reduction: str = "mean"

    def __post_init__(self) -> None:
        if not isinstance(self.lr, Tensor):
            at_least("lr", self.lr, 0)
        elif self.lr.numel() != 1:
            raise ValueError(f"Invalid lr of shape {tuple(self.lr.shape)}. Must be a number or a one-element tensor.")
        one_of("step", self.step, STEPS)
        integer("num_iters", self.num_iters, 0)
        one_of("solver", self.solver, SOLVERS if self.step == "gradient" else SOLVERS[:1])
        if self.solver == "ritz" and self.num_iters < 1:
            raise ValueError(f"Invalid num_iters={self.num_iters}. Must be >= 1 with solver='ritz'.")
        in_range("momentum", self.momentum, 0, 1)
        if self.dampening is not None and not (is_real(self.dampening) and 0 <= self.dampening <= 1):
            raise ValueError(f"Invalid dampening={self.dampening!r}. Must be in [0, 1] or None.")
        if self.momentum_rank is not None:
            integer("momentum_rank", self.momentum_rank, 1)
            if self.step == "spectral":
                raise ValueError(f"Invalid momentum_rank={self.momentum_rank}. Must be None with step='spectral' (2r).")
        if not self.joint and self.metric is not None:
            raise ValueError(f"Invalid metric={self.metric!r}. Must be None with joint=False.")
        at_least("prox", self.rho, 0)
        at_least("weight_decay", self.weight_decay, 0)
        if self.metric not in METRICS[self.step]:
            allowed = ", ".join(map(repr, METRICS[self.step]))
            raise ValueError(f"Invalid metric={self.metric!r}. Must be one of {allowed} with step={self.step!r}.")
        if not (is_real(self.gamma) and 0 < self.gamma <= 1):
            raise ValueError(f"Invalid metric_power={self.metric_power!r}. Must be in (0, 1].")
        in_range("metric_beta", self.metric_beta, 0, 1)
        if not (is_real(self.delta) and math.isfinite(self.delta) and self.delta > 0):
            raise ValueError(f"Invalid damping={self.damping!r}. Must be finite and > 0.")
        one_of("gradient", self.gradient, GRADIENTS)
        if self.step == "spectral" and self.gradient != "tangent":
            raise ValueError(f"Invalid gradient={self.gradient!r}. Must be 'tangent' with step='spectral'.")
        for name in ("nesterov", "joint", "fade", "metric_bias_correction", "maximize"):
            flag(name, getattr(self, name))
        self._check_low_rank()
        one_of("first", self.first, ("A", "B"))
        one_of("loss_reduction", self.loss_reduction, ("mean", "sum"))
        if self.gradient == "backward":
            self._check_backward()

    def _check_low_rank(self) -> None:
        if self.metric_rank is not None:
            integer("metric_rank", self.metric_rank, 1)
        if self.form == "low-rank" and self.gradient != "exact":
            raise ValueError(
                f"Invalid gradient={self.gradient!r} with metric={self.metric!r}. Must be 'exact': the "
                "step multiplies X and S with the metric's directions."
            )

    def _check_backward(self) -> None:
        for name, needed in (("num_iters", 1), ("solver", "als"), ("momentum", 0), ("metric", None), ("first", "A")):
            value = getattr(self, name)
            if value != needed:
                raise ValueError(
                    f"Invalid {name}={value!r} with gradient='backward'. Must be {needed!r}; gradient='exact', 'dense' "
                    "and 'tangent' serve every setting."
                )

    @classmethod
    def from_group(cls, group: Mapping[str, Any]) -> Options:
        """Return the options held by a param group, ignoring its other keys.

        Raises:
            ValueError: The kind of step was set under the name of the argument.
        """
        if isinstance(group.get("step"), str):
            raise ValueError(
                f"Invalid 'step': {group['step']!r} in a param group. The kind of step is 'step_kind' there."
            )
        return cls(**{name: group[GROUP_KEYS.get(name, name)] for name in OPTION_NAMES})

    @property
    def tau(self) -> float:
        """τ: the dampening, by default 0 for a gradient step without a metric (heavy ball), else μ (an average)."""
        if self.dampening is not None:
            return self.dampening
        return 0.0 if self.step == "gradient" and self.metric is None else self.momentum

    @property
    def rho(self) -> float:
        """ρ: the proximal weight, per unit of lr (gradient) or of the mean of a Gram's diagonal (spectral)."""
        return RHO[self.step] if self.prox is None else self.prox

    @property
    def gamma(self) -> float:
        """γ: the metric's power."""
        return GAMMA[self.step] if self.metric_power is None else self.metric_power

    @property
    def delta(self) -> float:
        """δ: the metric's damping, of D in the gradient step, of D/mean(D) in the spectral."""
        return DELTA[self.step] if self.damping is None else self.damping

    @property
    def statistics(self) -> str | None:
        """What the metric is made from: "kfac", "shampoo" or "lora"; None without one."""
        return None if self.metric is None else self.metric.partition("-")[0]

    @property
    def form(self) -> str | None:
        """How much of the metric's matrices is kept: "diagonal", "dense" or "low-rank"; None without one."""
        return None if self.metric is None else self.metric.partition("-")[2] or "diagonal"

    @property
    def captures(self) -> str | None:
        """What the step needs beside `.grad`: "activations", their "statistics", or None."""
        if self.step != "gradient":
            return None
        if self.gradient != "tangent":
            return "activations"
        return None if self.metric is None else "statistics"

    @property
    def sums(self) -> str | None:
        """What the metric needs of X and S where they are not kept: "squares", "products" or None."""
        if self.statistics != "kfac":
            return None
        return "squares" if self.form == "diagonal" else "products"

    @property
    def hooks(self) -> tuple[object, ...]:
        """What must be equal for the captures of other settings to serve these."""
        if self.captures is None:
            return (None,)
        return (self.gradient, None if self.gradient == "exact" else self.sums)

    @property
    def structure(self) -> tuple[object, ...]:
        """What must be equal for two layers to be computed in one batch; the numbers may differ."""
        return (
            self.step,
            self.num_iters,
            self.solver,
            self.first,
            self.momentum > 0,
            self.nesterov,
            self.joint,
            self.fade,
            self.metric,
            self.metric_rank,
            self.metric_bias_correction,
            self.gradient,
            self.maximize,
            self.loss_reduction,
            self.weight_decay > 0,
        )


def resolved(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with metric="auto" and gradient=None replaced by what they mean for the kind of step."""
    found = dict(settings)
    one_of("step", found["step"], STEPS)
    if found["metric"] == "auto":
        found["metric"] = METRIC[found["step"]] if found.get("joint", True) else None
    if found["gradient"] is None:
        found["gradient"] = GRADIENT[found["step"]]
    return found


OPTION_NAMES = tuple(field.name for field in fields(Options))
#: Settings under another name in param groups, where wrappers of optimizers keep an integer "step" of their own.
GROUP_KEYS = {"step": "step_kind"}


def as_group(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings under the names that param groups have for them."""
    return {GROUP_KEYS.get(name, name): value for name, value in settings.items()}
