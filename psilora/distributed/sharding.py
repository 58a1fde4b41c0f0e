"""LoRA factors that FSDP2 (`fully_shard`) has spread over processes: whole for a step, their own part written back.

The factors and their gradients are small beside the base model. Each step gathers them, every process computes the same
update of the whole factors, and writes back the part it holds. The optimizer's state is whole in every process, because
the update needs it whole; distributed checkpoints store it once and load it into any number of processes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from psilora.adapters.pair import LoRAPair
from psilora.options.base import Options


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a part of a tensor."""
    module = sys.modules.get("torch.distributed.tensor")  # not imported for models that have no use for it
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds, sharing its memory."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return part


def whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor as a plain one; all processes must ask together where it is sharded."""
    full: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return full


def refuse_sharded(settings: Sequence[tuple[LoRAPair, Options]], controller: str | None) -> None:
    """Raise ValueError, by layer, for settings that sharded factors cannot be trained with."""
    captured = [pair.name for pair, o in settings if o.captures is not None and is_sharded(pair.lora_A)]
    if captured:
        raise ValueError(
            f"{captured[0]} is sharded (DTensor, as by fully_shard), and so are {len(captured) - 1} more: captured "
            "activations are not supported there; use step='spectral', or gradient='tangent' with metric=None"
        )
    if controller is not None and any(is_sharded(pair.lora_A) for pair, _ in settings):
        raise ValueError(f"controller={controller!r} is not supported with sharded parameters; use controller=None")


class Gathered:
    """The whole factors of a step. Pairs that are not sharded stand for themselves."""

    def __init__(self) -> None:
        self._whole: list[tuple[LoRAPair, LoRAPair]] = []

    def pair(self, pair: LoRAPair) -> LoRAPair:
        """Return `pair` with plain tensors as its factors; a copy where they are sharded."""
        if not is_sharded(pair.lora_A) and not is_sharded(pair.lora_B):
            return pair
        lora_A, lora_B = (nn.Parameter(whole(p.detach()), requires_grad=False) for p in (pair.lora_A, pair.lora_B))
        copy = replace(pair, lora_A=lora_A, lora_B=lora_B)
        self._whole.append((pair, copy))
        return copy

    def write_back(self) -> None:
        """Write this process's part of every factor that `pair` gathered, without communication."""
        for pair, copy in self._whole:
            _write(pair.lora_A, copy.lora_A)
            _write(pair.lora_B, copy.lora_B)
        self._whole.clear()


def _write(parameter: Tensor, value: Tensor) -> None:
    if not is_sharded(parameter):
        return
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    everywhere = DTensor.from_local(value.detach(), mesh, [Replicate()] * mesh.ndim, run_check=False)
    local(parameter.detach()).copy_(local(everywhere.redistribute(mesh, placements)))
