"""Warnings about what an optimizer meets while it runs, each given once."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence

from psilora.adapters import listed

IDLE_STEPS = 2


class Notices:
    """What one optimizer has seen and said."""

    def __init__(self) -> None:
        self._idle: int | None = None  # steps in a row without a gradient in any pair; None before the first with one
        self._blind: set[str] = set()

    def trained(self, some: bool) -> None:
        """Note whether a step found gradients; warn after IDLE_STEPS in a row without any, once there had been some."""
        if some:
            self._idle = 0
        elif self._idle is not None:
            self._idle += 1
            if self._idle == IDLE_STEPS:
                _warn(
                    f"no gradient in any LoRA pair for {IDLE_STEPS} steps: the adapter was replaced, merged or "
                    "disabled; after a change of adapters build a new PSILoRA"
                )

    def without_activations(self, names: Sequence[str]) -> None:
        """Warn about the layers, of these names, that have not been named before."""
        new = [name for name in names if name not in self._blind]
        self._blind.update(new)
        if new:
            _warn(
                "gradients without captured activations (a fused or compiled kernel bypasses lora_A and lora_B, or "
                f"the optimizer was detached); using the tangent gradient for {listed(new)}"
            )


def _warn(message: str) -> None:
    """Warn at the line that calls `step`, outside this package and torch's wrappers."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("psilora", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(f"psilora: {message}", stacklevel=level)
