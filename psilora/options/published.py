"""The settings of the papers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: PSI-LoRA as published (arXiv 2602.16456): F-LoRSum in the square root of a diagonal K-FAC metric that starts at 1.
PAPER: Mapping[str, Any] = {
    "step": "gradient",
    "gradient": "exact",
    "num_iters": 1,
    "momentum": 0.9,
    "prox": 1e-3,
    "metric": "kfac",
    "metric_power": 0.5,
    "metric_beta": 0.99,
    "metric_bias_correction": False,
    "damping": 1e-5,
    "controller": None,
}
#: OPLoRA (arXiv 2509.19977): the same in the Frobenius norm, with heavy-ball momentum.
OPLORA: Mapping[str, Any] = {
    "step": "gradient",
    "gradient": "exact",
    "dampening": 0.0,
    "prox": 1e-3,
    "metric": None,
    "controller": None,
}
#: Its scaled form (appendix B): the norm of a low-rank K-FAC metric that starts at I, itself and not its root.
SCALED_OPLORA: Mapping[str, Any] = {
    **OPLORA,
    "metric": "kfac-low-rank",
    "metric_power": 1.0,
    "metric_bias_correction": False,
}
