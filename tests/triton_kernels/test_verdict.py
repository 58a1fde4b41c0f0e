"""`verdict` and its norms against their references: flags, repairs and shifts of any number of layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from psilora.triton_kernels import _compat

if not _compat.available():
    pytest.skip(_compat.unavailable_reason() or "", allow_module_level=True)

from psilora.triton_kernels import layout
from psilora.triton_kernels.slots import LARGEST_SHIFT
from psilora.triton_kernels.split import TRITON_DTYPES
from psilora.triton_kernels.verdict import norms, verdict, verdict_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not _compat.interpreted(), reason="needs TRITON_INTERPRET=1 or CUDA"
)


def found(
    flags: Tensor, info: Tensor, busy: Tensor, squares: Tensor, steps: Tensor, *, balance: bool, burn_in: int
) -> tuple[bool, int, Tensor]:
    """What the kernel finds where each layer has one tile of A and, after those, four of B, three of which are 0."""
    layers = len(flags)
    addresses = torch.zeros(layers, int(layout.ADDRESSES.value), dtype=torch.int64)
    addresses[:, int(layout.COUNT.value)] = torch.tensor([t.data_ptr() for t in steps.unbind()])
    sums = torch.cat([squares[0], torch.nn.functional.pad(squares[1][:, None], (2, 1)).flatten()])
    ranges = [[(i, 1) for i in range(layers)], [(layers + 4 * i, 4) for i in range(layers)]]
    parts = [torch.tensor(side, dtype=torch.int32, device=DEVICE) for side in ranges]
    refused = torch.full((), True, device=DEVICE)
    repaired = torch.full((), -7, dtype=torch.int64, device=DEVICE)
    shifts = torch.full((layers,), 99, dtype=torch.int32, device=DEVICE)
    verdict(
        addresses.to(DEVICE), flags, info, busy, sums, parts, refused, repaired, shifts, longest=4,
        balance=balance, burn_in=burn_in, largest=LARGEST_SHIFT,
    )  # fmt: skip
    return bool(refused), int(repaired), shifts


@pytest.mark.parametrize("layers", [1, 127, 128, 300])
@pytest.mark.parametrize("turns", [1, 4])
def test_it_agrees_with_the_reference(layers: int, turns: int) -> None:
    """Squares over much of float64's range, with zeros, infinities and NaN, and ratios at every threshold."""
    squares = torch.exp2(torch.randint(-80, 80, (2, layers)).double()).to(DEVICE)
    squares *= torch.rand(2, layers, dtype=torch.float64, device=DEVICE).round()
    special = torch.tensor([0.0, 1.0, 256.0, 1 / 256, float("inf"), float("nan"), 1e100, 1e-100], dtype=torch.float64)
    squares[0, : len(special)], squares[1, ::3] = special[:layers].to(DEVICE), 1.0
    info, busy = (torch.randint(0, 2, (turns, 2, layers), dtype=torch.int32, device=DEVICE) for _ in range(2))
    steps = torch.randint(0, 4, (layers,), device=DEVICE).float()
    flags = torch.zeros(layers, dtype=torch.int32, device=DEVICE)
    for flag in (0, 1):
        flags[layers // 2] = flag
        refused, repaired, shifts = found(flags, info, busy, squares, steps, balance=True, burn_in=2)
        want = verdict_ref(flags, info, busy, squares, steps, burn_in=2, largest=LARGEST_SHIFT)
        assert (refused, repaired) == want[:2] and refused == bool(flag)
        assert torch.equal(shifts, want[2])
    if layers > 100:
        assert bool((shifts > 0).any()) and bool((shifts < 0).any()) and int(shifts.abs().max()) == 14


def test_without_balance_no_shift_is_written() -> None:
    ones = torch.ones(3, dtype=torch.int32, device=DEVICE)
    turns = torch.ones(2, 2, 3, dtype=torch.int32, device=DEVICE)
    squares = torch.full((2, 3), float("nan"), dtype=torch.float64, device=DEVICE)
    refused, repaired, shifts = found(ones, turns, turns, squares, ones.float(), balance=False, burn_in=0)
    assert refused and repaired == 12 and bool((shifts == 99).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_squares_of_factors_by_tile(dtype: torch.dtype) -> None:
    """Of odd layers of mixed ranks, cut anywhere; entries whose squares leave fp32's range."""
    shapes = [(40, 33, 5), (129, 300, 1), (7, 64, 20)]
    scale = 1e30 if dtype == torch.float32 else 1.0
    pairs = [
        ((torch.randn(r, d_in, device=DEVICE) * scale).to(dtype), torch.randn(d_out, r, device=DEVICE).to(dtype))
        for d_out, d_in, r in shapes
    ]
    addresses = torch.zeros(3, int(layout.ADDRESSES.value), dtype=torch.int64)
    for side in (0, 1):
        addresses[:, int(layout.PARAM.value) + side] = torch.tensor([pair[side].data_ptr() for pair in pairs])
    dims = torch.tensor([(r, 0, d_in, d_out) for d_out, d_in, r in shapes], dtype=torch.int32, device=DEVICE)
    tiles = [
        (side, i, start, min(start + 50, shape[1 - side]))
        for side in (0, 1)
        for i, shape in enumerate(shapes)
        for start in range(0, shape[1 - side], 50)
    ]
    sums = torch.full((len(tiles) + 1,), float("nan"), dtype=torch.float64, device=DEVICE)
    kind = TRITON_DTYPES[dtype]
    table = torch.tensor(tiles, dtype=torch.int32, device=DEVICE)
    norms(addresses.to(DEVICE), dims, table, sums, A_TYPE=kind, B_TYPE=kind)
    for got, (side, i, start, end) in zip(sums, tiles, strict=False):
        part = pairs[i][side][start:end] if side else pairs[i][side][:, start:end]
        torch.testing.assert_close(got, part.double().square().sum(), rtol=1e-12, atol=0.0)
    assert bool(sums[-1].isnan())
