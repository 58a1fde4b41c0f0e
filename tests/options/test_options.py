"""Settings out of range are refused by name, before anything is attached."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import bare, data, peft_mlp, train

from psilora.options import GROUP_KEYS, GradientOptions, Options, SpectralOptions

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
    ({"step": "spectral", "nesterov": None}, r"Invalid nesterov=None. Must be True or False."),
    ({"step": "spectral", "joint": 1}, r"Invalid joint=1. Must be True or False."),
    ({"step": "spectral", "depth_scale": 0.0}, r"Invalid depth_scale=0.0. Must be finite and > 0, or 'auto'."),
    ({"step": "spectral", "depth_scale": "deep"}, r"Invalid depth_scale='deep'. Must be finite and > 0, or 'auto'."),
    ({"step": "spectral", "depth_scale": True}, r"Invalid depth_scale=True. Must be finite and > 0, or 'auto'."),
    ({"step": "spectral", "fade": "no"}, r"Invalid fade='no'. Must be True or False."),
    ({"metric_bias_correction": 0}, r"Invalid metric_bias_correction=0. Must be True or False."),
    ({"process_group": "x"}, r"Invalid process_group='x'. Must be a torch.distributed.ProcessGroup or None."),
    ({"first": "C"}, r"Invalid first='C'. Must be one of 'A', 'B'."),
    ({"max_grad_norm": 0.0}, r"Invalid max_grad_norm=0.0. Must be > 0 or None."),
    ({"max_grad_norm": "1"}, r"Invalid max_grad_norm='1'. Must be > 0 or None."),
    ({"max_grad_norm": float("nan")}, r"Invalid max_grad_norm=nan. Must be > 0 or None."),
    ({"adamw_lr": -1.0}, r"Invalid adamw_lr=-1.0. Must be finite and >= 0."),
    ({"adamw_lr": "x"}, r"Invalid adamw_lr='x'. Must be finite and >= 0."),
    ({"adamw_lr": torch.tensor(-1.0)}, r"Invalid adamw_lr=-1.0. Must be finite and >= 0."),
    ({"adamw_lr": torch.ones(2)}, r"Invalid adamw_lr of shape \(2,\). Must be a number or a one-element tensor."),
    ({"adamw_betas": 0.9}, r"Invalid adamw_betas=0.9. Must be two numbers in \[0, 1\)."),
    ({"adamw_betas": (0.9,)}, r"Invalid adamw_betas=\(0.9,\). Must be two numbers in \[0, 1\)."),
    ({"adamw_betas": (0.9, 1.0)}, r"Invalid adamw_betas\[1\]=1.0. Must be in \[0, 1\)."),
    ({"adamw_eps": None}, r"Invalid adamw_eps=None. Must be finite and >= 0."),
    ({"adamw_weight_decay": "x"}, r"Invalid adamw_weight_decay='x'. Must be finite and >= 0."),
    ({"backend": "cuda"}, r"Invalid backend='cuda'. Must be one of 'auto', 'reference', 'triton'."),
    ({"loss_reduction": "none"}, r"Invalid loss_reduction='none'. Must be one of 'mean', 'sum'."),
    ({"nonfinite": "ignore"}, r"Invalid nonfinite='ignore'. Must be one of 'skip', 'raise'."),
    ({"unsupported": "ignore"}, r"Invalid unsupported='ignore'. Must be one of 'raise', 'adamw'."),
    ({"groups": [{"layers": "l1", "lr": -1.0}]}, r"Invalid lr=-1.0"),
    ({"groups": [{"layers": "l1", "betas": 1}]}, r"a group has unknown keys \['betas'\]"),
    ({"groups": [{"lr": 1.0}]}, r"a group has no 'layers'"),
    ({"groups": [{"layers": "nowhere"}]}, r"no layer is left for layers='nowhere'"),
    ({"groups": [{"layers": 3}]}, r"Invalid layers=3"),
    ({"groups": [{"layers": [3]}]}, r"Invalid layers=\[3\]. Must be a regular expression or a list of names."),
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


FOREIGN = [
    (
        "gradient",
        {"fade": False},
        "Invalid fade=False with step='gradient'. Must be True: it is a setting of step='spectral'.",
    ),
    ("gradient", {"nesterov": False}, "Invalid nesterov=False with step='gradient'. Must be True"),
    ("gradient", {"joint": False}, "Invalid joint=False with step='gradient'. Must be True"),
    ("spectral", {"gradient": "exact"}, "Invalid gradient='exact' with step='spectral'. Must be 'tangent'"),
    (
        "spectral",
        {"solver": "ritz"},
        "Invalid solver='ritz' with step='spectral'. Must be 'als': it is a setting of step='gr",
    ),
    ("spectral", {"loss_reduction": "sum"}, "Invalid loss_reduction='sum' with step='spectral'. Must be 'mean'"),
    ("spectral", {"metric_bias_correction": False}, "Invalid metric_bias_correction=False with step='spectral'"),
    ("spectral", {"metric_rank": 2}, "Invalid metric_rank=2 with step='spectral'. Must be None"),
]


@pytest.mark.parametrize(("step", "setting", "message"), FOREIGN, ids=[str(setting) for _, setting, _ in FOREIGN])
def test_a_setting_of_the_other_kind_of_step_is_an_error_that_names_it(
    step: str, setting: dict[str, Any], message: str
) -> None:
    other = "gradient" if step == "spectral" else "spectral"
    for arguments in (
        {"step": step, **setting},
        {"step": other, "groups": [{"layers": "l1", "step": step, **setting}]},
    ):
        model = peft_mlp()
        with pytest.raises(ValueError) as caught:
            bare(model, 0.1, **arguments)
        assert str(caught.value).startswith(message)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_group_of_another_kind_of_step_has_its_defaults_and_not_what_the_rest_was_given() -> None:
    given = {"step": "gradient", "gradient": "tangent", "solver": "ritz", "momentum_rank": 2, "loss_reduction": "sum"}
    optimizer = bare(peft_mlp(), 0.1, groups=[{"layers": "l1", "step": "spectral"}], **given)
    rest, group = optimizer.param_groups
    assert [rest[GROUP_KEYS.get(name, name)] for name in given] == list(given.values())
    assert [group[GROUP_KEYS.get(name, name)] for name in given] == ["spectral", "tangent", "als", None, "mean"]
    assert isinstance(Options.from_group(rest), GradientOptions) and isinstance(
        Options.from_group(group), SpectralOptions
    )


def test_a_param_group_of_an_older_version_loads_whatever_its_settings_of_the_other_kind() -> None:
    """They were accepted without effect."""
    model = peft_mlp()
    optimizer = bare(model, 0.1, step="spectral")
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group.update(loss_reduction="sum", metric_bias_correction=False, metric_rank=3)
    optimizer.load_state_dict(saved)
    train(model, optimizer, [data()])
    assert optimizer.stats()["skipped_steps"] == 0 and optimizer.param_groups[0]["metric_rank"] == 3
