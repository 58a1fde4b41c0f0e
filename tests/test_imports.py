"""Who may import whom: data flows one way, and no import, of whatever kind, goes against it or in a circle."""

from __future__ import annotations

import ast
import functools
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: A package or module imports, beside itself, only what stands on lines above its own.
ORDER = (
    ("runtime", "linalg", "options", "triton_kernels"),
    ("adapters", "lowrank"),
    ("capture", "distributed"),
    ("param_groups",),
    ("steps", "baselines"),
    ("backends", "monitor"),
    ("lifecycle",),
    ("reporting",),
    ("optimizer",),
    ("presets", "integrations", "doctor", "functional"),
)
#: `native` hands on names of `linalg`; `checkpoint` and `lr_finder` serve any optimizer and know nothing of this one.
ALLOWED_APART: dict[str, tuple[str, ...]] = {"native": ("linalg",), "checkpoint": (), "lr_finder": ("checkpoint",)}
HEIGHT = {name: height for height, names in enumerate(ORDER) for name in names}


def modules(root: Path) -> dict[str, str]:
    """The sources of the package by dotted name, its kernels under the name they are installed as."""
    found = {}
    for folder, prefix in ((root / "psilora", "psilora"), (root / "triton_kernels", "psilora.triton_kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([prefix, *(p for p in parts if p != "__init__")])] = path.read_text(encoding="utf-8")
    return found


def imported(name: str, source: str, known: frozenset[str], package: bool) -> Iterator[str]:
    """The modules of the package that a source imports: at the top, in functions and for type checking alike."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in ("psilora", "triton_kernels"):
                    yield _nearest(alias.name, known)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = name.split(".")
                base = ".".join([*parts[: len(parts) - node.level + package], *filter(None, [node.module])])
            if base.split(".")[0] in ("psilora", "triton_kernels"):
                yield from (_nearest(f"{base}.{alias.name}", known) for alias in node.names)
        elif isinstance(node, ast.Call) and isinstance(node.func, (ast.Attribute, ast.Name)) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            first = node.args[0].value if isinstance(node.args[0], ast.Constant) else None
            if called in ("import_module", "__import__") and str(first).split(".")[0] == "psilora":
                yield _nearest(str(first), known)


@functools.cache
def found_imports(name: str, source: str, known: frozenset[str], package: bool) -> frozenset[str]:
    """What `imported` yields, of a source that does not change looked for once."""
    return frozenset(imported(name, source, known, package))


def _nearest(name: str, known: frozenset[str]) -> str:
    """The module that a dotted name is in."""
    while name not in known and "." in name:
        name = name.rpartition(".")[0]
    return name


def faults(sources: dict[str, str]) -> list[str]:
    """What goes against the order, in words."""
    known, found = frozenset(sources), []
    packages = {name.rpartition(".")[0] for name in known}
    graph: dict[str, frozenset[str]] = {}
    for name, source in sources.items():
        graph[name] = found_imports(name, source, known, name in packages) - {name}
        if name == "psilora":
            continue
        here = name.split(".")[1]
        if here not in HEIGHT and here not in ALLOWED_APART:
            found.append(f"{name} has no place in the order")
            continue
        for other in sorted(graph[name]):
            there = other.split(".")[1] if other.startswith("psilora.") else ""
            lower = HEIGHT.get(there, len(ORDER)) < HEIGHT.get(here, 0)
            if there != here and not lower and there not in ALLOWED_APART.get(here, ()):
                found.append(f"{name} imports {other}")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found.append(f"circle: {' → '.join(error.args[1])}")
    return found


def test_every_import_follows_the_order() -> None:
    assert faults(modules(ROOT)) == []


PLANTED = [
    (
        "psilora.options.base",
        "from psilora.adapters.pair import LoRAPair",
        "options.base imports psilora.adapters.pair",
    ),
    ("psilora.linalg.spd", "from psilora.options.base import Options", "linalg.spd imports psilora.options.base"),
    ("psilora.triton_kernels.commit", "from psilora import lowrank", "triton_kernels.commit imports psilora.lowrank"),
    ("psilora.triton_kernels.xv", "from .. import PSILoRA", "triton_kernels.xv imports psilora"),
    ("psilora.steps.problem", "def f():\n    from psilora import optimizer", "steps.problem imports psilora.optimizer"),
    (
        "psilora.capture.hooks",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from psilora.steps.problem import Problem",
        "capture.hooks imports psilora.steps.problem",
    ),
    (
        "psilora.monitor.counters",
        "import psilora.backends.dispatch",
        "monitor.counters imports psilora.backends.dispatch",
    ),
    ("psilora.checkpoint", "from psilora import PSILoRA", "psilora.checkpoint imports psilora"),
    ("psilora.lowrank.momentum", "import importlib\nimportlib.import_module('psilora.steps')", "imports psilora.steps"),
    ("psilora.backends.dispatch", "from triton_kernels import xv", "backends.dispatch imports triton_kernels"),
    ("psilora.steps.problem", "from psilora.steps import assemble", "circle: "),
    ("psilora.adapters.pair", "def f():\n    from psilora.adapters.find import find_pairs", "circle: "),
    ("psilora.somewhere", "import torch", "psilora.somewhere has no place"),
]


@pytest.mark.parametrize(("name", "line", "said"), PLANTED, ids=[f"{name}: {line[:40]}" for name, line, _ in PLANTED])
def test_planted_offenders_are_found(name: str, line: str, said: str) -> None:
    sources = modules(ROOT)
    sources[name] = f"{sources.get(name, '')}\n{line}\n"
    found = faults(sources)
    assert any(said in fault for fault in found), found
