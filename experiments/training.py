"""One run: train a session with a method at a rate; the same warm-up, decay, batches and evaluations for all."""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from experiments.methods import METHODS
from experiments.schedule import schedule
from experiments.tasks import Scores, Session, Task, moved

TRAIN_POINTS = 20


@dataclass(frozen=True)
class Key:
    """What identifies a run; `lr` is rounded to four digits."""

    task: str
    condition: str
    rank: int
    method: str
    lr: float
    seed: int
    stretch: float = 1.0

    @property
    def path(self) -> Path:
        """Where the run's file lies below the output folder."""
        part = f"{self.condition}-r{self.rank}" + ("" if self.stretch == 1 else f"-steps{self.stretch:g}")
        return Path(self.task, part, self.method, f"lr{self.lr:g}-seed{self.seed}.json")


@dataclass
class Result:
    """What a run leaves; None scores mean that the loss or a parameter stopped being finite."""

    validation: Scores | None = None
    test: Scores | None = None
    steps: int = 0
    curve: list[tuple[int, float, float | None]] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    seconds: float = 0.0
    optimizer_ms: float = 0.0
    step_ms: float = 0.0
    state_bytes: int = 0
    digest: str = ""
    device: str = "cpu"
    general_before: Scores | None = None
    general_after: Scores | None = None


def run(task: Task, key: Key, folder: Path, where: Where | None = None) -> Result:
    """Train and score; a run that stops being finite ends early with no scores."""
    where = where or Where()
    session = task.make(key.condition, key.rank, key.seed, folder)
    session.model.to(where.device)
    session.steps = max(1, round(session.steps * key.stretch))
    torch.manual_seed(key.seed)
    session.model.train()
    optimizers = METHODS[key.method].build(session.model, key.lr, session.head_lr)
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, session.steps))
        for optimizer in optimizers
    ]
    result = Result(steps=session.steps, digest=session.digest, device=where.name)
    if task.general:
        result.general_before = evaluate(session, "general", where)
    marks = {round(session.steps * k / task.evaluations) for k in range(1, task.evaluations)}
    losses: list[float] = []
    step_seconds: list[float] = []
    optimizer_seconds: list[float] = []
    started = time.perf_counter()
    for step, batch in enumerate(session.batches(), 1):
        try:
            taken = train_step(session, optimizers, batch, where)
        except torch.linalg.LinAlgError:  # an SVD of infinities: the run has diverged
            break
        for scheduler in schedulers:
            scheduler.step()
        losses.append(taken.loss)
        step_seconds.append(taken.seconds)
        optimizer_seconds.append(taken.optimizer_seconds)
        if not math.isfinite(losses[-1]):
            break
        if step in marks:
            scores = evaluate(session, "validation", where)
            if scores is None:
                break
            result.curve.append((step, scores.loss, scores.score))
    else:
        result.validation, result.test = evaluate(session, "validation", where), evaluate(session, "test", where)
        if task.general:
            result.general_after = evaluate(session, "general", where)
    if result.validation is not None:
        result.curve.append((session.steps, result.validation.loss, result.validation.score))
    result.train_loss = binned(losses, TRAIN_POINTS)
    result.seconds = time.perf_counter() - started
    result.step_ms = 1e3 * statistics.median(step_seconds)
    result.optimizer_ms = 1e3 * statistics.median(optimizer_seconds)
    result.state_bytes = sum(tensor_bytes(dict(optimizer.state)) for optimizer in optimizers)
    for optimizer in optimizers:
        getattr(optimizer, "detach", lambda: None)()
    return result


@dataclass(frozen=True)
class Where:
    """The device of a run, and whether its forward passes are autocast to bfloat16; adapters stay float32."""

    device: torch.device = torch.device("cpu")
    bf16: bool = False

    @property
    def name(self) -> str:
        """The accelerator's name, or "cpu"."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    def autocast(self) -> torch.autocast:
        """The context of a forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def wait(self) -> None:
        """Until the device has done its work, so that a clock can be read."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Taken(NamedTuple):
    """A training step's loss, and how long all of it and its optimizers took."""

    loss: float
    seconds: float
    optimizer_seconds: float


def train_step(
    session: Session, optimizers: Sequence[torch.optim.Optimizer], batch: Any, where: Where | None = None
) -> Taken:
    """Forward, backward and the optimizers' steps."""
    where = where or Where()
    begin = time.perf_counter()
    with where.autocast():
        loss = session.loss(moved(batch, where.device))
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    where.wait()
    before = time.perf_counter()
    for optimizer in optimizers:
        optimizer.step()
    where.wait()
    end = time.perf_counter()
    return Taken(float(loss.detach()), end - begin, end - before)


@torch.no_grad()
def evaluate(session: Session, split: str, where: Where) -> Scores | None:
    """The session's scores in evaluation mode, or None where the loss is not finite."""
    session.model.eval()
    with where.autocast():
        scores = session.evaluate(split)
    session.model.train()
    return scores if math.isfinite(scores.loss) else None


def binned(values: list[float], points: int) -> list[float]:
    """Means of at most `points` consecutive stretches, to 5 digits, without those that are not finite."""
    size = max(1, math.ceil(len(values) / points))
    means = [statistics.fmean(values[i : i + size]) for i in range(0, len(values), size)]
    return [float(f"{mean:.5g}") for mean in means if math.isfinite(mean)]


def tensor_bytes(value: object) -> int:
    """The bytes of all tensors in nested dictionaries, lists and tuples."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    children = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return sum(map(tensor_bytes, children))


def versions() -> dict[str, Any]:
    """What the numbers depend on besides the data."""
    import psilora

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "psilora": psilora.__version__,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.system()} {platform.machine()}",
    }
