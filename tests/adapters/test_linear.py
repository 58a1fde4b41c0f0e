"""`LoRALinear`: what it refuses, and that it leaves such a base as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from psilora import LoRALinear


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, r"Invalid rank=0. Must be an integer in \[1, 4\]."),
        ({"rank": 5}, r"Invalid rank=5. Must be an integer in \[1, 4\]."),
        ({"rank": 2.0}, r"Invalid rank=2.0. Must be an integer in \[1, 4\]."),
        ({"rank": True}, r"Invalid rank=True. Must be an integer in \[1, 4\]."),
        ({"rank": "2"}, r"Invalid rank='2'. Must be an integer in \[1, 4\]."),
        ({"alpha": 0}, "Invalid alpha=0. Must be finite and > 0."),
        ({"alpha": float("inf")}, "Invalid alpha=inf. Must be finite and > 0."),
        ({"alpha": "8"}, "Invalid alpha='8'. Must be finite and > 0."),
        ({"dropout": 1.0}, r"Invalid dropout=1.0. Must be in \[0, 1\)."),
        ({"dropout": None}, r"Invalid dropout=None. Must be in \[0, 1\)."),
    ],
    ids=str,
)
def test_bad_settings_are_named_and_leave_the_base_as_it_was(settings: dict[str, Any], message: str) -> None:
    base = nn.Linear(6, 4)
    with pytest.raises(ValueError, match=message):
        LoRALinear(base, **{"rank": 2, **settings})
    assert all(parameter.requires_grad for parameter in base.parameters())


@pytest.mark.parametrize("base", [nn.Conv1d(4, 4, 1), nn.Embedding(4, 4), nn.Identity(), torch.ones(4, 4)], ids=str)
def test_a_base_that_is_no_linear_layer_is_refused(base: Any) -> None:
    with pytest.raises(TypeError, match=f"Invalid base of type {type(base).__name__}. Must be a linear layer"):
        LoRALinear(base, 2)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_a_base_of_another_dtype_is_refused(dtype: torch.dtype) -> None:
    base = nn.Linear(6, 4)
    base.weight = nn.Parameter(base.weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match=f"Invalid base with weight of dtype {dtype}. Must be of a real floating"):
        LoRALinear(base, 2)
    assert base.bias.requires_grad
