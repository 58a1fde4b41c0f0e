"""Whole steps of the Triton backend where the numbers, the races and the launches are real; small twins on the CPU."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from gpu_models import factors, network, step
from models import bare
from torch import nn

from psilora import LoRALinear
from psilora.backends import self_check
from psilora.backends.dispatch import backend_unavailable

pytestmark = pytest.mark.skipif(
    backend_unavailable("triton") is not None, reason=f"no Triton backend: {backend_unavailable('triton')}"
)
DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu), "cpu"]
KINDS: list[dict[str, Any]] = [
    {"momentum": 0.0},
    {"num_iters": 2, "first": "B", "momentum_rank": 3},
    {"metric": "kfac"},
    {"metric": "shampoo", "momentum": 0.0},
    {"gradient": "tangent"},
    {"step": "spectral"},
    {"step": "spectral", "metric": "lora", "controller": "slope"},
    {"step": "spectral", "joint": False},
]
#: Its singular value decompositions wait for the device, so that no graph can hold it.
WAITING: list[dict[str, Any]] = [{"solver": "ritz", "momentum_rank": 3, "first": "B"}]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS + WAITING, ids=str)
@pytest.mark.parametrize("rank", [5, pytest.param(40, marks=pytest.mark.gpu)])
def test_steps_agree_with_the_float64_reference(device: str, kind: dict[str, Any], rank: int) -> None:
    """The error of every factor's increment is at most twice that of the fp32 reference, up to a floor of rounding."""
    model = network(device, rank)
    plain, exact = copy.deepcopy(model).cpu(), copy.deepcopy(model).cpu().double()
    start = factors(exact)
    runs = [
        (net, bare(net, 0.1, backend=backend, **kind))
        for net, backend in ((model, "triton"), (plain, "reference"), (exact, "reference"))
    ]
    for rows in (1000, 77) if device == "cuda" else (19, 6):
        x = torch.randn(rows, exact[0].base.in_features)
        for net, optimizer in runs:
            step(net, optimizer, x.to(next(net.parameters())))
    for before, got, fp32, want in zip(start, factors(model), factors(plain), factors(exact), strict=True):
        moved = (want - before).norm()
        error, usual = ((t.cpu().double() - want).norm() / moved for t in (got, fp32))
        assert error <= 2 * usual + 1e-5, f"{tuple(want.shape)}: off by {error:.1e}, the reference by {usual:.1e}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [{}, {"metric": "kfac", "num_iters": 2}], ids=str)
def test_repeated_runs_are_bitwise_equal(device: str, kind: dict[str, Any]) -> None:
    start = network(device, 8)
    rows = (3000, 3000) if device == "cuda" else (50,)
    batches = [torch.randn(n, start[0].base.in_features).to(device) for n in rows]
    runs = []
    for _ in range(2 if device == "cpu" else 5):
        model = copy.deepcopy(start)
        optimizer = bare(model, 0.1, backend="triton", **kind)
        for x in batches:
            step(model, optimizer, x)
        runs.append(factors(model))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_a_thousand_layers(device: str) -> None:
    """As many layers as a step may meet (a few in the interpreter); each is checked."""
    count, width = (1000, 96) if device == "cuda" else (5, 12)
    model = nn.ModuleList(LoRALinear(nn.Linear(width, width + i % 3), 4) for i in range(count)).to(device)
    exact = copy.deepcopy(model).cpu().double()
    x = torch.randn(9, width)
    for net, optimizer in (
        (model, bare(model, 0.1, backend="triton")),
        (exact, bare(exact, 0.1, backend="reference")),
    ):
        data = x.to(next(net.parameters()))
        for _ in range(2):
            optimizer.zero_grad()
            sum((layer(data) - 1).square().mean() for layer in net).backward()
            optimizer.step()
    for got, want in zip(factors(model), factors(exact), strict=True):
        torch.testing.assert_close(got.cpu().double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_a_non_finite_gradient_changes_nothing(device: str) -> None:
    model = network(device, 8)
    optimizer = bare(model, 0.1, backend="triton", metric="kfac")
    x = torch.randn(20, model[0].base.in_features, device=device)
    step(model, optimizer, x)
    before = factors(model) + [v.clone() for s in optimizer.state.values() for v in s.values()]
    optimizer.zero_grad()
    (model(x) * float("nan")).sum().backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    assert device == "cuda" or any("a step was skipped" in str(w.message) for w in caught)
    after = factors(model) + [v for s in optimizer.state.values() for v in s.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert optimizer.stats()["skipped_steps"] == 1


@pytest.mark.gpu
@pytest.mark.parametrize("clipped", [False, True])
def test_a_step_does_not_wait_for_the_device(clipped: bool) -> None:
    model = network("cuda", 8)
    optimizer = bare(model, 0.1)
    x = torch.randn(64, model[0].base.in_features, device="cuda")
    for _ in range(3):  # compiles, and checks the first captures, which may wait
        step(model, optimizer, x)
    verdicts = [right for kind, right in self_check._verdicts.items() if kind.device == x.device]
    assert verdicts and all(verdicts)  # the kernels take the step below
    optimizer.zero_grad()
    (model(x) - 1).square().mean().backward()
    if clipped:
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_graph_of_a_whole_training_step_replays_as_eager_steps(kind: dict[str, Any]) -> None:
    """Forward, backward and step in one CUDA graph: new batches and a new lr reach it through their tensors."""
    model = network("cuda", 8).append(nn.Linear(64, 3, device="cuda"))  # the head is AdamW's
    twin = copy.deepcopy(model)
    batches = [torch.randn(96, model[0].base.in_features, device="cuda") for _ in range(6)]
    rates = [0.0, 0.05, 0.1, 0.1, 0.03, 0.01]
    lr, other_lr = torch.zeros((), device="cuda"), torch.zeros((), device="cuda")
    optimizer = bare(model, lr, backend="triton", **kind)
    other = bare(twin, other_lr, backend="triton", **kind)
    x = torch.empty_like(batches[0])
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):  # compiles, and checks the first captures, which may wait
        for batch, rate in zip(batches[:3], rates[:3], strict=True):
            lr.fill_(rate)
            x.copy_(batch)
            step(model, optimizer, x)
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(model, optimizer, x)
    for batch, rate in zip(batches[3:], rates[3:], strict=True):
        lr.fill_(rate)
        x.copy_(batch)
        graph.replay()
    for batch, rate in zip(batches, rates, strict=True):
        other_lr.fill_(rate)
        step(twin, other, batch)
    for got, want in zip(factors(model), factors(twin), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
