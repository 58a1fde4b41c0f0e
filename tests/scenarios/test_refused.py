"""Wrappers that take the gradients or the parameters away are refused by name, also when they come after us."""

from __future__ import annotations

import pytest
import torch
from models import bare, factors
from tiny import adapted, tokens
from torch import nn

from psilora import PSILoRA


@pytest.mark.scenario(
    11, "DataParallel", gradient="refused", tested="refused by name, before and after the optimizer is built"
)
def test_data_parallel_is_refused_also_when_it_comes_later() -> None:
    """The trap: replicas share the hooks, so rows of several devices would meet in one record."""
    model = adapted()
    with pytest.raises(ValueError, match=r"nn.DataParallel.*use DistributedDataParallel"):
        bare(nn.DataParallel(model), 0.1)
    optimizer = PSILoRA(model, 0.1, step="gradient")
    linear = next(module for name, module in model.named_modules() if name.endswith("lora_A.default"))
    replica = linear._replicate_for_data_parallel()  # what nn.DataParallel runs on every device
    replica.weight = linear.weight
    assert replica._forward_pre_hooks == linear._forward_pre_hooks
    with pytest.raises(RuntimeError, match=r"wrapped in nn.DataParallel.*use DistributedDataParallel"):
        replica(torch.randn(2, linear.in_features))
    assert optimizer.capture_bytes() == 0


@pytest.mark.scenario(
    11, "DeepSpeed", gradient="refused", tested="an engine, ZeRO-3 parameters and replaced groups: by name"
)
def test_deepspeed_is_refused_by_name() -> None:
    """The trap: ZeRO puts one flat tensor in place of a group's parameters; what looks for its own then trains none."""
    model = adapted()
    engine = type("DeepSpeedEngine", (nn.Module,), {})()
    engine.module = model
    with pytest.raises(ValueError, match="managed by DeepSpeed"):
        bare(engine, 0.1)

    optimizer = PSILoRA(model, 0.1, step="gradient")
    before = factors(model)
    model(**tokens()).loss.backward()
    group = optimizer.param_groups[0]
    flat = torch.cat([p.detach().flatten() for p in group["params"]])
    group["params"] = [flat]
    with pytest.raises(RuntimeError, match="replaced after construction, as DeepSpeed ZeRO does"):
        optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in factors(model).items())

    next(p for p in model.parameters() if p.requires_grad).ds_id = 0  # the mark of a ZeRO-3 parameter
    with pytest.raises(ValueError, match="managed by DeepSpeed"):
        bare(model, 0.1)
