"""The common factor on all gradients of a step: undoing a loss scale, and clipping by the global norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from psilora.distributed.sharding import whole
from psilora.steps.problem import Problem


def gradient_factor(
    problems: Sequence[Problem],
    others: Sequence[Tensor],
    max_norm: float | None,
    loss_scale: Tensor | None,
    device: torch.device,
    full: Tensor | None = None,
) -> Tensor | None:
    """Return 1 / `loss_scale` times min(1, `max_norm` / norm), 0-d float64 on `device`, or None for 1.

    The norm is that of all gradients after unscaling, with those of LoRA factors divided by √s, so that it does not
    depend on alpha, or replaced by the full gradients of their weights. In float64: squares of 1e20 overflow in fp32.

    Args:
        problems: The pairs that have gradients.
        others: The gradients of the parameters outside.
        max_norm: > 0, or None for no clipping.
        loss_scale: GradScaler's scale (one element), or None for 1.
        device: Where the factor is wanted; nothing waits for it.
        full: Σ‖G‖² of the pairs' weights (0-d), to take instead of the gradients of their factors.
    """
    unscale = None if loss_scale is None else 1 / loss_scale.to(device).double()
    if max_norm is None:
        return unscale
    norms = [] if full is None else [full.sqrt().to(device)]
    for p in problems if full is None else ():
        for grad in (p.dA, p.dB):
            norms.append(torch.linalg.vector_norm(grad, dtype=torch.float64).to(device) / p.pair.scaling**0.5)
    norms += [whole(torch.linalg.vector_norm(g, dtype=torch.float64)).to(device) for g in others]
    total = torch.linalg.vector_norm(torch.stack(norms))
    if unscale is not None:
        total = unscale * total
    clip: Tensor = max_norm / (total + 1e-6)
    clip = clip.clamp(max=1.0)
    return clip if unscale is None else unscale * clip
