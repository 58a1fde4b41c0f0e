"""Inputs that several layers cast from one tensor, kept once and no wider than they were.

PEFT casts the input of a 16-bit model to the dtype of fp32 adapters in every adapted layer, as autocast does: q, k and
v then each hold a copy of one X. That a tensor is a cast of another shows in its autograd graph, so the copies are
recognised without comparing numbers. An input without a graph, as in a model's first layer, is kept as it is.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

_CAST = "ToCopyBackward0"


@dataclass(frozen=True)
class Origin:
    """Where a tensor was cast from.

    Attributes:
        mark: An object that stands for the node of the graph that made the uncast tensor.
        casts: The number of that node's output, and the dtypes passed through after it.
        dtype: The narrowest dtype passed through, which holds the values exactly; the last of several.
    """

    mark: object
    casts: tuple[int | torch.dtype, ...]
    dtype: torch.dtype


def origin_of(x: Tensor) -> Origin | None:
    """Return the origin of a tensor that was cast on its device, or None for any other."""
    node, number, dtypes = x.grad_fn, x.output_nr, [x.dtype]
    while node is not None and node.name() == _CAST:
        parent, index = node.next_functions[0]
        if parent is None or parent._input_metadata[index].device != x.device:
            break
        node, number = parent, index
        dtypes.append(parent._input_metadata[index].dtype)
    if node is None or len(dtypes) == 1:
        return None
    notes: dict[str, object] = node.metadata  # type: ignore[assignment]  # a property, which torch's stubs call a method
    mark = notes.setdefault("psilora.origin", object())
    return Origin(mark, (number, *dtypes), min(dtypes, key=lambda dtype: dtype.itemsize))


class Originals:
    """What is kept now, by origin; forgets what nobody holds any more."""

    def __init__(self) -> None:
        self._kept: weakref.WeakValueDictionary[tuple[object, ...], Tensor] = weakref.WeakValueDictionary()

    def share(self, x: Tensor, origin: Origin | None) -> Tensor:
        """Return the tensor to keep for `x`: one already kept of the same origin, or `x` in its narrowest dtype."""
        if origin is None:
            return x
        key = (origin.mark, *origin.casts)
        kept = self._kept.get(key)
        if kept is None or kept.shape != x.shape:
            kept = x.to(origin.dtype) if origin.dtype.itemsize < x.element_size() else x
            self._kept[key] = kept
        return kept
