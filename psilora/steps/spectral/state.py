"""The state of a spectral step, where it begins."""

from __future__ import annotations

from typing import Any

import torch

from psilora.adapters.pair import LoRAPair
from psilora.linalg.precision import compute_dtype
from psilora.options import Options, SpectralOptions


def init_state(pair: LoRAPair, options: Options, state_B: dict[str, Any], state_A: dict[str, Any]) -> None:
    """Create what is missing, all of it zero.

    "momentum" (d_out, 2r) and (2r, d_in), r instead of 2r with joint=False; "metric" (d_out,) and (d_in,), √D; "norms"
    (3,) of lora_B, in fp64, for `fade` and `cap`.
    """
    own = SpectralOptions.of(options)
    dtype, device = compute_dtype(pair.lora_A.dtype), pair.lora_A.device
    if own.momentum > 0 and "momentum" not in state_A:
        rank = own.rank_of_momentum(pair.rank, pair.d_out, pair.d_in)
        state_B["momentum"] = torch.zeros(pair.d_out, rank, dtype=dtype, device=device)
        state_A["momentum"] = torch.zeros(rank, pair.d_in, dtype=dtype, device=device)
    if own.follows and "norms" not in state_B:
        state_B["norms"] = torch.zeros(3, dtype=torch.float64, device=device)
    if own.metric is not None and "metric" not in state_A:
        state_B["metric"] = torch.zeros(pair.d_out, dtype=dtype, device=device)
        state_A["metric"] = torch.zeros(pair.d_in, dtype=dtype, device=device)
