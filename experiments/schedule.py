"""The schedule of the learning rate that all runs share."""

from __future__ import annotations

WARMUP_SHARE = 0.06


def schedule(step: int, steps: int) -> float:
    """Linear warm-up over WARMUP_SHARE of the steps, then linear decay to 0; `step` counts from 0."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    return (step + 1) / warmup if step < warmup else max(0.0, (steps - step) / max(1, steps - warmup))
