"""The figures of the documentation: from the committed results, and from computations made here.

python docs/figures.py            # rewrites docs/img/, under a minute
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from psilora import functional, lorsum  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor

IMAGES = ROOT / "docs" / "img"
RESULTS = ROOT / "experiments" / "results"
TASKS = ("bytelm", "minilm", "digits")
RANK = 8


def quality() -> None:
    """Test loss over AdamW's in every setting: the spectral step, and the best other rival."""
    from experiments import plots, store
    from experiments.analysis import settings, summaries
    from experiments.report import REFERENCE, RIVALS

    records = [record for record in store.load(RESULTS) if record[0].task in TASKS]
    rows = []
    for setting in settings(records):
        found = {s.method: s for s in summaries(records, setting) if s.test is not None}
        if REFERENCE in found and "spectral" in found:
            base = found[REFERENCE].test.mean
            rivals = [found[m].test.mean / base for m in RIVALS if m in found and m != REFERENCE]
            own = found["spectral"].test
            rows.append((plots.name(setting), own.mean / base, (own.half or 0) / base, min(rivals, default=math.nan)))
    rows.sort(key=lambda row: (not row[0].startswith(("bytelm", "minilm")), row[1]))
    figure, axes = plt.subplots(figsize=(8, 0.27 * len(rows) + 1.1), layout="constrained")
    for i, (_, own, half, rival) in enumerate(rows):
        axes.plot([own - half, own + half], [i, i], color="C0", lw=5, alpha=0.25, solid_capstyle="butt")
        axes.plot(rival, i, "D", color="0.5", ms=5, label="best other rival, where run" if i == 0 else None)
        axes.plot(own, i, "o", color="C0", ms=7, label="PSILoRA, default step (95 % interval)" if i == 0 else None)
    axes.axvline(1, color="C3", lw=1.5, label="AdamW")
    axes.set(xscale="log", yticks=range(len(rows)), xlabel="test loss over AdamW's, each at its best rate")
    axes.set_yticklabels([row[0] for row in rows], fontsize=8)
    axes.set_xticks([0.1, 0.2, 0.5, 1, 1.5], ["0.1", "0.2", "0.5", "1", "1.5"])
    axes.minorticks_off()
    axes.invert_yaxis()
    axes.legend(fontsize=8, loc="lower left")
    axes.grid(axis="x", alpha=0.3)
    _save(figure, "quality")


def rates() -> None:
    """Validation loss against the rate at three ranks: the best rate of the spectral step does not move."""
    from experiments import store
    from experiments.analysis import summaries

    records = store.load(RESULTS)
    figure, panels = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained", sharey=True)
    for axes, method, title in zip(panels, ("adamw", "spectral"), ("AdamW", "PSILoRA, default step"), strict=True):
        for colour, rank in zip(("C0", "C1", "C2"), (4, 8, 32), strict=True):
            found = {s.method: s for s in summaries(records, ("bytelm", "topics-small", rank))}[method]
            losses = {lr: loss for lr, loss in found.losses.items() if loss < 4}
            axes.plot(list(losses), list(losses.values()), "o-", color=colour, label=f"r = {rank}", ms=4)
            axes.plot(found.lr, losses[found.lr], "o", color=colour, ms=10, mfc="none")
        axes.set(xscale="log", xlabel="lr", title=title)
        axes.set_xticks(list(losses), [f"{lr:g}" for lr in losses])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("validation loss")
    panels[0].legend(fontsize=8)
    _save(figure, "rates")


def power_law(d_out: int, d_in: int, generator: torch.Generator) -> Tensor:
    """A matrix whose singular values fall as 1/k."""
    U = torch.linalg.qr(torch.randn(d_out, d_out, generator=generator, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(d_in, d_in, generator=generator, dtype=torch.float64))[0]
    k = min(d_out, d_in)
    return U[:, :k] / torch.arange(1, k + 1, dtype=torch.float64) @ V[:, :k].mT


def rounds() -> None:
    """How close a cut to rank r comes to the SVD's with K rounds of LoRSum, for a gradient of rank 32."""
    generator = torch.Generator().manual_seed(0)
    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for name, colour in (("power law", "C0"), ("Gaussian", "C1")):
        for size, style in ((0.1, "o-"), (1.0, "s--")):
            excess: dict[int, list[float]] = {K: [] for K in range(1, 9)}
            for _ in range(9):
                B, A = (torch.randn(shape, generator=generator).double() for shape in ((96, RANK), (RANK, 80)))
                law = name == "power law"
                G = power_law(96, 80, generator) if law else torch.randn(96, 80, generator=generator).double()
                left, values, right = torch.linalg.svd(G)
                S, X = left[:, :32] * values[:32], right[:32]
                S *= size * (B @ A).norm() / values[:32].norm()
                target = B @ A - S @ X
                best = torch.linalg.svdvals(target)[RANK:].square().sum().sqrt()
                for K, found in excess.items():
                    new_B, new_A = lorsum([(B, A), (S, X)], [1.0, -1.0], num_iters=K, prox=1e-9)
                    found.append(float((target - new_B @ new_A).norm() / best) - 1)
            middle = {K: sorted(found)[4] for K, found in excess.items()}
            shown = {K: value for K, value in middle.items() if value > 1e-11}  # fp64 rounds at about 1e-14
            label = f"{name}, {size:g} of the weight"
            axes.plot(list(shown), list(shown.values()), style, color=colour, markersize=4, label=label)
    axes.set(yscale="log", xlabel="rounds K", ylabel="distance to the target\nover the SVD's, minus 1")
    axes.legend(fontsize=7, title="spectrum and norm of the step", title_fontsize=8, loc="lower right")
    axes.grid(alpha=0.3)
    _save(figure, "rounds")


def split() -> None:
    """The change of the weight by one step, as the same product is split differently: B/t and t·A."""
    generator = torch.Generator().manual_seed(0)
    B, A = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((48, RANK), (RANK, 40)))
    G = torch.randn(48, 40, generator=generator).double()
    scales = [2.0**k for k in range(-6, 7)]
    changes: dict[str, list[float]] = {"AdamW": [], "PSILoRA, default step": []}
    for t in scales:
        factors = B / t, A * t
        gradients = G @ factors[1].mT, factors[0].mT @ G
        moved = [f - 1e-2 * g.sign() for f, g in zip(factors, gradients, strict=True)]  # AdamW's first step
        changes["AdamW"].append(float((moved[0] @ moved[1] - B @ A).norm()))
        state = functional.init(*factors, balance=False)
        new = functional.step(*factors, state, lr=0.05, lora_gradients=gradients, balance=False)
        changes["PSILoRA, default step"].append(float((new[0] @ new[1] - B @ A).norm()))
    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for (name, values), colour in zip(changes.items(), ("C3", "C0"), strict=True):
        axes.plot(scales, [value / values[6] for value in values], "o-", color=colour, label=name, ms=4)
    axes.set(xscale="log", yscale="log", xlabel="t, with B/t and t·A", ylabel="‖ΔW after − before‖, over that at t = 1")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    _save(figure, "split")


def spectrum() -> None:
    """Singular values of one step: in proportion to the gradient's, or all alike."""
    generator = torch.Generator().manual_seed(0)
    B, A = (torch.randn(size, generator=generator, dtype=torch.float64) / 3 for size in ((48, RANK), (RANK, 40)))
    X = torch.randn(200, 40, generator=generator).double()
    S = X @ power_law(48, 40, generator).mT * 3
    G = S.mT @ X / 200
    gradients = G @ A.mT, B.mT @ G
    settings = {"step": "gradient", "momentum": 0.0, "prox": 0.0}
    plain = functional.step(B, A, functional.init(B, A, **settings), lr=0.1, activations=(X, S / 200), **settings)
    own = {"metric": None, "momentum": 0.0, "cap": None, "fade": False}
    spectral = functional.step(B, A, functional.init(B, A, **own), lr=0.1, lora_gradients=gradients, **own)
    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for name, new, colour in (("step='gradient'", plain, "C1"), ("step='spectral'", spectral, "C0")):
        values = torch.linalg.svdvals(new[0] @ new[1] - B @ A)[: 2 * RANK]
        axes.plot(range(1, len(values) + 1), (values / values[0]).tolist(), "o-", color=colour, label=name, ms=4)
    axes.set(xlabel="singular value of the change of ΔW", ylabel="over the largest", ylim=(0, 1.05))
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    _save(figure, "spectrum")


def _save(figure: plt.Figure, name: str) -> None:
    IMAGES.mkdir(exist_ok=True)
    figure.savefig(IMAGES / f"{name}.png", dpi=110, metadata={"Software": None})
    plt.close(figure)


FIGURES = (quality, rates, rounds, split, spectrum)

if __name__ == "__main__":
    for draw in FIGURES:
        draw()
