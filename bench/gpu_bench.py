"""Kernels and whole optimizer steps on one CUDA device: time, bytes, share of the copy bandwidth, launches.

    python -m bench.gpu_bench --out bench/results/gpu.json [--models roberta-base llama-3-8b] [--tokens 4096]

Every figure comes after a check of the same call against float64 on a sample of layers; a failed check ends the run.
`--device cpu` runs the same code on small shapes, which proves the script and times nothing worth quoting.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.shapes import MODELS, Model
from psilora import PSILoRA
from psilora.engine import backend_unavailable

STEPS: dict[str, dict[str, Any]] = {
    "exact": {"momentum": 0.0},
    "exact, momentum": {},
    "exact, momentum, K=2": {"num_iters": 2},
    "exact, momentum, kfac": {"metric": "kfac"},
    "tangent": {"gradient": "tangent", "momentum": 0.0},
    "tangent, momentum": {"gradient": "tangent"},
}
#: Largest relative error of a product in fp32 arithmetic, and of the change of B·A by a step, a small difference
#: of rounded fp32 parameters.
PRODUCT_TOLERANCE = 2e-5
INCREMENT_TOLERANCE = 1e-2


class Adapter(nn.Module):
    """The two factors of one layer, without the layer."""

    def __init__(self, d_out: int, d_in: int, rank: int, device: str) -> None:
        super().__init__()
        self.lora_A = nn.Linear(d_in, rank, bias=False, device=device)
        self.lora_B = nn.Linear(rank, d_out, bias=False, device=device)
        nn.init.normal_(self.lora_B.weight, std=0.02)
        self.scaling = 1.0


class Workload:
    """Adapters of a model with X and S as a backward pass of N tokens would leave them."""

    def __init__(self, model: Model, tokens: int, device: str, dtype: torch.dtype) -> None:
        self.model, self.tokens = model, tokens
        torch.manual_seed(0)
        self.adapters = nn.ModuleList(Adapter(o, i, model.rank, device) for o, i, _ in model.layers)
        inputs: dict[int, Tensor] = {}
        self.X = [
            inputs.setdefault(number, torch.randn(tokens, i, device=device, dtype=dtype))
            for _, i, number in model.layers
        ]
        self.S = [torch.randn(tokens, o, device=device, dtype=dtype).div_(tokens) for o, _, _ in model.layers]
        for adapter, x, s in zip(self.adapters, self.X, self.S, strict=True):
            A, B = adapter.lora_A.weight, adapter.lora_B.weight
            A.grad = (s.float() @ B.detach()).mT @ x.float()
            B.grad = s.float().mT @ (x.float() @ A.detach().mT)

    def prime(self, optimizer: PSILoRA) -> None:
        """Hand X and S to the optimizer as if captured, checked and unscaled; `.grad` stays as it is."""
        for record, x, s in zip(optimizer._capture.records.values(), self.X, self.S, strict=False):  # none for tangent
            record.calls, record.rows, record.verified = 1, self.tokens, True
            if record.statistics:
                record.sum_x2, record.sum_s2 = x.float().square().sum(0), s.float().square().sum(0)
            else:
                record.chunks = [(x, s)]

    def bytes(self) -> tuple[int, int]:
        """Bytes of all X as read per layer, and of all S."""
        return sum(x.nbytes for x in self.X), sum(s.nbytes for s in self.S)


def quantiles(run: Callable[[], None], device: str, repeats: int, before: Callable[[], None]) -> dict[str, float]:
    """Return median and 20/80 % quantiles in ms; `before` runs untimed each time."""
    times = []
    for i in range(repeats + 3):
        before()
        if device == "cuda":
            torch.cuda.synchronize()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            elapsed = start.elapsed_time(end)
        else:
            began = time.perf_counter()
            run()
            elapsed = 1e3 * (time.perf_counter() - began)
        if i >= 3:
            times.append(elapsed)
    low, median, high = (
        statistics.quantiles(times, n=10)[1],
        statistics.median(times),
        statistics.quantiles(times, n=10)[7],
    )
    return {"ms": median, "ms_20": low, "ms_80": high}


def copy_bandwidth(device: str) -> float:
    """Return bytes read and written per second by a device-to-device copy."""
    numbers = 2**30 if device == "cuda" else 2**22
    source = torch.ones(numbers, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    ms = quantiles(lambda: target.copy_(source), device, 10, lambda: None)["ms"]
    return 2 * source.nbytes / (ms * 1e-3)


def check(name: str, got: Tensor, want: Tensor, tolerance: float = PRODUCT_TOLERANCE) -> float:
    """Return the relative error of a result, or end the run if it is above the tolerance."""
    error = float((got.double() - want).norm() / want.norm())
    if not error <= tolerance:
        sys.exit(f"{name}: relative error {error:.1e} > {tolerance:.0e}; nothing is timed on a wrong result")
    return error


def products(work: Workload, device: str, repeats: int, bandwidth: float) -> list[dict[str, Any]]:
    """Time `xv` and `stz` over all layers, planned once as in a step."""
    from psilora.triton_kernels.stz import STZPlan
    from psilora.triton_kernels.xv import XVPlan

    factors = [adapter.lora_A.weight.detach() for adapter in work.adapters]
    P = [torch.full((work.tokens, work.model.rank), float("nan"), device=device) for _ in factors]
    H = [torch.full((s.shape[1], work.model.rank), float("nan"), device=device) for s in work.S]
    shrink = XVPlan(work.X, factors, P)
    expand = STZPlan(work.S, P, list(range(len(P))), H)
    rows = []
    for name, plan, read, out in (("xv", shrink, work.bytes()[0], P), ("stz", expand, work.bytes()[1], H)):
        plan.table.upload()
        plan.launch()
        for i in {0, len(P) // 2, len(P) - 1}:
            operand = (
                work.X[i].double() @ factors[i].double().mT if name == "xv" else work.S[i].double().mT @ P[i].double()
            )
            error = check(f"{name} of layer {i}", out[i], operand)
        timing = quantiles(plan.launch, device, repeats, lambda: None)
        rate = (read + sum(t.nbytes for t in P)) / (timing["ms"] * 1e-3)
        rows.append({"name": name, "bytes": read, "error": error, "of_copy": rate / bandwidth, **timing})
    return rows


def increments(
    work: Workload, settings: dict[str, Any], backend: str, members: Sequence[int], dtype: torch.dtype
) -> list[Tensor]:
    """Return B·A of some layers after one step from a common start, computed apart from the workload."""
    model = nn.ModuleList()
    for i in members:
        source, o, d = work.adapters[i], work.S[i].shape[1], work.X[i].shape[1]
        copy = Adapter(o, d, work.model.rank, str(work.X[i].device)).to(dtype)
        copy.load_state_dict(source.state_dict())
        copy.lora_A.weight.grad = source.lora_A.weight.grad.to(dtype)
        copy.lora_B.weight.grad = source.lora_B.weight.grad.to(dtype)
        model.append(copy)
    optimizer = PSILoRA(model, 0.1, backend=backend, **settings)
    for record, i in zip(optimizer._capture.records.values(), members, strict=False):  # none for tangent
        x, s = work.X[i], work.S[i]
        record.calls, record.rows, record.verified = 1, work.tokens, True
        record.chunks = [(x.to(dtype), s.to(dtype)) if dtype == torch.float64 else (x, s)]
    before = [m.lora_B.weight.detach().double() @ m.lora_A.weight.detach().double() for m in model]
    optimizer.step()
    after = [m.lora_B.weight.detach().double() @ m.lora_A.weight.detach().double() for m in model]
    optimizer.detach()
    return [b - a for a, b in zip(before, after, strict=True)]


def steps(
    work: Workload, kinds: Sequence[str], device: str, repeats: int, backends: Sequence[str]
) -> list[dict[str, Any]]:
    """Time whole steps of some kinds on every backend, and fused AdamW on the same parameters."""
    rows: list[dict[str, Any]] = []
    members = sorted({0, len(work.adapters) // 2, len(work.adapters) - 1})
    for name in kinds:
        settings = STEPS[name]
        want = increments(work, settings, "reference", members, torch.float64)
        for backend in backends:
            got = increments(work, settings, backend, members, torch.float32)
            error = max(
                check(f"{name} on {backend}", g, w, INCREMENT_TOLERANCE) for g, w in zip(got, want, strict=True)
            )
            optimizer = PSILoRA(work.adapters, 0.0, backend=backend, **settings)
            timing = quantiles(optimizer.step, device, repeats, lambda o=optimizer: work.prime(o))
            launches = count_launches(optimizer, work) if device == "cuda" else None
            optimizer.detach()
            rows.append({"name": name, "backend": backend, "error": error, "launches": launches, **timing})
    adamw = torch.optim.AdamW(work.adapters.parameters(), lr=0.0, fused=True)
    rows.append({"name": "AdamW, fused", "backend": "torch", **quantiles(adamw.step, device, repeats, lambda: None)})
    return rows


def count_launches(optimizer: PSILoRA, work: Workload) -> int:
    """Return the kernels that one step launches, by torch's profiler."""
    work.prime(optimizer)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["roberta-base", "llama-3-8b"], choices=sorted(MODELS))
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--steps", nargs="+", default=list(STEPS), choices=list(STEPS), help="kinds of step")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device; --device cpu runs the same code on small shapes")
    backends = ["triton", "reference"] if backend_unavailable("triton") is None else ["reference"]
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    record: dict[str, Any] = {
        "command": "python -m bench.gpu_bench " + " ".join(arguments if arguments is not None else sys.argv[1:]),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else f"cpu {platform.machine()}",
        "torch": torch.__version__,
        "tokens": options.tokens,
        "triton_unavailable": backend_unavailable("triton"),
    }
    bandwidth = record["copy_bytes_per_second"] = copy_bandwidth(options.device)
    record["models"] = {}
    for name in options.models:
        work = Workload(MODELS[name], options.tokens, options.device, dtype)
        result: dict[str, Any] = {"rank": work.model.rank, "layers": len(work.adapters)}
        if "triton" in backends:
            result["products"] = products(work, options.device, options.repeats, bandwidth)
        result["steps"] = steps(work, options.steps, options.device, options.repeats, backends)
        record["models"][name] = result
        print(json.dumps({name: result}, indent=1), flush=True)
        del work
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
