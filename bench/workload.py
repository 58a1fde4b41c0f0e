"""Adapters of a model with X, S and `.grad` as a backward pass of N tokens would leave them."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bench.shapes import Model
from psilora import PSILoRA

Pair = tuple[nn.Parameter, nn.Parameter]


class Adapter(nn.Module):
    """The two factors of one layer, without the layer; s = 1, so that the papers' formulas hold to the letter."""

    def __init__(self, d_out: int, d_in: int, rank: int, device: str) -> None:
        super().__init__()
        self.lora_A = nn.Linear(d_in, rank, bias=False, device=device)
        self.lora_B = nn.Linear(rank, d_out, bias=False, device=device)
        nn.init.normal_(self.lora_B.weight, std=0.02)
        self.scaling = 1.0

    @property
    def pair(self) -> Pair:
        """(A, B)."""
        return self.lora_A.weight, self.lora_B.weight


class Workload:
    """A set of adapters with their activations.

    Attributes:
        adapters: With `.grad`, fp32.
        X, S: Per adapter, (N, d_in) and (N, d_out); adapters that read the same input share X.
    """

    def __init__(self, model: Model, tokens: int, device: str, dtype: torch.dtype) -> None:
        self.model, self.tokens, self.device = model, tokens, device
        torch.manual_seed(0)
        self.adapters = nn.ModuleList(Adapter(o, i, model.rank, device) for o, i, _ in model.layers)
        inputs: dict[int, Tensor] = {}
        for _, i, number in model.layers:
            if number not in inputs:
                inputs[number] = torch.randn(tokens, i, device=device, dtype=dtype)
        self.X = [inputs[number] for _, _, number in model.layers]
        self.S = [torch.randn(tokens, o, device=device, dtype=dtype).div_(tokens) for o, _, _ in model.layers]
        self.set_gradients()

    def set_gradients(self) -> None:
        """Compute dA and dB of every adapter from X and S in its own dtype."""
        with torch.no_grad():
            for adapter, x, s in zip(self.adapters, self.X, self.S, strict=True):
                A, B = adapter.pair
                wide = torch.promote_types(A.dtype, torch.float32)
                A.grad = ((s.to(wide) @ B.to(wide)).mT @ x.to(wide)).to(A.dtype)
                B.grad = (s.to(wide).mT @ (x.to(wide) @ A.to(wide).mT)).to(B.dtype)

    def part(self, members: Sequence[int], dtype: torch.dtype | None = None) -> Workload:
        """Return some adapters as independent copies, all of it in `dtype` where one is given."""
        other = copy.copy(self)
        other.adapters = nn.ModuleList(copy.deepcopy(self.adapters[i]) for i in members)
        other.X, other.S = [self.X[i] for i in members], [self.S[i] for i in members]
        if dtype is not None:
            other.adapters = other.adapters.to(dtype)
            other.X, other.S = [x.to(dtype) for x in other.X], [s.to(dtype) for s in other.S]
        other.set_gradients()
        return other

    def copy(self) -> Workload:
        """Return the same activations with independent adapters."""
        return self.part(range(len(self.adapters)))

    def sample(self) -> list[int]:
        """Positions of the first, the middle and the last adapter."""
        return sorted({0, len(self.adapters) // 2, len(self.adapters) - 1})

    def pairs(self) -> list[Pair]:
        """(A, B) per adapter."""
        return [adapter.pair for adapter in self.adapters]

    def parameters(self) -> list[nn.Parameter]:
        """A, B, A, B, … of all adapters."""
        return [factor for pair in self.pairs() for factor in pair]

    @torch.no_grad()
    def weights(self) -> list[Tensor]:
        """B·A per adapter in float64."""
        return [B.double() @ A.double() for A, B in self.pairs()]

    def prime(self, optimizer: PSILoRA) -> None:
        """Hand X and S to the optimizer as if captured and already verified; `.grad` stays as it is."""
        records = optimizer._capture.records.values()
        for record, x, s in zip(records, self.X, self.S, strict=False):  # a tangent gradient has no records
            record.clear()
            record._take(x, s, None, None)
            record.accumulated()  # a copy of dB of a few layers, which the step compares with `.grad`
            record.verified = True

    def activation_bytes(self) -> int:
        """Bytes of X and S, shared inputs once."""
        storages = {t.data_ptr(): t.nbytes for t in (*self.X, *self.S)}
        return sum(storages.values())


def increment_error(got: Workload, want: Workload, before: Sequence[Tensor]) -> float:
    """Return the largest relative difference of the changes of B·A since `before`."""
    errors = []
    for new, exact, old in zip(got.weights(), want.weights(), before, strict=True):
        errors.append(float((new - exact).norm() / (exact - old).norm()))
    return max(errors)
