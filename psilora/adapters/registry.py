"""Layouts of LoRA adapters beside PEFT's: where a module keeps its two factors, and what scales their product.

A layout is a function of a module. One more takes a few lines:

    @psilora.adapters.register
    def ours(module: nn.Module) -> Iterator[Adapter]:
        if isinstance(module, OurLoRA):
            yield Adapter(module.down, module.up, scaling=module.alpha)

The pair then is ΔW = scaling·B·A, with A (r, d_in) the weight of `down` and B (d_out, r) that of `up`.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

Scaling: TypeAlias = "float | Tensor | Callable[[], float | Tensor]"


@dataclass(frozen=True)
class Adapter:
    """The two factors of one adapter in a module.

    Attributes:
        lora_A, lora_B: Modules with a `weight`, or parameters: A (r, d_in) and B (d_out, r). Modules are taken to be
            run as lora_B(lora_A(x)), so that activations can be captured there.
        scaling: s > 0, or a function that is asked for it at every step, where it may change.
        name: What tells it from other adapters of its module; None for the only one.
        uncaptured: Why activations cannot be captured although the factors are modules; None where they can.
        refused: Why this is not one product s·B·A, for a layout that knows better than the shapes; None where it is.
    """

    lora_A: nn.Module | nn.Parameter
    lora_B: nn.Module | nn.Parameter
    scaling: Scaling
    name: str | None = None
    uncaptured: str | None = None
    refused: str | None = None


Layout: TypeAlias = Callable[[nn.Module], Iterable[Adapter]]

_LAYOUTS: list[Layout] = []


def register(layout: Layout) -> Layout:
    """Have `psilora.adapters.find_pairs` ask `layout` about every module, before the layouts registered earlier.

    Args:
        layout: Returns the adapters of a module, none for modules that it does not know. Usable as a decorator.

    Returns:
        `layout`, which `unregister` takes.

    Raises:
        TypeError: It cannot be called.
    """
    if not callable(layout):
        raise TypeError(f"Invalid layout {layout!r}. Must be a function of a module that returns its adapters.")
    _LAYOUTS.insert(0, layout)
    return layout


def unregister(layout: Layout) -> None:
    """Forget a layout.

    Raises:
        ValueError: It is not registered.
    """
    if layout not in _LAYOUTS:
        raise ValueError(f"Invalid layout {layout!r}. Must be one that was registered.")
    _LAYOUTS.remove(layout)


def registered(module: nn.Module) -> list[Adapter]:
    """Return what the first layout that knows a module says of it."""
    return next((found for layout in _LAYOUTS if (found := list(layout(module)))), [])


@register
def torchtune(module: Any) -> Iterator[Adapter]:
    """The `LoRALinear` and `DoRALinear` of torchtune: linears `lora_a` and `lora_b`, s = alpha/rank."""
    A, B = getattr(module, "lora_a", None), getattr(module, "lora_b", None)
    alpha, rank = getattr(module, "alpha", None), getattr(module, "rank", None)
    if isinstance(A, nn.Linear) and isinstance(B, nn.Linear) and _number(alpha) and _number(rank):
        yield Adapter(A, B, scaling=lambda: module.alpha / module.rank)


@register
def right_multiplied(module: Any) -> Iterator[Adapter]:
    """The home-made `x @ lora_A @ lora_B` with parameters (d_in, r) and (r, d_out), s = scaling or alpha/rank.

    The pair is that of the transposed weight, ΔWᵀ = s·lora_A·lora_B: its B is `lora_A`, its A is `lora_B`, and
    `first="A"` updates `lora_B` first. In a square layer it cannot be told from the usual order, and is not taken.
    """
    A, B = getattr(module, "lora_A", None), getattr(module, "lora_B", None)
    if not (isinstance(A, nn.Parameter) and isinstance(B, nn.Parameter) and A.dim() == B.dim() == 2):
        return
    if A.shape[1] != B.shape[0] or B.shape[1] == A.shape[0]:
        return
    scaling, alpha = getattr(module, "scaling", None), getattr(module, "alpha", None)
    if isinstance(scaling, (numbers.Real, Tensor)):
        yield Adapter(B, A, scaling=lambda: module.scaling)
    elif _number(alpha):
        yield Adapter(B, A, scaling=lambda: module.alpha / A.shape[1])


@register
def packed(module: Any) -> Iterator[Adapter]:
    """The `MergedLinear` of loralib and `LoRAQKVLinear` of litgpt: one product for each enabled part of the output."""
    A, B, enabled = (getattr(module, name, None) for name in ("lora_A", "lora_B", "enable_lora"))
    if isinstance(A, nn.Parameter) and isinstance(B, nn.Parameter) and isinstance(enabled, (list, tuple)):
        parts = sum(map(bool, enabled))
        refused = f"it packs one product for each of {parts} enabled parts of its output into two parameters"
        yield Adapter(A, B, getattr(module, "scaling", 1.0), refused=refused if parts > 1 else None)


def _number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
