"""Capture X (rows entering lora_A) and S_B (the gradient at lora_B's output): an autograd node and a hook of another.

An identity node on lora_A's input saves X, and takes lora_A's weight as a second input so that its backward always
runs; a hook of the node that made lora_B's output sees S_B first and leaves it in a token that both share. X is then
the very tensor autograd saves anyway: it is dropped and recomputed by gradient checkpointing of either kind, pairs with
the S_B of the same call, and nothing is captured in a forward without gradients. The output itself stays as it is, so a
layer may change it in place. dB = S_Bᵀ(XAᵀ) and dA = (S_B·B)ᵀX, so S = S_B / s is the gradient at the layer's output
and G = SᵀX. Of a convolution the node saves the input, whose patches are the rows of X; they are formed after S_B has
come, and only where rows are kept: `psilora.adapters.convolution`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from psilora.adapters.pair import LoRAPair
from psilora.capture import compiled
from psilora.capture.casts import Origin, Originals, origin_of
from psilora.capture.discards import suspects
from psilora.capture.passes import Passes
from psilora.capture.record import Captured, Record

_owners: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Capture]] = weakref.WeakKeyDictionary()


class Capture:
    """The hooks of one optimizer on the inner linears of its pairs, and their records.

    Args:
        pairs: Pairs whose `uncaptured` is None.
        holds: Per pair, a kind of `psilora.capture.storage`.
        sums: Per pair, what to keep for the metric: "squares", "products" or None (see `Record`); None for none.
    """

    def __init__(self, pairs: list[LoRAPair], holds: Sequence[str], sums: Sequence[str | None] | None = None) -> None:
        probes: set[Record] = set()
        kinds, originals = zip(pairs, holds, sums or [None] * len(pairs), strict=True), Originals()
        self._passes = Passes()
        self.records = {id(pair): Record(pair, kind, s, probes, originals, self._passes) for pair, kind, s in kinds}
        self._passes.records = list(self.records.values())
        self.superseded = False
        self._handles: list[RemovableHandle] = []
        for pair in pairs:
            self._attach(pair)
        weakref.finalize(self, _release, self._handles, list(self.records.values()))

    def _attach(self, pair: LoRAPair) -> None:
        record = self.records[id(pair)]
        for lora_A, lora_B in pair.sites:
            former = _owners.get(lora_A)
            owner = former() if former is not None else None
            if owner is not None and owner is not self:
                owner.superseded = True
                owner.close()
            _owners[lora_A] = weakref.ref(self)
            slot, site = threading.local(), compiled.connect(lora_A, record)
            self._handles.append(lora_A.register_forward_pre_hook(_BeforeA(record, slot)))
            self._handles.append(lora_A.register_forward_hook(_AfterA()))
            self._handles.append(lora_B.register_forward_hook(_AfterB(record, slot, site)))
        self._handles.append(pair.lora_A.register_post_accumulate_grad_hook(_AfterAccumulateA(record)))
        self._handles.append(pair.lora_B.register_post_accumulate_grad_hook(_AfterAccumulateB(record)))

    def record(self, pair: LoRAPair) -> Record | None:
        """Return the record of a pair, or None for one that is not captured."""
        return self.records.get(id(pair))

    def held(self, pair: LoRAPair) -> Captured:
        """Return what is held of a pair's X and S."""
        record = self.record(pair)
        return Captured(pair.name, 0, 0, ()) if record is None else record.view()

    def clear(self, *, reset: bool = False) -> None:
        """Drop everything captured; `reset` says that the gradients have been reset, else they wait for that."""
        self._passes.clear()
        for record in self.records.values():
            if reset:
                record.clear()
            else:
                record.begin_anew()

    def refresh(self) -> None:
        """Before a step, drop what was captured for gradients that have been reset since."""
        for record in suspects(list(self.records.values())):
            record.refresh(-1)

    @property
    def attached(self) -> bool:
        """Whether its hooks are on the model."""
        return bool(self._handles)

    def nbytes(self) -> int:
        """Return the bytes held; storage shared between layers is counted once."""
        held = (t.untyped_storage() for record in self.records.values() for t in record.tensors())
        return sum({storage.data_ptr(): storage.nbytes() for storage in held}.values())

    def close(self) -> None:
        """Remove every hook and drop everything captured."""
        _release(self._handles, list(self.records.values()))


def _release(handles: list[RemovableHandle], records: list[Record]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
    compiled.disconnect(records)
    for record in records:
        record.clear()


class _Token:
    """Links the node and the hook of one call.

    Attributes:
        s: S_B, from lora_B's backward to lora_A's.
        undefined: Whether backward came without a gradient, which a function of one's own may leave out.
    """

    __slots__ = ("origin", "paired", "record", "s", "undefined")

    def __init__(self, record: Record, paired: bool, origin: Origin | None = None) -> None:
        self.record = record
        self.paired = paired
        self.origin = origin
        self.s: Tensor | None = None
        self.undefined = False

    def watch(self, output: Tensor) -> None:
        """Take the gradient at lora_B's output when backward reaches the node that made it."""
        source = _row_major_base(output)
        node, number = source.grad_fn, source.output_nr
        if node is None:  # a leaf that a hook of one's own put there: no gradient goes on to lora_B
            return

        def reached(grads: tuple[Tensor | None, ...]) -> None:
            self.record.open(missed=not self.paired)
            self.s = grads[number]
            self.undefined = self.s is None

        node.register_prehook(reached)  # after every hook on the tensor, so what they make of the gradient is seen


def _row_major_base(output: Tensor) -> Tensor:
    """Return the tensor that `output` is another shape of, or itself.

    An operation in place on a view goes into the history of its base, and past the node that made the view.
    """
    base = output._base
    if base is None or base.numel() != output.numel() or base.grad_fn is None:
        return output
    squeezed = [[(n, step) for n, step in zip(t.shape, t.stride(), strict=True) if n != 1] for t in (base, output)]
    contiguous = base.is_contiguous() and output.is_contiguous()
    return base if contiguous or squeezed[0] == squeezed[1] else output


class _InputNode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, token: _Token) -> Tensor:
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)  # a gradient that is not there stays so in what comes before
        ctx.token = token
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        token: _Token = ctx.token
        s, token.s = token.s, None
        if not token.undefined:
            token.record.add(x, s, token.origin, token)
        token.undefined = False
        return (grad if ctx.needs_input_grad[0] else None), None, None


class _Hook:
    """A hook that turns into a no-op when its module is copied or pickled: a copy has no optimizer to capture for."""

    def __reduce__(self) -> tuple[Callable[[], object], tuple[()]]:
        return _Inert, ()


class _Inert:
    def __call__(self, *_: object) -> None:
        return None


class _BeforeA(_Hook):
    def __init__(self, record: Record, slot: threading.local) -> None:
        self.record, self.slot = record, slot

    def __call__(self, module: nn.Linear, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        tracing = torch.compiler.is_dynamo_compiling()
        if not tracing:
            self.slot.token = None
        if not args or not torch.is_grad_enabled() or not module.weight.requires_grad:
            return None
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "the model was wrapped in nn.DataParallel, whose replicas' activations cannot be captured; use "
                "DistributedDataParallel, a single device, or gradient='tangent' and metric=None"
            )
        x: Tensor = args[0]
        if torch.is_autocast_enabled(x.device.type):  # cast here, so that the tensor saved is the one the linear saves
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if tracing:
            return (x, *args[1:])
        self.record.called = True
        self.slot.token = _Token(self.record, paired=True, origin=origin_of(x))
        return (_InputNode.apply(x, module.weight, self.slot.token), *args[1:])  # type: ignore[no-untyped-call]


class _AfterA(_Hook):
    def __call__(self, module: nn.Linear, args: tuple[Any, ...], output: Tensor) -> None:
        if torch.compiler.is_dynamo_compiling() and torch.is_grad_enabled() and module.weight.requires_grad:
            compiled.pass_on(args[0], output)


class _AfterB(_Hook):
    def __init__(self, record: Record, slot: threading.local, site: compiled.Site) -> None:
        self.record, self.slot, self.site = record, slot, site

    def __call__(self, module: nn.Linear, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if torch.compiler.is_dynamo_compiling():
            traced = torch.is_grad_enabled() and output.requires_grad
            return self.site.capture(args[0], output, module.weight) if traced else None
        token = getattr(self.slot, "token", None)
        self.slot.token = None
        if torch.is_grad_enabled() and output.requires_grad:
            (token or _Token(self.record, paired=False)).watch(output)
        return None


class _AfterAccumulateA(_Hook):
    def __init__(self, record: Record) -> None:
        self.record = record

    def __call__(self, parameter: Tensor) -> None:
        self.record.confirm()


class _AfterAccumulateB(_Hook):
    def __init__(self, record: Record) -> None:
        self.record = record

    def __call__(self, parameter: Tensor) -> None:
        self.record.accumulated()
