"""Faults in the middle of training: a step that fails changes nothing, and the run goes on as if it were not tried."""

from __future__ import annotations

import copy
import os
import select
import signal
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from captures import assert_exact, captured_gradients, held
from models import MLP, bare, data, factors, mse, peft_mlp, plain_mlp, train
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from psilora import PSILoRA

KINDS: list[dict[str, Any]] = [
    {"step": "gradient", "metric": "kfac", "momentum": 0.9, "max_grad_norm": 1.0},
    {"step": "gradient", "gradient": "tangent"},
    {"step": "spectral", "controller": "slope"},
]


FAR = 10**9


class OutOfMemory(TorchDispatchMode):
    """Lets `budget` operators that return new tensors through, then fails; in-place operators need no memory."""

    def __init__(self, budget: int) -> None:
        super().__init__()
        self.budget = budget

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        new = any("Tensor" in str(result.type) for result in func._schema.returns)
        if new and not func._schema.is_mutable:
            if self.budget == 0:
                raise torch.OutOfMemoryError(f"out of memory in {func}")
            self.budget -= 1
        return func(*args, **(kwargs or {}))


def headed() -> nn.Module:
    """Two shapes of layers, and a bias for AdamW."""
    model = plain_mlp((12, 12, 12, 6))
    model.l3.base.bias.requires_grad_()
    return model


def everything(model: nn.Module, optimizer: PSILoRA) -> dict[str, Tensor]:
    found = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        for key, value in optimizer.state[p].items():
            found[f"{name}.{key}"] = value.detach().clone()
    return found


def assert_unchanged(before: dict[str, Tensor], now: dict[str, Tensor]) -> None:
    for name, value in now.items():
        if name in before:
            assert torch.equal(before[name], value), f"{name} has changed"


@pytest.mark.scenario(
    0,
    "PyTorch loop",
    gradient="exact, tangent",
    tested="out of memory at every operator of a step: nothing changes, retry works",
)
@pytest.mark.parametrize(
    ("kind", "first"), [(KINDS[0], False), *((kind, True) for kind in KINDS)], ids=lambda value: str(value)
)
def test_out_of_memory_at_every_operator(kind: dict[str, Any], first: bool) -> None:
    """The trap: a step that writes layer by layer, or creates state as it goes, stops half-way."""
    base, batches = headed(), [data(8, 12) for _ in range(2)]
    began = bare(base, 0.05, **kind)
    if not first:
        train(base, began, batches[:1])

    def ready() -> tuple[nn.Module, PSILoRA]:
        model = copy.deepcopy(base)
        optimizer = bare(model, 0.05, **kind)
        optimizer.load_state_dict(began.state_dict())
        optimizer.zero_grad()
        mse(model, batches[1]).backward()
        return model, optimizer

    model, optimizer = ready()
    with OutOfMemory(FAR) as counting:
        optimizer.step()
    expected = everything(model, optimizer)
    operators = FAR - counting.budget
    assert operators > 100
    for budget in [*range(0, operators, 97), *range(operators - 8, operators)]:
        model, optimizer = ready()
        before = everything(model, optimizer)
        with pytest.raises(torch.OutOfMemoryError), OutOfMemory(budget):
            optimizer.step()
        assert_unchanged(before, everything(model, optimizer))
        optimizer.step()
        now = everything(model, optimizer)
        assert now.keys() == expected.keys()
        assert_unchanged(expected, now)


def test_a_naive_step_stops_half_way() -> None:
    model = headed()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=False)
    mse(model, data(8, 12)).backward()
    before = factors(model)
    with pytest.raises(torch.OutOfMemoryError), OutOfMemory(30):
        optimizer.step()
    changed = [not torch.equal(before[name], value) for name, value in factors(model).items()]
    assert any(changed) and not all(changed)


@pytest.mark.scenario(0, "PyTorch loop", gradient="exact, tangent", tested="a NaN batch leaves no trace in the run")
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_nan_batch_leaves_no_trace(kind: dict[str, Any]) -> None:
    """The trap: one NaN in a running average or a momentum stays for ever."""
    model, batches = headed(), [data(8, 12) for _ in range(4)]
    twin = copy.deepcopy(model)
    ours, theirs = bare(model, 0.05, **kind), bare(twin, 0.05, **kind)
    adamw = torch.optim.AdamW([torch.zeros(3, requires_grad=True)], lr=0.1)
    train(model, ours, batches[:2])
    x, y = data(8, 12)
    x[3, 5] = float("nan")
    with pytest.warns(UserWarning, match="a step was skipped"):
        train(model, ours, [(x, y)])
    train(model, ours, batches[2:])
    train(twin, theirs, batches)
    assert_unchanged(everything(twin, theirs), everything(model, ours))
    (naive,) = adamw.param_groups[0]["params"]
    for value in (float("nan"), 1.0):
        naive.grad = torch.full_like(naive, value)
        adamw.step()
    assert bool(naive.isnan().all())


def test_every_optimizer_says_at_the_callers_line_that_it_has_skipped_a_step() -> None:
    """The trap: Python's default filter shows a warning of one text and line once in a process."""
    x, y = data()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for _ in range(2):
            model = plain_mlp()
            train(model, bare(model), [(x * float("nan"), y)] * 2)
    assert [str(w.message)[:27] for w in seen] == ["psilora: a step was skipped"] * 2
    assert {Path(w.filename).name for w in seen} == {"models.py"}


def test_an_exception_in_backward_leaves_no_stale_rows() -> None:
    class Trip(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("out of memory")

    model = plain_mlp()
    twin = copy.deepcopy(model)
    ours, theirs = (PSILoRA(m, 0.1, step="gradient") for m in (model, twin))
    (x, y), batch = data(), data()
    hook = model.l1.register_forward_hook(lambda _m, _a, output: Trip.apply(output))
    with pytest.raises(torch.OutOfMemoryError):
        mse(model, (x, y)).backward()  # layers 3 and 2 are through, layer 1 is not
    hook.remove()
    train(model, ours, [batch])
    train(twin, theirs, [batch])
    assert_unchanged(factors(twin), factors(model))


def test_threads_run_forward_and_backward_concurrently() -> None:
    """The trap: a hook that keeps "the last input" mixes up the calls of different threads."""
    model = plain_mlp()
    optimizer = PSILoRA(model, 0.1, step="gradient")
    batches = [data(rows) for rows in range(5, 13)]
    last: dict[str, Tensor] = {}
    barrier = threading.Barrier(len(batches), timeout=60)
    mixed = []
    model.l1.lora_A.register_forward_pre_hook(lambda _m, args: last.update(x=args[0]))

    def work(batch: tuple[Tensor, Tensor]) -> None:
        barrier.wait()
        for _ in range(3):
            loss = mse(model, batch)
            barrier.wait()
            mixed.append(last["x"].shape != batch[0].shape)
            loss.backward()

    threads = [threading.Thread(target=work, args=(batch,)) for batch in batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert any(mixed)
    for pair, record in held(optimizer):
        assert record.calls == 24
        own = captured_gradients(pair, record)[1]
        torch.testing.assert_close(own, pair.lora_B.grad, rtol=1e-10, atol=1e-12)
    optimizer.step()


def test_a_backward_pass_of_another_thread_is_not_taken_for_one_that_was_given_up() -> None:
    """It lies between its capture and the accumulation of lora_A's gradient when the other one starts without any."""
    model = plain_mlp()
    optimizer = PSILoRA(model, 0.1, step="gradient")
    under_way, go_on = threading.Event(), threading.Event()
    worker = threading.Thread(target=lambda: mse(model, data(7)).backward())

    def pause(_grad: Tensor) -> None:
        if threading.current_thread() is worker:
            under_way.set()
            assert go_on.wait(60)

    model.l3.lora_A.weight.register_hook(pause)
    worker.start()
    assert under_way.wait(60)
    mse(model, data(5)).backward()
    go_on.set()
    worker.join()
    assert_exact(optimizer)
    assert all(record.calls > 0 and record.rows == 12 for record in optimizer.captured())


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_after_construction_trains_on_its_own(pipe: tuple[int, int]) -> None:
    """A data loader's worker, or a launcher, forks a process that already has an optimizer."""
    model = plain_mlp()
    optimizer = PSILoRA(model, 0.1, step="gradient")
    batches = [data(), data()]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    try:
        train(model, optimizer, batches[:1])
        child = os.fork()
        if child == 0:
            status = b"\x01"
            try:
                train(model, optimizer, batches[1:])
                digest = b"".join(p.numpy().tobytes() for p in factors(model).values())
                status = b"\x00" + digest
            finally:
                os.write(pipe[1], status)
                os._exit(0)
        held = optimizer.capture_bytes()
        train(model, optimizer, batches[1:])
        expected = b"".join(p.numpy().tobytes() for p in factors(model).values())
        if not select.select([pipe[0]], [], [], 60)[0]:
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        answer = os.read(pipe[0], 1 << 20) if select.select([pipe[0]], [], [], 0)[0] else b""
    finally:
        torch.set_num_threads(threads)
    assert held == 0 and answer == b"\x00" + expected


def test_copies_of_a_hooked_model_train_on_their_own() -> None:
    """The trap: hooks copied along would go on capturing for the first optimizer."""
    model = plain_mlp()
    first = PSILoRA(model, 0.1, step="gradient")
    copied = copy.deepcopy(model)
    second = PSILoRA(copied, 0.1, step="gradient")
    batch = data()
    mse(copied, batch).backward()
    assert first.capture_bytes() == 0 and second.capture_bytes() > 0
    second.step()
    with pytest.raises(TypeError, match="use state_dict"):
        copy.deepcopy(first)
    train(model, first, [batch])
    assert_unchanged(factors(copied), factors(model))


def test_settings_may_change_between_steps() -> None:
    """A step with new settings is the step of an optimizer that has them from the start, with the same state."""
    model, batches = plain_mlp(), [data() for _ in range(3)]
    optimizer = PSILoRA(model, 0.1, step="gradient", momentum=0.9, prox=1e-2)
    train(model, optimizer, batches[:1])
    changes = {"lr": 0.03, "prox": 0.5, "momentum": 0.5, "num_iters": 2, "weight_decay": 0.1}
    twin = copy.deepcopy(model)
    other = PSILoRA(twin, step="gradient", **changes)
    state = optimizer.state_dict()
    state["param_groups"] = [{**group, **changes} for group in state["param_groups"]]
    other.load_state_dict(state)
    optimizer.param_groups[0].update(changes)
    train(model, optimizer, batches[1:])
    train(twin, other, batches[1:])
    assert_unchanged(everything(twin, other), everything(model, optimizer))
    optimizer.param_groups[0]["prox"] = -1.0
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match="Invalid prox=-1.0. Must be finite and >= 0."):
        train(model, optimizer, batches[:1])
    assert_unchanged(before, everything(model, optimizer))


def adapters() -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(MLP((24, 20, 16, 6)), LoraConfig(r=4, target_modules=["l1", "l2"])).double()


def test_an_adapter_that_comes_later_needs_a_new_optimizer() -> None:
    """It is trained by none until then, and the switch is not silent: no pair of the old optimizer has gradients."""
    model = adapters()
    optimizer = PSILoRA(model, 0.1, step="gradient")
    train(model, optimizer, [data()])
    model.add_adapter("later", LoraConfig(r=3, target_modules=["l1", "l2"]))
    model.set_adapter("later")
    model.double()
    before = factors(model)
    with pytest.warns(UserWarning, match="no gradient in any LoRA pair") as seen:
        train(model, optimizer, [data()] * 2)
    assert Path(seen[0].filename).name == "models.py", "the line that calls step, not one of ours or torch's"
    assert_unchanged(before, factors(model))
    fresh = PSILoRA(model, 0.1, step="gradient")
    assert all(pair.name.endswith(" (later)") for pair in fresh.pairs())
    train(model, fresh, [data()] * 2)
    assert all(not torch.equal(before[name], value) for name, value in factors(model).items())


def test_an_adapter_replaced_before_the_first_step_is_noticed() -> None:
    """One step without a gradient is nothing to warn about: loops take one to start a schedule."""
    model = adapters()
    optimizer = PSILoRA(model, 0.1)
    model.delete_adapter("default")
    model.add_adapter("later", LoraConfig(r=3, target_modules=["l1", "l2"]))
    model.set_adapter("later")
    model.double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, [data()] * 2)
    with pytest.warns(UserWarning, match="no gradient in any LoRA pair for 3 steps") as seen:
        train(model, optimizer, [data()] * 10)
    assert len(seen) == 1


@pytest.mark.parametrize("kind", [{}, {"step": "gradient"}], ids=str)
def test_a_factor_frozen_in_training_is_named(kind: dict[str, Any]) -> None:
    model = plain_mlp()
    optimizer = PSILoRA(model, 0.1, **kind)
    train(model, optimizer, [data()])
    model.l2.lora_A.requires_grad_(False)
    before = factors(model)
    with pytest.warns(UserWarning, match="not trained while one of its factors has no gradient.* l2$") as seen:
        train(model, optimizer, [data()] * 3)
    assert len(seen) == 1
    assert all(torch.equal(before[name], value) == ("l2" in name) for name, value in factors(model).items())
    model.l2.lora_A.requires_grad_()
    before = factors(model)
    train(model, optimizer, [data()])
    assert all(not torch.equal(before[name], value) for name, value in factors(model).items())


def test_removing_an_adapter_leaves_the_others_training() -> None:
    model = adapters()
    model.add_adapter("other", LoraConfig(r=3, target_modules=["l1", "l2"]))
    model.base_model.set_adapter(["default", "other"])
    model.double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    optimizer = PSILoRA(model, 0.1, step="gradient")
    train(model, optimizer, [data()] * 2)
    model.delete_adapter("other")
    model.set_adapter("default")
    before = factors(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, [data()])
    assert before and all(not torch.equal(before[name], value) for name, value in factors(model).items())


def test_merging_while_training_is_noticed() -> None:
    model = peft_mlp()
    optimizer = PSILoRA(model, 0.1, step="gradient")
    train(model, optimizer, [data()])
    model.merge_adapter()
    before = factors(model)
    with pytest.warns(UserWarning, match="no gradient in any LoRA pair"):
        for _ in range(2):
            optimizer.zero_grad()
            model(data()[0].requires_grad_()).sum().backward()
            optimizer.step()
    assert_unchanged(before, factors(model))
    model.unmerge_adapter()
    train(model, optimizer, [data()])
    assert all(not torch.equal(before[name], value) for name, value in factors(model).items())
