"""The input of a convolution as the matrix X that its kernel multiplies, formed only where rows are asked for.

A convolution with kernel A (r, C_in, *k) computes h = X·Aᵀ with A flattened to (r, C_in·∏k) and one row of X for each
output position: the patch of the input under the kernel. LoRA of a convolution, lora_A with the layer's kernel and
lora_B of size 1, is LoRA of a linear layer on these rows. X repeats a number up to ∏k times, while its products are
convolutions themselves: XVᵀ has the rows of V as kernels, PᵀX is a kernel's gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from psilora.linalg.precision import full_convolutions

_CLASSES: tuple[type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FORWARD: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)
_KERNEL_GRADIENT: tuple[Callable[..., Tensor], ...] = (conv1d_weight, conv2d_weight, conv3d_weight)


@dataclass(frozen=True)
class Convolution:
    """How a convolution reads its input; each tuple has an entry per spatial dimension, of which there are n = 1 to 3.

    Attributes:
        kernel, stride, dilation: As in `torch.nn.Conv2d`.
        padding: (before, after), "same" and "valid" spelled out.
        mode: How the padding is filled, as `padding_mode` of `torch.nn.Conv2d`.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    mode: str

    @property
    def dims(self) -> int:
        """Return n."""
        return len(self.kernel)

    def batched(self, x: Tensor) -> Tensor:
        """Return an input or output with its batch dimension, (batch, channels, *positions)."""
        return x if x.dim() == self.dims + 2 else x[None]

    def padded(self, x: Tensor) -> Tensor:
        """Return the input (batch, C_in, *sizes) with its padding."""
        amounts = [amount for pair in reversed(self.padding) for amount in pair]
        if not any(amounts):
            return x
        return F.pad(x, amounts, mode="constant" if self.mode == "zeros" else self.mode)


def reading(lora_A: nn.Module, lora_B: nn.Module) -> Convolution | str:
    """Return how lora_A reads its input, or why lora_B(lora_A(x)) is not X·Aᵀ·Bᵀ for its patches X."""
    for module in (lora_A, lora_B):
        cls = next((c for c in _CLASSES if isinstance(module, c)), None)
        if cls is None or not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return "its lora_A and lora_B are neither linear layers nor convolutions"
        own = type(module)
        if own.forward is not cls.forward or own._conv_forward is not cls._conv_forward:
            return f"its {own.__name__} has a forward of its own"
    A, B = convolution(lora_A), convolution(lora_B)
    one = (1,) * A.dims
    if B.kernel != one or B.stride != one or any(map(any, B.padding)):
        return f"its lora_B has kernel {B.kernel}, stride {B.stride} and padding {B.padding}, not one position each"
    return A


def convolution(conv: nn.Module) -> Convolution:
    """Return how an `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d` reads its input."""
    if not isinstance(conv, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        raise TypeError(f"expected a Conv1d, Conv2d or Conv3d, got {type(conv).__name__}")
    kernel, dilation = tuple(conv.kernel_size), tuple(conv.dilation)
    if conv.padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        padding = tuple((total // 2, total - total // 2) for total in totals)
    elif conv.padding == "valid":
        padding = ((0, 0),) * len(kernel)
    else:
        padding = tuple((int(p), int(p)) for p in conv.padding)
    return Convolution(kernel, tuple(conv.stride), dilation, padding, conv.padding_mode)


def unfolded(x: Tensor, conv: Convolution) -> Tensor:
    """Return X (batch·positions, C_in·∏k), in the dtype of `x`, so that the convolution is X·A.flatten(1)ᵀ.

    Positions run in row-major order within a sample, columns as in A.flatten(1). A view of `x` where that is possible.

    Args:
        x: (batch, C_in, *sizes) or (C_in, *sizes), in any memory format.
        conv: How the convolution reads it.
    """
    windows = conv.padded(conv.batched(x))
    channels, n = windows.shape[1], conv.dims
    for i, (k, stride, dilation) in enumerate(zip(conv.kernel, conv.stride, conv.dilation, strict=True)):
        windows = windows.unfold(2 + i, dilation * (k - 1) + 1, stride)[..., ::dilation]
    order = (0, *range(2, 2 + n), 1, *range(2 + n, 2 + 2 * n))
    return windows.permute(order).reshape(-1, channels * math.prod(conv.kernel)).contiguous()


def position_rows(y: Tensor, conv: Convolution) -> Tensor:
    """Return an output or its gradient, (batch, C_out, *positions), as rows (batch·positions, C_out)."""
    return conv.batched(y).movedim(1, -1).flatten(0, -2).contiguous()


class Patches:
    """X of one call of a convolution; see `psilora.capture.storage.Input`.

    Args:
        x: Its input, (batch, C_in, *sizes) or (C_in, *sizes); kept as it is.
        conv: How it is read.
    """

    def __init__(self, x: Tensor, conv: Convolution) -> None:
        self.x, self.dtype, self.conv = conv.batched(x), x.dtype, conv

    def rows(self, dtype: torch.dtype) -> Tensor:
        """See `psilora.capture.storage.Input`; the ∏k-fold matrix."""
        return unfolded(self.x.to(dtype), self.conv)

    def left(self, P: Tensor, total: Tensor | None = None) -> Tensor:
        """See `psilora.capture.storage.Input`; the gradient of a kernel, from the input itself."""
        product = self._kernel_gradient(self.conv.padded(self.x.to(P.dtype)), P)
        return product if total is None else total.add_(product)

    def right(self, V: Tensor) -> Tensor:
        """See `psilora.capture.storage.Input`; a convolution with k kernels."""
        conv, x = self.conv, self.conv.padded(self.x.to(V.dtype))
        kernels = V.reshape(V.shape[0], x.shape[1], *conv.kernel)
        with full_convolutions():
            h = _FORWARD[conv.dims - 1](x, kernels, stride=conv.stride, dilation=conv.dilation)
        return position_rows(h, conv)

    def squares(self, dtype: torch.dtype) -> Tensor:
        """See `psilora.capture.storage.Input`; padding is 0 or copies of the input, so it may be squared afterwards."""
        x = self.conv.padded(self.x.to(dtype)).square()
        ones = x.new_ones(1, 1).expand(x.shape[0] * math.prod(self._grid(x)), 1)
        return self._kernel_gradient(x, ones).flatten()

    def _grid(self, padded: Tensor) -> list[int]:
        """Return the number of output positions along each dimension."""
        conv = self.conv
        windows = [d * (k - 1) + 1 for k, d in zip(conv.kernel, conv.dilation, strict=True)]
        return [
            (size - window) // stride + 1
            for size, window, stride in zip(padded.shape[2:], windows, conv.stride, strict=True)
        ]

    def _kernel_gradient(self, padded: Tensor, P: Tensor) -> Tensor:
        """Return PᵀX, (k, C_in·∏k), for P (N, k)."""
        conv, k = self.conv, P.shape[1]
        grad = P.reshape(padded.shape[0], *self._grid(padded), k).movedim(-1, 1)
        with full_convolutions():
            gradient = _KERNEL_GRADIENT[conv.dims - 1](
                padded, (k, padded.shape[1], *conv.kernel), grad, stride=conv.stride, dilation=conv.dilation
            )
        return gradient.flatten(1)
