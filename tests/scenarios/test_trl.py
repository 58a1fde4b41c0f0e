"""TRL: models adapted inside a constructor, several forwards per backward, forwards without gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from captures import scales_and_residuals
from models import bare, factors
from naive import WrapperHooks
from releases import needs_factories, unmet
from tiny import MODES, SENTENCES, byte_tokenizer, lora, tiny_llama
from torch import nn
from transformers import TrainerCallback

from psilora import PSILoRA
from psilora.integrations.hf import optimizer_cls_and_kwargs

trl = pytest.importorskip("trl", reason="TRL is an extra: psilora[loops]")
if unmet("trl"):
    pytest.skip(f"this TRL does not go with this {', '.join(unmet('trl'))}", allow_module_level=True)
Dataset = pytest.importorskip("datasets", reason="datasets comes with TRL").Dataset

COMMON = {
    "per_device_train_batch_size": 2,
    "max_steps": 2,
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "dataloader_pin_memory": False,
    "warmup_steps": 0,
}

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*:DeprecationWarning:trl",
    "ignore:.*:FutureWarning:trl",
    # torch's, of the reference's forward under no_grad, where checkpointing is reentrant: the default of transformers 4
    "ignore:None of the inputs have requires_grad=True:UserWarning",
)


class Residuals(TrainerCallback):
    """The worst residual of the captures against `.grad` before every step, and the number of calls per pair."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.calls: set[int] = set()
        self.naive: WrapperHooks | None = None
        self.naive_errors: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: object) -> None:
        self.naive = WrapperHooks(model)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any, **_: object) -> None:
        optimizer = optimizer.optimizer
        self.calls |= {record.calls for record in optimizer.captured()}
        self.values.append(max(error for _, error in scales_and_residuals(optimizer).values()))
        self.naive_errors.append(self.naive.worst())
        self.naive.clear()


@pytest.mark.scenario(
    7,
    "TRL",
    gradient="exact, tangent, spectral",
    tested="SFTTrainer(peft_config=…), gradient checkpointing on as by default",
)
@pytest.mark.parametrize("mode", MODES)
def test_sft_with_a_peft_config(mode: str, tmp_path: Path) -> None:
    """The trap: the adapters do not exist before the trainer does, so an optimizer of the bare model finds nothing."""
    needs_factories()
    model = tiny_llama()
    with pytest.raises(ValueError, match="no trainable LoRA pair"):
        bare(model, 0.1)
    watch = Residuals()
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(output_dir=str(tmp_path), max_length=32, **COMMON),
        train_dataset=Dataset.from_dict({"text": list(SENTENCES) * 2}),
        processing_class=byte_tokenizer(),
        peft_config=lora(lora_dropout=0.1),
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(0.1, **MODES[mode]),
        callbacks=[watch] if mode == "exact" else [],
    )
    before = factors(trainer.model)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, PSILoRA) and len(before) == 2 * len(optimizer.pairs())
    assert all(not torch.equal(before[name], value) for name, value in factors(trainer.model).items())
    if mode == "exact":
        assert max(watch.values) < 1e-4 and watch.calls == {1}
        assert min(watch.naive_errors) > 0.1


@pytest.mark.scenario(7, "TRL", gradient="exact", tested="DPOTrainer: the disabled adapter is the reference model")
def test_dpo_with_the_disabled_adapter_as_reference(tmp_path: Path) -> None:
    """The trap: forwards of the reference run through the same layers, in train mode, and leave their X behind."""
    watch = Residuals()
    rows = {"prompt": list(SENTENCES), "chosen": [" yes, always"] * 4, "rejected": [" no"] * 4}
    trainer = trl.DPOTrainer(
        tiny_llama(),
        args=trl.DPOConfig(output_dir=str(tmp_path), max_length=48, **COMMON),
        train_dataset=Dataset.from_dict(rows),
        processing_class=byte_tokenizer(),
        peft_config=lora(),
        callbacks=[watch],
    )
    trainer.optimizer = PSILoRA(trainer.model, 0.1, step="gradient")
    trainer.train()
    assert max(watch.values) < 1e-4 and watch.calls == {1}
    assert watch.naive_errors == [float("inf")] * 2
    rewards = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert rewards[0] == 0.0 and rewards[1] != 0.0


@pytest.mark.scenario(7, "TRL", gradient="exact", tested="GRPOTrainer: generation and no_grad forwards in train mode")
def test_grpo(tmp_path: Path) -> None:
    """The trap: a guard on `module.training` keeps X of forwards that have no backward."""
    watch = Residuals()
    trainer = trl.GRPOTrainer(
        tiny_llama(),
        reward_funcs=lambda completions, **_: [float(len(text) % 5) for text in completions],
        args=trl.GRPOConfig(
            output_dir=str(tmp_path), num_generations=2, max_completion_length=4, beta=0.1, num_iterations=2, **COMMON
        ),
        train_dataset=Dataset.from_dict({"prompt": list(SENTENCES)}),
        processing_class=byte_tokenizer(),
        peft_config=lora(),
        callbacks=[watch],
    )
    trainer.optimizer = PSILoRA(trainer.model, 0.1, step="gradient")
    trainer.train()
    assert max(watch.values) < 1e-4 and watch.calls == {1}
    assert float("inf") in watch.naive_errors
