"""What `pairs()` and `summary()` say of an optimizer is what it trains."""

from __future__ import annotations

import pytest
import torch
from models import bare, data, peft_mlp, plain_mlp, train
from torch import Tensor, nn

from psilora import PSILoRA

KINDS = [
    {},
    {"momentum": 0.0, "metric": None, "fade": False},
    {"step": "gradient", "metric": "kfac", "momentum_rank": 1},
    {"step": "gradient", "metric": "kfac-low-rank", "metric_rank": 1},
    {"step": "gradient", "gradient": "dense", "metric": "shampoo-dense"},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_pairs_are_those_of_the_model_and_their_state_has_the_bytes_that_were_told(
    kind: dict, dtype: torch.dtype
) -> None:
    model = plain_mlp(dtype=dtype)
    optimizer = PSILoRA(model, 0.01, **kind)
    told = optimizer.pairs()
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert [pair.name for pair in told] == list(layers)
    for pair, layer in zip(told, layers.values(), strict=True):
        assert pair.lora_A is layer.lora_A.weight and pair.lora_B is layer.lora_B.weight
        assert pair.lora_A.shape == (pair.rank, pair.d_in) and pair.lora_B.shape == (pair.d_out, pair.rank)
        assert pair.scaling == layer.scaling and pair.numbers == pair.rank * (pair.d_in + pair.d_out)
        assert (pair.step, pair.metric) == (kind.get("step", "spectral"), kind.get("metric", "lora"))
        captured = kind.get("gradient", "exact" if "step" in kind else "tangent")
        assert pair.gradient == captured
    train(model, optimizer, [data(dtype=dtype)])
    for pair in told:
        states = [optimizer.state[p] for p in (pair.lora_A, pair.lora_B)]
        tensors = [t for state in states for t in state.values() if isinstance(t, Tensor)]
        assert pair.state_bytes == sum(t.numel() * t.element_size() for t in tensors)


def test_the_summary_groups_by_shape_and_counts_everything() -> None:
    model = peft_mlp((8, 8, 8, 4), r=2)
    head = nn.Linear(4, 3)
    model.add_module("head", head)
    for p in head.parameters():
        p.requires_grad_(True)
    optimizer = bare(model, 0.1, groups=[{"layers": "l2", "step": "spectral"}])
    dtype = next(p for p in model.parameters() if p.requires_grad).dtype
    text = repr(optimizer)
    s = optimizer.pairs()[0].scaling
    assert text == optimizer.summary()
    assert f"1 × 8×8, r = 2, s = {s:g}: gradient step, gradient exact" in text
    assert f"1 × 8×8, r = 2, s = {s:g}: spectral step, gradient tangent" in text
    assert f"1 × 4×8, r = 2, s = {s:g}: gradient step, gradient exact" in text
    assert f"3 LoRA pairs: 88 numbers in {88 * dtype.itemsize} bytes, state " in text
    assert "2 other parameters by AdamW: 15 numbers, state 120 bytes" in text
