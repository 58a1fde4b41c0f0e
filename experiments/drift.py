"""Do the factors of a weight stay together over 20,000 steps? Small layers, noisy regression, a schedule for each.

y = (W₀ + T)x + noise with T standard normal / √d and 16 new x a step, so that the gradient never ends: what nothing in
a step fixes, the split of B·A into its factors, has all the time there is to run away. For both kinds of step, both
orders of the turns, five schedules and three dtypes: the largest ‖A‖/‖B‖ or ‖B‖/‖A‖ once B has left zero, and what was
skipped. The schedules are param groups of one optimizer, each with a layer of its own that starts like the others.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.store import making, save
from psilora import LoRALinear, PSILoRA

WIDTH, RANK, ROWS = 6, 2, 16
STEPS = 20_000
#: Steps at the end whose mean loss is given.
LAST = 1_000
#: Steps before the first look: the gradient step balances its factors from here on.
BURN_IN = 17
#: The peak rate of each kind of step: four times the default's, and a gradient step's usual one.
KINDS: dict[str, tuple[float, dict[str, Any]]] = {
    "spectral": (0.4, {}),
    "gradient": (0.02, {"step": "gradient"}),
}
SCHEDULES: dict[str, Callable[[int, int], float]] = {
    "constant": lambda step, steps: 1.0,
    "cosine": lambda step, steps: 0.5 * (1 + math.cos(math.pi * step / steps)),
    "warm-up 10": lambda step, steps: min(1.0, (step + 1) / 10),
    "warm-up 1000": lambda step, steps: min(1.0, (step + 1) / 1000),
    "warm-up 10000": lambda step, steps: min(1.0, (step + 1) / 10000),
}
#: "float16": autocast with a GradScaler around float32 factors; "bfloat16": the layer itself is of that dtype.
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Case:
    """One run of all schedules."""

    kind: str
    first: str
    dtype: str

    def path(self) -> Path:
        """Where the run lies below the output folder."""
        return Path("drift", f"{self.kind}-{self.first}-{self.dtype}.json")


def cases() -> Iterator[Case]:
    """Every run."""
    for values in itertools.product(KINDS, "AB", DTYPES):
        yield Case(*values)


def batches(dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """(x, what the adapter is to add to the base's output) for ever."""
    T = torch.randn(WIDTH, WIDTH) / WIDTH**0.5
    while True:
        x = torch.randn(ROWS, WIDTH)
        yield x.to(dtype), (x @ T.T + 0.5 * torch.randn(ROWS, WIDTH)).to(dtype)


def build(case: Case, steps: int) -> tuple[dict[str, LoRALinear], PSILoRA, torch.optim.lr_scheduler.LambdaLR]:
    """The layer of each schedule, and what trains them."""
    dtype = torch.bfloat16 if case.dtype == "bfloat16" else torch.float32
    first = LoRALinear(nn.Linear(WIDTH, WIDTH, dtype=dtype), RANK)
    layers = {name: copy.deepcopy(first) for name in SCHEDULES}
    lr, settings = KINDS[case.kind]
    model = nn.ModuleDict({name.replace(" ", "-"): layer for name, layer in layers.items()})
    groups = [{"layers": f"^{name}$"} for name in model]
    optimizer = PSILoRA(model, lr, first=case.first, backend="reference", groups=groups, **settings)
    rates = [lambda step, of=schedule: of(step, steps) for schedule in SCHEDULES.values()]
    return layers, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rates)


def run(case: Case, steps: int = STEPS) -> dict[str, Any]:
    """Train, and return by schedule the largest ratio of the norms and the last losses, and what was skipped."""
    torch.manual_seed(0)
    layers, optimizer, rates = build(case, steps)
    half = case.dtype == "float16"
    scaler = torch.amp.GradScaler("cpu", enabled=half)
    ratios, losses, infinite = dict.fromkeys(layers, 1.0), {name: 0.0 for name in layers}, 0
    for (x, added), step in zip(batches(layers["constant"].lora_A.weight.dtype), range(steps), strict=False):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16, enabled=half):
            errors = torch.stack([layer(x) - layer.base(x).detach() - added for layer in layers.values()])
        each = errors.float().square().sum(2).mean(1)
        scaler.scale(each.sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        rates.step()
        infinite += not bool(each.isfinite().all())
        for (name, layer), loss in zip(layers.items(), each.tolist(), strict=True):
            losses[name] += loss / min(LAST, steps) if step >= steps - LAST else 0.0
            if optimizer.state[layer.lora_A.weight]["step"] >= BURN_IN:
                A, B = (float(factor.weight.detach().double().norm()) for factor in (layer.lora_A, layer.lora_B))
                ratios[name] = max(ratios[name], A / B if B else math.inf, B / A if A else math.inf)
    stats = optimizer.stats()
    optimizer.detach()
    return {
        "ratios": ratios,
        "losses": losses,
        "infinite_losses": infinite,
        "skipped_steps": stats["skipped_steps"],
        "repaired_pivots": stats["repaired_pivots"],
        "steps": steps,
    }


def table(contents: Iterable[Mapping[str, Any]]) -> list[str]:
    """A row per run: the largest ratio of each schedule, and what went wrong."""
    lines = [f"| step | first | dtype | {' | '.join(SCHEDULES)} | skipped | repaired | infinite losses |"]
    lines.append("|" + "---|" * (len(SCHEDULES) + 6))
    for content in contents:
        if "drift" in content:
            result = content["result"]
            ratios = [f"{result['ratios'][name]:.1f}" for name in SCHEDULES]
            counts = [str(result[name]) for name in ("skipped_steps", "repaired_pivots", "infinite_losses")]
            lines.append("| " + " | ".join([*content["drift"].values(), *ratios, *counts]) + " |")
    return lines if len(lines) > 2 else []


def main(out: Path, quiet: bool) -> None:
    """Run what is missing."""
    from tqdm import tqdm

    for case in tqdm(list(cases()), desc="drift", unit="run", disable=quiet):
        path = out / case.path()
        if not path.exists():
            save(path, {"drift": asdict(case), "result": run(case), **making()})
