"""What a step costs the host: launches of PyTorch and Triton, time against fused AdamW, and memory beside the state.

Counts, and ratios of times of the host in one run; no time of a device. The kernels, AdamW's own included, are replaced
by functions that do nothing, so what is left is Python and PyTorch's small operations, on layers of a few columns;
Triton's own work for a launch is left out. Times are the thread's own, which other work does not stretch. Workspaces
are counted at the true widths on the meta device, where nothing is really allocated.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench import cuda
from bench.candidate import Row
from bench.measure import summary
from bench.shapes import MODELS, Model
from bench.suites import Settings
from bench.workload import Adapter
from psilora import PSILoRA, runtime
from psilora.adapters.pair import LoRAPair
from psilora.backends.dispatch import backend_unavailable
from psilora.options import Options, resolved
from psilora.options.base import defaults
from psilora.steps.problem import Problem, Scales
from psilora.steps.state import init_state

#: Operations that only ask for memory, or look at a number on the CPU, which is already there.
SILENT = {
    "empty", "empty_like", "empty_strided", "new_empty", "_local_scalar_dense", "detach", "lift_fresh",
    "_record_function_enter_new", "_record_function_exit",
}  # fmt: skip
#: Rows of X and S, in turn, where N changes from step to step.
VARYING = (17, 40, 23, 33, 28, 38, 19, 30)
FIXED = 32
LR = 1e-3


@dataclass(frozen=True)
class Case:
    """One setting of the optimizer.

    Attributes:
        name: In the tables.
        settings: Of `PSILoRA`.
        dtype: Of the adapters.
        rows: N of each step in turn; none where X and S are not captured.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    rows: tuple[int, ...] = ()


_GRADIENT = {"step": "gradient"}
CASES = (
    Case("spectral"),
    Case("spectral, bf16 adapters", dtype=torch.bfloat16),
    Case("spectral, max_grad_norm", {"max_grad_norm": 1.0}),
    Case("tangent, momentum", {**_GRADIENT, "gradient": "tangent"}),
    Case("exact, momentum, fixed N", _GRADIENT, rows=(FIXED,)),
    Case("exact, momentum, N changing every step", _GRADIENT, rows=VARYING),
)


def run(settings: Settings) -> list[Row]:
    """Return a row per case and model: counts of one step, and the host's time beside that of AdamW in the same run."""
    if settings.device == "cpu":  # where kernels are never run, but have to be defined
        os.environ.setdefault("TRITON_INTERPRET", "1")
    reason = backend_unavailable("triton")
    if reason is not None:
        raise RuntimeError(f"this suite counts the launches of the Triton backend, which is not available: {reason}")
    rows = []
    for name in settings.choice(cpu=("llama-3-8b", "llama-3-8b-r64"), cuda=("llama-3-8b", "llama-3-8b-r64")):
        model = MODELS[name]
        for case in CASES:
            row: Row = {"model": name, "layers": len(model.layers), "case": f"{name}, r {model.rank}"}
            row.update({"method": f"PSILoRA {case.name}", "error": 0.0})
            row.update(counted(model, case, settings))
            row.update(workspace(model, case))
            rows.append(row)
    return rows


# ---- kernels that do nothing ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_kernels() -> Iterator[Counter[str]]:
    """Replace every Triton kernel by nothing; yields how often each was launched, by name."""
    from triton.runtime import interpreter, jit

    launched: Counter[str] = Counter()

    def launch(kernel: Any, grid: Any) -> Callable[..., None]:
        def nothing(*args: Any, **options: Any) -> None:
            launched[kernel.__name__.strip("_")] += 1

        return nothing

    classes = (jit.JITFunction, interpreter.InterpretedFunction)
    held = [(cls, cls.__dict__.get("__getitem__")) for cls in classes]
    for cls in classes:
        cls.__getitem__ = launch
    try:
        yield launched
    finally:
        for cls, own in held:
            if own is None:
                del cls.__getitem__
            else:
                cls.__getitem__ = own


@contextlib.contextmanager
def no_device_work() -> Iterator[None]:
    """Replace what a GPU does in a few launches and a CPU in a loop over tensors: their norms, and AdamW itself."""
    norm, adamw = torch._foreach_norm, torch._fused_adamw_

    def norms(tensors: Sequence[Tensor], ord: float = 2, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        like = tensors[0]
        return torch.zeros(len(tensors), dtype=dtype or like.dtype, device=like.device).unbind()

    torch._foreach_norm, torch._fused_adamw_ = norms, lambda *args, **options: None
    try:
        yield
    finally:
        torch._foreach_norm, torch._fused_adamw_ = norm, adamw


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Have a step leave alone what it looks at on a CPU only, where nothing waits for a number."""
    held = runtime.at_hand
    runtime.at_hand = lambda device: False
    try:
        yield
    finally:
        runtime.at_hand = held


class Launched(TorchDispatchMode):
    """Counts operations that launch something: neither views nor those that only ask for memory.

    An operation on a list of tensors counts as one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if not func.is_view and name not in SILENT:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


class Held(TorchDispatchMode):
    """Counts the bytes asked for on a device while it was on: what is still held, and the most that was."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.most = device, 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        new = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.device.type == self.device]
        if not func.is_view:
            for storage in (t.untyped_storage() for t in new):
                self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
            self.most = max(self.most, self.bytes)
        return result

    @property
    def bytes(self) -> int:
        """Bytes of what is still held."""
        self._storages = {key: held for key, held in self._storages.items() if not held[0].expired()}
        return sum(size for _, size in self._storages.values())


# ---- counts and times -----------------------------------------------------------------------------------------------


class Bench:
    """A model of layers of few columns, its optimizer, and what stands for a backward pass."""

    def __init__(self, model: Model, case: Case, device: str) -> None:
        torch.manual_seed(0)
        rank = min(model.rank, 16)
        sizes = sorted({d for layer in model.layers for d in layer[:2]})
        widths = {size: 2 * rank + 8 * i for i, size in enumerate(sizes)}  # below 2r other kernels take a layer
        layers = [(widths[o], widths[i]) for o, i, _ in model.layers]
        self.adapters = nn.ModuleList(Adapter(o, i, rank, device) for o, i in layers).to(case.dtype)
        self.optimizer = PSILoRA(self.adapters, LR, backend="triton", **case.settings)
        self.grads = [torch.randn_like(p) * 1e-3 for p in self.adapters.parameters()]
        self.rows = itertools.cycle(case.rows) if case.rows else None
        self.device, self.dtype = device, case.dtype

    def backward(self) -> None:
        """New gradients, at new addresses, and new captures, as a backward pass leaves them."""
        for p in self.adapters.parameters():
            p.grad = None
        if self.rows is None:
            for p, grad in zip(self.adapters.parameters(), self.grads, strict=True):
                p.grad = grad.clone()
            return
        n = next(self.rows)
        loss = torch.zeros((), device=self.device)
        for adapter in self.adapters:
            A, B = adapter.pair
            x = torch.randn(n, A.shape[1], device=self.device, dtype=self.dtype)
            loss = loss + adapter.lora_B(adapter.lora_A(x)).square().mean()
        loss.backward()


def counted(model: Model, case: Case, settings: Settings) -> Row:
    """Return launches of a step that is not the first, and its time over that of fused AdamW, in alternation."""
    work = Bench(model, case, settings.device)
    other = Bench(model, Case("AdamW", dtype=case.dtype), settings.device)
    adamw = torch.optim.AdamW(other.adapters.parameters(), lr=LR, weight_decay=0.0, fused=True)
    times: dict[str, list[float]] = {"ours": [], "adamw": []}
    steps = {"ours": (work, work.optimizer.step), "adamw": (other, adamw.step)}
    with no_kernels() as launched, as_on_a_gpu():
        for _ in range(max(2, len(case.rows) + 1)):  # prepares every length
            work.backward()
            work.optimizer.step()
            other.backward()
            adamw.step()
        work.backward()
        launched.clear()
        with Launched() as mode:
            work.optimizer.step()
        kernels = Counter(launched)
    with no_kernels(), as_on_a_gpu(), no_device_work():
        began = time.perf_counter()
        for number in range(2 + 8 * settings.repeats):
            for name in ("ours", "adamw") if number % 2 else ("adamw", "ours"):
                bench, step = steps[name]
                bench.backward()
                start = time.thread_time()
                step()
                if number >= 2:
                    times[name].append(1e3 * (time.thread_time() - start))
            if number >= 6 and time.perf_counter() - began > settings.seconds:
                break
    found: Row = {}
    if settings.device == "cuda":  # what reaches the device, with the kernels themselves
        for _ in range(2):
            work.backward()
            work.optimizer.step()
        work.backward()
        found["kernels"] = cuda.kernels(work.optimizer.step)
    ours, theirs = statistics.median(times["ours"]), statistics.median(times["adamw"])
    return {
        **found,
        "aten_launches": mode.names.total(),
        "triton_launches": kernels.total(),
        "aten": dict(sorted(mode.names.items())),
        "triton": dict(sorted(kernels.items())),
        **{key: value for key, value in summary(times["ours"]).items()},
        "adamw_ms": theirs,
        "host_ratio": ours / theirs,
        "host_ratio_of_least": min(times["ours"]) / min(times["adamw"]),
    }


# ---- memory ---------------------------------------------------------------------------------------------------------


def workspace(model: Model, case: Case) -> Row:
    """Return the bytes that the kernels' runs hold between steps, the most in a step, and those of the state.

    At the true widths, on the meta device; where N changes, for rows a hundred times those of the timed steps.
    """
    from psilora.backends.triton import backend as triton_backend

    problems = [_meta_problem(i, size, model.rank, case) for i, size in enumerate(model.layers)]
    state = sum(t.nbytes for p in problems for s in (p.state_A, p.state_B) for t in s.values())
    one = torch.ones((), device="meta")
    scales = Scales(clip=one if "max_grad_norm" in case.settings else None)
    backends: triton_backend.Backends = {}
    held: list[int] = []
    with no_kernels(), Held("meta") as mode:
        for n in case.rows or (0,):
            records = _meta_records(problems, 128 * n, case) if n else [None] * len(problems)
            for problem, record in zip(problems, records, strict=True):
                problem.record = record
            for execution in triton_backend.compute(problems, scales, backends):
                execution.commit(one.bool(), None)
            del records, record
            for problem in problems:
                problem.record = None
            held.append(mode.bytes)
    row: Row = {"state_bytes": state, "workspace_bytes": held[-1], "workspace_ratio": held[-1] / state}
    if len(held) > 1:
        row["workspace_by_step"] = held
    return row


def _meta_problem(index: int, layer: tuple[int, int, int], rank: int, case: Case) -> Problem:
    d_out, d_in, _ = layer
    A, B = (nn.Parameter(torch.empty(s, device="meta", dtype=case.dtype)) for s in ((rank, d_in), (d_out, rank)))
    pair = LoRAPair(str(index), A, B, SimpleNamespace(scaling=1.0))  # type: ignore[arg-type]
    settings = {**defaults(), "lr": LR, "step": "spectral", "metric": "auto", "gradient": None, **case.settings}
    options = Options.of_settings(resolved(settings))
    states: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for state in states:
        state["step"] = torch.zeros((), device="meta")
    init_state(pair, options, *states)
    return Problem(pair, options, A.detach(), B.detach(), None, bool(case.rows), states[1], states[0])


def _meta_records(problems: Sequence[Problem], rows: int, case: Case) -> list[Any]:
    """Captured calls of one batch; layers that read the same input share X."""
    found = []
    for problem in problems:
        x = torch.empty(rows, problem.pair.d_in, device="meta", dtype=torch.bfloat16)
        s = torch.empty(rows, problem.pair.d_out, device="meta", dtype=torch.bfloat16)
        found.append(SimpleNamespace(chunks=[(x, s)], rows=rows, holds="rows", captured=True, held=None))
    return found
