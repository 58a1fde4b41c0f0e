"""Run files: one JSON per run, written whole or not at all, and merged lists of them."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.tasks import Scores
from experiments.training import Key, Result, versions

Record = tuple[Key, Result]

#: What a run file says of its making, which many runs share, and where a merged list keeps it once.
SHARED = {"command": "commands", "versions": "versions"}
#: What tells runs apart: of a training task, of its times, of a curve and of a projection of the linear task, of
#: factors over many steps, of a line of Table 1.
SCORES = ("validation", "test", "general_before", "general_after")
LABELS = ("key", "pace", "linear", "one_step", "drift", "table1")


def making() -> dict[str, Any]:
    """What a run file says of its making."""
    return {"command": shlex.join(["python", "-m", "experiments", *sys.argv[1:]]), "versions": versions()}


def write(folder: Path, key: Key, result: Result) -> None:
    """Write the run's file."""
    save(folder / key.path, {"key": asdict(key), "result": asdict(result), **making()})


def save(path: Path, content: dict[str, Any]) -> None:
    """Write one JSON file, floats to 6 digits; a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(rounded(content)), encoding="utf-8")
    partial.replace(path)


def rounded(value: Any) -> Any:
    """Nested floats to 6 digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(child) for key, child in value.items()}
    return [rounded(child) for child in value] if isinstance(value, (list, tuple)) else value


def contents(folder: Path) -> Iterable[dict[str, Any]]:
    """Everything stored below `folder`, in path order: run files, and the runs of files made by `merge`."""
    for path in sorted(folder.rglob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        for run in content.get("runs", [content]):
            if "runs" in content:
                run = {**run, **{name: content[kept][run[name]] for name, kept in SHARED.items() if name in run}}
            yield run


def load(folder: Path) -> list[Record]:
    """Every run below `folder`; where a run is there twice, the last one read counts."""
    found: dict[Key, Result] = {}
    for content in contents(folder):
        if "key" in content:
            result = dict(content["result"])
            for split in SCORES:
                result[split] = None if result.get(split) is None else Scores(**result[split])
            result["curve"] = [tuple(point) for point in result["curve"]]
            found[Key(**content["key"])] = Result(**result)
    return list(found.items())


def merge(folder: Path, target: Path) -> int:
    """Write all runs below `folder` into one file, a run per line, the last one read where one is there twice.

    Return how many. The commands and versions, which repeat, are listed once; a run holds their indices.
    """
    shared: dict[str, list[Any]] = {name: [] for name in SHARED}
    runs: dict[str, dict[str, Any]] = {}
    for content in contents(folder):
        runs[json.dumps({name: content[name] for name in LABELS if name in content})] = content
    for content in runs.values():
        for name, seen in shared.items():
            if name in content:
                if content[name] not in seen:
                    seen.append(content[name])
                content[name] = seen.index(content[name])
    lines = [json.dumps(content, ensure_ascii=False, separators=(",", ":")) for content in runs.values()]
    head = json.dumps({SHARED[name]: seen for name, seen in shared.items()}, ensure_ascii=False)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(f'{head[:-1]}, "runs": [\n' + ",\n".join(lines) + "\n]}\n", encoding="utf-8")
    return len(lines)
