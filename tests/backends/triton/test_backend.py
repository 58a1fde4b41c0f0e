"""The Triton backend against the float64 oracle: every kind of step, and what must hold bitwise."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from covering import pairwise
from models import bare, data, factors, mse, peft_mlp, plain_mlp, train
from problems import in_float64, make_problem
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from psilora import LoRALinear
from psilora.backends import dispatch
from psilora.backends.triton import backend as triton_backend
from psilora.steps.gradient.reference import reference_update
from psilora.steps.problem import Problem, Scales

pytestmark = pytest.mark.skipif(
    triton_backend.unavailable_reason() is not None, reason=str(triton_backend.unavailable_reason())
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

#: The kernels' error may be twice that of the reference in fp32. Both are a few roundings of products of three factors;
#: the floor keeps a reference that happens to be exact from failing them.
FACTOR, FLOOR = 2.0, 2e-6


def steps(execution: triton_backend.Execution) -> list[tuple[Tensor, Tensor]]:
    """(step of B, step of A) of every layer of an execution, as they lie in its workspaces."""
    bucket = execution._run.buckets[execution._index]
    found = []
    for i, problem in enumerate(execution.problems):
        r, root = problem.pair.rank, problem.pair.scaling**0.5
        A, B = (bucket.workspace.steps[side][i][:r] / root for side in (0, 1))
        found.append((B.mT.clone(), A.clone()))
    return found


def error(value: Tensor, exact: Tensor) -> float:
    norm = exact.norm().clamp_min(1e-30)
    return float((value.double() - exact).norm() / norm)


def check(problems: list[Problem], scales: Scales = Scales()) -> None:  # noqa: B008
    """Compare steps and new state of all problems with the oracle, next to the reference in the same dtype."""
    exact = [reference_update([in_float64(p)], scales) for p in problems]
    ours = triton_backend.compute(problems, scales)
    plain = [reference_update([p], scales) for p in problems]
    where = {id(p): (e, i) for e in ours for i, p in enumerate(e.problems)}
    repaired = sum(int(e.repaired) for e in ours)
    assert repaired == sum(int(u.repaired) for u in plain)
    errors = []
    for problem, oracle, reference in zip(problems, exact, plain, strict=True):
        execution, i = where[id(problem)]
        step_B, step_A = steps(execution)[i]
        errors.append((error(step_B, oracle.step_B[0]), error(reference.step_B[0], oracle.step_B[0]), "B"))
        errors.append((error(step_A, oracle.step_A[0]), error(reference.step_A[0], oracle.step_A[0]), "A"))
    old = [(p.pair.lora_A.detach().clone(), p.pair.lora_B.detach().clone()) for p in problems]
    for execution in ours:
        assert all(bool(torch.isfinite(t).all()) for t in execution.tensors())
        execution.commit(torch.ones((), dtype=torch.bool, device=DEVICE))
    for problem, oracle, reference, (A, B) in zip(problems, exact, plain, old, strict=True):
        execution, i = where[id(problem)]
        step_B, step_A = steps(execution)[i]
        for parameter, before, step in ((problem.pair.lora_A, A, step_A), (problem.pair.lora_B, B, step_B)):
            torch.testing.assert_close(parameter.detach(), (before.float() + step).to(before.dtype), rtol=1e-6, atol=0)
        for name in ("momentum", "metric"):
            for state, side in ((problem.state_A, "A"), (problem.state_B, "B")):
                if name in state:
                    true, theirs = (getattr(u, f"{name}_{side}")[0] for u in (oracle, reference))
                    errors.append((error(state[name], true), error(theirs, true), f"{name}_{side}"))
        assert problem.state_A["step"] == problem.state_B["step"] == 4
    for mine, theirs, name in errors:
        assert mine <= FACTOR * theirs + FLOOR, f"{name}: error {mine:.2e}, the reference's {theirs:.2e}"


CASES = pairwise(
    {
        "num_iters": [0, 1, 2, 3],
        "first": ["A", "B"],
        "momentum_rank": [None, 0, 3, 17],
        "metric": [None, "kfac", "shampoo"],
        "metric_bias_correction": [True, False],
        "gradient": ["exact", "tangent"],
        "dtype": [FP32, BF16, FP16],
        "rank": [1, 5, 16, 20, 32],
        "weight_decay": [0.0, 0.3],
        "maximize": [False, True],
        "loss_reduction": ["mean", "sum"],
        "scaling": [2.0, 0.5],
        "rows": [(24,), (7, 0, 19)],
        "scales": [False, True],
        "tensor_lr": [False, True],
        "shapes": [((67, 71),), ((80, 64), (70, 96))],
    }
)


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_a_step_of_every_kind_matches_the_oracle(case: dict[str, Any]) -> None:
    case = dict(case)
    shapes, rank, with_scales = case.pop("shapes"), case.pop("rank"), case.pop("scales")
    momentum_rank = case.pop("momentum_rank")
    if case.pop("tensor_lr"):
        case["lr"] = torch.tensor(0.05, dtype=torch.float64, device=DEVICE)
    problems = [
        make_problem(
            (*shape, rank), momentum_rank=rank if momentum_rank is None else momentum_rank, device=DEVICE, **case
        )
        for shape in shapes
    ]
    scales = Scales()
    if with_scales:
        scales = Scales(*(torch.tensor(c, dtype=torch.float64, device=DEVICE) for c in (0.7, 1.3)))
    check(problems, scales)


def test_every_pair_of_settings_is_covered() -> None:
    pairs = {(a, str(case[a]), b, str(case[b])) for case in CASES for a in case for b in case if a < b}
    assert ("first", "B", "gradient", "tangent") in pairs
    assert ("dtype", str(BF16), "num_iters", "3") in pairs
    assert len(CASES) < 40


@pytest.mark.parametrize("settings", [{}, {"num_iters": 0, "first": "B"}])
def test_nearly_square_factors_cost_no_more_than_in_the_reference(settings: dict[str, Any]) -> None:
    """At condition 1e4 one sample of rounding says nothing: the root mean square over twelve layers does."""
    problems = [make_problem((33, 48, 32), device=DEVICE, **settings) for _ in range(12)]
    (execution,) = triton_backend.compute(problems, Scales())
    pairs = []
    for problem, (step_B, step_A) in zip(problems, steps(execution), strict=True):
        exact, plain = reference_update([in_float64(problem)], Scales()), reference_update([problem], Scales())
        for ours, theirs, true in ((step_A, plain.step_A, exact.step_A), (step_B, plain.step_B, exact.step_B)):
            pairs.append((error(ours, true[0]), error(theirs[0], true[0])))
    ours_rms, theirs_rms = torch.tensor(pairs).square().mean(0).sqrt().tolist()
    assert ours_rms <= FACTOR * theirs_rms


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((70, 66, 64), {"momentum_rank": 0}),
        ((70, 80, 40), {"momentum_rank": 33, "num_iters": 0, "first": "B", "metric": "kfac"}),
        ((68, 72, 48), {"gradient": "tangent", "momentum_rank": 48}),
        ((132, 140, 128), {"momentum_rank": 0, "weight_decay": 0.2}),
        ((130, 136, 100), {"momentum_rank": 5, "dtype": BF16}),
    ],
)
def test_large_ranks(shape: tuple[int, int, int], settings: dict[str, Any]) -> None:
    check([make_problem(shape, rows=(150,), device=DEVICE, **settings)])


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((30, 40, 5), {"momentum_rank": 3}),
        ((30, 40, 5), {"momentum_rank": 5, "num_iters": 0, "first": "B"}),
        ((30, 40, 5), {"momentum_rank": 5, "metric": "kfac"}),
        ((70, 66, 64), {"momentum_rank": 33}),
        ((30, 40, 5), {"momentum_rank": 5, "gradient": "tangent"}),
    ],
)
def test_a_momentum_out_of_balance_is_balanced_as_by_the_reference(
    shape: tuple[int, int, int], settings: dict[str, Any]
) -> None:
    """A layer beyond the limit, one that stays within it, and one without a momentum yet."""
    problems = [make_problem(shape, device=DEVICE, rows=(80,), **settings) for _ in range(3)]
    for problem, scale_B, scale_A in zip(problems, (2.0**9, 2.0**3, 0.0), (2.0**-6, 1.0, 1.0), strict=True):
        problem.state_B["momentum"] *= scale_B
        problem.state_A["momentum"] *= scale_A
    unlike = [p.state_B["momentum"].norm() / p.state_A["momentum"].norm() for p in problems]
    check(problems)
    left = [p.state_B["momentum"].norm() / p.state_A["momentum"].norm() for p in problems]
    assert left[0] < 2.0**-6 * unlike[0], "t² at least 2^8"
    assert left[1] > 2.0**-6 * unlike[1]


def test_with_more_iterations_a_momentum_stays_as_far_out_of_balance_as_published() -> None:
    problem = make_problem((30, 40, 5), momentum_rank=5, num_iters=2, metric="kfac", device=DEVICE)
    problem.state_B["momentum"] *= 2.0**9
    problem.state_A["momentum"] *= 2.0**-6
    unlike = problem.state_B["momentum"].norm() / problem.state_A["momentum"].norm()
    check([problem])
    assert problem.state_B["momentum"].norm() / problem.state_A["momentum"].norm() > 2.0**-6 * unlike


def test_mixed_layers_share_a_step() -> None:
    problems = [
        make_problem((20, 24, 4), momentum_rank=4, device=DEVICE),
        make_problem((33, 17, 8), momentum_rank=3, dtype=BF16, device=DEVICE, rows=(3, 5)),
        make_problem((40, 50, 20), momentum_rank=20, device=DEVICE, rows=(64,), lr=0.01),
        make_problem((20, 24, 4), metric="kfac", num_iters=2, device=DEVICE),
        make_problem((300, 520, 4), gradient="tangent", device=DEVICE),
        make_problem((300, 520, 4), momentum_rank=2, device=DEVICE, rows=(0,)),
    ]
    check(problems)


def test_unaligned_and_strided_captures() -> None:
    problem = make_problem((36, 40, 4), momentum_rank=4, device=DEVICE)
    x, s = problem.record.chunks[0]  # type: ignore[union-attr]
    wide = torch.zeros(x.shape[0], x.shape[1] + 3, device=DEVICE)
    wide[:, 3:] = x
    turned = s.mT.contiguous().mT
    problem.record.chunks[:] = [(wide[:, 3:], turned)]  # type: ignore[union-attr]
    problem.dA = problem.dA.mT.contiguous().mT
    check([problem])


def test_many_layers_and_one_layer_agree_bitwise() -> None:
    def group(count: int) -> list[Problem]:
        torch.manual_seed(5)
        return [make_problem((12, 10, 2), rows=(3,), device=DEVICE) for _ in range(count)]

    many, few = group(12), group(1)
    together = steps(triton_backend.compute(many, Scales())[0])[0]
    alone = steps(triton_backend.compute(few, Scales())[0])[0]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("settings", [{}, {"num_iters": 2, "metric": "kfac"}, {"gradient": "tangent", "first": "B"}])
def test_repeated_runs_are_bitwise_equal(settings: dict[str, Any]) -> None:
    problems = [make_problem((200, 150, 6), momentum_rank=6, rows=(40, 9), device=DEVICE, **settings)]
    backends: triton_backend.Backends = {}
    first = steps(triton_backend.compute(problems, Scales(), backends)[0])
    (backend,) = backends.values()
    for buffers in (b.workspace for b in backend._runs.popitem()[1].buckets):
        for tensor in (*buffers.rows[0], *buffers.steps[1], buffers.stored_grams, buffers.moved_grams):
            tensor.fill_(float("nan"))
        buffers.fresh = None
    second = steps(triton_backend.compute(problems, Scales(), backends)[0])
    assert all(torch.equal(a, b) for pair in zip(first, second, strict=True) for a, b in zip(*pair, strict=True))


def snapshot(problem: Problem) -> list[Tensor]:
    tensors = [problem.pair.lora_A, problem.pair.lora_B, *problem.state_A.values(), *problem.state_B.values()]
    return [t.detach().clone() for t in tensors]


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("settings", [{"lr": 0.0}, {"zero_gradient": True}, {"zero_gradient": True, "zero_B": True}])
@pytest.mark.parametrize("gradient", ["exact", "tangent"])
def test_no_gradient_or_no_rate_changes_no_bit_of_the_parameters(
    dtype: torch.dtype, settings: dict[str, Any], gradient: str
) -> None:
    problem = make_problem((20, 24, 4), dtype=dtype, device=DEVICE, num_iters=2, gradient=gradient, **settings)
    before = snapshot(problem)
    (execution,) = triton_backend.compute([problem], Scales())
    assert int(execution.repaired) == 0
    execution.commit(torch.ones((), dtype=torch.bool, device=DEVICE))
    after = snapshot(problem)
    assert all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(before[:2], after[:2], strict=True)
    )


@pytest.mark.parametrize("where", ["x", "dA", "dB", "B"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_nonfinite_number_is_flagged_for_its_layer_and_nothing_is_written(where: str) -> None:
    problems = [make_problem((20, 24, 4), momentum_rank=4, metric="kfac", device=DEVICE) for _ in range(3)]
    bad = problems[1]
    tensors = {"x": bad.record.chunks[0][0], "dA": bad.dA, "dB": bad.dB, "B": bad.pair.lora_B}  # type: ignore[union-attr]
    with torch.no_grad():
        tensors[where][1, 1] = float("nan") if where != "dB" else float("inf")
    before = [snapshot(p) for p in problems]
    (execution,) = triton_backend.compute(problems, Scales())
    (marks,) = execution.tensors()
    assert marks.isfinite().flatten().tolist() == [True, False, True]
    execution.commit(torch.zeros((), dtype=torch.bool, device=DEVICE))
    for problem, tensors_before in zip(problems, before, strict=True):
        for a, b in zip(tensors_before, snapshot(problem), strict=True):
            assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))


def test_a_singular_system_is_repaired_and_counted_as_by_the_reference() -> None:
    problem = make_problem((20, 24, 4), prox=0.0, device=DEVICE)
    with torch.no_grad():
        problem.pair.lora_B[:, 3] = problem.pair.lora_B[:, 2]
    (execution,) = triton_backend.compute([problem], Scales())
    expected = reference_update([problem], Scales())
    assert int(execution.repaired) == int(expected.repaired) == 1
    assert all(bool(t.isfinite().all()) for t in steps(execution)[0])


@pytest.mark.parametrize("balanced", [False, True])
def test_grams_left_by_a_commit_are_used_until_a_factor_changes(
    balanced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from psilora.triton_kernels import gram as module

    launched = []
    original = module.gram
    monkeypatch.setattr(module, "gram", lambda *a, **k: (launched.append(1), original(*a, **k)))
    ok = torch.ones((), dtype=torch.bool, device=DEVICE)
    problem = make_problem((20, 24, 4), momentum_rank=4, device=DEVICE, num_iters=1 if balanced else 2)
    if balanced:
        problem.state_B["momentum"] *= 2.0**9
        problem.state_A["momentum"] *= 2.0**-9

    backends: triton_backend.Backends = {}

    def step() -> int:
        launched.clear()
        plain = reference_update([problem], Scales())
        (execution,) = triton_backend.compute([problem], Scales(), backends)
        torch.testing.assert_close(steps(execution)[0][0], plain.step_B[0], rtol=1e-4, atol=1e-6)
        execution.commit(ok)
        return len(launched)

    assert [step(), step(), step()] == [1, 0, 0]
    with torch.no_grad():
        problem.pair.lora_B.mul_(1.5)
    assert [step(), step()] == [1, 0]
    triton_backend.compute([problem], Scales(), backends)  # never committed: its products lie in the workspaces
    assert [step(), step()] == [1, 0]
    with monkeypatch.context() as capture:
        capture.setattr(triton_backend, "capturing", lambda device: True)
        assert step() == 1, "a graph without the launch would replay with the Grams of other factors"
    assert [step(), step()] == [1, 1], "a replay between two steps changes factors unnoticed"


@pytest.mark.parametrize(
    "settings", [{"metric": "kfac"}, {"gradient": "tangent"}, {"solver": "ritz"}, {"step": "spectral"}], ids=str
)
def test_what_the_kernels_keep_goes_with_the_optimizer(settings: dict[str, Any]) -> None:
    model = plain_mlp((12, 10, 8, 6), dtype=FP32).to(DEVICE)
    optimizer = bare(model, 0.1, backend="triton", **settings)
    x, y = data(9, 12, 6, FP32)
    train(model, optimizer, [(x.to(DEVICE), y.to(DEVICE))])
    optimizer.detach()
    kept = [weakref.ref(backend) for backend in optimizer._backends.values()]
    kept += [weakref.ref(t) for state in optimizer.state.values() for t in state.values()]
    assert len(kept) > 1
    del optimizer
    gc.collect()
    assert all(ref() is None for ref in kept)
    parameters = [weakref.ref(p) for p in model.parameters()]
    del model
    gc.collect()
    assert all(ref() is None for ref in parameters)


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [({}, FP32), ({}, BF16), ({"gradient": "tangent", "metric": "kfac"}, FP32), ({"step": "spectral"}, BF16)],
    ids=str,
)
def test_a_step_lets_go_of_its_gradients(settings: dict[str, Any], dtype: torch.dtype) -> None:
    model = torch.nn.Sequential(LoRALinear(torch.nn.Linear(12, 8), 4), LoRALinear(torch.nn.Linear(8, 6), 4))
    model = model.to(DEVICE, dtype)
    optimizer = bare(model, 0.1, backend="triton", **settings)
    x, y = data(9, 12, 6, dtype)
    for rows in (9, 5):  # a run for each is kept
        train(model, optimizer, [(x[:rows].to(DEVICE), y[:rows].to(DEVICE))])
    grads = [StorageWeakRef(p.grad.untyped_storage()) for p in model.parameters() if p.grad is not None]
    assert grads
    optimizer.zero_grad()
    assert all(ref.expired() for ref in grads)


def test_the_dispatch_says_what_goes_to_the_reference() -> None:
    assert triton_backend.unsupported(make_problem((20, 24, 4), device=DEVICE)) is None
    assert (
        triton_backend.unsupported(make_problem((20, 24, 4), dtype=torch.float64, device=DEVICE)) == "fp64 parameters"
    )
    assert triton_backend.unsupported(make_problem((140, 140, 129), device=DEVICE)) == "a rank above 128"
    problems = [make_problem((20, 24, 4), dtype=dtype, device=DEVICE) for dtype in (FP32, torch.float64)]
    kinds = {type(b.update).__name__ for b in dispatch.compute(problems, Scales(), "triton")}
    assert kinds == {"Execution", "Update"}
    if DEVICE == "cpu":
        assert {type(b.update).__name__ for b in dispatch.compute(problems, Scales(), "auto")} == {"Update"}


def test_an_explicit_backend_fails_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "unavailable_reason", lambda: "there is no CUDA device")
    with pytest.raises(ValueError, match="backend='triton' is not available: there is no CUDA device; use 'auto'"):
        dispatch.check_backend("triton")
    dispatch.check_backend("auto")


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_training_a_model_follows_the_reference(dtype: torch.dtype) -> None:
    model = peft_mlp(dtype=dtype).to(DEVICE)
    twin = copy.deepcopy(model)
    batches = [tuple(t.to(DEVICE) for t in data(dtype=dtype)) for _ in range(3)]
    for m, backend in ((model, "triton"), (twin, "reference")):
        optimizer = bare(m, 0.1, backend=backend, max_grad_norm=1.0)
        train(m, optimizer, batches)  # type: ignore[arg-type]
        assert optimizer.stats() == {"skipped_steps": 0, "repaired_pivots": 0}
    for name, value in factors(model).items():
        rtol = 1e-4 if dtype == FP32 else 2e-2
        torch.testing.assert_close(value, factors(twin)[name], rtol=rtol, atol=rtol * float(value.abs().max()))


def test_a_nonfinite_step_of_the_optimizer_changes_nothing_and_names_the_layer() -> None:
    model = peft_mlp(dtype=FP32).to(DEVICE)
    optimizer = bare(model, 0.1, backend="triton", nonfinite="raise")
    mse(model, data(dtype=FP32)).backward()
    bad = next(p for n, p in model.named_parameters() if "l2.lora_A" in n)
    bad.grad[0, 0] = float("nan")  # type: ignore[index]
    before = factors(model)
    with pytest.raises(RuntimeError, match="l2"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in factors(model).items())


def test_a_commit_that_does_not_compile_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what others train: AdamW steps before the commits of the layers."""
    from psilora import PSILoRA
    from psilora.triton_kernels import commit as commit_kernels

    def fails(*_: Any, **__: Any) -> None:
        raise NotImplementedError("no code for this device")

    model = torch.nn.Sequential(plain_mlp((12, 10, 8, 6), dtype=torch.float32), torch.nn.Linear(6, 6))
    optimizer = PSILoRA(model.to(DEVICE), 0.1, step="gradient", backend="triton", momentum=0.0)
    x, y = data(9, 12, 6, torch.float32)
    (model(x.to(DEVICE)) - y.to(DEVICE)).square().mean().backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with monkeypatch.context() as patched:
        patched.setattr(commit_kernels, "commit", fails)
        with pytest.raises(NotImplementedError, match="no code"):
            optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(float(state["step"]) == 0 for state in optimizer.state.values() if "step" in state)
    optimizer.step()
    assert not torch.equal(model[1].weight, before["1.weight"])


def test_steps_of_every_length_share_one_scratch() -> None:
    """No memory is asked for after the longest batch, and a shared scratch changes no bit."""
    model = torch.nn.Sequential(LoRALinear(torch.nn.Linear(40, 33), 4), LoRALinear(torch.nn.Linear(33, 16), 4))
    model = model.to(DEVICE)
    twin = copy.deepcopy(model)
    settings: dict[str, Any] = {"backend": "triton", "momentum": 0.9, "metric": "kfac"}
    ours, theirs = bare(model, 0.1, **settings), bare(twin, 0.1, **settings)
    sizes = [300, 700, 7, 650]
    batches = [tuple(t.to(DEVICE) for t in data(n, 40, 16, torch.float32)) for n in sizes]
    held = []
    for batch in batches:
        train(model, ours, [batch])
        (backend,) = ours._backends.values()
        held.append((backend._scratch.buffer.data_ptr(), backend._scratch.buffer.numel()))
        storages = {
            part.untyped_storage().data_ptr()
            for run in backend._runs.values()
            for product in filter(None, run.products)
            for part in (*product.p, *product.stz._partials)
        }
        assert storages == {backend._scratch.buffer.untyped_storage().data_ptr()}
        theirs._backends.clear()  # memory of its own for every step
        train(twin, theirs, [batch])
    assert held[0][1] < held[1][1]
    assert len(set(held[1:])) == 1
    assert all(torch.equal(t, factors(twin)[name]) for name, t in factors(model).items())


def test_a_rate_in_host_memory_is_not_copied_to_a_device() -> None:
    """A copy from pageable memory waits for the device; on "meta" it could not be told from one that does not."""
    from psilora.backends.triton.launch import device_rates

    rate = torch.tensor(0.1, dtype=torch.float64)
    calls: list[str] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(str(function))
            return function(*args, **(kwargs or {}))

    with Watch():
        rates = device_rates([rate, 0.5, rate], torch.device("meta"))
    assert rates[0] is rates[2] and rates[1] is None
    assert not any("copy" in call for call in calls), calls
    (here,) = device_rates([rate], torch.device("cpu"))
    assert here is not None and float(here) == float(rate.float())
