"""A plain LoRA linear layer for models that do not use PEFT."""

from __future__ import annotations

import math

from torch import Tensor, nn

from psilora.options.checks import in_range, is_integer, is_real


class LoRALinear(nn.Module):
    """y = base(x) + s · lora_B(lora_A(dropout(x))), with the base layer frozen.

    Args:
        base: The linear layer to adapt, weight (d_out, d_in), floating. Its parameters stop requiring gradients.
        rank: r, from 1 to min(d_out, d_in).
        alpha: Sets s = alpha / r, or alpha / √r with `use_rslora`; finite and > 0; defaults to r, so that s = 1.
        dropout: Probability of zeroing an entry of the adapter's input, in [0, 1).
        use_rslora: Scale by 1/√r.

    Raises:
        ValueError: A setting is out of range, or the base is not of a floating dtype; it is left as it was.
        TypeError: The base is no linear layer.

    `lora_A.weight` (r, d_in) starts Kaiming-uniform, `lora_B.weight` (d_out, r) at zero, in the base layer's dtype.
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        alpha: float | None = None,
        *,
        dropout: float = 0.0,
        use_rslora: bool = False,
    ) -> None:
        super().__init__()
        d_in, d_out, weight = (getattr(base, name, None) for name in ("in_features", "out_features", "weight"))
        if not (isinstance(base, nn.Module) and isinstance(d_in, int) and isinstance(d_out, int)) or weight is None:
            raise TypeError(f"Invalid base of type {type(base).__name__}. Must be a linear layer, as nn.Linear is.")
        if not weight.is_floating_point():
            raise ValueError(f"Invalid base with weight of dtype {weight.dtype}. Must be of a real floating dtype.")
        limit = min(d_in, d_out)
        if not (is_integer(rank) and 1 <= rank <= limit):
            raise ValueError(f"Invalid rank={rank!r}. Must be an integer in [1, {limit}].")
        alpha = rank if alpha is None else alpha
        if not (is_real(alpha) and 0 < alpha < math.inf):
            raise ValueError(f"Invalid alpha={alpha!r}. Must be finite and > 0.")
        in_range("dropout", dropout, 0, 1)
        self.base = base
        device, dtype = weight.device, weight.dtype
        self.lora_A = nn.Linear(d_in, rank, bias=False, device=device, dtype=dtype)
        self.lora_B = nn.Linear(rank, d_out, bias=False, device=device, dtype=dtype)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.scaling = float(alpha) / (math.sqrt(rank) if use_rslora else rank)
        base.requires_grad_(False)  # last: what fails above leaves it as it was

    def forward(self, x: Tensor) -> Tensor:
        """Return the adapted output (…, d_out) for x (…, d_in)."""
        update: Tensor = self.lora_B(self.lora_A(self.dropout(x)))
        return self.base(x) + update * self.scaling  # type: ignore[no-any-return]
