"""Capture inside a graph of `torch.compile`: a node that Dynamo can trace, whose backward calls an opaque operator.

The eager capture links node and hook by a Python object, which breaks a graph at every layer. Here one node sits on
lora_B's output: its forward is an alias, and its backward hands X and S_B to `torch.ops.psilora.capture`. What a graph
remembers is the number of its site: it goes on capturing for an optimizer that is built later, and captures nothing for
one that is gone. The number is a tensor, because Dynamo would compile equal blocks again for every other integer.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Collection
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Recorder(Protocol):
    """What receives the captured tensors of one pair."""

    def open(self, *, missed: bool) -> None:
        """Note that backward has reached lora_B's output."""
        ...

    def add(self, x: Tensor, s: Tensor | None) -> None:
        """Take the input and the output gradient of one call."""
        ...


_INPUT = "_psilora_input"
_numbers = itertools.count()
_sites: weakref.WeakKeyDictionary[nn.Module, Site] = weakref.WeakKeyDictionary()
_recorders: weakref.WeakValueDictionary[int, Recorder] = weakref.WeakValueDictionary()


class Site:
    """One pair of inner linears, by its number."""

    def __init__(self) -> None:
        self.number = torch.tensor(next(_numbers), device="cpu")

    def capture(self, h: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """Return lora_B's output `y` (…, d_out) through the capturing node; `h` is its input, `weight` its weight."""
        x: Tensor | None = getattr(h, _INPUT, None)
        node = _Node.apply(y, y.new_empty(0) if x is None else x, weight, self.number, x is None)  # type: ignore[no-untyped-call]
        return node  # type: ignore[no-any-return]


def pass_on(x: Tensor, h: Tensor) -> None:
    """Let lora_A's output `h` carry its input to lora_B, for `Site.capture`.

    On a tensor of the graph itself, because a checkpointed region must not change anything outside.
    """
    setattr(h, _INPUT, x)


def connect(lora_A: nn.Module, recorder: Recorder) -> Site:
    """Send what graphs compiled through `lora_A` capture, now or earlier, to `recorder`, and return the site.

    Dynamo does not guard on hooks. The mark on the weight, which is guarded, keeps it from running a graph that was
    compiled without them, for this model or another of the same code.
    """
    torch._dynamo.mark_static(lora_A.weight)
    site = _sites.setdefault(lora_A, Site())
    _recorders[int(site.number)] = recorder
    return site


def disconnect(recorders: Collection[Recorder]) -> None:
    """Let compiled graphs capture nothing more for these."""
    leaving = {id(recorder) for recorder in recorders}
    for number in [number for number, recorder in _recorders.items() if id(recorder) in leaving]:
        del _recorders[number]


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, weight: Tensor, number: Tensor, missed: bool) -> Tensor:
        ctx.save_for_backward(x, number)
        ctx.shape, ctx.missed = weight.shape, missed
        alias: Tensor = torch.ops.aten._unsafe_view(y, y.shape)  # to autograd no view, so free to be changed in place
        return alias

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, number = ctx.saved_tensors
        # The zero joins lora_B's gradient, so that no compiler may drop the operator as unused.
        zero = torch.ops.psilora.capture(x, grad, number, ctx.missed)
        return grad, None, zero.expand(ctx.shape), None, None


def _capture(x: Tensor, s: Tensor, number: Tensor, missed: bool) -> Tensor:
    recorder = _recorders.get(int(number))
    if recorder is not None:
        recorder.open(missed=missed)
        if not missed:  # copies, because Inductor reuses a buffer after its last reader in the graph
            dtype = s.dtype if s.element_size() < x.element_size() else x.dtype
            recorder.add(x.detach().to(dtype, copy=True), s.detach().clone())
    return s.new_zeros(())


def _capture_fake(x: Tensor, s: Tensor, number: Tensor, missed: bool) -> Tensor:
    return s.new_zeros(())


# Replaying a CUDA graph would skip the Python side of the operator, so Inductor must leave it out of one.
_TAGS = tuple(tag for tag in (getattr(torch.Tag, "cudagraph_unsafe", None),) if tag is not None)
torch.library.define("psilora::capture", "(Tensor x, Tensor s, Tensor number, bool missed) -> Tensor", tags=_TAGS)
torch.library.impl("psilora::capture", "default", _capture)
torch.library.register_fake("psilora::capture", _capture_fake)
