"""The pictures of the report as SVG text, one function each; None where the records lack what they show."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.candidate import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"LoRSum": "C0", "Rayleigh-Ritz": "C1", "torch.linalg.svd": "C3", "torch.svd_lowrank": "C2"}


def error_time(rows: Sequence[Row]) -> str | None:
    """Relative excess error against time, one curve per method and one panel per case."""
    shown = [row for row in rows if "excess" in row and "ms" in row]
    cases = list(dict.fromkeys(row["case"] for row in shown))
    if not cases:
        return None
    figure, panels = _figure(len(cases))
    for case, axes in zip(cases, panels, strict=False):
        curves: dict[str, list[Row]] = {}
        for row in shown:
            if row["case"] == case:
                suffix = " (triton)" if "triton" in row["method"] else ""
                curves.setdefault(row["method"].split(",")[0] + suffix, []).append(row)
        for name, points in curves.items():
            colour = next((c for prefix, c in COLOURS.items() if name.startswith(prefix)), None)
            excess = [max(p["excess"], 1e-9) for p in points]
            axes.plot([p["ms"] for p in points], excess, "o-", label=name, color=colour, ms=4)
        axes.set(xscale="log", yscale="log", title=case, xlabel="ms", ylabel="excess error over the optimum")
        axes.legend(fontsize=7)
    return _svg(figure)


def roofline(rows: Sequence[Row], machine: Row | None) -> str | None:
    """Achieved flops of the exact steps against their arithmetic intensity, under the machine's two roofs."""
    shown = [row for row in rows if row.get("flops") and "ms" in row]
    if machine is None or not shown:
        return None
    figure, (axes,) = _figure(1)
    peak, rate = machine["flops_per_second"] / 1e9, machine["bytes_per_second"] / 1e9
    intensity = [row["flops"] / row["bytes"] for row in shown]
    roof = sorted([*intensity, peak / rate, min(intensity) / 2, max(intensity) * 2])
    axes.plot(roof, [min(peak, rate * x) for x in roof], "k-", label="copy bandwidth, thin product")
    for i, row in enumerate(shown):
        label = f"{row['model']}: {row['kind']} ({row['backend']})"
        axes.plot(intensity[i], row["flops"] / row["ms"] / 1e6, "os^Dvp*h"[i % 8], label=label, ms=5)
    axes.set(xscale="log", yscale="log", xlabel="flops per byte", ylabel="GFLOP/s")
    axes.legend(fontsize=6)
    return _svg(figure)


def memory(rows: Sequence[Row]) -> str | None:
    """State and captured activations of the optimizers of the step suite, one panel per model."""
    shown = [row for row in rows if "state_bytes" in row and row.get("backend") != "triton"]
    shown = [row for row in shown if not row["method"].startswith("per-layer")]
    models = list(dict.fromkeys(row["model"] for row in shown))
    if not models:
        return None
    figure, panels = _figure(len(models))
    for model, axes in zip(models, panels, strict=False):
        mine = [row for row in shown if row["model"] == model][::-1]
        names = [row["method"].removesuffix(" (reference)") for row in mine]
        state = [row["state_bytes"] / 2**20 for row in mine]
        axes.barh(names, state, label="state")
        axes.barh(names, [row["capture_bytes"] / 2**20 for row in mine], left=state, label="captured X, S")
        axes.set(title=mine[0]["case"], xlabel="MiB")
        axes.tick_params(labelsize=7)
        axes.legend(fontsize=7)
    return _svg(figure)


def scaling(rows: Sequence[Row]) -> str | None:
    """Time against layers, tokens, rank and width, measured and predicted."""
    shown = [row for row in rows if "value" in row and "ms" in row]
    names = list(dict.fromkeys(row["axis"] for row in shown))
    if not names:
        return None
    figure, panels = _figure(len(names))
    for name, axes in zip(names, panels, strict=False):
        for i, kind in enumerate(dict.fromkeys(row["kind"] for row in shown)):
            mine = [row for row in shown if row["axis"] == name and row["kind"] == kind]
            x = [row["value"] for row in mine]
            axes.plot(x, [row["ms"] for row in mine], "o-", color=f"C{i}", label=kind, ms=4)
            axes.plot(x, [row["predicted_ms"] for row in mine], "--", color=f"C{i}", label=f"{kind}, predicted")
        axes.set(xscale="log", yscale="log", xlabel=name, ylabel="ms")
        axes.legend(fontsize=7)
    return _svg(figure)


def _figure(count: int) -> tuple[object, list[Axes]]:
    from matplotlib.figure import Figure

    across = min(2, count)
    down = -(-count // across)
    figure = Figure(figsize=(5.2 * across, 3.6 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten().tolist()
    for extra in panels[count:]:
        extra.remove()
    return figure, panels[:count]


def _svg(figure: object) -> str:
    from matplotlib import rc_context

    text = io.StringIO()
    with rc_context({"svg.hashsalt": "bench"}):
        figure.savefig(text, format="svg", metadata={"Date": None})  # type: ignore[attr-defined]
    return text.getvalue()
