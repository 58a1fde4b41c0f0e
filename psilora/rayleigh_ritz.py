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

from psilora.lorsum import Pair, Scalar, check_terms
from psilora.numerics import compute_dtype, full_precision

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

    A round multiplies T twice, as a round of `psilora.lorsum` does::

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
    with full_precision(base_A.device.type):
        target = _Target(terms, coefficients, metric)
        found = search(*target.whitened[0], num_iters=num_iters, first=first)
        try:
            side, factor = next(found)
            while True:
                side, factor = found.send(target.left(factor) if side == "left" else target.right(factor))
        except StopIteration as end:
            new_B, new_A = target.unwhitened(*end.value)
    still = target.still[..., None, None]
    return (
        torch.where(still, base_B, new_B.to(base_B.dtype)),
        torch.where(still, base_A, new_A.to(base_A.dtype)),
    )


def search(B: Tensor, A: Tensor, *, num_iters: int, first: str) -> Generator[tuple[str, Tensor], Tensor, Pair]:
    """Find the new pair for a target T that the caller multiplies; see `ritz`.

    Yields ("left", U) to be sent TᵀU (…, d_in, k), and ("right", V) to be sent T·V (…, d_out, k); returns (B, A).
    What is not finite makes its layer's result NaN instead of an error.
    """
    rank = A.shape[-2]
    start = A.mT
    if first == "A":
        product = yield "left", _basis(B, None)
        start = torch.where((B == 0).flatten(-2).all(-1)[..., None, None], start, product)
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
    X, _, Yt = torch.linalg.svd(new_B.mT @ B + new_A @ A.mT)
    turn = X @ Yt
    return (new_B @ turn).masked_fill(broken, math.nan), (turn.mT @ new_A).masked_fill(broken, math.nan)


class _Target:
    """T in coordinates in which the metric is the identity, as thin products."""

    def __init__(self, terms: Sequence[Pair], coefficients: Sequence[Scalar], metric: Pair | None) -> None:
        dtype = compute_dtype(terms[0][1].dtype)
        device = terms[0][1].device
        batch = torch.broadcast_shapes(*(factor.shape[:-2] for term in terms for factor in term))
        self.root_B: Tensor | None = None if metric is None else _root(metric[0].to(device, dtype), batch)
        self.root_A: Tensor | None = None if metric is None else _root(metric[1].to(device, dtype), batch)
        self.scale = [torch.as_tensor(c, dtype=dtype, device=device).expand(batch) for c in coefficients]
        self.whitened: list[Pair] = []
        self.still = self.scale[0] == 1
        for i, (B, A) in enumerate(terms):
            B, A = (F.to(dtype).expand(*batch, *F.shape[-2:]) for F in (B, A))
            if i:
                nothing = (self.scale[i] == 0) | (B == 0).flatten(-2).all(-1) | (A == 0).flatten(-2).all(-1)
                self.still = self.still & nothing
                self.whitened.append((_solve(self.root_B, B), _solve(self.root_A, A.mT).mT))
            else:
                self.whitened.append((_apply(self.root_B, B), _apply(self.root_A, A.mT).mT))

    def left(self, U: Tensor) -> Tensor:
        """Return TᵀU."""
        parts = [c[..., None, None] * (A.mT @ (B.mT @ U)) for c, (B, A) in zip(self.scale, self.whitened, strict=True)]
        return torch.stack(parts).sum(0)

    def right(self, V: Tensor) -> Tensor:
        """Return T·V."""
        parts = [c[..., None, None] * (B @ (A @ V)) for c, (B, A) in zip(self.scale, self.whitened, strict=True)]
        return torch.stack(parts).sum(0)

    def unwhitened(self, B: Tensor, A: Tensor) -> Pair:
        """Return (B, A) in the weight's own coordinates."""
        return _transposed_solve(self.root_B, B), _transposed_solve(self.root_A, A.mT).mT


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


def _root(metric: Tensor, batch: Sequence[int]) -> Tensor:
    """Return L with M = L·Lᵀ: a column (…, d, 1) for a diagonal, else the lower Cholesky factor (…, d, d)."""
    size = metric.shape[-1]
    if metric.dim() == 1 or metric.shape == (*batch, size):
        return metric.sqrt()[..., None]
    factor: Tensor = torch.linalg.cholesky_ex(metric)[0]
    return factor


def _apply(root: Tensor | None, F: Tensor) -> Tensor:
    """Return Lᵀ·F."""
    if root is None:
        return F
    return root.mT @ F if _is_matrix(root) else root * F


def _solve(root: Tensor | None, F: Tensor) -> Tensor:
    """Return L⁻¹·F."""
    if root is None:
        return F
    return torch.linalg.solve_triangular(root, F, upper=False) if _is_matrix(root) else F / root


def _transposed_solve(root: Tensor | None, F: Tensor) -> Tensor:
    """Return L⁻ᵀ·F."""
    if root is None:
        return F
    return torch.linalg.solve_triangular(root.mT, F, upper=True) if _is_matrix(root) else F / root


def _is_matrix(root: Tensor) -> bool:
    return root.shape[-1] == root.shape[-2]
