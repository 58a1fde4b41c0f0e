"""Timing on CUDA: graph replay where the work can be captured, over inputs that are not in the cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from bench.candidate import Candidate, Row

_scratch: list[Tensor] = []


class Replay:
    """A captured graph of several calls over rotated inputs; one call counts."""

    def __init__(self, calls: list[Callable[[], object]]) -> None:
        self.calls = len(calls)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for call in calls:
                call()

    def __call__(self) -> None:
        self.graph.replay()


def prepare(candidate: Candidate) -> tuple[Callable[[], object], Row]:
    """Return the replay of a candidate that names its calls, else its plain run, and what the row says about it.

    Event pairs around a plain run of less than about 100 µs time the host; whole optimizer steps are longer. So are
    most calls that cannot be captured, because they wait for the device: these are run plainly as well.
    """
    if not candidate.calls:
        return candidate.run, {}
    try:
        return Replay(list(candidate.calls)), {}
    except RuntimeError as error:
        torch.cuda.synchronize()
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return candidate.run, {"not_captured": reason}


def elapsed(run: Callable[[], object]) -> float:
    """Return the ms of one call between two events; a plain run starts with a flushed L2 cache."""
    if not isinstance(run, Replay):
        _flush()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / (run.calls if isinstance(run, Replay) else 1)


def _flush() -> None:
    """Overwrite twice the L2 cache."""
    if not _scratch:
        size = 2 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        _scratch.append(torch.empty(size // 4 + 1, device="cuda"))
    _scratch[0].zero_()


def kernels(run: Callable[[], object]) -> int:
    """Return the kernels and copies that one run launches, by torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return sum(e.count for e in profile.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA)
