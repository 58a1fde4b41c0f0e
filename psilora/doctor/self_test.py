"""A short training run on every backend and device here, compared with the reference in float64."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from psilora.adapters.linear import LoRALinear
from psilora.backends.dispatch import backend_unavailable, check_backend
from psilora.optimizer import PSILoRA

BACKENDS = ("reference", "triton")


@dataclass
class Result:
    """One comparison of the self-test: the largest relative error of a factor after three steps."""

    name: str
    error: float
    limit: float

    @property
    def ok(self) -> bool:
        """Whether the error is within the limit; NaN is not."""
        return self.error <= self.limit


CASES: tuple[dict[str, Any], ...] = (
    {},
    {"step": "gradient", "momentum": 0.0},
    {"step": "gradient"},
    {"step": "gradient", "num_iters": 2, "first": "B"},
    {"step": "gradient", "metric": "kfac"},
    {"step": "gradient", "metric": "kfac-dense", "damping": 1e-3},
    {"step": "gradient", "gradient": "tangent"},
)


def runs(backend: str | None) -> list[tuple[str, str, torch.dtype]]:
    """The backends, or one of them, on the devices where they run."""
    runs = [("reference", "cpu", torch.float32)]
    if torch.cuda.is_available():
        runs.append(("reference", "cuda", torch.float32))
    if backend_unavailable("triton") is None:
        runs.append(("triton", "cuda" if torch.cuda.is_available() else "cpu", torch.float32))
    return [run for run in runs if backend in (None, run[0])]


def self_test(budget: float = 5.0, backend: str | None = None) -> list[Result]:
    """Return the results of `comparisons` together."""
    return list(comparisons(budget, backend))


def comparisons(budget: float = 5.0, backend: str | None = None) -> Iterator[Result]:
    """Train two layers for three steps on every backend and device here, and compare with the reference in float64.

    Args:
        budget: In seconds: later cases are left out when it is spent.
        backend: The only one to test; None for all that run here.

    Raises:
        ValueError: `backend` cannot run here.
    """
    if backend is not None:
        check_backend(backend)
    chosen = runs(backend)
    done = False
    start = time.monotonic()
    for case in CASES:
        want = _train("reference", "cpu", torch.float64, case)
        for name, device, dtype in chosen:
            if done and time.monotonic() - start > budget:
                return
            got = _train(name, device, dtype, case)
            errors = [float((g - w).abs().max() / w.abs().max()) for g, w in zip(got, want, strict=True)]
            settings = ", ".join(f"{k}={v}" for k, v in case.items()) or "default"
            done = True
            yield Result(f"{name} on {device}, {settings}", max(errors), 1e-4)


def _train(backend: str, device: str, dtype: torch.dtype, case: dict[str, Any]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(LoRALinear(nn.Linear(24, 40), 4, 8), nn.Tanh(), LoRALinear(nn.Linear(40, 16), 4, 8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, device="cpu") * 0.2)
    model = model.to(device, dtype)
    optimizer = PSILoRA(model, 0.1, backend=backend, **case)
    for _ in range(3):
        x = torch.randn(33, 24, generator=generator, device="cpu").to(device, dtype)
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    optimizer.detach()
    return [p.detach().cpu().double() for p in model.parameters() if p.requires_grad]
