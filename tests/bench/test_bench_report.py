"""The report shows what was measured and nothing else; the comparison tells a change from noise."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="the report's plots need matplotlib")
ROOT = Path(__file__).parents[2]
LOOP, MINE = "per-layer loop, exact, momentum", "PSILoRA exact, momentum (reference)"


pytestmark = pytest.mark.usefixtures("checkout_on_path")


def module(name: str) -> ModuleType:
    return importlib.import_module(f"bench.{name}")


def row(method: str, ms: float | None, **more: Any) -> dict[str, Any]:
    timed = {} if ms is None else {"ms": ms, "ms_20": 0.95 * ms, "ms_80": 1.05 * ms, "readings": [ms]}
    return {"case": "minilm, r 8, 1024 tokens", "method": method, "error": 1e-4, **timed, **more}


def step_rows(mine: float | None = 10.0) -> list[dict[str, Any]]:
    facts = {"model": "minilm", "kind": "exact, momentum", "capture_bytes": 2**20, "state_bytes": 2**19}
    red = {"red": "relative error 2.0e-01 > 1e-02: not timed"} if mine is None else {}
    exact = {"backend": "reference", "bytes": 10**6, "flops": 10**7, **facts, **red}
    return [row(MINE, mine, **exact), row(LOOP, 20.0, **facts)]


def write(folder: Path, suite: str, rows: list[dict[str, Any]], **more: Any) -> Path:
    return module("results").save(folder, suite, rows, command=f"python -m bench {suite}", **more)


def full_folder(folder: Path) -> Path:
    write(folder, "step", step_rows())
    lorsum = {"case": "Gaussian, 768 x 768", "d_out": 768, "d_in": 768, "target": "Gaussian", "excess": 1e-2}
    write(folder, "lorsum", [row("LoRSum, K=2 (reference)", 1.0, **lorsum), row("torch.linalg.svd", 50.0, **lorsum)])
    machine = {"case": "machine", "method": "constants", "flops_per_second": 1e10, "bytes_per_second": 1e10}
    points = [row("PSILoRA", v, axis="layers", value=v, kind="exact", predicted_ms=v) for v in (1, 10)]
    write(folder, "scaling", [machine, *points])
    return folder


def main(*arguments: str | Path) -> int:
    return module("__main__").main([str(a) for a in arguments])


def test_the_page_holds_all_of_it_and_refers_to_nothing(tmp_path: Path) -> None:
    assert main("report", full_folder(tmp_path)) == 0
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 4
    assert "http" not in page.replace("http-equiv", "") and "<script" not in page
    assert LOOP in page and "python -m bench lorsum" in page


def test_the_readme_gets_the_tables_between_its_markers(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nafter\n")
    folder = full_folder(tmp_path / "results")
    for _ in range(2):  # a second run replaces the first
        assert main("report", folder, "--readme", readme) == 0
    text = readme.read_text()
    assert text.startswith("before\n<!-- bench:begin -->\n") and text.endswith("<!-- bench:end -->\nafter\n")
    assert "old" not in text and text.count("| PSILoRA exact, momentum | 10 |") == 1


@pytest.mark.parametrize("text", ["no markers", "<!-- bench:end --><!-- bench:begin -->"])
def test_a_readme_without_markers_is_left_alone(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text)
    assert main("report", full_folder(tmp_path / "results"), "--readme", readme) == 2
    assert readme.read_text() == text and "bench:begin" in capsys.readouterr().err


def verdict(folder: Path, what: str) -> dict[str, str]:
    found = module("targets").verdicts(module("results").load_folder(folder))
    return next(v for v in found if what in v["what"])


def test_goals_are_met_missed_or_not_measurable(tmp_path: Path) -> None:
    full_folder(tmp_path)
    met = verdict(tmp_path, "per-layer loop, minilm")
    assert (met["figure"], met["status"]) == ("2×", "met")
    assert verdict(tmp_path, "svd, 768²")["status"] == "met"
    assert verdict(tmp_path, "foreach AdamW, minilm")["status"] == "not measured"
    assert verdict(tmp_path, "xv over")["status"].startswith("not measurable")
    write(tmp_path, "step", step_rows(mine=15.0))
    missed = verdict(tmp_path, "per-layer loop, minilm")
    assert missed["figure"] == "1.33×" and missed["status"].startswith("not met")


def test_a_red_check_leaves_no_figure_anywhere(tmp_path: Path) -> None:
    full_folder(tmp_path)
    write(tmp_path, "step", step_rows(mine=None))
    assert verdict(tmp_path, "per-layer loop, minilm")["figure"] == "–"
    records = module("results").load_folder(tmp_path)
    assert "| PSILoRA exact, momentum | – |" in module("report").markdown(records, "results")
    assert "not timed" in module("report").page(records)


def test_gpu_goals_are_judged_by_gpu_records_only(tmp_path: Path) -> None:
    products = [row("xv", 1.0, model="llama-3-8b", of_floor=0.9), row("stz", 1.0, model="llama-3-8b", of_floor=0.8)]
    write(tmp_path, "products", products, device="NVIDIA H200")
    write(tmp_path, "step", step_rows(), device="NVIDIA H200")
    assert verdict(tmp_path, "xv over")["status"] == "met"
    assert verdict(tmp_path, "stz over")["status"].startswith("not met")
    assert verdict(tmp_path, "per-layer loop, minilm")["status"] == "not measured"


def test_compare_flags_a_change_and_not_the_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = write(tmp_path / "a", "step", [row("same", 10.0), row("slower", 10.0), row("faster", 10.0)])
    noisy = {**row("slower", 10.6), "ms_20": 9.0, "ms_80": 12.0}
    after = write(tmp_path / "b", "step", [row("same", 10.5), noisy, row("faster", 10.0)])
    assert main("compare", before, after) == 0
    assert "0 worse, 0 better" in capsys.readouterr().out
    after = write(tmp_path / "b", "step", [row("same", 10.0), row("slower", 13.0), row("faster", 5.0)])
    assert main("compare", before, after) == 1
    out = capsys.readouterr().out
    assert "WORSE  minilm, r 8, 1024 tokens: slower: 10.000 ms -> 13.000 ms (1.30x)" in out
    assert "1 worse, 1 better" in out and "same" not in out


def test_compare_flags_a_figure_that_is_gone(tmp_path: Path) -> None:
    before = write(tmp_path / "a", "step", [row("a", 10.0)])
    after = write(tmp_path / "b", "step", [row("a", None, red="not timed")])
    assert main("compare", before, after) == 1
    assert main("compare", after, before) == 0


def test_compare_refuses_other_suites_and_devices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = write(tmp_path / "a", "step", [row("a", 10.0)])
    assert main("compare", before, write(tmp_path / "b", "solve", [row("a", 10.0)])) == 2
    assert "differ in suite: 'step' and 'solve'" in capsys.readouterr().err
    assert main("compare", before, write(tmp_path / "c", "step", [row("a", 10.0)], device="other")) == 2
    assert json.loads(before.read_text())["rows"]
