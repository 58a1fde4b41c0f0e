"""What every launch shares: the cut of columns into tiles, rates on the device, the device, what a commit writes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from psilora.steps.problem import Problem, Problems

#: Ranks to which a layer's rank (or its momentum's, if larger) is padded; larger ranks are left to the reference.
PADDED_RANKS = (16, 32, 64, 128)
#: Programs that a launch should have before a program takes more than one block of columns (four per SM of an H200).
TARGET_PROGRAMS = 528
MAX_SPAN = 2048
#: Columns that a solve works on at a time, and those summed at a time in a Gram.
BLOCK_COLUMNS = {16: 128, 32: 64, 64: 64, 128: 32}


Tiles: TypeAlias = tuple[tuple[int, int, int, int], ...]
Parts: TypeAlias = tuple[tuple[int, int], ...]


def tile_map(sizes: Sequence[Sequence[int]], block: int, longest: int = MAX_SPAN) -> tuple[Tiles, tuple[Parts, Parts]]:
    """Cut the columns of layers with d_in = sizes[0] and d_out = sizes[1] into tiles; see `BucketPlan`.

    A tile is of whole blocks of columns, but for the last of a layer, and of at most `longest` columns.
    """
    tiles: list[tuple[int, int, int, int]] = []
    parts: list[Parts] = []
    for side in (0, 1):
        span = _span(sum(sizes[side]), block, longest)
        ranges = []
        for i, size in enumerate(sizes[side]):
            cut = list(_cut(size, span))
            ranges.append((len(tiles), len(cut)))
            tiles += [(side, i, start, end) for start, end in cut]
        parts.append(tuple(ranges))
    return tuple(tiles), (parts[0], parts[1])


def _span(total: int, block: int, longest: int) -> int:
    """Columns per program: whole blocks, more of them only where there are programs enough."""
    wanted = -(-total // TARGET_PROGRAMS)
    return min(longest // block, -(-wanted // block)) * block


def _cut(size: int, span: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size, span):
        yield start, min(size, start + span)


def device_rates(rates: Sequence[float | Tensor], device: torch.device) -> list[Tensor | None]:
    """Return learning rates held in tensors as fp32 on the device, where kernels read them; None for numbers.

    A tensor that many layers share is converted once. One in host memory is read here: to copy it would wait for the
    device.
    """
    found: dict[int, Tensor] = {}
    for rate in rates:
        if isinstance(rate, Tensor) and id(rate) not in found:
            if rate.device.type == "cpu" != device.type:
                found[id(rate)] = torch.full((), float(rate), dtype=torch.float32, device=device)
            else:
                found[id(rate)] = rate.detach().to(device, torch.float32).reshape(())
    return [found.get(id(rate)) for rate in rates]


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Run a block with launches going to a device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def note_written(problems: Sequence[Problem]) -> None:
    """Tell autograd that a commit has written the parameters and state of these problems behind its back."""
    own = Problems.of(problems)
    written: list[Tensor] | None = own.prepared.get("written")
    if written is None:
        written = own.prepared["written"] = [t for p in problems for t in (p.pair.lora_A, p.pair.lora_B)]
        states = [state for p in problems for state in (p.state_A, p.state_B)]
        written += [state[name] for state in states for name in ("momentum", "metric", "step") if name in state]
    torch.autograd.graph.increment_version(written)
