"""What the fine-tuning demo reports: a record per method, the table, the learning curves, metrics.json."""

from __future__ import annotations

import importlib
import json
import platform
import shlex
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from docstrings import TextData


@dataclass(frozen=True)
class Method:
    """One way to train the adapter: its name in the table, its default rate and the rates that were tried."""

    title: str
    lr: float
    tried: tuple[float, ...]
    color: str
    marker: str


METHODS = {
    "adamw": Method("AdamW", 1e-2, (1e-3, 3e-3, 5e-3, 1e-2, 1.5e-2, 2e-2), "#777777", "s"),
    "psilora": Method("PSILoRA", 0.1, (0.1,), "#D55E00", "^"),
    "psilora-gradient": Method("PSILoRA gradient", 0.03, (0.01, 0.03, 0.3), "#0072B2", "o"),
}


@dataclass
class Run:
    """What one method did: its curve, its costs, its result before and after reloading the saved adapter."""

    method: str
    lr: float
    curve: list[dict[str, float]] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    accuracy: float = 0.0
    loss: float = 0.0
    ms_per_step: float = 0.0
    optimizer_ms: float = 0.0
    state_bytes: int = 0
    capture_bytes: int = 0
    adapter: str = ""
    reloaded_accuracy: float = 0.0
    reloaded_loss: float = 0.0


def table(runs: list[Run]) -> str:
    """The results as aligned text, one line per method."""
    header = [
        "method",
        "lr",
        "val acc",
        "val loss",
        "ms/step",
        "optimizer",
        "state MB",
        "captured MB",
        "reloaded acc",
    ]
    rows = [header]
    for run in runs:
        share = 100 * run.optimizer_ms / run.ms_per_step
        rows.append(
            [METHODS[run.method].title, f"{run.lr:g}", f"{run.accuracy:.4f}", f"{run.loss:.4f}"]
            + [
                f"{run.ms_per_step:.1f}",
                f"{run.optimizer_ms:.1f} ms ({share:.1f} %)",
                f"{run.state_bytes / 1e6:.2f}",
            ]
            + [f"{run.capture_bytes / 1e6:.1f}", f"{run.reloaded_accuracy:.4f}"]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    formats = [f"{{:{'<' if i == 0 else '>'}{width}}}" for i, width in enumerate(widths)]
    lines = ["  ".join(formats).format(*row) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def tuning_note(runs: list[Run], default_data: bool) -> str:
    """Where the learning rates come from and what that means for the numbers in the table."""
    tried = {run.method: METHODS[run.method].tried for run in runs if run.lr == METHODS[run.method].lr}
    if not tried:
        return "The learning rate was given on the command line."
    grids = "; ".join(f"{METHODS[name].title} {', '.join(f'{lr:g}' for lr in rates)}" for name, rates in tried.items())
    where = (
        "this validation split, so the table is slightly optimistic for every method"
        if default_data
        else ("the docstring task: choose them again for your data")
    )
    return (
        f"The default rates have the lowest loss of those tried ({grids}), chosen on {where}; for the gradient "
        "step a dozen other settings (momentum, prox, warm-up) were tried as well and the momentum left off, for the "
        "default its controller and two simpler forms."
    )


def plot(runs: list[Run], title: str, path: Path) -> None:
    """Draw validation loss and accuracy against the step, one line per method, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for axis, key, label in zip(axes, ("loss", "accuracy"), ("cross-entropy (nats)", "accuracy (%)"), strict=True):
        for run in runs:
            method = METHODS[run.method]
            steps = [point["step"] for point in run.curve]
            values = [point[key] * (100 if key == "accuracy" else 1) for point in run.curve]
            final = f"{values[-1]:.1f} %" if key == "accuracy" else f"{values[-1]:.3f}"
            style = {"color": method.color, "marker": method.marker, "linewidth": 2, "markersize": 6}
            axis.plot(steps, values, label=f"{method.title}, lr {run.lr:g}: {final}", **style)
        axis.set(xlabel="optimizer step", ylabel=f"validation {label}")
        axis.grid(color="#dddddd", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, title="method, rate: final value", alignment="left")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_metrics(runs: list[Run], data: TextData, settings: dict[str, Any], seconds: float, path: Path) -> None:
    """Write settings, versions, data sizes and all curves and costs as JSON."""
    packages = ("torch", "transformers", "peft", "psilora")
    on_gpu = torch.device(settings["device"]).type == "cuda"
    metrics = {
        "command": shlex.join(["python", *sys.argv]),
        "settings": {**settings, "model": _without_prefix(settings["model"])},
        "versions": {
            "python": platform.python_version(),
            **{name: getattr(importlib.import_module(name), "__version__", "unknown") for name in packages},
        },
        "machine": {
            "platform": f"{platform.system()} {platform.machine()}",
            "device": torch.cuda.get_device_name(settings["device"]) if on_gpu else "cpu",
            "threads": torch.get_num_threads(),
        },
        "data": {
            "name": data.name,
            "label_names": data.label_names,
            "train": len(data.train_texts),
            "validation": len(data.validation_texts),
            "digest": data.digest(),
        },
        "seconds": round(seconds, 1),
        "runs": [asdict(run) for run in runs],
    }
    path.write_text(json.dumps(metrics, indent=1), encoding="utf-8")


def _without_prefix(model: str) -> str:
    """A checkpoint inside an installed package, named from the package on: the rest is this machine's."""
    return model.rpartition("site-packages/")[2]
