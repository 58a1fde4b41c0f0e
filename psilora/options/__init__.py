"""The settings of a parameter group, validated: what every kind of step has, and what each has alone."""

from psilora.options.base import (
    BACKENDS,
    GROUP_KEYS,
    KINDS,
    Options,
    as_group,
    defaults,
    inherited,
    option_names,
    refuse_foreign,
    resolved,
)
from psilora.options.checks import check_rate, is_real
from psilora.options.gradient import GRADIENTS, SOLVERS, GradientOptions
from psilora.options.metrics import DENSE_LIMIT, METRIC_ROWS, METRICS, MetricRow
from psilora.options.published import OPLORA, PAPER
from psilora.options.spectral import SpectralOptions

STEPS = tuple(sorted(KINDS))
OPTION_NAMES = option_names()

__all__ = [
    "BACKENDS",
    "DENSE_LIMIT",
    "GRADIENTS",
    "GROUP_KEYS",
    "KINDS",
    "METRICS",
    "METRIC_ROWS",
    "OPLORA",
    "OPTION_NAMES",
    "PAPER",
    "SOLVERS",
    "STEPS",
    "GradientOptions",
    "MetricRow",
    "Options",
    "SpectralOptions",
    "as_group",
    "check_rate",
    "defaults",
    "inherited",
    "is_real",
    "refuse_foreign",
    "resolved",
]
