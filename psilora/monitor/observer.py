"""Figures about one optimizer step, computed only for steps that are asked for.

They cost about as much as the step itself, and for captured activations the norm of the full gradient by the cheapest
route (`psilora.steps.gradient_norm`), so they are meant for every n-th step. Everything stays on the device until it is
read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from psilora.capture.storage import Dense, Rows
from psilora.lowrank.gradient_operator import ActivationGradient, DenseGradient, Gradient, TangentGradient
from psilora.steps import STEPS
from psilora.steps.gradient_norm import captured_square
from psilora.steps.problem import Problem, Scales


@dataclass
class _Before:
    """One pair before the step, on √s-scaled factors: B (d_out, r), A (r, d_in) and 0-d figures of G and M."""

    problem: Problem
    B: Tensor
    A: Tensor
    squared_gradient: Tensor
    squared_tangent: Tensor
    squared_target: Tensor | None


class Observer:
    """Computes the figures of the next step after `request`.

    Figures, each over all pairs, in the units of the weight (G = ∂L/∂W, ΔW = s·B·A):

    - projection_residual: ‖G − G_T‖ / ‖G‖, the part of the gradient outside the tangent space of the rank-r matrices at
      (B, A), which the step reaches through curvature only; 0 by definition where only `.grad` is known, and with
      several processes, of which each knows a part of G.
    - factor_conditioning: the smallest σ_min / σ_max of any factor after the step; 0 for one of deficient rank.
    - update_ratio: ‖ΔW after − ΔW before‖ / ‖ΔW after‖.
    - momentum_kept: ‖M_t‖² / ‖μ·M_{t−1} + (1−τ)·G‖², the energy that the low-rank momentum keeps; absent without one,
      and where G is not known.
    - clip_factor: what the gradient was multiplied by since backward: by `max_grad_norm`, and outside (by a trainer's
      `clip_grad_norm_`) where that shows in what was captured. A step from `.grad` alone cannot know the latter, and
      without `max_grad_norm` has no such figure.
    - capture_bytes: bytes of X and S that were held.
    """

    def __init__(self) -> None:
        self.wanted = False
        self._figures: dict[str, Tensor] = {}
        self._bytes = 0

    def request(self) -> None:
        """Ask for the figures of the next step."""
        self.wanted = True

    def before(self, problems: Sequence[Problem], scales: Scales, capture_bytes: int) -> list[_Before]:
        """Return what `after` needs, from factors, state and captures that the step is about to replace."""
        self._bytes = capture_bytes
        return [_before(problem, scales) for problem in problems]

    def after(self, seen: Sequence[_Before], scales: Scales) -> None:
        """Compute the figures, once parameters and state are written."""
        self.wanted = False
        self._figures = _figures(seen) if seen else {}
        factors = [c.double().cpu() for c in (scales.clip, scales.external) if c is not None]
        if factors:
            self._figures["clip_factor"] = torch.stack(factors).prod()

    def read(self) -> dict[str, float]:
        """Return the figures of the last step that was asked for, {} if there was none; waits for the device."""
        if not self._figures:
            return {}
        return {**{name: float(value) for name, value in self._figures.items()}, "capture_bytes": float(self._bytes)}


def _before(problem: Problem, scales: Scales) -> _Before:
    pair, dtype = problem.pair, problem.dtype
    root = pair.scaling**0.5
    sign = -1.0 if problem.options.maximize else 1.0
    clip: Tensor | float = sign if scales.clip is None else sign * scales.clip.to(pair.lora_A.device, dtype)
    B, A = (root * t.to(dtype, copy=True) for t in (pair.B, pair.A))
    left, right = (clip / root * t.to(dtype) for t in (problem.dA, problem.dB))
    tangent = TangentGradient(B[None], A[None], left[None], right[None])
    squared_tangent = tangent.squares()[0].sum()
    gradient: Gradient = tangent
    squared_gradient = squared_tangent
    shared = scales.share < 1 and problem.exact
    held = problem.record.held if problem.exact and not shared and problem.record is not None else None
    if isinstance(held, (Rows, Dense)):
        external: Tensor | float = 1.0 if scales.external is None else scales.external.to(pair.lora_A.device, dtype)
        scale = torch.as_tensor(clip * external / pair.scaling, dtype=dtype, device=pair.lora_A.device).reshape(1)
        if isinstance(held, Rows):
            gradient = ActivationGradient([held.chunks], scale)
        else:
            gradient = DenseGradient(held.tensors(), scale)
        squared_gradient = captured_square(problem) * scale[0] ** 2
    target = None if shared else _squared_target(problem, gradient, squared_gradient)
    return _Before(problem, B, A, squared_gradient, squared_tangent, target)


def _squared_target(problem: Problem, gradient: Gradient, squared_gradient: Tensor) -> Tensor | None:
    """Return ‖μ·M + (1−τ)·G‖², or None where the state holds no pair (B_m, A_m)."""
    memory = _memory(problem)
    if memory is None:
        return None
    B_m, A_m = memory
    mu, fresh = problem.options.momentum, 1 - problem.options.tau
    cross = (B_m * gradient.right(A_m[None])[0]).sum()
    return mu**2 * _squared_product(B_m, A_m) + 2 * mu * fresh * cross + fresh**2 * squared_gradient


def _memory(problem: Problem) -> tuple[Tensor, Tensor] | None:
    B_m, A_m = problem.state_B.get("momentum"), problem.state_A.get("momentum")
    if not STEPS[problem.options.step].remembers_gradient or B_m is None or A_m is None:
        return None
    return B_m, A_m


def _squared_product(P: Tensor, Q: Tensor) -> Tensor:
    """Return ‖P·Q‖²."""
    return ((P.mT @ P) * (Q @ Q.mT)).sum()


def _figures(seen: Sequence[_Before]) -> dict[str, Tensor]:
    gradient, tangent, update, weight = ([] for _ in range(4))
    target, kept, conditioning = ([] for _ in range(3))
    for old in seen:
        pair, dtype = old.problem.pair, old.problem.dtype
        root = pair.scaling**0.5
        B, A = root * pair.B.to(dtype), root * pair.A.to(dtype)
        gradient.append(old.squared_gradient)
        tangent.append(old.squared_tangent)
        update.append(_squared_product(torch.cat([B - old.B, old.B], 1), torch.cat([A, A - old.A], 0)))
        weight.append(_squared_product(B, A))
        conditioning += [_conditioning(B.mT @ B), _conditioning(A @ A.mT)]
        memory = _memory(old.problem)
        if old.squared_target is not None and memory is not None:
            target.append(old.squared_target)
            kept.append(_squared_product(*memory))
    figures = {
        "projection_residual": (1 - _ratio(tangent, gradient)).clamp(0, 1).sqrt(),
        "factor_conditioning": torch.stack([c.cpu() for c in conditioning]).min(),
        "update_ratio": _ratio(update, weight).sqrt(),
    }
    if kept:
        figures["momentum_kept"] = _ratio(kept, target)
    return figures


def _conditioning(gram: Tensor) -> Tensor:
    """Return σ_min / σ_max of a factor from its Gram matrix; 0 for a zero factor."""
    values: Tensor = torch.linalg.eigvalsh(gram.double()).clamp_min(0)
    return (values[0] / values[-1].clamp_min(torch.finfo(torch.float64).tiny)).sqrt()


def _ratio(parts: Sequence[Tensor], wholes: Sequence[Tensor]) -> Tensor:
    """Return Σ parts / Σ wholes, 0 where the latter is 0; sums over devices."""
    part, whole = (torch.stack([v.double().cpu() for v in values]).sum() for values in (parts, wholes))
    return torch.where(whole == 0, 0.0, part / whole)
