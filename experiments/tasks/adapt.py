"""LoRA around every linear layer of a model."""

from __future__ import annotations

from torch import nn


def adapt(model: nn.Module, rank: int) -> nn.Module:
    """Freeze `model` and put `psilora.LoRALinear` (s = 1) around every `nn.Linear`, in place.

    A layer narrower than `rank` gets the highest rank it allows.
    """
    from psilora import LoRALinear

    model.requires_grad_(False)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and not isinstance(module, LoRALinear):
                setattr(module, name, LoRALinear(child, min(rank, child.in_features, child.out_features)))
    return model
