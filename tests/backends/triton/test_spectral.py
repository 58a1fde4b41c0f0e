"""The spectral step's kernels against float64: their Grams and products one by one, whole updates, and exact no-ops."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from models import data, factors, mse, peft_mlp, train
from problems import make_problem
from torch import Tensor, nn

from psilora import PSILoRA
from psilora.adapters import LoRAPair
from psilora.backends.triton import backend as triton_backend
from psilora.backends.triton.joint import JointRun, narrow
from psilora.steps.problem import Problem, Scales
from psilora.steps.spectral.reference import spectral_updates

pytestmark = pytest.mark.skipif(
    triton_backend.unavailable_reason() is not None, reason=str(triton_backend.unavailable_reason())
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64

#: As for the gradient step: twice the error of the fp32 reference, plus a floor for one that happens to be exact. Both
#: round the same tall products, from coefficients that agree to float64.
FACTOR, FLOOR = 2.0, 2e-6


def spectral_problem(
    shape: tuple[int, int, int], *, dtype: torch.dtype = FP32, gradient_dtype: torch.dtype = FP32,
    outlier: bool = False, silent: bool = False, **settings: Any,
) -> Problem:  # fmt: skip
    """A pair in the middle of training: `.grad` of 4·r random rows, a momentum of rank 2r (r apart) and a metric."""
    problem = make_problem(
        shape,
        dtype=dtype,
        rows=(4 * shape[2],),
        device=DEVICE,
        **{"step": "spectral", "gradient": "tangent", "momentum": 0.9, **settings},
    )
    problem.exact, problem.record = False, None
    problem.dA, problem.dB = problem.dA.to(gradient_dtype), problem.dB.to(gradient_dtype)
    if problem.options.momentum > 0:
        rank = 2 * shape[2] if problem.options.joint else shape[2]
        problem.state_B["momentum"] = torch.randn(shape[0], rank, device=DEVICE) / shape[0] ** 0.5
        problem.state_A["momentum"] = torch.randn(rank, shape[1], device=DEVICE) * problem.dB.float().norm()
    if silent:  # channels without a gradient, as behind a ReLU
        for gradient, state in ((problem.dA.mT, problem.state_A), (problem.dB, problem.state_B)):
            gradient[::3] = 0
            if problem.options.metric_beta > 0:
                state["metric"][::3] = 0
    if problem.options.follows:  # three steps so far, whose gradients fell: the next is not a full one either
        norm = float(problem.dB.float().norm() / problem.pair.A.float().norm())
        norm *= 0.02 if outlier else 1.0
        problem.state_B["norms"] = torch.tensor([3.0, 0.2 * norm, 5 * norm], dtype=FP64, device=DEVICE)
    return problem


def in_float64(problem: Problem) -> Problem:
    """The same problem in float64, with the ridge of the original."""
    pair = problem.pair
    twin = LoRAPair(pair.name, nn.Parameter(pair.lora_A.double()), nn.Parameter(pair.lora_B.double()), pair.owner)
    states = [{k: v.double() for k, v in state.items()} for state in (problem.state_A, problem.state_B)]
    dA, dB = (t.double() for t in (problem.dA, problem.dB))
    return Problem(twin, problem.options, dA, dB, None, False, *states)


def error(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm().clamp_min(1e-30))


CASES: list[Any] = [
    ([(40, 33, 5), (96, 150, 5)], {}),
    ([(40, 33, 5), (96, 150, 5)], {"metric": "lora"}),
    ([(40, 70, 4), (30, 20, 8), (30, 41, 8)], {"metric": "lora", "metric_power": 0.7, "weight_decay": 0.1}),
    ([(33, 17, 1)], {"num_iters": 2, "first": "B", "dampening": 0.5}),
    ([(64, 80, 20)], {"metric": "lora", "num_iters": 0, "nesterov": False, "maximize": True}),
    ([(24, 40, 6)], {"momentum": 0.0}),
    ([(24, 40, 6)], {"fade": False, "cap": None}),
    ([(24, 40, 6), (192, 64, 8), (11, 30, 8)], {"metric": "lora", "silent": True}),
    ([(24, 40, 6), (11, 30, 8)], {"metric": "lora", "silent": True, "metric_beta": 0.0}),
    ([(24, 40, 6)], {"fade": False, "metric": "lora"}),
    ([(24, 40, 6)], {"cap": 1.0, "outlier": True}),
    ([(24, 40, 6), (40, 33, 6)], {"cap": 1.0, "outlier": True, "metric": "lora"}),
    ([(24, 40, 6), (40, 24, 6)], {"depth_scale": 0.3}),
    ([(24, 40, 6)], {"momentum": 0.0, "metric": "lora"}),
    ([(24, 40, 6)], {"dtype": BF16, "prox": 1e-4}),
    ([(24, 40, 6)], {"dtype": BF16, "gradient_dtype": BF16, "metric": "lora", "prox": 1e-4}),
    ([(70, 68, 17)], {"metric": "lora", "first": "B", "weight_decay": 0.1}),
    # Sides of fewer than 2r columns, and one of 2r, where it matters what Grams of rows are off by.
    ([(24, 40, 8), (11, 30, 8), (30, 10, 8), (16, 30, 8)], {"metric": "lora"}),
    # Widths and ranks that need no masks, in one piece of the Gram matrix and in several.
    ([(64, 640, 8), (192, 64, 8)], {"metric": "lora"}),
    ([(128, 64, 16)], {"metric": "lora", "dtype": BF16}),
    ([(64, 320, 32)], {"metric": "lora"}),
    pytest.param([(70, 68, 33)], {"metric": "lora"}, marks=pytest.mark.gpu),
    ([(40, 33, 5), (96, 150, 5), (30, 41, 8)], {"joint": False}),
    ([(33, 17, 1), (17, 90, 1)], {"joint": False, "nesterov": False, "dampening": 0.5, "weight_decay": 0.1}),
    ([(70, 68, 33)], {"joint": False, "maximize": True}),
    ([(24, 40, 6), (40, 24, 6)], {"joint": False, "momentum": 0.0}),
    ([(24, 40, 6)], {"joint": False, "dtype": BF16, "gradient_dtype": BF16, "prox": 1e-4}),
    pytest.param([(300, 500, 70), (272, 300, 128)], {"metric": "lora"}, marks=pytest.mark.gpu),
    pytest.param([(300, 500, 70), (128, 200, 128)], {"joint": False}, marks=pytest.mark.gpu),
]


@pytest.mark.parametrize(("shapes", "settings"), CASES, ids=str)
def test_updates_agree_with_the_float64_reference(shapes: list[tuple[int, int, int]], settings: dict[str, Any]) -> None:
    problems = [spectral_problem(shape, **settings) for shape in shapes]
    scales = Scales(clip=torch.tensor(0.25, device=DEVICE))
    exact = [spectral_updates([[in_float64(p)]], scales)[0] for p in problems]
    plain = [spectral_updates([[p]], scales)[0] for p in problems]
    old = [(p.pair.lora_A.detach().double().clone(), p.pair.lora_B.detach().double().clone()) for p in problems]
    executions = triton_backend.compute(problems, scales)
    ours = {id(p): step for e in executions for p, step in zip(e.problems, e.increments(), strict=True)}
    together = {(p.pair.rank, narrow(p)) for p in problems}
    assert len(executions) == len(together), "layers of one rank share their launches, but for narrow ones"
    for execution in executions:
        assert int(execution.repaired) == 0
        execution.commit(torch.ones((), dtype=torch.bool, device=DEVICE), None)
    for problem, want, usual, (A, B) in zip(problems, exact, plain, old, strict=True):
        step_B, step_A = ours[id(problem)]
        found = {"B": (step_B, usual.step_B[0], want.step_B[0]), "A": (step_A, usual.step_A[0], want.step_A[0])}
        for side, state in (("B", problem.state_B), ("A", problem.state_A)):
            for name in ("momentum", "metric"):
                new = [getattr(update, f"{name}_{side}") for update in (usual, want)]
                if new[1] is not None:
                    found[f"{name} {side}"] = (state[name], new[0][0], new[1][0])
            assert float(state["step"]) == 4
        if want.norms is not None:
            found["norms"] = (problem.state_B["norms"], usual.norms[0], want.norms[0])
            assert float(want.norms[0, 1]) < (1 - problem.options.momentum**4) * float(want.norms[0, 2]), "it fades"
        for what, (got, reference, oracle) in found.items():
            allowed = FACTOR * error(reference, oracle) + FLOOR
            assert error(got, oracle) <= allowed, f"{what}: {error(got, oracle):.1e}, allowed {allowed:.1e}"
        if problem.pair.lora_A.dtype == FP32:
            assert error(problem.pair.lora_A.detach() - A, want.step_A[0]) < 1e-3
            assert error(problem.pair.lora_B.detach() - B, want.step_B[0]) < 1e-3


@pytest.mark.parametrize("exponent", [-116, -121, -124])
def test_what_is_left_of_a_gradient_near_the_least_numbers_still_sets_the_step(exponent: int) -> None:
    """Momentum runs out through this range where a layer's gradient stays 0 and nothing fades."""
    problem = spectral_problem((96, 150, 8), metric="lora", fade=False, cap=None)
    factor = 2.0**exponent / float(max(problem.dA.abs().max(), problem.dB.abs().max()))
    shrunk = [problem.dA, problem.dB, problem.state_A["momentum"][:8], problem.state_B["momentum"][:, 8:]]
    for tensor in (*shrunk, problem.state_A["metric"], problem.state_B["metric"]):
        tensor.mul_(factor)
    want = spectral_updates([[in_float64(problem)]], Scales())[0]
    (execution,) = triton_backend.compute([problem], Scales())
    (step_B, step_A) = execution.increments()[0]
    assert error(step_B, want.step_B[0]) < 0.05
    assert error(step_A, want.step_A[0]) < 0.05


def model_and_batches() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    batches = [data(9, 24, 6, FP32) for _ in range(2)]
    return peft_mlp(dtype=FP32, r=4).to(DEVICE), [(x.to(DEVICE), y.to(DEVICE)) for x, y in batches]


def values(model: nn.Module) -> list[Tensor]:
    return list(factors(model).values())


@pytest.mark.parametrize("kind", [{}, {"metric": "lora", "controller": "slope"}, {"joint": False}], ids=str)
def test_training_from_zero_agrees_with_the_reference_and_repeats_bitwise(kind: dict[str, Any]) -> None:
    """From B = 0, where half of the step is missing, over several steps."""
    model, batches = model_and_batches()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    runs = []
    for backend in ("triton", "triton", "reference"):
        copied = copy.deepcopy(model)
        train(copied, PSILoRA(copied, 0.05, step="spectral", backend=backend, **kind), batches)
        runs.append(values(copied))
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    for got, want, start in zip(runs[0], runs[2], values(model), strict=True):
        assert not torch.equal(got, start)
        assert float((got - want).norm()) <= 1e-3 * float((want - start).norm())


@pytest.mark.parametrize("cause", ["lr", "gradient"])
@pytest.mark.parametrize("joint", [True, False])
def test_nothing_moves_without_a_rate_or_a_gradient(cause: str, joint: bool) -> None:
    model, batches = model_and_batches()
    optimizer = PSILoRA(model, 0.0 if cause == "lr" else 0.1, step="spectral", backend="triton", joint=joint)
    before = values(model)
    for batch in batches:
        optimizer.zero_grad()
        (mse(model, batch) * (1.0 if cause == "lr" else 0.0)).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, values(model), strict=True))


@pytest.mark.parametrize("joint", [True, False])
def test_a_non_finite_gradient_changes_nothing(joint: bool) -> None:
    model, batches = model_and_batches()
    optimizer = PSILoRA(model, 0.1, step="spectral", backend="triton", joint=joint)
    train(model, optimizer, batches[:1])
    before = values(model) + [v.clone() for s in optimizer.state.values() for v in s.values()]
    optimizer.zero_grad()
    (mse(model, batches[1]) * float("nan")).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step()
    after = values(model) + [v for s in optimizer.state.values() for v in s.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert optimizer.stats()["skipped_steps"] == 1


@pytest.mark.parametrize("settings", [{"metric": "lora"}, {"joint": False}], ids=str)
def test_nothing_is_read_before_it_is_written(settings: dict[str, Any]) -> None:
    problems = [spectral_problem((24, 40, 6), **settings), spectral_problem((40, 20, 6), **settings)]
    backends: triton_backend.Backends = {}
    (execution,) = triton_backend.compute(problems, Scales(), backends)
    before = [step.clone() for pair in execution.increments() for step in pair]
    run = execution._run
    if isinstance(run, JointRun):
        held = [run.partials, run.partials_alone, run.sums, run.small, run.gram, run.roots, run.traces, run.seen]
        held += [run.coefficients, run.polar[:, :3], *run.fresh[0], *run.fresh[1]]
    else:
        held = [*run.steps[0], *run.steps[1], *run.rows[0], *run.rows[1], run.partials, run.sums[:-1]]
    for tensor in held:
        tensor.fill_(float("nan"))
    (execution,) = triton_backend.compute(problems, Scales(), backends)
    assert execution._run is run
    after = [step for pair in execution.increments() for step in pair]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
