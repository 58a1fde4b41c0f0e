"""The stacked tensors of problems with equal keys: what every reference update starts from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from psilora.steps.problem import Problem, Scales


class Batch:
    """L problems stacked: factors scaled by √s, their gradients, and per-layer numbers as (L, 1, 1).

    Attributes:
        scaling, root: s and √s.
        lr: η, times a controller's factor.
        decay: −η·wd, or None where no layer has a weight decay.
        B, A: √s·B (L, d_out, r) and √s·A (L, r, d_in).
        clip: The factor on `.grad`, with the sign of `maximize`.
        left, right: BᵀG = dA/√s (L, r, d_in) and GAᵀ = dB/√s (L, d_out, r) for the scaled factors.
    """

    def __init__(self, problems: Sequence[Problem], scales: Scales) -> None:
        self.problems = problems
        self.options = problems[0].options
        self.dtype = problems[0].dtype
        self.device = problems[0].pair.lora_A.device
        self.scaling = self.column([p.pair.scaling for p in problems])
        self.root = self.scaling.sqrt()
        self.lr = self.column([p.options.lr for p in problems])
        if scales.rate is not None:
            self.lr = self.lr * scales.rate.to(self.device, self.dtype)
        wd = [p.options.weight_decay for p in problems]
        self.decay = -self.lr * self.column(wd) if any(wd) else None
        self.B = self.stack([p.pair.B for p in problems]).mul_(self.root)
        self.A = self.stack([p.pair.A for p in problems]).mul_(self.root)
        sign = -1.0 if self.options.maximize else 1.0
        self.clip = sign if scales.clip is None else sign * scales.clip.to(self.device, self.dtype)
        self.left = self.stack([p.dA for p in problems]).mul_(self.clip / self.root)
        self.right = self.stack([p.dB for p in problems]).mul_(self.clip / self.root)

    def stack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Stack one tensor per layer in the compute dtype; always a copy, which may be changed in place."""
        return torch.stack([t if t.dtype == self.dtype else t.to(self.dtype) for t in tensors]).detach()

    def column(self, values: Sequence[float | Tensor]) -> Tensor:
        """Return one number per layer as (L, 1, 1)."""
        if any(isinstance(v, Tensor) for v in values):
            tensor = torch.stack([torch.as_tensor(v, dtype=self.dtype, device=self.device).reshape(()) for v in values])
        else:
            tensor = torch.tensor(values, dtype=self.dtype, device="cpu").to(self.device, non_blocking=True)
        return tensor.view(-1, 1, 1)

    def states(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the stacked state `name` of lora_B and of lora_A."""
        return (
            self.stack([p.state_B[name] for p in self.problems]),
            self.stack([p.state_A[name] for p in self.problems]),
        )

    def momentum(self) -> tuple[Tensor, Tensor] | None:
        """Return the old ("momentum" of lora_B, of lora_A), or None without momentum."""
        return self.states("momentum") if self.options.momentum > 0 else None
