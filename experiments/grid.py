"""The protocol as a sequence of runs: tune on a ×2 grid, then repeat the chosen rate with the other seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from experiments.methods import METHODS
from experiments.store import Record
from experiments.tasks import Task
from experiments.training import Key

Done = Callable[[], Sequence[Record]]
Pace = Callable[[str, Mapping[str, float]], Mapping[str, float]]


@dataclass(frozen=True)
class Plan:
    """What to run of a task.

    Attributes:
        conditions, methods: Names.
        rank: LoRA rank.
        points: Rates per method, a factor 2 apart around the centre.
        extend: Rates that may be added where the best one lies on the edge of the grid.
        tune_seeds, seeds: Seeds of the grid, and of the chosen rate.
    """

    conditions: Sequence[str]
    methods: Sequence[str]
    rank: int
    points: int
    extend: int
    tune_seeds: Sequence[int]
    seeds: Sequence[int]


def centre(task: Task, method: str) -> float:
    """The centre of the method's grid on this task."""
    return task.centres.get(method, METHODS[method].centre)


def rate(centre: float, octave: int) -> float:
    """centre·2^octave, to four digits."""
    return float(f"{centre * 2.0**octave:.4g}")


def octaves(points: int) -> list[int]:
    """0, 1, −1, 2, −2, …: the middle of the grid first, so that a stopped run is a narrower grid."""
    return [(k + 1) // 2 * (1 if k % 2 else -1) for k in range(points)]


def tuning(task: Task, plan: Plan) -> Iterator[Key]:
    """The grid: rates outermost, so that all methods grow evenly."""
    for seed in plan.tune_seeds:
        for octave in octaves(plan.points):
            for condition in plan.conditions:
                for method in plan.methods:
                    yield Key(task.name, condition, plan.rank, method, rate(centre(task, method), octave), seed)


def extensions(task: Task, plan: Plan, done: Done) -> Iterator[Key]:
    """Rates beyond the edge on which a method's best one lies, at most `plan.extend` for each."""
    for _ in range(plan.extend):
        for condition in plan.conditions:
            for method in plan.methods:
                losses = mean_losses(done(), task.name, condition, plan.rank, method, plan.tune_seeds)
                best = best_rate(losses)
                if best is not None and best in (min(losses), max(losses)) and len(losses) > 1:
                    lr = float(f"{best * (2.0 if best == max(losses) else 0.5):.4g}")
                    for seed in plan.tune_seeds:
                        yield Key(task.name, condition, plan.rank, method, lr, seed)


def repeats(task: Task, plan: Plan, done: Done) -> Iterator[Key]:
    """The chosen rate of every method with the seeds that did not tune it."""
    for seed in plan.seeds:
        for condition in plan.conditions:
            for method in plan.methods:
                losses = mean_losses(done(), task.name, condition, plan.rank, method, plan.tune_seeds)
                best = best_rate(losses)
                if best is not None and seed not in plan.tune_seeds:
                    yield Key(task.name, condition, plan.rank, method, best, seed)


def mean_losses(
    records: Sequence[Record], task: str, condition: str, rank: int, method: str, seeds: Sequence[int]
) -> dict[float, float]:
    """{lr: mean validation loss over the tuning seeds}, rising in lr; ∞ where a seed did not stay finite.

    Only rates that all tuning seeds have run.
    """
    found: dict[float, dict[int, float]] = {}
    for key, result in records:
        same = (key.task, key.condition, key.rank, key.method) == (task, condition, rank, method)
        if same and key.seed in seeds and key.stretch == 1:
            loss = math.inf if result.validation is None else result.validation.loss
            found.setdefault(key.lr, {})[key.seed] = loss
    full = {lr: losses for lr, losses in found.items() if len(losses) == len(set(seeds))}
    return {lr: statistics.fmean(full[lr].values()) for lr in sorted(full)}


def best_rate(losses: Mapping[float, float]) -> float | None:
    """The rate with the lowest finite loss, or None."""
    finite = {lr: loss for lr, loss in losses.items() if math.isfinite(loss)}
    return min(finite, key=lambda lr: finite[lr]) if finite else None


def equal_time(task: Task, plan: Plan, done: Done, pace: Pace, reference: str = "adamw") -> Iterator[Key]:
    """The chosen rates again with as many steps as fit into the reference's time, on every seed.

    For the methods that need more time per step than the reference; `pace` gives the times of a step, from a condition
    and the methods' chosen rates.
    """
    for condition in plan.conditions:
        chosen: dict[str, float] = {}
        for method in dict.fromkeys([reference, *plan.methods]):
            best = best_rate(mean_losses(done(), task.name, condition, plan.rank, method, plan.tune_seeds))
            if best is not None:
                chosen[method] = best
        if reference not in chosen:
            continue
        times = pace(condition, chosen)
        for method, lr in chosen.items():
            stretch = round(times[reference] / times[method], 2)
            if 0 < stretch < 1:
                for seed in plan.seeds:
                    yield Key(task.name, condition, plan.rank, method, lr, seed, stretch)
