"""MNIST and CIFAR-100 as in OPLoRA's Table 1, from local files in their published formats.

MNIST: the four IDX files, gzipped or not. CIFAR-100: the pickles `train` and `test` of `cifar-100-python`. LeNet5 and
PatchMLP start from random weights; adapters (alpha = r) go on their linear layers, whose base stays frozen, and the
other layers are trained. The papers train those by SGD with momentum, here AdamW does (`experiments.table1` does as
they do). A tenth of the training images validates.
"""

from __future__ import annotations

import gzip
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.tasks import Task
from experiments.tasks.adapt import adapt
from experiments.tasks.images import BATCH, Images, ImageSession

EPOCHS = {"mnist": 5, "cifar100": 20}
HEAD_LR = 1e-3
IDX_UINT8 = 0x08


class LeNet5(nn.Module):
    """LeCun's network for 28×28 images, with ReLU and max pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 6, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.classifier = nn.Sequential(
            nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


class PatchMLP(nn.Module):
    """4×4 patches of a 32×32 image by one convolution, then residual linear blocks over and within the tokens."""

    def __init__(self, width: int = 192, blocks: int = 4, tokens: int = 64) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.positions = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.mix = nn.ModuleList(nn.Linear(tokens, tokens) for _ in range(blocks))
        self.channels = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(blocks)
        )
        self.out = nn.Linear(width, 100)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).mT + self.positions
        for mix, channels in zip(self.mix, self.channels, strict=True):
            tokens = tokens + mix(tokens.mT).mT
            tokens = tokens + channels(tokens)
        return self.out(tokens.mean(1))


def read_idx(path: Path) -> Tensor:
    """An IDX file of unsigned bytes as a uint8 tensor: two zero bytes, type, rank, big-endian sizes, data.

    Raises:
        ValueError: The file is of another type, or its length does not fit its sizes.
    """
    zipped = path.with_name(path.name + ".gz")
    content = gzip.decompress(zipped.read_bytes()) if zipped.is_file() else path.read_bytes()
    if content[:2] != b"\0\0" or content[2] != IDX_UINT8:
        raise ValueError(f"{path.name} is not an IDX file of unsigned bytes")
    rank = content[3]
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", rank, 4))
    data = np.frombuffer(content, np.uint8, offset=4 + 4 * rank)
    if data.size != int(np.prod(shape)):
        raise ValueError(f"{path.name} holds {data.size} bytes; its sizes {shape} need {int(np.prod(shape))}")
    return torch.from_numpy(data.reshape(shape).copy())


def mnist(folder: Path) -> dict[str, Images]:
    """{"train", "test"} of the IDX files in `folder`, normalised with the usual mean and deviation."""
    splits = {}
    for name, prefix in (("train", "train"), ("test", "t10k")):
        images = read_idx(folder / f"{prefix}-images-idx3-ubyte")
        x = (images[:, None].float() / 255 - 0.1307) / 0.3081
        splits[name] = (x, read_idx(folder / f"{prefix}-labels-idx1-ubyte").long())
    return splits


class _Arrays(pickle.Unpickler):
    """Unpickles arrays and plain containers, and refuses everything else: a pickle can run any code."""

    _ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"the file asks for {module}.{name}, which no CIFAR-100 file needs")
        return super().find_class(module, name)


def cifar100(folder: Path) -> dict[str, Images]:
    """{"train", "test"} of the pickles in `folder` (or its `cifar-100-python`), fine labels, normalised."""
    inner = folder / "cifar-100-python"
    mean, deviation = torch.tensor([0.507, 0.487, 0.441]), torch.tensor([0.267, 0.256, 0.276])
    splits = {}
    for name in ("train", "test"):
        with ((inner if inner.is_dir() else folder) / name).open("rb") as file:
            content = _Arrays(file, encoding="bytes").load()
        x = torch.from_numpy(np.asarray(content[b"data"], np.uint8).reshape(-1, 3, 32, 32)).float() / 255
        x = (x - mean[:, None, None]) / deviation[:, None, None]
        splits[name] = (x, torch.tensor(content[b"fine_labels"]))
    return splits


def with_validation(splits: dict[str, Images]) -> dict[str, Images]:
    """A tenth of the training images, the same for every seed, moved to "validation"."""
    x, y = splits["train"]
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    held_out, kept = order[: max(1, len(y) // 10)], order[max(1, len(y) // 10) :]
    return {"train": (x[kept], y[kept]), "validation": (x[held_out], y[held_out]), "test": splits["test"]}


def adapted(network: nn.Module, rank: int) -> nn.Module:
    """`network` with adapters on its linear layers, everything else trained as it is."""
    linear = {id(p) for module in network.modules() if isinstance(module, nn.Linear) for p in module.parameters()}
    trained = [p for p in network.parameters() if id(p) not in linear]
    model = adapt(network, rank)
    for parameter in trained:
        parameter.requires_grad_(True)
    return model


def make(condition: str, rank: int, seed: int, folder: Path) -> ImageSession:
    """A session on the files of `folder`; `condition` is "mnist" or "cifar100"."""
    data = with_validation(mnist(folder) if condition == "mnist" else cifar100(folder))
    torch.manual_seed(seed)
    model = adapted(LeNet5() if condition == "mnist" else PatchMLP(), rank)
    steps = EPOCHS[condition] * max(1, len(data["train"][1]) // BATCH)
    return ImageSession(model, data, steps, seed, HEAD_LR)


CENTRES = {"adamw": 4e-3, "psilora-paper": 0.05}
TASKS = {
    "mnist": Task("mnist", ("mnist",), make, rank=8, centres=CENTRES, local_data=True),
    "cifar100": Task("cifar100", ("cifar100",), make, rank=16, centres=CENTRES, local_data=True),
}
