"""Under backend="auto" the kernels have to prove themselves on made-up layers before they take a step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import bare, data, factors, mse, plain_mlp, train
from problems import make_problem
from torch import Tensor

from psilora.backends import dispatch, self_check
from psilora.backends.dispatch import backend_unavailable
from psilora.backends.triton import backend as triton_backend
from psilora.steps.problem import Problem, Scales

pytestmark = pytest.mark.skipif(
    backend_unavailable("triton") is not None, reason=f"no Triton backend: {backend_unavailable('triton')}"
)
F32 = torch.float32
SPECTRAL: dict[str, Any] = {"step": "spectral", "gradient": "tangent", "momentum": 0.9, "metric": "lora"}
GRADIENT: dict[str, Any] = {"momentum_rank": 3, "metric": "kfac"}


@pytest.fixture(autouse=True)
def _auto_takes_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The interpreter's CPU stands for a GPU."""
    asked = "backend='reference'"
    monkeypatch.setattr(dispatch, "_without_kernels", lambda kind, device: asked if kind == "reference" else None)
    self_check._verdicts.clear()
    yield
    self_check._verdicts.clear()


def pair_of_models() -> tuple[torch.nn.Module, torch.nn.Module]:
    ours, theirs = plain_mlp((12, 10, 8, 6), dtype=F32), plain_mlp((12, 10, 8, 6), dtype=F32)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def example(settings: dict[str, Any], dtype: torch.dtype = F32) -> Problem:
    problem = make_problem((40, 48, 4), dtype=dtype, **settings)
    if problem.options.step == "spectral":
        problem.exact, problem.record = False, None
    return problem


def verdict(settings: dict[str, Any], dtype: torch.dtype = F32) -> tuple[bool, list[str]]:
    """What the check says of a kind, and its warnings."""
    problem = example(settings, dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        right = self_check.check(self_check.kind_of(problem), problem.options, self_check._ranks(problem))
    return right, [str(w.message) for w in caught if "kernels are not used" in str(w.message)]


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        (SPECTRAL, F32),
        ({**SPECTRAL, "metric": None, "joint": False}, torch.bfloat16),
        (GRADIENT, F32),
        ({"momentum_rank": 3}, torch.bfloat16),
        ({"gradient": "tangent", "momentum_rank": 3}, F32),
        ({"solver": "ritz"}, F32),
    ],
    ids=["spectral", "joint=False, bf16", "kfac", "bf16", "tangent", "ritz"],
)
def test_right_kernels_are_trusted(settings: dict[str, Any], dtype: torch.dtype) -> None:
    right, said = verdict(settings, dtype)
    assert right and said == []
    assert list(self_check._verdicts.values()) == [True]


def test_narrow_layers_are_of_a_kind_of_their_own() -> None:
    """Their kernels are others, and what is checked in their place are layers that are known to be well conditioned."""
    kinds = []
    for shape in ((40, 48, 4), (7, 48, 4)):
        problem = make_problem(shape, **SPECTRAL)
        problem.exact, problem.record = False, None
        kinds.append(self_check.kind_of(problem))
        assert self_check.check(kinds[-1], problem.options, self_check._ranks(problem))
    assert [kind.narrow for kind in kinds] == [False, True]
    assert "narrow" in str(kinds[1])


def a_step_times_three(monkeypatch: pytest.MonkeyPatch) -> None:
    """A's increments, in the workspace where the commit finds them."""
    after(monkeypatch, lambda execution: [step.mul_(3) for step in execution._run.increments(execution._index)[0]])


def after(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], object]) -> None:
    compute = triton_backend.Backend.compute

    def changed(self: triton_backend.Backend, problems: list[Problem], scales: Scales) -> Any:
        executions = compute(self, problems, scales)
        for execution in executions:
            change(execution)
        return executions

    monkeypatch.setattr(triton_backend.Backend, "compute", changed)


def momentum_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    compute = triton_backend.Backend.compute

    def forgetful(self: triton_backend.Backend, problems: list[Problem], scales: Scales) -> Any:
        held = [(state, state["momentum"].clone()) for p in problems for state in (p.state_A, p.state_B)]
        for state, _ in held:
            state["momentum"].zero_()
        executions = compute(self, problems, scales)
        for state, momentum in held:
            state["momentum"].copy_(momentum)
        return executions

    monkeypatch.setattr(triton_backend.Backend, "compute", forgetful)


def commit_that_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend.Execution, "commit", lambda self, ok, shifts: None)


def commit_that_cannot_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = triton_backend.Execution.commit
    monkeypatch.setattr(
        triton_backend.Execution, "commit", lambda self, ok, shifts: commit(self, torch.ones_like(ok), shifts)
    )


def commit_that_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def commit(self: triton_backend.Execution, ok: Tensor, shifts: Tensor | None) -> None:
        raise NotImplementedError("no code for this device")

    monkeypatch.setattr(triton_backend.Execution, "commit", commit)


FAULTS: list[tuple[Callable[[pytest.MonkeyPatch], None], str]] = [
    (momentum_never_read, "is off by"),
    (commit_that_does_nothing, "is off by"),
    (commit_that_cannot_refuse, "of a refused step is off by inf"),
    (commit_that_does_not_compile, "NotImplementedError: no code for this device"),
]


@pytest.mark.parametrize(
    ("settings", "fault", "reason"),
    [*((GRADIENT, *case) for case in FAULTS), *((SPECTRAL, *case) for case in FAULTS[:2])],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_planted_faults_are_found(
    settings: dict[str, Any], fault: Callable[[pytest.MonkeyPatch], None], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    right, said = verdict(settings)
    assert not right and len(said) == 1 and reason in said[0], said
    assert list(self_check._verdicts.values()) == [False]


def test_a_wrong_step_of_one_factor_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    a_step_times_three(monkeypatch)
    right, said = verdict(GRADIENT)
    assert not right and "step of A is off by 2.0e+00" in said[0]


@pytest.mark.parametrize("fault", [1.0, 1.05])
def test_a_fault_shows_beside_factors_that_are_balanced_anew(fault: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rayleigh–Ritz moves its factors far, whatever the gradient; the change of the weight is what kernels decide."""
    from psilora.backends.triton.gradient.ritz import KernelGradient

    right = KernelGradient.right
    monkeypatch.setattr(KernelGradient, "right", lambda self, A: right(self, A) * fault)
    assert verdict({"solver": "ritz"})[0] == (fault == 1.0)


def test_each_kind_is_checked_once_and_none_clears_another(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[self_check.Kind] = []
    monkeypatch.setattr(self_check, "worst_error", lambda kind, *_: checked.append(kind) or ("step of A", 0.0))
    model, _ = pair_of_models()
    train(model, bare(model, 0.1), [data(9, 12, 6, F32)] * 2)
    train(model, bare(model, 0.2), [data(9, 12, 6, F32)])
    assert len(checked) == 1, "a rate is no kind"
    train(model, bare(model, 0.1, step="spectral"), [data(9, 12, 6, F32)])
    train(model, bare(model, 0.1, momentum=0.0), [data(9, 12, 6, F32)])
    assert len(checked) == len(set(checked)) == 3


def test_wrong_kernels_give_way_to_the_reference_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "worst_error", lambda *_: ("step of A", 0.05))
    model, other = pair_of_models()
    ours, theirs = bare(model, 0.1), bare(other, 0.1, backend="reference")
    batches = [data(9, 12, 6, F32) for _ in range(2)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, ours, batches)
    found = [str(w.message) for w in caught if "the Triton kernels are not used on cpu" in str(w.message)]
    assert len(found) == 1
    assert "their step of A is off by 5.0e-02 in a step that is known" in found[0]
    train(other, theirs, batches)
    a, b = factors(model), factors(other)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_kernels_that_fail_after_their_check_give_way_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "worst_error", lambda *_: ("step of A", 0.0))

    def crash(*_: object) -> None:
        raise NotImplementedError("no code for this device")

    monkeypatch.setattr(triton_backend, "compute", crash)
    model, other = pair_of_models()
    batch = data(9, 12, 6, F32)
    with pytest.warns(UserWarning, match="no code for this device"):
        train(model, bare(model, 0.1), [batch])
    train(other, bare(other, 0.1, backend="reference"), [batch])
    assert all(torch.equal(t, factors(other)[name]) for name, t in factors(model).items())
    assert list(self_check._verdicts.values()) == [False]


def test_a_lack_of_memory_is_no_verdict_and_does_not_end_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model, other = pair_of_models()
    optimizer, batches = bare(model, 0.1), [data(9, 12, 6, F32)]
    with monkeypatch.context() as patched:
        patched.setattr(self_check, "worst_error", full)
        train(model, optimizer, batches)
    train(other, bare(other, 0.1, backend="reference"), batches)
    assert self_check._verdicts == {}
    assert all(torch.equal(t, factors(other)[name]) for name, t in factors(model).items())
    monkeypatch.setattr(self_check, "worst_error", lambda *_: ("step of A", 0.0))
    train(model, optimizer, batches)
    assert list(self_check._verdicts.values()) == [True]


def test_an_explicit_backend_is_not_second_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair_of_models()
    monkeypatch.setattr(self_check, "check", lambda *_: pytest.fail("was checked"))
    train(model, bare(model, 0.1, backend="triton"), [data(9, 12, 6, F32)])
    assert mse(model, data(9, 12, 6, F32)).isfinite()


def test_the_check_leaves_no_trace_in_random_numbers() -> None:
    problem = example({})
    before = torch.get_rng_state()
    assert self_check.check(self_check.kind_of(problem), problem.options, self_check._ranks(problem))
    assert torch.equal(torch.get_rng_state(), before)
