"""LoRA-Pro: steps of both factors that together follow a step of the weight as closely as they can."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from psilora.baselines.base import Layer, PairOptimizer, Proposal, State, adam_direction, adam_settings
from psilora.baselines.pseudo import pseudo_inverse, rounding


class LoRAPro(PairOptimizer):
    r"""Adam on the equivalent gradient of the weight, and the factors' steps that follow it (arXiv 2407.18242).

    On √s-scaled factors, with P_B = B(BᵀB)⁻¹Bᵀ and P_A = Aᵀ(AAᵀ)⁻¹A:

        g̃ = P_B·G + (I − P_B)·G·P_A,   D = m̂/(√v̂ + ε), Adam's direction of g̃ (d_out, d_in)
        A ← A − η·((BᵀB)⁻¹BᵀD + X·A),   B ← B − η·((I − P_B)·DAᵀ(AAᵀ)⁻¹ − B·X)

    with the X of BᵀB·X + X·AAᵀ = −(BᵀB)⁻¹BᵀDAᵀ, which keeps the steps closest to the LoRA gradients. Inverses leave out
    what is rounding, so A is left alone while B = 0. From `.grad` alone; D and its moments have the size of the weight:
    for comparison. State: "first_W", "second_W" (d_out, d_in), "step".

    Args:
        model: The model with LoRA adapters.
        lr: η ≥ 0.
        betas, eps: Of Adam.
        weight_decay: wd ≥ 0, decoupled, on ΔW: both factors shrink by √(1 − η·wd).
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
        """Take Adam's direction of the equivalent gradient and solve for the factors' steps."""
        B, A, lr = layer.B, layer.A, group["lr"]
        inverse_B, inverse_A = pseudo_inverse(B.mT @ B), pseudo_inverse(A @ A.mT)
        fresh = layer.right @ inverse_A
        equivalent = B @ (inverse_B @ layer.left) + (fresh - B @ (inverse_B @ (B.mT @ fresh))) @ A
        state["step"] = state.get("step", torch.zeros((), device="cpu")) + 1
        D, moments = adam_direction(equivalent, state, "W", group["betas"], group["eps"], int(state["step"]))
        left, right = inverse_B @ (B.mT @ D), D @ A.mT @ inverse_A
        X = sylvester(B.mT @ B, A @ A.mT, -left @ A.mT)
        g_A, g_B = left + X @ A, right - B @ (inverse_B @ (B.mT @ right)) - B @ X
        shrink = max(0.0, 1 - lr * group["weight_decay"]) ** 0.5 - 1
        return shrink * B - lr * g_B, shrink * A - lr * g_A, {**state, **moments}


def sylvester(first: Tensor, second: Tensor, right: Tensor) -> Tensor:
    """Return the X (r, r) of first·X + X·second = right for symmetric, positive semidefinite matrices.

    Zero where the sum of their eigenvalues is rounding.
    """
    (a, P), (b, Q) = torch.linalg.eigh(first), torch.linalg.eigh(second)
    total = a[:, None] + b[None, :]
    usable = total > (rounding(first) * total.amax()).clamp_min(0)
    core = P.mT @ right @ Q
    solution: Tensor = P @ torch.where(usable, core / torch.where(usable, total, 1.0), 0.0) @ Q.mT
    return solution
