"""How far one spectral step moves ΔW: what docs/choosing.md says of lr·c in spectral norm."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from psilora import LoRALinear, PSILoRA

D_IN, D_OUT, RANK, LR = 64, 48, 8, 0.05


def largest_step(metric: str | None, outlier: float, damping: float | None = None) -> float:
    """The largest ‖ΔW_t − ΔW_(t−1)‖₂ / (lr·c) of 40 steps, one input channel `outlier` times larger than the others."""
    layer = LoRALinear(nn.Linear(D_IN, D_OUT), RANK)
    optimizer = PSILoRA(layer, LR, metric=metric, damping=damping, fade=False)
    target, c, largest = torch.randn(D_OUT, D_IN) / 8, math.sqrt(8 / RANK * D_IN / D_OUT), 0.0
    W = (layer.lora_B.weight @ layer.lora_A.weight).detach()
    for _ in range(40):
        x = torch.randn(32, D_IN)
        x[:, 3] *= outlier
        y = layer.base(x) + x @ target.T + torch.randn(32, D_OUT)
        optimizer.zero_grad()
        (layer(x) - y.detach()).square().mean().backward()
        optimizer.step()
        before, W = W, (layer.lora_B.weight @ layer.lora_A.weight).detach()
        largest = max(largest, float(torch.linalg.matrix_norm(W - before, 2)) / (LR * c))
    return largest


@pytest.mark.parametrize("outlier", [1.0, 1000.0])
def test_without_the_metric_a_step_is_as_large_as_the_rate_says(outlier: float) -> None:
    assert 1.0 < largest_step(None, outlier) < 1.25


def test_with_the_metric_an_outlier_channel_makes_it_many_times_larger() -> None:
    assert 1.5 < largest_step("lora", 1.0) < 3
    assert 8 < largest_step("lora", 100.0) < 1.25 * (1 + 0.1) / 0.1
    assert 50 < largest_step("lora", 100.0, damping=0.01) < 1.25 * (1 + 0.01) / 0.01


def coasted(fade: bool) -> float:
    """‖change of ΔW‖/‖ΔW‖ in 60 steps of zero gradients after 20 steps of training."""
    layer = LoRALinear(nn.Linear(24, 16), 4)
    optimizer, target = PSILoRA(layer, LR, fade=fade), torch.randn(16, 24) / 5
    for _ in range(20):
        x = torch.randn(32, 24)
        optimizer.zero_grad()
        (layer(x) - layer.base(x).detach() - x @ target.T).square().sum(1).mean().backward()
        optimizer.step()
    W = (layer.lora_B.weight @ layer.lora_A.weight).detach()
    for _ in range(60):
        for p in (layer.lora_A.weight, layer.lora_B.weight):
            p.grad = torch.zeros_like(p)
        optimizer.step()
    return float(((layer.lora_B.weight @ layer.lora_A.weight).detach() - W).norm() / W.norm())


def test_momentum_coasts_through_zero_gradients_and_fading_bounds_how_far() -> None:
    assert 0.3 < coasted(fade=True) < 1.5 < 2.5 < coasted(fade=False)
