"""Ways to build a `PSILoRA` by another name."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from psilora.adapters.model import Models
from psilora.optimizer import PSILoRA
from psilora.options.published import OPLORA, SCALED_OPLORA


class OPLoRA(PSILoRA):
    """OPLoRA (arXiv 2509.19977): `PSILoRA` along the exact gradient, without a metric, with heavy-ball momentum.

    Args:
        model, lr: As for `PSILoRA`.
        settings: Others of `PSILoRA`; they take precedence.
    """

    def __init__(self, model: Models, lr: float | Tensor, **settings: Any) -> None:
        super().__init__(model, lr, **{**OPLORA, **settings})

    @classmethod
    def scaled(cls, model: Models, lr: float | Tensor, **settings: Any) -> OPLoRA:
        """Return scaled OPLoRA (appendix B): the step in the norm ⟨BA, D_B·BA·D_A⟩, with D⁻¹ on both sides of G.

        D_A and D_B are low-rank running averages of XᵀX/N and N·SᵀS, which start at I: `metric="kfac-low-rank"` at the
        power 1, where PSI-LoRA takes the square root of diagonals. The paper says no more of it, and reports no table.
        """
        return cls(model, lr, **{**SCALED_OPLORA, **settings})


def create_psilora_optimizer(model: nn.Module, lr: float, **kwargs: Any) -> PSILoRA:
    """Create a `PSILoRA` in the style of PEFT's `create_*_optimizer` functions; arguments as for `PSILoRA`."""
    return PSILoRA(model, lr, **kwargs)
