"""Every preset and every solver runs on both backends."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import data, factors, plain_mlp, randomise_B, train

from psilora import OPLoRA, PSILoRA
from psilora.backends import dispatch
from psilora.backends.triton import backend as triton_backend
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


def test_auto_says_once_why_cuda_has_to_do_without_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_SAID", set())
    monkeypatch.setattr(triton_backend, "unavailable_reason", lambda: "Triton 3.2.0 is too old")
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert dispatch._without_kernels("auto", cpu) == "backend='auto' takes the kernels on CUDA, not on cpu"
    with pytest.warns(UserWarning, match="cuda:0, because the Triton kernels cannot be used: Triton 3.2.0 is too old"):
        assert dispatch._without_kernels("auto", cuda) == "Triton 3.2.0 is too old"
    assert dispatch._without_kernels("auto", cuda) == "Triton 3.2.0 is too old"  # a second warning would be an error
    assert dispatch._without_kernels("reference", cuda) == "backend='reference'"
    monkeypatch.setattr(triton_backend, "unavailable_reason", lambda: None)
    assert dispatch._without_kernels("auto", cuda) is None
