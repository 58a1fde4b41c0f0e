"""The metrics that each kind of step knows."""

from __future__ import annotations

#: The metrics that each kind of step knows.
METRICS = {
    "gradient": (None, "kfac", "shampoo", "kfac-dense", "shampoo-dense", "kfac-low-rank"),
    "spectral": (None, "lora"),
}
#: Largest width of a layer under a dense metric: at 4096 its state is 64 MiB a side, its eigenvectors seconds of a CPU.
DENSE_LIMIT = 4096
