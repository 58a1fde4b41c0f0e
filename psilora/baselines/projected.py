"""LoRSum with projected momentum: the momentum of LoFT, which OPLoRA compares with as "OPLoRA Proj."."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from psilora.baselines.base import Layer, PairOptimizer, Proposal, State
from psilora.linalg.spd import spd_solve
from psilora.lowrank.lorsum import Projection, turns
from psilora.options.checks import in_range, is_real


class ProjectedMomentum(PairOptimizer):
    r"""A momentum-free LoRSum step, then momentum that is re-projected on the current factors (arXiv 2509.19977).

    1. (B, A) ← LoRSum of 1·(B, A) − η·G with K rounds, λ = η·ρ.
    2. At the new factors, with the same full gradient G:

           g_B = GAᵀ(AAᵀ + λI)⁻¹                    g_A = (BᵀB + λI)⁻¹BᵀG
           p_B = m_B·A_prevAᵀ(AAᵀ + λI)⁻¹           p_A = (BᵀB + λI)⁻¹BᵀB_prev·m_A
           m ← μ·p + (1 − τ)·g,   B ← B − ημ·p_B,   A ← A − ημ·p_A

       (B_prev, A_prev) is the pair right after the previous LoRSum. The first step sets m = g and applies nothing.

    All on √s-scaled factors. State: "momentum_B", "previous_B" (d_out, r), "momentum_A", "previous_A" (r, d_in).

    Args:
        model: The model; hooks on its LoRA layers capture X and S.
        lr: η ≥ 0.
        num_iters: K ≥ 0.
        momentum: μ in [0, 1).
        dampening: τ in [0, 1].
        prox: ρ ≥ 0.
        **adamw: `adamw_lr` and the like, for the other trainable parameters.

    Raises:
        ValueError: A setting is out of range, or a layer cannot be captured.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        *,
        num_iters: int = 1,
        momentum: float = 0.9,
        dampening: float = 0.0,
        prox: float = 1e-3,
        **adamw: Any,
    ) -> None:
        if isinstance(num_iters, bool) or not isinstance(num_iters, int) or num_iters < 0:
            raise ValueError(f"Invalid num_iters={num_iters!r}. Must be an integer >= 0.")
        in_range("momentum", momentum, 0, 1)
        if not (is_real(dampening) and 0 <= dampening <= 1):
            raise ValueError(f"Invalid dampening={dampening!r}. Must be in [0, 1].")
        in_range("prox", prox, 0, float("inf"))
        settings = {"lr": lr, "num_iters": num_iters, "momentum": momentum, "dampening": dampening, "prox": prox}
        super().__init__(model, settings, full_gradient=True, **adamw)

    def propose(self, layer: Layer, state: State, group: Mapping[str, Any]) -> Proposal:
        """Take the LoRSum step, then the projected momentum's."""
        G, lr = layer.gradient, group["lr"]
        ridge = torch.as_tensor(lr * group["prox"], dtype=G.dtype, device=G.device)
        projection = Projection(layer.B, layer.A, decay=None, prox=ridge)
        if group["num_iters"] == 0:
            projection.simultaneous(-lr * layer.left, -lr * layer.right)
        for turn in turns(group["num_iters"], "A"):
            if turn == "A":
                projection.turn_A(-lr * (projection.B.mT @ G))
            else:
                projection.turn_B(-lr * (G @ projection.A.mT))
        B, A = projection.B, projection.A
        eye = torch.eye(A.shape[0], dtype=A.dtype, device=A.device)
        gram_B, gram_A = B.mT @ B + ridge * eye, A @ A.mT + ridge * eye
        m_B, m_A = spd_solve(gram_A, (G @ A.mT).mT)[0].mT, spd_solve(gram_B, B.mT @ G)[0]
        step_B, step_A = B - layer.B, A - layer.A
        if "momentum_B" in state:
            mu, fresh = group["momentum"], 1 - group["dampening"]
            p_B = spd_solve(gram_A, (state["momentum_B"] @ (state["previous_A"] @ A.mT)).mT)[0].mT
            p_A = spd_solve(gram_B, (B.mT @ state["previous_B"]) @ state["momentum_A"])[0]
            m_B, m_A = mu * p_B + fresh * m_B, mu * p_A + fresh * m_A
            step_B, step_A = step_B - lr * mu * p_B, step_A - lr * mu * p_A
        return step_B, step_A, {"momentum_B": m_B, "momentum_A": m_A, "previous_B": B, "previous_A": A}
