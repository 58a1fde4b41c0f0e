"""One self-contained page of a folder of results, and the tables that docs/benchmarks.md embeds."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import plots, results
from bench.candidate import Row
from bench.targets import Records, rows_of, verdicts

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
COLUMNS = {
    "case": "case", "method": "method", "ms": "ms", "ms_20": "20 %", "ms_80": "80 %", "cpu_ms": "CPU ms",
    "error": "check", "excess": "excess error", "tokens_per_second": "tokens/s",
    "of_floor": "of floor", "bytes": "bytes", "peak_bytes": "peak", "state_bytes": "state",
    "capture_bytes": "captured", "operations": "operations",
    "aten_launches": "PyTorch launches", "triton_launches": "Triton launches", "host_ratio": "host / fused AdamW",
    "workspace_bytes": "workspace", "workspace_ratio": "workspace / state",
    "planned_launches": "launches planned", "kernels": "kernels", "predicted_ms": "predicted ms",
    "exponent": "exponent", "predicted_exponent": "predicted exponent", "not_captured": "no CUDA graph",
}  # fmt: skip
STEP_METHODS = (
    "AdamW, fused", "AdamW, foreach", "Riemannian AdamW (PEFT)", "LoRA-RITE (pytorch_optimizer)", "PSILoRA tangent",
    "PSILoRA tangent, momentum", "PSILoRA spectral", "PSILoRA exact", "PSILoRA exact, momentum",
    "PSILoRA exact, momentum, K=2", "PSILoRA exact, momentum, kfac", "per-layer loop, exact, momentum",
)  # fmt: skip
#: What a suite's figures are, where that is not the legend's.
NOTES = {
    "host": "Counts, not times of a device: operations of PyTorch and Triton that a step launches, and the bytes its "
    "kernels hold at the true widths. Its ms are of the host alone, on layers of a few columns with kernels that do "
    "nothing; what counts is their ratio to fused AdamW's in the same run.",
}
STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;font-size:13px}"
    "td,th{border-bottom:1px solid #ccc;padding:.2em .6em;text-align:left}"
    "td.n{text-align:right;font-variant-numeric:tabular-nums}.red{color:#b00}img{max-width:100%}"
)
LEGEND = (
    "ms: median, with its 20 and 80 % quantiles, of runs in alternation. check: relative error of the result that was "
    "checked before the timing; a red one has no time. of floor: the bytes that must move, at the rate of a copy "
    "beyond the caches, over the time; work that fits the caches can be above 1. predicted: bench/suites/scaling.py. "
    "no CUDA graph: why a call was timed by itself, with the time that its launches take on the host."
)


def write(folder: Path) -> Path:
    """Write DIR/report.html and return its path.

    Raises:
        FileNotFoundError: The folder holds no results.
    """
    records = _records(folder)
    path = folder / "report.html"
    path.write_text(page(records))
    return path


def embed(folder: Path, readme: Path) -> None:
    """Replace what stands between the markers of a Markdown file by the tables of a folder.

    Raises:
        ValueError: The file lacks the markers.
    """
    text = readme.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{readme} must hold the lines {BEGIN} and {END} once each, in this order")
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    readme.write_text(f"{head}{BEGIN}\n{markdown(_records(folder), folder.as_posix())}{END}{tail}")


def _records(folder: Path) -> dict[str, dict[str, Any]]:
    records = results.load_folder(folder)
    if not records:
        raise FileNotFoundError(f"{folder} holds no results of `python -m bench`")
    return records


def markdown(records: Records, folder: str) -> str:
    """Return the document's tables: the step, training, and the goals."""
    parts = [_step_table(rows_of(records, "step")), _train_table(rows_of(records, "train"))]
    parts.append(_host_table(rows_of(records, "host")))
    goals = verdicts(records)
    judged = [list(row.values()) for row in goals if row["figure"] != "–"]
    parts.append(_markdown_table(["where", "goal", "bound", "measured", ""], judged))
    if len(judged) < len(goals):
        parts.append(
            f"{len(goals) - len(judged)} goals have no figure, those for an H200 because none could be had: "
            f"`{folder}/report.html` lists them."
        )
    record = records.get("step", next(iter(records.values())))
    source = (
        f"Medians of runs in alternation, on {record['device']}, {record['threads']} threads, torch "
        f"{record['versions']['torch']}, commit {record['commit']}; every method's result is checked before it is "
        f"timed. Readings, quantiles and commands: `{folder}/`, all of it in `{folder}/report.html`."
    )
    return "\n\n".join([*filter(None, parts), source]) + "\n"


def _step_table(rows: Sequence[Row]) -> str:
    models = list(dict.fromkeys(row["model"] for row in rows))
    if not models:
        return ""
    backend = "triton" if any(row.get("backend") == "triton" for row in rows) else "reference"
    lines = []
    for name in STEP_METHODS:
        found = {row["model"]: row for row in rows if row["method"] in (name, f"{name} ({backend})")}
        if found:
            first = found[models[-1]]
            lines.append(
                [name]
                + [_cell(found[model].get("ms")) for model in models]
                + [_mebi(first["state_bytes"]), _mebi(first["capture_bytes"])]
            )
    cases = {model: next(row["case"] for row in rows if row["model"] == model) for model in models}
    head = ["optimizer step, ms", *cases.values(), f"state, {models[-1]}", "captured X, S"]
    return _markdown_table(head, lines)


def _train_table(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    lines = [
        [row["method"], _cell(row.get("ms")), _cell(row.get("tokens_per_second")), _mebi(row["peak_bytes"])]
        for row in rows
    ]
    return (
        _markdown_table([f"training step: {rows[0]['case']}", "ms", "tokens/s", "peak memory"], lines) if rows else ""
    )


def _host_table(rows: Sequence[Row]) -> str:
    """Counts of a step on the kernels, one line per setting of the first model."""
    lines = [
        [
            row["method"],
            _cell(row["aten_launches"]),
            _cell(row["triton_launches"]),
            f"{row['host_ratio']:.1f}×",
            f"{row['workspace_ratio']:.2f}×",
        ]
        for row in rows
        if row["case"] == rows[0]["case"]
    ]
    if not lines:
        return ""
    head = [f"counts: {rows[0]['case']}, {rows[0]['layers']} layers", "PyTorch launches", "Triton launches"]
    return _markdown_table([*head, "host time / fused AdamW", "workspace / state"], lines)


def _markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [list(head), ["---"] * len(head), *map(list, lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def page(records: Records) -> str:
    """Return the page as HTML without any reference to another file."""
    machine = next((row for row in rows_of(records, "scaling") if row["case"] == "machine"), None)
    pictures = {
        "Error against time": plots.error_time(rows_of(records, "lorsum")),
        "Roofline of the exact steps": plots.roofline(rows_of(records, "step"), machine),
        "Memory of the optimizers": plots.memory(rows_of(records, "step")),
        "Scaling of the step": plots.scaling(rows_of(records, "scaling")),
    }
    parts = ["<h1>psilora: benchmarks</h1>", f"<p>{LEGEND}</p>", "<h2>Goals</h2>", _html_table(verdicts(records))]
    for title, svg in pictures.items():
        if svg is not None:
            data = base64.b64encode(svg.encode()).decode()
            parts.append(f'<h2>{title}</h2><img alt="{title}" src="data:image/svg+xml;base64,{data}">')
    for suite, record in records.items():
        about = ", ".join(f"{key} {record[key]}" for key in ("device", "threads", "commit", "load_average"))
        versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        parts.append(f"<h2>{suite}</h2><p><code>{html.escape(record['command'])}</code><br>")
        parts.append(f"{html.escape(about)}<br>{html.escape(versions)}</p>")
        if suite in NOTES:
            parts.append(f"<p>{NOTES[suite]}</p>")
        parts.append(_html_table([{k: row.get(k) for k in COLUMNS} | _red(row) for row in record["rows"]]))
    head = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>psilora: benchmarks</title><style>{STYLE}</style>'
    )
    return head + "\n".join(parts) + "</html>\n"


def _red(row: Row) -> Row:
    return {"ms": row["red"]} if "red" in row else {}


def _html_table(rows: Sequence[Row]) -> str:
    keys = [key for key in (rows[0] if rows else {}) if any(row.get(key) is not None for row in rows)]
    head = "".join(f"<th>{html.escape(COLUMNS.get(key, key))}</th>" for key in keys)
    return f"<table><tr>{head}</tr>" + "".join(map(lambda row: _html_row(row, keys), rows)) + "</table>"


def _html_row(row: Row, keys: Sequence[str]) -> str:
    cells = []
    for key in keys:
        shown = row.get(key)
        number = isinstance(shown, (int, float))
        text = _mebi(shown) if number and key.endswith("bytes") else _cell(shown)
        kind = ' class="n"' if number else ' class="red"' if "not timed" in text else ""
        cells.append(f"<td{kind}>{html.escape(text)}</td>")
    return f"<tr>{''.join(cells)}</tr>"


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _mebi(size: object) -> str:
    return f"{size / 2**20:.2f} MiB" if isinstance(size, (int, float)) else "–"
