"""The real Trainer: warm-up, accumulation, clipping and dropout, gradient checkpointing, resuming."""

from __future__ import annotations

import gc
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from captures import scales_and_residuals
from models import factors
from naive import WrapperHooks, jittered_turn
from releases import needs_factories
from tiny import MODES, adapted, token_rows, trainer_arguments
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from psilora import PSILoRA
from psilora.integrations.hf import PSILoRACallback, PSILoRAFactory, optimizer_cls_and_kwargs


def arguments(path: Path, **changes: Any) -> TrainingArguments:
    return trainer_arguments(path, **{"per_device_train_batch_size": 2, "max_steps": 4, **changes})


class BeforeStep(TrainerCallback):
    """Looks at the captures after clipping, before every step; keeps the factors after it."""

    def __init__(self, model: nn.Module, naive: WrapperHooks | None = None) -> None:
        self.model, self.naive = model, naive
        self.history, self.scales, self.residuals, self.naive_errors = [factors(model)], [], [], []
        self.calls: set[int] = set()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any, **_: object) -> None:
        optimizer = optimizer.optimizer
        if self.naive is not None:
            self.naive_errors.append(self.naive.worst())
            self.naive_calls = max(len(held) for held in self.naive.X.values())
            self.naive.clear()
        if any(record.calls for record in optimizer.captured()):
            found = scales_and_residuals(optimizer).values()
            self.scales.append([scale for scale, _ in found])
            self.residuals.append(max(residual for _, residual in found))
            self.calls |= {record.calls for record in optimizer.captured()}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: object) -> None:
        self.history.append(factors(self.model))


@pytest.mark.scenario(
    1,
    "transformers",
    gradient="exact, tangent, spectral",
    tested="warm-up from lr=0, accumulation 4, clip 1.0, dropout 0.1",
)
@pytest.mark.parametrize("mode", MODES)
def test_warm_up_accumulation_clipping_and_dropout(mode: str, tmp_path: Path) -> None:
    """Traps: lr = 0 moves a step with a jittered Gram; hooks on the wrapper see X before dropout; clipping misses S."""
    model = adapted(lora_dropout=0.1, lora_alpha=96, B_zero=True)  # gradients above the clipping norm
    naive = WrapperHooks(model)
    optimizer = PSILoRA(model, 0.1, **MODES[mode])
    watch = BeforeStep(model, naive)
    trainer = Trainer(
        model,
        arguments(tmp_path),
        train_dataset=token_rows(),
        optimizers=(optimizer, None),
        callbacks=[watch],
    )
    trainer.train()
    first, second, last = watch.history[0], watch.history[1], watch.history[-1]
    assert all(torch.equal(first[name], second[name]) for name in first), "lr = 0 is a bitwise no-op"
    assert all(not torch.equal(second[name], last[name]) for name in first)
    A = next(value for name, value in first.items() if "lora_A" in name)
    moved = jittered_turn(torch.zeros(32, 4), A, 0.0, torch.zeros_like(A))
    assert float((moved - A).norm()) == pytest.approx(float(A.norm())), "the naive turn destroys A at B = 0"
    assert min(watch.naive_errors) > 0.1, "hooks on the wrapper are wrong under dropout"
    if mode == "exact":
        assert watch.calls == {4} and max(watch.residuals) < 1e-5
        clipped = [1 / e["grad_norm"] for e in trainer.state.log_history if "grad_norm" in e]
        assert len(clipped) == 4 and any(c < 0.95 for c in clipped), "a run without clipping would show nothing"
        for scales, factor in zip(watch.scales, clipped, strict=True):
            assert scales == pytest.approx([min(1.0, factor)] * len(scales), rel=1e-4)
    assert optimizer.stats()["skipped_steps"] == 0 and optimizer.capture_bytes() == 0


@pytest.mark.scenario(
    2, "transformers", gradient="exact", tested="gradient checkpointing of both kinds: X once, not kept alive"
)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool, tmp_path: Path) -> None:
    """Traps: forward hooks fire again in the recomputation, and what they store outlives the forward."""
    model = adapted(lora_dropout=0.1)
    model.enable_input_require_grads()  # reentrant checkpointing needs it; transformers 5 sees to it by itself
    naive = WrapperHooks(model)
    optimizer = PSILoRA(model, 0.1, step="gradient")
    inputs: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.lora_A["default"].register_forward_pre_hook(lambda _m, args: inputs.append(weakref.ref(args[0])))

    class Looking(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            inputs.clear()
            optimizer_holds = optimizer.capture_bytes()
            loss = super().compute_loss(*args, **kwargs)
            gc.collect()
            alive.append(sum(ref() is not None for ref in inputs))
            assert len(inputs) == 6 and optimizer.capture_bytes() == optimizer_holds
            return loss

    watch = BeforeStep(model, naive)
    checkpointing = {"use_reentrant": use_reentrant}
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": checkpointing, "max_steps": 2}
    trainer = Looking(
        model,
        arguments(tmp_path, gradient_accumulation_steps=2, **options),
        train_dataset=token_rows(),
        optimizers=(optimizer, None),
        callbacks=[watch],
    )
    trainer.train()
    assert watch.calls == {2} and max(watch.residuals) < 1e-5, "each of the two calls once"
    assert alive == [0] * 4, "no input outlives its checkpointed forward"
    assert watch.naive_calls == 4 and watch.naive_errors == [float("inf")] * 2, "the naive hooks store X twice"


def resumable(path: Path, **changes: Any) -> tuple[Trainer, nn.Module]:
    needs_factories()
    model = adapted(lora_dropout=0.1)
    settings = {"step": "gradient", "metric": "kfac", "momentum": 0.9}
    trainer = Trainer(
        model,
        arguments(path, max_steps=6, save_strategy="steps", save_steps=3, **changes),
        train_dataset=token_rows(),
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(0.1, **settings),
    )
    return trainer, model


# PEFT before 0.18, which looks for a base that has no folder
@pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning")
@pytest.mark.scenario(
    5,
    "transformers",
    gradient="exact",
    tested="resume_from_checkpoint is bit-exact (adapter, optimizer, schedule, dropout)",
)
def test_resuming_is_bit_exact_and_needs_the_state(tmp_path: Path) -> None:
    whole, model = resumable(tmp_path / "whole")
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    stripped = tmp_path / "whole" / "stripped" / "checkpoint-3"
    shutil.copytree(checkpoint, stripped)
    (stripped / "optimizer.pt").unlink()
    ends = []
    for source in (checkpoint, stripped):
        resumed, other = resumable(tmp_path / f"resumed from {source.parent.name}")
        resumed.train(resume_from_checkpoint=str(source))
        ends.append(factors(other))
    expected = factors(model)
    assert all(torch.equal(expected[name], ends[0][name]) for name in expected)
    assert not all(torch.equal(expected[name], ends[1][name]) for name in expected), "without the state it would differ"


class OfVersion4(Trainer):
    """Calls what stands for an optimizer class with groups of parameters, as transformers 4 does."""

    def create_optimizer(self, *_: object, **__: object) -> torch.optim.Optimizer:
        made, settings = self.optimizer_cls_and_kwargs
        groups = [{"params": [p for p in self.model.parameters() if p.requires_grad], "weight_decay": 0.0}]
        self.optimizer = made(groups, **settings)
        return self.optimizer


def test_a_trainer_that_hands_over_parameters_is_served_too(tmp_path: Path) -> None:
    needs_factories()
    ends = []
    for kind in (Trainer, OfVersion4):
        torch.manual_seed(0)
        model = adapted()
        made = optimizer_cls_and_kwargs(0.1)
        trainer = kind(model, arguments(tmp_path), train_dataset=token_rows(), optimizer_cls_and_kwargs=made)
        trainer.train()
        ends.append(factors(model))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    with pytest.raises(TypeError, match=r"set trainer.optimizer = PSILoRA\(trainer.model, lr\)"):
        PSILoRAFactory([{"params": []}], lr=0.1)


# transformers' own, which pytest.warns would hand on as if it were raised here
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("way", ["factory", "optimizers="])
def test_a_learning_rate_that_is_not_used_is_said(tmp_path: Path, way: str) -> None:
    """The trap: the rate in TrainingArguments, which every other optimizer takes, does nothing."""
    if way == "factory":
        needs_factories()

    def trainer(**changes: Any) -> Trainer:
        model = adapted()
        given: dict[str, Any] = {"optimizer_cls_and_kwargs": optimizer_cls_and_kwargs(0.1)}
        if way == "optimizers=":
            given = {"optimizers": (PSILoRA(model, 0.1), None)}
        return Trainer(model, arguments(tmp_path, max_steps=2, **changes), train_dataset=token_rows(), **given)

    with pytest.warns(UserWarning, match=r"TrainingArguments.learning_rate=0.0003 is not used: .* lr=0.1") as said:
        trainer(learning_rate=3e-4).train()
    assert len([warning for warning in said if "learning_rate" in str(warning.message)]) == 1
    trainer(learning_rate=0.1).train()  # warnings are errors
    trainer().train()


def test_no_batch_is_kept_by_looking_for_the_trainer(tmp_path: Path) -> None:
    """The trap: a frame's variables are copied to be looked at, and up to Python 3.12 the frame keeps the copy."""
    model, batches, alive = adapted(), [], []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: object) -> None:
            alive.append(batches[0]() is not None)

    class Remembers(Trainer):
        def training_step(self, model: nn.Module, inputs: Any, *rest: Any) -> Tensor:
            batches.append(weakref.ref(inputs["input_ids"]))
            return super().training_step(model, inputs, *rest)

    settings, given = arguments(tmp_path, gradient_accumulation_steps=1), (PSILoRA(model, 0.1), None)
    Remembers(model, settings, train_dataset=token_rows(), optimizers=given, callbacks=[Watch()]).train()
    assert len(alive) == settings.max_steps and not alive[-1]


def test_the_figures_go_wherever_the_trainer_reports(tmp_path: Path) -> None:
    """W&B, TensorBoard and others are callbacks that are handed every log; the trap is a callback that knows one."""
    model, seen = adapted(), []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs: dict[str, float], **_: object) -> None:
            seen.append({name for name in logs if name.startswith("psilora/")})

    trainer = Trainer(
        model, arguments(tmp_path, max_steps=3), train_dataset=token_rows(), optimizers=(PSILoRA(model, 0.1), None)
    )
    trainer.add_callback(Reporter)
    trainer.add_callback(PSILoRACallback(trainer, every=2))
    trainer.train()
    logged = [names for names in seen if names]
    assert len(logged) == 2 and {"psilora/skipped_steps", "psilora/repaired_pivots"} < logged[0]
