"""A Trainer's own learning rate, which nobody uses where it is handed a finished optimizer."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from typing import Any

import torch

from psilora import runtime

_TRAINER = "transformers.trainer"


def say_ignored_rate(lr: float | torch.Tensor) -> None:
    """Warn where the transformers Trainer that takes this step was told another rate than the one that is used."""
    trainer = running_trainer()
    if trainer is None:
        return
    given = trainer.args.learning_rate
    default = next(f.default for f in dataclasses.fields(trainer.args) if f.name == "learning_rate")  # TRL has its own
    if given is not None and given not in (default, lr):
        runtime.warn(
            f"TrainingArguments.learning_rate={given:g} is not used: PSILoRA has its own, lr={float(lr):g}; its rates "
            "are on another scale than AdamW's, so leave learning_rate out, or give both the same value"
        )


def running_trainer() -> Any | None:
    """The Trainer that calls, which hands an optimizer or its factory nothing of itself: from a frame of its methods.

    Frames of other code are not looked into. Up to Python 3.12 a frame keeps the copy of its variables that looking
    makes, here a batch, so the copy is emptied.
    """
    frame = inspect.currentframe() if _TRAINER in sys.modules else None
    while frame is not None:
        if frame.f_globals.get("__name__") == _TRAINER and "self" in frame.f_code.co_varnames[:1]:
            variables = frame.f_locals
            trainer = variables["self"]
            if isinstance(variables, dict):
                variables.clear()
            return trainer if hasattr(trainer, "args") else None
        frame = frame.f_back
    return None
