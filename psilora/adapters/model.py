"""Models that can be optimized here, and wrappers that hide their gradients."""

from __future__ import annotations

from torch import nn


def check_model(model: object, *, sharded: bool = False) -> nn.Module:
    """Return `model` if it can be optimized here; refuse wrappers whose gradients cannot be used, by name.

    Args:
        model: What the user passed.
        sharded: Whether parameters may be DTensors.
    """
    if isinstance(model, (list, tuple)) and model and all(isinstance(part, nn.Module) for part in model):
        raise TypeError(
            f"model must be one nn.Module, got a {type(model).__name__} of {len(model)}; build one optimizer for each "
            "of them, or pass nn.ModuleList of them"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}; pass the model, not its parameters")
    if isinstance(model, nn.DataParallel):
        raise ValueError(
            "the model is wrapped in nn.DataParallel, whose replicas hide their activations; "
            "use DistributedDataParallel or a single device"
        )
    if any(cls.__name__ == "DeepSpeedEngine" for cls in type(model).__mro__) or any(
        hasattr(parameter, "ds_id") for parameter in model.parameters()
    ):
        raise ValueError("the model is managed by DeepSpeed, which owns its gradients; use DDP or a single device")
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.is_complex():
            raise ValueError(f"{name} is complex ({parameter.dtype}); must have a real floating dtype")
        if not sharded and type(parameter).__name__ == "DTensor":
            raise ValueError(f"{name} is sharded (DTensor); this optimizer needs whole parameters, as under DDP")
        if parameter.device.type == "meta":
            raise ValueError(f"{name} is on the meta device; materialise the model first")
    return model
