"""Check candidates, then time them in alternation: every reading, the median and the 20 and 80 % quantiles."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench import cuda
from bench.candidate import Candidate, Row

WARM_UP = 2
FEWEST = 5


def measure(
    case: str, candidates: Sequence[Candidate], *, device: str, repeats: int = 15, seconds: float = 20.0
) -> list[Row]:
    """Return one row per candidate; times in ms. `cpu_ms` is the processor's time, which other work does not stretch.

    All correct candidates are timed once per round, in an order that turns from round to round, until there are
    `repeats` rounds or `seconds` are over (but at least FEWEST rounds), so that drift of the machine hits all alike.
    """
    rows, sound = [], []
    for candidate in candidates:
        row, ok = _checked(case, candidate)
        rows.append(row)
        if ok:
            run, said = cuda.prepare(candidate) if device == "cuda" else (candidate.run, {})
            row.update(said)
            sound.append((row, candidate, run))
    readings: dict[int, list[float]] = {i: [] for i in range(len(sound))}
    busy: dict[int, list[float]] = {i: [] for i in range(len(sound))}
    for number in _rounds(repeats, seconds):
        for place in range(len(sound)):
            i = (place + number) % len(sound)
            _, candidate, run = sound[i]
            candidate.before()
            began = time.process_time()
            elapsed = cuda.elapsed(run) if device == "cuda" else _elapsed(run)
            if number >= WARM_UP:
                readings[i].append(elapsed)
                busy[i].append(1e3 * (time.process_time() - began))
    for i, (row, candidate, _) in enumerate(sound):
        row.update(summary(readings[i]))
        if device == "cpu":
            row["cpu_ms"] = statistics.median(busy[i])
        if candidate.count:
            row.update(_counts(candidate, device))
        if "floor_ms" in row:
            row["of_floor"] = row["floor_ms"] / row["ms"]
    return rows


def _checked(case: str, candidate: Candidate) -> tuple[Row, bool]:
    error = float(candidate.check())
    ok = math.isfinite(error) and error <= candidate.tolerance
    shown = error if math.isfinite(error) else str(error)
    row: Row = {"case": case, "method": candidate.method, **candidate.facts, "error": shown}
    if not ok:
        row["red"] = f"relative error {error:.1e} > {candidate.tolerance:.0e}: not timed"
    return row, ok


def _rounds(repeats: int, seconds: float) -> Iterator[int]:
    """Count the rounds, warm-up included, until enough of them or the time is over."""
    began, number = time.perf_counter(), 0
    while number < WARM_UP + repeats:
        if time.perf_counter() - began > seconds and number >= WARM_UP + min(FEWEST, repeats):
            return
        yield number
        number += 1


def _elapsed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - began)


def summary(readings: Sequence[float]) -> Row:
    """Return median, 20 and 80 % quantiles and the readings themselves, rounded to what a clock can tell."""
    tenths = statistics.quantiles(readings, n=10, method="inclusive") if len(readings) > 1 else [readings[0]] * 9
    return {
        "ms": statistics.median(readings),
        "ms_20": tenths[1],
        "ms_80": tenths[7],
        "readings": [float(f"{reading:.5g}") for reading in readings],
    }


class _Operations(TorchDispatchMode):
    """Counts what reaches the dispatcher below autograd, on the CPU one kernel or view each, and the bytes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count += 1
        if not func.is_view:
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
            self.bytes += sum(t.nbytes for t in tensors)
        return result


def operations(run: Callable[[], object]) -> int:
    """Return how many operations one run dispatches, views included."""
    return touched(run)[0]


def touched(run: Callable[[], object]) -> tuple[int, int]:
    """Return the operations that one run dispatches and the bytes of all their operands and results."""
    with _Operations() as mode:
        run()
    return mode.count, mode.bytes


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """Return the most memory that one run holds above what was there before it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held, most = 0, 0
    memory = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(memory, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def _counts(candidate: Candidate, device: str) -> Row:
    candidate.before()
    counted: Row = {"operations": operations(candidate.run)}
    candidate.before()
    counted["peak_bytes"] = peak_bytes(candidate.run, device)
    if device == "cuda":
        candidate.before()
        counted["kernels"] = cuda.kernels(candidate.run)
    return counted


def bandwidth(device: str) -> float:
    """Return the bytes per second, read and written, of a copy well beyond the caches."""
    source = torch.ones((2**32 if device == "cuda" else 2**28) // 4, device=device)
    target = torch.empty_like(source)
    candidate = Candidate("copy", lambda: target.copy_(source), lambda: 0.0, 0.0, count=False)
    (row,) = measure("copy", [candidate], device=device, repeats=10, seconds=5)
    return 2 * source.nbytes / (row["ms"] * 1e-3)
