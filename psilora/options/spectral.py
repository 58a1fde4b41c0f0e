"""The settings of a spectral step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from psilora.options.base import Options
from psilora.options.checks import flag, is_real


@dataclass(frozen=True)
class SpectralOptions(Options, step="spectral"):
    """What a step along a polar factor has beside the common settings; see `psilora.PSILoRA`."""

    automatic_metric: ClassVar[str | None] = "lora"
    default_prox: ClassVar[float] = 1e-6
    default_power: ClassVar[float] = 1.0
    default_damping: ClassVar[float] = 0.1

    nesterov: bool = True
    joint: bool = True
    fade: bool = True
    cap: float | None = 4.0
    depth_scale: float | str = "auto"

    def __post_init__(self) -> None:
        for name in ("nesterov", "joint", "fade"):
            flag(name, getattr(self, name))
        if not self.joint and self.metric is not None:
            raise ValueError(f"Invalid metric={self.metric!r}. Must be None with joint=False.")
        if self.cap is not None and not (is_real(self.cap) and self.cap >= 1):
            raise ValueError(f"Invalid cap={self.cap!r}. Must be >= 1 or None.")
        scale = self.depth_scale
        known = scale == "auto" if isinstance(scale, str) else is_real(scale) and math.isfinite(scale) and scale > 0
        if not known:
            raise ValueError(f"Invalid depth_scale={scale!r}. Must be finite and > 0, or 'auto'.")
        super().__post_init__()

    @property
    def largest(self) -> float:
        """The largest gradient norm that is taken as it is, in units of the mean."""
        return math.inf if self.cap is None else self.cap

    @property
    def follows(self) -> bool:
        """Whether the norms of the gradients are followed, to fade or to cap."""
        return self.fade or self.cap is not None

    @property
    def on_factors(self) -> bool:
        """See `Options`."""
        return not self.joint

    @property
    def factor(self) -> float:
        """What multiplies c; 1 for a pair on its own, of which "auto" has not been told the number of others."""
        return 1.0 if isinstance(self.depth_scale, str) else float(self.depth_scale)

    @property
    def structure(self) -> tuple[object, ...]:
        """See `Options`."""
        return (*super().structure, self.nesterov, self.joint, self.fade, self.follows)

    def rank_of_momentum(self, rank: int, d_out: int, d_in: int) -> int:
        """Return 2r, in which the momentum of both factors' gradients is exact; r with joint=False."""
        return 2 * rank if self.joint else rank

    @property
    def momentum_setting(self) -> str:
        """See `Options`."""
        return f"joint={self.joint}"
