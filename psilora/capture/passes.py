"""The backward passes under way, and what each has captured so far of gradients that have not accumulated yet.

A gradient accumulates once in a pass, from all calls that the pass has reached; `torch.autograd.grad` leaves `.grad`
alone. Several passes may be under way: in other threads, and one inside another where checkpointing is reentrant.
"""

from __future__ import annotations

import threading
import weakref
from typing import Protocol

import torch
from torch import Tensor

from psilora.capture.casts import Origin

#: X, S_B, where X was cast from, and what stands for the call in every pass through its graph, if anything does.
Call = tuple[Tensor, Tensor | None, Origin | None, object]


class Observed(Protocol):
    """What a pass may reach."""

    def refresh(self, backward: int) -> None:
        """Drop what was captured if the gradient was reset; a backward pass begins, or (-1) a step."""
        ...


class Pass:
    """One backward pass; autograd holds it, as what is to be called in the end, until the pass is over or has failed.

    Attributes:
        number: That of autograd; -1 for whatever runs outside its passes.
        calls: By record, the calls that wait for lora_A's gradient.
        unpaired: By record, how many calls that passed lora_B alone wait for its gradient.
    """

    __slots__ = ("__weakref__", "calls", "number", "unpaired")

    def __init__(self, number: int) -> None:
        self.number = number
        self.calls: dict[Observed, list[Call]] = {}
        self.unpaired: dict[Observed, int] = {}

    def __call__(self) -> None:
        """Drop what no gradient has come for."""
        self.calls.clear()
        self.unpaired.clear()


class Passes:
    """The passes under way: when one begins, what others left for nothing is dropped everywhere.

    At that moment a gradient that was reset is still zero in the layers which the pass will not reach, and in those
    that it will; later, accumulation and averaging over processes fill it.
    """

    def __init__(self) -> None:
        self.records: list[Observed] = []
        self._running: weakref.WeakValueDictionary[int, Pass] = weakref.WeakValueDictionary()
        self._outside: Pass | None = None
        self._lock = threading.Lock()

    @property
    def current(self) -> Pass | None:
        """The pass that this thread runs, if it has reached a record."""
        return self._running.get(torch._C._current_graph_task_id())

    def begin(self) -> Pass:
        """Return the pass that this thread runs, which has reached a record; call it without the lock of one."""
        found = self.current
        if found is not None:
            return found
        with self._lock:
            return self.current or self._begin(torch._C._current_graph_task_id())

    def _begin(self, number: int) -> Pass:
        found = Pass(number)
        if number >= 0:
            torch.autograd.Variable._execution_engine.queue_callback(found)
        else:
            self._outside = found
        for record in self.records:
            record.refresh(number)
        self._running[number] = found  # from now on other threads of the pass need not wait
        return found

    def clear(self) -> None:
        """Forget what ran outside a pass."""
        self._outside = None
