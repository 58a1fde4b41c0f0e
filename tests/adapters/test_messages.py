"""What a user reads where a model has no pair to train: what was found, and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import bare, factors, mse, plain_mlp
from torch import Tensor, nn

from psilora import PSILoRA
from psilora.adapters import find_pairs

pytestmark = pytest.mark.filterwarnings("ignore:psilora. using the tangent gradient:UserWarning")


#: Blocks are given by their size since PEFT 0.14, by their number before.
OFT = {"oft_block_size" if hasattr(peft.OFTConfig, "oft_block_size") else "r": 4}


class Handmade(nn.Module):
    """ΔW from two parameters of given shapes, or two modules, however they are multiplied."""

    def __init__(self, A: tuple[int, ...] | nn.Module, B: tuple[int, ...] | nn.Module) -> None:
        super().__init__()
        self.lora_A = A if isinstance(A, nn.Module) else nn.Parameter(torch.randn(A))
        self.lora_B = B if isinstance(B, nn.Module) else nn.Parameter(torch.randn(B))
        self.scaling = 2.0


class Transposed(nn.Module):
    """A layer like those of GPT-2, whose weight is (d_in, d_out)."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_in, d_out))


HANDMADE: dict[str, tuple[nn.Module, str]] = {
    "x @ A @ B, square": (
        Handmade((16, 4), (4, 16)),
        r"would make a rank of 16 in a layer of 4×4; lora_A must be",
    ),
    "full rank": (Handmade((8, 8), (8, 8)), r"do not tell these matrices from their transposes; lora_A must be"),
    "modules": (Handmade(Transposed(16, 4), Transposed(4, 16)), "would make a rank of 16"),
}


@pytest.mark.parametrize("case", HANDMADE)
def test_factors_of_the_other_orientation_are_refused(case: str) -> None:
    module, message = HANDMADE[case]
    with pytest.raises(ValueError, match=f"cannot be trained as ΔW = s·B·A: 0 .*{message}"):
        PSILoRA(nn.Sequential(module), 0.05)
    optimizer = PSILoRA(nn.Sequential(module, plain_mlp()), 0.05, unsupported="adamw")
    assert {id(p) for p in module.parameters()} == {id(p) for p in optimizer.param_groups[-1]["params"]}


def linear(rank: int, d_in: int, d_out: int) -> nn.Module:
    return Handmade(nn.Linear(d_in, rank, bias=False), nn.Linear(rank, d_out, bias=False))


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (Handmade((4, 16), (16, 4)), (4, 16, 16)),
        (Handmade((4, 16), (8, 4)), (4, 16, 8)),
        (Handmade((1, 1), (2, 1)), (1, 1, 2)),
        (Handmade((16, 4), (4, 8)), (4, 8, 16)),  # x @ A @ B: the pair of the transposed weight
        (Handmade((6, 3), (5, 6)), (6, 3, 5)),  # more than the rank it could have, and it cannot be read otherwise
        (linear(16, 4, 4), (16, 4, 4)),
        (linear(8, 8, 8), (8, 8, 8)),
    ],
    ids=[
        "square",
        "wide",
        "scalar",
        "x @ A @ B, not square",
        "beyond the rank",
        "linear, beyond the rank",
        "linear, full rank",
    ],
)
def test_factors_that_can_be_told_are_taken(module: nn.Module, shape: tuple[int, int, int]) -> None:
    (pair,), refused = find_pairs(nn.Sequential(module))
    assert not refused and (pair.rank, pair.d_in, pair.d_out) == shape


def test_an_embedding_of_peft_is_told_by_its_class() -> None:
    config = peft.LoraConfig(r=8, target_modules=["0"])
    (pair,), refused = find_pairs(peft.get_peft_model(nn.Sequential(nn.Embedding(8, 8)), config))
    assert not refused and (pair.rank, pair.d_in, pair.d_out) == (8, 8, 8)


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))


def test_a_loaded_adapter_is_frozen_and_named(tmp_path: Path) -> None:
    peft.get_peft_model(two_layers(), peft.LoraConfig(r=4, target_modules=["0"])).save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(two_layers(), tmp_path)
    with pytest.raises(ValueError, match=r"are frozen .*base_model.model.0; .*from_pretrained\(…, is_trainable=True\)"):
        PSILoRA(model, 0.05)
    PSILoRA(peft.PeftModel.from_pretrained(two_layers(), tmp_path, is_trainable=True), 0.05)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("VeRA", peft.VeraConfig(target_modules=["0"])),
        ("LoHa", peft.LoHaConfig(target_modules=["0"])),
        ("LoKr", peft.LoKrConfig(target_modules=["0"])),
        ("(IA)³", peft.IA3Config(target_modules=["0"], feedforward_modules=[])),
        ("OFT", peft.OFTConfig(target_modules=["0"], **OFT)),
        ("hira", peft.HiraConfig(target_modules=["0"], r=4)) if hasattr(peft, "HiraConfig") else ("", None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_methods_of_peft_are_called_by_name(kind: str, config: Any) -> None:
    if config is None:
        pytest.skip("not in this PEFT")
    with pytest.raises(ValueError) as raised:
        PSILoRA(peft.get_peft_model(two_layers(), config), 0.05)
    assert f"its adapters are {kind} (base_model.model.0)" in str(raised.value)
    assert "torch.optim.AdamW" in str(raised.value) and "add adapters" not in str(raised.value)


@pytest.mark.parametrize("unsupported", ["raise", "adamw"])
def test_adalora_is_named_and_the_advice_can_be_followed(unsupported: str) -> None:
    model = peft.get_peft_model(two_layers(), peft.AdaLoraConfig(target_modules=["0"], total_step=10))
    with pytest.raises(ValueError, match=r"base_model.model.0 \(AdaLoRA's parameters are not .* torch.optim.AdamW$"):
        PSILoRA(model, 0.05, unsupported=unsupported)
    beside = nn.ModuleList([model, plain_mlp()])
    with pytest.raises(ValueError, match="or train them with AdamW by unsupported='adamw'$"):
        PSILoRA(beside, 0.05)
    assert len(PSILoRA(beside, 0.05, unsupported="adamw").pairs()) == 3


def test_a_module_list_is_one_model() -> None:
    models = [plain_mlp(), plain_mlp()]
    both = nn.ModuleList(models)
    optimizer, before = bare(both, 0.05), factors(both)
    x: Tensor = torch.randn(8, 24, dtype=torch.float64)
    sum(mse(model, (x, torch.zeros(8, 6, dtype=torch.float64))) for model in models).backward()
    optimizer.step()
    assert len(before) == 12 and all(not torch.equal(before[name], value) for name, value in factors(both).items())
