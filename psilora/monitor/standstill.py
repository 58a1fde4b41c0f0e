"""Why a pair has no gradient while others are trained, as far as the host can tell."""

from __future__ import annotations

from torch import nn

from psilora.adapters.pair import LoRAPair
from psilora.capture.record import Record

#: How the reason of a pair begins that somebody has frozen.
FROZEN = "frozen: "


def why_still(pair: LoRAPair, model: nn.Module | None, record: Record | None, trained: bool) -> str:
    """Return the first reason that holds.

    Args:
        pair: One without gradients, or with a frozen factor.
        model: That the optimizer was built on; None once it is gone.
        record: Of its captures; None where nothing is captured.
        trained: Whether it has had gradients since the optimizer was built.
    """
    owner = pair.owner
    if model is not None and all(module is not owner for module in model.modules()):
        return "its layer is no longer part of the model"
    held = {id(parameter) for parameter in owner.parameters()}
    if id(pair.lora_A) not in held or id(pair.lora_B) not in held:
        return "its parameters are no longer the layer's: the adapter was replaced or deleted"
    if getattr(owner, "merged", False) is True:
        return "its adapter is merged into the base weight"
    if getattr(owner, "disable_adapters", False) is True:
        return "its adapters are disabled"
    active = getattr(owner, "active_adapters", None)
    if pair.adapter is not None and isinstance(active, (list, tuple)) and pair.adapter not in active:
        return f"its adapter {pair.adapter!r} is not active"
    if not pair.trainable:
        frozen = [name for name in ("lora_A", "lora_B") if not getattr(pair, name).requires_grad]
        return FROZEN + " and ".join(frozen)
    if record is not None and not record.called:
        return "no call of its layer with gradients enabled was seen"
    if trained:
        return "its layer is no longer called, or the loss no longer depends on it"
    if record is not None:
        return "its layer is called, but the loss does not depend on it"
    return "it has never had a gradient: its layer is not called, or the loss does not depend on it"
