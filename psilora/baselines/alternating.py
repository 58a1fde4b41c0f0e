"""Methods that move one factor per step, in the geometry of the other: AltLoRA, AltLoRA+ and LoFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from psilora.baselines.base import Layer, PairOptimizer, Proposal, State, adam_settings
from psilora.baselines.pseudo import pseudo_inverse


class AltLoRA(PairOptimizer):
    r"""Momentum of the projected gradient, one factor per step, B first (arXiv 2505.12455).

    On √s-scaled factors, in the steps of A, with B' as it was in A's last step, and alike with A in those of B:

        g = (BᵀB)⁻¹BᵀG,   m ← β₁·(BᵀB)⁻¹BᵀB'·m + (1 − β₁)·g,   A ← (1 − η·wd)·A − η·m̂

    With second moments it is AltLoRA+: v ← β₂·v + (1 − β₂)·g², and A moves along m̂/(√v̂ + ε), where ^ divides by
    1 − βᵗ. Inverses leave out what is rounding, so A is left alone while B = 0. From `.grad` alone. State: "first_A",
    "first_B", "other_A" and "other_B", the factors that the moments belong to, "step", and for AltLoRA+ "second_A",
    "second_B".

    Args:
        model: The model with LoRA adapters.
        lr: η ≥ 0.
        betas: β₁ and β₂.
        second: Whether to divide by the root of second moments: AltLoRA+.
        eps: ε.
        weight_decay: wd ≥ 0, decoupled, on the factor that moves.
        **adamw: `adamw_lr` and the like, for the other trainable parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        second: bool = False,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **adamw: Any,
    ) -> None:
        settings = adam_settings(lr, betas, eps, weight_decay, second=second)
        super().__init__(model, settings, full_gradient=False, **adamw)

    def propose(self, layer: Layer, state: State, group: Mapping[str, Any]) -> Proposal:
        """Move the factor whose turn it is; the other's moments wait."""
        count = int(state.get("step", torch.zeros((), device="cpu")))
        state["step"] = torch.tensor(count + 1.0, device="cpu")
        turn, t = "BA"[count % 2], count // 2 + 1
        rows, other, product = _seen_from(layer, turn)
        inverse = pseudo_inverse(other @ other.mT)
        g, beta = inverse @ product, group["betas"][0]
        m = (1 - beta) * g
        if f"first_{turn}" in state:
            m = m + beta * (inverse @ (other @ state[f"other_{turn}"].mT)) @ state[f"first_{turn}"]
        state |= {f"first_{turn}": m, f"other_{turn}": other}
        direction = m / (1 - beta**t)
        if group["second"]:
            beta = group["betas"][1]
            v = torch.lerp(state.get(f"second_{turn}", torch.zeros_like(g)), g.square(), 1 - beta)
            state[f"second_{turn}"] = v
            direction = direction / ((v / (1 - beta**t)).sqrt() + group["eps"])
        step = -group["lr"] * (direction + group["weight_decay"] * rows)
        return _one_step(layer, turn, step, state)


class LoFT(PairOptimizer):
    r"""AdamW on the weight, seen through one factor at a time, B first (LoFT-AdamW, arXiv 2505.21289).

    On √s-scaled factors, for A with H = (BᵀB)⁻¹ and C = H·BᵀB', B' as it was one step before, and alike for B:

        g = HBᵀG,   m ← β₁·C·m + (1 − β₁)·g,   p_j ← β₂·C·p_j·Cᵀ + (1 − β₂)·g_j g_jᵀ   for every column j of A
        D = B·m̂ / (√v̂ + ε) elementwise,  v_ij = b_i p_j b_iᵀ,  b_i the rows of B;   A ← (1 − η·wd)·A − η·HBᵀD

    Both factors' moments follow in every step, the factors move in turn. With r = d and orthogonal factors this is
    AdamW on W. The paper's clipping is left to the caller. D is formed, (d_out, d_in), and p (d, r, r) is r times a
    factor: for comparison. From `.grad` alone. State: "first_A", "first_B", "second_A" (d_in, r, r), "second_B"
    (d_out, r, r), "other_A", "other_B", "step".

    Args:
        model: The model with LoRA adapters.
        lr: η ≥ 0.
        betas: β₁ and β₂.
        eps: ε.
        weight_decay: wd ≥ 0, decoupled, on the factor that moves.
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
        **adamw: Any,
    ) -> None:
        settings = adam_settings(lr, betas, eps, weight_decay)
        super().__init__(model, settings, full_gradient=False, **adamw)

    def propose(self, layer: Layer, state: State, group: Mapping[str, Any]) -> Proposal:
        """Carry both factors' moments over and move the factor whose turn it is."""
        count = int(state.get("step", torch.zeros((), device="cpu")))
        state["step"] = torch.tensor(count + 1.0, device="cpu")
        moving, (beta1, beta2) = "BA"[count % 2], group["betas"]
        step = torch.zeros_like(layer.A)
        for turn in "AB":
            rows, other, product = _seen_from(layer, turn)
            inverse = pseudo_inverse(other @ other.mT)
            g = inverse @ product
            outer = torch.einsum("rj,sj->jrs", g, g)
            m, p = (1 - beta1) * g, (1 - beta2) * outer
            if f"first_{turn}" in state:
                carry = inverse @ (other @ state[f"other_{turn}"].mT)
                m = m + beta1 * carry @ state[f"first_{turn}"]
                p = p + beta2 * carry @ state[f"second_{turn}"] @ carry.mT
            state |= {f"first_{turn}": m, f"second_{turn}": p, f"other_{turn}": other}
            if turn == moving:
                v = torch.einsum("ri,jrs,si->ij", other, p, other).clamp_min(0) / (1 - beta2 ** (count + 1))
                D = (other.mT @ m / (1 - beta1 ** (count + 1))) / (v.sqrt() + group["eps"])
                step = -group["lr"] * (inverse @ (other @ D) + group["weight_decay"] * rows)
        return _one_step(layer, moving, step, state)


def _seen_from(layer: Layer, turn: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows (r, d) of the factor that may move, those of the other, and the other's product with G."""
    if turn == "A":
        return layer.A, layer.B.mT, layer.left
    return layer.B.mT, layer.A, layer.right.mT


def _one_step(layer: Layer, turn: str, step: Tensor, state: State) -> Proposal:
    if turn == "A":
        return torch.zeros_like(layer.B), step, state
    return step.mT, torch.zeros_like(layer.A), state
