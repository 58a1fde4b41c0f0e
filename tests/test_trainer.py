"""The real Trainer and accelerate: warm-up from lr = 0, accumulation, clipping, dropout, saving and resuming."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import MLP, bare, factors, randomise_B
from peft import LoraConfig, get_peft_model
from releases import needs_factories
from tiny import trainer_arguments
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from psilora import PSILoRA


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = MLP((24, 20, 16, 6))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        out = self.mlp(x)
        return {"loss": (out - labels).square().mean(), "logits": out}


def adapted() -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_dropout=0.1, target_modules=["l1", "l2", "l3"])
    return get_peft_model(Regression(), config)


def rows(count: int = 96) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"x": torch.randn(24, generator=generator), "labels": torch.randn(6, generator=generator)} for _ in range(count)
    ]


class Watch(TrainerCallback):
    def __init__(self, model: nn.Module) -> None:
        self.model, self.history = model, [factors(model)]

    def on_step_end(self, args, state, control, **_: object) -> None:
        self.history.append(factors(self.model))


def test_warm_up_accumulation_clipping_and_dropout(tmp_path: Path) -> None:
    model = adapted()
    optimizer = bare(model, 0.5, metric="kfac")
    watch = Watch(model)
    trainer = Trainer(
        model, trainer_arguments(tmp_path), train_dataset=rows(), optimizers=(optimizer, None), callbacks=[watch]
    )
    trainer.train()
    first, second = watch.history[0], watch.history[1]
    assert all(torch.equal(first[name], second[name]) for name in first), "the warm-up starts at lr = 0: a no-op"
    moved = [not torch.equal(second[name], watch.history[-1][name]) for name in second]
    assert all(moved)
    assert optimizer.stats() == {"skipped_steps": 0, "repaired_pivots": 0}
    assert optimizer.capture_bytes() == 0
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged[:3] in ([0.0, 0.25, 0.5], [0.25, 0.5, 0.375])  # LoRA's, before the step or, in old releases, after it
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    assert float(state["step"]) == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accelerate_prepare_keeps_fp32_state(dtype: torch.dtype) -> None:
    from accelerate import Accelerator

    model = adapted().to(dtype)
    randomise_B(model)
    optimizer = bare(model, 0.1, metric="kfac")
    optimizer.init_state()
    for state in optimizer.state.values():
        state["metric"].fill_(1 / 3)
    accelerator = Accelerator(cpu=True)
    _, prepared = accelerator.prepare(model, optimizer)
    for state in prepared.optimizer.state.values():
        assert state["metric"].dtype == torch.float32
        assert torch.equal(state["metric"], torch.full_like(state["metric"], 1 / 3))


def test_resuming_a_trainer_run_is_bit_exact(tmp_path: Path) -> None:
    needs_factories()

    def run(path: Path, **changes: object) -> tuple[Trainer, nn.Module]:
        model = adapted()
        trainer = Trainer(
            model,
            trainer_arguments(path, save_strategy="steps", save_steps=3, **changes),
            train_dataset=rows(),
            optimizer_cls_and_kwargs=(PSILoRA, {"model": model, "lr": 0.5}),
        )
        return trainer, model

    whole, model = run(tmp_path / "whole")
    whole.train()
    resumed, other = run(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    a, b = factors(model), factors(other)
    assert all(torch.equal(a[name], b[name]) for name in a)
