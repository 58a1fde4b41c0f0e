"""The fine-tuning demo's task: which standard-library package a docstring comes from, on the pretrained MiniLM.

Data, model and batches are those of `examples/finetune.py`; its validation texts are halved, in alternation, into
validation and test. "query-value" adapts PEFT's default layers, "all-linear" all six linear layers of a block.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from experiments.tasks import Scores, Task, device_of, moved

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
BATCH, MAX_LENGTH, EPOCHS = 32, 64, 2
SHORT_TEXTS = 64
TARGETS = {
    "query-value": None,
    "all-linear": ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"],
}

Batch = tuple[dict[str, Tensor], Tensor]


@functools.cache
def demo() -> ModuleType:
    """The demo's module."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module("finetune")
    finally:
        sys.path.remove(str(EXAMPLES))


@dataclass(frozen=True)
class Texts:
    """The tokenised texts and their three parts."""

    batches: Any
    held_out: dict[str, list[Any]]
    labels: int
    digest: str


@functools.cache
def texts(short: bool) -> Texts:
    """The docstrings, tokenised; `short` keeps SHORT_TEXTS of each part."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    module = demo()
    data = sys.modules["docstrings"].docstring_data()
    data = data.part(SHORT_TEXTS, SHORT_TEXTS) if short else data
    tokenizer = module.load_tokenizer(module.packaged_model())
    batches = module.Batches(data, tokenizer, BATCH, MAX_LENGTH, torch.device("cpu"))
    both = batches.validation
    parts = {"validation": both[::2], "test": both[1::2]}
    return Texts(batches, parts, len(data.label_names), data.digest()[:16])


class MiniLMSession:
    """MiniLM with adapters and a new head."""

    def __init__(self, condition: str, rank: int, seed: int, folder: Path) -> None:
        module = demo()
        self.texts = texts(condition == "short")
        self.head_lr = module.HEAD_LR
        base = module.base_model(module.packaged_model(), self.texts.labels, seed)
        self.model = module.with_lora(base, rank, TARGETS.get(condition))
        self.seed, self.steps = seed, self.texts.batches.steps(EPOCHS)
        self.digest = self.texts.digest

    def batches(self) -> Iterator[Batch]:
        """Shuffled epochs, as many as the steps need."""
        epochs = self.texts.batches.epochs(-(-self.steps * BATCH // len(self.texts.batches.train)) + 1, self.seed)
        for _ in range(self.steps):
            yield next(epochs)

    def loss(self, batch: Batch) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(self.model(**batch[0]), batch[1])

    def evaluate(self, split: str) -> Scores:
        """Cross-entropy and accuracy."""
        examples, loss, correct = self.texts.held_out[split], 0.0, 0
        for first in range(0, len(examples), 2 * BATCH):
            batch = self.texts.batches._tensors(examples[first : first + 2 * BATCH])
            inputs, labels = moved(batch, device_of(self.model))
            logits = self.model(**inputs).float()
            loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
            correct += int((logits.argmax(-1) == labels).sum())
        return Scores(loss / len(examples), correct / len(examples))


CENTRES = {
    "adamw": 1e-2,
    "adamw-999": 1e-2,
    "nadam": 1e-2,
    "loraplus": 1e-2,
    "psilora-exact": 0.05,
    "psilora-tangent": 0.05,
    "lora-muon": 0.1,
}
TASKS = {"minilm": Task("minilm", (*TARGETS, "short"), MiniLMSession, centres=CENTRES, evaluations=3)}
