"""A tiny language model, a byte tokenizer and text, made from nothing, so that the examples run anywhere and offline.

Replace them by your own: `AutoModelForCausalLM.from_pretrained(name)`, its tokenizer, your texts.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def tiny_llama(layers: int = 2, **changes: Any) -> LlamaForCausalLM:
    """Blocks of width 32 with grouped heads; the same weights on every call."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": 259,
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


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and pad, bos and eos."""
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],  # a Llama takes no token types
    )


def texts(count: int = 256, length: int = 48) -> list[str]:
    """Pieces of the source of a standard-library module."""
    source = Path(argparse.__file__).read_text(encoding="utf-8")
    return [source[i * length : (i + 1) * length] for i in range(count)]


def rows(count: int = 256, length: int = 32) -> list[dict[str, Tensor]]:
    """The texts as tokens with labels."""
    tokenizer = byte_tokenizer()
    found = []
    for text in texts(count):
        ids = torch.tensor(tokenizer(text)["input_ids"][:length])
        found.append({"input_ids": ids, "labels": ids.clone()})
    return found


def shares(steps: int, size: int, rank: int, world: int) -> Iterator[dict[str, Tensor]]:
    """The batches of `size` rows of one process: all draw the same permutations, each takes its part."""
    data, generator = rows(), torch.Generator().manual_seed(0)
    for _ in range(steps):
        picked = torch.randperm(len(data), generator=generator)[: size * world][rank::world].tolist()
        yield {key: torch.stack([data[i][key] for i in picked]) for key in ("input_ids", "labels")}
