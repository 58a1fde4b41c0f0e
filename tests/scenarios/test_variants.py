"""Every kind of adapter that PEFT makes: exact, the tangent gradient with a warning, or refused by name."""

from __future__ import annotations

import types
import warnings
from typing import Any

import pytest
import torch
from captures import scales_and_residuals
from models import bare, factors, train
from naive import WrapperHooks
from peft import get_peft_model
from releases import lora_config
from tiny import TARGETS, adapted, lora, tiny_gpt2, tiny_llama, tokens
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from psilora import PSILoRA


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss


def residual(optimizer: PSILoRA) -> float:
    """The largest ‖dB − S_Bᵀ(XAᵀ)‖ / ‖dB‖."""
    return max(error for _, error in scales_and_residuals(optimizer, scaled=False).values())


# Settings, and whether hooks on the adapted layer itself would have been wrong.
EXACT: dict[str, tuple[dict[str, Any], bool]] = {
    "plain": ({}, False),
    "rsLoRA": ({"use_rslora": True}, False),
    "rank_pattern, alpha_pattern": ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}, False),
    "dropout": ({"lora_dropout": 0.2}, True),
    "DoRA": ({"use_dora": True}, True),
    "DoRA, dropout": ({"use_dora": True, "lora_dropout": 0.2}, True),
    "lora_bias": ({"lora_bias": True, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, False),
    "Conv1D": ({"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}, False),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, False),
}


@pytest.mark.scenario(
    9,
    "PEFT",
    gradient="exact",
    tested="rsLoRA, rank_pattern, alpha_pattern, DoRA, dropout, Conv1D, lora_bias, modules_to_save",
)
@pytest.mark.filterwarnings("ignore:Model.* with `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("variant", EXACT)
def test_exact_variants(variant: str) -> None:
    config, trap = EXACT[variant]
    lora_config(**config)
    base = tiny_gpt2() if "fan_in_fan_out" in config else tiny_llama()
    model = adapted(base, **config).train()
    naive = WrapperHooks(model)
    optimizer = PSILoRA(model, 0.1, step="gradient")
    loss(model, tokens()).backward()
    assert residual(optimizer) < 1e-5
    assert (naive.worst() > 0.1) == trap
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer.step()
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.scenario(
    9, "PEFT", gradient="exact", tested="two adapters: the active one trains, the other stays as it is"
)
def test_two_adapters() -> None:
    """The trap: after set_adapter the hooks of the first adapter see nothing, and step() must not move it."""
    model = get_peft_model(tiny_llama(), lora(), adapter_name="one")
    model.add_adapter("two", lora(r=3))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    model.set_adapter("two")
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if ".one." in name}
    assert frozen
    optimizer = PSILoRA(model, 0.1, step="gradient")
    loss(model, tokens()).backward()
    assert residual(optimizer) < 1e-5
    optimizer.step()
    assert all(torch.equal(value, dict(model.named_parameters())[name]) for name, value in frozen.items())


@pytest.mark.scenario(9, "PEFT", gradient="tangent", tested="embeddings: falls back, with a warning that names them")
def test_embeddings_fall_back_by_name() -> None:
    """The trap: an embedding calls no lora_A, so a hook there captures nothing and says nothing."""
    model = adapted(target_modules=["embed_tokens", "q_proj"])
    naive = WrapperHooks(model)
    with pytest.warns(UserWarning, match="tangent gradient .* for base_model.model.model.embed_tokens "):
        optimizer = PSILoRA(model, 0.1, step="gradient")
    before = factors(model)
    loss(model, tokens()).backward()
    layer = naive.layers["base_model.model.model.embed_tokens"]
    assert not layer.lora_A and layer.lora_embedding_A["default"].grad is not None
    optimizer.step()
    assert all(not torch.equal(before[name], value) for name, value in factors(model).items())


@pytest.mark.scenario(
    9, "PEFT", gradient="refused", tested="target_parameters of a mixture of experts: refused by name, or AdamW"
)
def test_experts_are_refused_by_name_or_given_to_adamw() -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=259,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    settings = lora_config(
        r=2, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"], task_type="CAUSAL_LM"
    )
    base = MixtralForCausalLM(config)
    if not any(name.endswith("experts.gate_up_proj") for name, _ in base.named_parameters()):
        pytest.skip("each expert is a module of its own in this transformers, and its layers are pairs like others")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own advice about target_parameters
        model = get_peft_model(base, settings)
    with pytest.raises(ValueError, match=r"cannot be trained as ΔW = s·B·A: .*experts .*one product for each of 4"):
        bare(model, 0.1)
    optimizer = PSILoRA(model, 0.1, step="gradient", unsupported="adamw")
    before = factors(model)
    for _ in range(2):  # B = 0 at first: A's gradient comes in the second step
        train(model, optimizer, [tokens()], loss)
    moved = {name: not torch.equal(before[name], value) for name, value in factors(model).items()}
    assert moved and all(moved.values())


class FusedLoRA(torch.autograd.Function):
    """y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ with a backward of its own that overwrites x, as memory-saving kernels do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
        ctx.save_for_backward(x, W, A, B)
        ctx.s = s
        return x @ W.mT + s * (x @ A.mT) @ B.mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B = ctx.saved_tensors
        flat_x, flat = x.flatten(0, -2), grad.flatten(0, -2)
        dA = ctx.s * (flat @ B).mT @ flat_x
        dB = ctx.s * flat.mT @ (flat_x @ A.mT)
        dx = grad @ W + ctx.s * (grad @ B) @ A
        x.detach().copy_(dx)
        return dx, None, dA, dB, None


def fuse(model: nn.Module) -> None:
    """Replace the forward of every adapted layer by the kernel, which reads the weights and calls no inner layer."""
    for module in model.modules():
        if hasattr(module, "lora_A"):

            def forward(self: Any, x: Tensor) -> Tensor:
                A, B = self.lora_A["default"].weight, self.lora_B["default"].weight
                return FusedLoRA.apply(x.clone(), self.base_layer.weight, A, B, self.scaling["default"])

            module.forward = types.MethodType(forward, module)


@pytest.mark.scenario(
    10, "fused kernels", gradient="tangent", tested="a kernel that bypasses lora_A and lora_B: warns, falls back"
)
def test_a_kernel_that_bypasses_the_modules() -> None:
    """The trap: hooks on lora_A never fire, so an optimizer that needs X trains nothing, or on old rows, silently."""
    plain, fused = adapted(), adapted()
    fuse(fused)
    torch.testing.assert_close(loss(fused, tokens()), loss(plain, tokens()))
    fired: list[str] = []
    for name, module in fused.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_pre_hook(lambda *_, name=name: fired.append(name))
    ours = PSILoRA(fused, 0.1, step="gradient")
    theirs = PSILoRA(plain, 0.1, step="gradient", gradient="tangent")
    with pytest.warns(UserWarning, match=f"without captured activations .* for .*{TARGETS[0]}"):
        train(fused, ours, [tokens()], loss)
    assert not fired
    train(plain, theirs, [tokens()], loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        train(fused, ours, [tokens(seed=1)], loss)
    train(plain, theirs, [tokens(seed=1)], loss)
    a, b = factors(fused), factors(plain)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5)
