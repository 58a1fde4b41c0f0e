"""transformers, TRL and their trainers.

Three ways in, by who owns the model when:

- You have the adapted model: `Trainer(model, …, optimizers=(PSILoRA(model, lr), None))`.
- The trainer adapts or builds it (`peft_config=`, `model_init=`, FSDP):
  `SFTTrainer(…, peft_config=…, optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(lr))`.
- The trainer adapts it and takes no `optimizer_cls_and_kwargs` (GRPO, DPO): set
  `trainer.optimizer = PSILoRA(trainer.model, lr)` between its construction and `train()`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from psilora.optimizer import PSILoRA


class PSILoRAFactory:
    """What the Trainer calls with its model where it would call an optimizer class with parameters."""

    def __init__(self, *groups: object, **settings: object) -> None:
        if groups or settings:
            raise TypeError(
                "this version of transformers hands an optimizer its parameters, not the model; "
                "set trainer.optimizer = PSILoRA(trainer.model, lr) before trainer.train()"
            )

    def __call__(self, model: nn.Module, **settings: Any) -> PSILoRA:
        """Return `PSILoRA(model, **settings)`."""
        return PSILoRA(model, **settings)


def optimizer_cls_and_kwargs(lr: float, **settings: Any) -> tuple[type[PSILoRAFactory], dict[str, Any]]:
    """Return the Trainer's argument of that name: PSILoRA on the trainer's own model, built when training starts.

    Args:
        lr: η, as for `PSILoRA`; `TrainingArguments.learning_rate` is not used.
        settings: Other arguments of `PSILoRA`.
    """
    return PSILoRAFactory, {"lr": lr, **settings}
