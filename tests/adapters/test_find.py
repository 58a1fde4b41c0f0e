"""Bad input and bad gradients: a clear error, or a counted no-op; nothing lost and nothing half-updated."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MLP, bare, data, factors, mse, peft_mlp, plain_mlp, randomise_B, train
from peft import LoraConfig, get_peft_model
from releases import lora_config
from torch import Tensor, nn

from psilora import LoRALinear


def test_the_model_is_required_not_its_parameters() -> None:
    with pytest.raises(TypeError, match="model must be an nn.Module, got generator"):
        bare(plain_mlp().parameters(), 0.1)  # type: ignore[arg-type]


def test_no_pair_is_an_error() -> None:
    with pytest.raises(ValueError, match="no trainable LoRA pair"):
        bare(MLP((24, 20, 16, 6)), 0.1)
    frozen = plain_mlp().requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable LoRA pair"):
        bare(frozen, 0.1)


@pytest.mark.parametrize("alpha", [0, -8, float("inf"), float("nan")])
def test_a_scaling_that_is_not_positive_is_refused_before_the_first_step(alpha: float) -> None:
    with pytest.raises(ValueError, match=rf"l1 \(its LoRA scaling is {alpha / 4}, and must be finite and > 0\)"):
        bare(peft_mlp(lora_alpha=alpha), 0.1)


def test_a_scaling_of_several_numbers_is_refused() -> None:
    model = plain_mlp()
    model.l1.scaling = torch.ones(2)
    with pytest.raises(ValueError, match=r"l1 \(its LoRA scaling has shape \(2,\), and must be one number\)"):
        bare(model, 0.1)


def test_a_scaling_that_is_no_longer_finite_is_refused_by_the_step() -> None:
    model = plain_mlp()
    optimizer = bare(model, 0.1)
    model.l2.scaling = float("inf")
    mse(model, data()).nan_to_num().backward()
    with pytest.raises(ValueError, match=r"l2: invalid LoRA scaling=inf. Must be finite and > 0."):
        optimizer.step()


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
    assert [record.calls for record in optimizer.captured()] == [2, 1]
    optimizer.step()  # the first capture is checked against .grad


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

    config = lora_config(r=2, target_modules=["out"], target_parameters=["experts.weight"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own advice about target_parameters
        model = get_peft_model(Net(), config)
    with pytest.raises(
        ValueError, match="cannot be trained as ΔW = s·B·A: .*experts .*one product for each of 4 experts"
    ):
        bare(model, 0.1)
