"""Warnings about what an optimizer meets while it runs, each given once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from psilora import runtime
from psilora.adapters.pair import LoRAPair, listed
from psilora.monitor.standstill import FROZEN
from psilora.monitor.trainer_rate import say_ignored_rate
from psilora.param_groups.others import too_many

IDLE_STEPS = 2
#: The same before the first gradient, where one step is often taken for a schedule or to create state.
IDLE_START = 3
#: Steps in a row without a gradient in some pairs, while others have one, after which they are named: experts and
#: adapters that take turns may wait for a few.
STILL_STEPS = 20
#: An AdamW rate is taken for a LoRA rate where it is more than this many times what it was built with, the ratio of the
#: two has changed by more than as much, …
RATE_RAISED = 2.0
#: … and the two rates are at most this factor apart.
RATES_ALIKE = 1.5


class Notices:
    """What one optimizer has seen and said.

    Args:
        groups: Its param groups as they were built.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]] = ()) -> None:
        self._built = [_rate(group) for group in groups]
        self._begun = False
        self._watching = True  # whether the rates have not been warned about yet
        self._idle, self._started = 0, False  # steps in a row without a gradient in any pair, and whether one had any
        self._blind: set[str] = set()
        self._halved: set[str] = set()
        self._waiting: dict[int, int] = {}  # steps in a row without a gradient, by id of a pair
        self._moved: set[int] = set()  # the ids of those that have had one
        self._still: set[str] = set()
        self._outside: set[str] = set()

    def rebound(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Begin anew with the pairs of these groups: those there were, and perhaps more of them."""
        self._built += [_rate(group) for group in groups[len(self._built) :]]
        self._idle, self._started = 0, False
        self._waiting, self._moved = {}, set()
        for said in (self._blind, self._halved, self._still):
            said.clear()

    def begin(self, lr: float | Tensor) -> None:
        """At the first step, say where a Trainer's rate is not used because this is."""
        if not self._begun and not torch.compiler.is_compiling():
            self._begun = True
            say_ignored_rate(lr)

    def outside(self, pairs: Sequence[LoRAPair], unsaid: Mapping[str, nn.Parameter]) -> None:
        """Warn where AdamW trains more numbers than the pairs have, once for each of these, which nobody asked for."""
        message = too_many(sum(p.lora_A.numel() + p.lora_B.numel() for p in pairs), unsaid)
        if message is not None and _first_time(list(unsaid), self._outside):
            runtime.warn(message)

    def trained(self, some: bool, still: Sequence[LoRAPair], why: Callable[[LoRAPair, bool], str]) -> None:
        """Note whether a step found gradients; warn after a few in a row without any.

        Args:
            some: Whether it did.
            still: Pairs that it leaves alone.
            why: As in `partly`.
        """
        if some:
            self._idle, self._started = 0, True
            return
        self._idle += 1
        limit = IDLE_STEPS if self._started else IDLE_START
        if self._idle == limit:
            reasons = self._reasons(still, why)
            frozen = all(reason.startswith(FROZEN) for reason in reasons.values())
            advice = "" if frozen else "; after a change of adapters call optimizer.rebind()"
            runtime.warn(f"no gradient in any LoRA pair for {limit} steps, in {_with(reasons)}{advice}")

    def _reasons(self, still: Sequence[LoRAPair], why: Callable[[LoRAPair, bool], str]) -> dict[str, str]:
        """Why pairs stand still, by name."""
        return {pair.name: why(pair, id(pair) in self._moved) for pair in still}

    def partly(
        self, moving: Sequence[LoRAPair], still: Sequence[LoRAPair], why: Callable[[LoRAPair, bool], str]
    ) -> None:
        """Warn, once for each, about pairs that have had no gradient for a while in which others had.

        Args:
            moving: Pairs that a step trains.
            still: Those that it leaves alone.
            why: Says for a pair, and whether it has been trained before, why it stands still.
        """
        if not moving:
            return
        self._moved.update(map(id, moving))
        self._waiting = {id(pair): self._waiting.get(id(pair), 0) + 1 for pair in still}
        due = [pair for pair in still if self._waiting[id(pair)] == STILL_STEPS and pair.name not in self._halved]
        new = set(_first_time([pair.name for pair in due], self._still))
        if new:
            reasons = self._reasons([pair for pair in due if pair.name in new], why)
            runtime.warn(
                f"no gradient for {STILL_STEPS} steps, while other LoRA pairs are trained, in {_with(reasons)}"
            )

    def rates(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Warn, once, where a schedule has set an AdamW group to a LoRA group's rate.

        Schedules of absolute rates (OneCycleLR's max_lr, CosineAnnealingLR's eta_min) set all groups to one; those of
        factors leave the ratios as they were built. Rates in tensors are not looked at: they may be on a device.
        """
        if not self._watching:
            return
        rates = [(group["kind"], _rate(group), built) for group, built in zip(groups, self._built, strict=True)]
        known = [(kind, now, built) for kind, now, built in rates if now is not None and built is not None]
        raised = [(now, built) for kind, now, built in known if kind != "lora" and now > RATE_RAISED * built]
        for now, built in raised:
            for lora, first in ((rate, first) for kind, rate, first in known if kind == "lora"):
                alike = lora <= RATES_ALIKE * now and now <= RATES_ALIKE * lora
                changed = now * first > RATE_RAISED * built * lora or RATE_RAISED * now * first < built * lora
                if alike and changed:
                    self._watching = False
                    each = ", ".join("…" if rate is None else f"{rate:g}" for rate in self._built)
                    runtime.warn(
                        f"AdamW's param group has lr={now:g} beside a LoRA group's {lora:g}; they were built with "
                        f"{built:g} and {first:g}. A schedule with one absolute rate sets every group to it: give it a "
                        f"list in the order of param_groups, as in OneCycleLR(optimizer, max_lr=[{each}]), or take one "
                        "that multiplies the rates, such as LambdaLR"
                    )
                    return

    def halved(self, names: Sequence[str]) -> None:
        """Warn about the layers, of these names, with a gradient for one factor only, once for each."""
        new = _first_time(names, self._halved)
        if new:
            runtime.warn(
                "a pair is not trained while one of its factors has no gradient, as when lora_A or lora_B is frozen: "
                f"{listed(new)}"
            )

    def without_activations(self, names: Sequence[str]) -> None:
        """Warn about the layers, of these names, that have not been named before."""
        new = _first_time(names, self._blind)
        if new:
            runtime.warn(
                "gradients without captured activations (a fused or compiled kernel bypasses lora_A and lora_B, or "
                f"the optimizer was detached); using the tangent gradient for {listed(new)}"
            )


def _rate(group: Mapping[str, Any]) -> float | None:
    """The rate of a param group, None where it is a tensor."""
    rate = group["lr"]
    return None if isinstance(rate, Tensor) else float(rate)


def _with(reasons: Mapping[str, str]) -> str:
    return listed([f"{name} ({reason})" for name, reason in reasons.items()])


def _first_time(names: Sequence[str], said: set[str]) -> list[str]:
    """The names that have not been said yet; adds them to those that have."""
    new = [name for name in names if name not in said]
    said.update(new)
    return new
