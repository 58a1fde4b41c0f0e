"""Preconditioned LoRA (ScaledGD, Riemannian LoRA): factor gradients times the inverse Gram of the other factor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from psilora.baselines.base import Layer, PairOptimizer, Proposal, State, adam_direction, adam_settings
from psilora.linalg.spd import spd_solve
from psilora.options.checks import in_range


def preconditioned(layer: Layer, damping: float) -> tuple[Tensor, Tensor]:
    """Return g_B = GAᵀ(AAᵀ + δI)⁻¹ (d_out, r) and g_A = (BᵀB + δI)⁻¹BᵀG (r, d_in)."""
    eye = torch.eye(layer.A.shape[0], dtype=layer.A.dtype, device=layer.A.device)
    g_B = spd_solve(layer.A @ layer.A.mT + damping * eye, layer.right.mT)[0].mT
    g_A = spd_solve(layer.B.mT @ layer.B + damping * eye, layer.left)[0]
    return g_B, g_A


class PreconditionedSGD(PairOptimizer):
    r"""SGD with heavy ball on the preconditioned LoRA gradients (arXiv 2402.02347; one simultaneous LoRSum step).

        g_B = GAᵀ(AAᵀ + δI)⁻¹,  g_A = (BᵀB + δI)⁻¹BᵀG,  m ← μm + g,  B ← B − ηm_B,  A ← A − ηm_A

    on √s-scaled factors. From `.grad` alone. State: "momentum_B", "momentum_A".

    Args:
        model: The model with LoRA adapters.
        lr: η ≥ 0.
        momentum: μ in [0, 1).
        damping: δ ≥ 0.
        **adamw: `adamw_lr` and the like, for the other trainable parameters.
    """

    def __init__(
        self, model: nn.Module, lr: float, *, momentum: float = 0.0, damping: float = 1e-3, **adamw: Any
    ) -> None:
        in_range("momentum", momentum, 0, 1)
        in_range("damping", damping, 0, float("inf"))
        super().__init__(model, {"lr": lr, "momentum": momentum, "damping": damping}, full_gradient=False, **adamw)

    def propose(self, layer: Layer, state: State, group: Mapping[str, Any]) -> Proposal:
        """Accumulate the preconditioned gradients."""
        m_B, m_A = preconditioned(layer, group["damping"])
        if group["momentum"] > 0:
            m_B = m_B + group["momentum"] * state.get("momentum_B", torch.zeros_like(m_B))
            m_A = m_A + group["momentum"] * state.get("momentum_A", torch.zeros_like(m_A))
            state["momentum_B"], state["momentum_A"] = m_B, m_A
        return -group["lr"] * m_B, -group["lr"] * m_A, state


class PreconditionedAdamW(PairOptimizer):
    r"""AdamW on the preconditioned LoRA gradients g of `PreconditionedSGD` (arXiv 2402.02347, section 4).

        B ← (1 − η·wd)B − η·m̂_B/(√v̂_B + ε),  A alike,  on √s-scaled factors.

    From `.grad` alone. State: "first_B", "second_B", "first_A", "second_A", "step".

    Args:
        model: The model with LoRA adapters.
        lr: η ≥ 0.
        betas, eps: Of Adam.
        weight_decay: wd ≥ 0, decoupled, on the factors.
        damping: δ ≥ 0.
        **adamw: `adamw_lr` and the like, for the other trainable parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        damping: float = 1e-3,
        **adamw: Any,
    ) -> None:
        settings = adam_settings(lr, betas, eps, weight_decay, damping=damping)
        in_range("damping", damping, 0, float("inf"))
        super().__init__(model, settings, full_gradient=False, **adamw)

    def propose(self, layer: Layer, state: State, group: Mapping[str, Any]) -> Proposal:
        """Take Adam's direction of each preconditioned gradient."""
        g_B, g_A = preconditioned(layer, group["damping"])
        state["step"] = state.get("step", torch.zeros((), device="cpu")) + 1
        t = int(state["step"])
        D_B, moments_B = adam_direction(g_B, state, "B", group["betas"], group["eps"], t)
        D_A, moments_A = adam_direction(g_A, state, "A", group["betas"], group["eps"], t)
        lr, decay = group["lr"], group["weight_decay"]
        return -lr * (D_B + decay * layer.B), -lr * (D_A + decay * layer.A), {**state, **moments_B, **moments_A}
