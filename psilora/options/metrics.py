"""The metrics that each kind of step knows, one row each; `psilora.steps.gradient.metrics` holds their mathematics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MetricRow:
    """One metric.

    Attributes:
        step: The kind of step that knows it.
        statistics: What it is made from: "kfac" (XᵀX and SᵀS), "shampoo" (GᵀG and GGᵀ), "lora" (the LoRA gradients).
        form: How much of the two matrices is kept: "diagonal", "dense" or "low-rank".
        sums: What is summed over the rows in backward where they are not kept: "squares", "products" or None.
        gradients: The values of `gradient=` that it can be used with; () for all.
        shared: Whether several processes can sum what it needs of captured activations, as thin sums.
        kernels: Whether the Triton kernels take it.
    """

    step: str
    statistics: str
    form: str = "diagonal"
    sums: str | None = None
    gradients: tuple[str, ...] = ()
    shared: bool = True
    kernels: bool = False


METRIC_ROWS: dict[str, MetricRow] = {
    "lora": MetricRow("spectral", "lora", kernels=True),
    "kfac": MetricRow("gradient", "kfac", sums="squares", kernels=True),
    "shampoo": MetricRow("gradient", "shampoo", shared=False, kernels=True),
    "kfac-dense": MetricRow("gradient", "kfac", "dense", sums="products"),
    "shampoo-dense": MetricRow("gradient", "shampoo", "dense", shared=False),
    "kfac-low-rank": MetricRow("gradient", "kfac", "low-rank", sums="products", gradients=("exact",)),
}


def metrics_of(step: str) -> tuple[str | None, ...]:
    """Return what `metric=` may be with a kind of step."""
    return (None, *(name for name, row in METRIC_ROWS.items() if row.step == step))


#: The metrics that each kind of step knows.
METRICS = {"gradient": metrics_of("gradient"), "spectral": metrics_of("spectral")}
#: Largest width of a layer under a dense metric: at 4096 its state is 64 MiB a side, its eigenvectors seconds of a CPU.
DENSE_LIMIT = 4096
