"""What a step must read and write, counted from shapes: the floor that its time is compared with."""

from __future__ import annotations

import functools
from typing import Any

import torch

from bench.workload import Workload
from psilora.backends.triton.gradient import plan
from psilora.backends.triton.gradient.plan import Layer, Structure


@functools.cache
def passes(num_iters: int, momentum: bool, exact: bool) -> int:
    """Return how often an exact step reads all of X and S: its turns that need a product."""
    structure = Structure(num_iters=num_iters, momentum=momentum, exact=exact)
    return sum(turn.product for turn in plan.schedule(structure, 16).turns)


def state_numbers(work: Workload, settings: dict[str, Any]) -> int:
    """Return the numbers a step reads or writes besides X and S: factors twice, gradients once, momentum twice."""
    factors = sum(p.numel() for p in work.parameters())
    per_factor = 3 + (2 if settings.get("momentum", 0.9) else 0)
    averages = sum(o + i for o, i, _ in work.model.layers) if settings.get("metric") else 0
    return per_factor * factors + 2 * averages


def step_bytes(work: Workload, settings: dict[str, Any]) -> int:
    """Return the bytes that a step of these settings must move."""
    exact = settings.get("gradient", "exact") == "exact" and settings.get("step", "gradient") == "gradient"
    reads = passes(settings.get("num_iters", 1), bool(settings.get("momentum", 0.9)), exact)
    reads += bool(settings.get("metric") and exact)
    return reads * work.activation_bytes() + 4 * state_numbers(work, settings)


def adamw_bytes(work: Workload) -> int:
    """Return the bytes of an AdamW step: p, m and v twice, the gradient once, fp32."""
    return 4 * 7 * sum(p.numel() for p in work.parameters())


def step_flops(work: Workload, settings: dict[str, Any]) -> int:
    """Return the floating-point operations of a step's products with X and S."""
    r, momentum = work.model.rank, bool(settings.get("momentum", 0.9))
    columns = sum(
        plan.columns(turn, Layer(1, 1, r, r if momentum else 0, Structure()))
        for turn in plan.schedule(Structure(settings.get("num_iters", 1), momentum=momentum), 16).turns
        if turn.product
    )
    widths = sum(o + i for o, i, _ in work.model.layers)
    return 2 * work.tokens * widths * columns


def planned_launches(work: Workload, settings: dict[str, Any]) -> int:
    """Return the kernels that the Triton backend would launch on these layers, from its plan alone."""
    exact = settings.get("gradient", "exact") == "exact"
    structure = Structure(
        num_iters=settings.get("num_iters", 1),
        momentum=bool(settings.get("momentum", 0.9)),
        metric=settings.get("metric"),
        exact=exact,
    )
    rank = work.model.rank
    own = rank if structure.momentum else 0
    rows = (work.tokens,) if exact else ()
    low = work.X[0].dtype
    layers = [
        Layer(o, i, rank, own, structure, X_dtype=low, S_dtype=low, device=torch.device(work.device), rows=rows)
        for o, i, _ in work.model.layers
    ]
    return len(plan.make_plan(layers).launches())
