"""The launches around a solve: Grams, metric, rows, both orientations, and the commit's rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import in_float64, make_problem
from tolerances import HALF_ULP, allowed

from psilora.backends.triton import backend as triton_backend
from psilora.backends.triton.gradient.plan import CROSS, OWN, WEIGHTED
from psilora.steps.gradient.reference import reference_update
from psilora.steps.problem import Problem, Scales

if triton_backend.unavailable_reason() is not None:
    pytest.skip(str(triton_backend.unavailable_reason()), allow_module_level=True)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def bucket_of(execution: triton_backend.Execution) -> Any:
    return execution._run.buckets[execution._index]


def gram(bucket: Any, which: str, kind: int, side: int, problem: int) -> torch.Tensor:
    """The sum of a kind's partials over the tiles of a layer's side, in float64."""
    first, count = bucket.plan.parts[side][problem]
    slot = kind.bit_length() - 1
    return getattr(bucket.workspace, which)[first : first + count, slot].double().sum(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_grams(dtype: torch.dtype) -> None:
    """Kinds of the stored factors on B's side, over several tiles and layers of different rank."""
    shapes = [(300, 40, 5), (129, 36, 16)]
    problems = [make_problem(s, momentum_rank=3, dtype=dtype, device=DEVICE, scaling=3.0) for s in shapes]
    (execution,) = triton_backend.compute(problems, Scales())
    bucket = bucket_of(execution)
    assert bucket.plan.schedule.grams[1] == WEIGHTED | CROSS | OWN
    for i, problem in enumerate(problems):
        r = problem.pair.rank
        B, B_m = problem.pair.B.double() * 3.0**0.5, problem.state_B["momentum"].double()
        for kind, x, y in ((WEIGHTED, B, B), (CROSS, B, B_m), (OWN, B_m, B_m)):
            exact, magnitude = x.mT @ y, x.abs().mT @ y.abs()
            found = gram(bucket, "stored_grams", kind, 1, i)
            assert not bool(found[exact.shape[0] :].any()) and not bool(found[:, exact.shape[1] :].any())
            error = (found[: exact.shape[0], : exact.shape[1]] - exact).abs() / magnitude
            assert float(error.max()) <= allowed("gram", found.device) * HALF_ULP, (kind, r)


def test_commit_leaves_the_grams_of_the_rounded_factors() -> None:
    problem = make_problem((300, 40, 5), momentum_rank=3, dtype=torch.bfloat16, device=DEVICE)
    (execution,) = triton_backend.compute([problem], Scales())
    execution.commit(torch.ones((), dtype=torch.bool, device=DEVICE))
    B = problem.pair.B.double() * 2.0**0.5
    found = gram(bucket_of(execution), "stored_grams", WEIGHTED, 1, 0)[:5, :5]
    assert float(((found - B.mT @ B).abs() / (B.abs().mT @ B.abs())).max()) <= allowed("gram", found.device) * HALF_ULP
    rows = bucket_of(execution).workspace.rows[1][0]
    torch.testing.assert_close(rows[5:], problem.state_B["momentum"].mT, rtol=0, atol=0)
    torch.testing.assert_close(rows[:5], problem.pair.B.float().mT * torch.tensor(2.0**0.5), rtol=1e-6, atol=0)


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize(("power", "beta"), [(0.5, 0.99), (1.0, 0.0), (0.3, 0.9999)])
def test_metric(corrected: bool, power: float, beta: float) -> None:
    settings = {"metric_bias_correction": corrected, "metric_power": power, "metric_beta": beta, "damping": 1e-3}
    problem = make_problem((70, 200, 3), metric="kfac", device=DEVICE, **settings)
    exact = reference_update([in_float64(problem)], Scales())
    (execution,) = triton_backend.compute([problem], Scales())
    workspace = bucket_of(execution).workspace
    for side, D in ((0, exact.metric_A), (1, exact.metric_B)):
        assert D is not None
        torch.testing.assert_close(workspace.averages[side][0].double(), D[0], rtol=1e-6, atol=0)
        correction = 1 - beta**4 if corrected else 1.0
        M = (D[0] / correction + 1e-3) ** power
        torch.testing.assert_close(workspace.weights[side][0].double(), M, rtol=4e-6, atol=0)


def mirrored(problem: Problem) -> Problem:
    """The problem of Gᵀ: A and B, dA and dB, X and S change places."""
    from psilora.adapters import LoRAPair

    pair, record = problem.pair, problem.record
    turned = LoRAPair(
        "mirror",
        torch.nn.Parameter(pair.lora_B.detach().mT.contiguous()),
        torch.nn.Parameter(pair.lora_A.detach().mT.contiguous()),
        pair.owner,
    )
    copy = type(record)(**{**vars(record), "chunks": [(s, x) for x, s in record.chunks]})  # type: ignore[union-attr]
    options = type(problem.options)(**{**vars(problem.options), "first": "B" if problem.options.first == "A" else "A"})
    states = [
        {k: v.mT.contiguous() if v.dim() == 2 else v for k, v in state.items()}
        for state in (problem.state_B, problem.state_A)
    ]
    dA, dB = problem.dB.mT.contiguous(), problem.dA.mT.contiguous()
    return Problem(turned, options, dA, dB, copy, problem.exact, *states)


@pytest.mark.parametrize("settings", [{"num_iters": 2}, {"gradient": "tangent"}, {"num_iters": 0, "weight_decay": 0.1}])
@pytest.mark.parametrize("rank", [6, 20])
def test_both_sides_are_one_kernel(settings: dict[str, Any], rank: int) -> None:
    """A step on Gᵀ with the factors exchanged is the same step, to the last bit where no Gram is transposed."""
    problem = make_problem((70, 90, rank), momentum_rank=4, device=DEVICE, **settings)
    other = mirrored(problem)
    steps = []
    for p in (problem, other):
        (execution,) = triton_backend.compute([p], Scales())
        workspace = bucket_of(execution).workspace
        steps.append([workspace.steps[side][0].clone() for side in (0, 1)])
    for a, b in zip(steps[0], reversed(steps[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(a.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_commit_rounds_to_nearest_even(dtype: torch.dtype) -> None:
    problem = make_problem((40, 48, 4), dtype=dtype, device=DEVICE, lr=0.3)
    old = problem.pair.lora_A.detach().clone()
    (execution,) = triton_backend.compute([problem], Scales())
    step = bucket_of(execution).workspace.steps[0][0].clone()
    execution.commit(torch.ones((), dtype=torch.bool, device=DEVICE))
    expected = (old.float() + step / torch.tensor(2.0).sqrt()).to(dtype)
    assert float((problem.pair.lora_A != expected).float().mean()) < 0.01  # √s may differ in its last bit
    assert not torch.equal(problem.pair.lora_A, old)


def test_versions_advance_with_a_commit() -> None:
    problem = make_problem((40, 48, 4), momentum_rank=2, device=DEVICE)
    tensors = [problem.pair.lora_A, problem.pair.lora_B, problem.state_A["momentum"], problem.state_B["step"]]
    before = [t._version for t in tensors]
    (execution,) = triton_backend.compute([problem], Scales())
    assert [t._version for t in tensors] == before
    execution.commit(torch.ones((), dtype=torch.bool, device=DEVICE))
    assert all(t._version > v for t, v in zip(tensors, before, strict=True))
