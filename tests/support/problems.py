"""Synthetic problems of one optimizer step, and their float64 twins."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from psilora.adapters import LoRAPair
from psilora.lowrank.momentum import initial_momentum
from psilora.options import Options
from psilora.steps.problem import Problem

Shape = tuple[int, int, int]  # d_out, d_in, rank


def make_problem(
    shape: Shape,
    *,
    dtype: torch.dtype = torch.float32,
    rows: tuple[int, ...] = (24,),
    scaling: float = 2.0,
    momentum_rank: int = 0,
    device: str = "cpu",
    zero_B: bool = False,
    zero_gradient: bool = False,
    scale: float = 1.0,
    **settings: Any,
) -> Problem:
    """A pair with random factors, captured rows and state; `.grad` is what autograd would leave, times `scale`."""
    d_out, d_in, rank = shape
    options = Options.of_settings(
        {"lr": 0.05, "step": "gradient", "gradient": "exact", "momentum": 0.9 if momentum_rank else 0.0, **settings}
    )
    A = torch.randn(rank, d_in, dtype=torch.float64) / d_in**0.5
    B = torch.randn(d_out, rank, dtype=torch.float64) * (0.0 if zero_B else 0.3 / rank**0.5)
    pair = LoRAPair(
        "layer",
        nn.Parameter(A.to(device, dtype)),
        nn.Parameter(B.to(device, dtype)),
        SimpleNamespace(scaling=scaling),  # type: ignore[arg-type]
    )
    total = max(1, sum(rows))
    chunks = []
    for n in rows:
        x, s = torch.randn(n, d_in), torch.randn(n, d_out) / total * (0.0 if zero_gradient else 1.0)
        chunks.append((x.to(device, dtype), s.to(device, dtype)))
    record = SimpleNamespace(
        chunks=chunks, rows=sum(rows), captured=True, sum_x2=None, sum_s2=None, holds="rows", held=None
    )
    dA, dB = _gradients(pair, chunks, scale)
    exact = options.gradient == "exact"
    if not exact:
        record.sum_x2 = sum((x.float().square().sum(0) for x, _ in chunks), torch.zeros(d_in, device=device))
        record.sum_s2 = sum((s.float().square().sum(0) for _, s in chunks), torch.zeros(d_out, device=device))
    problem = Problem(pair, options, dA.to(dtype), dB.to(dtype), record, exact, {}, {})  # type: ignore[arg-type]
    _init_state(problem, momentum_rank)
    return problem


def _gradients(pair: LoRAPair, chunks: list[tuple[Tensor, Tensor]], scale: float) -> tuple[Tensor, Tensor]:
    """(S_B·B)ᵀX and S_Bᵀ(X·Aᵀ) in float64, times `scale`."""
    A, B = pair.A.double(), pair.B.double()
    dA, dB = torch.zeros_like(A), torch.zeros_like(B)
    for x, s in chunks:
        dA += (s.double() @ B).mT @ x.double()
        dB += s.double().mT @ (x.double() @ A.mT)
    return dA * scale, dB * scale


def _init_state(problem: Problem, momentum_rank: int) -> None:
    pair, options = problem.pair, problem.options
    device, dtype = pair.lora_A.device, problem.dtype
    for state, size in ((problem.state_A, pair.d_in), (problem.state_B, pair.d_out)):
        state["step"] = torch.tensor(3.0, device=device)
        if options.metric is not None:
            state["metric"] = torch.rand(size, device=device, dtype=dtype) + 0.1
    if momentum_rank:
        B_m, A_m = initial_momentum(pair.B, pair.A, momentum_rank, dtype)
        problem.state_B["momentum"] = B_m + 0.1 * torch.randn_like(B_m)
        problem.state_A["momentum"] = A_m


def in_float64(problem: Problem) -> Problem:
    """The same problem in float64; 16-bit `.grad` of an exact gradient is replaced by the unrounded one."""
    pair, record = problem.pair, problem.record
    twin = LoRAPair(pair.name, nn.Parameter(pair.lora_A.double()), nn.Parameter(pair.lora_B.double()), pair.owner)
    chunks = [(x.double(), s.double()) for x, s in record.chunks]  # type: ignore[union-attr]
    squares = [None if t is None else t.double() for t in (record.sum_x2, record.sum_s2)]  # type: ignore[union-attr]
    copy = SimpleNamespace(
        chunks=chunks,
        rows=record.rows,
        captured=True,
        holds="rows",
        held=None,
        sum_x2=squares[0],
        sum_s2=squares[1],  # type: ignore[union-attr]
    )
    dA, dB = problem.dA.double(), problem.dB.double()
    if problem.exact and problem.dA.element_size() < 4:
        dA, dB = _gradients(twin, chunks, 1.0)
    states = [{k: v.double() for k, v in state.items()} for state in (problem.state_A, problem.state_B)]
    return Problem(twin, problem.options, dA, dB, copy, problem.exact, *states)  # type: ignore[arg-type]
