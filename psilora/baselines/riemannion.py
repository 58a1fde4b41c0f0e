"""Riemannion: Muon on the manifold of matrices of rank r."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from psilora.baselines.base import Layer, PairOptimizer, Proposal, State
from psilora.baselines.pseudo import rounding
from psilora.options.checks import in_range

Factored = tuple[Tensor, Tensor]  # (L, R) of L·Rᵀ: (d_out, k) and (d_in, k)


class Riemannion(PairOptimizer):
    r"""Momentum in the tangent space of W = B·A, its polar factor, and a retraction by SVD (arXiv 2507.12142).

    With orthonormal U and V of the column and row space of W and P(Z) = UUᵀZ + (I − UUᵀ)ZVVᵀ, on √s-scaled factors:

        M ← μ·P(M) + P(G),   W ← the best approximation of rank r of  (1 − η·wd)·W − η·P(polar(M))

    M is kept as it was before its polar factor was taken, as Muon keeps it. Where B = 0, W has no column space, and the
    step is along GVVᵀ. The new factors are B = UΣ and A = Vᵀ, whatever they were: the method does not depend on how W
    is split. The paper's own initialisation is not part of this. From `.grad` alone. State: "momentum_L" (d_out, 2r)
    and "momentum_R" (d_in, 2r).

    Args:
        model: The model with LoRA adapters.
        lr: η ≥ 0, the spectral norm of a step, but for the projection.
        momentum: μ in [0, 1).
        weight_decay: wd ≥ 0, decoupled, on ΔW.
        **adamw: `adamw_lr` and the like, for the other trainable parameters.
    """

    def __init__(
        self, model: nn.Module, lr: float, *, momentum: float = 0.9, weight_decay: float = 0.0, **adamw: Any
    ) -> None:
        in_range("momentum", momentum, 0, 1)
        in_range("weight_decay", weight_decay, 0, float("inf"))
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(model, settings, full_gradient=False, **adamw)

    def propose(self, layer: Layer, state: State, group: Mapping[str, Any]) -> Proposal:
        """Transport the momentum, add the gradient, take the polar factor, and cut the result back."""
        B, A, lr = layer.B, layer.A, group["lr"]
        U, inverse_B = span(B)
        V, inverse_A = span(A.mT)
        across, along = layer.right @ inverse_A, layer.left.mT @ inverse_B  # GV and GᵀU
        P, Q = across - U @ (U.mT @ across), along
        if "momentum_L" in state:
            old_P, old_Q = tangent(state["momentum_L"], state["momentum_R"], U, V)
            P, Q = P + group["momentum"] * old_P, Q + group["momentum"] * old_Q
        L, R = torch.cat([P, U], 1), torch.cat([V, Q], 1)
        step_P, step_Q = tangent(*polar_factors(L, R), U, V)
        kept = 1 - lr * group["weight_decay"]
        left, right = torch.cat([kept * B, step_P, U], 1), torch.cat([A.mT, -lr * V, -lr * step_Q], 1)
        moved = lr * (step_P.abs().amax() + step_Q.abs().amax() + group["weight_decay"] * B.abs().amax()) > 0
        new_B, new_A = cut(left, right, A.shape[0])
        zero = torch.zeros((), dtype=B.dtype, device=B.device)
        return (
            torch.where(moved, new_B - B, zero),
            torch.where(moved, new_A - A, zero),
            {"momentum_L": L, "momentum_R": R},
        )


def span(F: Tensor) -> Factored:
    """Return U (d, r) with orthonormal columns that span those of F, and T (r, r) with FT = U.

    Where F has less than full rank, by rounding, columns of both are zero.
    """
    U, S, Vh = torch.linalg.svd(F, full_matrices=False)
    keep = S > rounding(F) * S.amax()
    inverse = torch.where(keep, 1 / S, 0.0)
    return U * keep, Vh.mT * inverse


def tangent(L: Tensor, R: Tensor, U: Tensor, V: Tensor) -> Factored:
    """Return P and Q of P(L·Rᵀ) = P·Vᵀ + U·Qᵀ, with UᵀP = 0."""
    across = L @ (R.mT @ V)
    return across - U @ (U.mT @ across), R @ (L.mT @ U)


def polar_factors(L: Tensor, R: Tensor) -> Factored:
    """Return factors of polar(L·Rᵀ) without singular vectors whose values are rounding, so that zero gives zero."""
    Q_L, T_L = torch.linalg.qr(L)
    Q_R, T_R = torch.linalg.qr(R)
    core = T_L @ T_R.mT
    W, S, Zh = torch.linalg.svd(core, full_matrices=False)
    keep = S > rounding(L) * S.amax()
    return Q_L @ (W * keep), Q_R @ Zh.mT


def cut(L: Tensor, R: Tensor, rank: int) -> Factored:
    """Return UΣ (d_out, rank) and Vᵀ (rank, d_in) of the best approximation of L·Rᵀ of this rank."""
    Q_L, T_L = torch.linalg.qr(L)
    Q_R, T_R = torch.linalg.qr(R)
    W, S, Zh = torch.linalg.svd(T_L @ T_R.mT, full_matrices=False)
    return Q_L @ (W[:, :rank] * S[:rank]), (Q_R @ Zh[:rank].mT).mT
