"""Gradients that were reset by other means than the optimizer's zero_grad, and pairs that a step must leave alone.

Everywhere the twin resets to None and with the optimizer: the pair that is missed then has no gradient at all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from psilora import LoRALinear, PSILoRA, baselines
from psilora.capture import PROBES
from psilora.capture.storage import Rows

CAPTURING: dict[str, dict[str, Any]] = {
    "exact": {},
    "exact kfac": {"metric": "kfac", "max_grad_norm": 0.5},
    "exact shampoo": {"metric": "shampoo"},
    "low-rank": {"metric": "kfac-low-rank"},
    "dense": {"gradient": "dense"},
    "dense kfac": {"gradient": "dense", "metric": "kfac-dense"},
    "backward": {"gradient": "backward", "momentum": 0.0},
    "auto": {"gradient": "auto"},
    "tangent kfac": {"gradient": "tangent", "metric": "kfac"},
    "tangent shampoo": {"gradient": "tangent", "metric": "shampoo"},
    "ritz": {"solver": "ritz", "num_iters": 2},
    "triton kfac": {"metric": "kfac", "backend": "triton"},
}
KINDS: dict[str, Callable[[nn.Module], Any]] = {
    **{
        name: lambda model, kind=kind: PSILoRA(model, 0.1, **{"step": "gradient", **kind})
        for name, kind in CAPTURING.items()
    },
    "SVDLoRA": lambda model: baselines.SVDLoRA(model, 0.1, momentum=0.5),
}
SPECTRAL: dict[str, Callable[[nn.Module], Any]] = {
    "spectral": lambda model: PSILoRA(model, 0.05),
    "spectral slope": lambda model: PSILoRA(model, 0.05, controller="slope"),
    "factors apart": lambda model: PSILoRA(model, 0.05, joint=False),
    "tangent": lambda model: PSILoRA(model, 0.05, step="gradient", gradient="tangent"),
}


def grads(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


RESETS: dict[str, Callable[[nn.Module], object]] = {
    "to zero": lambda model: model.zero_grad(set_to_none=False),
    "to None": lambda model: model.zero_grad(),
    "grad = None": lambda model: [setattr(p, "grad", None) for p in model.parameters()],
    "zero_": lambda model: [grad.zero_() for grad in grads(model)],
    "data": lambda model: [grad.data.zero_() for grad in grads(model)],
    "mul_": lambda model: torch._foreach_mul_(grads(model), 0.0),
    "replaced": lambda model: [setattr(p, "grad", torch.zeros_like(p)) for p in model.parameters() if p.requires_grad],
}


def layers(count: int, dtype: torch.dtype = torch.float32) -> nn.ModuleList:
    """Layers of two shapes, which a loss reaches or does not."""
    model = nn.ModuleList([LoRALinear(nn.Linear(8, 8 + i % 2), 2) for i in range(count)]).to(dtype)
    for layer in model:
        nn.init.normal_(layer.lora_B.weight)
    return model


def loss(model: nn.Module, x: Tensor, missed: set[int] = frozenset()) -> Tensor:
    return sum(layer(x).square().mean() for i, layer in enumerate(model) if i not in missed)


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(5, 8, dtype=dtype)


def assert_equal(model: nn.Module, twin: nn.Module) -> None:
    """Up to the rounding of a clip factor, which is found from other layers where more than `PROBES` were captured."""
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        if len(model) > PROBES:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        else:
            assert torch.equal(ours, theirs)


def moved(model: nn.Module, before: nn.Module) -> list[bool]:
    """Per layer whether one of its factors has changed."""
    return [
        not (torch.equal(a.lora_A.weight, b.lora_A.weight) and torch.equal(a.lora_B.weight, b.lora_B.weight))
        for a, b in zip(model, before, strict=True)
    ]


#: What the backend is given does not depend on the reset; a count of rows only does not tell zero from zeroed.
UNTOLD = {("triton kfac", reset) for reset in RESETS if reset != "to zero"} | {("tangent shampoo", "data")}
MISSES = [
    (n, reset, kind) for n in (2, PROBES + 2) for reset in RESETS for kind in KINDS if (kind, reset) not in UNTOLD
]
MISSES.remove((PROBES + 2, "to zero", "triton kfac"))


@pytest.mark.parametrize(("count", "reset", "kind"), MISSES)
def test_a_layer_that_a_later_backward_pass_misses_does_not_move(kind: str, reset: str, count: int) -> None:
    """The trap: what was captured for the batch that was given up goes into the step, and its probe into the scale."""
    model = layers(count)
    twin = copy.deepcopy(model)
    ours, theirs = KINDS[kind](model), KINDS[kind](twin)
    for missed in ({count - 1}, {0}, set()):
        given_up, batch, before = inputs(), inputs(), copy.deepcopy(model)
        loss(model, given_up).backward()
        RESETS[reset](model)
        for m, optimizer in ((model, ours), (twin, theirs)):
            loss(m, batch, missed).backward()
            nn.utils.clip_grad_norm_(m.parameters(), 0.3)
            optimizer.step()
        theirs.zero_grad()
        RESETS[reset](model)
        assert_equal(model, twin)
        assert moved(model, before) == [i not in missed for i in range(count)]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("tangent shampoo", "triton kfac")])
@pytest.mark.parametrize("reset", [reset for reset in RESETS if reset not in ("to None", "replaced")])
def test_a_gradient_reset_after_backward_takes_its_layer_out_of_the_step(kind: str, reset: str) -> None:
    model = layers(4)
    twin = copy.deepcopy(model)
    ours, theirs = KINDS[kind](model), KINDS[kind](twin)
    for masked in (set(), {1}, {0, 3}):
        batch, before = inputs(), copy.deepcopy(model)
        for m, optimizer in ((model, ours), (twin, theirs)):
            optimizer.zero_grad()
            loss(m, batch).backward()
            for i in masked:
                RESETS[reset if m is model else "to None"](m[i])
            optimizer.step()
        assert_equal(model, twin)
        assert moved(model, before) == [i not in masked for i in range(4)]


@pytest.mark.parametrize("kind", [kind for kind in KINDS | SPECTRAL if kind != "triton kfac"])
@pytest.mark.parametrize("factors", [("lora_A", "lora_B"), ("lora_A",), ("lora_B",)], ids="+".join)
@pytest.mark.filterwarnings("ignore:psilora. a pair is not trained while one of its factors:UserWarning")
def test_a_frozen_factor_never_moves_and_needs_no_activations(kind: str, factors: tuple[str, ...]) -> None:
    """Frozen in training, with gradients of zero, of NaN, or none: all else goes on, and so does it once thawed."""
    model, make = layers(3), (KINDS | SPECTRAL)[kind]
    twins = [copy.deepcopy(model) for _ in range(2)]
    runs = list(zip([model, *twins], [make(m) for m in (model, *twins)], strict=True))
    for step in range(6):
        batch, before = inputs(), copy.deepcopy(model)
        frozen = 2 <= step < 4
        for which, (m, optimizer) in enumerate(runs):
            for name in factors:
                getattr(m[1], name).weight.requires_grad_(not frozen)
            if frozen and which == 2:
                for name in factors:
                    getattr(m[1], name).weight.grad = torch.full_like(getattr(m[1], name).weight, float("nan"))
            loss(m, batch).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=which == 1)
        assert moved(model, before) == [True, not frozen, True]
        for twin in twins:
            assert_equal(model, twin)


@pytest.mark.parametrize("kind", ["exact", "exact kfac", "dense kfac", "tangent kfac"])
def test_a_gradient_that_no_backward_pass_has_left_is_not_taken_for_zero(kind: str) -> None:
    """Set by hand, or left from an earlier step: there are no activations for it, and a metric needs them."""
    model = layers(3)
    optimizer = KINDS[kind](model)
    loss(model, inputs()).backward()
    optimizer.step()
    before = copy.deepcopy(model)
    for i in (0, 2):
        model[i].zero_grad()
    loss(model, inputs(), {1}).backward()  # the gradients of layer 1 are those of the first step
    if kind == "exact":
        with pytest.warns(UserWarning, match="using the tangent gradient for 1$"):
            optimizer.step()
        assert moved(model, before)[1]
        return
    with pytest.raises(
        RuntimeError, match="^1: .*needs activations, but none were captured in this step: no backward pass"
    ):
        optimizer.step()
    assert moved(model, before) == [False] * 3
    optimizer.zero_grad(set_to_none=False)
    loss(model, inputs(), {1}).backward()
    optimizer.step()
    assert moved(model, before) == [True, False, True]


def test_a_loss_of_zero_is_a_step_of_its_rows_as_before() -> None:
    """Its calls reached backward: momentum moves the layer, and the metric counts the rows."""
    model = layers(2)
    optimizer = PSILoRA(model, 0.1, step="gradient", metric="kfac")
    loss(model, inputs()).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    before = copy.deepcopy(model)
    (loss(model, inputs(), {1}) + 0 * loss(model, inputs(), {0})).backward()
    optimizer.step()
    assert moved(model, before) == [True, True]
    assert [float(optimizer.state[layer.lora_A.weight]["step"]) for layer in model] == [2, 2]


@pytest.mark.parametrize("kind", CAPTURING)
def test_a_distributed_checkpoint_finds_the_state_of_an_optimizer_that_has_not_stepped(kind: str) -> None:
    """torch has it created by a step at lr = 0 with gradients of zero, and loads what is there then."""
    model = layers(3)
    other = copy.deepcopy(model)
    optimizer, fresh = KINDS[kind](model), KINDS[kind](other)
    loss(model, inputs()).backward()
    optimizer.step()
    optimizer.zero_grad()
    before = copy.deepcopy(other)
    created, saved = get_optimizer_state_dict(other, fresh), get_optimizer_state_dict(model, optimizer)
    assert moved(other, before) == [False] * 3
    shapes = [
        {(name, key): value.shape for name, state in found["state"].items() for key, value in state.items()}
        for found in (created, saved)
    ]
    assert shapes[0] == shapes[1] and len(saved["state"]) == 6
    set_optimizer_state_dict(other, fresh, saved)
    loaded = fresh.state_dict()["state"]
    for i, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, loaded[i][key]) for key, value in state.items())


def on_cuda(optimizer: PSILoRA) -> None:
    """Have the records take their pairs for pairs on CUDA, where a look waits for the device."""
    for record in optimizer._capture.records.values():
        pair = record.pair
        there = {"device": torch.device("cuda"), "dtype": pair.lora_A.dtype}
        grads = [SimpleNamespace(grad=p.grad, **there) for p in (pair.lora_A, pair.lora_B)]
        record.pair = SimpleNamespace(lora_A=grads[0], lora_B=grads[1], A=pair.A, rank=pair.rank, d_out=pair.d_out)


@pytest.mark.parametrize("missed", [set(), {1}])
@pytest.mark.parametrize("clipped", [False, True])
def test_cuda_is_waited_for_only_where_one_gradient_was_written_to_more_often_than_others(
    missed: set[int], clipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clipping writes to all alike; the layer that a later pass missed has also been set to zero."""
    model = layers(4, torch.float64)
    optimizer = PSILoRA(model, 0.1, step="gradient")
    capture, x = optimizer._capture, inputs(torch.float64)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    if missed:
        loss(model, x).backward()
        model.zero_grad(set_to_none=False)
        monkeypatch.setattr(capture._passes, "records", [])  # what it drops at once is left for the step to find
    loss(model, x, missed).backward()
    if clipped:
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    on_cuda(optimizer)
    looks: list[Tensor] = []
    monkeypatch.setattr(Tensor, "any", lambda t: looks.append(t) or t.count_nonzero() > 0)
    capture.refresh()
    assert len(looks) == 3 * len(missed)  # at dB, dA and what is held
    assert [record.idle for record in capture.records.values()] == [i in missed for i in range(4)]


HELD = [kind for kind in KINDS if not kind.startswith(("tangent", "triton"))]  # what is compared with `.grad`


def no_reset(model: nn.Module, optimizer: Any) -> None:
    optimizer.zero_grad(set_to_none=False)
    loss(model, inputs()).backward()
    optimizer.step()


def loaded_between(model: nn.Module, optimizer: Any) -> None:
    optimizer.zero_grad()
    loss(model, inputs()).backward()
    optimizer.load_state_dict(optimizer.state_dict())


def set_by_hand(model: nn.Module, optimizer: Any) -> None:
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None


LEFT = [(before, kind) for before in (no_reset, loaded_between, set_by_hand) for kind in HELD]
LEFT.remove((loaded_between, "SVDLoRA"))  # which drops nothing when it loads


@pytest.mark.parametrize(("before", "kind"), LEFT)
def test_what_was_left_in_a_gradient_before_backward_is_refused(
    before: Callable[[nn.Module, Any], None], kind: str
) -> None:
    """The trap: the probes are taken after backward, so `.grad` looks untouched while it holds two batches."""
    model = layers(3)
    optimizer = KINDS[kind](model)
    for missed in (set(), {1}):
        optimizer.zero_grad()
        loss(model, inputs(), missed).backward()
        optimizer.step()
    before(model, optimizer)
    loss(model, inputs()).backward()
    kept = copy.deepcopy(model)
    refusal = "miss .grad by" if kind == "SVDLoRA" else r"do not reproduce .grad, which was not reset before backward"
    with pytest.raises(RuntimeError, match=refusal):
        optimizer.step()
    assert moved(model, kept) == [False] * 3
    optimizer.zero_grad()
    loss(model, inputs()).backward()
    optimizer.step()
    assert moved(model, kept) == [True] * 3


@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize(
    ("by", "reset"), [("optimizer", "to zero"), ("optimizer", "to None"), *(("model", reset) for reset in RESETS)]
)
@pytest.mark.parametrize("cuda", [False, True])
def test_what_was_reset_is_not_compared_again(
    cuda: bool, by: str, reset: str, accumulated: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first capture of a layer is; on CUDA to compare waits for the device."""
    model = layers(3, torch.float64)
    optimizer = PSILoRA(model, 0.1, step="gradient")
    if cuda:
        monkeypatch.setattr("psilora.runtime.at_hand", lambda _device: False)
    compared: list[Tensor] = []
    dB = Rows.dB
    monkeypatch.setattr(Rows, "dB", lambda held, pair: compared.append(dB(held, pair)) or compared[-1])
    for step in range(3):
        if by == "model" and step > 0:
            RESETS[reset](model)
        elif by == "optimizer":
            optimizer.zero_grad(set_to_none=reset != "to zero")
        for _ in range(accumulated):
            loss(model, inputs(torch.float64), {1} if step == 1 else set()).backward()
        assert not any(record.stale for record in optimizer._capture.records.values()) or (cuda and reset == "data")
        compared.clear()
        optimizer.step()
        assert len(compared) == (3 if step == 0 else 0) or (cuda and reset == "data")


@pytest.mark.parametrize("before", [no_reset, loaded_between])
def test_cuda_knows_a_gradient_that_was_left_by_its_version(
    before: Callable[[nn.Module, Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = layers(3)
    optimizer = PSILoRA(model, 0.1, step="gradient")
    monkeypatch.setattr("psilora.runtime.at_hand", lambda _device: False)
    no_reset(model, optimizer)
    before(model, optimizer)
    with monkeypatch.context() as patch:  # a look at numbers would wait for the device
        patch.setattr(Tensor, "any", lambda _t: pytest.fail("looked"))
        loss(model, inputs()).backward()
    with pytest.raises(RuntimeError, match=r"do not reproduce .grad, which was not reset before backward"):
        optimizer.step()
