"""Everything that a step would compile, compiled ahead: steps on made-up gradients that are computed and refused."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from psilora.adapters.pair import LoRAPair
from psilora.backends import dispatch
from psilora.backends.triton import backend as triton_backend
from psilora.distributed.sharding import is_sharded
from psilora.options import Options
from psilora.steps.problem import Problem, Problems, Scales
from psilora.steps.state import init_state

#: Rows of X and S of a captured layer, where nobody says how many there will be.
ROWS = 256


def warm_up(
    settings: Sequence[tuple[LoRAPair, Options]],
    states: Mapping[Tensor, dict[str, Any]],
    gradients: Mapping[str, str],
    backend: str,
    rows: int | None,
    increments: bool,
) -> list[str]:
    """Compile what the kernels need for a step of these pairs, and return in words what was done, a line for each.

    The kernels run on zero gradients and end in a commit that is refused: no parameter and no state is changed, nor
    their version counters, and what they allocate goes with this call. With "auto" each kind is checked first, as
    before its first step. X and S are taken to be of the adapters' dtypes and contiguous.

    Args:
        settings: Every pair with its settings.
        states: The optimizer's state; what is missing is made for this call.
        gradients: By name of a captured pair, how G is known to it.
        backend: The optimizer's.
        rows: N of a captured layer, or None for `ROWS`.
        increments: Whether increments are asked for, as a controller does.
    """
    began = time.perf_counter()
    with torch.no_grad():
        problems = Problems(
            _problem(pair, options, states, gradients.get(pair.name), rows or ROWS)
            for pair, options in settings
            if not is_sharded(pair.lora_A)
        )
        route = dispatch.route_of(problems, backend, shared=False)
        for group in route.groups:
            device = group[0].pair.lora_A.device
            no = torch.zeros((), dtype=torch.bool, device=device)
            for execution in triton_backend.compute(group, Scales(), {}):
                if increments:
                    execution.increments()
                for write in execution.stage(no):
                    write()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    lines = [f"{line}, compiled" if line.startswith("triton") else f"{line}: nothing to compile" for line in route.said]
    left = len(settings) - len(problems)
    if left:
        lines.append(f"reference: {left} pairs, sharded over processes: nothing to compile")
    return [*lines, f"took {time.perf_counter() - began:.1f} s"]


def _problem(
    pair: LoRAPair, options: Options, states: Mapping[Tensor, dict[str, Any]], gradient: str | None, rows: int
) -> Problem:
    """A pair without a gradient to speak of. Its tensors share memory with the optimizer's, but no version counter."""
    lora_A, lora_B = (nn.Parameter(p.data, requires_grad=False) for p in (pair.lora_A, pair.lora_B))
    twin = replace(pair, lora_A=lora_A, lora_B=lora_B)
    state_A, state_B = (
        {name: value.data if isinstance(value, Tensor) else value for name, value in states.get(p, {}).items()}
        for p in (pair.lora_A, pair.lora_B)
    )
    init_state(twin, options, state_B, state_A)
    dA, dB = torch.zeros_like(twin.A), torch.zeros_like(twin.B)
    record: Any = None
    exact = options.captures == "activations" and gradient == "exact"
    if options.captures is not None:
        chunks = [(lora_A.new_zeros(rows, pair.d_in), lora_B.new_zeros(rows, pair.d_out))] if exact else []
        ones = [lora_A.new_ones(size, dtype=torch.float32) for size in (pair.d_in, pair.d_out)]
        record = SimpleNamespace(
            chunks=chunks, rows=rows, holds="rows" if exact else gradient, captured=True, held=None,
            sum_x2=ones[0], sum_s2=ones[1],
        )  # fmt: skip
    return Problem(twin, options, dA, dB, record, exact or gradient == "dense", state_A, state_B)
