"""Under backend="auto" the kernels have to prove themselves on a device's first step."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from models import bare, data, factors, mse, plain_mlp, train
from problems import make_problem

from psilora.backends import dispatch, self_check
from psilora.backends.dispatch import backend_unavailable
from psilora.backends.triton import backend as triton_backend
from psilora.steps.problem import Scales

pytestmark = pytest.mark.skipif(
    backend_unavailable("triton") is not None, reason=f"no Triton backend: {backend_unavailable('triton')}"
)
F32 = torch.float32


@pytest.fixture(autouse=True)
def _auto_takes_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The interpreter's CPU stands for a GPU."""
    monkeypatch.setattr(dispatch, "_takes_kernels", lambda backend, device: backend != "reference")
    self_check._verdicts.clear()
    yield
    self_check._verdicts.clear()


def pair_of_models() -> tuple[torch.nn.Module, torch.nn.Module]:
    ours, theirs = plain_mlp((12, 10, 8, 6), dtype=F32), plain_mlp((12, 10, 8, 6), dtype=F32)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def test_right_kernels_are_trusted_once_and_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair_of_models()
    calls: list[int] = []
    original = self_check.disagreement
    monkeypatch.setattr(self_check, "disagreement", lambda *a: calls.append(1) or original(*a))
    optimizer = bare(model, 0.0)
    train(model, optimizer, [data(9, 12, 6, F32)])  # a warm-up from lr = 0 proves nothing
    assert self_check._verdicts == {}
    optimizer.param_groups[0]["lr"] = 0.1
    train(model, optimizer, [data(9, 12, 6, F32)] * 2)
    assert self_check._verdicts == {torch.device("cpu"): True} and len(calls) == 2


@pytest.mark.parametrize("fault", ["wrong", "crash"])
def test_wrong_or_failing_kernels_give_way_to_the_reference_with_one_warning(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = pair_of_models()
    original = triton_backend.Execution.increments

    def wrong(self: triton_backend.Execution) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(step_B * 1.05, step_A) for step_B, step_A in original(self)]

    def crash(*_: object) -> None:
        raise NotImplementedError("no code for this device")

    if fault == "wrong":
        monkeypatch.setattr(triton_backend.Execution, "increments", wrong)
    else:
        monkeypatch.setattr(triton_backend, "compute", crash)
    ours, theirs = bare(model, 0.1), bare(other, 0.1, backend="reference")
    reason = "off by 5.0e-02" if fault == "wrong" else "NotImplementedError: no code for this device"
    batches = [data(9, 12, 6, F32) for _ in range(2)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, ours, batches)
    found = [w for w in caught if "the Triton kernels are not used on cpu" in str(w.message)]
    assert len(found) == 1
    assert reason in str(found[0].message)
    train(other, theirs, batches)
    a, b = factors(model), factors(other)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("fault", [1.0, 1.5])
def test_a_fault_shows_beside_factors_that_are_balanced_anew(fault: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rayleigh–Ritz moves its factors far, whatever the gradient; the change of the weight is what kernels decide."""
    from psilora.backends.triton.gradient.ritz import KernelGradient

    right = KernelGradient.right
    monkeypatch.setattr(KernelGradient, "right", lambda self, A: right(self, A) * fault)
    model, _ = pair_of_models()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(model, bare(model, 0.01, solver="ritz"), [data(9, 12, 6, F32)])
    assert self_check._verdicts == {torch.device("cpu"): fault == 1.0}


def test_rounding_of_two_weights_is_not_taken_for_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the difference between a new weight and an old one nearby, rounding may be all there is."""
    problems = [make_problem((120, 100, 12), solver="ritz", rows=(48,), lr=5e-5) for _ in range(16)]
    executions = triton_backend.compute(problems, Scales())
    errors = self_check.disagreement(executions, Scales())
    monkeypatch.setattr(self_check, "ROUNDING", 0.0)
    without = self_check.disagreement(executions, Scales())
    assert errors is not None and without is not None
    assert max(errors) < self_check.TOLERANCE / 3 < self_check.TOLERANCE < max(without)


def test_a_lack_of_memory_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model, _ = pair_of_models()
    optimizer, batches = bare(model, 0.1), [data(9, 12, 6, F32)]
    before = factors(model)
    with monkeypatch.context() as patched:
        patched.setattr(self_check, "disagreement", full)
        with pytest.raises(torch.OutOfMemoryError):
            train(model, optimizer, batches)
    assert self_check._verdicts == {} and all(torch.equal(before[name], t) for name, t in factors(model).items())
    train(model, optimizer, batches)
    assert self_check._verdicts == {torch.device("cpu"): True}


def test_an_explicit_backend_is_not_second_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair_of_models()
    monkeypatch.setattr(self_check, "disagreement", lambda *_: pytest.fail("was checked"))
    train(model, bare(model, 0.1, backend="triton"), [data(9, 12, 6, F32)])
    assert mse(model, data(9, 12, 6, F32)).isfinite()
