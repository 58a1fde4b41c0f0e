"""Tiny language models, a byte tokenizer and text, all built from nothing: no download, no file."""

from __future__ import annotations

from typing import Any

import torch
from models import randomise_B
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TARGETS = ["q_proj", "v_proj", "down_proj"]
VOCABULARY = 259

SENTENCES = (
    "a step on the weight, not on the factors",
    "the rank of the update stays small",
    "what was captured must give the gradient",
    "warm-up starts at a rate of zero",
)


def tiny_llama(layers: int = 2, **changes: Any) -> LlamaForCausalLM:
    """Two blocks of width 32 with grouped heads; the same weights on every call."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 256,
        "bos_token_id": 257,
        "eos_token_id": 258,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))


def tiny_gpt2() -> GPT2LMHeadModel:
    """Two blocks whose projections are `Conv1D`."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=257, eos_token_id=258
    )
    return GPT2LMHeadModel(config)


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **changes})


def adapted(model: nn.Module | None = None, *, B_zero: bool = False, **config: Any) -> nn.Module:
    """A tiny model under LoRA, the same on every call; B is random unless `B_zero`, so that no gradient is zero."""
    base = tiny_llama() if model is None else model
    torch.manual_seed(0)
    wrapped = get_peft_model(base, lora(**config))
    if not B_zero:
        randomise_B(wrapped)
    return wrapped


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and pad, bos and eos."""
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", model_max_length=64
    )


def tokens(rows: int = 2, length: int = 12, seed: int = 0) -> dict[str, Tensor]:
    """A batch with labels."""
    ids = torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone()}


def token_rows(count: int = 32, length: int = 12) -> list[dict[str, Tensor]]:
    """The rows of a data set."""
    batch = tokens(count, length, seed=1)
    return [{name: column[i] for name, column in batch.items()} for i in range(count)]
