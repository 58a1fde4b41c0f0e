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

from psilora import runtime
from psilora.capture.record import Record
from psilora.distributed.communicator import Communicator
from psilora.steps.problem import Problem

# Relative residual above which two gradients do not agree, by the smallest element size involved: 16-bit autograd
# rounds XAᵀ and dB to 2⁻⁹; a capture of the wrong tensors is off by 0.3 and more.
_TOLERANCE = {2: 0.1, 4: 1e-2, 8: 1e-6}


def external_scale(
    problems: Sequence[Problem], device: torch.device, communicator: Communicator | None = None
) -> Tensor | None:
    """Return c (0-d float64 on `device`), the factor on `.grad` since backward, which X and S lack.

    None without captures. Each layer's first capture is checked against `.grad`, waiting for the device once, and so is
    one whose `.grad` was not reset before backward; with one process also one whose `.grad` was changed between two
    backward passes, which the probes do not see. On the CPU every step is also checked for changes of `.grad` that are
    not a common factor.

    With several processes the probes are averaged before they are compared, because whoever averages `.grad` (DDP does,
    at the end of backward) does so after they are taken: averaging itself is no part of c. Only ⟨dB now, probe⟩
    travels: with dB = c·(mean of the probes) it gives c = ‖dB‖² / ⟨dB, mean⟩.

    Raises:
        RuntimeError: A capture does not reproduce `.grad`, or `.grad` was changed by more than a factor; names the
            worst layer and its residual.
    """
    seen = [(problem, problem.record) for problem in problems if problem.record is not None]
    if not seen:
        return None
    exact = [(problem, record) for problem, record in seen if problem.exact]
    stale = [_stale(p, record, communicator) for p, record in exact]
    new = [
        (p, record)
        for (p, record), more in zip(exact, stale, strict=True)
        if more or not record.verified or (record.changed and communicator is None)
    ]
    world = 1 if communicator is None else communicator.world_size
    judged = bool(new) or (bool(exact) and runtime.at_hand(device))
    if communicator is None:
        probes = [(problem, record.left) for problem, record in seen if record.left is not None]
        scale = _scale(probes, device)
        typical = _typical(probes, device) if judged else scale
        residuals = [(p, _residual(p.dB, then, typical)) for p, then in probes] if judged else []
    else:
        scale, typical, residuals = _joint_scales([p for p, _ in seen], world, device)
    if judged:
        _refuse(residuals, ".grad was changed since backward by more than a common factor")
    if new:
        expected = [record.held.dB(p.pair) / world for p, record in new]
        if communicator is not None:
            expected = communicator.sums(expected)
        found = [(p, _residual(p.dB, dB, typical)) for (p, _), dB in zip(new, expected, strict=True)]
        more = ", which was not reset before backward (zero_grad)," if any(stale) else ""
        _refuse(found, f"the captured activations do not reproduce .grad{more}")
        for _, record in new:
            record.verified = True
    return scale


def _stale(problem: Problem, record: Record, communicator: Communicator | None) -> bool:
    """Whether `.grad` was not reset before backward, in any process."""
    return record.stale if communicator is None or problem.counts is None else problem.counts.stale > 0


Residual = tuple[Problem, tuple[Tensor, Tensor]]


def _scale(probes: Sequence[tuple[Problem, Tensor]], device: torch.device) -> Tensor:
    """Return Σ⟨now, then⟩ / Σ‖then‖², 1 where every probe was zero, in a few launches whatever the number of probes."""
    by_device: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
    for problem, then in probes:
        by_device.setdefault(problem.dB.device, []).append((problem.dB.reshape(-1), then.reshape(-1)))
    if not by_device:
        return torch.ones((), dtype=torch.float64, device=device)
    sums = []
    for where, pairs in by_device.items():
        size = sum(now.numel() for now, _ in pairs)
        now, then = (torch.empty(size, dtype=torch.float64, device=where) for _ in range(2))
        torch.cat([pair[0] for pair in pairs], out=now)
        torch.cat([pair[1] for pair in pairs], out=then)
        sums.append([torch.dot(now, then).to(device), torch.dot(then, then).to(device)])
    dots, squares = sums[0] if len(sums) == 1 else (torch.stack(column).sum() for column in zip(*sums, strict=True))
    return torch.where(squares == 0, 1.0, dots / squares)


def _typical(probes: Sequence[tuple[Problem, Tensor]], device: torch.device) -> Tensor:
    """Return the median of the probes' own ratios, 1 where there is nothing to divide by.

    It is `_scale` where all is well; a single wrong layer moves that but not the median, which judges it.
    """
    if not probes:
        return torch.ones((), dtype=torch.float64, device=device)
    dots, squares = [], []
    for problem, then in probes:
        now, then = problem.dB.double(), then.flatten(1).double()
        dots.append((now * then).sum().to(device))
        squares.append(then.square().sum().to(device))
    return _ratios(torch.stack(dots), torch.stack(squares))[1]


def _joint_scales(
    problems: Sequence[Problem], world: int, device: torch.device
) -> tuple[Tensor, Tensor, list[Residual]]:
    """Return the same over all processes, and per probe (|⟨dB, mean⟩·c − ‖dB‖²| / ‖dB‖, ‖dB‖).

    The residual is the change along dB alone: what changed across it would need the mean of the probes themselves.
    """
    probes = [(p, p.counts.overlap) for p in problems if p.counts is not None and p.counts.probed == world]
    overlaps = [overlap.to(device) / world for _, overlap in probes if overlap is not None]
    if not overlaps:
        raise RuntimeError(
            f"no layer's gradient was watched in all {world} processes, because they ran different layers; use "
            "gradient='tangent' and metric=None"
        )
    dots, energies = torch.stack(overlaps).unbind(1)
    norms = torch.stack([p.dB.double().norm().to(device) for p, _ in probes])
    scale, typical = _ratios(norms.square(), dots)
    zeroed = (norms == 0).all() & (energies > 0).any()  # whoever multiplied .grad by 0 meant c = 0
    scale = scale.masked_fill(zeroed, 0)
    errors = (dots * typical - norms.square()).abs() / norms
    return scale, typical, [(p, (e, n)) for (p, _), e, n in zip(probes, errors.unbind(), norms.unbind(), strict=True)]


def _ratios(above: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σ above / Σ below and the median of above / below, each 1 where there is nothing to divide by."""
    one = torch.ones((), dtype=torch.float64, device=above.device)
    median = torch.nanmedian(above / below)
    return torch.where(below.sum() == 0, one, above.sum() / below.sum()), torch.where(median.isnan(), one, median)


def _residual(now: Tensor, then: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return (‖now − c·then‖, ‖now‖)."""
    now = now.double()
    return (now - scale.to(now.device) * then.flatten(1)).norm(), now.norm()


def _refuse(residuals: Sequence[Residual], what: str) -> None:
    """Raise if a residual is above its tolerance; a gradient that is rounding beside the others is not judged."""
    values = [(problem, float(error), float(norm)) for problem, (error, norm) in residuals]
    largest = max((norm for _, _, norm in values if norm < float("inf")), default=0.0)
    wrong = [
        (error / norm, problem.pair.name)
        for problem, error, norm in values
        if norm > 1e-4 * largest and error > _tolerance(problem) * norm
    ]
    if wrong:
        residual, name = max(wrong)
        raise RuntimeError(
            f"{what} for {len(wrong)} layer(s), worst {name} with relative residual {residual:.2g}; use "
            "gradient='tangent' for it, or check what changes its gradient"
        )


def _tolerance(problem: Problem) -> float:
    sizes = [problem.dA.element_size(), problem.dB.element_size()]
    if problem.record is not None:
        sizes.append(problem.record.itemsize)
    return _TOLERANCE[max(2, min(sizes))]
