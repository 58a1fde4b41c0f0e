"""What is kept of X and S_B between backward and step: their rows, the dense gradient, or products formed at once.

Rows grow with the tokens of a step, N·(d_in + d_out) numbers; the dense S_BᵀX is d_out·d_in of them whatever N is; the
products of "cross" are r·(d_in + 2·d_out) at most, and serve one kind of step only, as
`psilora.lowrank.gradient_operator.CrossGradient` says.
"""

from __future__ import annotations

import functools
from typing import Protocol

import torch
from torch import Tensor

from psilora.adapters.pair import LoRAPair
from psilora.linalg.precision import compute_dtype, full_precision

#: What each `gradient=` setting keeps; "auto" decides by layer.
HOLDS = {"exact": "rows", "dense": "dense", "backward": "cross", "tangent": "nothing"}

#: Numbers whose squares `column_squares` holds at a time: on a CPU what its cache keeps, elsewhere 256 MiB.
SQUARED_ON_CPU, SQUARED_ELSEWHERE = 2**18, 2**26


class Input(Protocol):
    """X (N, d_in) of one call, by what is asked of it."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of X."""
        ...

    def rows(self, dtype: torch.dtype) -> Tensor:
        """Return X itself."""
        ...

    def left(self, P: Tensor, total: Tensor | None = None) -> Tensor:
        """Return PᵀX (k, d_in) for P (N, k), added to `total` in place if there is one, in the dtype of P."""
        ...

    def right(self, V: Tensor) -> Tensor:
        """Return XVᵀ (N, k) for V (k, d_in), in the dtype of V."""
        ...

    def squares(self, dtype: torch.dtype) -> Tensor:
        """Return Σ_n x_n² (d_in,)."""
        ...


def column_squares(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return Σ_n x_n² (d,) of x (N, d) in `dtype`, without holding a square or a wider copy of all of x."""
    numbers = SQUARED_ON_CPU if x.device.type == "cpu" else SQUARED_ELSEWHERE
    rows = max(1, numbers // x.shape[1])
    total: Tensor = functools.reduce(Tensor.add_, (part.to(dtype).square().sum(0) for part in x.split(rows)))
    return total


class Matrix:
    """X of a linear layer, (N, d_in); `psilora.adapters.convolution.Patches` is that of a convolution."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.dtype = x, x.dtype

    def rows(self, dtype: torch.dtype) -> Tensor:
        """See `Input`."""
        return self.x.to(dtype)

    def left(self, P: Tensor, total: Tensor | None = None) -> Tensor:
        """See `Input`."""
        x = self.x.to(P.dtype)
        return P.mT @ x if total is None else total.addmm_(P.mT, x)

    def right(self, V: Tensor) -> Tensor:
        """See `Input`."""
        return self.x.to(V.dtype) @ V.mT

    def squares(self, dtype: torch.dtype) -> Tensor:
        """See `Input`."""
        return column_squares(self.x, dtype)


class Holding(Protocol):
    """What is kept of the calls of one pair."""

    def take(self, x: Input, s: Tensor, pair: LoRAPair) -> None:
        """Keep what is needed of X (N, d_in) and S_B (N, d_out) of one call."""
        ...

    def tensors(self) -> list[Tensor]:
        """Return the tensors kept."""
        ...

    def dB(self, pair: LoRAPair) -> Tensor:
        """Return S_Bᵀ(XAᵀ), (d_out, r), in the compute dtype."""
        ...


class Rows:
    """X and S_B themselves, in their own dtype.

    Attributes:
        chunks: (X, S_B) of each call, as matrices, in backward order.
    """

    def __init__(self) -> None:
        self.chunks: list[tuple[Tensor, Tensor]] = []

    def take(self, x: Input, s: Tensor, pair: LoRAPair) -> None:
        """See `Holding`. Under autocast X may be wider than S_B: neither is kept wider than the gradient."""
        self.chunks.append((x.rows(s.dtype if s.element_size() < x.dtype.itemsize else x.dtype), s))

    def overlay(self, index: int, s: Tensor) -> None:
        """Add S_B of another backward pass through a call, whose X is the same."""
        x, before = self.chunks[index]
        self.chunks[index] = x, before + s

    def tensors(self) -> list[Tensor]:
        """See `Holding`."""
        return [t for chunk in self.chunks for t in chunk]

    def dB(self, pair: LoRAPair) -> Tensor:
        """See `Holding`; one read of X and S_B."""
        A = pair.A.to(compute_dtype(pair.lora_A.dtype))
        total = A.new_zeros(pair.d_out, pair.rank)
        for x, s in self.chunks:
            total += s.to(A.dtype).mT @ (x.to(A.dtype) @ A.mT)
        return total


class Dense:
    """S_BᵀX of all calls, (d_out, d_in), summed in the compute dtype; None before the first."""

    def __init__(self) -> None:
        self.matrix: Tensor | None = None

    def take(self, x: Input, s: Tensor, pair: LoRAPair) -> None:
        """See `Holding`."""
        dtype = compute_dtype(pair.lora_A.dtype)
        with full_precision(s.device.type):
            self.matrix = x.left(s.to(dtype), self.matrix)

    def tensors(self) -> list[Tensor]:
        """See `Holding`."""
        return [] if self.matrix is None else [self.matrix]

    def dB(self, pair: LoRAPair) -> Tensor:
        """See `Holding`."""
        if self.matrix is None:
            raise RuntimeError(f"{pair.name}: no call has been captured")
        return self.matrix @ pair.A.to(self.matrix.dtype).mT


class Cross:
    """The products of one call that a step with K = 1, A first, needs, with L = (S_B·B)ᵀX = dA of that call.

    Attributes:
        left: L (r, d_in) in the compute dtype, or None where `.grad` holds it in that dtype.
        right, cross: S_Bᵀ(XAᵀ) and S_Bᵀ(XLᵀ), (d_out, r).
    """

    def __init__(self) -> None:
        self.left: Tensor | None = None
        self.right: Tensor | None = None
        self.cross: Tensor | None = None

    def take(self, x: Input, s: Tensor, pair: LoRAPair) -> None:
        """See `Holding`. A second call overwrites the first: the two would need products of one with the other."""
        dtype, grad = compute_dtype(pair.lora_A.dtype), pair.lora_A.grad
        A, B = pair.A.to(dtype), pair.B.to(dtype)
        with full_precision(s.device.type):
            if grad is not None and grad.dtype == dtype and grad.layout == torch.strided:
                left = grad.detach().flatten(1)
            else:
                left = self.left = x.left(s.to(dtype) @ B)
            products = s.to(dtype).mT @ x.right(torch.cat([A, left]))
        self.right, self.cross = products.split(pair.rank, 1)

    def tensors(self) -> list[Tensor]:
        """See `Holding`."""
        return [t for t in (self.left, self.right, self.cross) if t is not None]

    def dB(self, pair: LoRAPair) -> Tensor:
        """See `Holding`."""
        if self.right is None:
            raise RuntimeError(f"{pair.name}: no call has been captured")
        return self.right


class Nothing:
    """Nothing: `.grad` is enough, or the sums that the metric needs."""

    def take(self, x: Input, s: Tensor, pair: LoRAPair) -> None:
        """See `Holding`."""

    def tensors(self) -> list[Tensor]:
        """See `Holding`."""
        return []

    def dB(self, pair: LoRAPair) -> Tensor:
        """See `Holding`; there is nothing to form it from."""
        raise RuntimeError(f"{pair.name}: nothing is kept of its calls")


KINDS: dict[str, type[Rows] | type[Dense] | type[Cross] | type[Nothing]] = {
    "rows": Rows,
    "dense": Dense,
    "cross": Cross,
    "nothing": Nothing,
}
