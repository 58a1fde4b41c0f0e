"""The command line of the doctor."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import re
from collections.abc import Iterable, Sequence

import torch

from psilora.adapters.find import find_pairs
from psilora.backends.dispatch import automatic as automatic_backend
from psilora.backends.dispatch import backend_unavailable
from psilora.doctor.self_test import BACKENDS, CASES, comparisons, runs
from psilora.doctor.survey import adapted_skeleton, automatic, layers, memory, rows_of_images
from psilora.linalg import native
from psilora.triton_kernels import releases

_PACKAGES = ("psilora", "torch", "triton", "numpy", "peft", "transformers", "accelerate")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 1 when the self-test fails."""
    parser = argparse.ArgumentParser(prog="python -m psilora.doctor", description=__doc__)
    parser.add_argument("--model", help="folder or hub name of a transformers model, or of a PEFT adapter")
    parser.add_argument("--rank", type=int, default=8, help="LoRA rank to plan with (default 8)")
    parser.add_argument("--target-modules", default="all-linear", help="as in LoraConfig, comma-separated (all-linear)")
    parser.add_argument(
        "--tokens",
        type=int,
        default=4096,
        help="rows per step N = batch × sequence, or × output positions of a convolution (default 4096)",
    )
    parser.add_argument("--image", type=int, help="for a vision model: count the rows of images this many pixels wide")
    parser.add_argument("--batch", type=int, default=8, help="images per step, with --image (default 8)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--budget", type=float, help="capture_budget for gradient='auto', in GiB (none)")
    parser.add_argument("--version", action="version", version=f"psilora {importlib.metadata.version('psilora')}")
    parser.add_argument("--self-test", action="store_true", help="only compare the backends with the float64 oracle")
    parser.add_argument("--no-self-test", action="store_true", help="only report, train nothing")
    parser.add_argument("--backend", choices=BACKENDS, help="test this backend alone (all)")
    parser.add_argument("--seconds", type=float, default=5.0, help="time after which no case is begun (default 5)")
    options = parser.parse_args(arguments)
    for name, least in (("rank", 1), ("tokens", 0), ("batch", 1), ("image", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name}={value} must be >= {least}")
    if options.budget is not None and not options.budget >= 0:
        parser.error(f"--budget={options.budget} must be >= 0")
    if options.self_test and options.no_self_test:
        parser.error("--self-test and --no-self-test exclude each other")
    if options.self_test and options.model:
        parser.error("--self-test trains a model of its own; leave out --model")
    if not options.self_test:
        _print_section("Versions", versions())
        _print_section("Devices", devices())
        _print_section("Backends", backends())
        _print_section("Triton that torch brings, and the steps that have kernels with it on CUDA", tritons())
        if options.model:
            _say(f"Reading the configuration of {options.model} …")
            model = adapted_skeleton(options.model, options.rank, _targets(options.target_modules))
            pairs, unsupported = find_pairs(model)
            width = getattr(torch, options.dtype).itemsize
            _print_section(f"Layers of {options.model}", layers(pairs, unsupported))
            rows, what = options.tokens, f"{options.tokens} rows"
            if options.image is not None:
                rows = rows_of_images(model, pairs, options.batch, options.image)
                what = f"{options.batch} images of {options.image}×{options.image}"
            _print_section(f"Memory at {what}, {options.dtype}", memory(pairs, rows, width))
            budget = None if options.budget is None else options.budget * 2**30
            _print_section("gradient='auto'", automatic(pairs, rows, width, budget))
            return 0
    if options.no_self_test:
        return 0
    passed = []
    try:
        _print_section("Self-test against the float64 oracle", ())
        for r in comparisons(options.seconds, options.backend):
            _say(f"  {r.name}: relative error {r.error:.1e} {'ok' if r.ok else f'> {r.limit:.0e} FAILED'}")
            passed.append(r.ok)
    except ValueError as error:
        parser.error(str(error))
    left = len(CASES) * len(runs(options.backend)) - len(passed)
    if left:
        _say(f"  {left} more comparisons were left out after {options.seconds:g} s")
    return 0 if all(passed) else 1


def _targets(argument: str) -> str | list[str]:
    """Return names as a list, which PEFT finds at the end of a path; a regular expression is matched with all of it."""
    names = argument != "all-linear" and re.fullmatch(r"[\w.]+(,[\w.]+)*", argument)
    return argument.split(",") if names else argument


def _print_section(title: str, rows: Iterable[str]) -> None:
    _say(title)
    for row in rows:
        _say(f"  {row}")


def _say(line: str) -> None:
    """Print a line at once, also into a pipe: what comes after it may take a while."""
    print(line, flush=True)


def versions() -> list[str]:
    """Return one line per package, with "not installed" where it is absent."""
    lines = [f"python {platform.python_version()}"]
    return [*lines, *(f"{name} {_installed(name) or 'not installed'}" for name in _PACKAGES)]


def devices() -> list[str]:
    """Return one line per device that a model can be on."""
    lines = [f"cpu: {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}"
        lines.append(f"cuda:{index}: {properties.name}, {capability}, {properties.total_memory / 2**30:.0f} GiB")
    return lines


def backends() -> list[str]:
    """Return which backends and native parts are active, and why the others are not."""
    reason = backend_unavailable("triton")
    lines = ["reference: active (plain PyTorch, any device)"]
    lines.append(f"triton: {'active' if reason is None else f'inactive, {reason}'}")
    devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]
    lines += [f"backend='auto' takes {automatic_backend(torch.device(device))}" for device in devices]
    lines.append(f"native spd_solve: {native.unavailable_reason() or 'active'}")
    return lines


def tritons() -> list[str]:
    """Return what runs with which torch and the Triton it brings, and with what is here."""
    lines = [f"torch {of_torch}, Triton {triton}: {steps}" for of_torch, triton, steps in releases.spans()]
    installed = _installed("triton")
    steps = "none" if installed is None else releases.runs(releases.release(installed))
    return [*lines, f"here: torch {torch.__version__}, Triton {installed or 'not installed'}: {steps}"]


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
