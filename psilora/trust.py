"""The kernels' first step on a device, under backend="auto", is computed by the reference as well and compared.

A kernel that does not compile there, or disagrees, is replaced by the reference with one warning: nobody asked for it
by name, and training silently wrong is worse than training slowly. An explicit backend="triton" is not checked.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from psilora import triton_backend
from psilora.problem import Problem, Scales
from psilora.reference import reference_update
from psilora.spectral import spectral_updates

#: ‖Δ − Δ_ref‖ / ‖Δ_ref‖ over all layers of a step, for A and for B. Two fp32 computations of an ill-conditioned
#: increment may differ by 1e-3; a wrong index or a lost term is off by far more.
TOLERANCE = 1e-2

_verdicts: dict[torch.device, bool] = {}


def compute(problems: Sequence[Problem], scales: Scales) -> list[triton_backend.Execution] | None:
    """Return the kernels' executions for problems on one device, or None where the reference has to take them."""
    device = problems[0].pair.lora_A.device
    verdict = _verdicts.get(device)
    if verdict is not None:
        return triton_backend.compute(problems, scales) if verdict else None
    try:
        executions = triton_backend.compute(problems, scales)
        errors = disagreement(executions, scales)
    except Exception as error:  # whatever the compiler or the driver raises, the reference still works
        _distrust(device, f"{type(error).__name__}: {error}")
        return None
    if errors is None:
        return executions
    if not max(errors) <= TOLERANCE:
        _distrust(device, f"their first step is off by {max(errors):.1e} from the reference's")
        return None
    _verdicts[device] = True
    return executions


def disagreement(executions: Sequence[triton_backend.Execution], scales: Scales) -> tuple[float, float] | None:
    """Return the relative error of all steps of A and of B; None where the reference's are zero or not finite.

    Waits for the device, and costs one step of the reference.
    """
    sums = torch.zeros(2, 2, dtype=torch.float64)
    groups: dict[tuple[object, ...], list[tuple[Problem, tuple[Tensor, Tensor]]]] = {}
    for execution in executions:
        for problem, steps in zip(execution.problems, execution.increments(), strict=True):
            groups.setdefault(problem.key, []).append((problem, steps))
    for group in groups.values():
        problems = [problem for problem, _ in group]
        spectral = problems[0].options.step == "spectral"
        update = spectral_updates([problems], scales)[0] if spectral else reference_update(problems, scales)
        for i, (_, (step_B, step_A)) in enumerate(group):
            for side, (got, want) in enumerate(((step_A, update.step_A[i]), (step_B, update.step_B[i]))):
                sums[side, 0] += float((got.double() - want.double()).square().sum())
                sums[side, 1] += float(want.double().square().sum())
    if not bool(torch.isfinite(sums[:, 1]).all()) or not bool(sums[:, 1].any()):
        return None  # a warm-up that starts at lr = 0, or a step that will be skipped, proves nothing
    error_A, error_B = (float((error / total).sqrt()) if total > 0 else float(error) for error, total in sums)
    return error_A, error_B


def _distrust(device: torch.device, reason: str) -> None:
    _verdicts[device] = False
    warnings.warn(
        f"psilora: the Triton kernels are not used on {device}: {reason}. The reference backend takes over; please "
        "report this with the output of `python -m psilora.doctor`",
        stacklevel=6,
    )
