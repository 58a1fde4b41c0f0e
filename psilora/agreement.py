"""Compare what was captured with `.grad`: what was done to the gradient since, and whether the capture is right.

`clip_grad_norm_`, GradScaler and averaging change `.grad` but not X and S. A few probes keep dB as
backward left it; c = Σ⟨dB now, dB then⟩ / Σ‖dB then‖² is the factor by which it was scaled. The probes rather than
SᵀXAᵀ, because they need no read of X and S and are exact to the last bit where nothing was done; and not the version
counters of the gradients, which `.data` and GradScaler do not advance. ‖dB − c·S_Bᵀ(XAᵀ)‖, once per layer, reveals a
wrong capture.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from psilora.capture import Record
from psilora.problem import Problem

# Relative residual above which two gradients do not agree, by the smallest element size involved: 16-bit autograd
# rounds XAᵀ and dB to 2⁻⁹; a capture of the wrong tensors is off by 0.3 and more.
_TOLERANCE = {2: 0.1, 4: 1e-2, 8: 1e-6}


def external_scale(problems: Sequence[Problem], device: torch.device) -> Tensor | None:
    """Return c (0-d float64 on `device`), the factor on `.grad` since backward, which X and S lack.

    None without captures. Each layer's first capture is checked against `.grad`, waiting for the device once. On the
    CPU every step is also checked for changes of `.grad` that are not a common factor.

    Raises:
        RuntimeError: A capture does not reproduce `.grad`, or `.grad` was changed by more than a factor; names the
            worst layer and its residual.
    """
    seen = [(problem, problem.record) for problem in problems if problem.record is not None]
    probes = [(problem, record.left) for problem, record in seen if record.left is not None]
    if not seen:
        return None
    scale, typical = _scales(probes, device)
    exact = [(problem, record) for problem, record in seen if problem.exact]
    new = [(problem, record) for problem, record in exact if not record.verified]
    if exact and (new or device.type == "cpu"):
        residuals = [_residual(p.dB, then, typical) for p, then in probes]
        _refuse([p for p, _ in probes], residuals, ".grad was changed since backward by more than a common factor")
    if new:
        residuals = [_residual(p.dB, _expected_dB(p, record), typical) for p, record in new]
        _refuse([p for p, _ in new], residuals, "the captured activations do not reproduce .grad")
        for _, record in new:
            record.verified = True
    return scale


def _scales(probes: Sequence[tuple[Problem, Tensor]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return Σ⟨now, then⟩ / Σ‖then‖² and the median of the probes' own ratios; 1 where every probe was zero.

    They are equal where all is well; a single wrong layer moves the first but not the median, which judges it.
    """
    one = torch.ones((), dtype=torch.float64, device=device)
    if not probes:
        return one, one
    dots, squares = [], []
    for problem, then in probes:
        now, then = problem.dB.double(), then.flatten(1).double()
        dots.append((now * then).sum().to(device))
        squares.append(then.square().sum().to(device))
    dot, square = torch.stack(dots), torch.stack(squares)
    median = torch.nanmedian(dot / square)
    return torch.where(square.sum() == 0, one, dot.sum() / square.sum()), torch.where(median.isnan(), one, median)


def _residual(now: Tensor, then: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return (‖now − c·then‖, ‖now‖)."""
    now = now.double()
    return (now - scale.to(now.device) * then.flatten(1)).norm(), now.norm()


def _refuse(problems: Sequence[Problem], residuals: Sequence[tuple[Tensor, Tensor]], what: str) -> None:
    """Raise if a residual is above its tolerance; a gradient that is rounding beside the others is not judged."""
    values = [(float(error), float(norm)) for error, norm in residuals]
    largest = max((norm for _, norm in values if norm < float("inf")), default=0.0)
    wrong = [
        (error / norm, problem.pair.name)
        for problem, (error, norm) in zip(problems, values, strict=True)
        if norm > 1e-4 * largest and error > _tolerance(problem) * norm
    ]
    if wrong:
        residual, name = max(wrong)
        raise RuntimeError(
            f"{what} for {len(wrong)} layer(s), worst {name} with relative residual {residual:.2g}; use "
            "gradient='tangent' for it, or check what changes its gradient"
        )


def _expected_dB(problem: Problem, record: Record) -> Tensor:
    """Return S_Bᵀ(XAᵀ), one read of X and S."""
    A = problem.pair.A.to(problem.dtype)
    D = A.new_zeros(problem.dB.shape)
    for x, s in record.chunks:
        D += s.to(A.dtype).mT @ (x.to(A.dtype) @ A.mT)
    return D


def _tolerance(problem: Problem) -> float:
    sizes = [problem.dA.element_size(), problem.dB.element_size()]
    if problem.record is not None:
        sizes += [t.element_size() for chunk in problem.record.chunks for t in chunk]
    return _TOLERANCE[max(2, min(sizes))]
