"""transformers' Trainer, with the optimizer's figures in whatever it reports to (here TensorBoard and its own log).

python examples/hf_trainer.py && tensorboard --logdir outputs/hf_trainer
"""

from __future__ import annotations

import argparse
import os

import torch
from offline import rows, tiny_llama
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from psilora import PSILoRA
from psilora.integrations.hf import PSILoRACallback


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output", default="outputs/hf_trainer")
    options = parser.parse_args(arguments)

    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", options.output)
    model = get_peft_model(tiny_llama(), LoraConfig(r=8, target_modules="all-linear", lora_dropout=0.05))
    optimizer = PSILoRA(model, lr=0.1)
    settings = TrainingArguments(
        options.output,
        max_steps=options.steps,
        warmup_steps=5,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        logging_steps=max(1, options.steps // 4),
        report_to=["tensorboard"],
        dataloader_pin_memory=torch.cuda.is_available(),
        save_strategy="no",
        seed=0,
    )
    trainer = Trainer(model, settings, train_dataset=rows(), optimizers=(optimizer, None))
    trainer.add_callback(PSILoRACallback(trainer, every=10))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
