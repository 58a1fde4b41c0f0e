"""TRL's SFTTrainer, which adds the adapters itself: the optimizer is built from its model, when training starts.

    python examples/trl_sft.py

DPOTrainer and GRPOTrainer take no `optimizer_cls_and_kwargs`; there, set
`trainer.optimizer = PSILoRA(trainer.model, lr)` before `trainer.train()`.
"""

from __future__ import annotations

import argparse

import torch
from datasets import Dataset
from offline import byte_tokenizer, texts, tiny_llama
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from psilora.integrations.hf import optimizer_cls_and_kwargs


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output", default="outputs/trl_sft")
    options = parser.parse_args(arguments)

    trainer = SFTTrainer(
        tiny_llama(),
        SFTConfig(
            options.output,
            max_steps=options.steps,
            max_length=48,
            per_device_train_batch_size=8,
            logging_steps=max(1, options.steps // 4),
            report_to=[],
            dataloader_pin_memory=torch.cuda.is_available(),
            save_strategy="no",
            bf16=False,
            seed=0,
        ),
        train_dataset=Dataset.from_dict({"text": texts()}),
        processing_class=byte_tokenizer(),
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(lr=0.1, step="spectral"),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
