"""Rayleigh–Ritz instead of alternating least squares: the best rank-r matrix in the span of all inner iterates.

ALS keeps its last iterate only. The same products with the target, kept together, span a block Krylov space, in which a
small singular value decomposition finds the optimum: at equal numbers of products it is never worse, and it converges
much faster where the singular values decay.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from psilora.linalg.eigen import EigenMetric
from psilora.linalg.precision import compute_dtype, full_precision
from psilora.lowrank.lorsum import Metric, Pair, Scalar, check_terms, turns

#: Directions of a block that keep less than this, in units of √eps of the dtype, outside of the basis are left out.
NEGLIGIBLE = 4.0


@torch.no_grad()
def ritz(
    terms: Sequence[Pair],
    coefficients: Sequence[Scalar],
    *,
    num_iters: int = 1,
    metric: Pair | None = None,
    first: str = "A",
) -> Pair:
    """Project T = Σ_i c_i B_i A_i onto rank r within the block Krylov space of `num_iters` rounds from B₁.

    A round multiplies T twice, as a round of `psilora.lorsum` does:

        V ← orthonormal basis of [V, TᵀU],  U ← orthonormal basis of T·(new part of V)       U = B₁ at first, V empty

    and at the end T·V = P Σ Qᵀ gives B·A = P_r Σ_r (V Q_r)ᵀ, the best approximation of T·V·Vᵀ. New directions that
    rounding hides are left out of the basis. With a metric (M_B, M_A) the terms i ≥ 2 are preconditioned and distances
    measured as in F-LoRSum. Where B₁ = 0, A₁ takes its place; where T = B₁A₁, the result is (B₁, A₁) bit for bit.

    Args:
        terms: (B_i, A_i) of shapes (…, d_out, k_i) and (…, k_i, d_in); the first sets r = k_1. As in `lorsum`.
        coefficients: One c_i per term: a number, or a tensor of the batch shape.
        num_iters: K ≥ 1.
        metric: None (Frobenius) or (M_B, M_A), each a positive diagonal (…, d) or an SPD matrix (…, d, d).
        first: "A" starts from U = B₁; "B" from V = the row space of A₁, with one product less.

    Returns:
        New (B, A) in the dtype of (B₁, A₁): of equal norm in every singular direction, and turned as near to the old
        pair as such factors can be. Computed in fp32 (fp64 for fp64). Not differentiable; waits for the device.

    Raises:
        ValueError: A shape does not chain, a value is out of range, or a metric is not positive definite.
        TypeError: A tensor is not of a real floating dtype.
    """
    check_terms(terms, coefficients, num_iters, 0.0, metric, first)
    if num_iters < 1:
        raise ValueError(f"Invalid num_iters={num_iters}. Must be >= 1.")
    base_B, base_A = terms[0]
    dtype, device = compute_dtype(base_A.dtype), base_A.device
    batch = torch.broadcast_shapes(*(factor.shape[:-2] for term in terms for factor in term))
    pairs = [(B.to(dtype).expand(*batch, *B.shape[-2:]), A.to(dtype).expand(*batch, *A.shape[-2:])) for B, A in terms]
    scale = [torch.as_tensor(c, dtype=dtype, device=device).expand(batch)[..., None, None] for c in coefficients]
    others = list(zip(scale[1:], pairs[1:], strict=True))
    weights = None if metric is None else (metric[0].to(device, dtype), metric[1].to(device, dtype))
    zero_B, zero_A = (torch.zeros_like(factor) for factor in pairs[0])
    with full_precision(device.type):
        projection = RitzProjection(*pairs[0], num_iters=num_iters, first=first, kept=scale[0], metric=weights)
        for turn in turns(num_iters, first):
            factor = projection.factor
            if factor is None:
                break
            if turn == "A":
                projection.turn_A(sum((c * ((factor.mT @ B) @ A) for c, (B, A) in others), zero_A))
            else:
                projection.turn_B(sum((c * (B @ (A @ factor.mT)) for c, (B, A) in others), zero_B))
    still = scale[0] == 1
    for c, (B, A) in others:
        still = still & ((c == 0) | _vanishes(B) | _vanishes(A))
    return (
        torch.where(still, base_B, projection.B.to(base_B.dtype)),
        torch.where(still, base_A, projection.A.to(base_A.dtype)),
    )


class RitzProjection:
    """One Rayleigh–Ritz in progress, for callers who supply the products, as in `psilora.lowrank.lorsum.Projection`.

    Turns are those of `psilora.lowrank.lorsum.turns`, the last of which is not needed with `first` = "B". Works in
    coordinates in which the metric is the identity. What is not finite makes its layer's result NaN, not an error.

    Args:
        B, A: (B₁, A₁), (…, d_out, r) and (…, r, d_in), in the compute dtype.
        num_iters, first, metric: As in `ritz`.
        kept: c₁, broadcast against (…, 1, 1); None for 1.

    Attributes:
        factor: What the coming turn multiplies the terms i ≥ 2 with, U (…, d_out, k) for an A-turn and V (…, k, d_in)
            for a B-turn; None once the new pair is found.
        B, A: The new pair; before it is found, the old one.
    """

    def __init__(
        self,
        B: Tensor,
        A: Tensor,
        *,
        num_iters: int,
        first: str,
        kept: Tensor | None = None,
        metric: tuple[Metric, Metric] | None = None,
    ) -> None:
        self.B, self.A, self._kept = B, A, kept
        self._root_B = None if metric is None else _root(metric[0], B.shape[:-2])
        self._root_A = None if metric is None else _root(metric[1], A.shape[:-2])
        self._base = (_apply(self._root_B, B), _apply(self._root_A, A.mT).mT)
        self._search = search(*self._base, num_iters=num_iters, first=first)
        self._ask(*next(self._search))

    def turn_A(self, left: Tensor) -> None:
        """Go on with `left` = Σ_{i≥2} c_i (UᵀB_i) A_i, (…, k, d_in)."""
        B, A = self._base
        self._answer(_solve(self._root_A, left.mT), A.mT @ (B.mT @ self._asked))

    def turn_B(self, right: Tensor) -> None:
        """Go on with `right` = Σ_{i≥2} c_i B_i (A_iVᵀ), (…, d_out, k)."""
        B, A = self._base
        self._answer(_solve(self._root_B, right), B @ (A @ self._asked))

    def _ask(self, side: str, asked: Tensor) -> None:
        self._asked = asked
        factor = _transposed_solve(self._root_B if side == "left" else self._root_A, asked)
        self.factor: Tensor | None = factor if side == "left" else factor.mT

    def _answer(self, product: Tensor, own: Tensor) -> None:
        try:
            self._ask(*self._search.send(product + (own if self._kept is None else self._kept * own)))
        except StopIteration as end:
            B, A = end.value
            self.B, self.A = _transposed_solve(self._root_B, B), _transposed_solve(self._root_A, A.mT).mT
            self.factor = None


def search(B: Tensor, A: Tensor, *, num_iters: int, first: str) -> Generator[tuple[str, Tensor], Tensor, Pair]:
    """Find the new pair for a target T that the caller multiplies; see `ritz`.

    Yields ("left", U) to be sent TᵀU (…, d_in, k), and ("right", V) to be sent T·V (…, d_out, k); returns (B, A).
    """
    rank = A.shape[-2]
    start = A.mT
    if first == "A":
        product = yield "left", _basis(B, None)
        start = torch.where(_vanishes(B), start, product)
    V = _basis(start, None)
    TV = yield "right", V
    for _ in range(num_iters - 1):
        product = yield "left", _basis(TV[..., -rank:], None)
        block = _basis(product, V)
        product = yield "right", block
        V, TV = torch.cat([V, block], -1), torch.cat([TV, product], -1)
    broken = ~torch.isfinite(TV).flatten(-2).all(-1)[..., None, None]
    P, sigma, Qt = torch.linalg.svd(TV.masked_fill(broken, 0.0), full_matrices=False)
    root = _first(sigma, rank).sqrt()
    new_B, new_A = _first(P, rank) * root[..., None, :], root[..., None] * (V @ _first(Qt.mT, rank)).mT
    X, _, Yt = torch.linalg.svd((new_B.mT @ B + new_A @ A.mT).masked_fill(broken, 0.0))
    turn = X @ Yt
    return (new_B @ turn).masked_fill(broken, math.nan), (turn.mT @ new_A).masked_fill(broken, math.nan)


def _vanishes(F: Tensor) -> Tensor:
    """Whether a factor is 0, (…, 1, 1)."""
    return (F == 0).flatten(-2).all(-1)[..., None, None]


def _basis(block: Tensor, V: Tensor | None) -> Tensor:
    """Return an orthonormal basis (…, d, k) of what `block` (…, d, k) adds to V; columns are 0 for what it does not."""
    size, count = torch.linalg.matrix_norm(block, keepdim=True), block.shape[-1]
    block = block / torch.where(size == 0, 1.0, size)
    threshold = NEGLIGIBLE * torch.finfo(block.dtype).eps ** 0.5
    for _ in range(1 if V is None else 2):  # a second time, for what the first left by rounding
        if V is not None:
            block = block - V @ (V.mT @ block)
        U, sigma, _ = torch.linalg.svd(torch.where(torch.isfinite(block), block, 0.0), full_matrices=False)
        block = _first(U * (sigma > threshold)[..., None, :], count)
    return block


def _first(values: Tensor, count: int) -> Tensor:
    """Return the first `count` entries of the last dimension, filled up with zeros where there are fewer."""
    values = values[..., :count]
    return torch.nn.functional.pad(values, (0, count - values.shape[-1]))


def _root(metric: Metric, batch: Sequence[int]) -> Metric:
    """Return L with M = L·Lᵀ: a column (…, d, 1) for a diagonal, M^½ in its eigenvectors, or a Cholesky factor."""
    if isinstance(metric, EigenMetric):
        return metric.root()
    size = metric.shape[-1]
    if metric.dim() == 1 or metric.shape == (*batch, size):
        return metric.sqrt()[..., None]
    factor: Tensor = torch.linalg.cholesky_ex(metric)[0]
    return factor


def _apply(root: Metric | None, F: Tensor) -> Tensor:
    """Return Lᵀ·F."""
    if root is None or isinstance(root, EigenMetric):
        return F if root is None else root.apply(F)
    return root.mT @ F if _is_matrix(root) else root * F


def _solve(root: Metric | None, F: Tensor) -> Tensor:
    """Return L⁻¹·F."""
    if root is None or isinstance(root, EigenMetric):
        return F if root is None else root.unapply(F)
    return torch.linalg.solve_triangular(root, F, upper=False) if _is_matrix(root) else F / root


def _transposed_solve(root: Metric | None, F: Tensor) -> Tensor:
    """Return L⁻ᵀ·F."""
    if root is None or isinstance(root, EigenMetric):
        return F if root is None else root.unapply(F)
    return torch.linalg.solve_triangular(root.mT, F, upper=True) if _is_matrix(root) else F / root


def _is_matrix(root: Tensor) -> bool:
    return root.shape[-1] == root.shape[-2]
