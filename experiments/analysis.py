"""What the runs say: chosen rates, test scores with intervals, ranges of good rates, one rate for all tasks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from experiments.grid import best_rate, mean_losses
from experiments.store import Record
from experiments.training import Key, Result

Setting = tuple[str, str, int]  # task, condition, rank


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and the half-width of its 95 % confidence interval (Student's t; None with one seed)."""

    mean: float
    half: float | None
    count: int

    def text(self, digits: int = 4) -> str:
        """ "1.2345 ± 0.0123", or the mean alone."""
        return f"{self.mean:.{digits}f}" + ("" if self.half is None else f" ± {self.half:.{digits}f}")


@dataclass(frozen=True)
class Summary:
    """One method in one setting.

    Attributes:
        losses: {lr: mean validation loss over the tuning seeds}, ∞ where a seed did not stay finite.
        lr: The chosen rate; None if none stayed finite.
        at_edge: Whether it is the lowest or highest rate tried.
        test, score: Over the seeds run at the chosen rate.
        per_seed: {seed: test loss} there.
        finished: Runs at the chosen rate.
        equal_time: Test loss at the chosen rate with the steps that fit into AdamW's time, where that was run.
    """

    method: str
    losses: Mapping[float, float]
    lr: float | None
    at_edge: bool
    test: Estimate | None
    score: Estimate | None
    per_seed: Mapping[int, float]
    finished: Sequence[Record]
    equal_time: Estimate | None

    def width(self, tolerance: float) -> float:
        """Highest over lowest rate of the unbroken range around the chosen one with losses within `tolerance`."""
        if self.lr is None:
            return 0.0
        rates = list(self.losses)
        limit = self.losses[self.lr] * (1 + tolerance)
        first = last = rates.index(self.lr)
        while first > 0 and self.losses[rates[first - 1]] <= limit:
            first -= 1
        while last + 1 < len(rates) and self.losses[rates[last + 1]] <= limit:
            last += 1
        return rates[last] / rates[first]


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean and interval of finite values; None where there are none."""
    from scipy.stats import t

    if not values or not all(map(math.isfinite, values)):
        return None
    mean, count = statistics.fmean(values), len(values)
    half = None if count < 2 else float(t.ppf(0.975, count - 1)) * statistics.stdev(values) / count**0.5
    return Estimate(mean, half, count)


def settings(records: Sequence[Record]) -> list[Setting]:
    """Every (task, condition, rank) in the records."""
    return sorted({(key.task, key.condition, key.rank) for key, _ in records})


def summaries(records: Sequence[Record], setting: Setting) -> list[Summary]:
    """Every method of a setting, best test loss first.

    Raises:
        ValueError: The runs are not all of the same data.
    """
    chosen = [(key, result) for key, result in records if (key.task, key.condition, key.rank) == setting]
    methods: dict[str, set[str]] = {}
    for key, result in chosen:
        methods.setdefault(result.digest, set()).add(key.method)
    if len(methods) > 1:
        held = "; ".join(f"{digest}: {', '.join(sorted(names))}" for digest, names in sorted(methods.items()))
        raise ValueError(f"the runs of {setting} are of different data, by its hash: {held}")
    found = [summary(chosen, setting, method) for method in sorted({key.method for key, _ in chosen})]
    return sorted(found, key=lambda s: math.inf if s.test is None else s.test.mean)


def summary(records: Sequence[Record], setting: Setting, method: str) -> Summary:
    """One method; the seeds that ran the most rates count as tuning seeds."""
    own = [(key, result) for key, result in records if key.method == method and key.stretch == 1]
    rates: dict[int, set[float]] = {}
    for key, _ in own:
        rates.setdefault(key.seed, set()).add(key.lr)
    most = max((len(lrs) for lrs in rates.values()), default=0)
    tuning = [seed for seed, lrs in rates.items() if len(lrs) == most]
    losses = mean_losses(own, *setting, method, tuning)
    lr = best_rate(losses)
    stretched = [r for k, r in records if k.method == method and k.stretch != 1 and k.lr == lr]
    at_best = [(key, result) for key, result in own if key.lr == lr]
    tests = {k.seed: math.inf if r.test is None else r.test.loss for k, r in at_best}
    scores = [r.test.score for _, r in at_best if r.test is not None and r.test.score is not None]
    return Summary(
        method=method,
        losses=losses,
        lr=lr,
        at_edge=lr is not None and lr in (min(losses), max(losses)),
        test=estimate(list(tests.values())),
        score=estimate(scores),
        per_seed=tests,
        finished=at_best,
        equal_time=estimate([math.inf if r.test is None else r.test.loss for r in stretched]),
    )


def difference(one: Summary, other: Summary) -> Estimate | None:
    """Test loss of `one` minus that of `other`, paired by seed."""
    shared = sorted(set(one.per_seed) & set(other.per_seed))
    return estimate([one.per_seed[seed] - other.per_seed[seed] for seed in shared])


def median_of(records: Sequence[tuple[Key, Result]], name: str) -> float:
    """The median of a number in the results."""
    return statistics.median(getattr(result, name) for _, result in records)


def shared_rate(records: Sequence[Record], method: str) -> tuple[float, dict[Setting, float]] | None:
    """The rate whose worst excess over the tuned best is smallest, with the excess (L/L_best − 1) in each setting.

    Among rates run in every setting with the method, rounded to half an octave, since the grids need not coincide.
    """
    excess: dict[Setting, dict[float, float]] = {}
    for setting in settings(records):
        found = summary([r for r in records if (r[0].task, r[0].condition, r[0].rank) == setting], setting, method)
        if found.lr is not None:
            best = found.losses[found.lr]
            excess[setting] = {half_octave(lr): loss / best - 1 for lr, loss in found.losses.items()}
    if not excess:
        return None
    common = set.intersection(*(set(by_rate) for by_rate in excess.values()))
    if not common:
        return None
    rate = min(sorted(common), key=lambda lr: max(by_rate[lr] for by_rate in excess.values()))
    return rate, {setting: by_rate[rate] for setting, by_rate in excess.items()}


def half_octave(lr: float) -> float:
    """`lr` rounded to the nearest 2^(k/2)/100."""
    return float(f"{2 ** (round(2 * math.log2(lr * 100)) / 2) / 100:.3g}")
