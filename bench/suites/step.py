"""The whole optimizer step, against what a user would pick instead and against a per-layer loop of the same method."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench import costs
from bench.candidate import Candidate, Row
from bench.loop import PerLayerLoop
from bench.measure import bandwidth, measure
from bench.shapes import MODELS
from bench.suites import Settings
from bench.workload import Workload, increment_error
from psilora import PSILoRA
from psilora.backends.dispatch import backend_unavailable

KINDS: dict[str, dict[str, Any]] = {
    "exact": {"momentum": 0.0},
    "exact, momentum": {},
    "exact, K=2": {"num_iters": 2, "momentum": 0.0},
    "exact, momentum, K=2": {"num_iters": 2},
    "exact, momentum, kfac": {"metric": "kfac"},
    "tangent": {"gradient": "tangent", "momentum": 0.0},
    "tangent, momentum": {"gradient": "tangent"},
}
#: Kinds that the per-layer loop is timed in; it checks all of them.
LOOPED = ("exact", "exact, momentum", "exact, momentum, K=2", "exact, momentum, kfac", "tangent, momentum")
#: Kinds of a small run; the first is also run on Triton's interpreter, a few seconds a step.
SMALL = ("exact", "exact, momentum", "tangent, momentum")
#: Optimizers of packages that a machine may lack.
PACKAGES = {"Riemannian AdamW (PEFT)": "peft", "LoRA-RITE (pytorch_optimizer)": "pytorch_optimizer"}
LR = 1e-4
#: Relative error of the change of B·A after two steps: a small difference of rounded fp32 parameters.
INCREMENT_TOLERANCE = 1e-2
ADAM_TOLERANCE = 1e-3


def run(settings: Settings) -> list[Row]:
    """Return the rows of all models."""
    rate = bandwidth(settings.device)
    rows = []
    for name in settings.choice(cpu=("minilm", "roberta-base"), cuda=("roberta-base", "llama-3-8b")):
        tokens = settings.tokens or (4096 if settings.device == "cuda" else 1024)
        work = Workload(MODELS[name], tokens, settings.device, settings.dtype)
        case = f"{name}, r {work.model.rank}, {tokens} tokens"
        kinds = SMALL if settings.small else tuple(KINDS)
        candidates = [*_ours(work, rate, kinds, settings), *_loops(work, kinds), *_others(work, rate)]
        measured = measure(
            case, candidates, device=settings.device, repeats=settings.repeats, seconds=3 * settings.seconds
        )
        rows += [{"model": name, "tokens": tokens, "layers": len(work.adapters), **row} for row in measured]
    return rows


def settings_of(kind: str) -> dict[str, Any]:
    """Return the keyword arguments of a kind of gradient step, the loop's defaults among them."""
    defaults = {"gradient": "exact", "num_iters": 1, "momentum": 0.9, "prox": 1e-2, "metric": None}
    return {"step": "gradient", "controller": None, **defaults, **KINDS[kind]}


def two_steps(work: Workload, optimizer: PSILoRA | PerLayerLoop) -> Workload:
    """Take two steps on a workload's gradients, which `optimizer` updates; the second has a momentum to read."""
    for _ in range(2):
        if isinstance(optimizer, PSILoRA):
            work.prime(optimizer)
        optimizer.step()
        work.set_gradients()
    if isinstance(optimizer, PSILoRA):
        optimizer.detach()
    return work


def check_step(work: Workload, kind: str, make: Callable[[Workload], PSILoRA | PerLayerLoop], lr: float = 0.1) -> float:
    """Return the error, on a sample of layers, of two steps against the per-layer loop in float64."""
    exact = work.part(work.sample(), torch.float64)
    before = exact.weights()
    two_steps(exact, loop(exact, kind, lr))
    ours = work.part(work.sample())
    return increment_error(two_steps(ours, make(ours)), exact, before)


def loop(work: Workload, kind: str, lr: float) -> PerLayerLoop:
    """Return the per-layer loop on a workload."""
    return PerLayerLoop(work.pairs(), list(zip(work.X, work.S, strict=True)), lr, **KINDS[kind])


def ours(work: Workload, kind: str, backend: str, lr: float) -> PSILoRA:
    """Return PSILoRA on a workload."""
    return PSILoRA(work.adapters, lr, backend=backend, **settings_of(kind))


def _ours(work: Workload, rate: float, kinds: Sequence[str], settings: Settings) -> Iterator[Candidate]:
    for kind in kinds:
        kernels = backend_unavailable("triton") is None and (settings.device == "cuda" or kind == kinds[0])
        for backend in ["reference", "triton"] if kernels else ["reference"]:
            mine = work.copy()
            optimizer = ours(mine, kind, backend, LR)
            facts = {
                "kind": kind,
                "backend": backend,
                **_floor(costs.step_bytes(work, settings_of(kind)), rate),
                "flops": 0 if "tangent" in kind else costs.step_flops(work, settings_of(kind)),
                "planned_launches": costs.planned_launches(work, settings_of(kind)),
                "capture_bytes": 0 if "tangent" in kind else work.activation_bytes(),
                "state_bytes": state_bytes_after_step(mine, optimizer),
            }
            yield Candidate(
                f"PSILoRA {kind} ({backend})",
                optimizer.step,
                functools.partial(check_step, work, kind, functools.partial(at_check_rate, kind, backend)),
                INCREMENT_TOLERANCE,
                before=functools.partial(mine.prime, optimizer),
                facts=facts,
                count=backend == "reference" or settings.device == "cuda",
            )
    for backend in ["reference"] + ["triton"] * (settings.device == "cuda" and backend_unavailable("triton") is None):
        yield _spectral(work, backend)


def at_check_rate(kind: str, backend: str, work: Workload) -> PSILoRA:
    """Return PSILoRA at the rate of `check_step`."""
    return ours(work, kind, backend, 0.1)


def state_bytes_after_step(work: Workload, optimizer: torch.optim.Optimizer) -> int:
    """Take a step and return the bytes of the optimizer's state, step counts left out."""
    if isinstance(optimizer, PSILoRA):
        work.prime(optimizer)
    optimizer.step()
    kept = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(t.nbytes for t in kept if t.numel() > 1)


def _spectral(work: Workload, backend: str) -> Candidate:
    """The spectral step, checked against the reference in float64: there is no loop of it."""
    mine = work.copy()
    optimizer = PSILoRA(mine.adapters, LR, step="spectral", backend=backend)

    def check() -> float:
        exact, got = work.part(work.sample(), torch.float64), work.part(work.sample())
        before = exact.weights()
        two_steps(exact, PSILoRA(exact.adapters, 0.1, step="spectral", backend="reference"))
        two_steps(got, PSILoRA(got.adapters, 0.1, step="spectral", backend=backend))
        return increment_error(got, exact, before)

    state = state_bytes_after_step(mine, optimizer)
    facts = {"kind": "spectral", "backend": backend, "capture_bytes": 0, "state_bytes": state}
    run, before = optimizer.step, functools.partial(mine.prime, optimizer)
    return Candidate(f"PSILoRA spectral ({backend})", run, check, INCREMENT_TOLERANCE, before=before, facts=facts)


def _loops(work: Workload, kinds: Sequence[str]) -> Iterator[Candidate]:
    for kind in [kind for kind in LOOPED if kind in kinds]:
        mine = work.copy()
        optimizer = loop(mine, kind, LR)
        check = functools.partial(check_step, work, kind, functools.partial(loop, kind=kind, lr=0.1))
        facts = {"kind": kind, "capture_bytes": work.activation_bytes(), "state_bytes": optimizer.state_bytes()}
        yield Candidate(f"per-layer loop, {kind}", optimizer.step, check, INCREMENT_TOLERANCE, facts=facts)


def _others(work: Workload, rate: float) -> Iterator[Candidate]:
    makers: dict[str, tuple[Callable[[Workload], torch.optim.Optimizer], bool | None]] = {
        "AdamW, foreach": (lambda w: torch.optim.AdamW(w.parameters(), lr=LR, weight_decay=0.0, foreach=True), False),
        "AdamW, fused": (lambda w: torch.optim.AdamW(w.parameters(), lr=LR, weight_decay=0.0, fused=True), False),
        "Riemannian AdamW (PEFT)": (_riemannian, True),
        "LoRA-RITE (pytorch_optimizer)": (_lora_rite, None),
    }
    for name, (make, preconditioned) in makers.items():
        if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
            print(f"{name}: {PACKAGES[name]} is not installed", file=sys.stderr)
            continue
        mine = work.copy()
        optimizer = make(mine)
        facts = {
            **_floor(costs.adamw_bytes(work), rate),
            "capture_bytes": 0,
            "state_bytes": state_bytes_after_step(mine, optimizer),
        }
        check = functools.partial(_check_descent if preconditioned is None else _check_adam, work, make, preconditioned)
        # PEFT's wrapper overwrites `.grad`: without fresh ones a second step would precondition twice.
        before = mine.set_gradients if preconditioned else lambda: None
        yield Candidate(name, optimizer.step, check, ADAM_TOLERANCE, before=before, facts=facts)


def _riemannian(work: Workload) -> torch.optim.Optimizer:
    from peft.optimizers import create_riemannian_optimizer

    return create_riemannian_optimizer(work.adapters, torch.optim.AdamW, lr=LR, weight_decay=0.0)


def _lora_rite(work: Workload) -> torch.optim.Optimizer:
    from pytorch_optimizer import LoRARite

    return LoRARite(work.parameters(), lr=LR)


@torch.no_grad()
def _check_adam(work: Workload, make: Callable[[Workload], torch.optim.Optimizer], preconditioned: bool) -> float:
    """Return the error of a first step against −lr·g/(|g| + ε), with g preconditioned by (BᵀB + ρI)⁻¹ or not."""
    part = work.part(work.sample())
    errors = []
    wanted = []
    for A, B in part.pairs():
        dA, dB = (None if p.grad is None else p.grad.double() for p in (A, B))
        if preconditioned:
            eye = 1e-2 * torch.eye(A.shape[0], dtype=torch.float64, device=A.device)
            dA = torch.linalg.solve(B.double().mT @ B.double() + eye, dA)
            dB = torch.linalg.solve(A.double() @ A.double().mT + eye, dB.mT).mT
        wanted += [p.detach().double() - LR * g / (g.abs() + 1e-8) for p, g in ((A, dA), (B, dB))]
    before = [p.detach().double() for p in part.parameters()]
    make(part).step()
    for p, want, old in zip(part.parameters(), wanted, before, strict=True):
        errors.append(float((p.detach().double() - want).norm() / (want - old).norm()))
    return max(errors)


@torch.no_grad()
def _check_descent(work: Workload, make: Callable[[Workload], torch.optim.Optimizer], _: None) -> float:
    """Return 0 where the first step goes down the gradient of every layer, else 1."""
    part = work.part(work.sample())
    before = [p.detach().clone() for p in part.parameters()]
    make(part).step()
    slopes = [
        sum(float(((p.detach() - old) * p.grad).sum()) for p, old in zip(pair, before[2 * i : 2 * i + 2], strict=True))
        for i, pair in enumerate(part.pairs())
    ]
    return 0.0 if max(slopes) < 0 else 1.0


def _floor(moved: int, rate: float) -> Row:
    return {"bytes": moved, "floor_ms": 1e3 * moved / rate}
