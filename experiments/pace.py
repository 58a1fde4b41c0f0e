"""How long a training step takes by each method, measured side by side and kept with the runs."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from experiments.methods import METHODS
from experiments.store import making, rounded, save
from experiments.tasks import Session, Task
from experiments.training import Where, train_step

ROUNDS, WARM_UP = 40, 5


def measure(
    task: Task, condition: str, rank: int, lrs: Mapping[str, float], folder: Path, where: Where
) -> dict[str, float]:
    """The median time of a training step in ms, by method; `lrs` are the methods and their rates.

    The methods take their steps in turn, so that what else the machine does falls on all alike.
    """
    runs: dict[str, tuple[Session, list[torch.optim.Optimizer], Any]] = {}
    for method, lr in lrs.items():
        session = task.make(condition, rank, 0, folder)
        session.model.to(where.device)
        session.steps = ROUNDS + WARM_UP
        session.model.train()
        optimizers = METHODS[method].build(session.model, lr, session.head_lr)
        runs[method] = session, optimizers, itertools.cycle(session.batches())
    seconds: dict[str, list[float]] = {method: [] for method in runs}
    for _ in range(ROUNDS + WARM_UP):
        for method, (session, optimizers, batches) in runs.items():
            seconds[method].append(train_step(session, optimizers, next(batches), where).seconds)
    for _, optimizers, _ in runs.values():
        for optimizer in optimizers:
            getattr(optimizer, "detach", lambda: None)()
    return {method: 1e3 * statistics.median(values[WARM_UP:]) for method, values in seconds.items()}


def kept(
    out: Path,
    task: Task,
    condition: str,
    rank: int,
    lrs: Mapping[str, float],
    folder: Path,
    where: Where,
) -> dict[str, float]:
    """As `measure`, from the file of an earlier call if it has all the methods."""
    path = out / task.name / f"{condition}-r{rank}" / "pace.json"
    if path.is_file():
        step_ms: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))["step_ms"]
        if set(lrs) <= set(step_ms):
            return step_ms
    step_ms = rounded(measure(task, condition, rank, lrs, folder, where))
    label = {"task": task.name, "condition": condition, "rank": rank}
    save(path, {"pace": label, "step_ms": step_ms, **making()})
    return step_ms
