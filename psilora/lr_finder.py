"""A learning-rate range test: train for some steps at a growing rate, look where the loss falls, and undo it all."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from psilora.checkpoint import generators, set_generators

#: How much of the running mean of the losses each new one is not.
SMOOTHING = 0.9
#: The sweep ends where the smoothed loss exceeds this times the lowest so far.
DIVERGED = 2.0
#: The suggestion, relative to the rate at which the smoothed loss was lowest. The best tuned rates of runs that decay
#: lay at 0.17 to 0.9 of it for the spectral step on four tasks, and at twice it for AdamW on one.
SHARE = 0.4


@dataclass(frozen=True)
class LRSweep:
    """What a range test has seen.

    Attributes:
        lrs: The rate of the first param group in each step, rising by a constant factor.
        losses: The loss of each step's batch before the step; the last may be infinite or NaN.
        smoothed: Their exponential mean, corrected for its start, in steps with a finite loss.
    """

    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]

    def suggestion(self) -> float:
        """Return 0.4 times the rate at which the smoothed loss was lowest, to two digits: right to a factor of 4 or so.

        Raises:
            ValueError: The loss never fell below its start by more than rounding, so there is nothing to suggest.
        """
        best = min(range(len(self.smoothed)), key=self.smoothed.__getitem__, default=0)
        if not self.smoothed or not self.smoothed[best] < self.smoothed[0]:
            raise ValueError(
                f"the loss did not fall at any rate from {self.lrs[0]:.2g} to {self.lrs[-1]:.2g}; "
                "try lower ones, more steps or larger batches"
            )
        return float(f"{SHARE * self.lrs[best]:.2g}")

    def plot(self, ax: Any = None) -> Any:
        """Draw losses and suggestion over the rate, on a matplotlib Axes that is made if none is given; return it."""
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots()[1]
        ax.plot(self.lrs, self.losses, alpha=0.3, label="loss of a batch")
        ax.plot(self.lrs[: len(self.smoothed)], self.smoothed, label="smoothed")
        with contextlib.suppress(ValueError):
            ax.axvline(self.suggestion(), color="black", linestyle="--", label=f"suggestion {self.suggestion():.2g}")
        ax.set(xscale="log", xlabel="learning rate", ylabel="loss")
        ax.legend()
        return ax


def lr_find(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    loss_of: Callable[[Any], Tensor],
    batches: Iterable[Any],
    *,
    low: float = 1e-4,
    high: float = 1.0,
    steps: int = 100,
) -> LRSweep:
    """Train at rates that grow from `low` to `high`, and put everything back as it was.

    In step k = 0 … steps − 1 the first param group has the rate low·(high/low)^(k/(steps − 1)) (L. N. Smith,
    arXiv 1506.01186), the other groups the same multiple of theirs. The sweep ends early where the smoothed loss
    doubles. Parameters, buffers, the optimizer's state, its rates and the random numbers of torch, Python and numpy are
    restored, also after an error; gradients are cleared, and batches of an iterator are gone. What is read off is a
    start: it comes from the loss of a hundred steps, not of a training run.

    Args:
        optimizer: Any torch optimizer of the model's parameters, with rates above 0.
        model: The model.
        loss_of: Returns the loss, a 0-d tensor, of a batch.
        batches: Batches; taken again from the start where there are too few.
        low: The first rate of the first group, > 0.
        high: The last, > low.
        steps: At least 2.

    Returns:
        The sweep: `.suggestion()` is a rate, `.plot()` a picture.

    Raises:
        ValueError: A setting is out of range, or there is no batch.
    """
    if not 0 < low < high < math.inf:
        raise ValueError(f"Invalid low={low}, high={high}. Must be 0 < low < high < inf.")
    if steps < 2:
        raise ValueError(f"Invalid steps={steps}. Must be >= 2.")
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    if not all(rate > 0 for rate in rates):
        raise ValueError(f"Invalid rates {rates} of the param groups. Must be > 0, as the sweep multiplies them.")
    lrs, losses, smoothed = [], [], []
    mean, lowest = 0.0, math.inf
    source = cycle(batches) if not isinstance(batches, Iterator) else batches
    with _undone(optimizer, model):
        for k in range(steps):
            batch = next(source, _NONE)
            if batch is _NONE:
                if k == 0:
                    raise ValueError("there is no batch to train on")
                break
            lr = low * (high / low) ** (k / (steps - 1))
            _set_rates(optimizer, [rate * lr / rates[0] for rate in rates])
            optimizer.zero_grad()
            loss = loss_of(batch)
            value = float(loss.detach())
            lrs.append(lr)
            losses.append(value)
            if not math.isfinite(value):
                break
            mean = SMOOTHING * mean + (1 - SMOOTHING) * value
            smoothed.append(mean / (1 - SMOOTHING ** (k + 1)))
            lowest = min(lowest, smoothed[-1])
            if smoothed[-1] > lowest + (DIVERGED - 1) * abs(lowest):
                break
            loss.backward()
            optimizer.step()
    return LRSweep(tuple(lrs), tuple(losses), tuple(smoothed))


_NONE = object()


def _set_rates(optimizer: torch.optim.Optimizer, rates: Sequence[float]) -> None:
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


@contextlib.contextmanager
def _undone(optimizer: torch.optim.Optimizer, model: nn.Module) -> Iterator[None]:
    """Restore what training changes, bit for bit."""
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    trained += [p for p in model.parameters() if p.requires_grad]
    held = {id(t): (t, t.detach().clone()) for t in (*trained, *model.buffers())}
    rates = [(group["lr"], copy.deepcopy(group["lr"])) for group in optimizer.param_groups]
    state = copy.deepcopy(optimizer.state_dict()) if optimizer.state else None
    random = generators()
    trial = getattr(optimizer, "trial", contextlib.nullcontext)  # of a PSILoRA, which decides more than its state tells
    try:
        with trial():
            yield
    finally:
        set_generators(random)
        optimizer.zero_grad()
        with torch.no_grad():
            for tensor, old in held.values():
                tensor.copy_(old)
            if state is None:
                optimizer.state.clear()
            else:
                optimizer.load_state_dict(state)
            for group, (rate, value) in zip(optimizer.param_groups, rates, strict=True):  # which loading makes anew
                group["lr"] = rate.copy_(value) if isinstance(rate, Tensor) else value
