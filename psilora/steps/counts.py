"""What all processes know of a pair before a step, so that each takes the same decision about it.

A process may have no rows for a layer, or run it through a fused kernel, while others capture it. The counts that
decide are summed over the processes once per step; with one process they are its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from psilora.adapters.pair import LoRAPair, is_sparse, listed
from psilora.capture.discards import present
from psilora.capture.hooks import Capture
from psilora.capture.record import Record
from psilora.distributed.communicator import Communicator
from psilora.options.base import Options


@dataclass
class GlobalCounts:
    """Sums over the processes, for one pair.

    Attributes:
        gradients: Processes in which both factors are trainable and have a gradient.
        calls, missed, rows: Captured backward calls, those of which only a part was seen, and rows N.
        overlaid: Processes in which two backward passes reached one call (see `psilora.capture.Record`).
        probed: Processes whose dB was kept as backward left it, or that ran no backward for the pair.
        stale: Processes in which `.grad` was not reset before backward (see `psilora.capture.Record`).
        overlap: (Σ⟨dB now, dB left⟩, Σ‖dB left‖²), (2,) float64, where dB left is dB as backward left it in a process;
            None with one process, which compares the two itself.
    """

    gradients: int
    calls: int
    missed: int
    rows: int
    overlaid: int
    probed: int
    stale: int
    overlap: Tensor | None = None

    @property
    def unreached(self) -> bool:
        """Whether no backward pass of any process has reached the pair."""
        return self.calls == 0 and self.missed == 0

    @property
    def captured(self) -> bool:
        """Whether every call of every process brought its X and S."""
        return self.calls > 0 and self.missed == 0


_NOTHING = GlobalCounts(0, 0, 0, 0, 0, 0, 0)


def global_counts(pairs: Sequence[LoRAPair], capture: Capture, communicator: Communicator | None) -> list[GlobalCounts]:
    """Return the sums for each pair, the same in all processes; they must call this together, with the same pairs.

    This is one all-reduce of nine numbers per pair, and the only time a step waits for the device, because what to
    compute depends on it. Without a communicator the process decides alone.

    Raises:
        RuntimeError: A pair has gradients in some processes but not in all.
    """
    if communicator is None and not capture.records:
        return [_NOTHING] * len(pairs)
    local = [_local(pair, capture.record(pair)) for pair in pairs]
    if communicator is None:
        return [GlobalCounts(*counts) for counts in local]
    world = communicator.world_size
    device = pairs[0].lora_A.device
    counts = torch.tensor(local, dtype=torch.float64, device="cpu").to(device)
    overlaps = torch.stack([_overlap(pair, capture.record(pair)).to(device) for pair in pairs])
    counts, overlaps = communicator.sums([counts, overlaps])
    summed = []
    for numbers, overlap in zip(counts.long().tolist(), overlaps.unbind(), strict=True):
        gradients, calls, missed, rows, overlaid, probed, stale = numbers
        summed.append(GlobalCounts(gradients, calls, missed, rows, overlaid, probed, stale, overlap))
    partial = [pair.name for pair, counted in zip(pairs, summed, strict=True) if 0 < counted.gradients < world]
    if partial:
        raise RuntimeError(
            f"some of the {world} processes have no gradient for {listed(partial)}; average gradients over all of them "
            "(DDP with find_unused_parameters=True does), filling in zeros"
        )
    return summed


def _local(pair: LoRAPair, record: Record | None) -> tuple[int, int, int, int, int, int, int]:
    """Return this process's counts, in the order of `GlobalCounts`."""
    gradients = int(pair.trainable and len(present(pair)) == 2)
    if record is None:
        return gradients, 0, 0, 0, 0, 0, 0
    probed = record.idle or record.left is not None
    return gradients, record.calls, record.missed, record.rows, int(record.overlaid), int(probed), int(record.stale)


def _overlap(pair: LoRAPair, record: Record | None) -> Tensor:
    """Return ⟨dB now, dB left⟩ and ‖dB left‖² in this process, (2,) float64; 0 where there is none."""
    now = pair.lora_B.grad
    if now is None or record is None or record.left is None or is_sparse(now):
        return torch.zeros(2, dtype=torch.float64, device="cpu")
    left = record.left.double()
    return torch.stack([(now.detach().double() * left).sum(), left.square().sum()])


def _shared(options: Options) -> bool:
    return options.metric_row is None or options.metric_row.shared


def refuse_unshared(settings: Sequence[tuple[LoRAPair, Options]], world: int) -> None:
    """Raise ValueError, by layer, for settings that cannot be computed from thin sums over `world` processes."""
    shampoo = [pair.name for pair, o in settings if world > 1 and o.captures == "activations" and not _shared(o)]
    if shampoo:
        raise ValueError(
            f"a Shampoo metric needs GᵀG of the gradient averaged over the {world} processes, which no thin sum gives, "
            f"for {listed(shampoo)}; use metric='kfac' or 'kfac-dense', or gradient='tangent'"
        )
    crossed = [pair.name for pair, o in settings if world > 1 and o.gradient == "backward" and o.captures is not None]
    if crossed:
        raise ValueError(
            f"gradient='backward' forms products within each of the {world} processes, and lacks those of one with "
            f"another, for {listed(crossed)}; use gradient='dense', 'exact' or 'tangent'"
        )
