"""What was captured for one pair since its last step."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from psilora import runtime
from psilora.adapters.convolution import Patches, position_rows
from psilora.adapters.pair import LoRAPair
from psilora.capture.casts import Origin, Originals
from psilora.capture.discards import Leftovers, Versions, is_zero, present
from psilora.capture.passes import Passes
from psilora.capture.storage import KINDS, Holding, Input, Matrix, Rows, column_squares
from psilora.linalg.precision import compute_dtype, full_precision

PROBES = 8  # layers whose dB is copied after backward; one would do, more survive a layer with no gradient


class Captured(NamedTuple):
    """What a pair holds of its inputs and output gradients since its last step.

    Attributes:
        name: Path of the adapted module, with the adapter's name where it is not "default".
        calls, rows: How often the layer was called, and N = Σ N_j; 0 where nothing is captured.
        chunks: X (N_j, d_in) and S (N_j, d_out) of each call, S at the output of lora_B: dB = Σ Sᵀ(XAᵀ) and
            dA = Σ (SB)ᵀX; empty where X and S are not what is kept (`gradient=`).
    """

    name: str
    calls: int
    rows: int
    chunks: tuple[tuple[Tensor, Tensor], ...]


class Record:
    """What was captured for one pair since its last step.

    Attributes:
        held: What is kept of X (N_j, d_in) and S_B (N_j, d_out) of each call; see `psilora.capture.storage`.
        holds: Its kind, from the next call on.
        calls, rows: number of calls and N = Σ N_j; a call that two backward passes reach through one graph is one.
        sum_x2, sum_s2: Where `sums` is "squares", Σ_n x_n² (d_in,) and Σ_n (S_B)_n² (d_out,); where it is "products",
            XᵀX (d_in, d_in) and S_BᵀS_B (d_out, d_out); in the compute dtype, None before the first call.
        itemsize: Bytes per number of the narrowest X or S_B that came, as it came; 8 before the first.
        versions: `.grad` as backward has left it.
        missed: Number of backward calls that went through only one of node and hook, and of backward passes that
            reached lora_A through neither.
        overlaid: Whether two backward passes reached one call and only sums of squares are kept: those of S₁ + S₂ need
            both at once.
        left: dB as backward left it, for a few probes, so that a later change of `.grad` can be recognised.
        changed: Whether something other than backward has changed `.grad` between two backward passes.
        stale: Whether `.grad` was not reset before the first backward pass, so that it holds more than X and S tell.
        verified: Whether the first capture has been checked against `.grad`; survives `clear`.
        called: Whether lora_A has been called with gradients enabled, outside a compiled graph; survives `clear`.
    """

    def __init__(
        self,
        pair: LoRAPair,
        holds: str,
        sums: str | None,
        probes: set[Record],
        originals: Originals,
        passes: Passes,
    ) -> None:
        self.pair = pair
        self.holds = holds
        self.sums = sums
        self.verified = False
        self.called = False
        self._probes = probes
        self._originals = originals
        self._passes = passes
        self.versions, self._leftovers = Versions(), Leftovers()
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        """Forget everything captured."""
        self.held: Holding = KINDS[self.holds]()
        self.calls = 0
        self.rows = 0
        self.itemsize = 8
        self.sum_x2: Tensor | None = None
        self.sum_s2: Tensor | None = None
        self.missed = 0
        self.overlaid = False
        self._taken: dict[object, int] = {}  # the place of each call among the chunks
        self.left: Tensor | None = None
        self.changed = self.stale = False
        self.versions.clear()
        self._leftovers.clear()
        self._probes.discard(self)
        self._backward = -1

    def begin_anew(self) -> None:
        """Forget everything captured, of gradients that are not reset yet."""
        self.clear()
        self._leftovers.note(self.pair)

    def hold(self, kind: str, sums: str | None) -> None:
        """Forget everything captured, and keep this from the next call on."""
        self.holds, self.sums = kind, sums
        self.clear()

    def open(self, *, missed: bool) -> None:
        """Note that backward has reached lora_B's output, before anything of this call accumulates.

        The first such call of a backward pass drops, of all records, what belongs to gradients that were reset since.

        Args:
            missed: Whether the call did not pass lora_A's input node, so that it will bring no X.
        """
        running = self._passes.begin()
        with self._lock:
            if running.number != self._backward:
                if self._gone():
                    self.clear()
                self._backward = running.number
            if missed:
                running.unpaired[self] = running.unpaired.get(self, 0) + 1

    def refresh(self, backward: int) -> None:
        """Start afresh if `.grad` is gone or was set to zero: a new backward pass begins, or a step.

        What is here was left by a step that never came, after a `zero_grad` on the model or an overflow, neither of
        which reaches the optimizer.

        Args:
            backward: The pass that begins, whose changes of `.grad` are noted; -1 for none.
        """
        with self._lock:
            if self.idle:
                if backward >= 0 and not self.versions.noted:  # nothing of this step has come, also in another pass
                    self.stale = self._leftovers.there(self.pair)
                return
            changed = self.versions.changes(self.pair) > 0
            self.changed |= changed and backward >= 0
            if self._gone() or self._zeroed(changed, unless_held=changed and backward >= 0):
                self.clear()

    def _gone(self) -> bool:
        """Whether `.grad` was reset to None; where a pass runs inside another, dA may only be yet to come, after dB."""
        return self.pair.lora_A.grad is None and (self.calls > 0 or self.pair.lora_B.grad is None)

    def _zeroed(self, changed: bool, unless_held: bool) -> bool:
        """Whether `.grad` is zero and what is held is not, so that it was set to zero in place.

        Zero alone says nothing: a masked loss leaves it, and dA is zero at B = 0. Elsewhere than on the CPU, where a
        look waits for the device, it takes a change that the version counters show, which one through `.data` does not;
        and while a CUDA graph is captured, nobody can look. Where nothing is held to compare it with, `unless_held`.
        """
        device, grads = self.pair.lora_A.device, present(self.pair)
        if runtime.capturing(device) or not (changed or runtime.at_hand(device)) or not all(map(is_zero, grads)):
            return False
        if self.calls == 0 or (self.holds == "nothing" and self.sum_s2 is None):
            return unless_held
        left = self.sum_s2 if self.holds == "nothing" else self.held.dB(self.pair).to(grads[0].dtype)
        return left is not None and bool(left.any())

    def add(self, x: Tensor, s: Tensor | None, origin: Origin | None = None, call: object = None) -> None:
        """Hold the input and output gradient of one call, from inside backward, until lora_A's gradient accumulates.

        `call` stands for it in every pass through its graph; None for one that cannot be told from another.
        `torch.autograd.grad` passes through the nodes as well, but leaves `.grad` alone: nothing confirms its calls.
        """
        running = self._passes.begin()
        with self._lock:
            running.calls.setdefault(self, []).append((x, s, origin, call))

    def confirm(self) -> None:
        """Take the calls of this backward pass: lora_A's gradient, which waits for all of them, has accumulated."""
        running = self._passes.current
        with self._lock:
            calls = [] if running is None else running.calls.pop(self, [])
            self.missed += not calls  # something that bypasses the modules made this gradient
            for x, s, origin, call in calls:
                self._take(x, s, origin, call)
            self.versions.note(self.pair.lora_A)

    def stand_in(self) -> None:
        """Hold no rows, for a pair that other processes captured in this step and this one did not run."""
        weight = self.pair.lora_A
        self._hold(Matrix(weight.new_zeros(0, self.pair.d_in)), weight.new_zeros(0, self.pair.d_out))

    def _take(self, x: Tensor, s: Tensor | None, origin: Origin | None, call: object) -> None:
        if s is None:
            self.missed += 1
            return
        conv, s = self.pair.convolution, s.detach()
        s = s.reshape(-1, s.shape[-1]) if conv is None else position_rows(s, conv)
        again = call is not None and call in self._taken
        if again and isinstance(self.held, Rows):
            self.held.overlay(self._taken[call], s)
            return
        x = x.detach() if conv is not None else x.detach().reshape(-1, x.shape[-1])
        if self.holds == "rows":
            x = self._originals.share(x, origin)
        if call is not None:
            self._taken[call] = self.calls
        self._hold(Matrix(x) if conv is None else Patches(x, conv), s, again)

    def _hold(self, x: Input, s: Tensor, again: bool = False) -> None:
        self.itemsize = min(self.itemsize, x.dtype.itemsize, s.element_size())
        self.held.take(x, s, self.pair)
        if again and self.holds != "cross":  # whose products of one pass with another are missing
            self.overlaid |= self.sums is not None
            return
        self.calls += 1
        self.rows += s.shape[0]
        if self.sums is not None:
            self._add_sums(x, s.to(compute_dtype(self.pair.lora_A.dtype)))

    def _add_sums(self, x: Input, s: Tensor) -> None:
        if self.sums == "squares":
            x2, s2 = x.squares(s.dtype), column_squares(s, s.dtype)
        else:
            with full_precision(s.device.type):
                x2, s2 = x.left(x.rows(s.dtype)), s.mT @ s
        self.sum_x2 = x2 if self.sum_x2 is None else self.sum_x2.add_(x2)
        self.sum_s2 = s2 if self.sum_s2 is None else self.sum_s2.add_(s2)

    def tensors(self) -> list[Tensor]:
        """Return what is held that grows faster than the width of the layer."""
        return self.held.tensors() + [t for t in (self.sum_x2, self.sum_s2) if t is not None and t.dim() > 1]

    def accumulated(self) -> None:
        """Count the calls that passed lora_B alone, and keep a copy of dB as backward leaves it, for a few probes."""
        running = self._passes.current
        with self._lock:  # of two threads, the one whose copy is older must not have the last word
            self.missed += 0 if running is None else running.unpaired.pop(self, 0)
            grad = self.pair.lora_B.grad
            self.versions.note(self.pair.lora_B)
            if grad is not None and (self in self._probes or len(self._probes) < PROBES):
                self._probes.add(self)
                self.left = grad.detach().clone()

    @property
    def chunks(self) -> list[tuple[Tensor, Tensor]]:
        """(X, S_B) of each call, in backward order; [] where rows are not kept."""
        return self.held.chunks if isinstance(self.held, Rows) else []

    def view(self) -> Captured:
        """Return what is held, for others to read."""
        return Captured(self.pair.name, self.calls, self.rows, tuple(self.chunks))

    @property
    def idle(self) -> bool:
        """Whether no backward pass has reached the pair since the last step."""
        return self.calls == 0 and self.missed == 0

    @property
    def captured(self) -> bool:
        """Whether every call since the last step has brought its X and S."""
        return self.calls > 0 and self.missed == 0


def stand_alone(pair: LoRAPair, chunks: Sequence[tuple[Tensor, Tensor]]) -> Record:
    """Return a record of these (X (N_j, d_in), S_B (N_j, d_out)) for a pair that no hooks watch."""
    record = Record(pair, "rows", None, set(), Originals(), Passes())
    for x, s in chunks:
        record._hold(Matrix(x), s)
    return record
