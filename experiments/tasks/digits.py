"""scikit-learn's 8×8 digits under a shift, with the paper's two small networks scaled to 8×8.

"classes": pretrained on the digits 0–4, adapted to 5–9. "rotation": pretrained on one half of the images upright,
adapted to the other half turned by a quarter. The adapted images are split 60 : 20 : 20 into training, validation and
test, the same for all seeds; a seed sets the adapters and the order of the batches.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor, nn

from experiments.tasks import Task
from experiments.tasks.adapt import adapt
from experiments.tasks.images import BATCH, Images, ImageSession

STEPS = 200
PRETRAINING_STEPS = 400
PRETRAINING_LR = 3e-3


class LeNet5(nn.Module):
    """Two convolutions with pooling, then linear layers 64–120–84–10; the convolutions stay frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.classifier = nn.Sequential(nn.Linear(64, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


class PatchMLP(nn.Module):
    """One convolution makes 2×2 patches into tokens, which linear layers process with a position embedding."""

    def __init__(self, width: int = 64, blocks: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.positions = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(blocks)
        )
        self.out = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).mT + self.positions
        for block in self.blocks:
            tokens = tokens + block(tokens)
        return self.out(tokens.mean(1))


MODELS = {"lenet": LeNet5, "patchmlp": PatchMLP}


@functools.cache
def shifted(shift: str) -> tuple[Images, dict[str, Images]]:
    """(pretraining images, {"train", "validation", "test"} of the adapted ones) of a shift."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    if shift == "classes":
        base, target = (x[y < 5], y[y < 5]), (x[y >= 5], y[y >= 5])
    else:
        half = len(y) // 2
        base, target = (x[:half], y[:half]), (x[half:].rot90(1, (2, 3)), y[half:])
    first, second = round(0.6 * len(target[1])), round(0.8 * len(target[1]))
    parts = {"train": slice(first), "validation": slice(first, second), "test": slice(second, None)}
    return base, {name: (target[0][part].contiguous(), target[1][part]) for name, part in parts.items()}


@functools.cache
def pretrained(shift: str, model: str) -> dict[str, Tensor]:
    """The weights of the pretrained model; a second's work, done once per process."""
    torch.manual_seed(0)
    network, (x, y) = MODELS[model](), shifted(shift)[0]
    optimizer = torch.optim.AdamW(network.parameters(), lr=PRETRAINING_LR)
    generator = torch.Generator().manual_seed(0)
    for _ in range(PRETRAINING_STEPS):
        chosen = torch.randint(len(y), (BATCH,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x[chosen]), y[chosen]).backward()
        optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def make(condition: str, rank: int, seed: int, folder: Path) -> ImageSession:
    """A pretrained network with fresh adapters on its linear layers, and the shifted images; `folder` is not used."""
    shift, name = condition.split("-")
    weights = pretrained(shift, name)
    network = MODELS[name]()
    network.load_state_dict(weights)
    torch.manual_seed(seed)
    return ImageSession(adapt(network, rank), shifted(shift)[1], STEPS, seed)


CONDITIONS = tuple(f"{shift}-{model}" for shift in ("classes", "rotation") for model in MODELS)
CENTRES = {
    "adamw": 0.032,
    "adamw-999": 0.032,
    "nadam": 0.032,
    "loraplus": 0.064,
    "riemannian": 0.032,
    "lora-rite": 0.08,
    "lora-muon": 0.1,
    "sgd": 1e-2,
    "preconditioned-sgd": 5e-3,
    "preconditioned-adamw": 0.032,
    "projected": 1e-2,
    "svdlora": 0.04,
    "oplora": 1e-2,
    "psilora-exact": 0.05,
    "psilora-tangent": 0.05,
}
TASKS = {"digits": Task("digits", CONDITIONS, make, rank=4, centres=CENTRES)}
