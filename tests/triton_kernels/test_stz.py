"""`stz` and the sum of its partials against float64, in the interpreter or on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tolerances import assert_accurate
from torch import Tensor

from psilora.triton_kernels import _compat

if not _compat.available():
    pytest.skip(_compat.unavailable_reason() or "", allow_module_level=True)

from psilora.triton_kernels.reduce import Reduction, reduce_ref
from psilora.triton_kernels.stz import STZPlan, stz, stz_ref
from psilora.triton_kernels.tables import PointerTable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CAPABILITIES = [80, 90]  # PᵀS and SᵀP

# Per layer (d, k) and the numbers of tokens of its calls.
LAYERS = [
    ((64, 16), [127, 1, 0, 300]),
    ((200, 3), [1]),
    ((48, 33), [0]),
    ((77, 8), [130, 70]),
    ((32, 70), [64, 65]),
    ((1, 1), [5]),
    ((128, 32), [128]),
]

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not _compat.interpreted(), reason="needs TRITON_INTERPRET=1 or CUDA"
)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def poisoned(d: int, k: int) -> Tensor:
    """A (d, k) window of NaN in a larger matrix of NaN."""
    return torch.full((d + 2, k + 3), float("nan"), device=DEVICE)[1 : d + 1, :k]


def calls(
    layers: Sequence[tuple[tuple[int, int], list[int]]], dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor], list[int]]:
    s = [random(n, d, dtype=dtype) for (d, _), sizes in layers for n in sizes]
    p = [random(n, k) for (_, k), sizes in layers for n in sizes]
    return s, p, [layer for layer, (_, sizes) in enumerate(layers) for _ in sizes]


def assert_products(out: Sequence[Tensor], s: Sequence[Tensor], p: Sequence[Tensor], layers: Sequence[int]) -> None:
    exact = stz_ref(s, p, layers)
    magnitude = stz_ref([a.double().abs() for a in s], [b.abs() for b in p], layers)
    assert len(out) == len(exact)
    for layer, h in enumerate(out):
        items = [i for i, owner in enumerate(layers) if owner == layer]
        own = torch.cat([s[i] for i in items]).float().T @ torch.cat([p[i] for i in items])
        assert_accurate("product", h, own, exact[layer], magnitude[layer])


def run(plan: STZPlan) -> None:
    plan.table.upload()
    plan.launch()


def test_the_store_knows_whether_rows_of_the_result_are_contiguous() -> None:
    """Without that the lanes of a warp run along d, and every sector that they write is mostly empty."""
    s, p = [random(600, 64), random(600, 48)], [random(600, 16), random(600, 16)]
    straight, turned = [poisoned(64, 16), poisoned(48, 16)], [poisoned(64, 16), poisoned(16, 48).T]
    for out, programs, known in ((straight, 1, True), (turned, 1, False), (turned, 60, True)):
        plan = STZPlan(s, p, [0, 1], out, programs=programs)
        assert [launch.constexprs["K_INNER"] for launch in plan._launches] == [known]
        run(plan)
        assert_products(out, s, p, [0, 1])
    partial = STZPlan(s, p, [0, 1], None, shapes=[(64, 16), (48, 16)], reduce=False, programs=1)
    assert [launch.constexprs["K_INNER"] for launch in partial._launches] == [True]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("programs", [1, 60])
def test_mixed_layers_in_one_call(dtype: torch.dtype, capability: int, programs: int) -> None:
    s, p, layers = calls(LAYERS, dtype)
    out = [poisoned(d, k) if i % 2 else poisoned(k, d).T for i, ((d, k), _) in enumerate(LAYERS)]
    plan = STZPlan(s, p, layers, out, capability=capability, programs=programs)
    assert (max(plan.num_splits) > 1) == (programs == 60)
    run(plan)
    assert_products(out, s, p, layers)
    for h in out:
        whole = h._base
        assert whole is not None
        assert int(whole.isnan().sum()) == whole.numel() - h.numel()  # nothing was written outside


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_strides_and_alignment(dtype: torch.dtype, capability: int) -> None:
    n, d, k = 37, 64, 8
    wide, wide_p = random(n, d + 16, dtype=dtype), random(n, k + 8)
    s = [
        wide[:, 8 : d + 8],  # aligned rows of a wider matrix
        wide[:, 1 : d + 1],  # unaligned base
        random(n * (d + 3), dtype=dtype).as_strided((n, d), (d + 3, 1)),  # unaligned rows
        random(d, n, dtype=dtype).T,  # columns first
        random(1, d, dtype=dtype).expand(n, d),  # one row, repeated
    ]
    p = [wide_p[:, :k], wide_p[:, 4 : k + 4], wide_p[:, 1 : k + 1], random(n, k), random(1, k).expand(n, k)]
    layers = list(range(len(s)))
    out = [poisoned(d, k) for _ in s]
    run(STZPlan(s, p, layers, out, capability=capability))
    assert_products(out, s, p, layers)


@pytest.mark.parametrize("k", [1, 2, 15, 16, 17, 31, 64, 65, 100, 128, 255, 256])
def test_every_rank(k: int) -> None:
    s, p = random(70, 40, dtype=torch.bfloat16), random(70, k)
    assert_products(stz([s], [p], [0], out=[poisoned(40, k)]), [s], [p], [0])


def test_a_hundred_tiny_layers() -> None:
    shapes = [((1 + 5 * i % 33, 1 + i % 9), [i % 7] if i % 3 else [i % 7, 2]) for i in range(100)]
    s, p, layers = calls(shapes, torch.bfloat16)
    out = [poisoned(*shape) for shape, _ in shapes]
    assert_products(stz(s, p, layers, out=out), s, p, layers)


@pytest.mark.parametrize(("capability", "k"), [*((capability, 16) for capability in CAPABILITIES), (120, 32)])
def test_a_thousand_tokens_in_many_calls(capability: int, k: int) -> None:
    s, p, layers = calls([((40, k), [100] * 10), ((24, k), [1000])], torch.bfloat16)
    out = [poisoned(40, k), poisoned(24, k)]
    plan = STZPlan(s, p, layers, out, capability=capability, programs=10)
    assert plan.num_splits in ([5, 4], [5, 5])  # tokens are cut into whole blocks
    run(plan)
    assert_products(out, s, p, layers)


def test_runs_are_bitwise_equal() -> None:
    s, p, layers = calls(LAYERS, torch.bfloat16)
    outs = [[poisoned(*shape) for shape, _ in LAYERS] for _ in range(2)]
    for out in outs:
        run(STZPlan(s, p, layers, out, programs=60))
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


def test_a_consumer_can_add_the_partials() -> None:
    s, p, layers = calls(LAYERS, torch.bfloat16)
    shapes = [shape for shape, _ in LAYERS]
    plan = STZPlan(s, p, layers, None, shapes=shapes, reduce=False, programs=60)
    for layer, shape in enumerate(shapes):
        assert plan.partials(layer).shape == (plan.num_splits[layer], *shape)
        assert plan.partials(layer).data_ptr() % 16 == 0
        plan.partials(layer).fill_(float("nan"))
    run(plan)
    out = [poisoned(*shape) for shape in shapes]
    reduced = STZPlan(s, p, layers, out, programs=60)
    run(reduced)
    assert_products([plan.partials(layer).sum(0) for layer in range(len(shapes))], s, p, layers)
    for layer, h in enumerate(out):
        total = torch.zeros_like(h)
        for part in plan.partials(layer):
            total += part
        assert torch.equal(h, total)
    with pytest.raises(ValueError, match="layer 1 is not split"):
        reduced.partials(1)


def test_a_layer_without_items_becomes_zero() -> None:
    s, p = random(20, 16, dtype=torch.bfloat16), random(20, 4)
    out = [poisoned(16, 4) for _ in range(3)]
    stz([s], [p], [1], out=out)
    assert not bool(out[0].any()) and not bool(out[2].any())
    assert_products([out[1]], [s], [p], [0])
    assert stz([], [], []) == []


def test_a_plan_follows_new_addresses() -> None:
    table = PointerTable(torch.device(DEVICE))
    s, p, layers = calls(LAYERS, torch.bfloat16)
    out = [poisoned(*shape) for shape, _ in LAYERS]
    plan = STZPlan(s, p, layers, out, table=table, programs=60)
    for _ in range(2):
        s, p, _ = calls(LAYERS, torch.bfloat16)
        out = [poisoned(*shape) for shape, _ in LAYERS]
        plan.bind(s, p, out)
        table.upload()
        plan.launch()
        assert_products(out, s, p, layers)


def test_fp16_keeps_fp32_accuracy_at_any_scale_of_p() -> None:
    s = random(90, 40, dtype=torch.float16)
    s[0] = 60000.0
    for scale in (1e-30, 1e-12, 1.0, 1e12, 1e25):
        p = random(90, 8) * scale * torch.logspace(-3, 3, 8, device=DEVICE)
        p[:, 3] = 0
        for capability in CAPABILITIES:
            out = [poisoned(40, 8)]
            run(STZPlan([s], [p], [0], out, capability=capability, programs=4))
            assert_products(out, [s], [p], [0])


def test_nan_of_a_padded_column_stays_outside() -> None:
    s, wide = random(40, 32, dtype=torch.bfloat16), torch.full((41, 8), float("nan"), device=DEVICE)
    wide[:40, :5] = random(40, 5)
    assert_products(stz([s], [wide[:40, :5]], [0]), [s], [wide[:40, :5]], [0])


@pytest.mark.parametrize(
    ("s", "p", "layers", "message"),
    [
        ([torch.zeros(3, 4)], [torch.zeros(2, 5)], [0], "item 0 has shapes"),
        ([torch.zeros(3, 4).double()], [torch.zeros(3, 2)], [0], "dtype torch.float64"),
        ([torch.zeros(3, 4)] * 2, [torch.zeros(3, 2)] * 2, [1, 0], "must not decrease"),
        ([torch.zeros(3, 4), torch.zeros(3, 4).half()], [torch.zeros(3, 2)] * 2, [0, 0], "one per layer"),
        ([torch.zeros(3, 4)], [torch.zeros(2, 3).T], [0], "inner stride 1"),
        ([torch.zeros(3, 4)], [torch.zeros(3, 2)], [1], "without out it must be 0, 1, 2"),
    ],
)
def test_bad_arguments(s: list[Tensor], p: list[Tensor], layers: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stz(s, p, layers)


def test_reduce() -> None:
    table = PointerTable(torch.device(DEVICE))
    partials: list[Tensor | None] = [random(5, 40, 33), None, random(2, 1, 1), random(30, 100, 16)]
    out = [poisoned(40, 33), poisoned(2, 2), poisoned(1, 1), poisoned(16, 100).T]
    reduction = Reduction(partials, out, table)
    reduction.bind(out)
    table.upload()
    reduction.launch()
    assert bool(out[1].isnan().all())
    for part, h in zip(partials, out, strict=True):
        if part is not None:
            assert_accurate("reduce", h, part.sum(0), reduce_ref(part), part.double().abs().sum(0))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("many", [False, True])
def test_large(dtype: torch.dtype, k: int, many: bool) -> None:
    shapes = [
        ((4096, k), [4096]),
        ((1024, k), [777, 4096]),
        ((768, k), [512] * 8),
        ((4100, k), [2048]),
        ((4095, k), [300]),
    ]
    shapes = shapes * 8 if many else shapes[:2]
    s, p, layers = calls(shapes, dtype)
    out = [poisoned(*shape) for shape, _ in shapes]
    stz(s, p, layers, out=out)
    again = stz(s, p, layers)
    assert all(torch.equal(a, b) for a, b in zip(out, again, strict=True))
    assert_products(out, s, p, layers)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("programs", [1, 60])
def test_a_plan_with_room_for_more_rows(dtype: torch.dtype, programs: int) -> None:
    """One plan serves every number of rows up to its own, in one program or split; rows of P beyond are not read."""
    room, layers = [600, 40, 100], [0, 0, 1]
    shapes = [(64, 8), (64, 8), (30, 5)]
    out = [poisoned(64, 8), poisoned(30, 5)]
    between = [torch.full((n, k), float("nan"), device=DEVICE) for n, (_, k) in zip(room, shapes, strict=True)]
    s = [random(n, d, dtype=dtype) for n, (d, _) in zip(room, shapes, strict=True)]
    plan = STZPlan(s, between, layers, out, programs=programs, rows=room)
    assert (max(plan.num_splits) > 1) == (programs == 60)
    for rows in ([600, 7, 100], [1, 40, 3], [64, 0, 33]):
        s = [random(n, d, dtype=dtype) for n, (d, _) in zip(rows, shapes, strict=True)]
        p = []
        for whole, n in zip(between, rows, strict=True):
            whole.fill_(float("nan"))
            whole[:n] = torch.randn(n, whole.shape[1], device=DEVICE)
            p.append(whole[:n])
        plan.follow([a.data_ptr() for a in s], rows)
        run(plan)
        assert_products(out, s, p, layers)
