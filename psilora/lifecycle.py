"""What an optimizer holds of its model: pairs, param groups and hooks, and how they follow when adapters change."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from psilora import runtime
from psilora.adapters.model import Models, check_model, joined
from psilora.adapters.pair import LoRAPair
from psilora.backends.triton.backend import Backends
from psilora.capture.policy import Planner
from psilora.distributed.communicator import Communicator
from psilora.distributed.sharding import is_sharded, refuse_sharded
from psilora.monitor.counters import Counters
from psilora.monitor.observer import Observer
from psilora.monitor.warn_once import Notices
from psilora.options import Options, as_group, resolved
from psilora.param_groups.adamw import AuxAdamW
from psilora.param_groups.bind import Recipe, Slot, regroup
from psilora.param_groups.lora import Settings, check_pair, pair_options
from psilora.param_groups.others import added_group
from psilora.steps.assemble import Assembler
from psilora.steps.carry import carry_over
from psilora.steps.controller import SlopeController
from psilora.steps.counts import refuse_unshared
from psilora.steps.state import named


class Lifecycle(torch.optim.Optimizer):
    """The part of `psilora.PSILoRA` that knows the model: it finds the pairs, hooks them, and finds them again.

    Before `__init__` the optimizer has set backend, norm, communicator, `_slope` (whether the controller "slope" is
    wanted) and `_planned` (tokens and capture_budget).
    """

    backend: str
    norm: str
    communicator: Communicator
    _slope: bool
    _planned: tuple[int | None, float | None]

    def __init__(self, model: Models, recipe: Recipe) -> None:
        found = check_model(joined(model), sharded=True)
        self._joined = found if found is not model else None  # several models: nobody else holds them as one
        self._model: weakref.ref[nn.Module] | None = weakref.ref(found)
        self._recipe = recipe
        bound = recipe.bind(found)
        self._slots: list[Slot] = list(bound.groups)
        self._constructed = False
        super().__init__(list(bound.groups.values()), as_group(resolved(recipe.settings)))
        self._strip()
        self._constructed = True
        self._others = AuxAdamW(self)
        self._counters = Counters(bound.pairs[0].lora_A.device)
        self._observer = Observer()
        self._notices = Notices(self.param_groups)
        self._notices.outside(bound.pairs, bound.unsaid)
        self._attach(bound.pairs, bound.outside, self._plan(bound.pairs, self.param_groups))

    def _strip(self) -> None:
        """Take from AdamW's groups the settings of pairs, which torch has put there as defaults."""
        for group in self.param_groups:
            if group["kind"] != "lora":
                for name in set(as_group(self._recipe.settings)) - {"lr", "weight_decay", "maximize"}:
                    group.pop(name, None)

    def _plan(self, pairs: Sequence[LoRAPair], groups: Sequence[Mapping[str, Any]]) -> Planner:
        """Return how the gradients of these pairs, in these param groups, are known; change nothing.

        Raises:
            ValueError: Their settings do not fit them.
        """
        settings = pair_options(groups, {id(pair.lora_A): pair for pair in pairs})
        for pair, options in settings:
            check_pair(pair, options)
        refuse_unshared(settings, self.communicator.world_size)
        refuse_sharded(settings, "slope" if self._slope else None)
        if self.norm == "full" and any(o.gradient == "backward" and o.captures for _, o in settings):
            raise ValueError("norm='full' needs G, of which gradient='backward' keeps nothing; use gradient='dense'")
        if self.backend != "reference" and self._counters.values.is_cuda and _any_sharded(groups):
            runtime.warn("the reference backend takes the steps: the kernels take no factors that are sharded")
        return Planner(settings, *self._planned)

    def _attach(self, pairs: Sequence[LoRAPair], outside: Mapping[str, nn.Parameter], planner: Planner) -> None:
        """Take these pairs and other parameters, which are in the param groups, for what is trained; hook the pairs."""
        self._pairs = {id(pair.lora_A): pair for pair in pairs}
        self._outside = {id(p): name for name, p in outside.items()}
        self._settings, self._assembler = Settings(self._pairs), Assembler()
        self._controller = SlopeController(pairs) if self._slope else None
        self._others.link(self)
        self._backends: Backends = {}
        self._taken: list[str] = []
        self._sharded = _any_sharded(self.param_groups)
        if self._sharded:  # the kernels recognise factors that have not changed by their tensors, which are new here
            self.backend = "reference"
        self._planner = planner
        self._capture = planner.capture()

    def _options(self) -> list[tuple[LoRAPair, Options]]:
        """Every pair with the current settings of its group; the same list while they are the same."""
        return self._settings.read(self.param_groups)

    def _names(self) -> list[list[str]]:
        """What each param group trains."""
        return named(self.param_groups, self._pairs, self._outside)

    def _known_model(self) -> nn.Module | None:
        """The model, or several as one; None once it is gone."""
        return None if self._model is None else self._model()

    def rebind(self, model: Models | None = None, *, reset: bool = False) -> list[str]:
        """Look for the pairs again, after adapters were added, merged, replaced or given another rank.

        Groups, their current rates and whatever schedules them stay; the entries of `groups` hold for new layers too. A
        pair whose factors are still the same parameters of the same shapes keeps its state, every other one begins
        anew. Hooks move to the pairs that there are now. A group that did not exist is appended: a scheduler made
        before that does not know it. With several processes all must call it.

        Args:
            model: The model, where it is another object than before; None for the one that the optimizer was built on.
            reset: Forget the state of every pair, as after ReLoRA's merge, which leaves the parameters where they are.

        Returns:
            The names of the pairs that begin anew.

        Raises:
            RuntimeError: `model` is None, and that of before is gone.
            ValueError: No pair is found, or settings do not fit; nothing has been changed.
        """
        given = model
        if model is None:
            model = self._known_model()
            if model is None:
                raise RuntimeError("the model that the optimizer was built on is gone; call rebind(model)")
        found = check_model(joined(model), sharded=True)
        bound = self._recipe.bind(found, strict=False)
        groups = regroup(bound, self._slots, self.param_groups, self._recipe)
        planner = self._plan(bound.pairs, [group for _, group in groups])
        added = {id(p) for slot, group in groups if slot[0] == "added" for p in group["params"]}
        self._notices.outside(bound.pairs, {n: p for n, p in bound.unsaid.items() if id(p) not in added})
        numbers = None if self._controller is None else self._controller.kept(self.state)
        if given is not None:  # from here on nothing is refused
            self._joined, self._model = (found if found is not given else None), weakref.ref(found)
        self._capture.close()
        there = len(self.param_groups)
        for old, (_, new) in zip(self.param_groups, groups[:there], strict=True):
            old.update(new)
        for slot, group in groups[there:]:
            self._append(slot, group)
        others = [p for group in self.param_groups if group["kind"] != "lora" for p in group["params"]]
        names = {id(p): name for name, p in bound.outside.items()}
        self._attach(bound.pairs, {names.get(id(p), self._outside.get(id(p), "")): p for p in others}, planner)
        anew = carry_over(self.state, self._options(), others, reset=reset)
        if self._controller is not None and numbers is not None:
            self._controller.adopt(numbers, self.state)
        self._notices.rebound(self.param_groups)
        return anew

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more parameters outside the LoRA pairs with AdamW, e.g. a layer unfrozen late.

        Args:
            param_group: "params", and settings of torch's AdamW; those that it lacks are the optimizer's own.

        Raises:
            ValueError: A setting is out of range, or a parameter is complex, a LoRA factor (call `rebind()`) or trained
                already.
            TypeError: "params" holds no parameters.
        """
        if not getattr(self, "_constructed", False):
            super().add_param_group(param_group)
            return
        names, group = added_group(param_group, self._recipe.adamw, self._known_model())
        self._append(("added", 0), group)
        self._outside |= names
        self._others.link(self)
        self._notices.rebound(self.param_groups)

    def _append(self, slot: Slot, group: dict[str, Any]) -> None:
        self._constructed = False
        try:
            super().add_param_group(group)
        finally:
            self._constructed = True
        self._slots.append(slot)
        self._strip()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients and drop what was captured for them."""
        super().zero_grad(set_to_none)
        self._capture.clear(reset=True)

    def detach(self) -> None:
        """Remove every hook from the model and drop what was captured."""
        self._capture.close()

    @contextlib.contextmanager
    def trial(self) -> Iterator[None]:
        """Forget at the end what the steps within have decided for later ones: how gradient="auto" keeps gradients."""
        planner, choices = self._planner, self._planner.choices
        try:
            yield
        finally:
            planner.restore(choices, self._capture)

    def __setstate__(self, state: dict[str, Any]) -> None:
        parts = state.get("_parts")
        super().__setstate__({key: value for key, value in state.items() if key != "_parts"})
        if parts is None:  # of torch's load_state_dict
            self._others.link(self)
            return
        self._others = AuxAdamW(self)
        self._notices = Notices(self.param_groups)
        self._observer = Observer()
        self.communicator = Communicator()
        pairs, outside = parts
        self._attach(pairs, outside, self._plan(pairs, self.param_groups))

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy is made of: one that holds no hooks, and no processes of its own.

        The copied layers' modules come along, so that the copy steps on them; copy model and optimizer in one call for
        an optimizer of the copied model, `copy.deepcopy((model, optimizer))`. It has forgotten the model as a whole:
        `rebind` needs it. As with torch's optimizers, hooks of `register_…` and what a scheduler puts around `step` are
        left out.

        Raises:
            TypeError: There are hooks on the model, or a process group.
        """
        if self._capture.attached or self.communicator.group is not None:
            raise TypeError(
                "a PSILoRA that captures (step='gradient') holds hooks on its model, or a process group, and cannot be "
                "copied or pickled; use state_dict()"
            )
        rebuilt = {"_pairs", "_outside", "_controller", "_others", "_backends", "_planner", "_capture", "_notices"}
        rebuilt |= {"_settings", "_assembler", "_taken", "_observer", "communicator"}
        kept = {k: v for k, v in self.__dict__.items() if k not in rebuilt and not _attached(type(self), k)}
        names = {name: p for group in self.param_groups for p in group["params"] if (name := self._outside.get(id(p)))}
        return {**kept, "_model": None, "_joined": None, "_parts": (list(self._pairs.values()), names)}


def _attached(cls: type, name: str) -> bool:
    """Whether others have put this attribute onto an instance: in place of a method, or through torch ("_opt…")."""
    return callable(getattr(cls, name, None)) or name.startswith("_opt")


def _any_sharded(groups: Sequence[Mapping[str, Any]]) -> bool:
    return any(is_sharded(p) for group in groups for p in group["params"])
