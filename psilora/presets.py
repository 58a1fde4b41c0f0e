"""Ways to build a `PSILoRA` by another name."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from psilora.optimizer import PSILoRA
from psilora.options.published import OPLORA


class OPLoRA(PSILoRA):
    """OPLoRA (arXiv 2509.19977): `PSILoRA` along the exact gradient, without a metric, with heavy-ball momentum.

    Args:
        model, lr: As for `PSILoRA`.
        settings: Others of `PSILoRA`; they take precedence.
    """

    def __init__(self, model: nn.Module, lr: float | Tensor, **settings: Any) -> None:
        super().__init__(model, lr, **{**OPLORA, **settings})


def create_psilora_optimizer(model: nn.Module, lr: float, **kwargs: Any) -> PSILoRA:
    """Create a `PSILoRA` in the style of PEFT's `create_*_optimizer` functions; arguments as for `PSILoRA`."""
    return PSILoRA(model, lr, **kwargs)
