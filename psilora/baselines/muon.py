"""LoRA-Muon: spectral steps on the factors, the simplest relative of the spectral PSI-LoRA step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from psilora.baselines.base import Layer, PairOptimizer, Proposal, State
from psilora.baselines.pseudo import inverse_root, polar
from psilora.options.checks import in_range


class LoRAMuon(PairOptimizer):
    r"""Polar factors of the momenta, in the geometry of the product B·A.

    With R_A = (AAᵀ)^(−½) and R_B = (BᵀB)^(−½), on √s-scaled factors:

        m_B ← μm_B + (1 − μ)GAᵀ,   B ← B − ½η·polar(m_B R_A) R_A
        m_A ← μm_A + (1 − μ)BᵀG,   A ← A − ½η·R_B polar(R_B m_A)

    Either half moves the weight by ½η in spectral norm. A is left alone while B = 0. From `.grad` alone.
    State: "momentum_B", "momentum_A".

    Args:
        model: The model with LoRA adapters.
        lr: η ≥ 0.
        momentum: μ in [0, 1).
        **adamw: `adamw_lr` and the like, for the other trainable parameters.
    """

    def __init__(self, model: nn.Module, lr: float, *, momentum: float = 0.9, **adamw: Any) -> None:
        in_range("momentum", momentum, 0, 1)
        super().__init__(model, {"lr": lr, "momentum": momentum}, full_gradient=False, **adamw)

    def propose(self, layer: Layer, state: State, group: Mapping[str, Any]) -> Proposal:
        """Average the gradients and take the polar factors."""
        mu, half = group["momentum"], group["lr"] / 2
        m_B = torch.lerp(state.get("momentum_B", torch.zeros_like(layer.B)), layer.right, 1 - mu)
        m_A = torch.lerp(state.get("momentum_A", torch.zeros_like(layer.A)), layer.left, 1 - mu)
        R_A, R_B = inverse_root(layer.A @ layer.A.mT), inverse_root(layer.B.mT @ layer.B)
        step_B, step_A = -half * polar(m_B @ R_A) @ R_A, -half * R_B @ polar(R_B @ m_A)
        return step_B, step_A, {"momentum_B": m_B, "momentum_A": m_A}
