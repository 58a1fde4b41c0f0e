"""`python -m psilora.doctor`: what works here, what a model would be trained with, and a numerical self-test."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from psilora import native
from psilora.adapters import LoRAPair, Unsupported, find_pairs
from psilora.engine import backend_unavailable, check_backend
from psilora.lora import LoRALinear
from psilora.optimizer import PSILoRA
from psilora.options import DENSE_LIMIT
from psilora.representation import choose

_BACKENDS = ("reference", "triton")
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
    parser.add_argument("--self-test", action="store_true", help="only compare the backends with the float64 oracle")
    parser.add_argument("--backend", choices=_BACKENDS, help="test this backend alone (all)")
    parser.add_argument("--seconds", type=float, default=5.0, help="time after which no case is begun (default 5)")
    options = parser.parse_args(arguments)
    for name, least in (("rank", 1), ("tokens", 0), ("batch", 1), ("image", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name}={value} must be >= {least}")
    if options.budget is not None and not options.budget >= 0:
        parser.error(f"--budget={options.budget} must be >= 0")
    if options.self_test and options.model:
        parser.error("--self-test trains a model of its own; leave out --model")
    if not options.self_test:
        _print_section("Versions", versions())
        _print_section("Devices", devices())
        _print_section("Backends", backends())
        if options.model:
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
    try:
        results = self_test(options.seconds, options.backend)
    except ValueError as error:
        parser.error(str(error))
    rows = [f"{r.name}: relative error {r.error:.1e} {'ok' if r.ok else f'> {r.limit:.0e} FAILED'}" for r in results]
    left = len(_CASES) * len(_runs(options.backend)) - len(results)
    _print_section("Self-test against the float64 oracle", rows)
    if left and options.self_test:
        print(f"  {left} more comparisons were left out after {options.seconds:g} s")
    return 0 if all(result.ok for result in results) else 1


def _targets(argument: str) -> str | list[str]:
    """Return names as a list, which PEFT finds at the end of a path; a regular expression is matched with all of it."""
    names = argument != "all-linear" and re.fullmatch(r"[\w.]+(,[\w.]+)*", argument)
    return argument.split(",") if names else argument


def _print_section(title: str, rows: Iterable[str]) -> None:
    print(f"{title}")
    for row in rows:
        print(f"  {row}")


def versions() -> list[str]:
    """Return one line per package, with "not installed" where it is absent."""
    lines = [f"python {platform.python_version()}"]
    for name in _PACKAGES:
        try:
            lines.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name} not installed")
    return lines


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
    lines.append(f"native spd_solve: {native.unavailable_reason() or 'active'}")
    return lines


def adapted_skeleton(name: str, rank: int, targets: str | list[str]) -> nn.Module:
    """Return the model `name` with LoRA adapters, on the meta device: shapes without weights.

    Raises:
        SystemExit: peft or transformers is missing, the model's configuration cannot be read, or no layer is named.
    """
    try:
        from peft import LoraConfig, PeftConfig, get_peft_model
        from transformers import AutoConfig, AutoModel
    except ImportError as error:
        raise SystemExit(f"--model needs the extra psilora[hf]: {error}") from error
    try:
        adapter: Any = PeftConfig.from_pretrained(name)
        if adapter.base_model_name_or_path is None:
            raise SystemExit(f"the adapter {name!r} does not say what its base model is")
        name = adapter.base_model_name_or_path
    except (ValueError, OSError):
        adapter = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
    try:
        config = AutoConfig.from_pretrained(name)
    except (ValueError, OSError) as error:
        raise SystemExit(f"cannot read the configuration of {name!r}: {error}") from error
    adapter.inference_mode = False
    try:
        with torch.device("meta"):
            return get_peft_model(AutoModel.from_config(config), adapter)  # type: ignore[no-untyped-call]
    except (ValueError, re.error) as error:
        raise SystemExit(f"cannot adapt {adapter.target_modules} of {name!r}: {error}") from error


def rows_of_images(model: nn.Module, pairs: Sequence[LoRAPair], batch: int, size: int) -> list[int]:
    """Return N of each pair, tokens or output positions, in a forward pass of `batch` images of size × size pixels.

    Args:
        model: From `adapted_skeleton`: on the meta device nothing is computed.
        pairs: Its pairs.
        batch: How many images.
        size: Their height and width.

    Raises:
        SystemExit: The model takes no images, or none of this size.
    """
    counts = dict.fromkeys(map(id, pairs), 0)
    handles = []
    for pair in pairs:

        def count(module: nn.Module, args: object, output: torch.Tensor, pair: LoRAPair = pair) -> None:
            counts[id(pair)] += output.numel() // pair.d_out

        handles += [lora_B.register_forward_hook(count) for _, lora_B in pair.sites]
    channels = getattr(getattr(model, "config", None), "num_channels", 3)
    try:
        with torch.no_grad():
            model(pixel_values=torch.empty(batch, channels, size, size, device="meta"))
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise SystemExit(f"cannot run the model on images of {size}×{size}: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    return [counts[id(pair)] for pair in pairs]


def layers(pairs: Sequence[LoRAPair], unsupported: Sequence[Unsupported]) -> list[str]:
    """Return the layers grouped by shape and capture mode, then what cannot be trained."""
    kinds = Counter((p.name.rsplit(".", 1)[-1], p.d_out, p.d_in, p.rank, _mode(p)) for p in pairs)
    lines = []
    for (name, d_out, d_in, r, mode), n in kinds.items():
        above = f", more than the {min(d_out, d_in)} it can use" if r > min(d_out, d_in) else ""
        lines.append(f"{n} × {name} {d_out}×{d_in}, r = {r}{above}: {mode}")
    lines += [f"{u.name}: not trainable here, {u.reason}" for u in unsupported]
    return lines or ["no LoRA pair found"]


def _mode(pair: LoRAPair) -> str:
    """Return whether a pair is captured, and over which patches."""
    if pair.uncaptured is not None:
        return pair.uncaptured
    kernel = pair.convolution.kernel if pair.convolution is not None else ()
    return "captured exactly" + (f", by patches of {'×'.join(map(str, kernel))}" if kernel else "")


def memory(pairs: Sequence[LoRAPair], tokens: int | Sequence[int], itemsize: int) -> list[str]:
    """Return the bytes of X and S (`itemsize` each number) for `tokens` rows, and of the fp32 state, by setting.

    Layers that hang on the same module and have the same width (q, k and v; gate and up) usually share one X: the
    smaller figure for X counts it once. Of a convolution d_in is C_in·∏k and every output position is a row.
    """
    captured, counts = _captured(pairs, tokens)
    X = [p.d_in * n * itemsize for p, n in zip(captured, counts, strict=True)]
    places = [(p.name if p.convolution else p.name.rpartition(".")[0], p.d_in) for p in captured]
    shared_X = sum(dict(zip(places, X, strict=True)).values())
    S = sum(p.d_out * n * itemsize for p, n in zip(captured, counts, strict=True))
    factors = sum(p.rank * (p.d_in + p.d_out) for p in pairs)
    diagonal = sum(p.d_in + p.d_out for p in pairs)
    narrow = [p for p in pairs if max(p.d_in, p.d_out) <= DENSE_LIMIT]
    left = len(pairs) - len(narrow)
    wide = f", without {left} layer{'s' * (left > 1)} wider than {DENSE_LIMIT}, which it cannot take" if left else ""
    return [
        f"gradient='exact': X {_size(shared_X)} (shared) to {_size(sum(X))}, S {_size(S)}, held from backward to step",
        f"gradient='dense': {_size(sum(4 * p.d_in * p.d_out for p in captured))}, whatever the rows",
        f"gradient='backward': {_size(sum(8 * p.rank * p.d_out for p in captured))}, for K = 1 alone",
        "step='spectral' and gradient='tangent': no captures",
        f"momentum of step='spectral' (rank 2r): {_size(8 * factors)}, as AdamW on the same parameters",
        f"momentum of step='gradient' (rank r): {_size(4 * factors)}",
        f"metric of either: {_size(4 * diagonal)}",
        f"metric='kfac-low-rank' (rank r): {_size(4 * (factors + 2 * len(pairs)))}",
        f"metric='kfac-dense' or 'shampoo-dense': {_size(sum(4 * (p.d_in**2 + p.d_out**2) for p in narrow))}{wide}",
    ]


def _captured(pairs: Sequence[LoRAPair], tokens: int | Sequence[int]) -> tuple[list[LoRAPair], list[int]]:
    """Return the pairs that can be captured and the rows of each; `tokens` is one number for all, or one for each."""
    counts = [tokens] * len(pairs) if isinstance(tokens, int) else tokens
    found = [(p, n) for p, n in zip(pairs, counts, strict=True) if p.uncaptured is None]
    return [p for p, _ in found], [n for _, n in found]


def automatic(pairs: Sequence[LoRAPair], tokens: int | Sequence[int], itemsize: int, budget: float | None) -> list[str]:
    """Return what gradient="auto" would choose, one line per choice and shape, and why."""
    captured, counts = _captured(pairs, tokens)
    chosen = choose(captured, counts, budget, itemsize)
    kinds = Counter((p.name.rsplit(".", 1)[-1], c.gradient, c.reason) for p, c in zip(captured, chosen, strict=True))
    lines = [f"{n} × {name}: {gradient}, {reason}" for (name, gradient, reason), n in kinds.items()]
    return [*lines, f"together {_size(sum(c.bytes for c in chosen))}"]


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


@dataclass
class Result:
    """One comparison of the self-test: the largest relative error of a factor after three steps."""

    name: str
    error: float
    limit: float

    @property
    def ok(self) -> bool:
        """Whether the error is within the limit; NaN is not."""
        return self.error <= self.limit


_CASES: tuple[dict[str, Any], ...] = (
    {},
    {"step": "gradient", "momentum": 0.0},
    {"step": "gradient"},
    {"step": "gradient", "num_iters": 2, "first": "B"},
    {"step": "gradient", "metric": "kfac"},
    {"step": "gradient", "metric": "kfac-dense", "damping": 1e-3},
    {"step": "gradient", "gradient": "tangent"},
)


def _runs(backend: str | None) -> list[tuple[str, str, torch.dtype]]:
    """The backends, or one of them, on the devices where they run."""
    runs = [("reference", "cpu", torch.float32)]
    if torch.cuda.is_available():
        runs.append(("reference", "cuda", torch.float32))
    if backend_unavailable("triton") is None:
        runs.append(("triton", "cuda" if torch.cuda.is_available() else "cpu", torch.float32))
    return [run for run in runs if backend in (None, run[0])]


def self_test(budget: float = 5.0, backend: str | None = None) -> list[Result]:
    """Train two layers for three steps on every backend and device here, and compare with the reference in float64.

    Args:
        budget: In seconds: later cases are left out when it is spent.
        backend: The only one to test; None for all that run here.

    Raises:
        ValueError: `backend` cannot run here.
    """
    if backend is not None:
        check_backend(backend)
    runs = _runs(backend)
    results: list[Result] = []
    start = time.monotonic()
    for case in _CASES:
        want = _train("reference", "cpu", torch.float64, case)
        for name, device, dtype in runs:
            if results and time.monotonic() - start > budget:
                return results
            got = _train(name, device, dtype, case)
            errors = [float((g - w).abs().max() / w.abs().max()) for g, w in zip(got, want, strict=True)]
            settings = ", ".join(f"{k}={v}" for k, v in case.items()) or "default"
            results.append(Result(f"{name} on {device}, {settings}", max(errors), 1e-4))
    return results


def _train(backend: str, device: str, dtype: torch.dtype, case: dict[str, Any]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(LoRALinear(nn.Linear(24, 40), 4, 8), nn.Tanh(), LoRALinear(nn.Linear(40, 16), 4, 8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, device="cpu") * 0.2)
    model = model.to(device, dtype)
    optimizer = PSILoRA(model, 0.1, backend=backend, **case)
    for _ in range(3):
        x = torch.randn(33, 24, generator=generator, device="cpu").to(device, dtype)
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    optimizer.detach()
    return [p.detach().cpu().double() for p in model.parameters() if p.requires_grad]


if __name__ == "__main__":
    sys.exit(main())
