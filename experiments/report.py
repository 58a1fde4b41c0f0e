"""The report of a folder of runs: tables and figures in Markdown, and the quality table of docs/results.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments import drift, plots, store, table1
from experiments.analysis import Setting, Summary, difference, median_of, settings, shared_rate, summaries
from experiments.linear import medians
from experiments.methods import METHODS

BEGIN, END = "<!-- quality:begin -->", "<!-- quality:end -->"
REFERENCE = "adamw"
RIVALS = (
    "adamw",
    "adamw-999",
    "nadam",
    "loraplus",
    "riemannian",
    "lora-rite",
    "lora-muon",
    "riemannion",
    "altlora",
    "altlora-plus",
    "loft",
    "lora-pro",
)
FULL_GRID = 5  # rates per method
OWN = ("psilora-tangent", "psilora-dense", "spectral")
Panels = dict[tuple[str, str], dict[str, dict[int, float]]]


def write(folder: Path) -> Path:
    """Write report.md and its figures into `folder`; return the report's path."""
    records = store.load(folder)
    found = {setting: summaries(records, setting) for setting in settings(records)}
    text = ["# Report", "", "Made by `python -m experiments report`; the protocol is in PROTOCOL.md.", ""]
    panels = linear_panels(folder)
    if panels:
        plots.linear(panels, folder / "plots" / "linear.png")
        text += ["## linear", "", *linear_tables(panels), "", *one_step_table(folder), ""]
        text += ["![linear task](plots/linear.png)", ""]
    if lines := drift.table(store.contents(folder)):
        text += [f"## Largest ratio of the factors' norms in {drift.STEPS:,} steps", "", *lines, ""]
    lines = table1.table(store.contents(folder))
    if lines:
        text += ["## OPLoRA's Table 1: test accuracy in per cent, means and deviations over seeds", "", *lines, ""]
    for task in sorted({setting[0] for setting in found}):
        own = {setting: methods for setting, methods in found.items() if setting[0] == task}
        plots.rates(own, folder / "plots" / f"{task}-rates.png")
        plots.curves(own, folder / "plots" / f"{task}-curves.png")
        text += [f"## {task}", ""]
        for setting, methods in own.items():
            text += [f"### {plots.name(setting)}", "", *method_table(methods), ""]
        text += [f"![rates](plots/{task}-rates.png)", "", f"![curves](plots/{task}-curves.png)", ""]
    if tuned := compared(found):
        text += ["## One rate for every task", "", *shared_rate_table(records, tuned), ""]
    path = folder / "report.md"
    path.write_text("\n".join(text), encoding="utf-8")
    return path


def method_table(methods: Sequence[Summary]) -> list[str]:
    """All methods of a setting, best first."""
    reference = next((s for s in methods if s.method == REFERENCE), None)
    lines = [
        "| method | lr | rates tried | validation | test loss | seeds | minus AdamW | score | within 1 % | within 2 % "
        "| optimizer ms | state kB | in AdamW's time |",
        "|" + "---|" * 13,
    ]
    for s in methods:
        title = METHODS[s.method].title
        if s.lr is None:
            lines.append(f"| {title} | – | {len(s.losses)} | not finite |" + " |" * 9)
            continue
        against = None if reference is None or s is reference else difference(s, reference)
        cells = [
            title,
            f"{s.lr:g}" + (" (edge)" if s.at_edge else ""),
            str(len(s.losses)),
            f"{s.losses[s.lr]:.4f}",
            "not finite" if s.test is None else s.test.text(),
            str(len(s.per_seed)),
            ""
            if against is None
            else f"{against.mean:+.4f}" + ("" if against.half is None else f" ± {against.half:.4f}"),
            "" if s.score is None else s.score.text(3),
            f"{s.width(0.01):g}×",
            f"{s.width(0.02):g}×",
            f"{median_of(s.finished, 'optimizer_ms'):.2f} of {median_of(s.finished, 'step_ms'):.2f}",
            f"{median_of(s.finished, 'state_bytes') / 1e3:.1f}",
            "" if s.equal_time is None else s.equal_time.text(),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def compared(found: Mapping[Setting, Sequence[Summary]]) -> dict[Setting, Sequence[Summary]]:
    """The settings that the reference was run in."""
    return {setting: methods for setting, methods in found.items() if any(s.method == REFERENCE for s in methods)}


def shared_rate_table(records: Sequence[store.Record], found: Mapping[Setting, Sequence[Summary]]) -> list[str]:
    """For each method run in every setting, the one rate with the smallest worst excess over the tuned best."""
    records = [record for record in records if (record[0].task, record[0].condition, record[0].rank) in found]
    everywhere = set.intersection(*({s.method for s in methods} for methods in found.values()))
    lines = ["| method | lr | worst excess | in |", "|---|---|---|---|"]
    rows = []
    for method in everywhere:
        shared = shared_rate(records, method)
        if shared is not None:
            rate, excess = shared
            worst = max(excess, key=lambda setting: excess[setting])
            rows.append(
                (excess[worst], f"| {METHODS[method].title} | {rate:g} | {excess[worst]:.1%} | {plots.name(worst)} |")
            )
    return lines + [line for _, line in sorted(rows)]


def linear_panels(folder: Path) -> Panels:
    """{(panel, spectrum): {method: {step or epoch: median excess over seeds}}}."""
    curves: dict[tuple[str, str], dict[str, list[dict[str, float]]]] = {}
    for content in store.contents(folder):
        if "linear" in content:
            label = content["linear"]
            by_method = curves.setdefault((label["panel"], label["spectrum"]), {})
            by_method.setdefault(label["name"], []).append(content["excess"])
    return {key: {name: medians(each) for name, each in by_method.items()} for key, by_method in curves.items()}


def linear_tables(panels: Panels) -> list[str]:
    """The excess after 1, 10 and 100 steps, or 5, 20 and 100 epochs, and the steps to 1e-4 and 1e-6."""
    lines = []
    for (panel, spectrum), methods in panels.items():
        marks, unit = ((1, 10, 100), "step") if panel == "full" else ((5, 20, 100), "epoch")
        lines += [f"{panel}, {spectrum}: median excess", ""]
        lines += [f"| method | {' | '.join(f'{unit} {m}' for m in marks)} | {unit}s to 1e-4 | to 1e-6 |"]
        lines += ["|---|---|---|---|---|---|"]
        for name, line in methods.items():
            values = [f"{line[m]:.1e}" if m in line else "–" for m in marks]
            firsts = [str(next((m for m, value in line.items() if value < goal), "–")) for goal in (1e-4, 1e-6)]
            lines.append(f"| {' | '.join([name, *values, *firsts])} |")
        lines.append("")
    return lines


def one_step_table(folder: Path) -> list[str]:
    """The excess of one projection after equal numbers of products with the target, per solver."""
    values: dict[tuple[str, str, int], list[dict[str, float]]] = {}
    for content in store.contents(folder):
        if "one_step" in content:
            for solver, line in content["excess"].items():
                key = (content["one_step"]["spectrum"], solver, 0)
                values.setdefault(key, []).append(line)
    if not values:
        return []
    rows = {key: medians(lines) for key, lines in values.items()}
    products = sorted(next(iter(rows.values())))
    lines = ["One projection: median excess after so many products with W", ""]
    lines += [f"| spectrum | solver | {' | '.join(map(str, products))} |", "|---|---|" + "---|" * len(products)]
    for (spectrum, solver, _), line in rows.items():
        lines.append(f"| {spectrum} | {solver} | {' | '.join(f'{line[p]:.1e}' for p in products)} |")
    return lines


def quality_table(folder: Path) -> list[str]:
    """Test losses at the tuned rates, a row per setting with AdamW: its loss, the best rival's, and PSILoRA's."""
    records = store.load(folder)
    every = compared({setting: summaries(records, setting) for setting in settings(records)})
    found = {setting: {s.method: s for s in methods} for setting, methods in every.items()}
    present = {method for methods in found.values() for method in methods}
    own = [method for method in OWN if method in present]
    titles = ["AdamW", "best other rival", *(METHODS[method].title for method in own)]
    lines = [f"| task, test loss | {' | '.join(titles)} |", "|" + "---|" * (len(titles) + 1)]
    for setting, methods in found.items():
        if own and not set(own).intersection(methods):
            continue
        rivals = [methods[m] for m in RIVALS if m in methods and m != REFERENCE and methods[m].test is not None]
        best = min(rivals, key=lambda s: s.test.mean if s.test else 0.0) if rivals else None
        cells = [cell(methods.get(REFERENCE)), cell(best, named=True), *(cell(methods.get(m)) for m in own)]
        lines.append(f"| {plots.name(setting)} | {' | '.join(cells)} |")
    note = (
        "Mean test loss at the rate with the lowest validation loss, ± its 95 % interval over seeds (none: one seed). "
        f'Where fewer than {FULL_GRID} rates were run, "tried" says how many: that comparison is not a tuned one.'
    )
    return [*lines, "", note]


def cell(s: Summary | None, named: bool = False) -> str:
    """ "1.234 ± 0.012 (lr 0.1)", with the number of rates tried where it is below the protocol's."""
    if s is None or s.test is None:
        return "–"
    name = f"{METHODS[s.method].title}: " if named else ""
    tried = "" if len(s.losses) >= FULL_GRID else f", {len(s.losses)} tried"
    return f"{name}{s.test.text(3)} (lr {s.lr:g}{tried})"


def insert_quality(folder: Path, target: Path) -> None:
    """Replace what stands between the two markers in `target` by the quality table; raise if they are not there."""
    text = target.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"error: {target} must hold {BEGIN} and {END} once each")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    table = "\n".join(quality_table(folder))
    target.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")
