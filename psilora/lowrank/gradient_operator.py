"""The gradient G (d_out, d_in) of a bucket of layers as thin products; G itself is never formed.

A gradient answers two questions about factors of L stacked layers: `left(B)` = BᵀG and `right(A)` = GAᵀ. Everything
is in the weight's own units: G = ∂L/∂W, whatever the LoRA scaling.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from psilora.linalg.spd import fastest_spd_solve, relative_ridge, spd_solve

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
        self._groups = _sharing(chunks)

    def left(self, B: Tensor) -> Tensor:
        """Return BᵀG by one read of S and X."""
        self.reads += 1
        return self._scaled(B, self._left_parts)

    def right(self, A: Tensor) -> Tensor:
        """Return GAᵀ by one read of X and S."""
        self.reads += 1
        return self._scaled(A, self._right_parts).mT

    def _scaled(self, factors: Tensor, parts: Callable[[list[int], int, Tensor], list[Tensor]]) -> Tensor:
        """Sum the calls of each group of layers and return c_l times the products, (L, k, d) with d the long side."""
        products: list[Tensor | None] = [None] * len(self.chunks)
        for members in self._groups:
            for call in range(len(self.chunks[members[0]])):
                for i, part in zip(members, parts(members, call, factors), strict=True):
                    known = products[i]
                    products[i] = part if known is None else known.add_(part)
        done = [product for product in products if product is not None]
        if len(done) < len(products):
            raise RuntimeError("a layer without captured calls reached the exact gradient")
        return torch.stack(done).mul_(self.scale[:, None, None])

    def _left_parts(self, members: list[int], call: int, B: Tensor) -> list[Tensor]:
        """(S_l B_l)ᵀX of layers that read the same X, as one product with X."""
        narrow = [self.chunks[i][call][1].to(B.dtype) @ B[i] for i in members]
        x = self.chunks[members[0]][call][0].to(B.dtype)
        product = (torch.cat(narrow, 1) if len(narrow) > 1 else narrow[0]).mT @ x
        return list(product.split(B.shape[-1]))

    def _right_parts(self, members: list[int], call: int, A: Tensor) -> list[Tensor]:
        """(X A_lᵀ)ᵀS_l of layers that read the same X: S as the right operand is what BLAS runs fastest."""
        rows = A[members].flatten(0, 1) if len(members) > 1 else A[members[0]]
        narrow = self.chunks[members[0]][call][0].to(A.dtype) @ rows.mT
        return [
            P.mT @ self.chunks[i][call][1].to(A.dtype)
            for i, P in zip(members, narrow.split(A.shape[-2], 1), strict=True)
        ]


def _sharing(chunks: Sequence[Chunks]) -> list[list[int]]:
    """Group layers, q and v for one, whose calls captured the very same X."""
    groups: dict[object, list[int]] = {}
    for i, calls in enumerate(chunks):
        key = tuple((x.data_ptr(), x.shape, x.stride(), x.dtype) for x, _ in calls)
        groups.setdefault(key, []).append(i)
    return list(groups.values())


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
        self.Z = fastest_spd_solve(relative_ridge(B.mT @ B), left)[0]
        self.H = torch.baddbmm(right, B, self.Z @ A.mT, alpha=-1)
        self.R = fastest_spd_solve(relative_ridge(A @ A.mT), A)[0]

    def left(self, B: Tensor) -> Tensor:
        """Return BᵀG_T."""
        return ((B.mT @ self.B) @ self.Z).baddbmm_(B.mT @ self.H, self.R)

    def right(self, A: Tensor) -> Tensor:
        """Return G_TAᵀ."""
        return (self.B @ (self.Z @ A.mT)).baddbmm_(self.H, self.R @ A.mT)

    def squares(self) -> tuple[Tensor, Tensor]:
        """Return diag(G_TᵀG_T) (L, d_in) and diag(G_TG_Tᵀ) (L, d_out)."""
        P, Q = torch.cat([self.B, self.H], -1), torch.cat([self.Z, self.R], -2)
        columns = (Q * ((P.mT @ P) @ Q)).sum(-2)
        rows = (P * (P @ (Q @ Q.mT))).sum(-1)
        return columns.clamp_min(0), rows.clamp_min(0)

    def products(self) -> tuple[Tensor, Tensor]:
        """Return G_TᵀG_T (L, d_in, d_in) and G_TG_Tᵀ (L, d_out, d_out)."""
        P, Q = torch.cat([self.B, self.H], -1), torch.cat([self.Z, self.R], -2)
        return Q.mT @ ((P.mT @ P) @ Q), P @ ((Q @ Q.mT) @ P.mT)


def activation_blocks(chunks: Chunks, dtype: torch.dtype, block: int = 1024) -> Iterator[Tensor]:
    """Yield `block` rows of G = Σ_j S_jᵀX_j at a time."""
    for start in range(0, chunks[0][1].shape[1], block):
        products = [s[:, start : start + block].to(dtype).mT @ x.to(dtype) for x, s in chunks]
        yield functools.reduce(Tensor.add_, products)


def activation_squares(chunks: Chunks, dtype: torch.dtype, block: int = 1024) -> tuple[Tensor, Tensor]:
    """Return diag(GᵀG) (d_in,) and diag(GGᵀ) (d_out,) of G = Σ_j S_jᵀX_j, without holding all of G.

    Costs 2·N·d_in·d_out operations: `block` rows of G are formed at a time.
    """
    columns = chunks[0][0].new_zeros(chunks[0][0].shape[1], dtype=dtype)
    rows = []
    for part in activation_blocks(chunks, dtype, block):
        part.square_()
        columns += part.sum(0)
        rows.append(part.sum(1))
    return columns, torch.cat(rows)


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
