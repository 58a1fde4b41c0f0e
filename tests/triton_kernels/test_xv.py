"""`xv` and the three-way split against float64, in the interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from tolerances import HALF_ULP, TOLERANCES, assert_accurate, error
from torch import Tensor

from psilora.triton_kernels import _compat

if not _compat.available():
    pytest.skip(_compat.unavailable_reason() or "", allow_module_level=True)

from psilora.triton_kernels._compat import tl, triton
from psilora.triton_kernels.split import _power_of_two, power_of_two_ref, split3, split3_ref
from psilora.triton_kernels.tables import PointerTable
from psilora.triton_kernels.xv import XVPlan, xv, xv_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# (N, d, k): no rows, one row, odd everything, whole blocks, more ranks than one tile holds.
SHAPES = [
    (0, 64, 4),
    (1, 48, 1),
    (127, 200, 16),
    (130, 77, 3),
    (64, 16, 33),
    (70, 128, 70),
    (5, 40, 256),
    (128, 64, 32),
]

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not _compat.interpreted(), reason="needs TRITON_INTERPRET=1 or CUDA"
)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def poisoned(n: int, k: int, margin: int = 0) -> Tensor:
    """An (n, k) window of NaN in a larger matrix of NaN."""
    return torch.full((n + 2, k + margin), float("nan"), device=DEVICE)[1 : n + 1, :k]


def assert_product(result: Tensor, x: Tensor, f: Tensor) -> None:
    magnitude = x.double().abs() @ f.double().abs().T
    assert_accurate("product", result, x.float() @ f.T, xv_ref([x], [f])[0], magnitude)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("along", ["d", "k"])
def test_mixed_shapes_in_one_call(dtype: torch.dtype, along: str) -> None:
    x = [random(n, d, dtype=dtype) for n, d, _ in SHAPES]
    f = [random(k, d) if along == "d" else random(d, k).T for _, d, k in SHAPES]
    out = [poisoned(n, k, margin=3) for n, _, k in SHAPES]
    results = xv(x, f, out=out)
    for a, b, p, result in zip(x, f, out, results, strict=True):
        assert result is p
        assert_product(p, a, b)
        whole = p._base
        assert whole is not None
        assert int(whole.isnan().sum()) == whole.numel() - p.numel()  # nothing was written outside


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_alignment_of_x(dtype: torch.dtype) -> None:
    n, d, k = 37, 64, 8
    wide = random(n, d + 16, dtype=dtype)
    x = [
        wide[:, 8 : d + 8],  # aligned rows of a wider matrix
        wide[:, 1 : d + 1],  # unaligned base
        random(n * (d + 3), dtype=dtype).as_strided((n, d), (d + 3, 1)),  # unaligned rows
        random(d, n, dtype=dtype).T,  # columns first
        random(1, d, dtype=dtype).expand(n, d),  # one row, repeated
    ]
    f = [random(k, d) for _ in x]
    for a, b, p in zip(x, f, xv(x, f, out=[poisoned(n, k) for _ in x]), strict=True):
        assert_product(p, a, b)


def test_strides_and_alignment_of_f() -> None:
    n, d, k = 40, 64, 8
    wide = random(k + 8, d + 8)
    f = [
        wide[:k, 4 : d + 4],
        wide[:k, 1 : d + 1],
        wide.T[4 : d + 4, :k].T,
        random(d, k + 1)[:, 1:].T,
        random(3, d),
        random(d, 3).T,
    ]
    x = [random(n, d, dtype=torch.bfloat16) for _ in f]
    for a, b, p in zip(x, f, xv(x, f), strict=True):
        assert_product(p, a, b)


@pytest.mark.parametrize("k", [1, 2, 15, 16, 17, 31, 64, 65, 100, 128, 255, 256])
def test_every_rank(k: int) -> None:
    x, f = random(33, 40, dtype=torch.bfloat16), random(k, 40)
    (p,) = xv([x], [f], out=[poisoned(33, k)])
    assert_product(p, x, f)


def test_calls_of_a_layer_share_its_factor() -> None:
    f = random(16, 96)
    x = [random(n, 96, dtype=torch.bfloat16) for n in (64, 1, 0, 200, 1000)]
    for a, p in zip(x, xv(x, [f] * len(x)), strict=True):
        assert_product(p, a, f)


def test_a_hundred_tiny_layers() -> None:
    shapes = [(i % 7, 1 + 5 * i % 33, 1 + i % 9) for i in range(100)]
    x = [random(n, d, dtype=torch.bfloat16) for n, d, _ in shapes]
    f = [random(k, d) for _, d, k in shapes]
    for a, b, p in zip(x, f, xv(x, f, out=[poisoned(n, k) for n, _, k in shapes]), strict=True):
        assert_product(p, a, b)


@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize("k", [16, 32, 64])
@pytest.mark.parametrize("programs", [1, 1000])
def test_every_tile_size(capability: int, k: int, programs: int) -> None:
    x, f, out = random(150, 80, dtype=torch.bfloat16), random(k, 80), poisoned(150, k)
    plan = XVPlan([x], [f], [out], capability=capability, programs=programs)
    plan.table.upload()
    plan.launch()
    assert_product(out, x, f)


def test_runs_are_bitwise_equal() -> None:
    x, f = [random(200, 136, dtype=torch.bfloat16)] * 3, [random(24, 136)] * 3
    first, second = xv(x, f), xv(x, f)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(first[0], first[2])


def test_a_plan_follows_new_addresses() -> None:
    table = PointerTable(torch.device(DEVICE))
    x, f = [random(50, 64, dtype=torch.bfloat16)], [random(8, 64)]
    out = [poisoned(50, 8)]
    plan = XVPlan(x, f, out, table=table)
    y, g, q = [random(3, 8, dtype=torch.bfloat16)], [random(2, 8)], [poisoned(3, 2)]
    other = XVPlan(y, g, q, table=table)
    for _ in range(3):
        x = [random(50, 64, dtype=torch.bfloat16)]
        plan.bind(x)
        table.upload()
        plan.launch()
        other.launch()
        assert_product(out[0], x[0], f[0])
        assert_product(q[0], y[0], g[0])


def test_a_plan_refuses_other_layouts() -> None:
    wide = random(50, 80, dtype=torch.bfloat16)
    plan = XVPlan([wide[:, :64]], [random(8, 64)], [poisoned(50, 8)])
    for other in (wide[:49, :64], wide[:, 1:65], wide[:, :64].contiguous(), wide[:, :64].float()):
        with pytest.raises(ValueError, match=r"x\[0\] is .* the plan was made for"):
            plan.bind([other])
    with pytest.raises(ValueError, match="got 2 x; the plan was made for 1"):
        plan.bind([wide[:, :64]] * 2)


def test_fp16_keeps_fp32_accuracy_at_any_scale_of_f() -> None:
    x = random(40, 96, dtype=torch.float16)
    x[0] = 60000.0
    for scale in (1e-30, 1e-12, 1.0, 1e12, 1e25):
        f = random(8, 96) * scale * torch.logspace(-3, 3, 8, device=DEVICE)[:, None]
        f[3] = 0
        assert_product(xv([x], [f])[0], x, f)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_in_its_row(dtype: torch.dtype) -> None:
    x, f = random(20, 48, dtype=dtype), random(5, 48)
    x[7, 3] = float("nan")
    (p,) = xv([x], [f])
    assert bool(p[7].isnan().all())
    assert int(p.isnan().sum()) == 5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_read_outside(dtype: torch.dtype) -> None:
    n, d, k = 70, 72, 12
    around_x = torch.full((n + 2, d + 8), float("nan"), device=DEVICE, dtype=dtype)
    around_f = torch.full((k + 2, d + 4), float("nan"), device=DEVICE)
    x, f = around_x[1 : n + 1, :d], around_f[1 : k + 1, :d]
    x.copy_(random(n, d))
    f.copy_(random(k, d))
    for a, b in ((x, f), (x[:, :71], f[:, :71]), (x[:, 1:], f[:, 1:])):
        assert_product(xv([a], [b])[0], a, b)


def test_nothing_to_do() -> None:
    assert xv([], []) == []
    (p,) = xv([random(0, 16)], [random(4, 16)])
    assert p.shape == (0, 4)
    (p,) = xv([random(6, 0)], [random(4, 0)], out=[poisoned(6, 4)])
    assert not bool(p.any())


@pytest.mark.parametrize(
    ("x", "f", "out", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(2, 5), torch.zeros(3, 2), "item 0 has shapes"),
        (torch.zeros(3, 4), torch.zeros(2, 4), torch.zeros(2, 3), "item 0 has shapes"),
        (torch.zeros(3, 4).double(), torch.zeros(2, 4), torch.zeros(3, 2), "dtype torch.float64"),
        (torch.zeros(3, 4), torch.zeros(2, 4).half(), torch.zeros(3, 2), "must be float32"),
        (torch.zeros(3, 4), torch.zeros(2, 4), torch.zeros(2, 3).T, "the inner one must be 1"),
        (torch.zeros(3, 4), torch.zeros(2, 4), torch.zeros(3, 2, device="meta"), "must be on one device"),
    ],
)
def test_bad_arguments(x: Tensor, f: Tensor, out: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        xv([x], [f], out=[out])


def test_the_tolerance_tells_two_parts_from_three() -> None:
    x, f = random(64, 256, dtype=torch.bfloat16), random(16, 256)
    hi, mid, _ = split3_ref(f)
    magnitude = x.double().abs() @ f.double().abs().T
    two_parts = x.float() @ hi.float().T + x.float() @ mid.float().T
    assert error(two_parts, xv_ref([x], [f])[0], magnitude) > TOLERANCES["product"].interpreter * HALF_ULP


@triton.jit
def _parts_kernel(x_ptr, out_ptr, size, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    hi, mid, lo = split3(tl.load(x_ptr + offs, mask=offs < size, other=0.0), DTYPE)
    tl.store(out_ptr + offs, hi.to(tl.float32), mask=offs < size)
    tl.store(out_ptr + size + offs, mid.to(tl.float32), mask=offs < size)
    tl.store(out_ptr + 2 * size + offs, lo.to(tl.float32), mask=offs < size)


@triton.jit
def _scale_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    scale, inverse = _power_of_two(tl.load(x_ptr + offs, mask=offs < size, other=0.0))
    tl.store(out_ptr + offs, scale, mask=offs < size)
    tl.store(out_ptr + size + offs, inverse, mask=offs < size)


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, tl.bfloat16), (torch.float16, tl.float16)], ids=str)
def test_split_is_the_reference_bitwise(dtype: torch.dtype, name: tl.dtype) -> None:
    ties = torch.tensor([0.0, -0.0, 1.00390625, 1.01171875, -1.00390625, 3.0e-4, 65504.0, 2.0**-24, 2.0**-30])
    x = torch.cat([ties.to(DEVICE), random(991)])
    out = torch.full((3, 1000), float("nan"), device=DEVICE)
    _parts_kernel[(1,)](x, out, 1000, name, 1024)
    for part, expected in zip(out, split3_ref(x, dtype), strict=True):
        assert torch.equal(part, expected.float())
    # fp16 alone cannot hold the small ones: its smallest step is 2**-24, and its operands are scaled first.
    kept = torch.ones_like(x, dtype=torch.bool) if dtype == torch.bfloat16 else x.abs() >= 0.5
    assert bool(((out.double().sum(0) - x).abs() <= 2.0**-24 * x.abs())[kept].all())


def test_scale_puts_the_top_below_the_largest_fp16() -> None:
    top = torch.tensor(
        [0.0, 1e-45, 1e-38, 1.2e-38, 1e-20, 0.999, 1.0, 1.5, 2.0, 1e20, 3.4e38, float("inf"), float("nan")]
    )
    top = top.to(DEVICE)
    out = torch.full((2, len(top)), float("nan"), device=DEVICE)
    _scale_kernel[(1,)](top, out, len(top), 16)
    assert torch.equal(out[0], power_of_two_ref(top))
    assert bool((out[0] * out[1] == 1).all())
    normal = top[4:11] * out[0, 4:11]
    assert bool(((normal >= 2.0**14) & (normal < 2.0**15)).all())
    assert bool((top[:4] * out[0, :4] < 2.0**15).all())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("along", ["d", "k"])
def test_large(dtype: torch.dtype, k: int, along: str) -> None:
    shapes = [(4096, 4096), (4096, 14336), (4096, 1024), (777, 4096), (4096, 4100), (2048, 4095), (20000, 768)]
    x = [random(n, d, dtype=dtype) for n, d in shapes]
    f = [random(k, d) if along == "d" else random(d, k).T for _, d in shapes]
    out = [poisoned(n, k) for n, _ in shapes]
    xv(x, f, out=out)
    again = xv(x, f)
    for a, b, p, q in zip(x, f, out, again, strict=True):
        assert torch.equal(p, q)
        assert_product(p, a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_plan_with_room_for_more_rows(dtype: torch.dtype) -> None:
    """One plan serves every number of rows up to its own; what lies beyond them is neither read nor written."""
    room, d, k = [300, 100], 48, 5
    f = [random(k, d), random(k, d)]
    out = [poisoned(n, k) for n in room]
    first = [random(300, d, dtype=dtype), random(7, d, dtype=dtype)]
    plan = XVPlan(first, f, out, rows=room)
    for rows in ([300, 7], [1, 100], [64, 0], [65, 33]):
        for p in out:
            p.fill_(float("nan"))
        x = [random(n, d, dtype=dtype) for n in rows]
        plan.follow([a.data_ptr() for a in x], rows)
        plan.table.upload()
        plan.launch()
        for a, b, p, n in zip(x, f, out, rows, strict=True):
            assert_product(p[:n], a, b)
            assert bool(p[n:].isnan().all())
    plan.bind([a[:n] for a, n in zip(first, (50, 3), strict=True)])
    with pytest.raises(ValueError, match=r"x\[1\] is \(101, 48\)"):
        plan.bind([first[0], random(101, d, dtype=dtype)])
    with pytest.raises(ValueError, match=r"must be \(N, d\), \(k, d\) and \(N, k\)"):
        XVPlan(first, f, out, rows=[300, 99])
