"""Adapted layers of named models: (d_out, d_in) and which layers read the same input."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """A set of LoRA layers.

    Attributes:
        name: As on the command line.
        rank: r.
        layers: (d_out, d_in, input) per layer; layers with the same `input` number share X.
    """

    name: str
    rank: int
    layers: tuple[tuple[int, int, int], ...]


def _blocks(name: str, rank: int, count: int, block: tuple[tuple[int, int, int], ...]) -> Model:
    inputs = 1 + max(number for _, _, number in block)
    layers = tuple((d_out, d_in, i * inputs + number) for i in range(count) for d_out, d_in, number in block)
    return Model(name, rank, layers)


def _decoder(width: int, kv: int, inner: int) -> tuple[tuple[int, int, int], ...]:
    """Return q, k, v, o, gate, up and down of one block."""
    attention = ((width, width, 0), (kv, width, 0), (kv, width, 0), (width, width, 1))
    return (*attention, (inner, width, 2), (inner, width, 2), (width, inner, 3))


_LLAMA_8B = _decoder(4096, 1024, 14336)

MODELS = {
    model.name: model
    for model in (
        _blocks("tiny", 4, 2, ((40, 24, 0), (24, 24, 0), (24, 40, 1))),
        _blocks("qwen2.5-0.5b", 8, 24, _decoder(896, 128, 4864)),
        _blocks("minilm", 8, 6, ((384, 384, 0), (384, 384, 0))),
        _blocks("roberta-base", 8, 12, ((768, 768, 0), (768, 768, 0))),
        _blocks("llama-3-8b", 16, 32, _LLAMA_8B),
        _blocks("llama-3-8b-r64", 64, 32, _LLAMA_8B),
        # All 80 blocks' activations would not fit one device.
        _blocks("llama-3-70b-8-blocks", 16, 8, _decoder(8192, 1024, 28672)),
    )
}


def uniform(layers: int, width: int, rank: int) -> Model:
    """Return square layers that share no input."""
    return _blocks(f"{layers} x {width}", rank, layers, ((width, width, 0),))
