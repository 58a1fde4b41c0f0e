"""Compare the captured X and S with `.grad`: what was done to the gradient since, and whether the capture is right.

`clip_grad_norm_`, GradScaler and averaging change `.grad` but not X and S. With D = S_Bᵀ(XAᵀ), which equals dB as
backward left it, c = Σ⟨dB, D⟩ / Σ‖D‖² recovers the factor (METHOD §10) and ‖dB − cD‖ reveals a wrong capture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from psilora.problem import Problem

# ‖dB − cD‖ / ‖dB‖ above which a capture is called wrong, and |c − 1| below which c is 1, by the coarsest dtype involved.
# 16-bit autograd rounds XAᵀ and dB to 2⁻⁹; a capture of the wrong tensors is off by 0.3 and more.
_TOLERANCE = {2: (0.1, 1e-2), 4: (1e-2, 1e-5), 8: (1e-6, 1e-12)}


@dataclass
class Agreement:
    """The factor c (0-d), and per problem whether its capture disagrees with `.grad` and by how much."""

    scale: Tensor
    disagrees: Tensor
    residual: Tensor


def compare(problems: Sequence[Problem], *, rescaled: bool) -> Agreement:
    """Return c over all `problems` and the residual of each; with `rescaled` False, c = 1 is taken as known.

    Costs one read of X and one of S. Nothing synchronises with the device. A layer whose gradient is below 1e-3 of the
    root mean square over the layers is not judged, because rounding dominates it.
    """
    device = problems[0].pair.lora_A.device
    dots, squares, grads, cross = [], [], [], []
    for problem in problems:
        D = _expected_dB(problem)
        dB = problem.dB.to(D.dtype)
        for values, value in ((dots, (dB * D).sum()), (squares, D.square().sum()), (grads, dB.square().sum())):
            values.append(value.to(device, torch.float64))
        cross.append((dB, D))
    dot, square, grad = (torch.stack(values) for values in (dots, squares, grads))
    limits = [_limits(problem) for problem in problems]
    scale = torch.ones((), dtype=torch.float64, device=device)
    if rescaled:
        total = square.sum()
        scale = torch.where(total > 0, dot.sum() / total, scale)
        snap = max(limit for _, limit in limits)
        scale = torch.where((scale - 1).abs() <= snap, torch.ones_like(scale), scale)
    errors = torch.stack(
        [(dB - scale.to(D.device, D.dtype) * D).square().sum().to(device, torch.float64) for dB, D in cross]
    )
    tolerance = torch.tensor([limit for limit, _ in limits], dtype=torch.float64).to(device, non_blocking=True)
    judged = grad > 1e-6 * grad.mean()
    residual = (errors / grad.clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
    return Agreement(scale, judged & (residual > tolerance), residual)


def _expected_dB(problem: Problem) -> Tensor:
    record = problem.record
    if record is None:
        raise RuntimeError(f"{problem.pair.name}: nothing was captured to compare with")
    A = problem.pair.A.to(problem.dtype)
    D = A.new_zeros(problem.dB.shape)
    for x, s in record.chunks:
        D += s.to(A.dtype).mT @ (x.to(A.dtype) @ A.mT)
    return D


def _limits(problem: Problem) -> tuple[float, float]:
    sizes = [problem.dA.element_size(), problem.dB.element_size()]
    if problem.record is not None:
        sizes += [t.element_size() for chunk in problem.record.chunks for t in chunk]
    return _TOLERANCE[max(2, min(sizes))]
