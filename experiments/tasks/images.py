"""What the image tasks share: a classifier, its three splits in memory, shuffled epochs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from experiments.tasks import Scores, device_of

BATCH = 64
EVALUATION_BATCH = 1024
Images = tuple[Tensor, Tensor]


class ImageSession:
    """A classifier with adapters and {"train", "validation", "test"} as (images, labels).

    Args:
        model: Ready to train.
        data: The splits.
        steps: Training steps.
        seed: Of the order of the batches.
        head_lr: AdamW's rate for trainable parameters outside the adapters.
    """

    def __init__(
        self, model: nn.Module, data: Mapping[str, Images], steps: int, seed: int, head_lr: float = 0.0
    ) -> None:
        self.model, self.data, self.steps, self.seed, self.head_lr = model, data, steps, seed, head_lr
        self.digest = hashlib.sha256(data["train"][0].numpy().tobytes()).hexdigest()[:16]

    def batches(self) -> Iterator[Images]:
        """Shuffled epochs of full batches; the images an epoch leaves over come again in the next."""
        x, y = self.data["train"]
        generator = torch.Generator().manual_seed(self.seed)
        size = min(BATCH, len(y))
        per_epoch = len(y) // size
        for step in range(self.steps):
            if step % per_epoch == 0:
                order = torch.randperm(len(y), generator=generator)
            chosen = order[step % per_epoch * size :][:size]
            yield x[chosen], y[chosen]

    def loss(self, batch: Images) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def evaluate(self, split: str) -> Scores:
        """Cross-entropy and accuracy."""
        loss, correct, count = 0.0, 0, 0
        device = device_of(self.model)
        for x, y in zip(*(part.to(device).split(EVALUATION_BATCH) for part in self.data[split]), strict=True):
            logits = self.model(x)
            loss += float(nn.functional.cross_entropy(logits, y, reduction="sum"))
            correct += int((logits.argmax(1) == y).sum())
            count += len(y)
        return Scores(loss / count, correct / count)
