"""The state of a gradient step, where it begins."""

from __future__ import annotations

from typing import Any

from psilora.adapters.pair import LoRAPair
from psilora.linalg.precision import compute_dtype
from psilora.lowrank.momentum import initial_momentum
from psilora.options import GradientOptions, Options
from psilora.steps.gradient.metrics import FORMS


def init_state(pair: LoRAPair, options: Options, state_B: dict[str, Any], state_A: dict[str, Any]) -> None:
    """Create what is missing.

    "momentum" (d_out, r_m), zero, and (r_m, d_in); "metric" (d_out,) and (d_in,), dense (d_out, d_out) and
    (d_in, d_in), or low-rank (d_out, k) and (d_in, k) beside "metric_rest" (1,), k as far as the side allows it.

    Raises:
        RuntimeError: The metric that is there has another shape.
    """
    own = GradientOptions.of(options)
    dtype, device = compute_dtype(pair.lora_A.dtype), pair.lora_A.device
    if own.momentum > 0 and "momentum" not in state_A:
        rank = own.rank_of_momentum(pair.rank, pair.d_out, pair.d_in)
        state_B["momentum"], state_A["momentum"] = initial_momentum(pair.B, pair.A, rank, dtype)
    if own.form is None:
        return
    form, rank = FORMS[own.form], own.metric_rank or pair.rank
    for state, size in ((state_A, pair.d_in), (state_B, pair.d_out)):
        if "metric" not in state:
            start = 0.0 if own.metric_bias_correction else 1.0
            state.update(form.initial(size, rank, start, dtype=dtype, device=device))
        elif state["metric"].shape != form.shape(size, rank):
            raise RuntimeError(
                f"{pair.name}: the state holds a metric of shape {tuple(state['metric'].shape)}, not that of "
                f"metric={own.metric!r}; a metric cannot be changed in training: build a new optimizer"
            )
