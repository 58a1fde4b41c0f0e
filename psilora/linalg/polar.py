"""The polar factor of small matrices by Newton–Schulz: batched matrix products only, no wait for the device."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

#: Singular values from this fraction of the largest (more exactly of the bound below) upwards become 1.
SMALLEST = 1e-3
STEPS = 11


@functools.cache
def newton_schulz_coefficients(smallest: float, steps: int) -> tuple[tuple[float, float], ...]:
    """Return (a, b) per step of X ← a·X − b·XXᵀX, the best odd cubics for singular values in [`smallest`, 1].

    On [l, u] the cubic p(x) = β(3/2·αx − 1/2·(αx)³) with α² = 3/(u² + ul + l²) takes its smallest value at both ends
    and its largest, β, inside; β = 2/(1 + p(l)/β) centres the two on 1, which no cubic does more tightly. The next step
    starts from that interval [2 − β, β]. Small values grow 2.6-fold per step against the bound, against 1.5-fold for
    the classical α = β = 1; once l is near 1 the error is squared, as there.
    """
    found = []
    low, high = smallest, 1.0
    for _ in range(steps):
        alpha = math.sqrt(3 / (high * high + high * low + low * low))
        end = 1.5 * alpha * low - 0.5 * (alpha * low) ** 3
        beta = 2 / (1 + end)
        found.append((1.5 * alpha * beta, 0.5 * alpha**3 * beta))
        low, high = beta * end, beta
    return tuple(found)


def polar(X: Tensor, *, smallest: float = SMALLEST, steps: int = STEPS) -> Tensor:
    """Return U Vᵀ for X = U Σ Vᵀ, softly: every singular value σ becomes f(σ/‖X‖), f an odd increasing bounded map.

    Before the iteration X is divided by its Schatten-4 norm ‖XXᵀ‖_F^½, at most n^¼ times its largest singular value.
    By default |f − 1| ≤ 1e-6 from 1e-3 of that norm upwards, in exact arithmetic (fp32: see the tests); below, f falls
    to 0 in proportion, at slope 4.2e3 or less, so directions that only rounding put there stay small. X = 0 gives 0.

    Args:
        X: (…, m, n), fp32 or fp64, of any magnitude: it is divided by its largest entry first.
        smallest: The relative singular value from which f is 1.
        steps: Number of steps, two products each; 11 suffice for 1e-3.

    Returns:
        The polar factor, (…, m, n).
    """
    shape = X.shape
    X = X.reshape(-1, *shape[-2:])
    largest = X.abs().amax((-2, -1), keepdim=True)
    X = X / torch.where(largest == 0, 1.0, largest)
    wide = X.shape[-2] <= X.shape[-1]
    gram = X @ X.mT if wide else X.mT @ X
    bound = torch.linalg.matrix_norm(gram, keepdim=True)
    bound = torch.where(bound == 0, 1.0, bound)
    X, gram = X / bound.sqrt(), gram / bound
    for i, (a, b) in enumerate(newton_schulz_coefficients(smallest, steps)):
        if i:
            gram = X @ X.mT if wide else X.mT @ X
        X = torch.baddbmm(X, *((gram, X) if wide else (X, gram)), beta=a, alpha=-b)
    return X.reshape(shape)
