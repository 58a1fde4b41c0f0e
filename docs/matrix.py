"""The versions that people have: runs the tests that meet other libraries with each set, and writes the support table.

python docs/matrix.py                       # every set, in environments of their own; some minutes each
python docs/matrix.py oldest newest         # some of them
python docs/matrix.py --here NAME           # in this environment, as it is
python docs/matrix.py --table               # only write the tables, from docs/matrix.json and docs/gates.json

An environment takes torch, and whatever a set does not name, from the one that runs this. What came out is kept in
docs/matrix.json; the table goes into README.md and docs/compatibility.md.

A second table says which Triton comes with which torch and what has kernels with it (psilora.triton_kernels.releases),
and what the compile gates found there (docs/gates.json, which `make gates TRITON=… ARGS="--record …"` writes).
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path
from typing import Any

from psilora.triton_kernels import releases

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "docs" / "matrix.json"
GATES = ROOT / "docs" / "gates.json"
#: The last torchao and datasets whose names the older PEFT and transformers know. Each set has the TRL of its time.
_OF_4 = ("torchao==0.13.0", "datasets<4")
#: Requirements of each set, the oldest first.
SETS: dict[str, tuple[str, ...]] = {
    "oldest": ("transformers==4.46.*", "peft==0.13.*", "accelerate==1.1.*", "trl==0.16.*", *_OF_4),
    "transformers-4": ("transformers==4.57.*", "peft==0.17.*", "trl==0.24.*", *_OF_4),
    "newest": ("transformers", "peft", "accelerate"),
}
TESTS = ("tests/test_trainer.py", "tests/adapters", "tests/scenarios")
SHOWN = ("torch", "transformers", "peft", "accelerate")


class Outcomes:
    """A pytest plugin that counts outcomes, and names what failed and what was skipped for what reason."""

    def __init__(self) -> None:
        self.passed = 0
        self.failed: list[str] = []
        self.skipped: dict[str, int] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Count one phase of a test."""
        if report.failed:
            self.failed.append(report.nodeid)
        elif report.skipped:
            reason = report.longrepr[2].removeprefix("Skipped: ")
            self.skipped[reason] = self.skipped.get(reason, 0) + 1
        elif report.when == "call":
            self.passed += 1

    def pytest_collectreport(self, report: Any) -> None:
        """Note a file that cannot be imported, or is left out as a whole."""
        if report.failed:
            self.failed.append(report.nodeid)
        elif report.skipped:
            reason = report.longrepr[2].removeprefix("Skipped: ")
            self.skipped[f"{report.nodeid}: {reason}"] = 1


def here(name: str, path: Path = RECORDS) -> int:
    """Run the tests in this environment, keep what came out under a name, and return 1 if one failed."""
    import pytest

    outcomes = Outcomes()
    # Old releases warn of what newer ones of their dependencies will drop.
    options = ["-q", "-W", "ignore::DeprecationWarning", "-W", "ignore::FutureWarning", "-p", "no:cacheprovider"]
    options += ["--continue-on-collection-errors", "--rootdir", str(ROOT)]
    pytest.main([*options, "-c", str(ROOT / "pyproject.toml"), *(str(ROOT / test) for test in TESTS)], [outcomes])
    records = json.loads(path.read_text()) if path.exists() else {}
    records[name] = {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "versions": {package: importlib.metadata.version(package) for package in SHOWN},
        "passed": outcomes.passed,
        "failed": sorted(outcomes.failed),
        "skipped": dict(sorted(outcomes.skipped.items())),
    }
    path.write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n")
    return int(bool(outcomes.failed) or not outcomes.passed)


def elsewhere(name: str) -> int:
    """Make an environment for a set on top of this one, and run the tests there."""
    folder = ROOT / "outputs" / "matrix" / name
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        below = [path for path in sys.path if path.endswith("site-packages")] or [sysconfig.get_paths()["purelib"]]
        (folder / "lib" / version / "site-packages" / "zz_below.pth").write_text("\n".join(below) + "\n")
    upgrade = ["--upgrade", "--upgrade-strategy", "only-if-needed"] if name == "newest" else []
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, *upgrade, *SETS[name]], check=True)
    pure = {**os.environ, "PSILORA_BUILD_EXT": "0"}
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", "-e", str(ROOT)], check=True, env=pure)
    return subprocess.run([str(python), __file__, "--here", name], check=False).returncode


def table(records: dict[str, Any], details: bool = True) -> list[str]:
    """Return the support table, the newest versions first: what passed; with `details` when, and what did not run."""
    titles = ["torch", "transformers", "PEFT", "accelerate", "Python", "tests", *(["run on"] if details else [])]
    lines, left_out = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)], []
    order = [*SHOWN[1:], SHOWN[0]]
    for record in sorted(records.values(), key=lambda r: [_key(r["versions"][name]) for name in order], reverse=True):
        versions = [record["versions"][name].partition("+")[0] for name in SHOWN]
        failed = f", **{len(record['failed'])} failed**" if record["failed"] else ""
        cells = [*versions, record["python"], f"{record['passed']} passed{failed}"]
        lines.append(f"| {' | '.join([*cells, *([record['date']] if details else [])])} |")
        left_out.append(f"- torch {versions[0]} with transformers {versions[1]}: {_reasons(record['skipped'])}")
    return [*lines, "", "Not run there:", "", *left_out] if details else lines


def _reasons(skipped: dict[str, int]) -> str:
    """Why tests were skipped, without the files' names."""
    reasons = {reason.rpartition("tests/")[2].partition(".py: ")[2] or reason for reason in skipped}
    return "; ".join(sorted(reasons)) or "–"


def _key(version: str) -> list[int]:
    return [int(part) for part in version.partition("+")[0].split(".") if part.isdecimal()]


def tritons() -> list[str]:
    """Return torch, the Triton it brings and the steps that have kernels with it, the newest first."""
    lines = ["| torch | its Triton | steps with kernels on CUDA |", "|---|---|---|"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in reversed(releases.spans()))]


def gates(records: dict[str, Any]) -> list[str]:
    """Return the same, the newest first, each with what the compile gates found with the last recorded Triton of it."""
    lines = ["| torch | its Triton | steps with kernels on CUDA | compile gates |", "|---|---|---|---|"]
    known = {triton: version for version in sorted(records) for triton in [releases.text(releases.release(version))]}
    for torch, triton, steps in reversed(releases.table()):
        lines.append(f"| {torch} | {triton} | {steps} | {_gate(records, known.get(triton))} |")
    return lines


def _gate(records: dict[str, Any], version: str | None) -> str:
    """What the gates found with a Triton: of how many kernels, and what they object to."""
    if version is None:
        return "not run"
    record = records[version]
    first = [problem.partition(": ")[0] for problem in record["problems"].values()]
    named = {"does not compile": "not compiled", "spills": "spill"}
    counts = Counter(named.get(problem, "above a limit") for problem in first)
    found = ", ".join(f"{count} {what}" for what, count in sorted(counts.items(), reverse=True)) or "all hold"
    return (
        f"{version}, {' '.join(f'sm_{target}' for target in record['targets'])}: {record['compiled']} kernels, {found}"
    )


def markers(name: str) -> tuple[str, str]:
    """Return what stands before and after the table of that name in a document."""
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def embed(lines: list[str], path: Path, name: str = "support") -> None:
    """Put a table between the markers of that name in a document.

    Raises:
        ValueError: The markers are not there, once each.
    """
    text = path.read_text(encoding="utf-8")
    begin, end = markers(name)
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{path} must hold {begin} and {end} once each")
    head, _, rest = text.partition(begin)
    body = "\n".join([begin, *lines, end])
    path.write_text(f"{head}{body}{rest.partition(end)[2]}", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 1 if a test failed somewhere."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", choices=[*SETS, []], help="of versions (all)")
    parser.add_argument("--here", metavar="NAME", help="run in this environment, and keep it under this name")
    parser.add_argument("--table", action="store_true", help="only write the tables")
    options = parser.parse_args(arguments)
    if options.here:
        return here(options.here)
    wrong = 0 if options.table else sum([elsewhere(name) for name in options.sets or SETS])
    records = json.loads(RECORDS.read_text())
    embed(table(records, details=False), ROOT / "README.md")
    embed(tritons(), ROOT / "README.md", "triton")
    embed(table(records), ROOT / "docs" / "compatibility.md")
    embed(gates(json.loads(GATES.read_text())), ROOT / "docs" / "compatibility.md", "triton")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
