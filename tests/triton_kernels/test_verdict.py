"""`verdict` against its reference: flags, repairs and shifts of any number of layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from psilora.triton_kernels import _compat

if not _compat.available():
    pytest.skip(_compat.unavailable_reason() or "", allow_module_level=True)

from psilora.steps import gauge
from psilora.triton_kernels import layout
from psilora.triton_kernels.verdict import verdict, verdict_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not _compat.interpreted(), reason="needs TRITON_INTERPRET=1 or CUDA"
)


def found(
    flags: Tensor, info: Tensor, busy: Tensor, norms: Tensor, steps: Tensor, *, balance: bool, burn_in: int
) -> tuple[bool, int, Tensor]:
    addresses = torch.zeros(len(flags), int(layout.ADDRESSES.value), dtype=torch.int64)
    addresses[:, int(layout.COUNT.value)] = torch.tensor([t.data_ptr() for t in steps.unbind()])
    refused = torch.full((), True, device=DEVICE)
    repaired = torch.full((), -7, dtype=torch.int64, device=DEVICE)
    shifts = torch.full((len(flags),), 99, dtype=torch.int32, device=DEVICE)
    verdict(
        addresses.to(DEVICE), flags, info, busy, norms, refused, repaired, shifts, balance=balance, burn_in=burn_in,
        largest=gauge.LARGEST_SHIFT,
    )  # fmt: skip
    return bool(refused), int(repaired), shifts


@pytest.mark.parametrize("layers", [1, 127, 128, 300])
@pytest.mark.parametrize("turns", [1, 4])
def test_it_agrees_with_the_reference(layers: int, turns: int) -> None:
    """Norms over all of float64's range, with zeros, infinities and NaN, and ratios at every threshold."""
    norms = torch.exp2(torch.randint(-40, 40, (2, layers)).double()).to(DEVICE)
    norms *= torch.rand(2, layers, dtype=torch.float64, device=DEVICE).round()
    special = torch.tensor([0.0, 1.0, 16.0, 1 / 16, float("inf"), float("nan"), 1e60, 1e-60], dtype=torch.float64)
    norms[0, : len(special)], norms[1, ::3] = special[:layers].to(DEVICE), 1.0
    info, busy = (torch.randint(0, 2, (turns, 2, layers), dtype=torch.int32, device=DEVICE) for _ in range(2))
    steps = torch.randint(0, 4, (layers,), device=DEVICE).float()
    flags = torch.zeros(layers, dtype=torch.int32, device=DEVICE)
    for flag in (0, 1):
        flags[layers // 2] = flag
        refused, repaired, shifts = found(flags, info, busy, norms, steps, balance=True, burn_in=2)
        want = verdict_ref(flags, info, busy, norms, steps, burn_in=2, largest=gauge.LARGEST_SHIFT)
        assert (refused, repaired) == want[:2] and refused == bool(flag)
        assert torch.equal(shifts, want[2])
    if layers > 100:
        assert bool((shifts > 0).any()) and bool((shifts < 0).any()) and int(shifts.abs().max()) == 14


def test_without_balance_no_shift_is_written() -> None:
    ones = torch.ones(3, dtype=torch.int32, device=DEVICE)
    turns = torch.ones(2, 2, 3, dtype=torch.int32, device=DEVICE)
    norms = torch.full((2, 3), float("nan"), dtype=torch.float64, device=DEVICE)
    refused, repaired, shifts = found(ones, turns, turns, norms, ones.float(), balance=False, burn_in=0)
    assert refused and repaired == 12 and bool((shifts == 99).all())
