"""Mixed precision: autocast through accelerate, fp32 state of 16-bit adapters, fp16 loss scaling, quantised bases."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from models import bare, factors
from naive import PlainState, WrapperHooks
from peft import prepare_model_for_kbit_training
from tiny import MODES, adapted, tiny_llama, tokens
from torch import Tensor, nn

from psilora import PSILoRA


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


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
    for pair in optimizer._pairs.values():
        record = optimizer._capture.record(pair)
        assert record is not None and record.captured
        narrow = torch.bfloat16 if mixed == "bf16" or adapter == torch.bfloat16 else torch.float32
        assert {s.dtype for _, s in record.chunks} == {narrow}
        assert {x.dtype for x, _ in record.chunks} <= {torch.bfloat16, narrow}
    inputs = [x for record in optimizer._capture.records.values() for x, _ in record.chunks]
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


def quantised(bits: int) -> nn.Module:
    """The tiny model with its projections in bitsandbytes' 4 or 8 bits, under fp32 adapters."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = tiny_llama().to(torch.bfloat16)
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, nn.Linear):
                    options = {"bias": False}
                    four = {**options, "compute_dtype": torch.bfloat16, "quant_type": "nf4"}
                    make, kind = (
                        (bnb.nn.Linear4bit, four)
                        if bits == 4
                        else (bnb.nn.Linear8bitLt, {**options, "has_fp16_weights": False})
                    )
                    small = make(linear.in_features, linear.out_features, **kind)
                    small.load_state_dict(linear.state_dict())
                    setattr(part, name, small)
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = bits == 4, bits == 8
    return adapted(prepare_model_for_kbit_training(model.cuda())).cuda()


@pytest.mark.gpu
@pytest.mark.scenario(
    4, "bitsandbytes", gradient="exact, tangent", tested="QLoRA in 4 and 8 bits: base untouched (GPU only)"
)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("gradient", ["exact", "tangent"])
def test_qlora(bits: int, gradient: str) -> None:
    """The trap: the base weight is packed integers, whose shape and dtype are not the layer's."""
    model = quantised(bits)
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
