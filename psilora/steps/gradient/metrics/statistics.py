"""The statistics of K-FAC and Shampoo: sums over the rows of a step, and their normalisation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator
from typing import TypeVar

import torch
from torch import Tensor

from psilora.capture.record import Record
from psilora.capture.storage import Dense, column_squares
from psilora.lowrank.gradient_operator import TangentGradient, activation_squares
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
    x2 = _total([column_squares(x, dtype) for x, _ in record.chunks])
    s2 = _total([column_squares(s, dtype) for _, s in record.chunks])
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
    record, dims = problem.record, 2 if problem.options.sums == "products" else 1
    if record is None or (record.sum_x2 is not None and record.sum_x2.dim() != dims):
        raise RuntimeError(
            f"{problem.pair.name}: the statistics of metric={problem.options.metric!r} were not captured; build the "
            "optimizer with the metric that it is to use or to load"
        )
    return record


def _total(parts: list[Tensor]) -> Tensor:
    return functools.reduce(Tensor.add_, parts)


N = TypeVar("N", float, Tensor)


def normalisation(kind: str, rows: N, reduction: str) -> tuple[N, N]:
    """Return the factors of (D_A, D_B) on the sums of the true X, S and G over N = `rows`.

    For a mean-reduced loss S carries 1/N: K-FAC (1/N)Σx² and NΣs²; Shampoo N·diag(GᵀG) and N·diag(GGᵀ).
    For a sum the factor N on the gradient's side becomes 1/N.
    """
    gradient_side = rows if reduction == "mean" else 1 / rows
    return (1 / rows if kind == "kfac" else gradient_side), gradient_side


def normalised(kind: str, sums_A: Tensor, sums_B: Tensor, rows: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """Return (new D_A, new D_B); `rows` broadcasts against the sums."""
    factor_A, factor_B = normalisation(kind, rows, reduction)
    return sums_A * factor_A, sums_B * factor_B


def gathered(
    batch: GradientBatch,
    kind: str,
    sums: Callable[[Problem, torch.dtype], tuple[Tensor, Tensor]],
    of_tangent: Callable[[TangentGradient], tuple[Tensor, Tensor]],
) -> Generator[list[Tensor], list[Tensor], tuple[Tensor, Tensor]]:
    """Return the new (D_A, D_B) of a batch, (L, …), summed over the processes.

    Args:
        batch: The layers.
        kind: "kfac" or "shampoo".
        sums: Those of one layer, as `layer_squares`.
        of_tangent: Those of G_T, for Shampoo's where G is known by `.grad` alone, which all processes have in common.
    """
    rows = row_counts(batch)
    if isinstance(batch.gradient, TangentGradient) and kind == "shampoo":
        sums_A, sums_B = of_tangent(batch.gradient)
        (rows,) = yield [rows]
    else:
        found = [sums(problem, batch.dtype) for problem in batch.problems]
        sums_A, sums_B = (torch.stack([sides[i] for sides in found]) for i in (0, 1))
        scale = _beside(square_scale(batch), sums_B)
        sums_A, sums_B, rows = yield [sums_A * scale if kind == "shampoo" else sums_A, sums_B * scale, rows]
    return normalised(kind, sums_A, sums_B, _beside(rows.clamp_min(1), sums_B), batch.options.loss_reduction)


def _beside(column: Tensor, sums: Tensor) -> Tensor:
    """One number per layer, (L, 1, 1), in as many dimensions as what it is multiplied with."""
    return column.view(-1, *(1,) * (sums.dim() - 1))


def row_counts(batch: GradientBatch) -> Tensor:
    """N of this process, (L, 1, 1)."""
    return batch.column([p.record.rows if p.record is not None else 1 for p in batch.problems])


def square_scale(batch: GradientBatch) -> Tensor:
    """What squares of S_B are multiplied with to be those of S, (L, 1, 1)."""
    scale: Tensor = (batch.clip * batch.external / batch.scaling) ** 2
    return scale
