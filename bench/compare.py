"""Compare two results files of one suite: what changed by more than its noise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bench import results
from bench.candidate import Row

Key = tuple[str, str]


@dataclass(frozen=True)
class Change:
    """One case and method: its times in both files (None where it has none), and whether that is worse."""

    key: Key
    before: float | None
    after: float | None
    worse: bool

    def __str__(self) -> str:
        case, method = self.key
        if self.before is None or self.after is None:
            what = "has a time again" if self.before is None else "lost its time (red check, or gone)"
            return f"{'WORSE ' if self.worse else 'better'} {case}: {method}: {what}"
        word = "WORSE " if self.worse else "better"
        ratio = self.after / self.before
        return f"{word} {case}: {method}: {self.before:.3f} ms -> {self.after:.3f} ms ({ratio:.2f}x)"


def compare(before: Path, after: Path, threshold: float = 0.1) -> list[Change]:
    """Return what changed beyond noise: medians more than `threshold` apart and 20–80 % ranges that do not overlap.

    A method without a time, because its check was red or because it is gone, is a change too.

    Raises:
        ValueError: The files are of different suites or devices.
    """
    old, new = results.load(before), results.load(after)
    for what in ("suite", "device", "threads"):
        if old.get(what) != new.get(what):
            raise ValueError(f"the files differ in {what}: {old.get(what)!r} and {new.get(what)!r}")
    olds, news = _timed(old["rows"]), _timed(new["rows"])
    changes = []
    for key in dict.fromkeys([*olds, *news]):
        a, b = olds.get(key), news.get(key)
        if a is None or b is None:
            changes.append(Change(key, a and a["ms"], b and b["ms"], worse=b is None))
        elif _differ(a, b, threshold):
            changes.append(Change(key, a["ms"], b["ms"], worse=b["ms"] > a["ms"]))
    return changes


def _timed(rows: list[Row]) -> dict[Key, Row]:
    return {(row["case"], row["method"]): row for row in rows if "ms" in row}


def _differ(a: Row, b: Row, threshold: float) -> bool:
    apart = a["ms_80"] < b["ms_20"] or b["ms_80"] < a["ms_20"]
    return apart and abs(b["ms"] / a["ms"] - 1) > threshold
