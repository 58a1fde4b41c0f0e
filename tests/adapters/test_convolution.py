"""Convolutions as products with their patches, against torch's own convolutions in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from psilora.adapters.convolution import Patches, convolution, position_rows, reading, unfolded

SIZES = {1: (11,), 2: (9, 7), 3: (6, 5, 4)}
SETTINGS = {
    "1": (1, {"kernel_size": 3}),
    "1, stride and padding": (1, {"kernel_size": 4, "stride": 3, "padding": 2}),
    "1, circular": (1, {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}),
    "2": (2, {"kernel_size": 3, "padding": 1}),
    "2, one position": (2, {"kernel_size": 1}),
    "2, stride": (2, {"kernel_size": (3, 2), "stride": (2, 3), "padding": (1, 0)}),
    "2, stride beyond the kernel": (2, {"kernel_size": 1, "stride": 2}),
    "2, dilation": (2, {"kernel_size": (2, 3), "dilation": (3, 2), "padding": 2}),
    "2, same": (2, {"kernel_size": (2, 5), "padding": "same", "dilation": (1, 2)}),
    "2, valid": (2, {"kernel_size": 2, "padding": "valid"}),
    "2, reflect": (2, {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect"}),
    "2, replicate, same": (2, {"kernel_size": 4, "padding": "same", "padding_mode": "replicate"}),
    "3": (3, {"kernel_size": (3, 2, 1), "stride": (1, 2, 1), "padding": (1, 1, 0), "dilation": (2, 1, 1)}),
    "3, replicate": (3, {"kernel_size": 3, "padding": 1, "padding_mode": "replicate"}),
}
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
every = pytest.mark.parametrize("name", SETTINGS)


def layer(name: str, channels: int = 3, out: int = 5) -> tuple[nn.Module, Tensor]:
    """A convolution without bias and an input for it."""
    dims, settings = SETTINGS[name]
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](channels, out, bias=False, **settings).double()
    return conv, torch.randn(4, channels, *SIZES[dims], dtype=torch.float64)


def same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@every
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_convolution_is_the_product_of_its_patches_with_its_kernel(name: str, channels_last: bool) -> None:
    conv, x = layer(name)
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    how = convolution(conv)
    X = unfolded(x, how)
    assert X.is_contiguous() and X.shape[1] == conv.weight[0].numel()
    same(X @ conv.weight.flatten(1).mT, position_rows(conv(x), how))
    single = unfolded(x[1], how)
    assert torch.equal(single, X[len(single) : 2 * len(single)])
    same(single @ conv.weight.flatten(1).mT, position_rows(conv(x[1]), how))


@every
def test_products_without_the_rows_are_those_of_the_rows(name: str) -> None:
    conv, x = layer(name)
    before, how = x.clone(), convolution(conv)
    X, patches = unfolded(x, how), Patches(x, how)
    P, V = torch.randn(len(X), 4, dtype=x.dtype), torch.randn(6, X.shape[1], dtype=x.dtype)
    total = torch.randn(4, X.shape[1], dtype=x.dtype)
    assert torch.equal(patches.rows(x.dtype), X)
    same(patches.left(P), P.mT @ X)
    same(patches.right(V), X @ V.mT)
    same(patches.squares(x.dtype), X.square().sum(0))
    wanted = total + P.mT @ X
    assert patches.left(P, total) is total
    same(total, wanted)
    assert torch.equal(x, before)


@st.composite
def geometries(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    """A convolution and sizes that it can read."""
    dims = draw(st.integers(1, 3))
    each = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(dims))  # noqa: E731
    kernel, stride, dilation = each(1, 3), each(1, 3), each(1, 2)
    padding: str | tuple[int, ...] = draw(st.sampled_from(["valid", "same"])) if draw(st.booleans()) else each(0, 2)
    if padding == "same":
        stride = (1,) * dims
    mode = draw(st.sampled_from(["zeros", "replicate", "circular", "reflect"]))
    cls = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    conv = cls(2, 3, kernel, stride, padding, dilation, bias=False, padding_mode=mode).double()
    return conv, tuple(d * (k - 1) + draw(st.integers(3, 5)) for k, d in zip(kernel, dilation, strict=True))


@given(geometries(), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_any_geometry(geometry: tuple[nn.Module, tuple[int, ...]], batch: int) -> None:
    conv, sizes = geometry
    how, x = convolution(conv), torch.randn(batch, 2, *sizes, dtype=torch.float64)
    X, patches, h = unfolded(x, how), Patches(x, how), conv(x)
    same(X @ conv.weight.detach().flatten(1).mT, position_rows(h.detach(), how))
    same(patches.right(conv.weight.detach().flatten(1)), position_rows(h.detach(), how))
    grad = torch.randn_like(h)
    (wanted,) = torch.autograd.grad(h, conv.weight, grad)
    same(patches.left(position_rows(grad, how)), wanted.flatten(1))
    same(patches.squares(x.dtype), X.square().sum(0))


def test_neither_another_padding_nor_another_order_of_columns_would_do() -> None:
    """The traps: `F.unfold` knows zeros alone, and channels_last memory is in another order than A.flatten(1)."""
    conv, x = layer("2, reflect")
    X = unfolded(x, convolution(conv))
    zeros = F.unfold(x, conv.kernel_size, padding=conv.padding).mT.flatten(0, 1)
    assert zeros.shape == X.shape and (zeros - X).norm() > 0.1 * X.norm()
    columns = X.unflatten(1, (3, 9)).mT.flatten(1)
    assert (columns @ conv.weight.flatten(1).mT - X @ conv.weight.flatten(1).mT).norm() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_16_bit_inputs_are_copies_and_products_are_in_the_dtype_asked_for(dtype: torch.dtype) -> None:
    conv, x = layer("2, same")
    x = x.to(dtype)
    patches = Patches(x, convolution(conv))
    X = patches.rows(torch.float32)
    assert torch.equal(patches.rows(dtype).float(), X)
    P, V = torch.randn(len(X), 4), torch.randn(6, X.shape[1])
    for found, wanted in ((patches.left(P), P.mT @ X), (patches.right(V), X @ V.mT)):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(patches.squares(torch.float32), X.square().sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu), "cpu"])
@pytest.mark.parametrize("name", ["1", "2", "3"])
def test_fp32_products_are_not_in_tf32_and_give_the_same_bits_again(name: str, device: str) -> None:
    """tf32 products are off by 3e-4 and more; sums of this length in fp32 by 1e-6."""
    conv, _ = layer(name, channels=24)
    how = convolution(conv)
    x = torch.randn(64, 24, *SIZES[how.dims])
    X = unfolded(x.double(), how)
    P, V = torch.randn(len(X), 16), torch.randn(16, X.shape[1])
    exact = (P.double().mT @ X, X @ V.double().mT, X.square().sum(0))
    patches = Patches(x.to(device), how)
    runs = [(patches.left(P.to(device)), patches.right(V.to(device)), patches.squares(x.dtype)) for _ in range(2)]
    for first, again, wanted in zip(*runs, exact, strict=True):
        assert torch.equal(first, again)
        assert (first.cpu().double() - wanted).norm() <= 2e-5 * wanted.norm()


@pytest.mark.parametrize("name", ["1, circular", "2, stride", "3"])
def test_an_empty_batch_has_no_rows(name: str) -> None:
    conv, x = layer(name)
    patches, d_in = Patches(x[:0], convolution(conv)), conv.weight[0].numel()
    assert patches.rows(x.dtype).shape == (0, d_in)
    assert torch.equal(patches.left(x.new_zeros(0, 4)), x.new_zeros(4, d_in))
    assert patches.right(x.new_zeros(2, d_in)).shape == (0, 2)
    assert torch.equal(patches.squares(x.dtype), x.new_zeros(d_in))


def test_what_is_no_product_of_patches_is_named() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)

    class Padded(nn.Conv2d):
        def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(F.pad(x, (1, 0, 1, 0)), weight, bias)

    A, B = nn.Conv2d(3, 2, 3), nn.Conv2d(2, 4, 1)
    assert reading(A, B) == convolution(A)
    for wrong, reason in (
        ((Standardised(3, 2, 3), B), "Standardised has a forward of its own"),
        ((Padded(3, 2, 3), B), "Padded has a forward of its own"),
        ((A, nn.Conv2d(2, 4, 1, stride=2)), "its lora_B has kernel (1, 1), stride (2, 2)"),
        ((A, nn.Conv2d(2, 4, 3, padding=1)), "its lora_B has kernel (3, 3)"),
        ((A, nn.Conv1d(2, 4, 1)), "its lora_B has kernel (1,)"),
        ((nn.ConvTranspose2d(3, 2, 3), B), "neither linear layers nor convolutions"),
        ((nn.Linear(3, 2), B), "neither linear layers nor convolutions"),
    ):
        found = reading(*wrong)
        assert isinstance(found, str) and reason in found
    with pytest.raises(TypeError, match="expected a Conv1d, Conv2d or Conv3d, got Linear"):
        convolution(nn.Linear(2, 2))
