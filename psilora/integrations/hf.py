"""transformers, TRL and their trainers.

Three ways in, by who owns the model when:

- You have the adapted model: `Trainer(model, …, optimizers=(PSILoRA(model, lr), None))`.
- The trainer adapts or builds it (`peft_config=`, `model_init=`, FSDP):
  `SFTTrainer(…, peft_config=…, optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(lr))`.
- The trainer adapts it and takes no `optimizer_cls_and_kwargs` (GRPO, DPO): set
  `trainer.optimizer = PSILoRA(trainer.model, lr)` between its construction and `train()`.

`trainer.add_callback(PSILoRACallback(trainer))` sends the optimizer's figures to whatever the trainer reports to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from psilora.monitor.trainer_rate import running_trainer
from psilora.optimizer import PSILoRA


class PSILoRAFactory:
    """What the Trainer calls with its model where it would call an optimizer class with parameters."""

    def __new__(cls, *groups: object, **settings: Any) -> Any:
        """Return a factory, or at once the optimizer of the trainer that calls, where transformers knows no factories.

        transformers 4 calls whatever stands in the place of an optimizer class with groups of parameters.

        Raises:
            TypeError: It was called with parameters, and not by a Trainer.
        """
        factory = super().__new__(cls)
        if not (groups or settings):
            return factory
        trainer = running_trainer()
        if trainer is None:
            raise TypeError(
                "this factory takes a model, not parameters, unless a Trainer calls it; set "
                "trainer.optimizer = PSILoRA(trainer.model, lr) before trainer.train()"
            )
        model: Any = trainer.model
        return factory(model, **settings)

    def __call__(self, model: nn.Module, **settings: Any) -> PSILoRA:
        """Return `PSILoRA(model, **settings)`, with what a trainer that calls this holds as its loss as `also`."""
        return PSILoRA(model, **{"also": _loss_of_trainer(running_trainer()), **settings})


def _loss_of_trainer(trainer: Trainer | None) -> nn.Module | None:
    """The loss of a sentence-transformers trainer, whose own optimizer trains the loss's weights too."""
    if not any(cls.__module__.startswith("sentence_transformers.") for cls in type(trainer).__mro__):
        return None
    loss = getattr(trainer, "loss", None)
    losses = list(loss.values()) if isinstance(loss, dict) else [loss]
    modules = [part for part in losses if isinstance(part, nn.Module)]
    return nn.ModuleList(modules) if modules else None


def optimizer_cls_and_kwargs(lr: float, **settings: Any) -> tuple[type[PSILoRAFactory], dict[str, Any]]:
    """Return the Trainer's argument of that name: PSILoRA on the trainer's own model, built when training starts.

    Args:
        lr: η, as for `PSILoRA`; `TrainingArguments.learning_rate` is not used, and a warning says so where
            it was set.
        settings: Other arguments of `PSILoRA`. The weights of a sentence-transformers trainer's losses are trained with
            the head; another module outside the model is named by `also`.
    """
    return PSILoRAFactory, {"lr": lr, **settings}


class PSILoRACallback(TrainerCallback):
    """Logs the figures of `PSILoRA.stats` as "psilora/…", through the trainer: TensorBoard, W&B, its own history.

    Args:
        trainer: The trainer that it is added to.
        every: Log steps 1, 1 + every, 1 + 2·every, …; the others compute nothing.
    """

    def __init__(self, trainer: Trainer, every: int = 50) -> None:
        if every < 1:
            raise ValueError(f"Invalid every={every}. Must be >= 1.")
        self.trainer, self.every = trainer, every
        self._observing = False

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for the figures of this step, if it is to be logged."""
        self._observing = state.global_step % self.every == 0
        if self._observing:
            _unwrapped(kwargs["optimizer"]).observe_next_step()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log them."""
        if self._observing:
            self._observing = False
            figures = _unwrapped(kwargs["optimizer"]).stats()
            self.trainer.log({f"psilora/{name}": value for name, value in figures.items()})


def _unwrapped(optimizer: torch.optim.Optimizer) -> PSILoRA:
    """Return the PSILoRA inside accelerate's wrapper.

    Raises:
        TypeError: The trainer uses another optimizer.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, PSILoRA):
        raise TypeError(f"PSILoRACallback needs a PSILoRA, but the trainer uses {type(inner).__name__}")
    return inner
