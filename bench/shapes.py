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


# q, k, v, o, gate, up, down
_LLAMA_8B = (
    (4096, 4096, 0), (1024, 4096, 0), (1024, 4096, 0), (4096, 4096, 1),
    (14336, 4096, 2), (14336, 4096, 2), (4096, 14336, 3),
)  # fmt: skip

MODELS = {
    model.name: model
    for model in (
        _blocks("tiny", 4, 2, ((40, 24, 0), (24, 24, 0), (24, 40, 1))),
        _blocks("minilm", 8, 6, ((384, 384, 0), (384, 384, 0))),
        _blocks("roberta-base", 8, 12, ((768, 768, 0), (768, 768, 0))),
        _blocks("llama-3-8b", 16, 32, _LLAMA_8B),
        _blocks("llama-3-8b-r64", 64, 32, _LLAMA_8B),
    )
}
