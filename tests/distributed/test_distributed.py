"""Several gloo processes: equal factors everywhere, and equal to one process on the joint batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from world_cases import CASES, LARGE, cases_of, one_dies, run_cases
from worlds import DIMS, RANK, Case, error, factors_of, run_world, train_alone

pytestmark = pytest.mark.distributed


World = list[dict[str, Any]]  # by rank, what `run_cases` returned
Worlds = Callable[[int], World]
both = pytest.mark.parametrize("size", [2, LARGE])


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    """Starts each world once, when it is first asked for."""
    return functools.cache(lambda size: run_world(run_cases, size, tmp_path_factory.mktemp("world")))


@pytest.mark.scenario(
    6,
    "DDP (gloo)",
    gradient="exact, dense, tangent",
    tested="several processes, no_sync, uneven and empty batches, clipping",
)
@pytest.mark.parametrize(("size", "name"), [(size, name) for size in (2, LARGE) for name in cases_of(size)])
def test_factors_are_equal_everywhere_and_those_of_the_joint_batch(worlds: Worlds, size: int, name: str) -> None:
    world = worlds(size)
    factors = [results[name]["factors"] for results in world]
    assert all(torch.equal(factors[0][key], other[key]) for other in factors[1:] for key in other)
    alone = train_alone(CASES[name], len(world))
    assert error(factors[0], alone) <= CASES[name].rounding
    assert error(factors_of(CASES[name].net()), alone) > 4e-3  # the training has gone somewhere
    assert all(not results[name]["warned"] for results in world)


@both
def test_not_a_number_in_one_process_skips_the_step_in_all(worlds: Worlds, size: int) -> None:
    world = worlds(size)
    runs = [results["poisoned"] for results in world]
    assert all(run["stats"]["skipped_steps"] == 1 for run in runs)
    assert all(torch.equal(runs[0]["factors"][key], run["factors"][key]) for run in runs for key in run["factors"])
    assert all(bool(torch.isfinite(p).all()) for p in runs[0]["factors"].values())


@both
def test_a_layer_bypassed_in_one_process_falls_back_in_all(worlds: Worlds, size: int) -> None:
    world = worlds(size)
    runs = [results["bypassed"] for results in world]
    assert all(len(run["warned"]) == 1 and "tangent gradient for l2" in run["warned"][0] for run in runs)
    assert all(torch.equal(runs[0]["factors"][key], run["factors"][key]) for run in runs for key in run["factors"])
    case = Case({"groups": [{"layers": "l2", "gradient": "tangent"}]}, steps=10)
    assert error(runs[0]["factors"], train_alone(case, len(world))) <= 1e-6


@both
def test_errors_are_raised_by_all(worlds: Worlds, size: int) -> None:
    world = worlds(size)
    for results in world:
        assert "different layers; use gradient='tangent'" in results["probes"]
        assert "no thin sum gives, for l1, l2, l3; use metric='kfac' or 'kfac-dense'" in results["refused"]["shampoo"]
        assert f"some of the {len(world)} processes have no gradient for l1, l2, l3" in results["refused"]["one-sided"]
        assert results["refused"]["unchanged"]
        first, second = results["refused"]["left over"]
        assert not first and "do not reproduce .grad, which was not reset before backward (zero_grad), for" in second


@both
def test_a_process_that_trusts_its_own_captures_is_caught_and_would_drift(worlds: Worlds, size: int) -> None:
    world = worlds(size)
    assert all(".grad was changed since backward" in results["naive"]["noticed"] for results in world)
    first, second = (results["naive"]["factors"] for results in world[:2])
    assert error(first, second) > 1e-3


@both
def test_traffic_is_thin_products_beside_the_gradients_of_adamw(worlds: Worlds, size: int) -> None:
    """K = 1, A first: the A-turn reads `.grad`; the B-turn sums r·d_out per layer, once more in the first step."""
    world = worlds(size)
    steps, layers, flags = CASES["exact"].steps, len(DIMS) - 1, 2 * 4
    gradients = 4 * RANK * (sum(DIMS[:-1]) + sum(DIMS[1:]))  # what DDP all-reduces for AdamW in a step
    products = 4 * RANK * sum(DIMS[1:])
    counts = 9 * 8 * layers
    for results in world:
        assert results["exact"]["bytes"] == steps * (products + counts + flags) + products
        assert results["exact"]["rounds"] == 3 * steps + 1
        assert products < gradients / 2
        two = results["exact, K = 2, momentum"]
        # turns: A_m | B, B_m | A, A_m | B, B_m
        turns = 4 * RANK * (3 * sum(DIMS[:-1]) + 4 * sum(DIMS[1:]))
        assert two["bytes"] == steps * (turns + counts + flags) + products
        assert two["rounds"] == (2 + 4) * steps + 1
        assert results["tangent, momentum"]["bytes"] == results["tangent, momentum"]["rounds"] == 0
        assert results["two settings"]["rounds"] == (2 + 4) * steps + 1  # all layers share the rounds


@pytest.mark.scenario(6, "DDP (gloo)", gradient="exact", tested="a process dies: the others fail with an error")
def test_the_death_of_a_process_is_an_error_in_the_others(tmp_path: Path) -> None:
    survivor, dead = run_world(one_dies, 2, tmp_path)
    assert dead is None
    assert "peer" in survivor["message"] or "Timed out" in survivor["message"], survivor["message"]
    assert survivor["seconds"] < 60  # the group's timeout
    assert survivor["unchanged"]
