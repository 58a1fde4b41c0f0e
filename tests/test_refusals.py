"""Bad input and bad gradients: a clear error, or a counted no-op; nothing lost and nothing half-updated."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MLP, bare, data, factors, mse, peft_mlp, plain_mlp, randomise_B, train
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from psilora import LoRALinear, PSILoRA

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


def test_the_model_is_required_not_its_parameters() -> None:
    with pytest.raises(TypeError, match="model must be an nn.Module, got generator"):
        bare(plain_mlp().parameters(), 0.1)  # type: ignore[arg-type]


def test_no_pair_is_an_error() -> None:
    with pytest.raises(ValueError, match="no trainable LoRA pair"):
        bare(MLP((24, 20, 16, 6)), 0.1)
    frozen = plain_mlp().requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable LoRA pair"):
        bare(frozen, 0.1)


@pytest.mark.parametrize("alpha", [0, -8])
def test_a_scaling_that_is_not_positive_is_refused_before_the_first_step(alpha: int) -> None:
    with pytest.raises(ValueError, match=rf"l1 \(its LoRA scaling is {alpha / 4}, and must be > 0\)"):
        bare(peft_mlp(lora_alpha=alpha), 0.1)


def test_wrapped_models_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="nn.DataParallel"):
        bare(nn.DataParallel(plain_mlp()), 0.1)
    engine = type("DeepSpeedEngine", (nn.Module,), {})()
    engine.module = plain_mlp()
    with pytest.raises(ValueError, match="DeepSpeed"):
        bare(engine, 0.1)
    model = plain_mlp()
    model.l1.lora_A.weight.ds_id = 3
    with pytest.raises(ValueError, match="DeepSpeed"):
        bare(model, 0.1)


def test_complex_factors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"l1.base.weight is complex|complex \(torch.complex64\)"):
        model = plain_mlp()
        model.l1.lora_A.weight = nn.Parameter(model.l1.lora_A.weight.cfloat())
        bare(model, 0.1)


def test_factors_that_do_not_chain_are_refused_by_name() -> None:
    model = plain_mlp()
    model.l2.lora_A = nn.Linear(20, 3, bias=False).double()
    with pytest.raises(ValueError, match=r"l2 \(the shapes \(16, 4\) of lora_B and \(3, 20\) of lora_A do not chain"):
        bare(model, 0.1)


def test_one_frozen_factor_is_refused_or_given_to_adamw() -> None:
    model = plain_mlp()
    model.l2.lora_A.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"l2 \(only lora_B is trainable"):
        bare(model, 0.1)
    optimizer = bare(model, 0.1, unsupported="adamw")
    assert optimizer.param_groups[-1]["params"] == [model.l2.lora_B.weight]
    before = model.l2.lora_B.weight.detach().clone()
    train(model, optimizer, [data()])
    assert not torch.equal(before, model.l2.lora_B.weight)


def test_a_factor_shared_by_two_products_is_refused() -> None:
    model = plain_mlp((24, 24, 24, 6))
    model.l2.lora_A.weight = model.l1.lora_A.weight
    with pytest.raises(ValueError, match=r"l2 \(it shares one factor with l1"):
        bare(model, 0.1)


@pytest.mark.parametrize("modules", [False, True])
def test_tied_pairs_are_one_pair_captured_at_both_modules(modules: bool) -> None:
    """The trap where the inner layers themselves are shared: found under two names, they would be hooked twice."""
    model = plain_mlp((24, 24, 24, 6))
    if modules:
        model.l2.lora_A, model.l2.lora_B = model.l1.lora_A, model.l1.lora_B
    else:
        model.l2.lora_A.weight, model.l2.lora_B.weight = model.l1.lora_A.weight, model.l1.lora_B.weight
    optimizer = bare(model, 0.1)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4
    mse(model, data()).backward()
    assert [record.calls for record in optimizer._capture.records.values()] == [2, 1]
    optimizer.step()  # the first capture is checked against .grad


@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
def test_sparse_gradients_are_refused_before_anything_changes(name: str) -> None:
    model = plain_mlp()
    optimizer = bare(model, 0.1)
    mse(model, data()).backward()
    before = factors(model)
    weight = getattr(model.l1, name).weight
    weight.grad = weight.grad.to_sparse()
    with pytest.raises(RuntimeError, match="l1: sparse gradients are not supported"):
        optimizer.step()
    assert all(torch.equal(before[key], value) for key, value in factors(model).items())


# ---- adapters that cannot be captured --------------------------------------------------------------------------------


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(30, 24), nn.Linear(24, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.table(tokens))


class CastingConv(nn.Conv2d):
    """A convolution with a forward of its own, which PEFT gives to lora_A and lora_B as well."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = CastingConv(3, 8, 3), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.conv(x).mean((2, 3)))


def embedding_model() -> tuple[nn.Module, Tensor]:
    model = get_peft_model(Words(), LoraConfig(r=3, target_modules=["table", "out"])).double()
    return model, torch.randint(0, 30, (40,))


def conv_model() -> tuple[nn.Module, Tensor]:
    model = get_peft_model(Images(), LoraConfig(r=3, target_modules=["conv", "out"])).double()
    return model, torch.randn(10, 3, 6, 6, dtype=torch.float64).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("make", "layer"), [(embedding_model, "base_model.model.table"), (conv_model, "base_model.model.conv")]
)
def test_uncapturable_layers_fall_back_by_name_and_still_train(make: Any, layer: str) -> None:
    model, x = make()
    randomise_B(model)
    with pytest.warns(UserWarning, match=f"using the tangent gradient .* for {layer} ") as seen:
        optimizer = bare(model, 0.2)
    assert Path(seen[0].filename).name == "models.py", "the line that calls PSILoRA"
    loss = lambda: (model(x) - 1).square().mean()  # noqa: E731
    start = loss().item()
    before = factors(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(20):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
    assert all(not torch.equal(before[key], value) for key, value in factors(model).items())
    assert loss().item() < 0.7 * start


def test_a_metric_without_activations_is_refused_by_name() -> None:
    model, _ = embedding_model()
    with pytest.raises(ValueError, match=r"the metric needs activations .* base_model.model.table"):
        bare(model, 0.1, metric="kfac")
    bare(model, 0.1, metric="kfac", groups=[{"layers": "table", "metric": None, "gradient": "tangent"}])


def test_bare_factors_of_loralib_style_fall_back() -> None:
    class Old(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 24), requires_grad=False)
            self.lora_A, self.lora_B = nn.Parameter(torch.randn(3, 24)), nn.Parameter(torch.randn(6, 3))
            self.scaling = 2.0

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.weight + self.scaling * self.lora_B @ self.lora_A).T

    model = nn.Sequential(Old()).double()
    with pytest.warns(UserWarning, match=r"0 \(its factors are bare parameters"):
        optimizer = bare(model, 0.1)
    train(model, optimizer, [data()])


def test_kernels_that_bypass_the_modules_are_noticed() -> None:
    """A fused kernel reads the weights; its gradient is right, but lora_A is never called."""

    class Fused(LoRALinear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.base.weight + self.scaling * self.lora_B.weight @ self.lora_A.weight).T

    model = nn.Sequential(Fused(nn.Linear(24, 6), 3)).double()
    randomise_B(model)
    optimizer = bare(model, 0.1)
    with pytest.warns(UserWarning, match=r"gradients without captured activations .* for 0"):
        train(model, optimizer, [data()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        train(model, optimizer, [data()])
    metric = bare(model, 0.1, metric="kfac")
    before = factors(model)
    with pytest.raises(RuntimeError, match="0: the metric needs activations, but none were captured"):
        train(model, metric, [data()])
    assert all(torch.equal(before[key], value) for key, value in factors(model).items())


def test_moe_parameters_are_refused_by_name() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 24, 6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("ni,eio->no", x, self.weight)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts, self.out = Experts(), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.experts(x))

    config = LoraConfig(r=2, target_modules=["out"], target_parameters=["experts.weight"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own advice about target_parameters
        model = get_peft_model(Net(), config)
    with pytest.raises(
        ValueError, match="cannot be trained as ΔW = s·B·A: .*experts .*one product for each of 4 experts"
    ):
        bare(model, 0.1)


# ---- non-finite gradients --------------------------------------------------------------------------------------------


def head_and_adapter() -> nn.Module:
    model = plain_mlp(dtype=torch.float32)
    model.l3.base.bias.requires_grad_()
    return model


def everything(model: nn.Module, optimizer: PSILoRA) -> list[Tensor]:
    state = [value.clone() for s in optimizer.state.values() for value in s.values()]
    return [p.detach().clone() for p in model.parameters()] + state


KINDS = [{}, {"metric": "kfac"}, {"gradient": "tangent"}, {"num_iters": 0}, {"num_iters": 2, "first": "B"}]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("where", ["loss", "lora_A", "lora_B", "bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_gradient_skips_the_whole_step(kind: dict[str, Any], where: str, value: float) -> None:
    model = head_and_adapter()
    optimizer = bare(model, 0.1, **kind)
    train(model, optimizer, [data(dtype=torch.float32)] * 2)
    before = everything(model, optimizer)

    def poisoned_step() -> None:
        optimizer.zero_grad()
        (mse(model, data(dtype=torch.float32)) * (value if where == "loss" else 1)).backward()
        if where != "loss":
            parameter = model.l3.base.bias if where == "bias" else getattr(model.l2, where).weight
            parameter.grad.view(-1)[3] = value
        optimizer.step()

    with pytest.warns(UserWarning, match="a step was skipped"):
        poisoned_step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        poisoned_step()
    assert all(torch.equal(a, b) for a, b in zip(before, everything(model, optimizer), strict=True))
    assert optimizer.stats()["skipped_steps"] == 2
    train(model, optimizer, [data(dtype=torch.float32)])
    assert all(bool(torch.isfinite(t).all()) for t in everything(model, optimizer))
    assert optimizer.stats()["skipped_steps"] == 2


def test_non_finite_can_raise_and_name_the_layers() -> None:
    model = head_and_adapter()
    optimizer = bare(model, 0.1, nonfinite="raise")
    train(model, optimizer, [data(dtype=torch.float32)])
    before = everything(model, optimizer)
    for name, weight in (("l2", model.l2.lora_A.weight), ("parameters outside", model.l3.base.bias)):
        optimizer.zero_grad()
        mse(model, data(dtype=torch.float32)).backward()
        weight.grad.view(-1)[0] = float("nan")
        with pytest.raises(RuntimeError, match=f"non-finite gradient or update in {name}.*nothing|no parameter"):
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, everything(model, optimizer), strict=True))


def test_repaired_pivots_are_counted_and_warned_about_once() -> None:
    """Equal columns in B make BᵀB singular; without a proximal term Cholesky fails and must be repaired."""
    model = plain_mlp(dtype=torch.float32)
    with torch.no_grad():
        for layer in (model.l1, model.l2, model.l3):
            layer.lora_B.weight.copy_(layer.lora_B.weight[:, :1].expand(-1, 4).clone())
            layer.lora_A.weight.zero_()
            layer.lora_A.weight[0] = 1.0
    optimizer = bare(model, 1e-3, prox=0.0, momentum=0.0)
    with pytest.warns(UserWarning, match="not positive definite"):
        train(model, optimizer, [data(dtype=torch.float32)])
    assert optimizer.stats()["repaired_pivots"] > 0
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, [data(dtype=torch.float32)])


def test_later_groups_and_copies_are_refused() -> None:
    optimizer = bare(plain_mlp(), 0.1)
    with pytest.raises(ValueError, match="build a new PSILoRA"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    with pytest.raises(TypeError, match="use state_dict"):
        import pickle

        pickle.dumps(optimizer)
