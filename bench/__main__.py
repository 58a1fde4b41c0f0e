"""The command line: `python -m bench SUITE --out DIR`, `report DIR`, `compare A.json B.json`."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import compare, report, results
from bench.candidate import Row
from bench.shapes import MODELS
from bench.suites import Settings

SUITES = ("lorsum", "solve", "step", "train", "scaling", "products", "host")
SELECTIONS = {
    "cpu": ("step", "lorsum", "solve", "train", "scaling", "host"),
    "gpu": ("products", "step", "solve", "lorsum", "train", "scaling"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 when a suite failed or a check was red, or a comparison found a change."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(given)
    if options.command == "report":
        return _report(options)
    if options.command == "compare":
        return _compare(options)
    return _run(options, given)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in (*SUITES, *SELECTIONS):
        suite = commands.add_parser(name, help=f"measure, into DIR/{name}.json" if name in SUITES else "a selection")
        suite.add_argument("--out", type=Path, required=True, metavar="DIR")
        suite.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if name == "gpu" else "cpu")
        suite.add_argument("--models", nargs="+", choices=sorted(MODELS), help="of the step and products suites")
        suite.add_argument("--tokens", type=int, help="rows of X and S in those suites")
        suite.add_argument("--repeats", type=int, default=15, help="rounds per case (%(default)s)")
        suite.add_argument("--seconds", type=float, default=20.0, help="time for one case's rounds (%(default)s)")
        suite.add_argument("--commit", help="what the results say they measured, where there is no checkout")
        suite.add_argument("--small", action="store_true", help="tiny shapes: proves the code, times nothing")
    page = commands.add_parser("report", help="write DIR/report.html, and the tables of a document")
    page.add_argument("folder", type=Path, metavar="DIR")
    page.add_argument("--readme", type=Path, help="replace what stands between its bench:begin and bench:end markers")
    pair = commands.add_parser("compare", help="what changed beyond noise; exit code 1 if something got worse")
    pair.add_argument("before", type=Path, metavar="A.json")
    pair.add_argument("after", type=Path, metavar="B.json")
    pair.add_argument("--threshold", type=float, default=0.1, help="share of the median to ignore (%(default)s)")
    return parser


def _report(options: argparse.Namespace) -> int:
    try:
        print(report.write(options.folder))
        if options.readme is not None:
            report.embed(options.folder, options.readme)
            print(options.readme)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _compare(options: argparse.Namespace) -> int:
    try:
        changes = compare.compare(options.before, options.after, options.threshold)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for change in changes:
        print(change)
    worse = sum(change.worse for change in changes)
    print(f"{worse} worse, {len(changes) - worse} better")
    return int(worse > 0)


def _command(given: Sequence[str]) -> str:
    """The command as it can be repeated elsewhere: no absolute path of this machine."""
    return " ".join(["python -m bench", *(Path(a).name if Path(a).is_absolute() else a for a in given)])


def _run(options: argparse.Namespace, given: Sequence[str]) -> int:
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device; --device cpu runs the same suites", file=sys.stderr)
        return 1
    if options.command in SELECTIONS:
        return _select(SELECTIONS[options.command], [*given[1:], "--device", options.device])
    models = None if options.models is None else tuple(options.models)
    settings = Settings(options.device, models, options.tokens, options.repeats, options.seconds, options.small)
    name, began = options.command, time.perf_counter()
    rows = importlib.import_module(f"bench.suites.{name}").run(settings)
    seconds = round(time.perf_counter() - began, 1)
    more = {"commit": options.commit} if options.commit else {}
    path = results.save(options.out, name, rows, command=_command(given), seconds=seconds, **more)
    for row in rows:
        print(_line(row))
    print(f"== {name}: {len(rows)} rows in {seconds} s: {path}", flush=True)
    return int(any("red" in row for row in rows))


def _select(names: Sequence[str], rest: Sequence[str]) -> int:
    """Run each suite in a process of its own: what one imports, allocates or leaves warm is nothing to the next.

    A suite that fails, or has a red row, does not keep the others from being run.
    """
    python = [sys.executable, *(["-P"] if getattr(sys.flags, "safe_path", False) else []), "-m", "bench"]
    codes = [subprocess.run([*python, name, *rest], check=False).returncode for name in names]
    return int(any(codes))


def _line(row: Row) -> str:
    figure = f"{row['ms']:10.3f} ms [{row['ms_20']:.3f}, {row['ms_80']:.3f}]" if "ms" in row else row.get("red", "")
    plain = f", not captured: {row['not_captured']}" if "not_captured" in row else ""
    return f"{row['case']:<40} {row['method']:<45} {figure}{plain}"


if __name__ == "__main__":
    sys.exit(main())
