"""The first ten minutes of the DEFAULT step on a GPU, in this order; every body also runs on the CPU, on small layers.

What only a GPU can show, races, waiting and graphs, has a stand-in on the CPU: the kernels run in the interpreter, an
operator that would wait is looked for by name, and a graph is the same steps once more.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from gpu_models import factors, step
from gpu_models import network as any_network
from models import bare
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from psilora import LoRALinear, PSILoRA, runtime
from psilora.backends import self_check
from psilora.backends.dispatch import backend_unavailable

pytestmark = pytest.mark.skipif(
    backend_unavailable("triton") is not None, reason=f"no Triton backend: {backend_unavailable('triton')}"
)
DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu), "cpu"]
RANKS = [pytest.param("cuda", rank, marks=pytest.mark.gpu) for rank in (16, 40, 64)] + [("cpu", 5)]
#: Operators that hand a number to the host.
WAITING = {"_local_scalar_dense", "item", "is_nonzero", "nonzero"}


class Waits(TorchDispatchMode):
    """Raises where an operator would wait for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if name in WAITING:
            raise RuntimeError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_waiting(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Raise at whatever waits for the device; on the CPU a step is made to believe that a look is not free."""
    if device == "cpu":
        with monkeypatch.context() as patched:
            patched.setattr(runtime, "at_hand", lambda where: False)
            with Waits():
                yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Graph:
    """Steps of a captured graph; on the CPU, where there are none, the steps themselves."""

    def __init__(self, device: str, run: Callable[[], object]) -> None:
        self.run, self.graph = run, None
        if device == "cuda":
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                run()

    def replay(self) -> None:
        """Take a step."""
        if self.graph is not None:
            self.graph.replay()
        else:
            self.run()


def warmed_up(device: str, run: Callable[[], object], times: int = 3) -> None:
    """Run on a stream of its own, as a capture wants it."""
    if device == "cpu":
        for _ in range(times):
            run()
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(times):
            run()
    torch.cuda.current_stream().wait_stream(stream)


def backend_of(device: str) -> str:
    """ "auto" where it takes the kernels."""
    return "auto" if device == "cuda" else "triton"


def network(device: str, rank: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """As for the other kinds of step, but one layer in the interpreter, of which a step takes seconds."""
    return any_network(device, rank, dtype, (21, 10))


def batch(model: nn.Module, device: str, rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, model[0].base.in_features, device=device, dtype=dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernels_compile_and_pass_their_check(device: str, dtype: torch.dtype) -> None:
    """First of all: every launch of the step compiles, and the kinds are trusted, the commit included."""
    optimizer = PSILoRA(network(device, 8, dtype), 0.05, backend=backend_of(device))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        said = optimizer.warmup()
    assert any(line.startswith("triton on") and line.endswith("compiled") for line in said), said
    assert not any(line.startswith("reference") for line in said), said
    if device == "cuda":
        verdicts = [right for kind, right in self_check._verdicts.items() if kind.device.type == device]
        assert verdicts and all(verdicts)


@pytest.mark.parametrize(("device", "rank"), RANKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_agree_with_the_float64_reference(device: str, rank: int, dtype: torch.dtype) -> None:
    """Of every layer the increment of s·B·A, whose split into factors a balancing may change, after two steps."""
    model = network(device, rank, dtype)
    exact = copy.deepcopy(model).cpu().double()
    runs = [(model, PSILoRA(model, 0.05, backend=backend_of(device))), (exact, PSILoRA(exact, 0.05))]
    layers = [(a, b) for a, b in zip(model, exact, strict=True) if isinstance(b, LoRALinear)]
    start = [b.lora_B.weight.detach() @ b.lora_A.weight.detach() for _, b in layers]
    for rows in (1000, 77) if device == "cuda" else (19, 6):
        x = torch.randn(rows, exact[0].base.in_features).to(dtype)
        for net, optimizer in runs:
            step(net, optimizer, x.to(next(net.parameters())))
    assert all("triton" in line for line in runs[0][1].backends())
    for (got, want), before in zip(layers, start, strict=True):
        after = want.lora_B.weight.detach() @ want.lora_A.weight.detach()
        found = got.lora_B.weight.detach().cpu().double() @ got.lora_A.weight.detach().cpu().double()
        error = float((found - after).norm() / (after - before).norm())
        # In bf16 the parameters themselves are rounded, by 2⁻⁹ of their size, and the gradients with them.
        assert error < (2e-3 if dtype == torch.float32 else 0.5), f"{tuple(after.shape)}: {error:.1e}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("settings", [{}, {"max_grad_norm": 1e-3}, {"lr": torch.tensor(0.01)}], ids=str)
def test_a_step_does_not_wait_for_the_device(
    device: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network(device, 8)
    optimizer = PSILoRA(model, **{"lr": 0.05, "backend": backend_of(device), **settings})
    x = batch(model, device, 64)
    for _ in range(2):  # compiles, and makes the pinned tables
        step(model, optimizer, x)
    optimizer.zero_grad()
    (model(x) - 1).square().mean().backward()
    with no_waiting(device, monkeypatch):
        optimizer.step()
    with pytest.raises(RuntimeError), no_waiting(device, monkeypatch):  # it would be noticed
        float(model[0].lora_A.weight.sum())


@pytest.mark.parametrize(("device", "rank"), RANKS)
def test_repeats_are_bitwise_equal(device: str, rank: int) -> None:
    """A hundred times from one state; a race shows in a few."""
    model = network(device, rank)
    optimizer = PSILoRA(model, 0.05, backend=backend_of(device))
    x = batch(model, device, 500 if device == "cuda" else 20)
    step(model, optimizer, x)
    start, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    first: list[Tensor] = []
    for number in range(100 if device == "cuda" else 2):
        model.load_state_dict(start)
        optimizer.load_state_dict(state)
        step(model, optimizer, x)
        found = factors(model) + [v.clone() for s in optimizer.state.values() for v in s.values()]
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True)), f"repeat {number}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_graph_of_the_whole_step_follows_data_and_rate(device: str, dtype: torch.dtype) -> None:
    """Forward, backward and step, the head's AdamW included; new batches and rates reach it through their tensors."""
    model = network(device, 8, dtype)
    model = model.append(nn.Linear(model[-1].base.out_features, 3, device=device, dtype=dtype))
    twin = copy.deepcopy(model)
    batches = [batch(model, device, 96 if device == "cuda" else 9, dtype) for _ in range(5)]
    rates = [0.0, 0.05, 0.05, 0.03, 0.01]
    lr, other_lr = (torch.zeros((), device=device) for _ in range(2))
    optimizer, other = (PSILoRA(net, rate, backend="triton") for net, rate in ((model, lr), (twin, other_lr)))
    x, taken = torch.empty_like(batches[0]), iter(zip(batches, rates, strict=True))

    def run() -> None:
        step(model, optimizer, x)

    def feed() -> None:
        values, rate = next(taken)
        x.copy_(values)
        lr.fill_(rate)

    def fed() -> None:
        feed()
        run()

    warmed_up(device, fed, 2)
    graph = Graph(device, run) if device == "cuda" else Graph(device, lambda: None)
    graph.run = run
    for _ in range(3):
        feed()
        graph.replay()
    for values, rate in zip(batches, rates, strict=True):
        other_lr.fill_(rate)
        step(twin, other, values)
    assert optimizer.stats()["skipped_steps"] == 0
    for got, want in zip(factors(model), factors(twin), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_two_devices_take_their_own_steps(device: str) -> None:
    """Layers on two GPUs train as they do on one; on the CPU as layers of two dtypes, which cannot share launches."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip(f"there is {torch.cuda.device_count()} CUDA device, and two are needed")
    first, second = network(device, 8), network(device, 8)
    places = ["cuda:0", "cuda:1"] if device == "cuda" else [torch.float32, torch.bfloat16]
    together = nn.ModuleList(net.to(place) for net, place in zip((first, second), places, strict=True))
    alone = [copy.deepcopy(net) for net in together]
    together_optimizer = PSILoRA(together, 0.05, backend=backend_of(device), depth_scale=1.0)
    own = [PSILoRA(net, 0.05, backend=backend_of(device), depth_scale=1.0) for net in alone]
    inputs = [
        batch(net, device, 30 if device == "cuda" else 8).to(place) for net, place in zip(together, places, strict=True)
    ]
    for _ in range(2):
        together_optimizer.zero_grad()
        for net, x in zip(together, inputs, strict=True):
            (net(x) - 1).square().mean().backward()
        together_optimizer.step()
        for net, optimizer, x in zip(alone, own, inputs, strict=True):
            step(net, optimizer, x)
    if device == "cuda":
        assert {line.partition(":")[0] for line in together_optimizer.backends()} == {"triton on cuda"}
    for net, twin in zip(together, alone, strict=True):
        for got, want in zip(factors(net), factors(twin), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [{"step": "spectral", "metric": "auto"}, {"metric": "kfac"}], ids=str)
def test_batches_of_every_length_need_no_memory_after_the_longest(device: str, kind: dict[str, Any]) -> None:
    """Twenty lengths after it: a step whose X and S are kept shares one scratch, the default keeps none at all."""
    model = network(device, 8)
    optimizer = bare(model, 0.05, backend="triton", **kind)
    longest = 4000 if device == "cuda" else 64

    def held() -> int:
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
            return torch.cuda.memory_allocated()
        (backend,) = optimizer._backends.values()
        return 0 if backend._scratch is None else 4 * backend._scratch.buffer.numel()

    lengths = [longest - number * longest // 25 for number in range(20 if device == "cuda" else 4)]
    for _ in range(2):  # the second time the tables of every length are there
        step(model, optimizer, batch(model, device, longest))
        most = held()
    for rows in lengths:
        step(model, optimizer, batch(model, device, rows))
    # Tables of the few plans that these lengths share, at most as large as those of the longest.
    assert held() <= most + (2**20 if device == "cuda" else 0)
    runs = next(iter(optimizer._backends.values()))._runs
    assert len(runs) <= 3
