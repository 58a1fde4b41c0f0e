"""Trainable parameters that are not LoRA factors (heads, norms, biases): torch's AdamW over shared groups and state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from psilora.distributed.sharding import is_sharded, local
from psilora.options.checks import at_least, check_rate, rate, two_betas

KIND = "adamw"
_FUSED_DEVICES = ("cpu", "cuda")


def check_adamw(settings: Mapping[str, Any], prefix: str = "") -> None:
    """Raise ValueError for a setting of AdamW that is out of range, named with `prefix`; waits for an lr's device."""
    if "lr" in settings:
        rate(f"{prefix}lr", settings["lr"])
        check_rate(settings["lr"], f"{prefix}lr")
    if "betas" in settings:
        two_betas(f"{prefix}betas", settings["betas"])
    for name in ("eps", "weight_decay"):
        if name in settings:
            at_least(f"{prefix}{name}", settings[name], 0)


def adamw_group(
    parameters: Sequence[nn.Parameter],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> dict[str, Any]:
    """Return a param group with every key `torch.optim.AdamW` reads, of settings that `check_adamw` has seen.

    Fused where the devices allow it, because the fused kernel takes the decision to skip a step from the device; on
    CUDA also `capturable`, without which torch refuses to capture a step in a graph.
    """
    fused = all(p.device.type in _FUSED_DEVICES and p.is_floating_point() and not is_sharded(p) for p in parameters)
    optimizer = torch.optim.AdamW(
        parameters,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        maximize=maximize,
        fused=fused or None,
        capturable=fused and all(p.device.type == "cuda" for p in parameters),
    )
    return {**optimizer.param_groups[0], "kind": KIND}


class AuxAdamW:
    """torch.optim.AdamW that works directly on the groups and the state of the optimizer which owns it."""

    def __init__(self, owner: torch.optim.Optimizer) -> None:
        self._adamw: torch.optim.AdamW | None = None
        self.link(owner)

    def link(self, owner: torch.optim.Optimizer) -> None:
        """Share the owner's AdamW groups and state; to be repeated whenever the owner replaces them."""
        groups = [group for group in owner.param_groups if group["kind"] == KIND]
        if not groups:
            self._adamw = None
            return
        if self._adamw is None:
            self._adamw = torch.optim.AdamW([torch.zeros(1, device="cpu")])
        self._adamw.param_groups = groups
        self._adamw.state = owner.state

    @property
    def gradients(self) -> list[Tensor]:
        """The gradients present."""
        if self._adamw is None:
            return []
        return [p.grad for group in self._adamw.param_groups for p in group["params"] if p.grad is not None]

    def step(self, ok: Tensor, clip: Tensor | None) -> None:
        """Take AdamW's step with gradients times `clip` (0-d, None for 1) where `ok` (0-d bool), else nothing.

        With fused groups both stay on the device; a device without the fused kernel waits for `ok`.
        """
        if self._adamw is None or not self.gradients:
            return
        if all(group["fused"] for group in self._adamw.param_groups):
            self._adamw.found_inf = (~ok).float()  # type: ignore[attr-defined]
            self._adamw.grad_scale = None if clip is None else (1 / clip).float()  # type: ignore[attr-defined]
        elif not bool(ok):
            return
        elif clip is not None:
            torch._foreach_mul_([local(grad) for grad in self.gradients], clip)
        try:
            self._adamw.step()
        except RuntimeError:  # out of memory while torch creates state, piece by piece
            state = self._adamw.state
            for group in self._adamw.param_groups:
                for parameter in group["params"]:
                    if parameter in state and "exp_avg_sq" not in state[parameter]:
                        del state[parameter]
            raise
