"""A byte-level language model, pretrained on the standard library's code and adapted to prose.

Target texts: `pydoc_data.topics`, the language reference that Python carries ("topics"), and the licence files of the
PyTorch distribution and of all that it bundles ("licences"); paragraphs that occurred before are left out. Pretraining
takes minutes and is kept in the folder of bases.

A condition is text-size, such as "topics-small", or text-size×steps where it is not the size's own number of steps.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from experiments.schedule import schedule
from experiments.tasks import Scores, Task, device_of
from experiments.tasks.adapt import adapt

VOCABULARY = 256
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "encodings"})
CODE_BYTES = 8_000_000
TEXT_BYTES = 450_000
HELD_OUT = 64  # windows in validation and in test


@dataclass(frozen=True)
class Size:
    """A model size and how long it is trained."""

    width: int
    layers: int
    context: int
    batch: int
    steps: int
    pretraining_steps: int
    pretraining_lr: float = 2e-3


SIZES = {
    "small": Size(width=128, layers=2, context=96, batch=8, steps=250, pretraining_steps=1000),
    "medium": Size(width=256, layers=2, context=96, batch=8, steps=250, pretraining_steps=1000),
    "tiny": Size(width=32, layers=1, context=32, batch=4, steps=6, pretraining_steps=6),
}


class Block(nn.Module):
    """Pre-norm attention and a GELU network, with every projection an `nn.Linear`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // 32)
        self.norm_attention, self.norm_network = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(nn.functional.gelu(self.up(self.norm_network(x))))


class ByteLM(nn.Module):
    """Bytes (batch, length) to next-byte logits, with the output tied to the embedding (so not an `nn.Linear`)."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.bytes, self.positions = nn.Embedding(VOCABULARY, size.width), nn.Embedding(size.context, size.width)
        self.blocks = nn.ModuleList(Block(size.width) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        for embedding in (self.bytes, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.bytes(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.bytes.weight.T


def next_byte_loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross-entropy (nats per byte) of windows (batch, context + 1)."""
    logits = model(windows[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@functools.cache
def code() -> Tensor:
    """The standard library's Python sources in an order fixed by their paths' hashes, cut to CODE_BYTES."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [p for p in root.rglob("*.py") if not SKIPPED_FOLDERS.intersection(p.relative_to(root).parts)]
    paths.sort(key=lambda p: hashlib.sha256(str(p.relative_to(root)).encode()).digest())
    return as_bytes(b"\n".join(p.read_bytes() for p in paths), CODE_BYTES)


def as_bytes(content: bytes, limit: int) -> Tensor:
    """The first `limit` bytes as uint8."""
    return torch.frombuffer(bytearray(content[:limit]), dtype=torch.uint8)


def without_repeats(texts: Iterable[str]) -> bytes:
    """The texts' paragraphs in order, without those seen before but for case and spacing."""
    seen: set[str] = set()
    kept: list[str] = []
    for text in texts:
        for paragraph in text.split("\n\n"):
            key = " ".join(paragraph.lower().split())
            if key and key not in seen:
                seen.add(key)
                kept.append(paragraph.strip("\n"))
    return "\n\n".join(kept).encode("utf-8", "replace")


def licence_texts() -> list[str]:
    """The licence files of PyTorch's distribution, by path: they depend on its version and on nothing else."""
    wanted = ("licen", "copying", "notice")
    texts = [
        Path(str(file.locate())).read_text(encoding="utf-8", errors="replace")
        for file in sorted(importlib.metadata.files("torch") or (), key=str)
        if file.name.lower().startswith(wanted) and file.suffix in ("", ".txt", ".md", ".rst")
    ]
    if not texts:
        raise FileNotFoundError("the installed torch has no licence files")
    return texts


@functools.cache
def target_bytes(text: str) -> Tensor:
    """The target text as bytes, at most TEXT_BYTES."""
    if text == "topics":
        from pydoc_data.topics import topics

        return as_bytes(without_repeats(topics[name] for name in sorted(topics)), TEXT_BYTES)
    return as_bytes(without_repeats(licence_texts()), TEXT_BYTES)


def split(data: Tensor, context: int) -> dict[str, Tensor]:
    """{"train": bytes, "validation" and "test": windows (HELD_OUT, context + 1)} from stretches spread over the text.

    The text is cut into 32 stretches; the last fifth of each is held out, half for validation and half for test.
    """
    parts: dict[str, list[Tensor]] = {"train": [], "validation": [], "test": []}
    for stretch in data.chunk(32):
        first, second = round(0.8 * len(stretch)), round(0.9 * len(stretch))
        parts["train"].append(stretch[:first])
        parts["validation"].append(stretch[first:second])
        parts["test"].append(stretch[second:])
    split: dict[str, Tensor] = {"train": torch.cat(parts["train"])}
    for name in ("validation", "test"):
        windows = torch.cat([p[: len(p) // (context + 1) * (context + 1)].view(-1, context + 1) for p in parts[name]])
        chosen = torch.linspace(0, len(windows) - 1, min(HELD_OUT, len(windows))).long()
        split[name] = windows[chosen].long()
    return split


def windows(data: Tensor, context: int, batch: int, generator: torch.Generator) -> Tensor:
    """A random batch of windows (batch, context + 1)."""
    starts = torch.randint(len(data) - context - 1, (batch,), generator=generator)
    return torch.stack([data[i : i + context + 1] for i in starts]).long()


def pretrained(name: str, folder: Path) -> dict[str, Tensor]:
    """The pretrained weights of a size, from the folder or made and kept there."""
    size, path = SIZES[name], folder / f"bytelm-{name}.pt"
    if path.is_file():
        weights: dict[str, Tensor] = torch.load(path, weights_only=True)
        return weights
    torch.manual_seed(0)
    model, generator = ByteLM(size), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.pretraining_lr, betas=(0.9, 0.95), weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, size.pretraining_steps))
    for _ in range(size.pretraining_steps):
        optimizer.zero_grad()
        next_byte_loss(model, windows(code(), size.context, 2 * size.batch, generator)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    weights = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(weights, path)
    return weights


def parts_of(condition: str) -> tuple[str, str, int]:
    """(text, name of the size, steps) of a condition: text-size, with its own number of steps text-size×steps."""
    text, rest = condition.split("-")
    name, _, steps = rest.partition("x")
    return text, name, int(steps) if steps else SIZES[name].steps


class ByteSession:
    """A pretrained byte model with adapters on all its linear layers, and a target text."""

    head_lr = 0.0

    def __init__(self, condition: str, rank: int, seed: int, folder: Path) -> None:
        text, name, steps = parts_of(condition)
        self.size = SIZES[name]
        data = target_bytes(text)
        self.data = split(data, self.size.context)
        model = ByteLM(self.size)
        model.load_state_dict(pretrained(name, folder))
        torch.manual_seed(seed)
        self.model = adapt(model, rank)
        self.seed, self.steps = seed, steps
        self.digest = hashlib.sha256(data.numpy().tobytes()).hexdigest()[:16]

    def batches(self) -> Iterator[Tensor]:
        """Random windows of the training text."""
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.steps):
            yield windows(self.data["train"], self.size.context, self.size.batch, generator)

    def loss(self, batch: Tensor) -> Tensor:
        """Nats per byte."""
        return next_byte_loss(self.model, batch)

    def evaluate(self, split: str) -> Scores:
        """Nats per byte on the held-out windows."""
        return Scores(float(next_byte_loss(self.model, self.data[split].to(device_of(self.model)))))


CONDITIONS = tuple(f"{text}-{size}" for size in ("small", "medium") for text in ("licences", "topics"))
#: How the good rate moves with the length of the run.
LENGTHS = tuple(f"topics-smallx{steps}" for steps in (30, 60, 120, 500, 1000))
CENTRES = {
    "adamw": 2e-2,
    "adamw-999": 2e-2,
    "nadam": 2e-2,
    "loraplus": 2e-2,
    "riemannian": 3e-2,
    "lora-rite": 3e-2,
    "preconditioned-adamw": 3e-2,
    "psilora-exact": 1.0,
    "psilora-tangent": 1.0,
    "svdlora-adamw": 4e-3,
}
TASKS = {
    "bytelm": Task(
        "bytelm",
        (*CONDITIONS, *LENGTHS, "topics-tiny"),
        ByteSession,
        centres=CENTRES,
        evaluations=5,
        default_conditions=CONDITIONS,
    )
}
