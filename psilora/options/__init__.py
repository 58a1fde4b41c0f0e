"""The settings of a parameter group, validated."""

from psilora.options.base import (
    BACKENDS,
    DELTA,
    GAMMA,
    GRADIENT,
    GRADIENTS,
    METRIC,
    OPTION_NAMES,
    RHO,
    SOLVERS,
    STEPS,
    Options,
    resolved,
)
from psilora.options.checks import check_rate, is_real
from psilora.options.metrics import DENSE_LIMIT, METRICS
from psilora.options.published import OPLORA, PAPER

__all__ = [
    "BACKENDS",
    "DELTA",
    "DENSE_LIMIT",
    "GAMMA",
    "GRADIENT",
    "GRADIENTS",
    "METRIC",
    "METRICS",
    "OPLORA",
    "OPTION_NAMES",
    "Options",
    "PAPER",
    "RHO",
    "SOLVERS",
    "STEPS",
    "check_rate",
    "is_real",
    "resolved",
]
