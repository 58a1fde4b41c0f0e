"""The factors of the low-rank momentum stay in balance."""

from __future__ import annotations

import math

import pytest
import torch
from models import bare, one_layer

from psilora.lowrank import momentum as momentum_module
from psilora.lowrank.momentum import IMBALANCE, balance

F64 = torch.float64


def test_momentum_factors_do_not_drift_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Left alone they do, until λ holds A_m where it is; with K = 2 they are left alone, as published."""

    def ratio(num_iters: int = 1) -> float:
        layer = one_layer(30, 20, 3, 3.0)
        target = torch.randn(30, 20, dtype=F64, generator=torch.Generator().manual_seed(1))
        optimizer = bare(layer, 0.1, momentum=0.75, prox=1e-3, num_iters=num_iters)
        for step in range(400):
            optimizer.zero_grad()
            columns = torch.randperm(20, generator=torch.Generator().manual_seed(step))[:6]
            (layer(torch.eye(20, dtype=F64)[columns]) - target.T[columns]).square().sum().backward()
            optimizer.step()
        B_m, A_m = (optimizer.state[p]["momentum"] for p in (layer.lora_B.weight, layer.lora_A.weight))
        return float(B_m.norm() / A_m.norm())

    assert ratio() ** 2 < 4 * IMBALANCE
    assert ratio(num_iters=2) ** 2 > 64 * IMBALANCE
    monkeypatch.setattr(momentum_module, "IMBALANCE", math.inf)
    assert ratio() ** 2 > 64 * IMBALANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_balance_is_a_power_of_two_that_leaves_the_product_alone(dtype: torch.dtype) -> None:
    B, A = torch.randn(5, 6, 2, dtype=dtype), torch.randn(5, 2, 7, dtype=dtype)
    size_B = torch.tensor([2.0**16, 2.0**17, 2.0**44, 0.0, 1.0], dtype=dtype)
    size_A = torch.tensor([1.0, 1.0, 2.0**-4, 1.0, 0.0], dtype=dtype)
    new_B, new_A = balance(B, A, size_B, size_A)
    assert torch.equal(new_B @ new_A, B @ A)
    assert (new_A / A)[:, 0, 0].tolist() == [1.0, 2.0**4, 2.0**12, 1.0, 1.0]
