"""Checks of single settings; an error names the value and what is allowed."""

from __future__ import annotations

import math
import numbers

from torch import Tensor


def is_real(value: object) -> bool:
    """Whether a setting is a real number, of Python or numpy; True and False are none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_integer(value: object) -> bool:
    """Whether a setting is an integer, of Python or numpy; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def rate(name: str, lr: float | Tensor) -> None:
    """Raise ValueError for what is neither a finite number >= 0 nor a tensor of one element, which is not looked at."""
    if not isinstance(lr, Tensor):
        at_least(name, lr, 0)
    elif lr.numel() != 1:
        raise ValueError(f"Invalid {name} of shape {tuple(lr.shape)}. Must be a number or a one-element tensor.")


def check_rate(lr: float | Tensor, name: str = "lr") -> None:
    """Raise ValueError for a learning rate in a tensor that is negative or not finite; waits for its device."""
    if isinstance(lr, Tensor):
        at_least(name, lr.item(), 0)


def at_least(name: str, value: float, bound: float) -> None:
    """Raise ValueError for what is not a finite number >= `bound`."""
    if not (is_real(value) and math.isfinite(value) and value >= bound):
        raise ValueError(f"Invalid {name}={value!r}. Must be finite and >= {bound}.")


def above_zero(name: str, value: float | None) -> None:
    """Raise ValueError for what is neither a number > 0 nor None."""
    if value is not None and not (is_real(value) and value > 0):
        raise ValueError(f"Invalid {name}={value!r}. Must be > 0 or None.")


def two_betas(name: str, value: object) -> None:
    """Raise ValueError for what are not two numbers in [0, 1)."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"Invalid {name}={value!r}. Must be two numbers in [0, 1).")
    for i, beta in enumerate(value):
        in_range(f"{name}[{i}]", beta, 0, 1)


def in_range(name: str, value: float, low: float, high: float) -> None:
    """Raise ValueError for what is not a number in [`low`, `high`)."""
    if not (is_real(value) and low <= value < high):
        raise ValueError(f"Invalid {name}={value!r}. Must be in [{low}, {high}).")


def integer(name: str, value: object, bound: int) -> None:
    """Raise ValueError for what is not an integer >= `bound`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < bound:
        raise ValueError(f"Invalid {name}={value!r}. Must be an integer >= {bound}.")


def flag(name: str, value: object) -> None:
    """Raise ValueError for what is neither True nor False."""
    if not isinstance(value, bool):
        raise ValueError(f"Invalid {name}={value!r}. Must be True or False.")


def one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raise ValueError for what is not among the `allowed` values."""
    if value not in allowed:
        raise ValueError(f"Invalid {name}={value!r}. Must be one of {', '.join(map(repr, allowed))}.")
