"""Weights outside the model, as a loss may have them, are trained with the head."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from models import plain_mlp
from tiny import trainer_arguments
from torch import Tensor, nn
from transformers import Trainer

from psilora import PSILoRA
from psilora.integrations.hf import optimizer_cls_and_kwargs


class Loss(nn.Module):
    """Like sentence-transformers' SoftmaxLoss: it holds the model, and a classifier of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.classifier = model, nn.Linear(6, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.model(x)).square().mean()


def test_a_loss_is_trained_as_a_part_of_the_model_would_be() -> None:
    inside, x = Loss(plain_mlp()), torch.randn(16, 24, dtype=torch.float64)
    outside = copy.deepcopy(inside)
    start = outside.classifier.weight.detach().clone()
    for loss, optimizer in ((inside, PSILoRA(inside, 0.05)), (outside, PSILoRA(outside.model, 0.05, also=outside))):
        for _ in range(3):
            optimizer.zero_grad()
            loss(x).backward()
            optimizer.step()
    assert not torch.equal(start, outside.classifier.weight)
    assert all(torch.equal(a, b) for a, b in zip(inside.parameters(), outside.parameters(), strict=True))
    state = optimizer.state_dict()
    assert state["param_groups"][-1]["names"] == ["also.classifier.weight", "also.classifier.bias"]


class Holding(Trainer):
    """A trainer that trains by a loss it holds."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *_: object, **__: object) -> Tensor:
        return self.loss(inputs["x"])


class SentenceTransformerLike(Holding):
    __module__ = "sentence_transformers.trainer"


@pytest.mark.parametrize("kind", ["one", "several"])
@pytest.mark.parametrize("cls", [SentenceTransformerLike, Holding])
def test_the_trainer_of_sentence_transformers_hands_over_its_losses(cls: type, kind: str, tmp_path: Path) -> None:
    loss = Loss(plain_mlp())
    trainer = cls(
        loss.model,
        trainer_arguments(tmp_path, max_steps=2, remove_unused_columns=False),
        train_dataset=[{"x": torch.randn(24, dtype=torch.float64)} for _ in range(8)],
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(0.05),
    )
    trainer.loss = loss if kind == "one" else {"a": loss}
    optimizer = trainer.create_optimizer()
    others = {id(p) for group in optimizer.param_groups if group["kind"] == "adamw" for p in group["params"]}
    assert others == (set(map(id, loss.classifier.parameters())) if cls is SentenceTransformerLike else set())
