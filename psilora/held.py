"""Gradients of a bucket of layers that were kept in another form than X and S; see `psilora.gradient`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from psilora.numerics import spd_solve


class DenseGradient:
    """G_l = c_l · M_l for dense matrices M_l = S_BᵀX.

    Args:
        matrices: Per layer, (d_out, d_in) in the compute dtype; they are not stacked.
        scale: c, (L,): 1/s times any rescaling of the loss.
    """

    def __init__(self, matrices: Sequence[Tensor], scale: Tensor) -> None:
        self.matrices = matrices
        self.scale = scale[:, None, None]

    def left(self, B: Tensor) -> Tensor:
        """Return BᵀG, (L, k, d_in), for B (L, d_out, k)."""
        return torch.stack([B[i].mT @ matrix for i, matrix in enumerate(self.matrices)]) * self.scale

    def right(self, A: Tensor) -> Tensor:
        """Return GAᵀ, (L, d_out, k), for A (L, k, d_in)."""
        return torch.stack([matrix @ A[i].mT for i, matrix in enumerate(self.matrices)]) * self.scale


class CrossGradient:
    """What a step with K = 1, A first, without momentum and metric asks of G, from products of the first factors.

    With Σ = BᵀB + λI the A-turn is A⁺ = A + Σ⁻¹(δ·BᵀB)·A − ηΣ⁻¹(1−τ)·L for L = BᵀG and decay δ = −η·wd, so that

        G·A⁺ᵀ = R + R·(Σ⁻¹δBᵀB)ᵀ − η(1−τ)·H·Σ⁻¹   with R = GAᵀ and H = G·Lᵀ,

    none of which depends on η, λ or a clip factor other than by a scale: they can be formed inside backward.

    Args:
        left, right, cross: L (L, r, d_in), R and H (L, d_out, r), of the √s-scaled factors.
        B: √s·B (L, d_out, r).
        rate: −η(1−τ), (L, 1, 1).
        prox: λ, (L, 1, 1).
        decay: δ, (L, 1, 1), or None for 0.
    """

    def __init__(
        self, left: Tensor, right: Tensor, cross: Tensor, *, B: Tensor, rate: Tensor, prox: Tensor, decay: Tensor | None
    ) -> None:
        self._left = left
        eye = torch.eye(B.shape[-1], dtype=B.dtype, device=B.device)
        gram = B.mT @ B
        change, _ = spd_solve(gram + prox * eye, rate * eye)
        self._right = right + cross @ change.mT
        if decay is not None:
            kept, _ = spd_solve(gram + prox * eye, decay * gram)
            self._right = self._right + right @ kept.mT

    def left(self, B: Tensor) -> Tensor:
        """Return BᵀG for the first B, the only one it can be asked for."""
        return self._left

    def right(self, A: Tensor) -> Tensor:
        """Return GAᵀ for the A that the first turn arrives at, the only one it can be asked for."""
        return self._right
