"""Adapters that are other parameters on the same memory: found by their elements, not by their storage."""

from __future__ import annotations

import pytest
import torch
from models import plain_mlp
from peft import get_peft_model
from releases import lora_config
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from psilora import LoRALinear, PSILoRA
from psilora.adapters import find_pairs


def llama(**config: object) -> nn.Module:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, tie_word_embeddings=True))
    return get_peft_model(model, lora_config(r=4, target_modules=["embed_tokens", "q_proj"], **config))


def test_pefts_tied_embedding_and_head_are_refused_by_both_names() -> None:
    """The trap: two pairs of different shapes, the one the transpose of the other, and two steps of the full rate."""
    model = llama(ensure_weight_tying=True)
    inner = model.base_model.model
    embedding, head = inner.model.embed_tokens, inner.lm_head
    assert head.lora_A["default"].weight is not embedding.lora_embedding_B["default"]
    with pytest.raises(ValueError, match="ensure_weight_tying") as refused:
        PSILoRA(model, 0.05)
    message = str(refused.value)
    names = [f"base_model.model.{name}" for name in ("model.embed_tokens", "lm_head")]
    for name, other in (names, names[::-1]):
        assert f"{name} (its factors lie in the memory of those of {other}" in message
    assert "q_proj" not in message


def test_one_of_the_two_frozen_or_both_under_adamw_train() -> None:
    model = llama(ensure_weight_tying=True)
    pairs, refused = find_pairs(model)
    assert [pair.name.rsplit(".", 1)[1] for pair in pairs] == ["q_proj"] and len(refused) == 2
    optimizer = PSILoRA(model, 0.05, unsupported="adamw")
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 4]
    model.base_model.model.lm_head.requires_grad_(False)
    pairs, refused = find_pairs(model)
    assert len(pairs) == 2 and not refused
    PSILoRA(model, 0.05)


@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`:UserWarning")  # as it is meant here
def test_without_tying_nothing_is_refused() -> None:
    pairs, refused = find_pairs(llama())
    assert len(pairs) == 2 and not refused


def two(view_A: Tensor, view_B: Tensor, again_A: Tensor, again_B: Tensor) -> nn.Module:
    """Two layers with these factors."""
    model = nn.ModuleList([LoRALinear(nn.Linear(6, 6), 2) for _ in range(2)])
    for layer, A, B in zip(model, (view_A, again_A), (view_B, again_B), strict=True):
        layer.lora_A.weight, layer.lora_B.weight = nn.Parameter(A), nn.Parameter(B)
    return model


@pytest.mark.parametrize("tied", ["both", "one", "transposed", "one element"])
def test_shared_elements_are_found_whatever_the_views(tied: str) -> None:
    A, B, flat = torch.randn(2, 6), torch.randn(6, 2), torch.randn(60)
    model = {
        "both": lambda: two(A, B, A.view(2, 6), B.view(6, 2)),
        "one": lambda: two(A, B, torch.randn(2, 6), B.view(6, 2)),
        "transposed": lambda: two(A, B, B.T, A.T),
        "one element": lambda: two(flat[:12].view(2, 6), B, flat[11:23].view(2, 6), torch.randn(6, 2)),
    }[tied]()
    with pytest.raises(
        ValueError, match=r"0 \(its factors lie in the memory of those of 1, .* 1 \(its factors .* of 0,"
    ):
        PSILoRA(model, 0.05)


@pytest.mark.parametrize("layout", ["flat", "columns", "rows of one matrix"])
def test_views_of_one_storage_without_a_common_element_are_separate(layout: str) -> None:
    """Flat parameters of FSDP, fused projections: one storage, and nothing that is moved twice."""
    flat, columns, rows = torch.randn(48), torch.randn(6, 4), torch.randn(4, 6)
    parts = [flat[i : i + 12] for i in range(0, 48, 12)]
    model = {
        "flat": lambda: two(parts[0].view(2, 6), parts[1].view(6, 2), parts[2].view(2, 6), parts[3].view(6, 2)),
        "columns": lambda: two(torch.randn(2, 6), columns[:, :2], torch.randn(2, 6), columns[:, 2:]),
        "rows of one matrix": lambda: two(rows[::2], torch.randn(6, 2), rows[1::2], torch.randn(6, 2)),
    }[layout]()
    assert len(PSILoRA(model, 0.05).pairs()) == 2


def test_shared_parameters_stay_one_pair() -> None:
    model = plain_mlp((24, 24, 24, 6))
    model.l2.lora_A.weight, model.l2.lora_B.weight = model.l1.lora_A.weight, model.l1.lora_B.weight
    assert [pair.name for pair in find_pairs(model)[0]] == ["l1", "l3"]
