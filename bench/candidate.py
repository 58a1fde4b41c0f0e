"""One way to do the work that all candidates of a case do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]


def nothing() -> None:
    """Do nothing."""


@dataclass
class Candidate:
    """One way to do the work that all candidates of a case do.

    Attributes:
        method: Its name in the tables.
        run: What is timed. `calls` of the same work over different inputs, where given, are what a CUDA graph
            replays, so that a short kernel finds its inputs outside the cache; a row that could not be captured says
            why, in `not_captured`, and times `run`.
        before: What must happen before every run, untimed.
        check: Returns the relative error of the result; above `tolerance`, or NaN, nothing is timed.
        facts: What else the row says (bytes, floor, state, …).
        count: Whether dispatched operations and peak memory are measured in one run each, after the timing.
    """

    method: str
    run: Callable[[], object]
    check: Callable[[], float]
    tolerance: float
    before: Callable[[], object] = nothing
    calls: Sequence[Callable[[], object]] = ()
    facts: Row = field(default_factory=dict)
    count: bool = True
