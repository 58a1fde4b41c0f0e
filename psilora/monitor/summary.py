"""What an optimizer trains with what, in words and numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from psilora.adapters.pair import LoRAPair, as_matrix
from psilora.options import Options
from psilora.steps.state import init_state


@dataclass(frozen=True)
class PairInfo:
    """One LoRA pair of an optimizer, ΔW = scaling·B·A, as it is now.

    Attributes:
        name: Path of the adapted module, with the adapter's name where it is not "default".
        rank, d_out, d_in: r and the shape of ΔW: B is (d_out, r), A is (r, d_in).
        scaling: s.
        step: The kind of step.
        gradient: How G is known: "exact", "dense" or "backward" from what is captured, "tangent" from `.grad` alone.
        metric: The metric, or None.
        lora_A, lora_B: The parameters, in the shapes of their modules.
        uncaptured: Why its activations cannot be captured; None where they can.
        state_bytes: Of its state, once the first step has created it.
    """

    name: str
    rank: int
    d_out: int
    d_in: int
    scaling: float
    step: str
    gradient: str
    metric: str | None
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    uncaptured: str | None
    state_bytes: int

    @property
    def A(self) -> Tensor:
        """A (r, d_in), a view of `lora_A`."""
        return as_matrix(self.lora_A)

    @property
    def B(self) -> Tensor:
        """B (d_out, r), a view of `lora_B`."""
        return as_matrix(self.lora_B)

    @property
    def numbers(self) -> int:
        """The trainable numbers, r·(d_out + d_in)."""
        return self.lora_A.numel() + self.lora_B.numel()


def pair_infos(settings: Sequence[tuple[LoRAPair, Options]], gradients: Mapping[str, str]) -> list[PairInfo]:
    """Return the pairs in order; `gradients` by name for those that are captured."""
    return [
        PairInfo(
            name=pair.name,
            rank=pair.rank,
            d_out=pair.d_out,
            d_in=pair.d_in,
            scaling=pair.scaling,
            step=options.step,
            gradient=_gradient(pair, options, gradients),
            metric=options.metric,
            lora_A=pair.lora_A,
            lora_B=pair.lora_B,
            uncaptured=pair.uncaptured,
            state_bytes=_state_bytes(pair, options),
        )
        for pair, options in settings
    ]


def _gradient(pair: LoRAPair, options: Options, gradients: Mapping[str, str]) -> str:
    return gradients.get(pair.name, "tangent") if options.captures == "activations" else "tangent"


def _state_bytes(pair: LoRAPair, options: Options) -> int:
    """The bytes of a pair's state, from its shapes alone."""
    lora_A, lora_B = (
        nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta")) for p in (pair.lora_A, pair.lora_B)
    )
    states: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    init_state(replace(pair, lora_A=lora_A, lora_B=lora_B), options, *states)
    return sum(t.numel() * t.element_size() for state in states for t in state.values() if isinstance(t, Tensor))


def summary(
    pairs: Sequence[PairInfo], groups: Sequence[Mapping[str, Any]], backend: str, taken: Sequence[str] = ()
) -> str:
    """Return one line per kind of pairs, one for the parameters that AdamW trains, and their totals.

    Args:
        pairs: Of the optimizer.
        groups: Its param groups; that of AdamW, if there is one, is of the kind "adamw".
        backend: Its `backend`.
        taken: Which backend has taken the last step, in words.
    """
    kinds = Counter(_kind(pair) for pair in pairs)
    lines = [f"{count} × {kind}" for kind, count in kinds.items()]
    numbers, state = sum(pair.numbers for pair in pairs), sum(pair.state_bytes for pair in pairs)
    held = sum(t.numel() * t.element_size() for pair in pairs for t in (pair.lora_A, pair.lora_B))
    lines.append(f"{len(pairs)} LoRA pairs: {numbers:,} numbers in {held:,} bytes, state {state:,} bytes")
    others = [p for group in groups if group["kind"] == "adamw" for p in group["params"]]
    if others:
        size = sum(p.numel() for p in others)
        moments = 2 * sum(p.numel() * p.element_size() for p in others)
        lines.append(f"{len(others)} other parameters by AdamW: {size:,} numbers, state {moments:,} bytes")
    lines += [f"last step by {line}" for line in taken]
    return "\n".join([f"PSILoRA, backend {backend}", *(f"  {line}" for line in lines)])


def _kind(pair: PairInfo) -> str:
    metric = "" if pair.metric is None else f", metric {pair.metric}"
    shape = f"{pair.d_out}×{pair.d_in}, r = {pair.rank}, s = {pair.scaling:g}"
    return f"{shape}: {pair.step} step, gradient {pair.gradient}{metric}"
