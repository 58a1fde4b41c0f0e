"""Optimizers that wrap others: schedule-free averaging, Lookahead, averages of the weights, and schedulers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import data, factors, mse, plain_mlp, train
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from psilora import PSILoRA


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    target = torch.randn(24, 6, generator=generator)
    inputs = [torch.randn(32, 24, generator=generator) for _ in range(count)]
    return [(x, x @ target / 5) for x in inputs]


def wrapped(name: str, optimizer: PSILoRA) -> Any:
    library = pytest.importorskip("pytorch_optimizer", reason="pytorch_optimizer is an extra: psilora[bench]")
    if name == "Lookahead":
        return library.Lookahead(optimizer, k=3, alpha=0.5)
    made = library.ScheduleFreeWrapper(optimizer, momentum=0.9)
    made.train()
    return made


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Lookahead", {}),
        ("Lookahead", {"step": "gradient"}),
        ("ScheduleFreeWrapper", {}),
        ("ScheduleFreeWrapper", {"step": "gradient", "gradient": "tangent"}),
    ],
    ids=str,
)
@pytest.mark.scenario(
    13,
    "pytorch_optimizer",
    gradient="exact, tangent, spectral",
    tested="Lookahead and ScheduleFreeWrapper train, save and go on bit-exactly",
)
def test_a_wrapped_optimizer_trains_and_resumes(name: str, kind: dict) -> None:
    """The trap: a state or group key of the wrapper's that the optimizer takes for its own, or loses when it loads."""

    def run() -> tuple[nn.Module, Any]:
        torch.manual_seed(1)
        model = plain_mlp(dtype=torch.float32)
        return model, wrapped(name, PSILoRA(model, 0.1, balance=False, **kind))

    def steps(model: nn.Module, optimizer: Any, chosen: list[tuple[Tensor, Tensor]]) -> None:
        for batch in chosen:
            optimizer.zero_grad()
            mse(model, batch).backward()
            optimizer.step()

    rows = batches(20)
    model, optimizer = run()
    before = mse(model, rows[0]).item()
    steps(model, optimizer, rows[:5])
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    steps(model, optimizer, rows[5:])
    resumed, again = run()
    resumed.load_state_dict(weights)
    again.load_state_dict(state)
    steps(resumed, again, rows[5:])
    a, b = factors(model), factors(resumed)
    assert all(torch.equal(a[key], b[key]) for key in a)
    if name == "ScheduleFreeWrapper":
        optimizer.eval()
    assert mse(model, rows[0]).item() < 0.9 * before


def test_captures_are_refused_where_the_factors_moved_before_the_step() -> None:
    """Schedule-free steps from another point than the gradient's; resumed, what was captured cannot be compared."""
    model = plain_mlp(dtype=torch.float32)
    optimizer = PSILoRA(model, 0.1, step="gradient")
    mse(model, batches(1)[0]).backward()
    with torch.no_grad():
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.lerp_(torch.zeros_like(parameter), 0.5)
    with pytest.raises(RuntimeError, match="do not reproduce .grad .* use gradient='tangent'"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_wrapper_keeps_in_the_state_is_loaded_as_it_was(dtype: torch.dtype) -> None:
    """facebookresearch's ScheduleFreeWrapper keeps "z" there and swaps its bytes with the parameter's: the trap is a
    "z" that comes back in fp32."""
    model = plain_mlp(dtype=dtype)
    optimizer = PSILoRA(model, 0.05)
    optimizer.init_state()
    for parameter, state in optimizer.state.items():
        state["z"] = parameter.detach().clone()
    other = copy.deepcopy(model)
    loaded = PSILoRA(other, 0.05)
    loaded.load_state_dict(optimizer.state_dict())
    for parameter, state in loaded.state.items():
        assert state["z"].dtype == parameter.dtype and torch.equal(state["z"], parameter)
        assert state["momentum"].dtype == torch.float32


@pytest.mark.parametrize("step", ["spectral", "gradient"])
def test_an_average_of_the_weights_is_that_of_the_copies(step: str) -> None:
    """torch's AveragedModel deep-copies the model: the copy must not capture, and takes part in no step."""
    model = plain_mlp(dtype=torch.float32)
    optimizer = PSILoRA(model, 0.05, step=step)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    expected = factors(model)
    for i, batch in enumerate(batches(4)):
        train(model, optimizer, [batch])
        average.update_parameters(model)
        mse(average, batch).backward()
        now = factors(model)
        expected = now if i == 0 else {name: 0.5 * t + 0.5 * now[name] for name, t in expected.items()}
    assert optimizer.capture_bytes() == 0
    for name, value in factors(average.module).items():
        torch.testing.assert_close(value, expected[name])


def test_schedulers_that_wrap_each_other() -> None:
    model = plain_mlp(dtype=torch.float32)
    optimizer = PSILoRA(model, 0.05)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 1e-3, total_iters=2)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], milestones=[2])
    rates = []
    for batch in batches(6):
        train(model, optimizer, [batch])
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step()
    assert rates == pytest.approx([5e-5, 0.025025, 0.05, 0.0426776695, 0.025, 0.0073223305])


def test_every_part_of_the_protocol_of_optimizers_is_there() -> None:
    model = plain_mlp(dtype=torch.float32)
    optimizer, seen = PSILoRA(model, 0.05), []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "note": 1})
    assert optimizer.step(lambda: mse(model, data(dtype=torch.float32))).item() > 0
    assert seen == ["before", "after"] and optimizer.state_dict()["note"] == 1
    assert optimizer.defaults["lr"] == 0.05 and isinstance(optimizer, torch.optim.Optimizer)
