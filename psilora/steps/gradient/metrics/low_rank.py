"""The low-rank K-FAC metric (experimental): D = F·Fᵀ + μ·I instead of the whole running average.

F (d, k) has orthogonal columns. With C the statistics of a step, H = β₂·F·Fᵀ + (1−β₂)·C is cut to rank k by one round
of subspace iteration from F's own directions and as many fixed random ones, in the symmetric form that stays positive
(Nyström: H·Q (QᵀHQ)⁺ QᵀH, exact where H has at most 2k directions). What is cut off goes evenly to all others:

    H ≈ U·Θ·Uᵀ,  ν = (tr H − tr Θ)/(d − k);   F ← U·(Θ − ν)₊^½,  μ ← β₂·μ + ν

so that the trace of D is the running average of tr C (larger, where a Θ lies below ν). OPLoRA (arXiv 2509.19977,
appendix B) proposes a low-rank running average by LoRSum and says no more; without μ the damping alone would scale what
lies outside of F, by δ^−γ.
"""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from psilora.capture.storage import column_squares
from psilora.linalg.eigen import EigenMetric, eigh
from psilora.steps.gradient.batch import GradientBatch
from psilora.steps.gradient.metrics.base import Numbers, Updated
from psilora.steps.gradient.metrics.diagonal import raised
from psilora.steps.gradient.metrics.statistics import normalised, row_counts, square_scale


def directions(F: Tensor) -> Tensor:
    """Return orthonormal Q (L, d, min(2k, d)) that spans the columns of F (L, d, k); the others are always the same.

    They come from a fixed pseudo-random sequence, so that every process and every run multiplies with the same.
    """
    layers, d, k = F.shape
    size = torch.linalg.vector_norm(F, dim=1, keepdim=True)
    generator = torch.Generator().manual_seed(0)
    others = torch.randn(d, min(k, d - k), generator=generator, dtype=torch.float64, device="cpu").to(F.device)
    own = (F / torch.where(size == 0, 1.0, size)).double()
    Q: Tensor = torch.linalg.qr(torch.cat([own, others.expand(layers, -1, -1)], -1))[0]
    return Q.to(F.dtype)


def second_moments(Q: Tensor, rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return ΣXᵀ(XQ) (d, q) and Σ‖X‖² (1, 1) over the calls' X (N, d), for Q (d, q), in Q's dtype."""
    product, trace = torch.zeros_like(Q), Q.new_zeros(1, 1)
    for x in rows:
        x = x.to(Q.dtype)
        product += x.mT @ (x @ Q)
        trace += column_squares(x, Q.dtype).sum()
    return product, trace


def truncated(
    F: Tensor, rest: Tensor, Q: Tensor, product: Tensor, trace: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the new (F, μ), (L, d, k) and (L, 1), in fp64 inside.

    Args:
        F: The old one.
        rest: The old μ.
        Q: From `directions`, (L, d, q).
        product: C·Q of the new statistics C, (L, d, q).
        trace: tr C, (L, 1, 1).
        beta: β₂, (L, 1, 1).
    """
    d, k, dtype = F.shape[1], F.shape[2], F.dtype
    F, rest, Q, product, trace, beta = (t.double() for t in (F, rest, Q, product, trace, beta))
    Y = beta * (F @ (F.mT @ Q)) + (1 - beta) * product
    core = Q.mT @ Y
    values, vectors = eigh((core + core.mT) / 2)
    # What the rounding of the products can make of a direction that is not there.
    seen = values > 8 * Q.shape[-1] * torch.finfo(dtype).eps * values[:, -1:]
    Z = Y @ (vectors * torch.where(seen, values, 1.0).rsqrt().mul(seen)[:, None, :])
    theta, turn = (t[..., -k:] for t in eigh(Z.mT @ Z))
    theta = theta.clamp_min(0)
    total = beta * F.square().sum((1, 2), keepdim=True) + (1 - beta) * trace
    cut = (total[:, :, 0] - theta.sum(1, keepdim=True)).clamp_min(0) / max(1, d - k)
    kept = (theta - cut).clamp_min(0) / torch.where(theta == 0, 1.0, theta)
    return ((Z @ turn) * kept.sqrt()[:, None, :]).to(dtype), (beta[:, :, 0] * rest + cut).to(dtype)


def raised_low_rank(F: Tensor, rest: Tensor, correction: Tensor | None, damping: Tensor, power: Tensor) -> EigenMetric:
    """Return M = ((F·Fᵀ + μI)/(1 − β₂ᵗ) + δI)^γ for F (L, d, k) with orthogonal columns; all others are (L, 1)."""
    squares = F.square().sum(1)
    size = squares.sqrt()
    vectors = F / torch.where(size == 0, 1.0, size)[:, None, :]
    return EigenMetric(
        vectors, raised(squares + rest, correction, damping, power), raised(rest, correction, damping, power)
    )


class LowRank:
    """D = F·Fᵀ + μ·I: F (d, k) as "metric" and μ (1,) as "metric_rest"; see `Form` in base.py."""

    def shape(self, size: int, rank: int) -> tuple[int, ...]:
        """See `Form`."""
        return (size, min(rank, size))

    def initial(
        self, size: int, rank: int, start: float, *, dtype: torch.dtype, device: torch.device
    ) -> dict[str, Tensor]:
        """See `Form`."""
        rest = torch.full((1,), start, dtype=dtype, device=device)
        return {"metric": torch.zeros(self.shape(size, rank), dtype=dtype, device=device), "metric_rest": rest}

    def update(
        self, batch: GradientBatch, statistics: str, numbers: Numbers
    ) -> Generator[list[Tensor], list[Tensor], Updated]:
        """See `Form`; from products of X and S with a few directions of each layer."""
        (F_B, F_A), (rest_B, rest_A) = batch.states("metric"), batch.states("metric_rest")
        Q_B, Q_A = directions(F_B), directions(F_A)
        chunks = [p.record.chunks if p.record is not None else [] for p in batch.problems]
        sums_A = [second_moments(Q, [x for x, _ in calls]) for Q, calls in zip(Q_A, chunks, strict=True)]
        sums_B = [second_moments(Q, [s for _, s in calls]) for Q, calls in zip(Q_B, chunks, strict=True)]
        (moved_A, trace_A), (moved_B, trace_B) = (
            (torch.stack([product for product, _ in sums]), torch.stack([trace for _, trace in sums]))
            for sums in (sums_A, sums_B)
        )
        moved_A, trace_A, moved_B, trace_B, rows = yield [moved_A, trace_A, moved_B, trace_B, row_counts(batch)]
        rows, scale, reduction = rows.clamp_min(1), square_scale(batch), batch.options.loss_reduction
        moved_A, moved_B = normalised(statistics, moved_A, moved_B * scale, rows, reduction)
        trace_A, trace_B = normalised(statistics, trace_A, trace_B * scale, rows, reduction)
        beta = numbers.beta[:, :, None]
        F_B, rest_B = truncated(F_B, rest_B, Q_B, moved_B, trace_B, beta)
        F_A, rest_A = truncated(F_A, rest_A, Q_A, moved_A, trace_A, beta)
        M_B = raised_low_rank(F_B, rest_B, numbers.correction, numbers.damping, numbers.power)
        M_A = raised_low_rank(F_A, rest_A, numbers.correction, numbers.damping, numbers.power)
        return Updated((M_B, M_A), F_B, F_A, rest_B, rest_A)
