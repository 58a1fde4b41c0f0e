"""The support table is that of the committed runs, in which nothing failed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from scripts import ROOT, load

MATRIX = load("matrix")
RECORDS = json.loads(MATRIX.RECORDS.read_text())
GATES = json.loads(MATRIX.GATES.read_text())


def between(path: Path, name: str = "support") -> list[str]:
    begin, end = MATRIX.markers(name)
    return path.read_text().partition(f"{begin}\n")[2].partition(f"\n{end}")[0].splitlines()


def test_the_committed_tables_are_those_of_the_committed_runs() -> None:
    assert {"oldest", "newest"} <= set(RECORDS)
    assert all(not record["failed"] and record["passed"] > 50 for record in RECORDS.values())
    assert between(ROOT / "README.md") == MATRIX.table(RECORDS, details=False)
    assert between(ROOT / "docs" / "compatibility.md") == MATRIX.table(RECORDS)
    assert between(ROOT / "README.md", "triton") == MATRIX.tritons()
    assert between(ROOT / "docs" / "compatibility.md", "triton") == MATRIX.gates(GATES)


def test_what_the_gates_found_is_told_for_every_torch() -> None:
    problems = {"a": "does not compile: CompilationError: at 1:2", "b": "spills: 8 bytes of stack, 0 of local memory"}
    problems |= {"c": f"{problems['b']}; 200 registers; its budget is 168", "d": "200 registers; its budget is 168"}
    records = {"3.4.0": {"targets": [90], "compiled": 9, "problems": problems}}
    records["3.8.1"] = {"targets": [80, 90], "compiled": 4, "problems": {}}
    found = {line.split(" | ")[0].strip("| "): line.rstrip("| ").split(" | ")[-1] for line in MATRIX.gates(records)}
    assert found["2.8"] == "3.4.0, sm_90: 9 kernels, 2 spill, 1 not compiled, 1 above a limit"
    assert found["2.14"] == "3.8.1, sm_80 sm_90: 4 kernels, all hold" and found["2.6"] == "not run"
    assert MATRIX.tritons()[-1] == "| 2.6 | 3.2 | none |"


def test_the_extras_ask_for_what_was_run() -> None:
    (line,) = (line for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("hf = "))
    for package in ("transformers", "peft", "accelerate"):
        floor = line.partition(f'"{package}>=')[2].partition('"')[0]
        assert RECORDS["oldest"]["versions"][package].startswith(f"{floor}.")


def test_outcomes_are_counted_and_told(tmp_path: Path) -> None:
    seen = MATRIX.Outcomes()
    for when, outcome, why in (
        ("setup", "passed", None),
        ("call", "passed", None),
        ("setup", "skipped", ("t.py", 1, "Skipped: needs a CUDA device")),
        ("call", "failed", None),
    ):
        kinds = {kind: kind == outcome for kind in ("passed", "failed", "skipped")}
        seen.pytest_runtest_logreport(SimpleNamespace(when=when, nodeid="t.py::f", longrepr=why, **kinds))
    assert (seen.passed, seen.failed, seen.skipped) == (1, ["t.py::f"], {"needs a CUDA device": 1})
    versions = {"torch": "2.9.1+cpu", "transformers": "4.50.0", "peft": "0.17.1", "accelerate": "1.2.0"}
    record = {"date": "2026-01-02", "python": "3.12.1", "versions": versions}
    record |= {"passed": 1, "failed": seen.failed, "skipped": seen.skipped}
    newer = {**record, "versions": {**versions, "transformers": "4.51.0"}, "failed": []}
    lines = MATRIX.table({"a": record, "b": newer})
    assert lines[2] == "| 2.9.1 | 4.51.0 | 0.17.1 | 1.2.0 | 3.12.1 | 1 passed | 2026-01-02 |"
    assert "1 passed, **1 failed**" in lines[3]
    assert lines[-2:] == [f"- torch 2.9.1 with transformers 4.5{i}.0: needs a CUDA device" for i in (1, 0)]
    page = tmp_path / "page.md"
    begin, end = MATRIX.markers("support")
    page.write_text(f"a\n{begin}\nold\n{end}\nb\n")
    MATRIX.embed(MATRIX.table({"a": record}), page)
    assert between(page) == MATRIX.table({"a": record}) and page.read_text().endswith("\nb\n")
    page.write_text("nothing")
    with pytest.raises(ValueError, match="once each"):
        MATRIX.embed([], page)
