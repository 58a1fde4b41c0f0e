"""One JSON file per suite: its rows, and what is needed to judge and repeat them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.candidate import Row

PACKAGES = ("psilora", "torch", "triton", "peft", "transformers", "pytorch_optimizer")


def save(folder: Path, suite: str, rows: Sequence[Row], **more: Any) -> Path:
    """Write DIR/<suite>.json and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{suite}.json"
    record = {"suite": suite, **environment(), **more, "rows": list(rows)}
    path.write_text(json.dumps(record, indent=1, allow_nan=False, default=str) + "\n")
    return path


def load(path: Path) -> dict[str, Any]:
    """Return one file's record."""
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def load_folder(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the records of a folder by suite."""
    records = [load(path) for path in sorted(folder.glob("*.json"))]
    return {record["suite"]: record for record in records if "suite" in record}


def environment() -> dict[str, Any]:
    """Return commit, device, threads, load and versions: no names or paths of the machine."""
    return {
        "commit": commit(),
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def commit() -> str:
    """Return the checked-out commit, with "+" where files differ from it; "unknown" outside a checkout."""
    root = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
        return run.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def device_name() -> str:
    """Return the GPU's name, or the processor's with its vector instructions and number of cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else model
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
