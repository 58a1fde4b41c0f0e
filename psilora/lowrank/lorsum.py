"""LoRSum: the rank-r sum of low-rank matrices by alternating least squares (the oracle of every backend).

The mathematics is that of PSI-LoRA (arXiv 2602.16456) and OPLoRA (arXiv 2509.19977); `A` is their Vᵀ, `B` their U.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from psilora.linalg.eigen import EigenMetric
from psilora.linalg.precision import compute_dtype, full_precision
from psilora.linalg.spd import spd_solve

Pair: TypeAlias = tuple[Tensor, Tensor]
Scalar: TypeAlias = float | Tensor
#: A positive diagonal (…, d), an SPD matrix (…, d, d), or one in its eigenvectors.
Metric: TypeAlias = Tensor | EigenMetric


@torch.no_grad()
def lorsum(
    terms: Sequence[Pair],
    coefficients: Sequence[Scalar],
    *,
    num_iters: int = 1,
    prox: Scalar = 0.0,
    metric: Pair | None = None,
    first: str = "A",
) -> Pair:
    """Project Σ_i c_i B_i A_i onto rank r, starting from (B₁, A₁), by `num_iters` rounds of alternating least squares.

    With λ = `prox`, and starting from (Bᵏ, Aᵏ) = (B₁, A₁), each round takes an A-turn and a B-turn:

        Aᵏ ← (BᵏᵀM_BBᵏ + λI)⁻¹ [ λA₁ + c₁(BᵏᵀM_BB₁)A₁ + Σ_{i≥2} c_i (BᵏᵀB_i) A_i M_A⁻¹ ]
        Bᵏ ← [ λB₁ + c₁B₁(A₁M_AAᵏᵀ) + Σ_{i≥2} c_i M_B⁻¹B_i (A_iAᵏᵀ) ] (AᵏM_AAᵏᵀ + λI)⁻¹

    evaluated as increments on (B₁, A₁), so that a zero target change is an exact no-op. Only the terms i ≥ 2 are
    preconditioned by the metric. λ = 0 without a metric is subspace iteration: the error falls as (σ_{r+1}/σ_r)^{2K}.

    Listing 1 of OPLoRA (arXiv 2509.19977) has its pairs in the order (in, out), that is (A_i, B_i). Given as they
    are they raise where d_in ≠ d_out, and are another sum where d_in = d_out, which no shape can tell: turn them. Its
    `lorsum(factors, coefficients, num_iters, lmbd, start_turn)`, which returns (A, B), is:

        B, A = lorsum([(B, A) for A, B in factors], coefficients, num_iters=num_iters, prox=lmbd,
                      first={"in": "A", "out": "B"}[start_turn])

    Args:
        terms: (B_i, A_i) of shapes (…, d_out, k_i) and (…, k_i, d_in), k_i ≥ 1; the first is the pair being updated
            and sets r = k_1. Leading dimensions are batch dimensions. Any real floating dtype and device.
        coefficients: One c_i per term: a number, or a tensor of the batch shape.
        num_iters: K ≥ 0. K = 0 is one simultaneous update of both factors from (B₁, A₁), i.e. preconditioned LoRA.
        prox: λ ≥ 0, a number or a tensor of the batch shape. In an optimizer step it must scale with the step size.
        metric: None (Frobenius) or (M_B, M_A), each a positive diagonal (…, d) or an SPD matrix (…, d, d).
        first: "A" or "B", the factor that is updated first.

    Returns:
        New (B, A) in the dtype of (B₁, A₁). Grams, solves and sums are in fp32 (fp64 for fp64); a Gram that is not
        positive definite is repaired as in `psilora.linalg.spd.spd_solve`. Not differentiable.

    Raises:
        ValueError: A shape does not chain, a value is out of range, or a metric is not positive definite.
        TypeError: A tensor is not of a real floating dtype.
    """
    check_terms(terms, coefficients, num_iters, prox, metric, first)
    base_B, base_A = terms[0]
    dtype = compute_dtype(base_A.dtype)
    batch = torch.broadcast_shapes(*(factor.shape[:-2] for term in terms for factor in term))
    work = [(B.to(dtype).expand(*batch, *B.shape[-2:]), A.to(dtype).expand(*batch, *A.shape[-2:])) for B, A in terms]
    scale = [_batched(c, work[0][0]) for c in coefficients]

    # The transposes leave the products as they are and have BLAS read tall factors, S and X among them, row by row.
    def left(B: Tensor) -> Tensor:  # Σ_{i≥2} c_i (BᵀB_i) A_i
        total = torch.zeros_like(work[0][1])
        for c, (B_i, A_i) in zip(scale[1:], work[1:], strict=True):
            total = total + c * ((B_i.mT @ B).mT @ A_i)
        return total

    def right(A: Tensor) -> Tensor:  # Σ_{i≥2} c_i B_i (A_iAᵀ)
        total = torch.zeros_like(work[0][0])
        for c, (B_i, A_i) in zip(scale[1:], work[1:], strict=True):
            total = total + c * ((A_i @ A.mT).mT @ B_i.mT).mT
        return total

    with full_precision(base_A.device.type):
        weights = None if metric is None else (_expand(metric[0], work[0][0]), _expand(metric[1], work[0][1].mT))
        projection = Projection(*work[0], decay=scale[0] - 1, prox=_batched(prox, work[0][0]), metric=weights)
        if num_iters == 0:
            projection.simultaneous(left(projection.B), right(projection.A))
        for turn in turns(num_iters, first):
            if turn == "A":
                projection.turn_A(left(projection.B))
            else:
                projection.turn_B(right(projection.A))
    return projection.B.to(base_B.dtype), projection.A.to(base_A.dtype)


def turns(num_iters: int, first: str) -> Iterator[str]:
    """Yield the order of the turns, e.g. A, B, A, B for K = 2 and `first` = "A"."""
    order = ("A", "B") if first == "A" else ("B", "A")
    for _ in range(num_iters):
        yield from order


class Projection:
    """One LoRSum in progress: (B₁, A₁) and the increments found so far.

    The caller supplies the thin products of the terms i ≥ 2 with the current factors, so that an optimizer can obtain
    them from activations and share one read of them among several projections. All tensors are in one compute dtype,
    with equal batch dimensions; `decay` = c₁ − 1 and `prox` = λ broadcast against (…, 1, 1). `solve` solves the r×r
    systems as `psilora.linalg.spd.spd_solve` does.

    Attributes:
        step_B, step_A: Bᵏ − B₁ and Aᵏ − A₁; None until the factor's first turn.
        gram_B, gram_A: BᵏᵀM_BBᵏ and AᵏM_AAᵏᵀ as the last A-turn and the last B-turn have used them; None before.
        repaired: number of solves in which a failed pivot had to be repaired, a 0-d int64 tensor.
    """

    def __init__(
        self,
        B: Tensor,
        A: Tensor,
        *,
        decay: Tensor | None,
        prox: Tensor,
        metric: tuple[Metric, Metric] | None = None,
        solve: Callable[[Tensor, Tensor], Pair] = spd_solve,
    ) -> None:
        self.base_B, self.base_A = B, A
        self._B: Tensor | None = B
        self._A: Tensor | None = A
        self.decay, self.prox = decay, prox
        self.metric_B: Metric | None = None if metric is None else metric[0]
        self.metric_A: Metric | None = None if metric is None else metric[1]
        self.step_B: Tensor | None = None
        self.step_A: Tensor | None = None
        self.gram_B: Tensor | None = None
        self.gram_A: Tensor | None = None
        self.repaired = torch.zeros((), dtype=torch.int64, device=A.device)
        self._solve = solve

    @property
    def B(self) -> Tensor:
        """The current Bᵏ, added up when it is first asked for: an optimizer only needs the last step."""
        if self._B is None:
            self._B = self.base_B if self.step_B is None else self.base_B + self.step_B
        return self._B

    @property
    def A(self) -> Tensor:
        """The current Aᵏ, likewise."""
        if self._A is None:
            self._A = self.base_A if self.step_A is None else self.base_A + self.step_A
        return self._A

    def turn_A(self, left: Tensor) -> None:
        """Update A from `left` = Σ_{i≥2} c_i (BᵏᵀB_i) A_i, shape (…, r, d_in)."""
        self.step_A, self._A = self._solve_A(left), None

    def turn_B(self, right: Tensor) -> None:
        """Update B from `right` = Σ_{i≥2} c_i B_i (A_iAᵏᵀ), shape (…, d_out, r)."""
        self.step_B, self._B = self._solve_B(right), None

    def simultaneous(self, left: Tensor, right: Tensor) -> None:
        """Update both factors from (B₁, A₁): K = 0."""
        step_A = self._solve_A(left)
        self.turn_B(right)
        self.step_A, self._A = step_A, None

    def _solve_A(self, left: Tensor) -> Tensor:
        weighted = apply_metric(self.metric_B, self.B)
        rhs = unapply_metric(self.metric_A, left.mT).mT
        change = self._change(weighted, self.base_B, self.step_B)
        if change is not None:
            rhs = (change @ self.base_A).add_(rhs)
        self.gram_B = weighted.mT @ self.B
        return self._spd_solve(self.gram_B, rhs)

    def _solve_B(self, right: Tensor) -> Tensor:
        weighted = apply_metric(self.metric_A, self.A.mT)
        rhs = unapply_metric(self.metric_B, right)
        change = self._change(weighted, self.base_A.mT, None if self.step_A is None else self.step_A.mT)
        if change is not None:
            rhs = (self.base_B @ change.mT).add_(rhs)
        self.gram_A = self.A @ weighted
        return self._spd_solve(self.gram_A, rhs.mT).mT.contiguous()

    def _change(self, weighted: Tensor, base: Tensor, step: Tensor | None) -> Tensor | None:
        """Return (MFᵏ)ᵀ(c₁F₁ − Fᵏ) = decay·(MFᵏ)ᵀF₁ − (MFᵏ)ᵀ·step (…, r, r), or None where it is known to be zero."""
        change = None if step is None else -(weighted.mT @ step)
        if self.decay is None:
            return change
        kept = self.decay * (weighted.mT @ base)
        return kept if change is None else kept + change

    def _spd_solve(self, gram: Tensor, rhs: Tensor) -> Tensor:
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        solution, info = self._solve(gram + self.prox * eye, rhs)
        self.repaired = self.repaired + (info > 0).sum()
        return solution


def apply_metric(metric: Metric | None, factor: Tensor) -> Tensor:
    """Return M·F for F (…, d, r) and M None (identity), a diagonal (…, d), a matrix (…, d, d) or an `EigenMetric`."""
    if metric is None:
        return factor
    if isinstance(metric, EigenMetric):
        return metric.apply(factor)
    return metric @ factor if _is_matrix(metric, factor) else metric.unsqueeze(-1) * factor


def unapply_metric(metric: Metric | None, factor: Tensor) -> Tensor:
    """Return M⁻¹·F, shapes as in `apply_metric`."""
    if metric is None:
        return factor
    if isinstance(metric, EigenMetric):
        return metric.unapply(factor)
    if not _is_matrix(metric, factor):
        return factor / metric.unsqueeze(-1)
    return torch.cholesky_solve(factor, torch.linalg.cholesky_ex(metric)[0])


def _is_matrix(metric: Tensor, factor: Tensor) -> bool:
    return metric.dim() == factor.dim()


def _expand(metric: Tensor, factor: Tensor) -> Tensor:
    """Return the metric of F (…, d, r) in F's dtype with F's batch dimensions: (…, d) or (…, d, d)."""
    batch, size = factor.shape[:-2], factor.shape[-2]
    diagonal = metric.dim() == 1 or metric.shape == (*batch, size)
    return metric.to(factor).expand(*batch, size) if diagonal else metric.to(factor).expand(*batch, size, size)


def _batched(value: Scalar, like: Tensor) -> Tensor:
    """Return a number or batch-shaped tensor as (…, 1, 1) in the dtype and on the device of `like`."""
    tensor = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    return tensor[..., None, None]


def check_terms(
    terms: Sequence[Pair],
    coefficients: Sequence[Scalar],
    num_iters: int,
    prox: Scalar,
    metric: Pair | None,
    first: str,
) -> None:
    """Raise on anything `lorsum` cannot compute with, naming the value and what is allowed."""
    if len(terms) == 0:
        raise ValueError("terms is empty; it must hold at least the pair (B_1, A_1) being updated")
    if len(coefficients) != len(terms):
        raise ValueError(f"got {len(coefficients)} coefficients for {len(terms)} terms; one per term is needed")
    if isinstance(num_iters, bool) or not isinstance(num_iters, int) or num_iters < 0:
        raise ValueError(f"Invalid num_iters={num_iters!r}. Must be an integer >= 0.")
    if not _finite_nonnegative(prox):
        raise ValueError(f"Invalid prox={prox!r}. Must be finite and >= 0.")
    if first not in ("A", "B"):
        raise ValueError(f"Invalid first={first!r}. Must be 'A' or 'B'.")
    for i, (B, A) in enumerate(terms, start=1):
        for name, factor in ((f"B_{i}", B), (f"A_{i}", A)):
            if not factor.is_floating_point():
                raise TypeError(f"{name} has dtype {factor.dtype}; must be a real floating dtype")
            if factor.dim() < 2:
                raise ValueError(f"{name} has shape {tuple(factor.shape)}; must have at least 2 dimensions")
    d_out, d_in = terms[0][0].shape[-2], terms[0][1].shape[-1]
    for i, (B, A) in enumerate(terms, start=1):
        if B.shape[-1] != A.shape[-2]:
            raise ValueError(
                f"rank mismatch in term {i}: B_{i} has shape {tuple(B.shape)}, A_{i} has {tuple(A.shape)}; "
                "B's last dimension must equal A's second to last"
            )
        if B.shape[-2] != d_out or A.shape[-1] != d_in:
            raise ValueError(
                f"term {i} is a {B.shape[-2]}×{A.shape[-1]} matrix; the first term makes it {d_out}×{d_in}"
            )
    if metric is not None:
        batch = torch.broadcast_shapes(*(factor.shape[:-2] for term in terms for factor in term))
        _check_metric(metric[0], "M_B", d_out, batch)
        _check_metric(metric[1], "M_A", d_in, batch)


def _finite_nonnegative(value: Scalar) -> bool:
    if isinstance(value, Tensor):
        return bool(((value >= 0) & torch.isfinite(value)).all())
    return math.isfinite(value) and value >= 0


def _check_metric(metric: Tensor, name: str, size: int, batch: Sequence[int]) -> None:
    if metric.dim() < 1 or metric.shape[-1] != size:
        raise ValueError(f"{name} has shape {tuple(metric.shape)}; must be (…, {size}) or (…, {size}, {size})")
    square = metric.shape[-2:] == (size, size) and metric.shape != (*batch, size)
    diagonal = metric.diagonal(dim1=-2, dim2=-1) if square else metric
    if not bool((diagonal > 0).all()):
        raise ValueError(f"{name} must be positive definite; its smallest diagonal entry is {diagonal.min().item():g}")
    if square and bool(torch.linalg.cholesky_ex(metric.to(compute_dtype(metric.dtype)))[1].any()):
        raise ValueError(f"{name} must be positive definite; its Cholesky factorisation fails")
