"""What is written, and whether it is finite."""

from __future__ import annotations

import pytest
import torch
from models import data, peft_mlp, train

from psilora import PSILoRA
from psilora.steps.update import all_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_increment_of_zero_keeps_the_sign_of_a_zero(dtype: torch.dtype) -> None:
    """x + 0 turns −0 into +0, so adding the increments would not be a bitwise no-op."""
    model = peft_mlp(dtype=dtype)
    optimizer = PSILoRA(model, 0.0, step="gradient", momentum=0.0)
    parameters = [p for name, p in model.named_parameters() if "lora_" in name]
    with torch.no_grad():
        for parameter in parameters:
            parameter[0] = -0.0
    train(model, optimizer, [data(dtype=dtype)])
    assert all(bool(parameter[0].signbit().all()) and not bool(parameter[0].any()) for parameter in parameters)
    assert not bool((parameters[0].detach() + 0.0)[0].signbit().any())


@pytest.mark.parametrize("value, finite", [(3e38, True), (float("inf"), False), (float("nan"), False)])
def test_large_finite_entries_are_not_taken_for_overflow(value: float, finite: bool) -> None:
    tensors = [torch.ones(3), torch.full((2, 2), value)]
    assert not bool(torch.isfinite(tensors[1].norm()))  # what the fast check sees
    assert bool(all_finite(tensors, torch.device("cpu"))) is finite
