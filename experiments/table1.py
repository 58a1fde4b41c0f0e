"""OPLoRA's Table 1 on MNIST: LeNet5, adapters of rank 8 on its linear layers, batches of 64, test accuracy over time.

As in the paper the linear layers keep their random start, the adapters are trained by each method at a constant rate,
and the convolutions by SGD with momentum at a rate of their own, the same for all. All 60,000 training images; the
accuracy on the 10,000 test images is taken `POINTS` times an epoch, and its mean over these times is the paper's
figure. Nothing is chosen by it: every rate is shown.
"""

from __future__ import annotations

import json
import math
import shlex
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments.methods import BETAS, Build, factor_rule, only_adapters, pair_rule
from experiments.store import rounded
from experiments.tasks.images import BATCH, ImageSession
from experiments.tasks.vision import LeNet5, adapted, mnist
from experiments.training import train_step, versions
from psilora import OPLoRA, PSILoRA
from psilora.baselines import PreconditionedSGD, ProjectedMomentum, SVDLoRA

RANK, EPOCHS, POINTS = 8, 2, 10
CONVOLUTION_LR, MOMENTUM = 0.01, 0.9
LRS = (0.02, 0.05)
METHODS: Mapping[str, Build] = {
    "oplora-1": pair_rule(OPLoRA, num_iters=1),
    "oplora-1-first-b": pair_rule(OPLoRA, num_iters=1, first="B"),
    "oplora-2": pair_rule(OPLoRA, num_iters=2),
    "default": pair_rule(PSILoRA),
    "sgd": factor_rule(torch.optim.SGD, momentum=MOMENTUM),
    "adamw": factor_rule(torch.optim.AdamW, betas=BETAS, weight_decay=0.0),
    "preconditioned-sgd": pair_rule(PreconditionedSGD, momentum=MOMENTUM),
    "projected": pair_rule(ProjectedMomentum),
    "svdlora": pair_rule(SVDLoRA, momentum=MOMENTUM),
}


def train(method: str, lr: float, seed: int, epochs: int, folder: Path) -> dict[str, Any]:
    """{"accuracy": {step: share of the test images}, "loss": the same of the loss, norms and counters at the end}.

    A run whose training loss stops being finite ends there.
    """
    data = mnist(folder)
    torch.manual_seed(seed)
    session = ImageSession(adapted(LeNet5(), RANK), data, epochs * max(1, len(data["train"][1]) // BATCH), seed)
    with only_adapters(session.model):
        optimizers = METHODS[method](session.model, lr, 0.0)
    taken = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    rest = [p for p in session.model.parameters() if p.requires_grad and id(p) not in taken]
    optimizers.append(torch.optim.SGD(rest, lr=CONVOLUTION_LR, momentum=MOMENTUM))
    marks = {round(session.steps * k / (POINTS * epochs)) for k in range(1, POINTS * epochs + 1)}
    found: dict[str, Any] = {"accuracy": {}, "loss": {}}
    for step, batch in enumerate(session.batches(), 1):
        if not math.isfinite(train_step(session, optimizers, batch).loss):
            break
        if step in marks:
            session.model.eval()
            with torch.no_grad():
                scores = session.evaluate("test")
            session.model.train()
            found["accuracy"][step], found["loss"][step] = scores.score, scores.loss
    found["norms"] = norms(session.model)
    found["stats"] = optimizers[0].stats() if isinstance(optimizers[0], PSILoRA) else {}
    return found


def norms(model: nn.Module) -> dict[str, tuple[float, float]]:
    """{layer: (‖A‖_F, ‖B‖_F)}: their split tells how far the factors have drifted apart."""
    pairs = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    return {name: (m.lora_A.weight.norm().item(), m.lora_B.weight.norm().item()) for name, m in pairs.items()}


def main(
    out: Path,
    folder: Path,
    methods: Sequence[str],
    lrs: Sequence[float],
    seeds: Sequence[int],
    epochs: int,
    quiet: bool,
) -> None:
    """Run what is missing, a file per run."""
    from tqdm import tqdm

    command = shlex.join(["python", "-m", "experiments", *sys.argv[1:]])
    work = [(method, lr, seed) for seed in seeds for lr in lrs for method in methods]
    with tqdm(work, desc="table1", unit="run", disable=quiet) as progress:
        for method, lr, seed in progress:
            label = {"method": method, "lr": lr, "seed": seed, "epochs": epochs}
            path = out / "table1" / f"{method}-lr{lr:g}-seed{seed}-epochs{epochs}.json"
            if not path.exists():
                content = {"table1": label, **train(method, lr, seed, epochs, folder)}
                content |= {"command": command, "versions": versions()}
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(rounded(content)), encoding="utf-8")


def table(contents: Iterable[Mapping[str, Any]]) -> list[str]:
    """A row per method, rate and length, means over seeds: test accuracy in per cent, repairs and skipped steps."""
    runs: dict[tuple[str, float, int], list[Mapping[str, Any]]] = {}
    for content in contents:
        if "table1" in content:
            label = content["table1"]
            runs.setdefault((label["method"], label["lr"], label["epochs"]), []).append(content)
    if not runs:
        return []
    lines = ["| method | lr | epochs | seeds | final | mean over time | repaired solves | skipped steps |"]
    lines.append("|" + "---|" * 8)
    for (method, lr, epochs), group in sorted(runs.items()):
        curves = [list(run["accuracy"].values()) for run in group]
        complete = all(len(curve) == POINTS * epochs for curve in curves)
        final = f"{100 * statistics.fmean(c[-1] for c in curves):.2f}" if complete else "not finite"
        mean = f"{100 * statistics.fmean(map(statistics.fmean, curves)):.2f}" if complete else ""
        counts = [_count(group, name) for name in ("repaired_pivots", "skipped_steps")]
        lines.append("| " + " | ".join([method, f"{lr:g}", str(epochs), str(len(group)), final, mean, *counts]) + " |")
    return lines


def _count(group: Sequence[Mapping[str, Any]], name: str) -> str:
    """A counter's mean over the runs; empty for methods that do not count."""
    values = [run["stats"][name] for run in group if name in run["stats"]]
    return f"{statistics.fmean(values):g}" if values else ""
