"""The common factor on all gradients of a step: undoing a loss scale, and clipping by the global norm."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from psilora.distributed.sharding import is_sharded, whole
from psilora.runtime import capturing
from psilora.steps.problem import Problem, Problems


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
    pairs = Problems.of(problems) if full is None else Problems()
    plain = [g for g in others if not is_sharded(g)]
    norms = _norms([*[p.dA for p in pairs], *[p.dB for p in pairs], *plain], _groups(pairs, plain), device)
    norms += [whole(torch.linalg.vector_norm(g, dtype=torch.float64)).to(device)[None] for g in others if is_sharded(g)]
    if full is not None:
        norms.append(full.sqrt().to(device)[None])
    total = torch.linalg.vector_norm(norms[0] if len(norms) == 1 else torch.cat(norms))
    if unscale is not None:
        total = unscale * total
    clip: Tensor = _number(max_norm, device) / (total + 1e-6)
    clip = clip.clamp_(max=1.0)
    return clip if unscale is None else unscale * clip


def _number(value: float, device: torch.device) -> Tensor:
    """Return a number as 0-d float64 on a device, over which a quotient is one operation instead of two."""
    return torch.full((), value, dtype=torch.float64, device=device) if capturing(device) else _kept(value, device)


@functools.lru_cache(maxsize=16)
def _kept(value: float, device: torch.device) -> Tensor:
    return torch.full((), value, dtype=torch.float64, device=device)


Groups = list[tuple[list[int], list[float]]]


def _groups(pairs: Problems, plain: Sequence[Tensor]) -> Groups:
    """Return, for each device and dtype, the places of gradients of A, of B and plain ones, and their divisors."""
    known: dict[tuple[torch.device, torch.dtype], tuple[list[int], list[float]]] | None = pairs.prepared.get("norms")
    if known is None:
        known = pairs.prepared["norms"] = {}
        roots = [p.pair.scaling**0.5 for p in pairs]
        for place, gradient in enumerate([*(p.dA for p in pairs), *(p.dB for p in pairs)]):
            places, divisors = known.setdefault((gradient.device, gradient.dtype), ([], []))
            places.append(place)
            divisors.append(roots[place % len(pairs)])
    if not plain:
        return list(known.values())
    found = {key: (list(places), list(divisors)) for key, (places, divisors) in known.items()}
    for place, gradient in enumerate(plain, start=2 * len(pairs)):
        places, divisors = found.setdefault((gradient.device, gradient.dtype), ([], []))
        places.append(place)
        divisors.append(1.0)
    return list(found.values())


def _norms(gradients: Sequence[Tensor], groups: Groups, device: torch.device) -> list[Tensor]:
    """Return ‖gradient‖/divisor in float64, a vector for each group of places and divisors, in a few launches."""
    found = []
    for places, divisors in groups:
        members = list(gradients) if len(places) == len(gradients) else [gradients[place] for place in places]
        norms = torch._foreach_norm(members, 2, dtype=torch.float64)
        common = divisors[0] if divisors.count(divisors[0]) == len(divisors) else None
        if common is None:
            norms = torch._foreach_div(norms, divisors)
        stacked = torch.stack(norms).to(device)
        found.append(stacked if common in (None, 1.0) else stacked / common)
    return found
