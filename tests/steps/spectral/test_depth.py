"""The factor of the number of pairs, `depth_scale`: what it is, who counts, and that it scales the step alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from psilora import LoRALinear, PSILoRA
from psilora.steps.spectral.reference import rate_factor


def model(count: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(LoRALinear(nn.Linear(6, 6), 2) for _ in range(count))).double()


def stepped(count: int, steps: int = 1, lr: float = 0.5, **settings: Any) -> list[Tensor]:
    """ΔW of every layer after steps along the same random gradients."""
    layers = model(count)
    optimizer = PSILoRA(layers, lr, backend="reference", **settings)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.step()
    return [(layer.lora_B.weight @ layer.lora_A.weight).detach() for layer in layers]


@pytest.mark.parametrize(("count", "factor"), [(1, 1.0), (12, 1.0), (27, 2 / 3), (48, 0.5), (192, 0.25)])
def test_pairs_beyond_twelve_share_the_step(count: int, factor: float) -> None:
    layers = model(count)
    assert PSILoRA(layers, 0.05).param_groups[0]["depth_scale"] == pytest.approx(factor, rel=1e-12)
    for layer in stepped(count, metric=None):  # from B = 0 the step is -lr*f*c*O, whose r singular values are 1
        values = torch.linalg.svdvals(layer)[:2]
        expected = torch.full_like(values, 0.5 * factor * rate_factor(6, 6, 2))
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=0)  # a ridge of 1e-6 in Grams that are not round
    total = float(torch.stack(stepped(count, metric=None)).norm())
    assert total == pytest.approx(0.5 * (8 * min(count, 12)) ** 0.5, rel=1e-5)


def test_a_number_replaces_the_count_and_one_is_the_whole_step() -> None:
    whole = stepped(16, 3, depth_scale=1.0)
    assert all(map(torch.equal, whole, stepped(16, 3, depth_scale=1)))
    assert all(map(torch.equal, stepped(12, 3), stepped(12, 3, depth_scale=1.0)))
    half = stepped(16, 3, lr=1.0, depth_scale=0.5)
    for a, b in zip(whole, half, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert not any(torch.allclose(a, b, rtol=0.05) for a, b in zip(whole, stepped(16, 3), strict=True))


def test_weight_decay_keeps_its_own_rate() -> None:
    layers = model(48)
    for layer in layers:
        nn.init.ones_(layer.lora_B.weight)
    before = [(layer.lora_B.weight @ layer.lora_A.weight).detach() for layer in layers]
    optimizer = PSILoRA(layers, 0.5, weight_decay=0.25, momentum=0.0, metric=None, fade=False)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for layer, old in zip(layers, before, strict=True):
        torch.testing.assert_close((layer.lora_B.weight @ layer.lora_A.weight).detach(), 0.875 * old)


def test_only_pairs_with_a_spectral_step_count_and_groups_may_differ() -> None:
    groups = [{"layers": r"^\d$", "step": "gradient"}, {"layers": r"^1\d$", "depth_scale": 2.0}]
    optimizer = PSILoRA(model(37), 0.05, groups=groups)
    rest, gradient, own = optimizer.param_groups
    assert len(rest["params"]) == 2 * 17 and len(gradient["params"]) == len(own["params"]) == 2 * 10
    assert rest["depth_scale"] == pytest.approx((12 / 27) ** 0.5) and own["depth_scale"] == 2.0
    with pytest.raises(ValueError, match=r"Invalid depth_scale=0.5 with step='gradient'. Must be 'auto'"):
        PSILoRA(model(2), 0.05, step="gradient", depth_scale=0.5)


def test_a_saved_state_brings_its_own() -> None:
    layers = model(48)
    saved = copy.deepcopy(PSILoRA(layers, 0.05, depth_scale=0.75).state_dict())
    optimizer = PSILoRA(layers, 0.05)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["depth_scale"] == 0.75
    for group in saved["param_groups"]:
        group.pop("depth_scale", None)
    optimizer = PSILoRA(layers, 0.05)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["depth_scale"] == 0.5
