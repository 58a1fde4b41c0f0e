"""What the optimizer remembers of a LoRA pair, where it begins."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from psilora.adapters import LoRAPair
from psilora.groups import momentum_rank
from psilora.metric import initial_metric, metric_shape
from psilora.momentum import initial_momentum
from psilora.numerics import compute_dtype
from psilora.options import Options


def state_dtype(name: str, parameter: Tensor) -> torch.dtype:
    """Return the dtype of the state `name` of a LoRA parameter: fp32 or better, whatever the parameter's."""
    if name in ("controller", "norms"):
        return torch.float64
    return torch.float32 if name == "step" else compute_dtype(parameter.dtype)


def init_state(pair: LoRAPair, options: Options, state_B: dict[str, Any], state_A: dict[str, Any]) -> None:
    """Create the state of a pair that its settings need, where it does not exist yet.

    fp32 (fp64 for fp64 parameters): "step" 0-d; "momentum" (d_out, r_m) and (r_m, d_in), r_m = 2r and zero in a
    spectral step (r with joint=False); "metric" (d_out,) and (d_in,), dense (d_out, d_out) and (d_in, d_in),
    or low-rank (d_out, k) and (d_in, k) beside "metric_rest" (1,), k as far as the side allows it. fp64 "norms" (3,) of
    lora_B in a spectral step that fades.

    Raises:
        RuntimeError: What is there has other shapes than these settings give, because they were changed since.
    """
    dtype, device = compute_dtype(pair.lora_A.dtype), pair.lora_A.device
    for state in (state_A, state_B):
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
    spectral = options.step == "spectral"
    if options.momentum > 0:
        rank = _momentum_rank(pair, options)
        if "momentum" in state_A:
            _check_momentum(pair, options, state_A["momentum"].shape[0], rank)
        elif spectral:
            state_B["momentum"] = torch.zeros(pair.d_out, rank, dtype=dtype, device=device)
            state_A["momentum"] = torch.zeros(rank, pair.d_in, dtype=dtype, device=device)
        else:
            state_B["momentum"], state_A["momentum"] = initial_momentum(pair.B, pair.A, rank, dtype)
    if spectral and options.fade and "norms" not in state_B:
        state_B["norms"] = torch.zeros(3, dtype=torch.float64, device=device)
    if options.metric is not None:
        _init_metric(pair, options, state_B, state_A)


def _momentum_rank(pair: LoRAPair, options: Options) -> int:
    """The rank of the momentum that these settings give a pair, for either step."""
    if options.step == "gradient":
        return momentum_rank(pair, options)
    return 2 * pair.rank if options.joint else pair.rank


def _check_momentum(pair: LoRAPair, options: Options, held: int, wanted: int) -> None:
    """Raise RuntimeError for a param group whose momentum has been given another rank since it began."""
    if held == wanted:
        return
    setting = f"momentum_rank={options.momentum_rank}" if options.step == "gradient" else f"joint={options.joint}"
    raise RuntimeError(
        f"{pair.name}: the state holds a momentum of rank {held}, and {setting} asks for rank {wanted}; it cannot be "
        "changed in training: set it back, or build a new optimizer"
    )


def _init_metric(pair: LoRAPair, options: Options, state_B: dict[str, Any], state_A: dict[str, Any]) -> None:
    form, rank = options.form, options.metric_rank or pair.rank
    if "metric" in state_A:
        if state_A["metric"].shape != metric_shape(pair.d_in, form, rank):
            raise RuntimeError(
                f"{pair.name}: the state holds a metric of shape {tuple(state_A['metric'].shape)}, not that of "
                f"metric={options.metric!r}; a metric cannot be changed in training: build a new optimizer"
            )
        return
    dtype, device = compute_dtype(pair.lora_A.dtype), pair.lora_A.device
    from_zero = options.step == "spectral" or options.metric_bias_correction
    metric_B, metric_A = (
        initial_metric(size, from_zero, dtype=dtype, device=device, form=form, rank=rank)
        for size in (pair.d_out, pair.d_in)
    )
    state_A.update(metric_A)
    state_B.update(metric_B)
