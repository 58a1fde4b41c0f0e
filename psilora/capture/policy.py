"""gradient="auto": how each layer's gradient is kept, from its shape, the rows of a step and a memory budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from psilora import runtime
from psilora.adapters.pair import LoRAPair, describe, mebibytes
from psilora.capture.hooks import Capture
from psilora.capture.storage import HOLDS
from psilora.linalg.precision import compute_dtype
from psilora.options.base import Options
from psilora.options.checks import above_zero, integer


@dataclass(frozen=True)
class Choice:
    """How one pair's gradient is kept.

    Attributes:
        gradient: "exact" (X and S), "dense" (SᵀX) or "tangent" (nothing).
        bytes: What that holds from backward to step.
        reason: Why, in numbers.
    """

    gradient: str
    bytes: int
    reason: str


def choose(
    pairs: Sequence[LoRAPair], rows: int | Sequence[int], budget: float | None, itemsize: int | None = None
) -> list[Choice]:
    """Return a choice per pair for `rows` = N rows per step: tokens, or output positions of a convolution.

    X and S take N·(d_in + d_out)·itemsize bytes, a dense gradient 4·d_out·d_in (8 each for fp64): the smaller one is
    taken, both being exact. While the sum exceeds `budget` bytes, the layer that holds most falls back to the tangent
    gradient. X shared by q, k and v is counted for each, so the sum is an upper bound.

    Args:
        pairs: The pairs, of any shapes.
        rows: N, in this process; one number for all pairs, or one for each.
        budget: Bytes, or None for no limit.
        itemsize: Bytes per number of X and S; None for that of lora_B.
    """
    counts = [rows] * len(pairs) if isinstance(rows, int) else rows
    chosen = [_smallest(p, n, itemsize or p.lora_B.element_size()) for p, n in zip(pairs, counts, strict=True)]
    total = sum(choice.bytes for choice in chosen)
    if budget is None:
        return chosen
    for i in sorted(range(len(chosen)), key=lambda i: -chosen[i].bytes):
        if total <= budget:
            break
        total -= chosen[i].bytes
        held, most = mebibytes(chosen[i].bytes), mebibytes(budget)
        what = f"{chosen[i].gradient} would hold {held}, and all layers more than {most}"
        chosen[i] = Choice("tangent", 0, what)
    return chosen


def _smallest(pair: LoRAPair, rows: int, itemsize: int) -> Choice:
    captured = rows * (pair.d_in + pair.d_out) * itemsize
    dense = pair.d_in * pair.d_out * compute_dtype(pair.lora_A.dtype).itemsize
    if captured <= dense:
        return Choice("exact", captured, f"X and S of {rows} rows hold {mebibytes(captured)}, SᵀX {mebibytes(dense)}")
    return Choice("dense", dense, f"SᵀX holds {mebibytes(dense)}, X and S of {rows} rows {mebibytes(captured)}")


class Planner:
    """What each captured pair of an optimizer holds, fixed by its `gradient` setting or chosen for "auto".

    Without a declared number of rows "auto" begins with X and S, of convolutions with SᵀX, and chooses after the first
    step from the rows that each layer saw.
    With several processes it takes their mean, and the adapters' dtype for that of X and S, so that all choose alike:
    under autocast this counts up to twice what is held.

    Args:
        settings: All pairs with their options; those that need captures and can give them are hooked.
        tokens: N, rows per step in a process, or None.
        budget: Bytes for all pairs under "auto", or None.

    Raises:
        ValueError: `tokens` or `budget` is out of range, or a metric needs activations that cannot be captured.

    Attributes:
        choices: By pair name, for the pairs under "auto"; empty while undecided.
    """

    def __init__(self, settings: Sequence[tuple[LoRAPair, Options]], tokens: int | None, budget: float | None) -> None:
        if tokens is not None:
            integer("tokens", tokens, 1)
        above_zero("capture_budget", budget)
        self.settings = _capturable(settings)
        self._checked: Sequence[tuple[LoRAPair, Options]] | None = None  # a list that is not changed
        self._built = {id(pair): (options, options.hooks) for pair, options in settings}
        self.tokens, self.budget = tokens, budget
        self.choices: dict[str, Choice] = {}
        self._auto = [pair for pair, options in self.settings if options.gradient == "auto"]
        if tokens is not None:
            self._choose(tokens)

    def _choose(self, rows: int | Sequence[int]) -> None:
        chosen = choose(self._auto, rows, self.budget)
        self.choices = {pair.name: choice for pair, choice in zip(self._auto, chosen, strict=True)}

    def gradients(self) -> dict[str, str]:
        """Return "exact", "dense", "backward" or "tangent" by pair name, as it is now."""
        now = {}
        for pair, options in self.settings:
            choice = self.choices.get(pair.name)
            undecided = "exact" if pair.convolution is None else "dense"  # patches repeat the input ∏k times
            now[pair.name] = (
                options.gradient if options.gradient != "auto" else choice.gradient if choice else undecided
            )
        return now

    def check(self, settings: Sequence[tuple[LoRAPair, Options]]) -> None:
        """Raise ValueError, by layer, if these settings need other captures than those that the pairs were hooked for.

        Changed in a param group, or loaded, they would take another gradient than the one they name.
        """
        if settings is self._checked:
            return
        known, hooks = None, None
        for pair, options in settings:
            if options is not known:  # that of a whole group
                known, hooks = options, options.hooks
            built, attached = self._built[id(pair)]
            if hooks != attached and (pair.uncaptured is None or options.metric is not None):
                raise ValueError(
                    f"{pair.name}: {_named(options)} needs other captures than {_named(built)}, with which the "
                    "optimizer was built; build it with the settings that it is to use or to load"
                )
        self._checked = settings

    def capture(self) -> Capture:
        """Hook the pairs, each to hold what its gradient needs."""
        holds = [HOLDS[gradient] for gradient in self.gradients().values()]
        sums = [_sums(options, kind) for (_, options), kind in zip(self.settings, holds, strict=True)]
        return Capture([pair for pair, _ in self.settings], holds, sums)

    @property
    def waiting(self) -> bool:
        """Whether a choice is still to be made."""
        return bool(self._auto) and not self.choices

    def observe(self, capture: Capture, rows: Mapping[int, int]) -> None:
        """Choose, if that is still to be done, after a step; captures of that step are dropped.

        Args:
            capture: Holds what was captured for the step.
            rows: N by id of the pair; one that did not run is taken to see as many as the longest.
        """
        most = max(rows.values(), default=0)
        if not self.waiting or most == 0:
            return
        self._choose([rows.get(id(pair), 0) or most for pair in self._auto])
        self._apply(capture)

    def restore(self, choices: dict[str, Choice], capture: Capture) -> None:
        """Take up choices of before, or none; what was captured by others is dropped."""
        if choices != self.choices:
            self.choices = choices
            self._apply(capture)

    def _apply(self, capture: Capture) -> None:
        capture.clear()
        for (pair, options), gradient in zip(self.settings, self.gradients().values(), strict=True):
            record = capture.record(pair)
            if record is not None:
                record.hold(HOLDS[gradient], _sums(options, HOLDS[gradient]))


def _capturable(settings: Sequence[tuple[LoRAPair, Options]]) -> list[tuple[LoRAPair, Options]]:
    """The pairs whose settings need activations and that can give them; says which cannot."""
    wanted = [(pair, options) for pair, options in settings if options.captures is not None]
    blind = [pair for pair, _ in wanted if pair.uncaptured is not None]
    metric = [pair for pair, options in wanted if pair.uncaptured is not None and options.metric is not None]
    if metric:
        raise ValueError(
            f"the metric needs activations that cannot be captured for {describe(metric)}; "
            "set metric=None for these layers through `groups`"
        )
    if blind:
        runtime.warn(f"using the tangent gradient (from .grad alone) for {describe(blind)}")
    return [(pair, options) for pair, options in wanted if pair.uncaptured is None]


def _named(options: Options) -> str:
    return f"step={options.step!r}, gradient={options.gradient!r}, metric={options.metric!r}"


def _sums(options: Options, holds: str) -> str | None:
    """Which sums K-FAC needs because the rows are not kept; Shampoo comes from G, however that is known."""
    return None if holds == "rows" else options.sums
