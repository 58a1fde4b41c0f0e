"""Diagonal K-FAC and Shampoo metrics: running averages of statistics, damped and raised to a power."""

from __future__ import annotations

import torch
from torch import Tensor

from psilora.gradient import activation_squares
from psilora.holdings import Dense
from psilora.problem import Problem


def initial_metric(size: int, bias_correction: bool, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the starting running average: 0 with bias correction, else 1 as published."""
    return (
        torch.zeros(size, dtype=dtype, device=device)
        if bias_correction
        else torch.ones(size, dtype=dtype, device=device)
    )


def layer_squares(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the sums behind one layer's statistics, before any scale: (for D_A (d_in,), for D_B (d_out,)).

    K-FAC: Σ_n x_n² and Σ_n (S_B)_n². Shampoo: diag(GᵀG) and diag(GGᵀ) for G = S_BᵀX.
    """
    record = problem.record
    if record is None:
        raise RuntimeError(f"{problem.pair.name}: the metric's statistics were not captured")
    if problem.options.metric == "shampoo":
        if isinstance(record.held, Dense):
            (matrix,) = record.held.tensors()
            return matrix.square().sum(0), matrix.square().sum(1)
        return activation_squares(record.chunks, dtype)
    if record.sum_x2 is not None and record.sum_s2 is not None:
        return record.sum_x2, record.sum_s2
    x2 = sum((x.to(dtype).square().sum(0) for x, _ in record.chunks), torch.zeros((), dtype=dtype))
    s2 = sum((s.to(dtype).square().sum(0) for _, s in record.chunks), torch.zeros((), dtype=dtype))
    return x2, s2


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
