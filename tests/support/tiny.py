"""Tiny language models under LoRA, and tokens for them; the model and the tokenizer are those of the examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from models import randomise_B
from offline import byte_tokenizer, tiny_llama
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

__all__ = [
    "SENTENCES",
    "TARGETS",
    "adapted",
    "byte_tokenizer",
    "lora",
    "tiny_gpt2",
    "tiny_llama",
    "token_rows",
    "tokens",
    "trainer_arguments",
]

# The ways to know the gradient, as settings of the optimizer.
MODES: dict[str, dict[str, Any]] = {
    "exact": {"step": "gradient", "gradient": "exact"},
    "tangent": {"step": "gradient", "gradient": "tangent"},
    "spectral": {"step": "spectral"},
}
TARGETS = ["q_proj", "v_proj", "down_proj"]
VOCABULARY = 259

SENTENCES = (
    "a step on the weight, not on the factors",
    "the rank of the update stays small",
    "what was captured must give the gradient",
    "warm-up starts at a rate of zero",
)


def tiny_gpt2() -> GPT2LMHeadModel:
    """Two blocks whose projections are `Conv1D`."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=257, eos_token_id=258
    )
    return GPT2LMHeadModel(config)


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **changes})


def adapted(model: nn.Module | None = None, *, B_zero: bool = False, **config: Any) -> nn.Module:
    """A tiny model under LoRA, the same on every call; B is random unless `B_zero`, so that no gradient is zero."""
    base = tiny_llama() if model is None else model
    torch.manual_seed(0)
    wrapped = get_peft_model(base, lora(**config))
    if not B_zero:
        randomise_B(wrapped)
    return wrapped


def tokens(rows: int = 2, length: int = 12, seed: int = 0) -> dict[str, Tensor]:
    """A batch with labels."""
    ids = torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone()}


def token_rows(count: int = 32, length: int = 12) -> list[dict[str, Tensor]]:
    """The rows of a data set."""
    batch = tokens(count, length, seed=1)
    return [{name: column[i] for name, column in batch.items()} for i in range(count)]


def trainer_arguments(path: Path, **changes: Any) -> TrainingArguments:
    """What a short run of the Trainer on the CPU needs: warm-up from 0, accumulation and clipping, and no output."""
    settings = {
        "output_dir": str(path),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "max_steps": 6,
        "warmup_steps": 2,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    return TrainingArguments(**{**settings, **changes})
