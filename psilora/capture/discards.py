"""Whether `.grad` of a pair is still what backward left, or was reset since by other means than the optimizer's own.

`model.zero_grad()`, `p.grad = None` and `p.grad.zero_()` do not reach the optimizer: what was captured for such a
gradient belongs to a step that never came.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Collection, Sequence
from typing import Protocol

import torch
from torch import Tensor

from psilora import runtime
from psilora.adapters.pair import LoRAPair, is_sparse
from psilora.capture.passes import Observed


class Versions:
    """The gradients of one pair, and their version counters, as backward has left them."""

    def __init__(self) -> None:
        self._noted: dict[int, tuple[Tensor, Tensor, int]] = {}  # parameter, gradient and version, by id of the first

    def clear(self) -> None:
        """Forget them."""
        self._noted.clear()

    def note(self, parameter: Tensor) -> None:
        """Remember `.grad` as it is now."""
        if parameter.grad is not None:
            self._noted[id(parameter)] = parameter, parameter.grad, parameter.grad._version

    def changes(self, pair: LoRAPair) -> float:
        """Return how many operations have written to the pair's gradients since; inf for another tensor or none."""
        known = {id(grad): version for _, grad, version in self._noted.values()}
        total = 0.0
        for grad in (pair.lora_B.grad, pair.lora_A.grad):
            seen = None if grad is None else known.get(id(grad))
            total += math.inf if grad is None or seen is None else grad._version - seen
        return total

    @property
    def noted(self) -> Collection[tuple[Tensor, Tensor, int]]:
        """The parameters with their gradients and versions, as noted."""
        return self._noted.values()


class Leftovers:
    """The gradients of one pair that a step has left where they were."""

    def __init__(self) -> None:
        self._left: list[tuple[weakref.ref[Tensor], int]] = []  # with its version; a reset may free it

    def clear(self) -> None:
        """Forget them."""
        self._left = []

    def note(self, pair: LoRAPair) -> None:
        """Remember the gradients that are there; on the CPU their numbers tell them, and nothing is remembered."""
        if not runtime.at_hand(pair.lora_A.device):
            self._left = [(weakref.ref(grad), grad._version) for grad in present(pair)]

    def there(self, pair: LoRAPair) -> bool:
        """Return whether there are gradients that nothing has reset.

        Elsewhere than on the CPU, where a look waits for the device, whatever was written to since counts as reset.
        """
        device = pair.lora_A.device
        if runtime.at_hand(device):
            return not all(map(is_zero, present(pair)))
        if not self._left or runtime.capturing(device):
            return False
        left = [(grad, version) for ref, version in self._left if (grad := ref()) is not None]
        return any(grad is now and version == now._version for now in present(pair) for grad, version in left)


class Watched(Observed, Protocol):
    """What was captured for one pair, which a reset of its gradient makes void."""

    pair: LoRAPair
    versions: Versions

    @property
    def idle(self) -> bool:
        """Whether nothing was captured."""
        ...


def suspects(records: Sequence[Watched]) -> list[Watched]:
    """Return the records whose gradients may have been reset since backward, without a look at numbers.

    On the CPU all that hold something. Elsewhere, where a look waits for the device, those that were written to more
    often than others, or replaced: clipping, unscaling and averaging write to all alike.
    """
    busy = [record for record in records if not record.idle]
    if busy and not any(runtime.at_hand(device) for device in {record.pair.lora_A.device for record in busy}):
        noted = [one for record in busy for one in record.versions.noted]
        # Most often every gradient is the one that backward left, and has been written to as often as all others.
        written = {
            grad._version - version if parameter.grad is grad else math.inf for parameter, grad, version in noted
        }
        if len(written) == 1 and math.inf not in written and len(noted) == 2 * len(busy):
            return []
    changes = [record.versions.changes(record.pair) for record in busy]
    least = min(changes, default=0.0)
    return [
        record
        for record, change in zip(busy, changes, strict=True)
        if change > least or runtime.at_hand(record.pair.lora_A.device)
    ]


def present(pair: LoRAPair) -> list[Tensor]:
    """Return the gradients of the pair that are there."""
    return [p.grad for p in (pair.lora_B, pair.lora_A) if p.grad is not None]


def is_zero(gradient: Tensor) -> bool:
    """Return whether all entries are 0; waits for the device. Most are told by their first row from one that is.

    A sparse one, which a step refuses, is not.
    """
    return not is_sparse(gradient) and not bool(gradient[:1].count_nonzero()) and not bool(gradient.any())


def all_zero(pairs: Sequence[LoRAPair]) -> list[bool]:
    """Return per pair whether its gradients are zero throughout; waits once for every device, if there is a pair."""
    anything = [[grad.detach().any() for grad in present(pair)] for pair in pairs]
    by_device: dict[torch.device, list[Tensor]] = {}
    for flags in anything:
        for flag in flags:
            by_device.setdefault(flag.device, []).append(flag)
    found = {device: iter(torch.stack(flags).tolist()) for device, flags in by_device.items()}
    return [not any([next(found[flag.device]) for flag in flags]) for flags in anything]
