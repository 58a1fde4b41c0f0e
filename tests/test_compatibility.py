"""docs/compatibility.md lists exactly the scenario tests that there are."""

from __future__ import annotations

import re
from types import SimpleNamespace

from scripts import load

SCRIPT = load("compatibility")


def listed(text: str) -> list[str]:
    """The rows of a table without the cells that depend on the machine."""
    found = []
    for line in text.splitlines():
        if re.match(r"\| (\d+|–) \| ", line) and line.count(" | ") == 6 and "::" in line:
            number, framework, _, gradient, tested, _, test = line.strip("| ").split(" | ")
            found.append(f"| {number} | {framework} | {gradient} | {tested} | {test} |")
    return found


def test_the_committed_table_is_in_step_with_the_tests() -> None:
    expected = [row.stable for row in SCRIPT.rows()]
    assert len(expected) == len(set(expected)) > 20
    assert listed(SCRIPT.TABLE.read_text()) == expected, "run python docs/compatibility.py"
    assert listed(SCRIPT.table({})) == expected
    written = SCRIPT.TABLE.read_text()
    head, _, rest = SCRIPT.HEAD.partition("Last run")[0].partition("{support}")
    between, _, tail = rest.partition("{triton}")
    assert written.startswith(head) and between in written and tail in written
    for begin, end in map(SCRIPT.markers, SCRIPT.KEPT):
        kept = written.partition(begin)[2].partition(end)[0]
        assert kept.count("\n|") > 3 and kept in SCRIPT.table({})
    assert "failed" not in SCRIPT.TABLE.read_text()


def test_every_scenario_has_a_test() -> None:
    assert {row.number for row in SCRIPT.rows()} >= set(range(1, 13))


def test_the_worst_outcome_of_a_function_counts() -> None:
    outcomes = SCRIPT.Outcomes()
    for nodeid, outcome, when, why in (
        ("t.py::f[1]", "passed", "call", None),
        ("t.py::f[2]", "failed", "call", None),
        ("t.py::f[3]", "passed", "call", None),
        ("t.py::g", "skipped", "setup", ("t.py", 1, "Skipped: needs a CUDA device")),
        ("t.py::h", "passed", "setup", None),
    ):
        outcomes.pytest_runtest_logreport(SimpleNamespace(nodeid=nodeid, outcome=outcome, when=when, longrepr=why))
    assert outcomes.found == {"t.py::f": "failed", "t.py::g": "skipped: needs a CUDA device"}
