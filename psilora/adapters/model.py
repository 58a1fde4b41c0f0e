"""Models that can be optimized here, and wrappers that hide their gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from torch import nn

#: What an optimizer is built on.
Models: TypeAlias = "nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module]"


def joined(model: object) -> object:
    """Return several models as one, whose names begin with their keys, or their places in a list; others as they are.

    Raises:
        ValueError: A key is no name of a module.
    """
    if isinstance(model, nn.Module):
        return model
    if isinstance(model, (list, tuple)) and model and all(isinstance(part, nn.Module) for part in model):
        parts: Mapping[str, nn.Module] = {str(i): part for i, part in enumerate(model)}
    elif isinstance(model, Mapping) and model and all(isinstance(part, nn.Module) for part in model.values()):
        parts = model
    else:
        return model
    for name, part in parts.items():
        if not isinstance(name, str) or not name or "." in name:
            raise ValueError(f"Invalid name {name!r} of a model. Must be a string without a dot.")
        check_model(part, sharded=True)
    whole = nn.Module()  # a ModuleDict has names of its own, such as "keys", which no model could have
    for name, part in parts.items():
        if hasattr(whole, name):
            raise ValueError(f"Invalid name {name!r} of a model. nn.Module has an attribute of that name.")
        whole.add_module(name, part)
    return whole


def check_model(model: object, *, sharded: bool = False) -> nn.Module:
    """Return `model` if it can be optimized here; refuse wrappers whose gradients cannot be used, by name.

    Args:
        model: What the user passed.
        sharded: Whether parameters may be DTensors.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be an nn.Module, got {type(model).__name__}; pass the model (several in a list or a dict), "
            "not its parameters"
        )
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
        if parameter.requires_grad:
            check_parameter(name, parameter, sharded=sharded)
    return model


def check_parameter(name: str, parameter: nn.Parameter, *, sharded: bool = False) -> None:
    """Raise ValueError, by name, for a parameter that cannot be trained here; `sharded` allows a DTensor."""
    if parameter.is_complex():
        raise ValueError(f"{name} is complex ({parameter.dtype}); must have a real floating dtype")
    if not sharded and type(parameter).__name__ == "DTensor":
        raise ValueError(f"{name} is sharded (DTensor); this optimizer needs whole parameters, as under DDP")
    if parameter.device.type == "meta":
        raise ValueError(f"{name} is on the meta device; materialise the model first")
