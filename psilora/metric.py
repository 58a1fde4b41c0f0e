"""K-FAC and Shampoo metrics, diagonal and dense: running averages of statistics, damped and raised to a power."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from psilora.capture import Record
from psilora.eigenmetric import EigenMetric, eigh
from psilora.gradient import activation_squares
from psilora.holdings import Dense
from psilora.problem import Problem


def metric_shape(size: int, form: str | None, rank: int) -> tuple[int, ...]:
    """Return the shape of the state "metric": D (d,), dense (d, d), or of a low-rank D = F·Fᵀ + μI F (d, k)."""
    if form == "diagonal":
        return (size,)
    return (size, size if form == "dense" else min(rank, size))


def initial_metric(
    size: int, bias_correction: bool, *, dtype: torch.dtype, device: torch.device, form: str | None, rank: int
) -> dict[str, Tensor]:
    """Return the state of a running average that starts at 0 with bias correction, else at 1 (I), as published.

    "metric", of `metric_shape`, and for a low-rank one "metric_rest", μ (1,).
    """
    start, shape = 0.0 if bias_correction else 1.0, metric_shape(size, form, rank)
    if form == "low-rank":
        rest = torch.full((1,), start, dtype=dtype, device=device)
        return {"metric": torch.zeros(shape, dtype=dtype, device=device), "metric_rest": rest}
    D = torch.full((size,), start, dtype=dtype, device=device)
    return {"metric": torch.diag(D) if form == "dense" else D}


def layer_squares(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the sums behind one layer's statistics, before any scale: (for D_A (d_in,), for D_B (d_out,)).

    K-FAC: Σ_n x_n² and Σ_n (S_B)_n². Shampoo: diag(GᵀG) and diag(GGᵀ) for G = S_BᵀX.
    """
    record = _record(problem)
    if problem.options.statistics == "shampoo":
        if isinstance(record.held, Dense):
            (matrix,) = record.held.tensors()
            return matrix.square().sum(0), matrix.square().sum(1)
        return activation_squares(record.chunks, dtype)
    if record.sum_x2 is not None and record.sum_s2 is not None:
        return record.sum_x2, record.sum_s2
    x2 = _total([x.to(dtype).square().sum(0) for x, _ in record.chunks])
    s2 = _total([s.to(dtype).square().sum(0) for _, s in record.chunks])
    return x2, s2


def layer_products(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the sums behind one layer's dense statistics: (for D_A (d_in, d_in), for D_B (d_out, d_out)).

    K-FAC: XᵀX and S_BᵀS_B. Shampoo: GᵀG and GGᵀ for G = S_BᵀX, which is formed.
    """
    record = _record(problem)
    if problem.options.statistics == "shampoo":
        if isinstance(record.held, Dense):
            (matrix,) = record.held.tensors()
        else:
            matrix = _total([s.to(dtype).mT @ x.to(dtype) for x, s in record.chunks])
        return matrix.mT @ matrix, matrix @ matrix.mT
    if record.sum_x2 is not None and record.sum_s2 is not None:
        return record.sum_x2, record.sum_s2
    x2 = _total([x.to(dtype).mT @ x.to(dtype) for x, _ in record.chunks])
    s2 = _total([s.to(dtype).mT @ s.to(dtype) for _, s in record.chunks])
    return x2, s2


def _record(problem: Problem) -> Record:
    """The record of a problem, whose sums, if it has any, are those of the metric."""
    record, dims = problem.record, 2 if problem.options.form == "dense" else 1
    if record is None or (record.sum_x2 is not None and record.sum_x2.dim() != dims):
        raise RuntimeError(
            f"{problem.pair.name}: the statistics of metric={problem.options.metric!r} were not captured; build the "
            "optimizer with the metric that it is to use or to load"
        )
    return record


def _total(parts: list[Tensor]) -> Tensor:
    return functools.reduce(Tensor.add_, parts)


def normalised(kind: str, squares_A: Tensor, squares_B: Tensor, rows: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """Return (new D_A, new D_B) from the sums of the true X, S and G; `rows` = N broadcasts against them.

    For a mean-reduced loss S carries 1/N: K-FAC (1/N)Σx² and NΣs²; Shampoo N·diag(GᵀG) and N·diag(GGᵀ).
    For a sum the factor N on the gradient's side becomes 1/N.
    """
    gradient_side = rows if reduction == "mean" else 1 / rows
    return squares_A * (1 / rows if kind == "kfac" else gradient_side), squares_B * gradient_side


def averaged(old: Tensor, new: Tensor, beta: Tensor) -> Tensor:
    """Return β₂·D + (1 − β₂)·new."""
    return old + (1 - beta) * (new - old)


def raised(average: Tensor, correction: Tensor | None, damping: Tensor, power: Tensor) -> Tensor:
    """Return M = (D/(1 − β₂ᵗ) + δ)^γ; `correction` = 1 − β₂ᵗ, or None without bias correction."""
    return ((average if correction is None else average / correction) + damping) ** power


def raised_dense(average: Tensor, correction: Tensor | None, damping: Tensor, power: Tensor) -> EigenMetric:
    """Return M = (D/(1 − β₂ᵗ) + δI)^γ of symmetric D (L, d, d), by its eigenvectors; the numbers are (L, 1).

    Eigenvalues that rounding made negative count as 0, so M ≥ δ^γ·I. A D that is not finite makes an M of NaN.
    """
    values, vectors = eigh(average)
    return EigenMetric(vectors, raised(values.clamp_min(0), correction, damping, power))
