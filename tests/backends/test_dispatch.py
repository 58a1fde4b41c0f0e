"""Every preset and every solver runs on both backends."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import data, factors, plain_mlp, randomise_B, train
from problems import make_problem

from psilora import OPLoRA, PSILoRA
from psilora.backends import dispatch
from psilora.backends.triton import backend as triton_backend
from psilora.steps.problem import Problem, Problems
from psilora.steps.update import Bucket

if triton_backend.unavailable_reason() is not None:
    pytest.skip(str(triton_backend.unavailable_reason()), allow_module_level=True)

from psilora.backends.triton.gradient.ritz import RitzUpdate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Preset = Callable[..., PSILoRA]
KINDS: dict[str, tuple[Preset, dict[str, Any]]] = {
    "default": (PSILoRA, {}),
    "default, no metric": (PSILoRA, {"metric": None}),
    "joint=False": (PSILoRA, {"joint": False}),
    "PSILoRA.paper": (PSILoRA.paper, {}),
    "OPLoRA": (OPLoRA, {}),
    "gradient": (PSILoRA, {"step": "gradient"}),
    "preconditioned": (PSILoRA, {"step": "gradient", "num_iters": 0, "momentum": 0.0}),
    "ritz": (PSILoRA, {"step": "gradient", "solver": "ritz"}),
    "ritz, K-FAC": (PSILoRA, {"step": "gradient", "solver": "ritz", "first": "B", "metric": "kfac"}),
}


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The updates that the engine finds during a test."""
    found: list[Any] = []
    compute = dispatch.compute

    def spied(*args: Any) -> list[Bucket]:
        buckets = compute(*args)
        found.extend(bucket.update for bucket in buckets)
        return buckets

    monkeypatch.setattr(dispatch, "compute", spied)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_every_preset_and_solver_runs_on_both_backends(kind: str, backend: str, updates: list[Any]) -> None:
    """Two steps in fp32 from B = 0, all computed by the backend, against the reference in float64."""
    make, settings = KINDS[kind]
    model = plain_mlp((12, 10, 9, 6), dtype=torch.float32).to(DEVICE)
    randomise_B(model, 0.0)
    exact = copy.deepcopy(model).double()
    start = factors(exact)
    batches = [(x.to(DEVICE), y.to(DEVICE)) for x, y in (data(9, 12, 6) for _ in range(2))]
    train(model, make(model, 0.05, backend=backend, **settings), [(x.float(), y.float()) for x, y in batches])
    by_kernels = [isinstance(update, triton_backend.Execution | RitzUpdate) for update in updates]
    assert by_kernels and all(kernels == (backend == "triton") for kernels in by_kernels)
    train(exact, make(exact, 0.05, backend="reference", **settings), batches)
    got = factors(model)
    for name, want in factors(exact).items():
        moved = float((want - start[name]).norm())
        assert moved > 0
        assert float((got[name].double() - want).norm()) <= 1e-3 * moved, name


@pytest.mark.parametrize("settings", [{}, {"joint": False}, {"step": "gradient", "prox": 0.0}], ids=str)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_an_update_that_fp16_cannot_hold_is_skipped(backend: str, settings: dict[str, Any]) -> None:
    """The trap: an increment that is finite in fp32 becomes infinite where it is rounded to the parameter."""
    model = plain_mlp((12, 10, 9, 6), dtype=torch.float16).to(DEVICE)
    batch = tuple(t.to(DEVICE, torch.float16) for t in data(9, 12, 6))
    optimizer = PSILoRA(model, 0.05, backend=backend, **settings)
    train(model, optimizer, [batch])
    assert optimizer.stats()["skipped_steps"] == 0
    before = factors(model)
    optimizer.param_groups[0]["lr"] = 1e7
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(model, optimizer, [batch])
    assert optimizer.stats()["skipped_steps"] == 1
    optimizer.nonfinite = "raise"
    with pytest.raises(RuntimeError, match=r"non-finite gradient or update in l1, l2, l3; no parameter"):
        train(model, optimizer, [batch])
    assert all(torch.equal(value, before[name]) for name, value in factors(model).items())


class OnCuda(Problem):
    """A problem whose parameters say that they are on a GPU."""

    def __init__(self, problem: Problem) -> None:
        self.__dict__.update(problem.__dict__)
        device = torch.device("cuda", 0)
        like = {"device": device, "dtype": problem.pair.lora_A.dtype}
        lora = SimpleNamespace(is_contiguous=lambda: True, **like)
        self.pair = SimpleNamespace(lora_A=lora, lora_B=lora, rank=problem.pair.rank)
        self.dA = self.dB = SimpleNamespace(**like)


@pytest.mark.parametrize(
    ("unavailable", "settings", "reason"),
    [
        ("Triton 3.2.0 is too old", {}, "the Triton kernels cannot be used: Triton 3.2.0 is too old"),
        (None, {"metric": "kfac-dense"}, "metric='kfac-dense'"),
        (None, {"dtype": torch.float64}, "fp64 parameters"),
    ],
    ids=str,
)
def test_it_is_said_once_why_cuda_has_to_do_without_the_kernels(
    unavailable: str | None, settings: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_SAID", set())
    monkeypatch.setattr(triton_backend, "unavailable_reason", lambda: unavailable)
    problem = make_problem((12, 10, 4), **settings)

    def route(backend: str, problem: Problem) -> dispatch.Route:
        return dispatch.route_of(Problems([problem]), backend, shared=False)

    assert route("auto", problem).said == ["reference: 1 pairs, backend='auto' takes the kernels on CUDA, not on cpu"]
    for number in range(2):  # a second warning would be an error
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert route("auto", OnCuda(problem)).said == [f"reference: 1 pairs, {reason}"]
        said = [str(w.message) for w in caught]
        assert len(said) == 1 - number and all(f"1 of 1 LoRA pairs on CUDA: {reason}. backend=" in s for s in said)
    assert route("reference", OnCuda(problem)).said == ["reference: 1 pairs, backend='reference'"]


def test_the_optimizer_says_which_backend_has_taken_its_step() -> None:
    model = plain_mlp((12, 10, 9, 6), dtype=torch.float32).to(DEVICE)
    optimizer = PSILoRA(model, 0.05, backend="triton", groups=[{"layers": "l2", "step": "gradient", "metric": None}])
    optimizer.param_groups[1]["metric"] = None
    assert optimizer.backends() == [] and "last step" not in optimizer.summary()
    batch = tuple(t.to(DEVICE) for t in data(9, 12, 6, torch.float32))
    train(model, optimizer, [batch])
    assert optimizer.backends() == [f"triton on {model.l1.lora_A.weight.device}: 3 pairs"]
    assert f"last step by triton on {model.l1.lora_A.weight.device}: 3 pairs" in optimizer.summary()
    plain = PSILoRA(model, 0.05, backend="reference")
    train(model, plain, [batch])
    assert plain.backends() == ["reference: 3 pairs, backend='reference'"]
