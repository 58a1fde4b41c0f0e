"""The plan: launches of a step for real models, from shapes alone."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from psilora.backends.triton.gradient.plan import (
    KNOWN,
    NONE,
    PRODUCT,
    TANGENT,
    Layer,
    StepPlan,
    Structure,
    columns,
    make_plan,
    schedule,
)
from psilora.backends.triton.launch import MAX_SPAN
from psilora.triton_kernels import _compat

BF16, FP32 = torch.bfloat16, torch.float32
META = torch.device("meta")


def llama(rank: int, structure: Structure, momentum_rank: int = 0, tokens: int = 4096) -> StepPlan:
    """Llama-3-8B, every linear layer: 32 blocks of q, k, v, o, gate, up and down."""
    shapes = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
    return make_plan([layer(shape, rank, structure, momentum_rank, tokens) for shape in shapes * 32])


def roberta(rank: int, structure: Structure, momentum_rank: int = 0) -> StepPlan:
    """RoBERTa-base, q and v: 24 modules."""
    return make_plan([layer((768, 768), rank, structure, momentum_rank, 32 * 128) for _ in range(24)])


def layer(shape: tuple[int, int], rank: int, structure: Structure, momentum_rank: int, tokens: int) -> Layer:
    return Layer(
        *shape, rank, momentum_rank, structure, A_dtype=FP32, B_dtype=FP32, X_dtype=BF16, S_dtype=BF16,
        device=META, rows=(tokens,),
    )  # fmt: skip


PLAIN = Structure()
MOMENTUM = Structure(momentum=True)


@pytest.mark.parametrize(("model", "rank"), [(llama, 16), (roberta, 8)])
def test_launches_of_one_iteration(model: object, rank: int) -> None:
    turns = [["factor", "solve_a"], ["factor", "solve_b"]]
    products = ["xv", "stz"]
    expected = [*turns[0], *products, *turns[1], "norms", "verdict", "commit"]
    assert model(rank, PLAIN).launches() == expected  # type: ignore[operator]
    expected = [*products, *turns[0], *products, *turns[1], "norms", "verdict", "commit"]
    assert model(rank, MOMENTUM, rank).launches() == expected  # type: ignore[operator]
    assert model(rank, MOMENTUM, rank).launches(stale=True) == ["gram", *expected]  # type: ignore[operator]


def test_launches_of_other_settings() -> None:
    def count(**settings: object) -> int:
        structure = Structure(**settings)  # type: ignore[arg-type]
        return len(llama(16, structure, 16 if structure.momentum else 0).launches())

    products, solves, end = 2, 2, 3  # xv and stz of a turn; factor and solve of a turn; norms, verdict, commit
    assert count(num_iters=2) == 4 * solves + 3 * products + end
    assert count(num_iters=0) == 2 * solves + end
    assert count(num_iters=2, momentum=True) == 4 * (solves + products) + end
    assert count(metric="kfac") == 2 * solves + products + end + 2  # squares and the weighted Grams
    assert count(exact=False) == 2 * solves + end + 1  # Grams
    assert count(exact=False, momentum=True) == 2 * solves + end + 1
    assert count(balance=False) == count() - 1  # the norms
    assert count(reuse=False) == 2 * (solves + products) + end


@pytest.mark.parametrize("rank", [16, 32, 64, 128])
def test_every_solve_has_its_factor_launch(rank: int) -> None:
    names = Counter(llama(rank, MOMENTUM, rank).launches())
    assert names.total() == 11
    assert names["factor"] == names["solve_a"] + names["solve_b"] == 2


def test_launches_do_not_depend_on_the_number_of_layers() -> None:
    one = make_plan([layer((64, 48), 4, MOMENTUM, 4, 10)])
    thousand = make_plan([layer((64 + 16 * (i % 7), 48), 1 + i % 16, MOMENTUM, 4, i % 50) for i in range(1000)])
    assert len(thousand.buckets) == 1
    assert Counter(one.launches())["solve_a"] == Counter(thousand.launches())["solve_a"] == 1


def test_buckets_share_products_turn_by_turn() -> None:
    plan = make_plan(
        [layer((64, 64), 4, PLAIN, 0, 8), layer((64, 64), 20, PLAIN, 0, 8), layer((64, 64), 4, MOMENTUM, 4, 8)]
    )
    assert len(plan.buckets) == 3
    names = Counter(plan.launches())
    assert names["solve_a"] == names["solve_b"] == names["commit"] == 3
    assert names["xv"] == 1 + 2  # padded columns of the first turn: 16; of the second: 16 and 32


@pytest.mark.parametrize("first", ["A", "B"])
def test_turns(first: str) -> None:
    second = "B" if first == "A" else "A"
    turns = schedule(Structure(num_iters=2, first=first, momentum=True), 16).turns
    assert [t.side for t in turns] == [first, second, first, second]
    assert [(t.source, t.own_source) for t in turns] == [(KNOWN, PRODUCT)] + [(PRODUCT, PRODUCT)] * 3
    assert [t.moved for t in turns] == [False, True, True, True]
    assert [t.emit for t in turns] == [True, True, True, False]
    assert [bool(t.grams) for t in turns] == [True, True, True, False]
    assert [t.check for t in turns] == [True, True, False, False]
    jacobi = schedule(Structure(num_iters=0, first=first, momentum=True, reuse=False), 16)
    assert [(t.source, t.moved, t.own_moved) for t in jacobi.turns] == [(PRODUCT, False, False), (PRODUCT, False, True)]
    assert jacobi.rows == (True, True)
    tangent = schedule(Structure(exact=False), 16).turns
    assert [(t.source, t.own_source) for t in tangent] == [(KNOWN, NONE), (TANGENT, NONE)]


def test_only_grams_without_gradient_and_metric_last() -> None:
    assert schedule(MOMENTUM, 16).lasting
    assert not schedule(Structure(metric="kfac"), 16).lasting
    assert not schedule(Structure(exact=False, momentum=True), 16).lasting


def test_columns_of_a_product() -> None:
    turns = schedule(MOMENTUM, 16).turns
    example = layer((8, 8), 4, MOMENTUM, 3, 1)
    assert [columns(turn, example) for turn in turns] == [3, 7]


@pytest.mark.parametrize("plan", [llama(16, PLAIN), roberta(8, PLAIN), llama(128, PLAIN)])
def test_tiles_cover_every_column_once(plan: StepPlan) -> None:
    for bucket in plan.buckets:
        assert bucket.programs(0) + bucket.programs(1) == len(bucket.tiles)
        for side in (0, 1):
            for i, layer_ in enumerate(bucket.layers):
                first, count = bucket.parts[side][i]
                tiles = bucket.tiles[first : first + count]
                assert all(tile[:2] == (side, i) for tile in tiles)
                edges = [0, *(tile[3] for tile in tiles)]
                assert [tile[2] for tile in tiles] == edges[:-1]
                assert edges[-1] == (layer_.d_out if side else layer_.d_in)
                assert all(0 < b - a <= MAX_SPAN for a, b in zip(edges[:-1], edges[1:], strict=True))


def test_programs_fill_a_gpu_but_do_not_repeat_prologues_needlessly() -> None:
    (bucket,) = llama(16, PLAIN).buckets
    assert all(528 <= bucket.programs(side) <= 3000 for side in (0, 1))
    (bucket,) = roberta(8, PLAIN).buckets
    assert bucket.programs(0) >= 132


def test_too_large_a_rank_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 200 is above 128"):
        make_plan([layer((256, 256), 200, PLAIN, 0, 8)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "sizes", [((13, 20), (13, 48)), ((16, 20), (16, 48)), ((13, 16), (64, 16)), ((64, 128), (64, 40))]
)
def test_products_are_counted_as_the_kernels_group_them(dtype: torch.dtype, sizes: tuple[tuple[int, int], ...]) -> None:
    """The launches of xv and stz in a plan are those that the kernels make of tensors of these shapes."""
    if _compat.unavailable_reason() is not None:
        pytest.skip(str(_compat.unavailable_reason()))
    from psilora.triton_kernels.stz import STZPlan
    from psilora.triton_kernels.xv import XVPlan

    layers = [Layer(d, d, r, 0, Structure(reuse=False), X_dtype=dtype, S_dtype=dtype, rows=(24,)) for d, r in sizes]
    names = Counter(make_plan(layers).launches())
    x = [torch.zeros(24, d, dtype=dtype) for d, _ in sizes]
    f = [torch.zeros(r, d) for d, r in sizes]
    p = [torch.zeros(24, r) for _, r in sizes]
    xv = XVPlan(x, f, p)
    stz = STZPlan(x, p, range(len(sizes)), None, shapes=sizes, reduce=False)
    turns = 2
    assert (names["xv"], names["stz"]) == (turns * len(xv._launches), turns * len(stz._launches))
