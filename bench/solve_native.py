"""Side-by-side timing of the native spd_solve and torch's own Cholesky solve, over shapes of LoRA layers.

    python bench/solve_native.py --out bench/results/solve_native_cpu.json

Each shape is checked against float64 before it is timed. The two candidates alternate within every
repetition, so that drift of the machine hits both, and the JSON carries every reading.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import psilora.native as native

SYSTEMS = 224
RANKS = (8, 16, 32, 64, 128)
DTYPES = {"float32": torch.float32, "float64": torch.float64}
#: Error of the native solve in units of the error of torch's; both do the same substitution in another order.
ALLOWED_ERROR_RATIO = 4.0


def problem(rank: int, columns: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Return well-conditioned systems (L, r, r) and right-hand sides (L, r, n)."""
    generator = torch.Generator().manual_seed(1000 * rank + columns)
    factor = torch.randn(SYSTEMS, rank, 4 * rank, generator=generator, dtype=torch.float64)
    gram = factor @ factor.mT / (4 * rank) + 1e-3 * torch.eye(rank, dtype=torch.float64)
    rhs = torch.randn(SYSTEMS, rank, columns, generator=generator, dtype=torch.float64)
    return gram.to(device, dtype), rhs.to(device, dtype)


def torch_solve(gram: Tensor, rhs: Tensor) -> Tensor:
    """The library's way: cholesky_ex (no host synchronisation), then cholesky_solve."""
    factor, _ = torch.linalg.cholesky_ex(gram)
    return torch.cholesky_solve(rhs, factor)


def native_solve(gram: Tensor, rhs: Tensor) -> Tensor:
    """The operator under test."""
    return native.spd_solve(gram, rhs)[0]


def check(gram: Tensor, rhs: Tensor) -> dict[str, float]:
    """Return both errors against float64; raise when the native one is not within the allowed multiple."""
    exact = torch.linalg.solve(gram.double(), rhs.double())
    errors = {
        name: float((solve(gram, rhs).double() - exact).norm() / exact.norm())
        for name, solve in (("torch", torch_solve), ("native", native_solve))
    }
    floor = torch.finfo(gram.dtype).eps
    if errors["native"] > ALLOWED_ERROR_RATIO * max(errors["torch"], floor):
        raise SystemExit(f"wrong result, nothing timed: {errors}")
    return errors


def seconds(solve: Callable[[Tensor, Tensor], Tensor], gram: Tensor, rhs: Tensor) -> float:
    """Time one call, with the device idle before and after."""
    if gram.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    solve(gram, rhs)
    if gram.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(rank: int, columns: int, dtype_name: str, device: str, repeats: int) -> dict[str, Any]:
    """Check, warm up and time one shape."""
    gram, rhs = problem(rank, columns, DTYPES[dtype_name], device)
    errors = check(gram, rhs)
    readings: dict[str, list[float]] = {"torch": [], "native": []}
    for repeat in range(repeats + 2):
        for name, solve in (("torch", torch_solve), ("native", native_solve)):
            reading = seconds(solve, gram, rhs)
            if repeat >= 2:
                readings[name].append(reading)
    medians = {name: statistics.median(values) for name, values in readings.items()}
    return {
        "systems": SYSTEMS,
        "rank": rank,
        "columns": columns,
        "dtype": dtype_name,
        "relative_error": errors,
        "seconds": readings,
        "median_ratio": medians["torch"] / medians["native"],
        "best_ratio": min(readings["torch"]) / min(readings["native"]),
    }


def main() -> None:
    """Run all shapes for each thread count and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--columns", type=int, default=300, help="n of the wide case; the other is n = r")
    parser.add_argument("--repeats", type=int, default=30)
    arguments = parser.parse_args()
    if not native.available():
        raise SystemExit(f"nothing to time: {native.unavailable_reason()}")

    load_before = os.getloadavg()[0]
    rows = []
    default_threads = torch.get_num_threads()
    thread_counts = [1] if arguments.device != "cpu" else sorted({1, default_threads})
    for threads in thread_counts:
        torch.set_num_threads(threads)
        for dtype_name in DTYPES:
            for rank in RANKS:
                for columns in (rank, arguments.columns):
                    row = measure(rank, columns, dtype_name, arguments.device, arguments.repeats)
                    rows.append({"threads": threads, **row})
                    print(
                        f"{threads} thread(s) {dtype_name} r={rank:<3} n={columns:<4} "
                        f"native {1e3 * statistics.median(row['seconds']['native']):8.3f} ms  "
                        f"torch {1e3 * statistics.median(row['seconds']['torch']):8.3f} ms  "
                        f"ratio {row['median_ratio']:.2f} (best {row['best_ratio']:.2f})"
                    )
    if arguments.device == "cpu":
        device_name = f"CPU, {torch.backends.cpu.get_cpu_capability()}"
    else:
        device_name = torch.cuda.get_device_name()
    record = {
        "command": "python bench/solve_native.py " + " ".join(sys.argv[1:]),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": device_name,
        # Other work on the machine, mostly felt by the rows with several threads.
        "load_average_before_and_after": [load_before, os.getloadavg()[0]],
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
