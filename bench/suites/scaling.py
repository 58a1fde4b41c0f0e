"""The step's cost against layers, tokens, rank and width: fitted exponents, and a model's prediction beside them.

The model counts what one step dispatches and knows three constants that are measured in the same run: seconds per
operation, bytes per second of a copy, floating-point operations per second of a thin product. Its time is

    t = operations · overhead + max(bytes / bandwidth, flops / rate).
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.candidate import Candidate, Row
from bench.measure import bandwidth, measure, touched
from bench.shapes import uniform
from bench.suites import Settings, step
from bench.workload import Workload
from psilora.backends.dispatch import backend_unavailable

KINDS = ("exact, momentum", "tangent, momentum")
BASE = {"layers": 12, "tokens": 128, "rank": 8, "width": 384}
AXES = {
    "layers": (1, 3, 10, 30, 100, 300, 1000),
    "tokens": (64, 256, 1024, 4096, 16384),
    "rank": (4, 8, 16, 32, 64, 128),
    "width": (128, 256, 512, 1024, 2048),
}
LARGEST = {"cpu": 1e9, "cuda": 3e10}  # bytes of X and S; larger points are left out
SMALL = {"layers": (1, 3), "tokens": (8, 16), "rank": (2, 4), "width": (24, 32)}


def run(settings: Settings) -> list[Row]:
    """Return one row per axis, value and kind, and one with the fit per axis and kind."""
    constants = machine(settings.device)
    triton = settings.device == "cuda" and backend_unavailable("triton") is None
    rows: list[Row] = [{"case": "machine", "method": "constants of the model", **constants}]
    for axis, values in (SMALL if settings.small else AXES).items():
        found = [
            row
            for value in values
            for row in _point(settings, axis, value, "triton" if triton else "reference", constants)
        ]
        rows += found + [_fit(axis, kind, [row for row in found if row["kind"] == kind]) for kind in KINDS]
    return rows


def machine(device: str) -> Row:
    """Measure the model's constants."""
    one = torch.ones(1, device=device)
    tall, thin = torch.ones(1024, 768, device=device), torch.ones(768, 16, device=device)
    few = functools.partial(_best, device)
    return {
        "seconds_per_operation": few(lambda: [one.add(1) for _ in range(1000)]) / 1000,
        "bytes_per_second": bandwidth(device),
        "flops_per_second": 2 * 1024 * 768 * 16 / few(lambda: tall @ thin),
    }


def _best(device: str, run: Any) -> float:
    times = []
    for _ in range(10):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _point(settings: Settings, axis: str, value: int, backend: str, constants: Row) -> Iterator[Row]:
    sizes = {**({"layers": 2, "tokens": 8, "rank": 4, "width": 24} if settings.small else BASE), axis: value}
    if 2 * settings.dtype.itemsize * sizes["layers"] * sizes["tokens"] * sizes["width"] > LARGEST[settings.device]:
        return
    model = uniform(sizes["layers"], sizes["width"], sizes["rank"])
    work = Workload(model, sizes["tokens"], settings.device, settings.dtype)
    candidates = [_candidate(work, kind, backend) for kind in KINDS]
    seconds = settings.seconds / 10
    measured = measure(f"{axis} {value}", candidates, device=settings.device, repeats=7, seconds=seconds)
    for kind, row in zip(KINDS, measured, strict=True):
        row.update({"axis": axis, "value": value, "kind": kind, **sizes})
        if "ms" in row:
            row["predicted_ms"] = 1e3 * predicted(row, constants)
        yield row


def _candidate(work: Workload, kind: str, backend: str) -> Candidate:
    mine = work.copy()
    optimizer = step.ours(mine, kind, backend, step.LR)
    prime = functools.partial(mine.prime, optimizer)
    prime()
    dispatched, moved = touched(optimizer.step)
    prime()
    with FlopCounterMode(display=False) as flops:
        optimizer.step()
    facts = {"operations": dispatched, "bytes": moved, "flops": flops.get_total_flops()}
    check = functools.partial(step.check_step, work, kind, functools.partial(step.at_check_rate, kind, backend))
    name = f"PSILoRA {kind} ({backend})"
    return Candidate(name, optimizer.step, check, step.INCREMENT_TOLERANCE, prime, facts=facts, count=False)


def predicted(row: Row, constants: Row) -> float:
    """Seconds by the model above."""
    moving = row["bytes"] / constants["bytes_per_second"]
    computing = row["flops"] / constants["flops_per_second"]
    return row["operations"] * constants["seconds_per_operation"] + max(moving, computing)


def _fit(axis: str, kind: str, rows: list[Row]) -> Row:
    """Return the exponents of t ∝ value^p between the ends of the upper half of an axis, measured and predicted."""
    timed = [row for row in rows if "ms" in row]
    upper = timed[len(timed) // 2 :] if len(timed) > 3 else timed
    row: Row = {"case": f"{axis}, exponent", "method": f"PSILoRA {kind}", "axis": axis, "kind": kind}
    for name in ("ms", "predicted_ms"):
        row["exponent" if name == "ms" else "predicted_exponent"] = slope([(r["value"], r[name]) for r in upper])
    return row


def slope(points: list[tuple[float, float]]) -> float | None:
    """Return the least-squares slope of log y over log x, or None for fewer than two points."""
    if len(points) < 2:
        return None
    x, y = ([math.log(p[i]) for p in points] for i in (0, 1))
    return statistics.linear_regression(x, y).slope
