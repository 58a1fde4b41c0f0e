"""What an optimizer says of itself: its pairs, what it holds, which code ran, what its steps did."""

from __future__ import annotations

from psilora.capture.record import Captured
from psilora.lifecycle import Lifecycle
from psilora.monitor.summary import PairInfo, pair_infos, summary


class Reporting(Lifecycle):
    """The part of `psilora.PSILoRA` that answers questions and changes nothing."""

    def captured(self) -> list[Captured]:
        """Return what is held of X and S of every pair since the last step, in the order of `pairs`; copies nothing."""
        return [self._capture.held(pair) for pair, _ in self._options()]

    def capture_bytes(self) -> int:
        """Return the bytes held for the next step beside `.grad`; storage shared between layers is counted once."""
        return self._capture.nbytes()

    def gradients(self) -> dict[str, str]:
        """Return how each captured pair's gradient is kept now: "exact", "dense", "backward" or "tangent"."""
        return self._planner.gradients()

    def pairs(self) -> list[PairInfo]:
        """Return the LoRA pairs in order: names, shapes, scaling, parameters, and how the gradient of each is known."""
        return pair_infos(self._options(), self.gradients())

    def summary(self) -> str:
        """Return in words what trains with what, how many numbers, and their bytes."""
        return summary(self.pairs(), self.param_groups, self.backend, self.backends())

    def __repr__(self) -> str:
        return self.summary()

    def backends(self) -> list[str]:
        """Return which backend has taken how many pairs in the last step and, of the reference, why; [] before."""
        return list(self._taken)

    def observe_next_step(self) -> None:
        """Have the next step compute the figures of `psilora.monitor.observer.Observer`; costs about a step."""
        self._observer.request()

    def stats(self) -> dict[str, float]:
        """Return the counts of skipped steps and repaired pivots, and the figures of the last observed step, if any.

        Waits for the device. Which backend has taken the last step says `backends`.
        """
        return {**self._counters.read(), **self._observer.read()}
