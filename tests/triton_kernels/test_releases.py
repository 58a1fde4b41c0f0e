"""Which Triton compiles what and comes with which torch: the table, its guard, and the records of the gates."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from psilora.triton_kernels import releases

ROOT = Path(__file__).parents[2]
GATES = json.loads((ROOT / "docs" / "gates.json").read_text())


def guard(monkeypatch: pytest.MonkeyPatch, version: str) -> ModuleType:
    """`_compat` as it is imported beside a Triton of that version."""
    fake, language = ModuleType("triton"), ModuleType("triton.language")
    fake.__version__, fake.language, language.constexpr = version, language, lambda value: value  # type: ignore
    monkeypatch.setitem(sys.modules, "triton", fake)
    monkeypatch.setitem(sys.modules, "triton.language", language)
    spec = importlib.util.spec_from_file_location("guard", ROOT / "triton_kernels" / "_compat.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("version", "double", "steps"),
    [
        ("3.2.0", None, "none"),
        ("3.3.1", False, "gradient steps and the default's spectral step"),
        ("3.4.0", False, "gradient steps and the default's spectral step"),
        ("3.5.0", True, "all"),
        ("3.10.0+git1a2b", True, "all"),
        ("4.0rc1", True, "all"),
    ],
)
def test_a_triton_is_taken_for_what_it_compiles(
    version: str, double: bool | None, steps: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = guard(monkeypatch, version)
    assert releases.runs(releases.release(version)) == steps
    assert found.available() is (double is not None)
    if double is None:
        said = "Triton 3.2.0 is too old: 3.3 or newer is needed, which torch 2.7 brings"
        assert found.unavailable_reason() == said
        with pytest.raises(ImportError, match=re.escape(said)):
            found.DOUBLE_PRODUCTS  # noqa: B018
    else:
        assert found.DOUBLE_PRODUCTS is double


def test_the_table_is_in_order_and_is_told_in_spans() -> None:
    assert list(releases.BROUGHT) == sorted(releases.BROUGHT)
    assert list(releases.BROUGHT.values()) == sorted(releases.BROUGHT.values())
    assert releases.table()[0] == ("2.6", "3.2", "none") and ("2.10", "3.6", "all") in releases.table()
    assert [row[0] for row in releases.spans()][:2] == ["2.6", "2.7 to 2.8"]
    assert {steps for *_, steps in releases.spans()} == {steps for *_, steps in releases.table()}


def test_this_torch_asks_for_the_triton_of_the_table() -> None:
    asked = [line for line in importlib.metadata.requires("torch") or () if re.match(r"triton\b", line)]
    if not asked:
        pytest.skip("this torch asks for no Triton")
    torch = releases.release(importlib.metadata.version("torch"))
    found = {releases.release(version) for line in asked for version in re.findall(r"[=~]=\s*([\d.]+)", line)}
    assert releases.BROUGHT.get(torch, *found) in found


@pytest.mark.parametrize("version", GATES)
def test_the_gates_found_what_the_table_says(version: str) -> None:
    """Nothing but the kernels of spectral steps that differ from the default's is refused, and that below 3.5."""
    record = GATES[version]
    refused = {name for name, problem in record["problems"].items() if problem.startswith("does not compile")}
    assert record["compiled"] > 30 and 90 in record["targets"]
    if releases.release(version) >= releases.DOUBLE_PRODUCTS:
        assert not refused
    else:
        assert refused and all(name.startswith(("span_", "moments_")) for name in refused)


def test_the_gates_were_run_with_the_oldest_triton_and_every_later_one_that_a_torch_brings() -> None:
    brought = {triton for triton in releases.BROUGHT.values() if triton >= releases.OLDEST}
    assert brought <= {releases.release(version) for version in GATES}
