"""Small convolutional models under LoRA, and the linear models that do the same on patches unfolded beforehand."""

from __future__ import annotations

from typing import Any

import torch
from models import randomise_B
from torch import Tensor, nn


class ConvNet(nn.Module):
    """Three convolutions, with stride, with padding "same" and with one position, then a mean over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.c2 = nn.Conv2d(8, 6, (3, 5), padding="same")
        self.c3 = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c3(torch.tanh(self.c2(torch.tanh(self.c1(x))))).mean((-1, -2))


def peft_convnet(
    net: nn.Module | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    targets: Any = ("c1", "c2", "c3"),
    **config: Any,
) -> nn.Module:
    """A `ConvNet`, the same on every call, under PEFT LoRA; B is random so that every gradient is non-zero."""
    from peft import LoraConfig, get_peft_model  # see models.py

    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": list(targets), **config}
    model = get_peft_model(ConvNet() if net is None else net, LoraConfig(**settings)).to(dtype)
    randomise_B(model, 0.3)
    return model


def images(
    count: int = 5, size: tuple[int, ...] = (9, 7), channels: int = 3, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """A batch of images and a target for each."""
    return torch.randn(count, channels, *size, dtype=dtype), torch.randn(count, 4, dtype=dtype)


POSITIONS = 5 * 4  # of every convolution of a `ConvNet`, on images of 9 by 7


class LoRAConv(nn.Module):
    """A convolution with LoRA as anybody could write it: `lora_A`, `lora_B` and a number `scaling`."""

    def __init__(self, base: nn.Conv2d, rank: int, scaling: float = 2.0, **of_A: Any) -> None:
        super().__init__()
        self.base, self.scaling = base.requires_grad_(False), scaling
        like = {"stride": base.stride, "padding": base.padding, "padding_mode": base.padding_mode, **of_A}
        self.lora_A = nn.Conv2d(base.in_channels, rank, base.kernel_size, bias=False, dilation=base.dilation, **like)
        self.lora_B = nn.Conv2d(rank, base.out_channels, 1, bias=False)
        nn.init.normal_(self.lora_B.weight, 0, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scaling * self.lora_B(self.lora_A(x))
