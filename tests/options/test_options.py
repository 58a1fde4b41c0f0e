"""Settings out of range are refused by name, before anything is attached."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import bare, peft_mlp, plain_mlp

BAD_SETTINGS = [
    ({"lr": -0.1}, r"Invalid lr=-0.1. Must be finite and >= 0."),
    ({"lr": float("nan")}, "Invalid lr=nan"),
    ({"lr": torch.ones(2)}, r"Invalid lr of shape \(2,\). Must be a number or a one-element tensor."),
    ({"lr": torch.tensor(-0.05)}, r"Invalid lr=-0.05\d*. Must be finite and >= 0."),
    ({"lr": "0.1"}, r"Invalid lr='0.1'. Must be finite and >= 0."),
    ({"lr": None}, r"Invalid lr=None. Must be finite and >= 0."),
    ({"lr": True}, r"Invalid lr=True. Must be finite and >= 0."),
    ({"num_iters": -1}, r"Invalid num_iters=-1. Must be an integer >= 0."),
    ({"num_iters": 1.0}, r"Invalid num_iters=1.0. Must be an integer >= 0."),
    ({"momentum": 1.0}, r"Invalid momentum=1.0. Must be in \[0, 1\)."),
    ({"momentum": -0.1}, r"Invalid momentum=-0.1. Must be in \[0, 1\)."),
    ({"momentum": "a"}, r"Invalid momentum='a'. Must be in \[0, 1\)."),
    ({"dampening": "a"}, r"Invalid dampening='a'. Must be in \[0, 1\] or None."),
    ({"dampening": 1.5}, r"Invalid dampening=1.5. Must be in \[0, 1\] or None."),
    ({"momentum_rank": 0}, r"Invalid momentum_rank=0. Must be an integer >= 1."),
    ({"momentum_rank": 7}, r"base_model.model.l3: invalid momentum_rank=7. Must be in \[1, 6\]."),
    ({"prox": -1e-3}, r"Invalid prox=-0.001. Must be finite and >= 0."),
    ({"weight_decay": -1}, r"Invalid weight_decay=-1. Must be finite and >= 0."),
    ({"metric": "adam"}, r"Invalid metric='adam'. Must be one of None, 'kfac', 'shampoo'."),
    ({"metric": "kfac-low-rank", "gradient": "dense"}, "Invalid gradient='dense' with metric='kfac-low-rank'. Must be"),
    ({"metric": "kfac-low-rank", "metric_rank": 0}, r"Invalid metric_rank=0. Must be an integer >= 1."),
    ({"metric_power": 0}, r"Invalid metric_power=0. Must be in \(0, 1\]."),
    ({"metric_beta": 1.0}, r"Invalid metric_beta=1.0. Must be in \[0, 1\)."),
    ({"damping": 0.0}, r"Invalid damping=0.0. Must be finite and > 0."),
    ({"gradient": "full"}, r"Invalid gradient='full'. Must be one of 'exact', 'tangent', 'dense', 'backward', 'auto'."),
    ({"gradient": "backward"}, r"Invalid momentum=0.9 with gradient='backward'. Must be 0; gradient='exact', 'dense'"),
    ({"gradient": "backward", "momentum": 0, "num_iters": 2}, r"Invalid num_iters=2 with gradient='backward'"),
    ({"gradient": "backward", "momentum": 0, "metric": "kfac"}, r"Invalid metric='kfac' with gradient='backward'"),
    ({"gradient": "backward", "momentum": 0, "first": "B"}, r"Invalid first='B' with gradient='backward'"),
    ({"maximize": "yes"}, r"Invalid maximize='yes'. Must be True or False."),
    ({"nesterov": None}, r"Invalid nesterov=None. Must be True or False."),
    ({"joint": 1}, r"Invalid joint=1. Must be True or False."),
    ({"fade": "no"}, r"Invalid fade='no'. Must be True or False."),
    ({"metric_bias_correction": 0}, r"Invalid metric_bias_correction=0. Must be True or False."),
    ({"process_group": "x"}, r"Invalid process_group='x'. Must be a torch.distributed.ProcessGroup or None."),
    ({"first": "C"}, r"Invalid first='C'. Must be one of 'A', 'B'."),
    ({"max_grad_norm": 0.0}, r"Invalid max_grad_norm=0.0. Must be > 0 or None."),
    ({"backend": "cuda"}, r"Invalid backend='cuda'. Must be one of 'auto', 'reference', 'triton'."),
    ({"loss_reduction": "none"}, r"Invalid loss_reduction='none'. Must be one of 'mean', 'sum'."),
    ({"nonfinite": "ignore"}, r"Invalid nonfinite='ignore'. Must be one of 'skip', 'raise'."),
    ({"unsupported": "ignore"}, r"Invalid unsupported='ignore'. Must be one of 'raise', 'adamw'."),
    ({"groups": [{"layers": "l1", "lr": -1.0}]}, r"Invalid lr=-1.0"),
    ({"groups": [{"layers": "l1", "betas": 1}]}, r"a group has unknown keys \['betas'\]"),
    ({"groups": [{"lr": 1.0}]}, r"a group has no 'layers'"),
    ({"groups": [{"layers": "nowhere"}]}, r"no layer is left for layers='nowhere'"),
    ({"groups": [{"layers": 3}]}, r"Invalid layers=3"),
    ({"groups": [{"layers": "("}]}, r"Invalid layers='\('. Must be a regular expression: missing \)"),
    ({"groups": [{"layers": "l1", "lr": torch.tensor(-1.0)}]}, r"Invalid lr=-1.0. Must be finite"),
    ({"groups": {"layers": "l1"}}, r"Invalid groups=\{'layers': 'l1'\}. Must be a sequence of \{'layers': …"),
    ({"groups": None}, r"Invalid groups=None. Must be a sequence"),
    ({"groups": ["l1"]}, r"Invalid group 'l1' in groups. Must be a dict \{'layers': …"),
]


@pytest.mark.parametrize(("change", "message"), BAD_SETTINGS, ids=[message for _, message in BAD_SETTINGS])
def test_bad_settings_name_the_value_and_leave_no_hooks(change: dict[str, Any], message: str) -> None:
    model = peft_mlp()
    with pytest.raises(ValueError, match=message):
        bare(model, **{"lr": 0.1, **change})
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_bad_rate_of_the_other_parameters_is_named() -> None:
    model = plain_mlp()
    model.l1.base.bias.requires_grad_()
    with pytest.raises(ValueError, match=r"Invalid learning rate: -1"):
        bare(model, 0.1, adamw_lr=-1.0)
