"""The figures of an observed step against dense float64 formulas, and their way into the Trainer's reports."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from models import data, mse, plain_mlp, train
from naive import PlainState
from tiny import adapted, token_rows
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from psilora import PSILoRA
from psilora.integrations.hf import PSILoRACallback

FIGURES = {
    "projection_residual",
    "factor_conditioning",
    "update_ratio",
    "momentum_kept",
    "clip_factor",
    "capture_bytes",
}
COUNTS = {"skipped_steps", "repaired_pivots"}


def dense(model: nn.Module, optimizer: PSILoRA) -> list[dict[str, Tensor]]:
    """Per layer: G as a matrix, W = s·B·A and the momentum as a matrix."""
    layers = []
    for pair, record in zip(optimizer.pairs(), optimizer.captured(), strict=True):
        s = pair.scaling
        G = sum((S.mT @ X for X, S in record.chunks), torch.zeros(())) / s if record.chunks else None
        state_A, state_B = optimizer.state[pair.lora_A], optimizer.state[pair.lora_B]
        M = state_B["momentum"] @ state_A["momentum"]
        layers.append({"G": G, "W": s * pair.B @ pair.A, "M": M.clone(), "B": pair.B.clone(), "A": pair.A.clone()})
    return layers


def tangent(G: Tensor, B: Tensor, A: Tensor) -> Tensor:
    P, Q = B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A
    return P @ G + G @ Q - P @ G @ Q


@pytest.mark.parametrize("gradient", ["exact", "dense", "tangent"])
def test_figures_match_their_definitions(gradient: str) -> None:
    model, batch = plain_mlp(), data()
    optimizer = PSILoRA(model, 0.1, step="gradient", gradient=gradient, momentum=0.8, dampening=0.3, max_grad_norm=0.05)
    train(model, optimizer, [batch])
    # the exact captures of a twin that does not step give G
    twin = plain_mlp()
    twin.load_state_dict(model.state_dict())
    seeing = PSILoRA(twin, 0.1, step="gradient")
    seeing.init_state()
    mse(twin, batch).backward()
    truth = dense(twin, seeing)
    before = dense(model, optimizer)
    optimizer.zero_grad()
    mse(model, batch).backward()
    held = optimizer.capture_bytes()
    norm = torch.stack([g.grad.norm() / p.scaling**0.5 for p in optimizer.pairs() for g in (p.lora_A, p.lora_B)]).norm()
    clip = min(1.0, 0.05 / (float(norm) + 1e-6))
    optimizer.observe_next_step()
    optimizer.step()
    after = dense(model, optimizer)

    G2 = T2 = D2 = W2 = M2 = goal2 = 0.0
    conditioning = []
    for told, old, new in zip(truth, before, after, strict=True):
        G = clip * told["G"]
        G_T = tangent(G, old["B"], old["A"])
        G2, T2 = G2 + float(G.square().sum()), T2 + float(G_T.square().sum())
        D2 += float((new["W"] - old["W"]).square().sum())
        W2 += float(new["W"].square().sum())
        goal = 0.8 * old["M"] + 0.7 * (G_T if gradient == "tangent" else G)
        goal2, M2 = goal2 + float(goal.square().sum()), M2 + float(new["M"].square().sum())
        for factor in (new["B"], new["A"]):
            values = torch.linalg.svdvals(factor)
            conditioning.append(float(values[-1] / values[0]))
    stats = optimizer.stats()
    assert set(stats) == FIGURES | COUNTS
    expected = 0.0 if gradient == "tangent" else (1 - T2 / G2) ** 0.5
    assert stats["projection_residual"] == pytest.approx(expected, abs=1e-6)
    assert stats["factor_conditioning"] == pytest.approx(min(conditioning), rel=1e-6)
    assert stats["update_ratio"] == pytest.approx((D2 / W2) ** 0.5, rel=1e-6)
    assert stats["momentum_kept"] == pytest.approx(M2 / goal2, rel=1e-6)
    assert stats["clip_factor"] == pytest.approx(clip, rel=1e-6) and clip < 0.9
    assert stats["capture_bytes"] == held and (held > 0) == (gradient != "tangent")


def test_clipping_outside_is_reported_only_where_it_can_be_known() -> None:
    """The trap: a step from `.grad` alone would call a clipped gradient unclipped."""
    known = {}
    for name, settings in {"gradient": {"step": "gradient"}, "spectral": {}, "own": {"max_grad_norm": 1e9}}.items():
        model = plain_mlp()
        optimizer = PSILoRA(model, 0.05, **settings)
        mse(model, data()).backward()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3))
        optimizer.observe_next_step()
        optimizer.step()
        known[name] = optimizer.stats().get("clip_factor")
        assert "update_ratio" in optimizer.stats()
        if name == "gradient":
            assert known[name] == pytest.approx(1e-3 / norm, rel=1e-2)
    assert known["spectral"] is None and known["own"] == 1.0


def test_observing_changes_nothing_and_lasts_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    watched, other = plain_mlp(), plain_mlp()
    other.load_state_dict(watched.state_dict())
    ours, theirs = (PSILoRA(m, 0.1, step="gradient", metric="kfac") for m in (watched, other))
    batches = [data(seed) for seed in (5, 6, 7)]
    assert set(ours.stats()) == COUNTS
    ours.observe_next_step()
    train(watched, ours, batches[:1])
    first = ours.stats()
    monkeypatch.setattr("psilora.monitor.observer._before", lambda *_: pytest.fail("computed without being asked for"))
    train(watched, ours, batches[1:])
    train(other, theirs, batches)
    assert ours.stats() == first
    assert all(torch.equal(a, b) for a, b in zip(watched.parameters(), other.parameters(), strict=True))


class CSVLog(TrainerCallback):
    """A reporter of the user's own."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: object) -> None:
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerows([[state.global_step, name, value] for name, value in logs.items()])


def trainer(path: Path, optimizer: Any, model: nn.Module) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(path),
        logging_steps=2,
        max_steps=5,
        per_device_train_batch_size=2,
        report_to=["tensorboard"],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    return Trainer(model, arguments, train_dataset=token_rows(), optimizers=(optimizer, None))


def test_the_callback_reaches_tensorboard_and_a_log_of_the_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="TensorBoard is an extra: psilora[loops]"
    )
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    model = adapted()
    training = trainer(tmp_path, PSILoRA(model, 0.1, step="gradient"), model)
    training.add_callback(CSVLog(tmp_path / "log.csv"))
    training.add_callback(PSILoRACallback(training, every=2))
    training.train()

    events = reader.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    written = {tag.rpartition("psilora/")[2]: tag for tag in events.Tags()["scalars"] if "psilora/" in tag}
    assert set(written) == FIGURES | COUNTS
    history = {name: [e for e in training.state.log_history if f"psilora/{name}" in e] for name in FIGURES}
    with (tmp_path / "log.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    for name in FIGURES:
        points = events.Scalars(written[name])
        assert [point.step for point in points] == [1, 3, 5]
        values = [entry[f"psilora/{name}"] for entry in history[name]]
        assert [point.value for point in points] == pytest.approx(values, rel=1e-6)
        own = [float(value) for _, key, value in rows if key == f"psilora/{name}"]
        assert own == pytest.approx(values)
    assert all(0 < e["psilora/projection_residual"] < 1 for e in history["projection_residual"])
    assert all(e["psilora/capture_bytes"] > 0 for e in history["capture_bytes"])


def test_the_callback_names_a_foreign_optimizer_and_a_bad_interval(tmp_path: Path) -> None:
    model = adapted()
    training = trainer(tmp_path, PlainState([p for p in model.parameters() if p.requires_grad]), model)
    training.args.report_to = []
    training.add_callback(PSILoRACallback(training))
    with pytest.raises(TypeError, match="PSILoRACallback needs a PSILoRA, but the trainer uses PlainState"):
        training.train()
    with pytest.raises(ValueError, match="Invalid every=0. Must be >= 1."):
        PSILoRACallback(training, every=0)
