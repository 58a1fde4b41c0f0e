"""Gram matrices without float64: exact for rows of 24 bits of their largest entry, whatever the sizes of rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from psilora.triton_kernels import _compat, slots

if _compat.unavailable_reason() is not None:
    pytest.skip(str(_compat.unavailable_reason()), allow_module_level=True)

from psilora.triton_kernels import joint_gram, joint_layout
from psilora.triton_kernels._compat import tl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not _compat.interpreted(), reason="needs TRITON_INTERPRET=1 or CUDA"
)
FP64, INT32 = torch.float64, torch.int32


def rows(rank: int, columns: int) -> Tensor:
    """Rows of sizes from 1e-12 to 1e12, the largest entry of each anywhere, with small ones beside it."""
    x = torch.randn(rank, columns) * 10 ** (24 * torch.rand(rank, 1) - 12)
    x *= 10 ** (-6 * torch.rand(rank, columns))
    x[0, : columns // 2] = 0
    return x


def grams(A: Tensor, B: Tensor, span: int, whole: bool) -> list[Tensor]:
    """A·Aᵀ and Bᵀ·B by the kernel, tiles of at most `span` columns added up here, in float64."""
    rank = A.shape[0]
    padded = max(8, 1 << (rank - 1).bit_length())
    addresses = torch.zeros(1, slots.J_ADDRESSES, dtype=torch.int64, device=DEVICE)
    addresses[0, slots.J_FACTOR], addresses[0, slots.J_FACTOR + 1] = A.data_ptr(), B.data_ptr()
    ends = [
        (side, 0, start, min(size, start + span))
        for side, size in enumerate((A.shape[1], B.shape[0]))
        for start in range(0, size, span)
    ]
    tiles = torch.tensor(ends, dtype=INT32, device=DEVICE)
    pieces = joint_layout.pieces_table(padded, 1, torch.device(DEVICE))
    height = joint_layout.rows_of_piece(padded, 1)
    groups = -(-padded // height)
    out = torch.full((len(ends), len(pieces), 2, height, height), float("nan"), device=DEVICE)
    exponents = torch.full((len(ends), groups, height), 99, dtype=INT32, device=DEVICE)
    flags = torch.full((len(ends), groups), 99, dtype=INT32, device=DEVICE)
    empty = torch.zeros(1, device=DEVICE)
    dims = torch.tensor([[rank, 2 * rank, A.shape[1], B.shape[0]]], dtype=INT32, device=DEVICE)
    joint_gram.gram(
        addresses, empty, dims, tiles, tiles, pieces, empty, tiles, out, exponents, flags,
        padded=padded, alone=True, follows=False, whole=whole, types=(tl.float32,) * 4,
    )  # fmt: skip
    assert not bool(flags.any())
    found = [torch.zeros(groups * height, groups * height, dtype=FP64) for _ in range(2)]
    for (side, *_), part, e in zip(ends, out.cpu().double().sum(2), exponents.cpu().flatten(1).double(), strict=True):
        tile = torch.zeros(groups * height, groups * height, dtype=FP64)
        for (i, j), block in zip(pieces.tolist(), part, strict=True):
            tile[i * height : (i + 1) * height, j * height : (j + 1) * height] = block
        tile = tile.tril().nan_to_num() + tile.tril(-1).mT  # blocks above the diagonal are not written
        found[side] += tile * torch.exp2(e - 7)[:, None] * torch.exp2(e - 7)[None, :]
    return [gram[:rank, :rank] for gram in found]


def rounded(x: Tensor, span: int) -> Tensor:
    """Rows as integers of 24 bits in units of the power of two above a tile's largest entry."""
    parts = []
    for part in x.double().split(span, 1):
        _, e = torch.frexp(part.abs().amax(1, keepdim=True))
        unit = torch.exp2(e.double() - 23)
        parts.append((part / unit).round() * unit)
    return torch.cat(parts, 1)


@pytest.mark.parametrize(
    ("rank", "d_in", "d_out", "span", "whole"),
    [
        (8, 64, 192, 256, True),
        (8, 300, 130, 256, False),
        (5, 70, 33, 256, False),
        (16, 1088, 640, 2048, True),  # sums in memory twice
        (16, 1100, 530, 512, False),
        (33, 300, 70, 256, False),
        (128, 320, 64, 512, True),  # several pieces
    ],
    ids=str,
)
def test_they_are_those_of_rows_of_24_bits(rank: int, d_in: int, d_out: int, span: int, whole: bool) -> None:
    A, B = rows(rank, d_in), rows(rank, d_out).mT.contiguous()
    found = grams(A.to(DEVICE), B.to(DEVICE), span, whole)
    for x, gram in ((A, found[0]), (B.mT, found[1])):
        near = rounded(x, span)
        size = x.double().norm(dim=1).clamp_min(1e-300)
        scale = size[:, None] * size[None, :]
        # The sums are exact to 2⁻⁴⁷; the integers of the kernel may differ from the nearest by one at a tie.
        assert float(((gram - near @ near.mT).abs() / scale).max()) <= 2.0**-44
        # fp32 sums would be off by 2⁻²⁴.
        assert float((((x @ x.mT).double() - near @ near.mT).abs() / scale).max()) > 2.0**-28


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_an_entry_that_is_not_finite_is_told(bad: float) -> None:
    A, B = rows(8, 70), rows(8, 64).mT.contiguous()
    A[3, 66] = bad
    with pytest.raises(AssertionError):
        grams(A.to(DEVICE), B.to(DEVICE), 256, False)
