"""The split of a weight into its factors: (B/t, t·A) is the same weight, and nothing in a step fixes t.

Alternating turns let t run away: at a constant rate one factor grows and the other shrinks by a few per cent a step,
for ever, and the first rate of a warm-up sets the size of B for good. Powers of two bring them back without a rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from psilora.steps.problem import Problem
from psilora.triton_kernels.slots import APART, LARGEST_SHIFT


def shifts(problems: Sequence[Problem], moved: Tensor, squares: Tensor | None = None) -> Tensor | None:
    """Return k of each layer, to be committed as (B·2⁻ᵏ, 2ᵏ·A) (L,) int32, or None where nothing is to be balanced.

    k = ⌊(e + 2)/4⌋ with ‖B‖²/‖A‖² in [2ᵉ⁻¹, 2ᵉ) where that is outside [2⁻⁸, 2⁸], else 0; never where a factor is 0, and
    not in a step that changes nothing. The product keeps every bit, unless an entry leaves its dtype's range.

    Args:
        problems: L layers of equal settings.
        moved: (L,) bool, whether the step changes a layer.
        squares: (2, L), ‖A‖² and ‖B‖² where they are known, before the step.
    """
    options = problems[0].options
    if not options.balance:
        return None
    if squares is None:
        factors = [[p.pair.lora_A.detach() for p in problems], [p.pair.lora_B.detach() for p in problems]]
        # not in float64, whose norms take three times as long on a CPU
        norms = [torch.stack(torch._foreach_norm(side, 2, dtype=problems[0].dtype)) for side in factors]
        squares = torch.stack(norms).double().square()
    ratio = squares[1] / squares[0]
    due = moved & (ratio > 0) & torch.isfinite(ratio) & ((ratio > APART) | (ratio < 1 / APART))
    if options.burn_in:
        due = due & (torch.stack([p.state_A["step"] for p in problems]) >= options.burn_in)
    exponent = (torch.frexp(ratio).exponent + 2).div(4, rounding_mode="floor")
    return torch.where(due, exponent.clamp(-LARGEST_SHIFT, LARGEST_SHIFT), 0).int()
