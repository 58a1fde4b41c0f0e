"""Products and factorisations of numbers that are sums of two fp32, against float64, by each way of computing them."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from psilora.triton_kernels import _compat

if _compat.unavailable_reason() is not None:
    pytest.skip(str(_compat.unavailable_reason()), allow_module_level=True)

from psilora.triton_kernels._compat import tl, triton
from psilora.triton_kernels.twofold import eliminate_at, invert_factor_at, product

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not _compat.interpreted(), reason="needs TRITON_INTERPRET=1 or CUDA"
)
FP64 = torch.float64

#: Ways to sum: twofold in loops, float64 in pieces, and, what only the interpreter does, float64 at once.
WAYS: list[Any] = [
    pytest.param({"DOUBLE": False, "AT_ONCE": False}, id="twofold"),
    pytest.param({"DOUBLE": True, "AT_ONCE": False}, id="double"),
]
if _compat.INTERPRET.value:
    WAYS.append(pytest.param({"DOUBLE": False, "AT_ONCE": True}, id="at_once"))
#: Of Σ |x|·|y|, in twofold numbers: k + 2 operations on 48 bits.
UNIT = 2.0**-47


def planes(value: Tensor) -> Tensor:
    """Float64 (m, n) as hi and lo, (2, m, n) fp32."""
    hi = value.float()
    return torch.stack([hi, (value - hi.double()).float()]).to(DEVICE)


def total(value: Tensor) -> Tensor:
    return value[0].double().cpu() + value[1].double().cpu()


def wide(rows: int, columns: int) -> Tensor:
    """Entries of 48 bits whose sizes spread over twelve powers of ten."""
    x = torch.randn(rows, columns, dtype=FP64) * 10 ** (12 * torch.rand(rows, columns, dtype=FP64) - 6)
    return total(planes(x))


@triton.jit
def _product_kernel(
    out_ptr, x_ptr, y_ptr, sign, x_row, x_step, y_step, y_column, rows: tl.constexpr, size: tl.constexpr,
    N: tl.constexpr, ADD: tl.constexpr, DOUBLE: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    product(
        out_ptr, rows * N, N, x_ptr, rows * size, x_row, x_step, y_ptr, size * N, y_step, y_column, rows, size, sign, N,
        ADD, DOUBLE, AT_ONCE,
    )  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("rows", "size", "columns"), [(8, 8, 8), (32, 16, 8), (64, 32, 16), (128, 64, 64)], ids=str)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_are_off_by_twofold_rounding(
    way: dict[str, bool], rows: int, size: int, columns: int, add: bool, transposed: bool
) -> None:
    x, y, start = wide(rows, size), wide(size, columns), wide(rows, columns)
    out = planes(start) if add else torch.full((2, rows, columns), float("nan"), device=DEVICE)
    left, right = (planes(t.mT.contiguous() if transposed else t) for t in (x, y))
    strides = (1, rows, 1, size) if transposed else (size, 1, columns, 1)
    _product_kernel[(1,)](
        out, left, right, -1.0, *strides, rows=rows, size=size, N=columns, ADD=add, **way, enable_fp_fusion=False
    )
    exact = -(x @ y) + (start if add else 0)
    sizes = x.abs() @ y.abs() + (start.abs() if add else 0)
    assert float(((total(out) - exact).abs() / sizes).max()) <= (size + 2) * UNIT
    # One rounding to fp32 anywhere on the way would be seen.
    single = -(x.float() @ y.float()).double() + (start if add else 0)
    assert float(((single - exact).abs() / sizes).max()) > 100 * (size + 2) * UNIT


@triton.jit
def _factor_kernel(
    matrix_ptr, work_ptr, good_ptr, SIZE: tl.constexpr, DOUBLE: tl.constexpr, HALVES: tl.constexpr,
    LOOPS: tl.constexpr,
):  # fmt: skip
    if HALVES:
        good = invert_factor_at(matrix_ptr, SIZE * SIZE, work_ptr, SIZE * SIZE, SIZE, DOUBLE)
    else:
        good = eliminate_at(matrix_ptr, SIZE * SIZE, SIZE, SIZE, DOUBLE, LOOPS)
    tl.store(good_ptr, good)


def inverse_factor(gram: Tensor, double: bool, halves: bool = False) -> tuple[Tensor, int]:
    """L⁻¹ by a kernel, and whether every pivot was good."""
    size = gram.shape[0]
    matrix, work = planes(gram), torch.full((2, size, size), float("nan"), device=DEVICE)
    good = torch.full((), -1, dtype=torch.int32, device=DEVICE)
    _factor_kernel[(1,)](
        matrix, work, good, SIZE=size, DOUBLE=double, HALVES=halves, LOOPS=True, num_warps=8, enable_fp_fusion=False
    )
    return total(matrix), int(good)


def system(size: int, condition: float) -> Tensor:
    basis = torch.linalg.qr(torch.randn(size, size, dtype=FP64))[0]
    values = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), size, dtype=FP64)
    return total(planes((basis * values) @ basis.mT))


@pytest.mark.parametrize("double", [False, True], ids=["twofold", "double"])
@pytest.mark.parametrize("size", [8, 16, 32])
@pytest.mark.parametrize("condition", [1e2, 1e8])
def test_elimination_leaves_a_twofold_residual(double: bool, size: int, condition: float) -> None:
    gram = system(size, condition)
    inverse, good = inverse_factor(gram, double)
    assert good == 1
    assert not bool(inverse.triu(1).any())
    # L⁻¹·G·L⁻ᵀ = I up to condition times the rounding, which in fp32 would be 1e-7 and nothing left at 1e8.
    rest = float((inverse @ gram @ inverse.mT - torch.eye(size, dtype=FP64)).abs().max())
    assert rest <= 4 * size * condition * UNIT


def test_halves_of_a_large_system_are_joined() -> None:
    gram = system(128, 1e6)
    inverse, good = inverse_factor(gram, True, halves=True)
    exact = torch.linalg.inv(torch.linalg.cholesky(gram))
    assert good == 1 and not bool(inverse.triu(1).any())
    assert float((inverse - exact).norm() / exact.norm()) <= 1e6 * 128 * UNIT


@pytest.mark.parametrize("double", [False, True], ids=["twofold", "double"])
@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_pivot_that_is_not_positive_and_finite_is_told(double: bool, bad: float) -> None:
    gram = torch.eye(16, dtype=FP64)
    gram[5, 5] = bad
    assert inverse_factor(gram, double)[1] == 0
