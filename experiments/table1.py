"""OPLoRA's Table 1: adapters on the linear layers of LeNet5 (MNIST) or PatchMLP (CIFAR-100), test accuracy over time.

As in the paper the linear layers keep their random start, the adapters are trained by each method at a constant rate,
batches of 64, ρ = 1e-3, and the other layers by SGD with momentum at a rate of their own, the same for all. The rates
are 1, 2 and 5 times a power of ten around a centre of each method. A tenth of the training images chooses among them;
the mean over `POINTS` times an epoch of the accuracy on the test images is the paper's figure.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from experiments.methods import BETAS, Build, factor_rule, only_adapters, pair_rule
from experiments.store import making, save
from experiments.tasks.images import BATCH, Images, ImageSession
from experiments.tasks.vision import LeNet5, PatchMLP, adapted, cifar100, mnist, with_validation
from experiments.training import train_step
from psilora import LoRALinear, OPLoRA, PSILoRA
from psilora.baselines import PreconditionedAdamW, PreconditionedSGD, ProjectedMomentum, SVDLoRA

EPOCHS, POINTS = 2, 10
OTHERS_LR, MOMENTUM, PROX = 0.01, 0.9, 1e-3
#: Rates that every method gets around its centre, and how many more beyond an edge where the best lies on one.
TRIED, MORE = 3, 2
DIGITS = (1, 2, 5)
K = TypeVar("K", int, float)
HEAD = "| method | lr | rates | seeds | mean over time | final | paper | repaired solves | skipped steps |"


@dataclass(frozen=True)
class Dataset:
    """A column of the paper's table."""

    title: str
    read: Callable[[Path], dict[str, Images]]
    network: Callable[[], nn.Module]
    rank: int


@dataclass(frozen=True)
class Method:
    """A row.

    Attributes:
        title: The paper's name of it, or ours.
        build: (model, lr, lr of other parameters, unused) to optimizers of what it trains.
        centre: The middle one of its rates, of the ladder 1, 2, 5 times a power of ten.
    """

    title: str
    build: Build
    centre: float = 0.02


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """{path: adapted layer}."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def full(model: nn.Module, lr: float, _: float) -> list[torch.optim.Optimizer]:
    """SGD of the linear layers themselves; the adapters, which are zero, stay so."""
    layers = adapters(model).values()
    for layer in layers:
        layer.lora_A.weight.requires_grad_(False)
        layer.lora_B.weight.requires_grad_(False)
        layer.base.requires_grad_(True)
    weights = [p for layer in layers for p in layer.base.parameters()]
    return [torch.optim.SGD(weights, lr=lr, momentum=MOMENTUM)]


SGD, ADAMW = {"momentum": MOMENTUM}, {"betas": BETAS}
PROJECTED = {**SGD, "prox": PROX}
METHODS: Mapping[str, Method] = {
    "sgd": Method("LoRA, SGD", factor_rule(torch.optim.SGD, **SGD)),
    "adamw": Method("LoRA, AdamW", factor_rule(torch.optim.AdamW, weight_decay=0.0, **ADAMW), 2e-3),
    "preconditioned-sgd": Method("Preconditioned LoRA, SGD", pair_rule(PreconditionedSGD, damping=PROX, **SGD)),
    "preconditioned-adamw": Method(
        "Preconditioned LoRA, AdamW", pair_rule(PreconditionedAdamW, damping=PROX, **ADAMW), 2e-3
    ),
    **{
        f"projected-{k}": Method(f"Projected OPLoRA ×{k}", pair_rule(ProjectedMomentum, num_iters=k, **PROJECTED))
        for k in (1, 2, 8)
    },
    **{f"oplora-{k}": Method(f"OPLoRA ×{k}", pair_rule(OPLoRA, num_iters=k, prox=PROX)) for k in (1, 2, 8)},
    "svdlora": Method("SVDLoRA", pair_rule(SVDLoRA, **SGD)),
    "full": Method("Full, SGD", full),
    "oplora-1-first-b": Method("OPLoRA ×1, B first", pair_rule(OPLoRA, num_iters=1, first="B", prox=PROX)),
    "default": Method("PSILoRA, default", pair_rule(PSILoRA)),
}
#: The paper's accuracies in per cent, mean and deviation over 3 seeds.
PAPER: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "sgd": {"mnist": (98.27, 0.069), "cifar100": (24.66, 0.254)},
    "adamw": {"mnist": (98.18, 0.088), "cifar100": (27.16, 0.116)},
    "preconditioned-sgd": {"mnist": (98.55, 0.144), "cifar100": (27.53, 0.360)},
    "preconditioned-adamw": {"mnist": (98.32, 0.056), "cifar100": (28.15, 0.477)},
    "projected-1": {"mnist": (98.53, 0.098), "cifar100": (28.26, 0.104)},
    "projected-2": {"mnist": (98.51, 0.062), "cifar100": (28.29, 0.061)},
    "projected-8": {"mnist": (98.54, 0.118), "cifar100": (28.23, 0.201)},
    "oplora-1": {"mnist": (98.58, 0.106), "cifar100": (26.24, 0.173)},
    "oplora-2": {"mnist": (98.55, 0.100), "cifar100": (26.47, 0.178)},
    "oplora-8": {"mnist": (98.56, 0.134), "cifar100": (26.94, 0.190)},
    "svdlora": {"mnist": (98.52, 0.074), "cifar100": (27.48, 0.365)},
    "full": {"mnist": (98.77, 0.111), "cifar100": (32.24, 0.398)},
}

DATASETS: Mapping[str, Dataset] = {
    "mnist": Dataset("MNIST", mnist, LeNet5, 8),
    "cifar100": Dataset("CIFAR-100", cifar100, PatchMLP, 16),
}


def train(dataset: str, method: str, lr: float, seed: int, epochs: int, folder: Path) -> dict[str, Any]:
    """{"validation", "accuracy": {step: share of the validation and the test images}, "loss": that of the test,
    norms and counters at the end}.

    A run whose training loss stops being finite ends there.
    """
    of = DATASETS[dataset]
    data = with_validation(of.read(folder))
    torch.manual_seed(seed)
    model = adapted(of.network(), of.rank)
    session = ImageSession(model, data, epochs * max(1, len(data["train"][1]) // BATCH), seed)
    with only_adapters(model):
        optimizers = METHODS[method].build(model, lr, 0.0)
    taken = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    optimizers.append(torch.optim.SGD(rest, lr=OTHERS_LR, momentum=MOMENTUM))
    marks = {round(session.steps * k / (POINTS * epochs)) for k in range(1, POINTS * epochs + 1)}
    found: dict[str, Any] = {"validation": {}, "accuracy": {}, "loss": {}}
    for step, batch in enumerate(session.batches(), 1):
        if not math.isfinite(train_step(session, optimizers, batch).loss):
            break
        if step in marks:
            model.eval()
            with torch.no_grad():
                scores = session.evaluate("test")
                found["validation"][step] = session.evaluate("validation").score
            model.train()
            found["accuracy"][step], found["loss"][step] = scores.score, scores.loss
    found["norms"] = norms(model)
    found["stats"] = optimizers[0].stats() if isinstance(optimizers[0], PSILoRA) else {}
    return found


def norms(model: nn.Module) -> dict[str, tuple[float, float]]:
    """{layer: (‖A‖_F, ‖B‖_F)}: their split tells how far the factors have drifted apart."""
    return {name: (m.lora_A.weight.norm().item(), m.lora_B.weight.norm().item()) for name, m in adapters(model).items()}


def ladder(centre: float, above: int) -> float:
    """The rate `above` rungs of 1, 2, 5 times powers of ten over `centre`, which is a rung."""
    power = math.floor(math.log10(centre) + 1e-9)
    rung = 3 * power + DIGITS.index(round(centre / 10.0**power)) + above
    return float(f"{DIGITS[rung % 3]}e{rung // 3}")


@dataclass(frozen=True)
class Plan:
    """What is to be run: the method's rates with `tune_seeds`, and the chosen one with `seeds`."""

    dataset: str
    folder: Path
    out: Path
    epochs: int
    seeds: Sequence[int]
    tune_seeds: Sequence[int]
    lrs: Sequence[float] = ()

    def run(self, method: str, lr: float, seed: int) -> float:
        """Train unless that is done, and return the mean validation accuracy; 0 where it was not finite."""
        name = f"{method}-lr{lr:g}-seed{seed}-epochs{self.epochs}.json"
        path = self.out / "table1" / self.dataset / name
        if not path.exists():
            label = {"dataset": self.dataset, "method": method, "lr": lr, "seed": seed, "epochs": self.epochs}
            content = {"table1": label, **train(self.dataset, method, lr, seed, self.epochs, self.folder)}
            save(path, content | making())
        return validated(json.loads(path.read_text(encoding="utf-8")))

    def runs(self, method: str) -> Iterator[None]:
        """Run a method's part, a step of the iterator for each run."""
        if self.lrs:
            for seed in self.seeds:
                for lr in self.lrs:
                    self.run(method, lr, seed)
                    yield
            return
        found: dict[int, dict[int, float]] = {}
        reach = TRIED // 2
        todo = list(range(-reach, reach + 1))
        while todo:
            for above in todo:
                lr = ladder(METHODS[method].centre, above)
                found[above] = {seed: self.run(method, lr, seed) for seed in self.tune_seeds}
                yield
            best = chosen(found)
            beyond = {min(found): best - 1, max(found): best + 1}.get(best)
            todo = [beyond] if beyond is not None and len(found) < TRIED + MORE else []
        for seed in self.seeds:
            self.run(method, ladder(METHODS[method].centre, best), seed)
            yield


def validated(run: Mapping[str, Any]) -> float:
    """The mean over time of a run's validation accuracy; 0 where it stopped being finite."""
    curve = list(run["validation"].values())
    return statistics.fmean(curve) if len(curve) == POINTS * run["table1"]["epochs"] else 0.0


def chosen(found: Mapping[K, Mapping[int, float]]) -> K:
    """The rate with the best mean over the seeds that all rates have run, of {rate: {seed: validation accuracy}}."""
    shared = set.intersection(*map(set, found.values()))
    return max(found, key=lambda rate: statistics.fmean(found[rate][seed] for seed in shared or found[rate]))


def main(plan: Plan, methods: Sequence[str], quiet: bool) -> None:
    """Run what is missing, a file per run."""
    from tqdm import tqdm

    with tqdm(desc=f"table1 {plan.dataset}", unit="run", disable=quiet) as progress:
        for method in methods:
            for _ in plan.runs(method):
                progress.update()


def table(contents: Iterable[Mapping[str, Any]]) -> list[str]:
    """Per dataset, a row per method: test accuracy in per cent at the rate that validation chose, and the paper's."""
    runs: dict[tuple[str, int, str], dict[float, list[Mapping[str, Any]]]] = {}
    for content in contents:
        if "table1" in content:
            label = content["table1"]
            rates = runs.setdefault((label["dataset"], label["epochs"], label["method"]), {})
            rates.setdefault(label["lr"], []).append(content)
    lines: list[str] = []
    for dataset, epochs in sorted({key[:2] for key in runs}):
        lines += [*[""] * bool(lines), f"### {DATASETS[dataset].title}, {epochs} epochs", "", HEAD, "|" + "---|" * 9]
        lines += [
            _line(dataset, name, runs[dataset, epochs, name]) for name in METHODS if (dataset, epochs, name) in runs
        ]
    return lines


def _line(dataset: str, name: str, rates: Mapping[float, Sequence[Mapping[str, Any]]]) -> str:
    """A method's row; where the best of several rates lies on an edge, the rate is marked."""
    lr = chosen({lr: {run["table1"]["seed"]: validated(run) for run in group} for lr, group in rates.items()})
    group, mark = rates[lr], "\\*" * (len(rates) > 1 and lr in (min(rates), max(rates)))
    complete = all(validated(run) > 0 for run in group)
    curves = [[100 * share for share in run["accuracy"].values()] for run in group]
    mean = _spread([statistics.fmean(curve) for curve in curves]) if complete else "not finite"
    final = _spread([curve[-1] for curve in curves]) if complete else ""
    known = "{:.2f} ± {:.2f}".format(*PAPER[name][dataset]) if name in PAPER else ""
    counts = [_count(group, counter) for counter in ("repaired_pivots", "skipped_steps")]
    cells = [METHODS[name].title, f"{lr:g}{mark}", str(len(rates)), str(len(group)), mean, final, known, *counts]
    return "| " + " | ".join(cells) + " |"


def _spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation, the latter where there are several."""
    return f"{statistics.fmean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def _count(group: Sequence[Mapping[str, Any]], name: str) -> str:
    """A counter's mean over the runs; empty for methods that do not count."""
    values = [run["stats"][name] for run in group if name in run["stats"]]
    return f"{statistics.fmean(values):g}" if values else ""
