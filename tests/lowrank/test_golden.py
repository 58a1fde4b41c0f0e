"""The method's public implementation, case by case, in float64."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from models import MLP, bare, mse
from peft import LoraConfig, get_peft_model

from psilora import lorsum

GOLDEN = np.load(Path(__file__).parent / "golden" / "golden.npz")
META = json.loads(bytes(GOLDEN["meta"]))


def tensor(key: str) -> torch.Tensor:
    return torch.from_numpy(GOLDEN[key])


@pytest.mark.parametrize("case", range(len(META["lorsum"])))
def test_lorsum(case: int) -> None:
    meta = META["lorsum"][case]
    terms = [(tensor(f"{case}_B{j}"), tensor(f"{case}_A{j}")) for j in range(meta["n"])]
    metric = None if meta["metric"] == "none" else (tensor(f"{case}_metric_B"), tensor(f"{case}_metric_A"))
    B, A = lorsum(
        terms,
        meta["coefficients"],
        num_iters=meta["num_iters"],
        prox=meta["prox"],
        metric=metric,
        first=meta["first"],
    )
    torch.testing.assert_close(B, tensor(f"{case}_outB"), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(A, tensor(f"{case}_outA"), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", range(len(META["trajectory"])))
def test_trajectory(case: int) -> None:
    meta, prefix = META["trajectory"][case], f"t{case}_"
    config = LoraConfig(r=meta["rank"], lora_alpha=meta["rank"], target_modules=["l1", "l2", "l3"])
    model = get_peft_model(MLP(meta["dims"]), config).double()
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(tensor(f"{prefix}init_{name}"))
    optimizer = bare(
        model,
        meta["lr"],
        num_iters=meta["num_iters"],
        momentum=meta["momentum"],
        prox=meta["rho"],
        metric="kfac" if meta["scaled"] else None,
        metric_power=meta["metric_power"],
        metric_beta=meta["beta2"],
        metric_bias_correction=False,
        damping=meta["damping"],
    )
    optimizer.init_state()
    for name, parameter in named.items():
        if "lora_A" in name and meta["momentum"] > 0:
            optimizer.state[parameter]["momentum"].copy_(tensor(f"{prefix}momA_{name}"))
    x, y = tensor(f"{prefix}x"), tensor(f"{prefix}y")
    for t in range(meta["steps"]):
        optimizer.zero_grad()
        mse(model, (x[t], y[t])).backward()
        optimizer.step()
        for name, parameter in named.items():
            if "lora_" in name:
                expected = tensor(f"{prefix}s{t}_{name}")
                torch.testing.assert_close(parameter.detach(), expected, rtol=1e-10, atol=1e-10)
    assert optimizer.stats() == {"skipped_steps": 0, "repaired_pivots": 0}
