"""A plain LoRA linear layer for models that do not use PEFT."""

from __future__ import annotations

import math

from torch import Tensor, nn


class LoRALinear(nn.Module):
    """y = base(x) + s · lora_B(lora_A(dropout(x))), with the base layer frozen.

    Args:
        base: The linear layer to adapt, weight (d_out, d_in). Its parameters stop requiring gradients.
        rank: r, from 1 to min(d_out, d_in).
        alpha: Sets s = alpha / r, or alpha / √r with `use_rslora`; defaults to r, so that s = 1.
        dropout: Probability of zeroing an entry of the adapter's input, in [0, 1).
        use_rslora: Scale by 1/√r.

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
        limit = min(base.in_features, base.out_features)
        if not 1 <= rank <= limit:
            raise ValueError(f"Invalid rank={rank}. Must be in [1, {limit}].")
        alpha = float(rank) if alpha is None else float(alpha)
        if not alpha > 0:
            raise ValueError(f"Invalid alpha={alpha}. Must be > 0.")
        if not 0 <= dropout < 1:
            raise ValueError(f"Invalid dropout={dropout}. Must be in [0, 1).")
        self.base = base.requires_grad_(False)
        device, dtype = base.weight.device, base.weight.dtype
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=device, dtype=dtype)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=device, dtype=dtype)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.scaling = alpha / (math.sqrt(rank) if use_rslora else rank)

    def forward(self, x: Tensor) -> Tensor:
        """Return the adapted output (…, d_out) for x (…, d_in)."""
        update: Tensor = self.lora_B(self.lora_A(self.dropout(x)))
        return self.base(x) + update * self.scaling  # type: ignore[no-any-return]
