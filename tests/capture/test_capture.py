"""Captured X and S against autograd's own LoRA gradients, for every way an adapter can be run."""

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from captures import VARIANTS, assert_exact, captured_gradients, held
from models import MLP, Checkpointed, bare, data, mse, peft_mlp, plain_mlp, randomise_B
from peft import LoraConfig, get_peft_model
from tiny import adapted, tiny_gpt2, tokens
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from psilora import PSILoRA

PATTERNS = {"rank_pattern": {"l1": 2, "l2": 7}, "alpha_pattern": {"l3": 5}}
ALL_VARIANTS = {**VARIANTS, "patterns": PATTERNS}


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_peft_variants(variant: str) -> None:
    model = peft_mlp(**ALL_VARIANTS[variant]).train()
    optimizer = bare(model)
    mse(model, data()).backward()
    assert_exact(optimizer)


def test_lora_linear() -> None:
    model = plain_mlp()
    optimizer = bare(model)
    mse(model, data()).backward()
    assert_exact(optimizer)


def test_conv1d_of_transformers() -> None:
    """GPT-2's projections keep their weight transposed; the inner layers of their adapters are linear all the same."""
    targets = ["c_attn", "c_proj", "c_fc"]
    model = adapted(tiny_gpt2(), target_modules=targets, fan_in_fan_out=True, lora_dropout=0.1).double().train()
    assert any(isinstance(module, Conv1D) for module in model.modules())
    optimizer = bare(model)
    pairs = optimizer.pairs()
    assert len(pairs) == 8 and any(pair.d_in != pair.d_out for pair in pairs)
    for seed in range(2):
        model(**tokens(seed=seed)).loss.backward()
    assert_exact(optimizer)


def test_only_the_active_adapter_is_trained() -> None:
    model = get_peft_model(MLP((24, 20, 16, 6)), LoraConfig(r=4, target_modules=["l1", "l2"]), adapter_name="one")
    model.add_adapter("two", LoraConfig(r=3, target_modules=["l1", "l2"]))
    model.set_adapter("two")
    model = model.double()
    randomise_B(model)
    optimizer = bare(model)
    assert [pair.name.endswith(" (two)") for pair in optimizer.pairs()] == [True, True]
    mse(model, data()).backward()
    assert_exact(optimizer)


def test_inputs_with_sequence_dimension_and_non_contiguous() -> None:
    model = peft_mlp()
    optimizer = bare(model)
    x = torch.randn(24, 5, 7, dtype=torch.float64).permute(2, 1, 0)
    model(x).square().mean().backward()
    assert_exact(optimizer)


def test_several_forwards_before_one_backward_and_accumulation() -> None:
    model = peft_mlp()
    optimizer = bare(model)
    (mse(model, data()) + 2 * mse(model, data(7))).backward()
    for rows in (3, 11):
        mse(model, data(rows)).backward()
    assert_exact(optimizer)
    record = optimizer.captured()[0]
    assert record.calls == 4 and record.rows == 32 + 7 + 3 + 11


def test_backward_twice_through_one_graph() -> None:
    model = peft_mlp()
    optimizer = bare(model)
    loss = mse(model, data())
    loss.backward(retain_graph=True)
    loss.backward()
    assert_exact(optimizer)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_of_both_kinds(use_reentrant: bool) -> None:
    model = peft_mlp(lora_dropout=0.2).train()
    optimizer = bare(model)
    wrapped = Checkpointed(model, use_reentrant)
    x, y = data()
    for _ in range(2):  # a shared module in two checkpointed calls
        (wrapped(x.requires_grad_()) - y).square().mean().backward()
    assert_exact(optimizer)
    assert all(record.calls == 2 for record in optimizer.captured())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_does_not_keep_inputs_alive_before_backward(use_reentrant: bool) -> None:
    """The trap: a forward hook that stores X keeps every checkpointed activation until backward."""
    seen: list[weakref.ref[Tensor]] = []
    model = plain_mlp()
    optimizer = bare(model)
    model.l2.lora_A.register_forward_pre_hook(lambda _m, args: seen.append(weakref.ref(args[0])))
    x, y = data()
    output = Checkpointed(model, use_reentrant)(x.requires_grad_())
    gc.collect()
    assert len(seen) == 1 and seen[0]() is None
    (output - y).square().mean().backward()
    assert_exact(optimizer)


def test_x_is_the_tensor_autograd_keeps_anyway() -> None:
    model = plain_mlp()
    optimizer = bare(model)
    x, y = data()
    mse(model, (x, y)).backward()
    record = optimizer.captured()[0]
    assert record.chunks[0][0].untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def test_shared_input_is_counted_once() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.v = nn.Linear(24, 6), nn.Linear(24, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) + self.v(x)

    model = get_peft_model(TwoHeads(), LoraConfig(r=2, target_modules=["q", "v"])).double()
    randomise_B(model)
    optimizer = bare(model)
    x, y = data()
    mse(model, (x, y)).backward()
    held = {t.untyped_storage().data_ptr() for r in optimizer.captured() for t in r.chunks[0]}
    assert x.untyped_storage().data_ptr() in held
    assert optimizer.capture_bytes() <= (32 * 24 + 2 * 32 * 6) * 8


def test_no_grad_forward_in_train_mode_captures_nothing() -> None:
    model = peft_mlp().train()
    optimizer = bare(model)
    with torch.no_grad():
        model(data()[0])
    mse(model, data()).backward()
    assert_exact(optimizer)
    assert all(record.calls == 1 for record in optimizer.captured())


def test_eval_mode_with_gradients_is_captured() -> None:
    model = peft_mlp(lora_dropout=0.5).eval()
    optimizer = bare(model)
    mse(model, data()).backward()
    assert_exact(optimizer)


def test_autograd_grad_leaves_no_trace() -> None:
    """A gradient penalty or an attribution passes through the layers without touching .grad."""
    model = peft_mlp()
    optimizer = bare(model)
    x, y = data()
    for _ in range(2):
        optimizer.zero_grad()
        inputs = x.clone().requires_grad_()
        torch.autograd.grad(mse(model, (inputs, y)), inputs)
        mse(model, (x, y)).backward()
        torch.autograd.grad(mse(model, (inputs, y)), [p for p in model.parameters() if p.requires_grad])
        assert_exact(optimizer)
        assert all(record.calls == 1 for record in optimizer.captured())
        optimizer.step()


def test_checkpointed_and_plain_calls_of_one_module_in_one_backward() -> None:
    model = plain_mlp()
    optimizer = bare(model)
    for use_reentrant in (False, True):
        optimizer.zero_grad()
        x, y = data()
        plain = mse(model, (x, y))
        checked = (Checkpointed(model, use_reentrant)(x.clone().requires_grad_()) - y).square().mean()
        (plain + checked).backward()
        assert_exact(optimizer)
        assert all(record.calls == 2 for record in optimizer.captured())


def test_disabled_adapter_forward_leaves_no_trace() -> None:
    model = peft_mlp()
    optimizer = bare(model)
    with model.disable_adapter():
        model(data()[0])
    mse(model, data()).backward()
    assert_exact(optimizer)


def test_forward_without_backward_leaves_no_trace() -> None:
    model = peft_mlp()
    optimizer = bare(model)
    model(data()[0])
    mse(model, data()).backward()
    assert_exact(optimizer)


@pytest.mark.parametrize("how", ["model.zero_grad", "optimizer.zero_grad"])
def test_an_abandoned_backward_is_forgotten(how: str) -> None:
    """The Trainer calls model.zero_grad(), and an fp16 overflow skips step(): neither reaches the optimizer."""
    model = peft_mlp()
    optimizer = bare(model)
    mse(model, data()).backward()
    (model if how == "model.zero_grad" else optimizer).zero_grad()
    mse(model, data(7)).backward()
    assert_exact(optimizer)
    assert all(record.rows == 7 for record in optimizer.captured())


CAPTURING: list[dict[str, Any]] = [
    {},
    {"metric": "kfac"},
    {"gradient": "dense"},
    {"gradient": "dense", "metric": "kfac"},
    {"gradient": "backward", "momentum": 0.0},
    {"gradient": "tangent", "metric": "kfac"},
    {"gradient": "tangent", "metric": "shampoo"},
]
DISCARDS: dict[str, Callable[[nn.Module], None]] = {
    "model.zero_grad": lambda model: model.zero_grad(set_to_none=False),
    "zero_": lambda model: [p.grad.zero_() for p in model.parameters() if p.grad is not None],
    "data": lambda model: [p.grad.data.zero_() for p in model.parameters() if p.grad is not None],
    "mul_": lambda model: torch._foreach_mul_([p.grad for p in model.parameters() if p.grad is not None], 0.0),
    "replaced": lambda model: [
        setattr(p, "grad", torch.zeros_like(p)) for p in model.parameters() if p.grad is not None
    ],
}


#: Without those of which a count of rows is held only, which does not tell zero from zeroed.
DISCARDED = [(how, kind) for how in DISCARDS for kind in CAPTURING if how != "data" or kind.get("metric") != "shampoo"]


@pytest.mark.parametrize(("discard", "kind"), DISCARDED, ids=str)
@pytest.mark.parametrize("zero_B", [False, True])
def test_gradients_discarded_in_place_take_their_captures_along(
    kind: dict[str, Any], discard: str, zero_B: bool
) -> None:
    """The trap: `.grad` is not None, so the next pass looks like one more of the same step."""
    model = plain_mlp()
    if zero_B:  # where dA is zero of itself
        randomise_B(model, 0.0)
    twin = copy.deepcopy(model)
    ours, theirs = bare(model, **kind), bare(twin, **kind)
    for _ in range(2):
        batch, sizes = data(7), []
        for rows in (32, 5):
            mse(model, data(rows)).backward()
            sizes.append(ours.capture_bytes())
            DISCARDS[discard](model)
        assert sizes[1] <= sizes[0]
        for m, optimizer in ((model, ours), (twin, theirs)):
            mse(m, batch).backward()
            optimizer.step()
            m.zero_grad(set_to_none=m is not model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("kind", [kind for kind in CAPTURING if kind.get("gradient") != "backward"], ids=str)
@pytest.mark.parametrize("zero_B", [False, True])
def test_zeroed_gradients_accumulate_as_absent_ones_do(kind: dict[str, Any], zero_B: bool) -> None:
    """Rows without a loss belong to the step although `.grad` is zero after them: N and the metric count them."""
    model = plain_mlp()
    if zero_B:
        randomise_B(model, 0.0)
    twin = copy.deepcopy(model)
    ours, theirs = bare(model, **kind), bare(twin, **kind)
    for _ in range(3):
        batches = [data(rows) for rows in (9, 5, 7)]
        for m, optimizer in ((model, ours), (twin, theirs)):
            for weight, batch in zip((0.0, 0.5, 0.5), batches, strict=True):
                (weight * mse(m, batch)).backward()
            assert all(record.rows == 21 for record in optimizer.captured())
            nn.utils.clip_grad_norm_(m.parameters(), 0.1)
            optimizer.step()
            m.zero_grad(set_to_none=m is not model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("gradient", ["exact", "dense"])
def test_a_gradient_changed_between_two_backward_passes_is_refused(gradient: str) -> None:
    """The probes see dB after the last pass only; a capture of both passes is compared with `.grad` itself."""
    model = plain_mlp()
    optimizer = bare(model, gradient=gradient)
    for scale in (1.0, 0.5):
        optimizer.zero_grad()
        mse(model, data()).backward()
        for p in model.parameters():
            if p.grad is not None and scale != 1:
                p.grad.mul_(scale)
        mse(model, data()).backward()
        if scale == 1:
            optimizer.step()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"do not reproduce .grad for 3 layer\(s\)"):
        optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("zeroed", "in_graph"), [(False, False), (True, False), (True, True)])
def test_cuda_is_waited_for_only_where_a_gradient_has_changed(
    zeroed: bool, in_graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And never while a CUDA graph is captured, which a look would end with an error."""
    layer = plain_mlp().l2
    optimizer = bare(layer)
    layer(torch.randn(5, 20, dtype=torch.float64)).square().sum().backward()
    if zeroed:
        layer.zero_grad(set_to_none=False)
    (record,) = optimizer._capture.records.values()
    there = {"device": torch.device("cuda"), "dtype": torch.float64}
    lora_A, lora_B = (SimpleNamespace(grad=p.grad, **there) for p in (layer.lora_A.weight, layer.lora_B.weight))
    record.pair = SimpleNamespace(lora_A=lora_A, lora_B=lora_B, A=record.pair.A, d_out=16, rank=4)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: in_graph)
    looks = []
    monkeypatch.setattr(Tensor, "any", lambda t: looks.append(t) or t.count_nonzero() > 0)
    record.open(missed=False)
    waits = zeroed and not in_graph
    assert len(looks) == (3 if waits else 0)
    assert record.calls == (0 if waits else 1) and not record.changed


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_autocast_keeps_no_wide_copy_of_x(adapter_dtype: torch.dtype) -> None:
    model = peft_mlp(dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter_dtype)
    optimizer = bare(model)
    x, y = data(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = mse(model, (x, y))
    loss.backward()
    for pair, record in held(optimizer):
        for captured_x, captured_s in record.chunks:
            assert captured_x.dtype == captured_s.dtype == torch.bfloat16
        dA, dB = captured_gradients(pair, record, torch.float32)
        torch.testing.assert_close(dA, pair.lora_A.grad.float(), rtol=3e-2, atol=3e-2 * dA.abs().max().item())
        torch.testing.assert_close(dB, pair.lora_B.grad.float(), rtol=3e-2, atol=3e-2 * dB.abs().max().item())
    optimizer.step()


def test_concurrent_forwards_pair_their_own_calls() -> None:
    model = plain_mlp()
    optimizer = bare(model)
    batches = [data(rows) for rows in (5, 6, 7, 8)]
    losses: list[Tensor] = []
    threads = [threading.Thread(target=lambda b=b: losses.append(mse(model, b))) for b in batches for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sum(losses).backward()
    assert_exact(optimizer)


def test_hooks_leave_with_detach_and_with_the_optimizer() -> None:
    model = plain_mlp()

    def hooks() -> int:
        return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())

    optimizer = bare(model)
    assert hooks() == 9
    optimizer.detach()
    assert hooks() == 0
    optimizer = bare(model)
    assert hooks() == 9
    del optimizer
    gc.collect()
    assert hooks() == 0


def test_a_second_optimizer_takes_over_and_the_first_refuses_to_step() -> None:
    model = plain_mlp()
    first = bare(model)
    second = bare(model)
    mse(model, data()).backward()
    assert_exact(second)
    with pytest.raises(RuntimeError, match="took over the hooks"):
        first.step()


def test_model_can_be_copied_and_pickled_while_hooked() -> None:
    model = plain_mlp()
    optimizer = bare(model)
    clone = copy.deepcopy(model)
    pickle.loads(pickle.dumps(model))
    mse(clone, data()).backward()
    assert all(record.calls == 0 for record in optimizer.captured())
    mse(model, data()).backward()
    assert_exact(optimizer)


def test_statistics_mode_keeps_sums_only() -> None:
    model = peft_mlp()
    exact, batch = bare(model, metric="kfac"), data()
    mse(model, batch).backward()
    chunks = {name: optimizer_chunks(exact, name) for name in range(3)}
    exact.detach()
    model.zero_grad()
    tangent = bare(model, metric="kfac", gradient="tangent")
    mse(model, batch).backward()
    for i, record in enumerate(tangent._capture.records.values()):
        x, s = chunks[i]
        assert record.chunks == [] and record.rows == 32
        torch.testing.assert_close(record.sum_x2, x.square().sum(0))
        torch.testing.assert_close(record.sum_s2, s.square().sum(0))
    assert tangent.capture_bytes() == 0


def optimizer_chunks(optimizer: PSILoRA, index: int) -> tuple[Tensor, Tensor]:
    return optimizer.captured()[index].chunks[0]
