"""Events counted on the device and noticed on the host without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor

from psilora import runtime

EVENTS = ("skipped_steps", "repaired_pivots")
_MESSAGES = {
    "skipped_steps": "a step was skipped because a gradient or an update was not finite; nothing was changed by it",
    "repaired_pivots": "an r×r system was not positive definite and was repaired with a ridge; a larger prox avoids it",
}


class Counters:
    """Counts of `EVENTS`, kept on one device; each kind is warned about once."""

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(len(EVENTS), dtype=torch.int64, device=device)
        self._skipped, self._repaired = self.values.unbind()
        self._warned: set[str] = set()
        self._host: Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def add(self, skipped: Tensor, repaired: Tensor) -> None:
        """Add whether a step was skipped (0-d bool) and its repaired pivots (0-d), both on this device."""
        self._skipped.add_(skipped)
        self._repaired.add_(repaired)

    def poll(self) -> None:
        """Warn about what has newly happened: at once on the CPU; elsewhere when an earlier copy has arrived."""
        if self.values.device.type != "cuda":
            self._warn(self.values)
            return
        if len(self._warned) == len(EVENTS) or torch.cuda.is_current_stream_capturing():
            return
        if self._copied is not None and self._host is not None:
            if not self._copied.query():
                return
            self._warn(self._host)
        if self._host is None:
            self._host = torch.zeros(len(EVENTS), dtype=torch.int64, device="cpu", pin_memory=True)
        self._host.copy_(self.values, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record(torch.cuda.current_stream(self.values.device))  # where the copy is, whatever is current

    def _warn(self, values: Tensor) -> None:
        for name, value in zip(EVENTS, values.tolist(), strict=True):
            if value and name not in self._warned:
                self._warned.add(name)
                runtime.warn(f"{_MESSAGES[name]} (warned once; see optimizer.stats())")

    def read(self) -> dict[str, int]:
        """Return the counts; waits for the device."""
        return dict(zip(EVENTS, self.values.tolist(), strict=True))
