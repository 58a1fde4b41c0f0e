"""How accurate each kernel must be, with the reason for every number.

A kernel's error against float64 may be at most `factor` times the error that PyTorch makes with fp32 copies of the same
inputs. Errors are measured entry by entry relative to the sum of the magnitudes of an entry's terms, so cancellation
neither hides nor creates one. PyTorch's error counts as at least half a unit in the last place of fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

HALF_ULP = 2.0**-24


@dataclass(frozen=True)
class Tolerance:
    """Factors on PyTorch's own error, in the interpreter and on a GPU."""

    interpreter: float
    gpu: float
    reason: str


TOLERANCES = {
    "product": Tolerance(
        interpreter=3,
        gpu=16,
        reason="The three 16-bit parts carry 24 bits, so each term is off by at most half a unit, as in fp32; the sum "
        "of the three parts adds two roundings: three halves in all, where PyTorch's own may all but cancel over few "
        "terms (7 rows of 48 on one processor: 1.0 halves against 2.3). Where fp32 arithmetic rounds, tensor cores "
        "truncate as they sum: a bias that grows with the number of terms, about 5 times the random error of rounding "
        "at 4096 of them.",
    ),
    "squares": Tolerance(
        interpreter=8,
        gpu=8,
        reason="Every lane adds up to N/32 terms one after the other before a tree adds the lanes; PyTorch cascades "
        "all along, and its error does not grow with N.",
    ),
    "gram": Tolerance(
        interpreter=4,
        gpu=16,
        reason="In units of half an ulp of the sum of magnitudes. A compiled kernel adds the columns of a tile "
        "one after the other, and every FMA may round by half a unit; the interpreter's product adds in pairs.",
    ),
    "reduce": Tolerance(
        interpreter=4,
        gpu=4,
        reason="Partials are added one after the other, at most a few dozen; PyTorch may add them in pairs.",
    ),
}


def error(result: Tensor, exact: Tensor, magnitude: Tensor) -> float:
    """The largest error of an entry relative to its `magnitude`, the sum of the absolute values of its terms."""
    if exact.numel() == 0:
        return 0.0
    difference = (result.double() - exact).abs()
    relative = torch.where(difference == 0, 0.0, difference / magnitude)
    return float("inf") if bool(relative.isnan().any()) else float(relative.max())


def allowed(kind: str, device: torch.device) -> float:
    """The factor on PyTorch's error that a kind of kernel has on a device."""
    tolerance = TOLERANCES[kind]
    return tolerance.gpu if device.type == "cuda" else tolerance.interpreter


def assert_accurate(kind: str, result: Tensor, own: Tensor, exact: Tensor, magnitude: Tensor) -> None:
    """Assert that `result` is as accurate as its kind asks; `own` is PyTorch's fp32 result."""
    assert result.shape == exact.shape
    factor = allowed(kind, result.device)
    ours, theirs = error(result, exact, magnitude), max(error(own, exact, magnitude), HALF_ULP)
    assert ours <= factor * theirs, f"{kind}: error {ours:.2e}, PyTorch's {theirs:.2e}, allowed {factor} times that"
