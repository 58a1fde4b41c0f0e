"""sentence-transformers: an encoder under LoRA, its trainer, and a loss that has weights of its own.

python examples/sentence_pairs.py
"""

from __future__ import annotations

import argparse
import random

import torch
from datasets import Dataset
from offline import byte_tokenizer
from peft import LoraConfig, get_peft_model
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import SoftmaxLoss
from sentence_transformers.models import Pooling, Transformer
from transformers import BertConfig, BertModel

from psilora.integrations.hf import optimizer_cls_and_kwargs

SUBJECTS, VERBS = ("the cat", "a dog", "my horse", "one bird"), ("sleeps", "runs", "eats", "sings")


def encoder(folder: str) -> SentenceTransformer:
    """A tiny one; yours is `SentenceTransformer(name)`."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=256,
    )
    BertModel(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    body = Transformer(folder, max_seq_length=32)
    return SentenceTransformer(modules=[body, Pooling(32)], device="cpu")


def pairs(count: int) -> Dataset:
    """Two sentences each, and whether their subject, their verb, both or nothing is the same."""
    draw = random.Random(0)
    rows: dict[str, list[object]] = {"first": [], "second": [], "label": []}
    for _ in range(count):
        s, v = draw.choice(SUBJECTS), draw.choice(VERBS)
        label = draw.randrange(4)
        other = s if label & 1 else draw.choice([x for x in SUBJECTS if x != s])
        verb = v if label & 2 else draw.choice([x for x in VERBS if x != v])
        for name, value in zip(rows, (f"{s} {v}", f"{other} {verb}", label), strict=True):
            rows[name].append(value)
    return Dataset.from_dict(rows)


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", default="outputs/sentence_pairs")
    options = parser.parse_args(arguments)

    model = encoder(f"{options.output}/base")
    # --8<-- [start:setup]
    model[0].auto_model = get_peft_model(model[0].auto_model, LoraConfig(r=8, target_modules=["query", "value"]))
    loss = SoftmaxLoss(model, 32, num_labels=4)  # its classifier is trained by AdamW
    trainer = SentenceTransformerTrainer(
        model,
        SentenceTransformerTrainingArguments(
            options.output,
            max_steps=options.steps,
            per_device_train_batch_size=16,
            warmup_steps=5,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=pairs(256),
        loss=loss,
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(lr=0.1, adamw_lr=1e-2),
    )
    # --8<-- [end:setup]
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
