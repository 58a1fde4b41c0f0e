"""Compare the captured X and S with `.grad`: what was done to the gradient since, and whether the capture is right.

`clip_grad_norm_`, GradScaler and averaging change `.grad` but not X and S. With D = S_Bᵀ(XAᵀ), which equals dB as
backward left it, c = Σ⟨dB, D⟩ / Σ‖D‖² recovers the factor (METHOD §10) and ‖dB − cD‖ reveals a wrong capture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from psilora.capture import Record
from psilora.problem import Problem

# ‖dB − cD‖ / ‖dB‖ above which a capture is called wrong, and |c − 1| below which c is 1, by the coarsest dtype.
# 16-bit autograd rounds XAᵀ and dB to 2⁻⁹; a capture of the wrong tensors is off by 0.3 and more.
_TOLERANCE = {2: (0.1, 1e-2), 4: (1e-2, 1e-5), 8: (1e-6, 1e-12)}


def external_scale(problems: Sequence[Problem], device: torch.device) -> Tensor | None:
    """Return c (0-d), what happened to `.grad` since backward and not to SᵀX; None where nothing did.

    Each pair's first capture is checked against `.grad`, waiting for the device once; later captures are checked where
    that is free.

    Raises:
        RuntimeError: A capture does not reproduce `.grad`; names the worst layer and its residual.
    """
    seen = [(p, p.record) for p in problems if p.record is not None]
    exact = [(p, record) for p, record in seen if p.exact]
    touched = any(record.touched for _, record in seen)
    new = any(not record.verified for _, record in exact)
    if exact and (touched or new):
        agreement = compare([p for p, _ in exact], rescaled=touched)
        if new or device.type == "cpu":
            _refuse(exact, agreement)
        return agreement.scale if touched else None
    if touched and not exact:  # statistics only: backward left the norms of its gradients
        before = torch.stack([n.to(device, torch.float64) for _, r in seen if (n := r.grad_norm) is not None]).norm()
        now = torch.stack([p.dB.double().norm().to(device) for p, _ in seen]).norm()
        return torch.where(before > 0, now / before, torch.ones_like(before))
    return None


def _refuse(seen: Sequence[tuple[Problem, Record]], agreement: Agreement) -> None:
    judged = zip(seen, agreement.disagrees.tolist(), agreement.residual.tolist(), strict=True)
    wrong = [(residual, problem.pair.name) for (problem, _), bad, residual in judged if bad]
    if wrong:
        residual, name = max(wrong)
        raise RuntimeError(
            f"the captured activations do not reproduce .grad for {len(wrong)} layer(s), worst {name} with relative "
            f"residual {residual:.2g}; use gradient='tangent' for it, or check what changes its gradient"
        )
    for _, record in seen:
        record.verified = True


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
    dots: list[Tensor] = []
    squares: list[Tensor] = []
    grads: list[Tensor] = []
    cross: list[tuple[Tensor, Tensor]] = []
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
    # judged against the median over the layers, which one wrong capture cannot move
    typical = torch.nanmedian(dot / square) if rescaled else scale
    typical = torch.where(torch.isfinite(typical), typical, scale)
    errors = torch.stack(
        [(dB - typical.to(D.device, D.dtype) * D).square().sum().to(device, torch.float64) for dB, D in cross]
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
