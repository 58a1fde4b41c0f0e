"""The kernels' first step on a device, under backend="auto", is computed by the reference as well and compared.

A kernel that does not compile there, or disagrees, is replaced by the reference with one warning: nobody asked for it
by name, and training silently wrong is worse than training slowly. An explicit backend="triton" is not checked.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from psilora import runtime
from psilora.backends.triton import backend as triton_backend
from psilora.lowrank.lorsum import Pair
from psilora.steps import STEPS
from psilora.steps.problem import Problem, Scales, grouped

#: ‖Δ − Δ_ref‖ / ‖Δ_ref‖ over all layers of a step, for A and for B. Two fp32 computations of an ill-conditioned
#: increment may differ by 1e-3; a wrong index or a lost term is off by far more.
TOLERANCE = 1e-2
#: What counts beside ‖Δ_ref‖, in units of ‖BA‖, where Δ is the difference of two products of factors: with the
#: tolerance 1e-5 of them, ten times what fp32 was seen to know of it.
ROUNDING = 1e-3

_verdicts: dict[torch.device, bool] = {}


def compute(
    problems: Sequence[Problem], scales: Scales, backends: triton_backend.Backends | None = None
) -> list[triton_backend.Computed] | None:
    """Return the kernels' executions for problems on one device, or None where the reference has to take them.

    Raises:
        torch.OutOfMemoryError: It says nothing about the kernels; the comparison is made in a later step.
    """
    device = problems[0].pair.lora_A.device
    verdict = _verdicts.get(device)
    if verdict is not None:
        return triton_backend.compute(problems, scales, backends) if verdict else None
    try:
        executions = triton_backend.compute(problems, scales, backends)
        errors = disagreement(executions, scales)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the compiler or the driver raises, the reference still works
        _distrust(device, f"{type(error).__name__}: {error}", backends)
        return None
    if errors is None:
        return executions
    if not max(errors) <= TOLERANCE:
        _distrust(device, f"their first step is off by {max(errors):.1e} from the reference's", backends)
        return None
    _verdicts[device] = True
    return executions


def disagreement(executions: Sequence[triton_backend.Computed], scales: Scales) -> tuple[float, float] | None:
    """Return the relative error of all steps of A and of B; None where the reference's are zero or not finite.

    Waits for the device, and costs one step of the reference.
    """
    sums = torch.zeros(2, 2, dtype=torch.float64, device="cpu")
    steps = {id(p): step for e in executions for p, step in zip(e.problems, e.increments(), strict=True)}
    for problems in grouped([p for e in executions for p in e.problems]):
        options = problems[0].options
        kind = STEPS[options.step]
        (update,) = kind.updates([problems], scales, None)
        compared = _weights if kind.balances(options) else _factors
        for problem, wanted in zip(problems, update.increments(), strict=True):
            sums += compared(problem, steps[id(problem)], wanted).cpu()
    errors, sizes = sums
    if not bool(torch.isfinite(sizes).all()) or not bool(sizes.any()):
        return None  # a warm-up that starts at lr = 0, or a step that will be skipped, proves nothing
    error_B, error_A = (errors / torch.where(sizes > 0, sizes, 1.0)).sqrt().tolist()
    return error_A, error_B


def _factors(problem: Problem, got: Pair, want: Pair) -> Tensor:
    """‖Δ − Δ_ref‖² and ‖Δ_ref‖² of the steps of B and A, (2, 2)."""
    pairs = [(a.double(), b.double()) for a, b in zip(got, want, strict=True)]
    return torch.stack([torch.stack([(a - b).square().sum(), b.square().sum()]) for a, b in pairs], -1)


def _weights(problem: Problem, got: Pair, want: Pair) -> Tensor:
    """The same of the change of BA, twice; ‖Δ_ref‖² and (ROUNDING·‖BA‖)² where anything changes.

    Rayleigh–Ritz balances its factors anew, by however much they are out of balance: the kernels have part in the
    change of the weight alone.
    """
    B, A = problem.pair.B.double(), problem.pair.A.double()
    new, wanted = ((B + step[0].double(), A + step[1].double()) for step in (got, want))
    size = _square(B, A, *wanted) + ROUNDING**2 * _square(torch.zeros_like(B), A, B, A)
    moved = torch.stack([(step != 0).any() for step in want]).any()
    return torch.stack([_square(*new, *wanted), size * moved])[:, None].expand(2, 2)


def _square(B: Tensor, A: Tensor, other_B: Tensor, other_A: Tensor) -> Tensor:
    """‖BA − B'A'‖² from Grams."""
    P, Q = torch.cat([B, -other_B], -1), torch.cat([A, other_A])
    return ((P.mT @ P) * (Q @ Q.mT)).sum().clamp_min(0)


def _distrust(device: torch.device, reason: str, backends: triton_backend.Backends | None) -> None:
    _verdicts[device] = False
    if backends is not None:
        backends.pop(device, None)
    runtime.warn(
        f"the Triton kernels are not used on {device}: {reason}. The reference backend takes over; please "
        "report this with the output of `python -m psilora.doctor`"
    )
