"""Mixed precision: autocast through accelerate, fp32 state of 16-bit adapters, fp16 loss scaling, quantised bases."""

from __future__ import annotations

import copy
import importlib
import inspect
import math
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from captures import held
from models import bare, factors
from naive import PlainState, WrapperHooks
from peft import prepare_model_for_kbit_training
from tiny import MODES, adapted, tiny_llama, tokens
from torch import Tensor, nn

from psilora import PSILoRA, lorsum


def half_base(adapter: torch.dtype) -> nn.Module:
    """A bf16 model with adapters in `adapter`, as PEFT leaves them with autocast_adapter_dtype on and off."""
    model = adapted(tiny_llama().to(torch.bfloat16))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter)
    return model


@pytest.mark.scenario(
    3,
    "accelerate",
    gradient="exact",
    tested="bf16 base, bf16 or fp32 adapters, autocast: X kept in 16 bits, state in fp32",
)
@pytest.mark.parametrize("adapter", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mixed", ["no", "bf16"])
def test_a_bf16_base_through_prepare(adapter: torch.dtype, mixed: str) -> None:
    """Traps: prepare() reloads the state and torch rounds it to the parameters' dtype; fp32 adapters copy X to fp32."""
    model = half_base(adapter)
    optimizer = PSILoRA(model, 20.0, step="gradient", momentum=0.9, metric="kfac")  # visible in 8 bits of mantissa
    optimizer.init_state()
    for state in optimizer.state.values():
        state["metric"].fill_(1 / 3)
    naive = PlainState([p for p in model.parameters() if p.requires_grad])
    accelerator = Accelerator(cpu=True, mixed_precision=mixed)
    model, prepared, rounded = accelerator.prepare(model, optimizer, naive)

    third = torch.tensor(1 / 3)
    assert all(torch.equal(state["metric"], third.expand_as(state["metric"])) for state in optimizer.state.values())
    after = {state["momentum"].dtype for state in rounded.optimizer.state.values()}
    assert after == {adapter}, "torch itself casts the fp32 state to the parameter's dtype"

    hooks = WrapperHooks(model)
    accelerator.backward(model(**tokens()).loss)
    for _, record in held(optimizer):
        narrow = torch.bfloat16 if mixed == "bf16" or adapter == torch.bfloat16 else torch.float32
        assert {s.dtype for _, s in record.chunks} == {narrow}
        assert {x.dtype for x, _ in record.chunks} <= {torch.bfloat16, narrow}
    inputs = [x for record in optimizer.captured() for x, _ in record.chunks]
    wide = {x.untyped_storage().data_ptr() for x in inputs if x.dtype != torch.bfloat16}
    shared = {x.untyped_storage().data_ptr() for x in inputs if x.dtype == torch.bfloat16}
    assert 0 < len(shared) < len(inputs) - len(wide)  # q, k and v share one
    assert len(wide) <= 3  # of the first block, whose input has no graph to recognise a cast by
    assert hooks.worst() < 0.1
    before = factors(model)
    prepared.step()
    assert all(state[key].dtype == torch.float32 for state in optimizer.state.values() for key in state)
    assert all(not torch.equal(before[name], value) for name, value in factors(model).items())


@pytest.mark.scenario(
    8, "torch GradScaler", gradient="exact, tangent, spectral", tested="fp16 loss scaling with a forced overflow"
)
@pytest.mark.parametrize("mode", MODES)
def test_a_grad_scaler_with_a_forced_overflow(mode: str) -> None:
    """Traps: S carries the loss scale, `.grad` does not; after an overflow step() may not come and X, S are stale."""
    scaled = adapted()
    plain = copy.deepcopy(scaled)
    settings: dict[str, Any] = {**MODES[mode], "momentum": 0.0}
    ours, theirs = bare(scaled, 0.1, **settings), bare(plain, 0.1, **settings)
    naive = WrapperHooks(scaled)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    wrong = []
    for step in range(3):
        batch, overflow = tokens(seed=step), step == 1
        scaled.zero_grad()
        scaler.scale(scaled(**batch).loss * (float("inf") if overflow else 1)).backward()
        if not overflow:  # as for clipping; at the overflow the scaler itself unscales
            scaler.unscale_(ours)
        wrong.append(naive.worst())
        scaler.step(ours)
        scaler.update()
        if not overflow:
            naive.clear()  # as a step would, which does not come after an overflow
            theirs.zero_grad()
            plain(**batch).loss.backward()
            theirs.step()
    assert wrong[0] == pytest.approx(1023.0, rel=1e-3) and math.isnan(wrong[2])
    assert scaler.get_scale() == 512.0
    assert ours.stats()["skipped_steps"] == 0
    a, b = factors(scaled), factors(plain)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=2e-4, atol=2e-6)


PROJECTIONS = ("q_proj", "v_proj", "down_proj")


def quantised(kind: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The tiny model with its projections in bitsandbytes' or torchao's 4 or 8 bits, without adapters."""
    model = tiny_llama().to(dtype)
    if kind == "torchao-int8":
        quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        layers = pytest.importorskip("peft.tuners.lora.torchao", reason="this PEFT knows no torchao")
        required = inspect.signature(layers.TorchaoLoraLinear.__init__).parameters.get("get_apply_tensor_subclass")
        if required is not None and required.default is required.empty:
            pytest.skip("this PEFT takes torchao's bases from transformers alone")
        quantization.quantize_(
            model,
            quantization.Int8WeightOnlyConfig(),
            filter_fn=lambda module, name: name.rpartition(".")[2] in PROJECTIONS,
        )
        return model
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    if kind == "int8" and not hasattr(bnb.MatmulLtState(), "memory_efficient_backward"):
        if "memory_efficient_backward" in inspect.getsource(importlib.import_module("peft.tuners.lora.bnb")):
            pytest.skip("this PEFT does not go with this bitsandbytes in 8 bits")
    for module in list(model.modules()):
        for name, linear in list(module.named_children()):
            if name in PROJECTIONS:
                if kind == "int8":
                    small = bnb.nn.Linear8bitLt(
                        linear.in_features, linear.out_features, bias=False, has_fp16_weights=False
                    )
                else:
                    small = bnb.nn.Linear4bit(
                        linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type=kind
                    )
                small.load_state_dict(linear.state_dict())
                setattr(module, name, small.to("cpu"))  # which packs the weight
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = kind != "int8", kind == "int8"
    return model


def unpacked(weight: Any) -> Tensor:
    """The weight that packed integers stand for, in fp32."""
    if hasattr(weight, "quant_state"):
        import bitsandbytes as bnb

        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    return weight.dequantize().float()


def stored(weight: Any) -> list[Tensor]:
    """What a packed weight is made of."""
    if hasattr(weight, "__tensor_flatten__"):
        return [getattr(weight, name).clone() for name in weight.__tensor_flatten__()[0]]
    return [weight.detach().clone()]


#: What PEFT says of a base that torchao made without a configuration of transformers, and torchao and its import say.
unprepared = pytest.mark.filterwarnings("ignore:.*instantiated without `get_apply_tensor_subclass`")
WEIGHT_ONLY = ("nf4", "fp4", "torchao-int8")


@pytest.mark.scenario(
    4, "bitsandbytes", gradient="exact", tested="nf4, fp4 and int8 bases on the CPU: X and S give the oracle's step"
)
@pytest.mark.scenario(4, "torchao", gradient="exact", tested="int8 bases on the CPU: X and S give the oracle's step")
@unprepared
@pytest.mark.parametrize("kind", [*WEIGHT_ONLY, "int8"])
def test_a_step_over_a_quantised_base(kind: str) -> None:
    """The traps: the base weight is packed integers, of another shape and dtype than the layer, and the input of int8
    is rounded on its way to the base but not on that to `lora_A`."""
    model = adapted(quantised(kind, torch.float32))
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert {name.rpartition(".")[2] for name in layers} == set(PROJECTIONS)
    packed = {name: stored(layer.get_base_layer().weight) for name, layer in layers.items()}
    assert all(any(not part.is_floating_point() for part in parts) for parts in packed.values())
    optimizer = PSILoRA(model, 0.1, step="gradient", momentum=0.0)
    hooks = WrapperHooks(model)
    model(**tokens()).loss.backward()
    expected = {}
    for name, layer in layers.items():
        A, B, root = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"] ** 0.5
        X, S = (torch.cat([part.flatten(0, -2) for part in side[name]]).double() for side in (hooks.X, hooks.S))
        terms = [(root * B.detach().double(), root * A.detach().double()), (S.mT, X)]
        expected[name] = lorsum(terms, [1.0, -0.1], prox=0.1 * 1e-2)
    optimizer.step()
    for name, layer in layers.items():
        root = layer.scaling["default"] ** 0.5
        for new, factor in zip(expected[name], (layer.lora_B, layer.lora_A), strict=True):
            torch.testing.assert_close(factor["default"].weight.double() * root, new, rtol=2e-5, atol=2e-7)
        base = stored(layer.get_base_layer().weight)
        assert all(torch.equal(old, now) for old, now in zip(packed[name], base, strict=True)), name


@pytest.mark.scenario(
    4, "bitsandbytes", gradient="exact, tangent, spectral", tested="nf4 and fp4 bases on the CPU: as unpacked bases"
)
@pytest.mark.scenario(4, "torchao", gradient="exact, tangent, spectral", tested="int8 bases on the CPU: as unpacked")
@unprepared
@pytest.mark.parametrize("kind", WEIGHT_ONLY)
@pytest.mark.parametrize("mode", MODES)
def test_a_quantised_base_trains_as_the_weight_it_stands_for(kind: str, mode: str) -> None:
    small = quantised(kind, torch.float32)
    weights = {name: unpacked(module.weight) for name, module in small.named_modules() if name.endswith(PROJECTIONS)}
    plain = tiny_llama()
    exact_weights = {name: module.weight.detach().clone() for name, module in plain.named_modules() if name in weights}
    for name, weight in weights.items():
        plain.get_submodule(name).weight.data.copy_(weight)
        assert 1e-4 < float((weight - exact_weights[name]).norm() / exact_weights[name].norm()) < 0.5, "not quantised"
    models = [adapted(small), adapted(plain)]
    start = factors(models[0])
    for model in models:
        optimizer = PSILoRA(model, 0.05, **MODES[mode])
        for seed in range(3):
            optimizer.zero_grad()
            model(**tokens(seed=seed)).loss.backward()
            optimizer.step()
    ours, theirs = map(factors, models)
    for name in ours:
        moved = (theirs[name] - start[name]).norm()
        assert float((ours[name] - theirs[name]).norm() / moved) < 1e-3, name
        assert moved > 0


@pytest.mark.gpu
@pytest.mark.scenario(
    4, "bitsandbytes", gradient="exact, tangent", tested="QLoRA in 4 and 8 bits on a GPU: base untouched"
)
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("gradient", ["exact", "tangent"])
def test_qlora_on_a_gpu(kind: str, gradient: str) -> None:
    """The same on CUDA, through PEFT's preparation, with a bf16 model."""
    model = adapted(prepare_model_for_kbit_training(quantised(kind).cuda())).cuda()
    optimizer = PSILoRA(model, 0.1, step="gradient", gradient=gradient)
    frozen: dict[str, Tensor] = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = factors(model)
    batch = {name: value.cuda() for name, value in tokens().items()}
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    assert any(not p.is_floating_point() for p in frozen.values())
    assert all(torch.equal(value, dict(model.named_parameters())[name]) for name, value in frozen.items())
    assert all(not torch.equal(before[name], value) for name, value in factors(model).items())
    assert optimizer.stats()["skipped_steps"] == 0
