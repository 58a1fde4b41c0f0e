"""The tasks, each a function that makes a `Session` for a condition, a rank and a seed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Scores:
    """The mean loss on a split, and the task's own score (accuracy, F1, …; higher is better) where it has one."""

    loss: float
    score: float | None = None


def moved(batch: Any, device: torch.device) -> Any:
    """`batch`, a tensor or nested dictionaries, lists and tuples of them, on `device`."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {name: moved(part, device) for name, part in batch.items()}
    return type(batch)(moved(part, device) for part in batch) if isinstance(batch, (list, tuple)) else batch


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are."""
    return next(model.parameters()).device


class Session(Protocol):
    """One model with fresh adapters and its data; equal arguments give bitwise equal sessions.

    Attributes:
        model: With LoRA adapters; only they, and the head if there is one, are trainable.
        steps: Training steps.
        head_lr: AdamW's rate for trainable parameters outside the adapters.
        digest: Hash of the data.
    """

    model: nn.Module
    steps: int
    head_lr: float
    digest: str

    def batches(self) -> Iterator[Any]:
        """Yield `steps` training batches."""
        ...

    def loss(self, batch: Any) -> Tensor:
        """The training loss of a batch."""
        ...

    def evaluate(self, split: str) -> Scores:
        """The scores on "validation" or "test", with the data moved to where the model is."""
        ...


@dataclass(frozen=True)
class Task:
    """What the command line needs to know about a task.

    Attributes:
        conditions: Names of its variants; the first is the default of a short run.
        make: (condition, rank, seed, folder for pretrained bases and data) to a session.
        rank: Default LoRA rank.
        centres: Centre of each method's grid of rates, where it differs from the method's own.
        evaluations: Points of a validation curve.
        local_data: Whether the data has to be given (`--data`); such tasks were not run here.
        default_conditions: Those of a command that names none; all where empty.
        general: Whether sessions score a split "general" of another kind of text, before and after training.
    """

    name: str
    conditions: tuple[str, ...]
    make: Callable[[str, int, int, Path], Session]
    rank: int = 8
    centres: dict[str, float] = field(default_factory=dict)
    evaluations: int = 6
    local_data: bool = False
    default_conditions: tuple[str, ...] = ()
    general: bool = False


MODULES = {
    "digits": "digits",
    "minilm": "minilm",
    "bytelm": "bytelm",
    "mnist": "vision",
    "cifar100": "vision",
    "glue": "language",
    "squad": "language",
    "wikitext": "language",
    "smollm": "smollm",
}


def get_task(name: str) -> Task:
    """The task of that name; its module and what it needs are imported only now."""
    module = importlib.import_module(f"experiments.tasks.{MODULES[name]}")
    task: Task = module.TASKS[name]
    return task
