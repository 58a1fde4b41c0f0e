"""Different parameters on one memory: whoever steps each of them moves the same numbers twice."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def tied(groups: Sequence[Sequence[tuple[str, Tensor]]]) -> list[str | None]:
    """Return per group of named parameters the name of another group's that shares an element with one of its own.

    Views of one storage that share no element, as flat parameters hold them, are not tied. Neither is a parameter with
    itself.
    """
    spans = []
    for i, group in enumerate(groups):
        for name, parameter in group:
            part = _memory(parameter)
            if part is not None:
                reach = sum((size - 1) * stride for size, stride in zip(part.shape, part.stride(), strict=True)) + 1
                start = part.data_ptr()
                spans.append((str(part.device), start, start + reach * part.element_size(), i, name, part))
    spans.sort(key=lambda span: span[:4])
    found: list[str | None] = [None] * len(groups)
    for k, (device, _, end, i, name, part) in enumerate(spans):
        for other_device, other_start, _, j, other_name, other in spans[k + 1 :]:
            if other_device != device or other_start >= end:
                break
            if i != j and _overlap(part, other):
                found[i], found[j] = found[i] or other_name, found[j] or name
    return found


def _memory(parameter: Tensor) -> Tensor | None:
    """What this process holds of a parameter, or None where it has no addresses."""
    part: Tensor = parameter.detach()
    if hasattr(part, "to_local"):  # a DTensor
        part = part.to_local()
    if part.numel() == 0 or part.layout != torch.strided or part.device.type == "meta":
        return None
    try:
        return part if part.data_ptr() else None
    except RuntimeError:  # a fake tensor
        return None


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors, whose ranges of addresses meet, share a byte; taken for granted between two dtypes."""
    return a.element_size() != b.element_size() or bool(torch.isin(_addresses(a), _addresses(b)).any())


def _addresses(tensor: Tensor) -> Tensor:
    """The addresses of all elements, rounded down to the size of one."""
    found = torch.tensor(tensor.data_ptr() // tensor.element_size(), dtype=torch.int64, device="cpu")
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        found = found[..., None] + torch.arange(size, dtype=torch.int64, device="cpu") * stride
    return found.flatten()
