"""Networks whose steps are tested on a GPU, with small twins for the interpreter."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from psilora import LoRALinear, PSILoRA


def network(
    device: str, rank: int, dtype: torch.dtype = torch.float32, small: tuple[int, ...] = (24, 33, 20, 8)
) -> nn.Sequential:
    """Adapted layers of odd shapes; wide ones on a GPU, else between the `small` widths."""
    widths = (300, 513, 1024, 777, 64) if device == "cuda" else small
    layers: list[nn.Module] = []
    for d_in, d_out in zip(widths[:-1], widths[1:], strict=True):
        layer = LoRALinear(nn.Linear(d_in, d_out), min(rank, d_in, d_out), alpha=2.0 * rank)
        nn.init.normal_(layer.lora_B.weight, std=0.1)
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1]).to(device, dtype)


def step(model: nn.Module, optimizer: PSILoRA, x: Tensor) -> None:
    optimizer.zero_grad()
    (model(x) - 1).square().mean().backward()
    optimizer.step()


def factors(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]
