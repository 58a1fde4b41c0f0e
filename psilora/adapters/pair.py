"""A LoRA pair, an adapter that is none, and how both are named in messages."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from psilora.adapters.convolution import Convolution


@dataclass(eq=False)
class LoRAPair:
    """The two factors of one adapter, ΔW = scaling · B · A.

    Attributes:
        name: Path of the adapted module, with the adapter's name where it is not "default".
        lora_A, lora_B: The parameters; `A` and `B` view them as matrices (r, d_in) and (d_out, r).
        sites: The (lora_A, lora_B) modules to capture at; more than one where modules share the parameters.
        uncaptured: Why activations cannot be captured, or None when they can.
        scale: s, where a registered layout says it; None where the owner's `scaling` does.
        refused: Why a registered layout says that this is not one product, or None.
        convolution: How lora_A reads its input where it is a convolution, or None; see `psilora.adapters.convolution`.
    """

    name: str
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    owner: nn.Module
    adapter: str | None = None
    sites: list[tuple[nn.Module, nn.Module]] = field(default_factory=list)
    uncaptured: str | None = None
    convolution: Convolution | None = None
    scale: float | Tensor | Callable[[], float | Tensor] | None = None
    refused: str | None = None

    @property
    def stated_scaling(self) -> object:
        """What the module, or its layout, has for s: of any type."""
        if self.scale is not None:
            return self.scale() if callable(self.scale) and not isinstance(self.scale, Tensor) else self.scale
        scaling = getattr(self.owner, "scaling", None)
        return scaling.get(self.adapter) if isinstance(scaling, dict) else scaling

    @property
    def scaling(self) -> float:
        """The current s, read from the module because adapters can be rescaled while training."""
        value = float(self.stated_scaling)  # type: ignore[arg-type]
        if not 0 < value < math.inf:
            raise ValueError(f"{self.name}: invalid LoRA scaling={value}. Must be finite and > 0.")
        return value

    @property
    def trainable(self) -> bool:
        """Whether both factors require a gradient now; one that does not is never moved, and they move together."""
        return self.lora_A.requires_grad and self.lora_B.requires_grad

    @property
    def path(self) -> str:
        """The path of the adapted module alone."""
        return self.name.removesuffix(f" ({self.adapter})")

    @property
    def A(self) -> Tensor:
        """`lora_A` as a matrix (r, d_in), sharing its storage."""
        return as_matrix(self.lora_A)

    @property
    def B(self) -> Tensor:
        """`lora_B` as a matrix (d_out, r), sharing its storage."""
        return as_matrix(self.lora_B)

    @property
    def rank(self) -> int:
        """Return r."""
        return self.lora_A.shape[0]

    @property
    def d_in(self) -> int:
        """Return the width of A, the layer's input width for a linear layer."""
        return self.lora_A.shape[1:].numel()

    @property
    def d_out(self) -> int:
        """Return the height of B, the layer's output width for a linear layer."""
        return self.lora_B.shape[0]


def as_matrix(tensor: Tensor) -> Tensor:
    """Return a factor (or its gradient) as a matrix: convolution kernels are flattened behind the first dimension."""
    return tensor.detach().flatten(1)


@dataclass(eq=False)
class Unsupported:
    """Adapter parameters that are not the two factors of one product, and why."""

    name: str
    reason: str
    parameters: list[nn.Parameter]


def listed(names: list[str], limit: int = 8) -> str:
    """Return "name, name … and n more" for an error or warning, cut after `limit` names."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def mebibytes(count: float) -> str:
    """Return a number of bytes in the one unit that messages and reports use."""
    size = count / 2**20
    return f"{size:,.1f} MiB" if size >= 100 else f"{size:.3g} MiB"


def describe(items: list[LoRAPair] | list[Unsupported]) -> str:
    """Return "name (reason), …" for an error or warning."""
    return listed([f"{i.name} ({i.reason if isinstance(i, Unsupported) else i.uncaptured})" for i in items])


def is_sparse(tensor: Tensor) -> bool:
    """Whether a gradient is in a sparse layout, which the thin products cannot use."""
    return tensor.layout != torch.strided
