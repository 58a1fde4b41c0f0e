"""The suites: each module's `run(settings)` returns the rows of one results file."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Settings:
    """What the command line chooses; a suite takes what concerns it.

    Attributes:
        models: Names from `bench.shapes`; None for a suite's own choice on this device.
        tokens: N; None likewise.
        seconds: Time for one case's rounds.
        small: The smallest sizes that still exercise every line.
    """

    device: str = "cpu"
    models: tuple[str, ...] | None = None
    tokens: int | None = None
    repeats: int = 15
    seconds: float = 20.0
    small: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations: what training on the device would leave."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    def choice(self, cpu: tuple[str, ...], cuda: tuple[str, ...]) -> tuple[str, ...]:
        """Return the models asked for, or the suite's own."""
        if self.models is not None:
            return self.models
        return ("tiny",) if self.small else (cuda if self.device == "cuda" else cpu)
