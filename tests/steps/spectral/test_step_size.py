"""How far one spectral step moves ΔW: what docs/choosing.md says of lr·c in spectral norm."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from psilora import LoRALinear, PSILoRA

D_IN, D_OUT, RANK, LR = 64, 48, 8, 0.05


def largest_step(metric: str | None, channels: slice, size: float, damping: float | None = None) -> tuple[float, float]:
    """The largest ‖ΔW_t − ΔW_(t−1)‖ of 40 steps, input `channels` multiplied by `size`.

    In spectral norm, over lr·c, and in the Frobenius norm, over lr·c·√(2r).
    """
    layer = LoRALinear(nn.Linear(D_IN, D_OUT), RANK)
    optimizer = PSILoRA(layer, LR, metric=metric, damping=damping, fade=False)
    target, c = torch.randn(D_OUT, D_IN) / 8, math.sqrt(8 / RANK * D_IN / D_OUT)
    steps = []
    W = (layer.lora_B.weight @ layer.lora_A.weight).detach()
    for _ in range(40):
        x = torch.randn(32, D_IN)
        x[:, channels] *= size
        y = layer.base(x) + x @ target.T + torch.randn(32, D_OUT)
        optimizer.zero_grad()
        (layer(x) - y.detach()).square().mean().backward()
        optimizer.step()
        before, W = W, (layer.lora_B.weight @ layer.lora_A.weight).detach()
        steps.append((W - before) / (LR * c))
    spectral = max(float(torch.linalg.matrix_norm(step, 2)) for step in steps)
    return spectral, max(float(step.norm()) for step in steps) / math.sqrt(2 * RANK)


ONE, HALF, MOST, ALL_BUT_ONE = slice(3, 4), slice(0, D_IN // 2), slice(6, None), slice(1, None)


@pytest.mark.parametrize("size", [1.0, 1000.0])
def test_without_the_metric_a_step_is_as_large_as_the_rate_says(size: float) -> None:
    spectral, frobenius = largest_step(None, ONE, size)
    assert 1.0 < spectral < 1.25 and 0.7 < frobenius < 1.05


@pytest.mark.parametrize(
    "channels, size",
    [(ONE, 1.0), (ONE, 100.0), (ONE, 1e-3), (HALF, 0.1), (HALF, 1e-3), (HALF, 0.0), (ALL_BUT_ONE, 1e-3), (MOST, 0.0)],
    ids=str,
)
def test_with_the_metric_its_frobenius_norm_stays(channels: slice, size: float) -> None:
    spectral, frobenius = largest_step("lora", channels, size)
    assert 0.7 < frobenius < 2.1
    assert 1.0 < spectral < 4


@pytest.mark.parametrize("channels, size", [(ONE, 1.0), (ONE, 100.0), (ONE, 1e-3), (ALL_BUT_ONE, 1e-3)], ids=str)
def test_with_a_tenth_of_the_damping_too(channels: slice, size: float) -> None:
    spectral, frobenius = largest_step("lora", channels, size, damping=0.01)
    assert 0.7 < frobenius < 2.5
    assert 1.0 < spectral < 9


@pytest.mark.parametrize("channels", [HALF, MOST], ids=str)
def test_channels_with_hardly_a_gradient_count_as_those_without_one(channels: slice) -> None:
    found = []
    for size in (0.0, 1e-30, 1e-6):
        torch.manual_seed(5)
        found.append(largest_step("lora", channels, size)[1])
    assert found == pytest.approx([found[0]] * 3, rel=0.15)


@pytest.mark.parametrize("batch", [4, 16, 64])
def test_channels_that_have_not_been_seen_yet_do_not_make_a_step_large(batch: int) -> None:
    """With one-hot inputs the first gradients hold few of the channels, in all of which A has entries."""
    layer, c = LoRALinear(nn.Linear(512, 32), RANK), math.sqrt(8 / RANK * 512 / 32)
    optimizer, target = PSILoRA(layer, LR, fade=False), torch.randn(32, 512)
    sizes, W = [], torch.zeros(32, 512)
    for _ in range(20):
        x = nn.functional.one_hot(torch.randint(512, (batch,)), 512).float()
        optimizer.zero_grad()
        (layer(x) - layer.base(x).detach() - x @ target.T).square().sum(1).mean().backward()
        optimizer.step()
        before, W = W, (layer.lora_B.weight @ layer.lora_A.weight).detach()
        sizes.append(float((W - before).norm()) / (LR * c * math.sqrt(2 * RANK)))
    assert 0.3 < min(sizes) and max(sizes) < 3


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
