"""Layers of every kind whose factors have one matrix shape, computed in one bucket: each moves as it does alone."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from models import bare, factors, randomise_B
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from psilora import PSILoRA
from psilora.backends.triton import backend as triton_backend

pytestmark = pytest.mark.filterwarnings("ignore:psilora. using the tangent gradient .*embedding:UserWarning")

interpreted = pytest.mark.skipif(
    triton_backend.unavailable_reason() is not None or torch.cuda.is_available(), reason="needs Triton's interpreter"
)
RANK = 4
#: The layer and its input's shape; lora_A is (4, 24) as a matrix and lora_B (12, 4) in all of them.
KINDS: dict[str, tuple[type[nn.Module], tuple[Any, ...], tuple[int, ...]]] = {
    "linear": (nn.Linear, (24, 12), (24,)),
    "conv1d": (nn.Conv1d, (8, 12, 3), (8, 5)),
    "conv1d_1x1": (nn.Conv1d, (24, 12, 1), (24, 3)),
    "conv2d": (nn.Conv2d, (6, 12, 2), (6, 3, 4)),
    "conv2d_1x1": (nn.Conv2d, (24, 12, 1), (24, 2, 2)),
    "conv3d": (nn.Conv3d, (3, 12, 2), (3, 3, 3, 2)),
    "conv3d_1x1": (nn.Conv3d, (24, 12, 1), (24, 2, 1, 2)),
    "embedding": (nn.Embedding, (24, 12), ()),
}
ALL = tuple(KINDS)
STEPS: dict[str, dict[str, Any]] = {
    "spectral": {"step": "spectral", "metric": "lora"},
    "spectral, halves": {"step": "spectral", "joint": False},
    "exact": {},
    "dense": {"gradient": "dense"},
    "tangent": {"gradient": "tangent"},
}


class Branches(nn.Module):
    """One layer of each kind side by side, so that no gradient depends on another layer."""

    def __init__(self, kinds: tuple[str, ...]) -> None:
        super().__init__()
        for kind in kinds:
            cls, arguments, _ = KINDS[kind]
            setattr(self, f"{kind}_", cls(*arguments))

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        outputs = [getattr(self, f"{kind}_")(x) for kind, x in inputs.items()]
        return torch.stack([(y.flatten(1).sin() * y.flatten(1)).sum(1).mean() for y in outputs]).sum()


def adapted(kinds: tuple[str, ...], dtype: torch.dtype, dora: bool) -> nn.Module:
    config = LoraConfig(r=RANK, lora_alpha=8, use_dora=dora, target_modules=[f"{kind}_" for kind in kinds])
    model = get_peft_model(Branches(kinds), config).to(dtype)
    randomise_B(model, 0.3)
    return model


def inputs(kinds: tuple[str, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        kind: torch.randint(24, (9,)) if kind == "embedding" else torch.randn(9, *KINDS[kind][2], dtype=dtype)
        for kind in kinds
    }


def moved(model: nn.Module, kinds: tuple[str, ...], batches: list[Any], settings: dict[str, Any]) -> dict[str, Tensor]:
    """How far each factor of `kinds` goes, trained with the others frozen where they are not among these."""
    for name, parameter in model.named_parameters():
        if not any(f".{kind}_." in name for kind in kinds):
            parameter.requires_grad_(False)
    before = factors(model)
    optimizer = bare(model, 0.05, **settings)
    for batch in batches:
        optimizer.zero_grad()
        model({kind: x for kind, x in batch.items() if kind in kinds}).backward()
        optimizer.step()
    assert optimizer.stats()["skipped_steps"] == 0
    return {name: value - before[name] for name, value in factors(model).items()}


def assert_each_as_alone(
    kinds: tuple[str, ...], settings: dict[str, Any], dtype: torch.dtype, tolerance: float, dora: bool = False
) -> None:
    model = adapted(kinds, dtype, dora)
    batches = [inputs(kinds, dtype) for _ in range(3)]
    alone: dict[str, Tensor] = {}
    for kind in kinds:
        one = {**settings, "gradient": "tangent"} if kind == "embedding" and "step" not in settings else settings
        alone |= moved(copy.deepcopy(model), (kind,), batches, one)
    together = moved(model, kinds, batches, settings)
    assert set(together) == set(alone) and len(alone) >= 2 * len(kinds)
    for name, value in together.items():
        assert alone[name].norm() > 0, name
        assert (value - alone[name]).norm() <= tolerance * alone[name].norm(), name


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "DoRA"])
@pytest.mark.parametrize("step", STEPS)
def test_every_kind_beside_every_other(step: str, dora: bool) -> None:
    assert_each_as_alone(ALL, STEPS[step], torch.float64, 1e-6, dora)


@pytest.mark.parametrize(
    "kinds", list(itertools.permutations(("linear", "conv1d", "conv2d_1x1", "embedding"), 2)), ids="+".join
)
def test_any_two_kinds_in_either_order(kinds: tuple[str, str]) -> None:
    """The first layer of a bucket has no say in the others' shapes."""
    assert_each_as_alone(kinds, STEPS["tangent"], torch.float64, 1e-6)


#: A matrix, a kernel of three and of four dimensions and an embedding: what the launches tell apart, at half the time.
LAUNCHED = ("linear", "conv1d", "conv2d_1x1", "embedding")


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("step", ["spectral", "spectral, halves", "exact"])
def test_every_kind_in_one_launch(step: str) -> None:
    model, batches = adapted(LAUNCHED, torch.float32, False), [inputs(LAUNCHED, torch.float32)]
    wanted = moved(copy.deepcopy(model), LAUNCHED, batches, {**STEPS[step], "backend": "reference"})
    for name, value in moved(model, LAUNCHED, batches, {**STEPS[step], "backend": "triton"}).items():
        rounding = 2 * torch.finfo(torch.float32).eps * model.get_parameter(name).detach().norm()
        assert (value - wanted[name]).norm() <= 2e-3 * wanted[name].norm() + rounding, name


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=interpreted)])
@pytest.mark.parametrize("step", ["spectral"])
def test_a_controller_keeps_the_increment_of_each(step: str, backend: str) -> None:
    kinds = LAUNCHED if backend == "triton" else ALL
    model = adapted(kinds, torch.float32, False)
    optimizer = PSILoRA(
        model, 0.05, **{"step": "gradient", "metric": None, **STEPS[step], "controller": "slope", "backend": backend}
    )
    before = factors(model)
    model(inputs(kinds, torch.float32)).backward()
    optimizer.step()
    named = dict(model.named_parameters())
    for name, old in before.items():
        change = named[name].detach() - old
        if "magnitude" not in name:
            assert change.norm() > 0, name
            torch.testing.assert_close(optimizer.state[named[name]]["change"], change, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("step", ["spectral", "exact"])
def test_a_kernel_in_channels_last_memory_beside_a_linear(step: str) -> None:
    model = adapted(("linear", "conv2d"), torch.float64, False)
    batches = [inputs(("linear", "conv2d"), torch.float64) for _ in range(2)]
    wanted = moved(copy.deepcopy(model), ("linear", "conv2d"), batches, STEPS[step])
    model = model.to(memory_format=torch.channels_last)
    assert not model.base_model.model.conv2d_.lora_A.default.weight.is_contiguous()
    for name, value in moved(model, ("linear", "conv2d"), batches, STEPS[step]).items():
        assert wanted[name].norm() > 0
        assert (value - wanted[name]).norm() <= 1e-6 * wanted[name].norm(), name
