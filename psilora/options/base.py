"""The settings that every kind of step has, validated, and how a param group's flat keys become those of its kind."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from psilora.options.checks import at_least, flag, in_range, integer, is_real, one_of, rate
from psilora.options.metrics import METRIC_ROWS, MetricRow, metrics_of

BACKENDS = ("auto", "reference", "triton")
K = TypeVar("K", bound="Options")


@dataclass(frozen=True)
class Options:
    """Settings of `psilora.PSILoRA`, where they are documented; letters as there (η, K, μ, τ, ρ, γ, β₂, δ).

    A kind of step is a subclass, `class SomeOptions(Options, step="some")`, that adds what it alone has.
    """

    #: The name of the kind; the metric that "auto" stands for; the defaults of ρ, γ and δ; steps before the first
    #: balancing of the factors.
    step: ClassVar[str]
    automatic_metric: ClassVar[str | None]
    default_prox: ClassVar[float]
    default_power: ClassVar[float]
    default_damping: ClassVar[float]
    burn_in: ClassVar[int] = 0

    lr: float | Tensor
    num_iters: int = 1
    momentum: float = 0.9
    dampening: float | None = None
    balance: bool = True
    prox: float | None = None
    weight_decay: float = 0.0
    metric: str | None = None
    metric_power: float | None = None
    metric_beta: float = 0.99
    damping: float | None = None
    first: str = "A"
    maximize: bool = False

    def __init_subclass__(cls, *, step: str) -> None:
        cls.step = step
        KINDS[step] = cls

    def __post_init__(self) -> None:
        rate("lr", self.lr)
        integer("num_iters", self.num_iters, 0)
        in_range("momentum", self.momentum, 0, 1)
        if self.dampening is not None and not (is_real(self.dampening) and 0 <= self.dampening <= 1):
            raise ValueError(f"Invalid dampening={self.dampening!r}. Must be in [0, 1] or None.")
        at_least("prox", self.rho, 0)
        at_least("weight_decay", self.weight_decay, 0)
        if self.metric not in metrics_of(self.step):
            allowed = ", ".join(map(repr, metrics_of(self.step)))
            raise ValueError(f"Invalid metric={self.metric!r}. Must be one of {allowed} with step={self.step!r}.")
        if not (is_real(self.gamma) and 0 < self.gamma <= 1):
            raise ValueError(f"Invalid metric_power={self.metric_power!r}. Must be in (0, 1].")
        in_range("metric_beta", self.metric_beta, 0, 1)
        if not (is_real(self.delta) and math.isfinite(self.delta) and self.delta > 0):
            raise ValueError(f"Invalid damping={self.damping!r}. Must be finite and > 0.")
        flag("maximize", self.maximize)
        flag("balance", self.balance)
        one_of("first", self.first, ("A", "B"))

    @staticmethod
    def of_settings(settings: Mapping[str, Any]) -> Options:
        """Return the options of the kind that `settings["step"]` names; what that kind has no use for is ignored."""
        one_of("step", settings["step"], tuple(sorted(KINDS)))
        kind = KINDS[settings["step"]]
        return kind(**{field.name: settings[field.name] for field in fields(kind) if field.name in settings})

    @staticmethod
    def from_group(group: Mapping[str, Any]) -> Options:
        """Return the options held by a param group, ignoring its other keys.

        Raises:
            ValueError: The kind of step was set under the name of the argument.
        """
        if isinstance(group.get("step"), str):
            raise ValueError(
                f"Invalid 'step': {group['step']!r} in a param group. The kind of step is 'step_kind' there."
            )
        return Options.of_settings({**group, **{name: group[key] for name, key in GROUP_KEYS.items()}})

    @classmethod
    def of(cls: type[K], options: Options) -> K:
        """Return options that are known to be of this kind."""
        if not isinstance(options, cls):
            raise TypeError(f"these are options of step={options.step!r}, not of step={cls.step!r}")
        return options

    @property
    def tau(self) -> float:
        """τ: the dampening, by default μ (an average)."""
        return self.momentum if self.dampening is None else self.dampening

    @property
    def rho(self) -> float:
        """ρ: the proximal weight, per unit of lr (gradient) or of the mean of a Gram's diagonal (spectral)."""
        return self.default_prox if self.prox is None else self.prox

    @property
    def gamma(self) -> float:
        """γ: the metric's power."""
        return self.default_power if self.metric_power is None else self.metric_power

    @property
    def delta(self) -> float:
        """δ: the metric's damping, of D in the gradient step, of D/mean(D) in the spectral."""
        return self.default_damping if self.damping is None else self.damping

    @property
    def metric_row(self) -> MetricRow | None:
        """What is known of the metric; None without one."""
        return None if self.metric is None else METRIC_ROWS[self.metric]

    @property
    def on_factors(self) -> bool:
        """Whether the momentum is that of the factors' own gradients, whose size follows the other factor's."""
        return False

    @property
    def statistics(self) -> str | None:
        """What the metric is made from: "kfac", "shampoo" or "lora"; None without one."""
        return None if self.metric is None else METRIC_ROWS[self.metric].statistics

    @property
    def form(self) -> str | None:
        """How much of the metric's matrices is kept: "diagonal", "dense" or "low-rank"; None without one."""
        return None if self.metric is None else METRIC_ROWS[self.metric].form

    @property
    def gradient(self) -> str:
        """How G is known: "tangent" means from `.grad` alone."""
        return "tangent"

    @property
    def captures(self) -> str | None:
        """What the step needs beside `.grad`: "activations", their "statistics", or None."""
        return None

    @property
    def sums(self) -> str | None:
        """What the metric needs of X and S where they are not kept: "squares", "products" or None."""
        return None

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
            self.first,
            self.momentum > 0,
            self.balance,
            self.metric,
            self.maximize,
            self.weight_decay > 0,
        )

    def rank_of_momentum(self, rank: int, d_out: int, d_in: int) -> int:
        """Return the rank of the momentum of a pair of this rank and size; 0 for a kind of step that keeps none.

        Raises:
            ValueError: It was set to more than a matrix of this size can have.
        """
        return 0

    @property
    def momentum_setting(self) -> str:
        """The setting that decides the rank of the momentum, as written."""
        return f"momentum={self.momentum}"


#: The kinds of step by name; filled by the definition of each.
KINDS: dict[str, type[Options]] = {}


def defaults() -> dict[str, Any]:
    """Return the default of every setting but lr, of all kinds of step together."""
    return {f.name: f.default for kind in KINDS.values() for f in fields(kind) if f.default is not MISSING}


def option_names() -> tuple[str, ...]:
    """Return the names of all settings, of all kinds of step together."""
    return ("lr", "step", *defaults())


def resolved(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with metric="auto" and gradient=None replaced by what they mean for the kind of step."""
    found = dict(settings)
    one_of("step", found["step"], tuple(sorted(KINDS)))
    kind = KINDS[found["step"]]
    if found["metric"] == "auto":
        found["metric"] = kind.automatic_metric if found.get("joint", True) else None
    own = {field.name: field.default for field in fields(kind)}
    if found["gradient"] is None or "gradient" not in own:
        found["gradient"] = own.get("gradient", "tangent")
    return found


#: Settings under another name in param groups, where wrappers of optimizers keep an integer "step" of their own.
GROUP_KEYS = {"step": "step_kind"}


def as_group(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings under the names that param groups have for them."""
    return {GROUP_KEYS.get(name, name): value for name, value in settings.items()}


def refuse_foreign(given: Mapping[str, Any], step: str) -> None:
    """Raise ValueError for a setting that another kind of step has and this one has not, unless it is the default."""
    own = {field.name for field in fields(KINDS[step])}
    for name, default in defaults().items():
        allowed = (None, "tangent") if name == "gradient" else (default,)  # what a step without captures goes by
        if name in own or name not in given or given[name] in allowed:
            continue
        owners = [kind for kind, options in KINDS.items() if name in {field.name for field in fields(options)}]
        raise ValueError(
            f"Invalid {name}={given[name]!r} with step={step!r}. Must be {allowed[-1]!r}: it is a setting of "
            f"step={owners[0]!r}."
        )


def inherited(settings: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings for a group that overrides some; of another kind of step, what that has not is at its default."""
    found = {**settings, **override}
    step = found["step"]
    if step in KINDS and step != settings["step"]:
        own = {field.name for field in fields(KINDS[step])}
        found.update({n: d for n, d in defaults().items() if n not in own and n not in override})
    return found
