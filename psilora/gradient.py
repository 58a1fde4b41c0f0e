"""The gradient G (d_out, d_in) of a bucket of layers as thin products; G itself is never formed.

A gradient answers two questions about factors of L stacked layers: `left(B)` = BᵀG and `right(A)` = GAᵀ. Everything
is in the weight's own units: G = ∂L/∂W, whatever the LoRA scaling.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from psilora.numerics import relative_ridge, spd_solve

Chunks = Sequence[tuple[Tensor, Tensor]]


class Gradient(Protocol):
    """Thin products of the gradients of L layers with stacked factors."""

    def left(self, B: Tensor) -> Tensor:
        """Return BᵀG, (L, k, d_in), for B (L, d_out, k)."""
        ...

    def right(self, A: Tensor) -> Tensor:
        """Return GAᵀ, (L, d_out, k), for A (L, k, d_in)."""
        ...


class ActivationGradient:
    """G_l = c_l · Σ_j S_jᵀX_j over the captured calls j of each layer l: the exact gradient, G = SᵀX.

    Args:
        chunks: Per layer, the captured (X_j, S_j) of shapes (N_j, d_in) and (N_j, d_out), any floating dtype.
        scale: c, (L,), in the compute dtype: 1/s times any rescaling of the loss.

    Attributes:
        reads: Number of passes made over all of X and S so far.
    """

    def __init__(self, chunks: Sequence[Chunks], scale: Tensor) -> None:
        self.chunks = chunks
        self.scale = scale
        self.reads = 0

    def left(self, B: Tensor) -> Tensor:
        """Return BᵀG by one read of S and X."""
        self.reads += 1
        products = [
            _sum((s.to(B.dtype) @ B[i]).mT @ x.to(B.dtype) for x, s in chunks) for i, chunks in enumerate(self.chunks)
        ]
        return torch.stack(products) * self.scale[:, None, None]

    def right(self, A: Tensor) -> Tensor:
        """Return GAᵀ by one read of X and S."""
        self.reads += 1
        products = [
            _sum(s.to(A.dtype).mT @ (x.to(A.dtype) @ A[i].mT) for x, s in chunks)
            for i, chunks in enumerate(self.chunks)
        ]
        return torch.stack(products) * self.scale[:, None, None]


def _sum(products: Iterable[Tensor]) -> Tensor:
    total: Tensor | None = None
    for product in products:
        total = product if total is None else total.add_(product)
    if total is None:
        raise RuntimeError("a layer without captured calls reached the exact gradient")
    return total


class TangentGradient:
    """The projection of G on the tangent space at (B, A), from the LoRA gradients alone.

    G_T = P_B G + G P_A − P_B G P_A with P_B = B(BᵀB)⁺Bᵀ, P_A = Aᵀ(AAᵀ)⁺A, held as the low-rank sum

        G_T = B·[(BᵀB)⁺BᵀG] + [GAᵀ − B(BᵀB)⁺(BᵀG)Aᵀ]·(AAᵀ)⁺A.

    Args:
        B, A: (L, d_out, r) and (L, r, d_in).
        left, right: BᵀG (L, r, d_in) and GAᵀ (L, d_out, r).
    """

    def __init__(self, B: Tensor, A: Tensor, left: Tensor, right: Tensor) -> None:
        self.B = B
        self.Z = spd_solve(relative_ridge(B.mT @ B), left)[0]
        self.H = right - B @ (self.Z @ A.mT)
        self.R = spd_solve(relative_ridge(A @ A.mT), A)[0]

    def left(self, B: Tensor) -> Tensor:
        """Return BᵀG_T."""
        return (B.mT @ self.B) @ self.Z + (B.mT @ self.H) @ self.R

    def right(self, A: Tensor) -> Tensor:
        """Return G_TAᵀ."""
        return self.B @ (self.Z @ A.mT) + self.H @ (self.R @ A.mT)

    def squares(self) -> tuple[Tensor, Tensor]:
        """Return diag(G_TᵀG_T) (L, d_in) and diag(G_TG_Tᵀ) (L, d_out)."""
        P, Q = torch.cat([self.B, self.H], -1), torch.cat([self.Z, self.R], -2)
        columns = (Q * ((P.mT @ P) @ Q)).sum(-2)
        rows = (P * (P @ (Q @ Q.mT))).sum(-1)
        return columns.clamp_min(0), rows.clamp_min(0)


def activation_squares(chunks: Chunks, dtype: torch.dtype, block: int = 1024) -> tuple[Tensor, Tensor]:
    """Return diag(GᵀG) (d_in,) and diag(GGᵀ) (d_out,) of G = Σ_j S_jᵀX_j, without holding all of G.

    Costs 2·N·d_in·d_out operations: `block` rows of G are formed at a time.
    """
    d_in, d_out = chunks[0][0].shape[1], chunks[0][1].shape[1]
    columns = chunks[0][0].new_zeros(d_in, dtype=dtype)
    rows = []
    for start in range(0, d_out, block):
        part = _sum(s[:, start : start + block].to(dtype).mT @ x.to(dtype) for x, s in chunks).square_()
        columns += part.sum(0)
        rows.append(part.sum(1))
    return columns, torch.cat(rows)
