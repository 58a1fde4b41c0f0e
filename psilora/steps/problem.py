"""What one optimizer step knows about one LoRA pair, and the factors common to all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from psilora.adapters.pair import LoRAPair
from psilora.capture.record import Record
from psilora.linalg.precision import compute_dtype
from psilora.options.base import Options
from psilora.steps.counts import GlobalCounts

_NONE: Any = None


@dataclass(eq=False)
class Problem:
    """One pair in one step. Matrices view the parameters and gradients; nothing here is copied.

    An optimizer keeps a problem from step to step, and gives it each step's gradients, for as long as its tensors stay
    where they are and nothing else about it changes but numbers in its options (`psilora.steps.assemble`): what was
    prepared for problems serves the same ones again.

    Attributes:
        dA, dB: The LoRA gradients `.grad`, (r, d_in) and (d_out, r).
        record: The captured X and S_B (exact) or their sums (tangent with K-FAC); None when only `.grad` is used.
        exact: Whether G = SᵀX is taken from what was captured; else the tangent projection from dA and dB.
        state_A, state_B: Optimizer state of lora_A and lora_B.
        counts: What all processes know of the pair, where the step asked them.
    """

    pair: LoRAPair
    options: Options
    dA: Tensor
    dB: Tensor
    record: Record | None
    exact: bool
    state_A: dict[str, Any]
    state_B: dict[str, Any]
    counts: GlobalCounts | None = None

    def release(self) -> None:
        """Let go of the gradients; the next step brings others."""
        self.dA = self.dB = _NONE

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return compute_dtype(self.pair.lora_A.dtype)

    @property
    def holds(self) -> str:
        """The form in which G is kept, a kind of `psilora.capture.storage`."""
        return self.record.holds if self.exact and self.record is not None else "nothing"

    @property
    def reuse(self) -> bool:
        """Whether BᵀG and GAᵀ at the current factors are `.grad` itself: not when that was rounded to 16 bits."""
        return not (self.exact and min(self.dA.element_size(), self.dB.element_size()) < 4)

    @property
    def layout(self) -> tuple[tuple[int, tuple[object, ...]], ...]:
        """Rows N, and the dtypes, strides and alignments of X and S, of every call, where they are kept."""
        return tuple(
            [
                (x.shape[0], (x.dtype, s.dtype, x.stride(), s.stride(), x.data_ptr() % 16, s.data_ptr() % 16))
                for x, s in self.chunks
            ]
        )

    @property
    def chunks(self) -> Sequence[tuple[Tensor, Tensor]]:
        """X and S of every call, where G is known from them."""
        record = self.record
        return record.chunks if self.exact and record is not None and record.holds == "rows" else ()

    @property
    def key(self) -> tuple[object, ...]:
        """Problems with equal keys can be stacked."""
        pair = self.pair
        momentum_rank = self.state_A["momentum"].shape[0] if "momentum" in self.state_A else 0
        return (
            pair.B.shape,
            pair.A.shape,
            momentum_rank,
            pair.lora_A.dtype,
            pair.lora_B.dtype,
            self.dA.dtype,
            self.dB.dtype,
            pair.lora_A.device,
            self.holds,
            self.options.structure,
        )


class Problems(list[Problem]):
    """Problems of a step, in order, with what has been prepared for these very ones, by whoever prepares it.

    It is not to be changed once something has been prepared.
    """

    def __init__(self, problems: Iterable[Problem] = ()) -> None:
        super().__init__(problems)
        self.prepared: dict[str, Any] = {}

    def where(self, wanted: Callable[[Problem], bool]) -> Problems:
        """Return those that are wanted; this very list if they are all."""
        found = Problems(problem for problem in self if wanted(problem))
        return self if len(found) == len(self) else found

    @staticmethod
    def of(problems: Sequence[Problem]) -> Problems:
        """Return problems as such a list, a new one unless they are."""
        return problems if isinstance(problems, Problems) else Problems(problems)


def grouped(problems: Sequence[Problem]) -> list[list[Problem]]:
    """Problems that can be stacked, together."""
    groups: dict[tuple[object, ...], list[Problem]] = {}
    for problem in problems:
        groups.setdefault(problem.key, []).append(problem)
    return list(groups.values())


@dataclass
class Scales:
    """Factors on the gradient and the rate of every pair of a step; None means 1.

    Attributes:
        clip: From `max_grad_norm` and a loss scale: multiplies `.grad`, X and S alike; a 0-d tensor.
        external: c, what happened to `.grad` after backward (clipping, unscaling): multiplies SᵀX only.
        rate: s, a controller's factor on every η; a 0-d tensor.
        share: 1/W with W processes, whose SᵀX are summed: multiplies SᵀX only.
    """

    clip: Tensor | None = None
    external: Tensor | None = None
    rate: Tensor | None = None
    share: float = 1.0
