"""torch.set_default_device: what a step makes for itself lies where the step says, not where the user's tensors do."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import data, plain_mlp, train
from torch import nn
from torch.utils._device import _device_constructors

import psilora
from psilora import PSILoRA, baselines, triton_kernels

FOLDERS = [Path(package.__path__[0]) for package in (psilora, triton_kernels)]
CONSTRUCTORS = {f.__name__ for f in _device_constructors()}

GRADIENT: dict[str, Any] = {"step": "gradient"}
KINDS: list[dict[str, Any]] = [
    {},
    {"controller": "slope", "max_grad_norm": 0.1, "norm": "full", "weight_decay": 0.1},
    {"joint": False},
    {"fade": False, "metric": None, "num_iters": 2, "first": "B", "lr": "tensor"},
    {"backend": "triton"},
    GRADIENT,
    GRADIENT | {"backend": "triton", "metric": "kfac"},
    GRADIENT | {"backend": "triton", "solver": "ritz", "num_iters": 2},
    GRADIENT | {"lr": "tensor", "max_grad_norm": 0.1, "norm": "full", "num_iters": 0},
    GRADIENT | {"solver": "ritz", "num_iters": 2, "weight_decay": 0.1},
    GRADIENT | {"gradient": "tangent", "metric": "shampoo"},
    GRADIENT | {"gradient": "tangent", "metric": "kfac"},
    GRADIENT | {"gradient": "dense", "metric": "kfac-dense", "max_grad_norm": 0.1, "norm": "full"},
    GRADIENT | {"gradient": "backward", "momentum": 0.0},
    GRADIENT | {"gradient": "auto"},
    GRADIENT | {"metric": "kfac", "metric_bias_correction": False},
    GRADIENT | {"metric": "shampoo"},
    GRADIENT | {"metric": "shampoo-dense"},
    GRADIENT | {"metric": "kfac-low-rank"},
]
OPTIMIZERS: dict[str, Any] = {
    **{str(kind): lambda model, kind=kind: _psilora(model, **kind) for kind in KINDS},
    "LoRAMuon": lambda model: baselines.LoRAMuon(model, 0.05),
    "PreconditionedAdamW": lambda model: baselines.PreconditionedAdamW(model, 0.05),
    "PreconditionedSGD": lambda model: baselines.PreconditionedSGD(model, 0.05, momentum=0.5),
    "Riemannion": lambda model: baselines.Riemannion(model, 0.05),
    "AltLoRA+": lambda model: baselines.AltLoRA(model, 0.05, second=True),
    "LoFT": lambda model: baselines.LoFT(model, 0.05),
    "LoRAPro": lambda model: baselines.LoRAPro(model, 0.05),
    "ProjectedMomentum": lambda model: baselines.ProjectedMomentum(model, 0.05),
    **{
        f"SVDLoRA {rule}": lambda model, rule=rule: baselines.SVDLoRA(model, 0.05, rule=rule)
        for rule in ("sgd", "adamw")
    },
}


def _psilora(model: nn.Module, **kind: Any) -> PSILoRA:
    settings = {"lr": 0.05, **kind}
    if settings["lr"] == "tensor":
        settings["lr"] = torch.tensor(0.05, device="cpu")
    return PSILoRA(model, **settings)


@pytest.fixture
def elsewhere() -> Iterator[Any]:
    """Has everything that names no device made on "meta", where it holds no numbers."""
    yield lambda: torch.set_default_device("meta")
    torch.set_default_device(None)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_does_not_depend_on_the_default_device(name: str, elsewhere: Any) -> None:
    dtype = torch.float32
    model = plain_mlp(dtype=dtype)
    model.l3.base.bias.requires_grad_()
    twin, batches = copy.deepcopy(model), [data(dtype=dtype) for _ in range(2)]
    train(twin, OPTIMIZERS[name](twin), batches)
    before = copy.deepcopy(model)
    elsewhere()
    optimizer = OPTIMIZERS[name](model)
    train(model, optimizer, batches)
    if isinstance(optimizer, PSILoRA):
        optimizer.observe_next_step()
        state = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(state)
        after = copy.deepcopy(list(model.parameters()))
        train(model, optimizer, batches[:1])
        assert optimizer.stats()["update_ratio"] > 0
    else:
        after = list(model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), after, strict=True))
    moved = [not torch.equal(a, b) for a, b in zip(before.parameters(), after, strict=True)]
    assert sum(moved) == 7


def nameless(source: str) -> list[str]:
    """The calls of torch's constructors that name no device."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        owner = node.func.value
        if isinstance(owner, ast.Name) and owner.id == "torch" and node.func.attr in CONSTRUCTORS:
            if not any(keyword.arg == "device" for keyword in node.keywords):
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


def test_every_constructor_names_its_device() -> None:
    files = [path for folder in FOLDERS for path in sorted(folder.rglob("*.py"))]
    assert len(files) > 60
    assert not {str(path): calls for path in files if (calls := nameless(path.read_text()))}


def test_a_constructor_without_a_device_is_found() -> None:
    assert nameless("x = torch.zeros(3, dtype=d)") == ["line 1: torch.zeros(3, dtype=d)"]
    assert nameless("torch.as_tensor(v)") and not nameless("torch.zeros(3, device=d); torch.zeros_like(x)")
