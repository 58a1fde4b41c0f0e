"""`squares` against float64, in the interpreter or on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tolerances import assert_accurate
from torch import Tensor

from psilora.triton_kernels import _compat

if not _compat.available():
    pytest.skip(_compat.unavailable_reason() or "", allow_module_level=True)

from psilora.triton_kernels.squares import SquaresPlan, squares, squares_ref
from psilora.triton_kernels.tables import PointerTable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Per output its columns and the numbers of rows of its calls.
OUTPUTS = [(64, [127, 1, 0, 300]), (200, [1]), (48, [0]), (77, [130, 70]), (1, [5]), (128, [1000]), (300, [33])]

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not _compat.interpreted(), reason="needs TRITON_INTERPRET=1 or CUDA"
)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def poisoned(d: int) -> Tensor:
    """A window of NaN in a longer vector of NaN."""
    return torch.full((d + 8,), float("nan"), device=DEVICE)[4 : d + 4]


def calls(outputs: Sequence[tuple[int, list[int]]], dtype: torch.dtype) -> tuple[list[Tensor], list[int]]:
    x = [random(n, d, dtype=dtype) for d, sizes in outputs for n in sizes]
    return x, [o for o, (_, sizes) in enumerate(outputs) for _ in sizes]


def assert_sums(out: Sequence[Tensor], x: Sequence[Tensor], outputs: Sequence[int]) -> None:
    exact = squares_ref(x, outputs)
    assert len(out) == len(exact)
    for o, q in enumerate(out):
        own = torch.cat([a for a, owner in zip(x, outputs, strict=True) if owner == o]).float().square().sum(0)
        assert_accurate("squares", q, own, exact[o], exact[o])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("programs", [1, 80])
def test_mixed_outputs_in_one_call(dtype: torch.dtype, programs: int) -> None:
    x, outputs = calls(OUTPUTS, dtype)
    out = [poisoned(d) for d, _ in OUTPUTS]
    plan = SquaresPlan(x, outputs, out, programs=programs)
    plan.table.upload()
    plan.launch()
    assert_sums(out, x, outputs)
    for q in out:
        whole = q._base
        assert whole is not None
        assert int(whole.isnan().sum()) == whole.numel() - q.numel()  # nothing was written outside


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_alignment(dtype: torch.dtype) -> None:
    n, d = 37, 64
    wide = random(n, d + 16, dtype=dtype)
    x = [
        wide[:, 8 : d + 8],
        wide[:, 1 : d + 1],
        random(n * (d + 3), dtype=dtype).as_strided((n, d), (d + 3, 1)),
        random(d, n, dtype=dtype).T,
        random(1, d, dtype=dtype).expand(n, d),
    ]
    assert_sums(squares(x, range(len(x))), x, range(len(x)))


def test_a_hundred_tiny_outputs() -> None:
    shapes = [(1 + 5 * i % 33, [i % 7] if i % 3 else [i % 7, 2]) for i in range(100)]
    x, outputs = calls(shapes, torch.bfloat16)
    assert_sums(squares(x, outputs, out=[poisoned(d) for d, _ in shapes]), x, outputs)


def test_runs_are_bitwise_equal_and_follow_new_addresses() -> None:
    table = PointerTable(torch.device(DEVICE))
    x, outputs = calls(OUTPUTS, torch.bfloat16)
    plan = SquaresPlan(x, outputs, [poisoned(d) for d, _ in OUTPUTS], table=table, programs=80)
    outs = [[poisoned(d) for d, _ in OUTPUTS] for _ in range(2)]
    for out in outs:
        x = [a.clone() for a in x]
        plan.bind(x, out)
        table.upload()
        plan.launch()
        assert_sums(out, x, outputs)
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


def test_nothing_to_do() -> None:
    assert squares([], []) == []
    out = [poisoned(5), poisoned(6)]
    squares([random(3, 6)], [1], out=out)
    assert not bool(out[0].any())
    assert bool((out[1] > 0).all())


def test_bf16_squares_do_not_overflow_early() -> None:
    x = torch.full((8, 16), 1e15, device=DEVICE).bfloat16()
    assert_sums(squares([x], [0]), [x], [0])


@pytest.mark.parametrize(
    ("x", "out", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(5), "has shape"),
        (torch.zeros(3, 4).double(), torch.zeros(4), "must be 16-bit or float32"),
        (torch.zeros(3, 4), torch.zeros(4).half(), "must be a contiguous float32 vector"),
        (torch.zeros(3, 4), torch.zeros(8)[::2], "must be a contiguous float32 vector"),
    ],
)
def test_bad_arguments(x: Tensor, out: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        squares([x], [0], out=[out])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("many", [False, True])
def test_large(dtype: torch.dtype, many: bool) -> None:
    shapes = [(4096, [4096]), (1024, [777, 4096]), (768, [512] * 8), (14336, [2048]), (4095, [300]), (768, [20000])]
    x, outputs = calls(shapes * 8 if many else shapes[:2], dtype)
    first = squares(x, outputs)
    assert all(torch.equal(a, b) for a, b in zip(first, squares(x, outputs), strict=True))
    assert_sums(first, x, outputs)


@pytest.mark.parametrize("programs", [1, 80])
def test_a_plan_with_room_for_more_rows(programs: int) -> None:
    """Rows beyond those of a step, which lie in the same memory here, are not counted."""
    room, outputs = [300, 40, 100], [0, 0, 1]
    wide = [random(n, d) for n, d in zip(room, (64, 64, 30), strict=True)]
    out = [poisoned(64), poisoned(30)]
    plan = SquaresPlan(wide, outputs, out, programs=programs, rows=room)
    for rows in ([300, 7, 100], [1, 40, 3], [64, 0, 33]):
        x = [a[:n] for a, n in zip(wide, rows, strict=True)]
        plan.follow([a.data_ptr() for a in x], rows)
        plan.table.upload()
        plan.launch()
        assert_sums(out, x, outputs)
