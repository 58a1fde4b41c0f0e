"""What a model would be trained with: its layers, the memory of each setting, and the automatic choice."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from psilora.adapters.pair import LoRAPair, Unsupported, mebibytes
from psilora.capture.policy import choose
from psilora.options.metrics import DENSE_LIMIT


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
    """Return the layers grouped by shape and capture mode, what cannot be trained, and how much there is of them."""
    kinds = Counter((p.name.rsplit(".", 1)[-1], p.d_out, p.d_in, p.rank, _mode(p)) for p in pairs)
    lines = []
    for (name, d_out, d_in, r, mode), n in kinds.items():
        above = f", more than the {min(d_out, d_in)} it can use" if r > min(d_out, d_in) else ""
        lines.append(f"{n} × {name} {d_out}×{d_in}, r = {r}{above}: {mode}")
    lines += [f"{u.name}: not trainable here, {u.reason}" for u in unsupported]
    if pairs:
        numbers = sum(pair.rank * (pair.d_in + pair.d_out) for pair in pairs)
        lines.append(f"together {len(pairs)} pairs with {numbers:,} trainable numbers")
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
        f"gradient='exact': X {mebibytes(shared_X)} (shared) to {mebibytes(sum(X))}, S {mebibytes(S)}, held from "
        "backward to step",
        f"gradient='dense': {mebibytes(sum(4 * p.d_in * p.d_out for p in captured))}, whatever the rows",
        f"gradient='backward': {mebibytes(sum(8 * p.rank * p.d_out for p in captured))}, for K = 1 alone",
        "step='spectral' and gradient='tangent': no captures",
        f"momentum of step='spectral' (rank 2r): {mebibytes(8 * factors)}, as AdamW on the same parameters",
        f"momentum of step='gradient' (rank r): {mebibytes(4 * factors)}",
        f"metric of either: {mebibytes(4 * diagonal)}",
        f"metric='kfac-low-rank' (rank r): {mebibytes(4 * (factors + 2 * len(pairs)))}",
        f"metric='kfac-dense' or 'shampoo-dense': {mebibytes(sum(4 * (p.d_in**2 + p.d_out**2) for p in narrow))}{wide}",
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
    of_each = ", ".join(f"{n} {gradient}" for gradient, n in sorted(Counter(c.gradient for c in chosen).items()))
    return [*lines, f"together {mebibytes(sum(c.bytes for c in chosen))}: {of_each or 'nothing is captured'}"]
