"""Small models with LoRA adapters that the tests train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from psilora import LoRALinear, PSILoRA


class MLP(nn.Module):
    """Linear–tanh–Linear–tanh–Linear with layers l1, l2, l3."""

    def __init__(self, dims: Sequence[int]) -> None:
        super().__init__()
        self.l1, self.l2, self.l3 = (nn.Linear(i, o) for i, o in zip(dims[:-1], dims[1:], strict=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.l3(torch.tanh(self.l2(torch.tanh(self.l1(x)))))


class Checkpointed(nn.Module):
    """A model whose whole forward is run again in backward."""

    def __init__(self, model: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.model, self.use_reentrant = model, use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.model, x, use_reentrant=self.use_reentrant)


def peft_mlp(dims: Sequence[int] = (24, 20, 16, 6), *, dtype: torch.dtype = torch.float64, **config: Any) -> nn.Module:
    """An MLP under PEFT LoRA on all layers; B starts random so that every gradient is non-zero."""
    from peft import LoraConfig, get_peft_model  # takes longer to import than torch: worlds do without it

    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["l1", "l2", "l3"], **config}
    model = get_peft_model(MLP(dims), LoraConfig(**settings)).to(dtype)
    randomise_B(model)
    return model


def plain_mlp(
    dims: Sequence[int] = (24, 20, 16, 6), *, rank: int = 4, alpha: float = 8.0, dtype: torch.dtype = torch.float64
) -> nn.Module:
    """The same MLP with `psilora.LoRALinear` layers."""
    model = MLP(dims)
    for name in ("l1", "l2", "l3"):
        setattr(model, name, LoRALinear(getattr(model, name), rank, alpha))
    model = model.to(dtype)
    randomise_B(model)
    return model


def randomise_B(model: nn.Module, std: float = 0.1) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_B" in name:
                parameter.normal_(0, std)


def bare(model: nn.Module, lr: float | Tensor = 0.1, **settings: Any) -> PSILoRA:
    """PSILoRA along the gradient, without a metric or a controller, unless the settings say otherwise."""
    return PSILoRA(model, lr, **{"step": "gradient", "metric": None, "controller": None, **settings})


def factors(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every LoRA factor."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name and p.requires_grad}


def data(rows: int = 32, d_in: int = 24, d_out: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, d_in, dtype=dtype), torch.randn(rows, d_out, dtype=dtype)


def mse(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (model(x) - y).square().mean(1).mean()


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[tuple[Tensor, Tensor]],
    loss: Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor] = mse,
) -> None:
    for batch in batches:
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()


def assert_nonfinite_is_skipped(metric: str, factors_of_x: tuple[float, float]) -> None:
    """Train a step, then two on data times something that is not finite: neither may change parameters or state."""
    model = plain_mlp(dtype=torch.float32)
    optimizer = bare(model, 0.1, metric=metric)
    train(model, optimizer, [data(dtype=torch.float32)])
    before = factors(model)
    kept = {id(p): {k: v.clone() for k, v in state.items()} for p, state in optimizer.state.items()}
    x, y = data(dtype=torch.float32)
    with pytest.warns(UserWarning, match="skipped"):
        train(model, optimizer, [(x * factors_of_x[0], y)])
    train(model, optimizer, [(x * factors_of_x[1], y)])
    assert optimizer.stats()["skipped_steps"] == 2
    assert all(torch.equal(before[name], value) for name, value in factors(model).items())
    assert all(torch.equal(v, kept[id(p)][k]) for p, state in optimizer.state.items() for k, v in state.items())


def layer_of(d_out: int = 12, d_in: int = 9, rank: int = 3, dtype: torch.dtype = torch.float64) -> LoRALinear:
    layer = LoRALinear(nn.Linear(d_in, d_out, bias=False), rank, 2.0 * rank).to(dtype)
    randomise_B(layer, 0.3)
    return layer


def one_layer(d_out: int, d_in: int, rank: int, alpha: float, dtype: torch.dtype = torch.float64) -> LoRALinear:
    layer = LoRALinear(nn.Linear(d_in, d_out, bias=False), rank, alpha).to(dtype)
    randomise_B(layer, 0.3)
    return layer
