"""The statistics of K-FAC and Shampoo: sums over the rows of a step, and their normalisation."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from psilora.capture.record import Record
from psilora.capture.storage import Dense
from psilora.lowrank.gradient_operator import activation_squares
from psilora.steps.gradient.batch import GradientBatch
from psilora.steps.problem import Problem


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


def row_counts(batch: GradientBatch) -> Tensor:
    """N of this process, (L, 1, 1)."""
    return batch.column([p.record.rows if p.record is not None else 1 for p in batch.problems])


def square_scale(batch: GradientBatch) -> Tensor:
    """What squares of S_B are multiplied with to be those of S, (L, 1, 1)."""
    scale: Tensor = (batch.clip * batch.external / batch.scaling) ** 2
    return scale
