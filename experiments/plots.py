"""Figures of the report."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.analysis import Setting, Summary
from experiments.methods import METHODS

PANEL_WIDTH, PANEL_HEIGHT = 4.6, 3.6


def figure(count: int) -> tuple[Any, list[Any]]:
    """A row-wise grid of axes, at most three wide."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(3, count)
    rows = -(-count // columns)
    fig, axes = plt.subplots(
        rows, columns, figsize=(PANEL_WIDTH * columns, PANEL_HEIGHT * rows), layout="constrained", squeeze=False
    )
    flat = list(axes.flat)
    for axis in flat[count:]:
        axis.set_visible(False)
    for axis in flat:
        axis.grid(color="#dddddd", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    return fig, flat[:count]


def save(fig: Any, path: Path) -> None:
    """Write a PNG and forget the figure."""
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def style(method: str) -> dict[str, Any]:
    """The same colour and line for a method in every figure; PSILoRA's own lines are thick."""
    import matplotlib

    names = list(METHODS)
    colour = matplotlib.colormaps["tab20"](names.index(method) % 20)
    ours = method.startswith(("psilora", "spectral", "oplora"))
    return {"color": colour, "linewidth": 2.4 if ours else 1.2, "linestyle": "-" if ours else "--", "marker": "."}


def legend(fig: Any, axes: Sequence[Any]) -> None:
    """One legend below all panels."""
    entries = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    fig.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)


def rates(found: Mapping[Setting, Sequence[Summary]], path: Path) -> None:
    """Validation loss against the rate relative to the chosen one; losses far above the best are cut."""
    fig, axes = figure(len(found))
    for axis, (setting, methods) in zip(axes, found.items(), strict=True):
        best = min((s.losses[s.lr] for s in methods if s.lr is not None), default=1.0)
        for s in methods:
            if s.lr is not None:
                lrs = [lr / s.lr for lr, loss in s.losses.items() if math.isfinite(loss)]
                losses = [loss for loss in s.losses.values() if math.isfinite(loss)]
                axis.plot(lrs, losses, label=METHODS[s.method].title, **style(s.method))
        axis.set_xscale("log", base=2)
        logarithmic(axis, best)
        axis.set(title=name(setting), xlabel="rate / chosen rate", ylabel="validation loss")
    legend(fig, axes)
    save(fig, path)


def logarithmic(axis: Any, best: float) -> None:
    """A logarithmic axis from just below the best: language models differ by percents, small classifiers by far."""
    axis.set_yscale("log")
    axis.set_ylim(0.97 * best, (1.4 if best > 1 else 12) * best)
    if best > 1:
        axis.yaxis.set_major_formatter("{x:.2f}")
        axis.yaxis.set_minor_formatter("{x:.2f}")


def curves(found: Mapping[Setting, Sequence[Summary]], path: Path) -> None:
    """Validation loss at the chosen rates against the step, mean over seeds."""
    fig, axes = figure(len(found))
    for axis, (setting, methods) in zip(axes, found.items(), strict=True):
        lowest = math.inf
        for s in methods:
            points: dict[int, list[float]] = {}
            for _, result in s.finished:
                for step, loss, _ in result.curve:
                    points.setdefault(step, []).append(loss)
            steps = sorted(points)
            means = [statistics.fmean(points[step]) for step in steps]
            if steps:
                lowest = min(lowest, *means)
                axis.plot(steps, means, label=METHODS[s.method].title, **style(s.method))
        if math.isfinite(lowest):
            logarithmic(axis, lowest)
        axis.set(title=name(setting), xlabel="step", ylabel="validation loss")
    legend(fig, axes)
    save(fig, path)


def linear(panels: Mapping[tuple[str, str], Mapping[str, Mapping[int, float]]], path: Path) -> None:
    """Median excess against the step or epoch, a panel per figure part."""
    fig, axes = figure(len(panels))
    for axis, ((panel, spectrum), lines) in zip(axes, panels.items(), strict=True):
        for label, line in lines.items():
            axis.plot(list(line), [max(value, 1e-16) for value in line.values()], label=label, linewidth=1.4)
        axis.set_yscale("log")
        axis.set_ylim(1e-12, 10)
        axis.set(title=f"{panel}, {spectrum}", xlabel="step" if panel == "full" else "epoch", ylabel="(f − f*) / f*")
        axis.legend(frameon=False, fontsize=7)
    save(fig, path)


def name(setting: Setting) -> str:
    """ "digits classes-lenet, r = 4"."""
    task, condition, rank = setting
    return f"{task} {condition}, r = {rank}"
