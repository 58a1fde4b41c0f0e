"""The goals of the project's speed: each looks up its figure in the results and is met, not met, or not measurable."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bench.candidate import Row

Records = Mapping[str, Mapping[str, Any]]
GPU = "H200"


@dataclass(frozen=True)
class Target:
    """A goal. `figure` returns the figure of a set of records, or None where they do not hold it.

    Attributes:
        at_least: Whether the figure must be at least `bound` (else at most).
        why: What stands in the way where it is not met.
    """

    where: str
    what: str
    bound: float
    unit: str
    figure: Callable[[Records], float | None]
    at_least: bool = False
    why: str = ""

    def verdict(self, records: Records, gpu: bool) -> Row:
        """Return the row of the table of goals."""
        figure = self.figure(records) if (self.where == "CPU") != gpu else None
        goal = f"{'≥' if self.at_least else '≤'} {self.bound:g}{self.unit}"
        if figure is None:
            status = "not measurable: no such GPU" if self.where == GPU else "not measured"
            return {"where": self.where, "what": self.what, "goal": goal, "figure": "–", "status": status}
        met = figure >= self.bound if self.at_least else figure <= self.bound
        status = "met" if met else "not met" + (f": {self.why}" if self.why else "")
        shown = f"{figure:.3g}{self.unit}"
        return {"where": self.where, "what": self.what, "goal": goal, "figure": shown, "status": status}


def rows_of(records: Records, suite: str) -> list[Row]:
    """Return a suite's rows, none where it has not been run."""
    return list(records.get(suite, {}).get("rows", []))


def value(records: Records, suite: str, field: str, method: str, **match: Any) -> float | None:
    """Return one field of the row of a method whose other fields match."""
    for row in rows_of(records, suite):
        if row["method"] == method and all(row.get(k) == v for k, v in match.items()) and field in row:
            return float(row[field])
    return None


def ratio(over: float | None, under: float | None) -> float | None:
    """Return a quotient of two figures, if there are both."""
    return None if over is None or under is None else over / under


def _faster(suite: str, slow: str, fast: str, **match: Any) -> Callable[[Records], float | None]:
    return lambda records: ratio(value(records, suite, "ms", slow, **match), value(records, suite, "ms", fast, **match))


def _field(suite: str, field: str, method: str, **match: Any) -> Callable[[Records], float | None]:
    return lambda records: value(records, suite, field, method, **match)


def _slowest_solve(device_method: str) -> Callable[[Records], float | None]:
    def figure(records: Records) -> float | None:
        found = []
        for row in rows_of(records, "solve"):
            match = {key: row[key] for key in ("rank", "systems", "columns", "dtype")}
            if row["systems"] == 224 and row["rank"] <= 32 and row["dtype"] == "float32":
                found.append(_faster("solve", "cholesky_ex + cholesky_solve", device_method, **match)(records))
        known = [f for f in found if f is not None]
        return min(known) if known else None

    return figure


def _converged_lorsum(records: Records) -> float | None:
    """How much faster than the fastest SVD the first K with an excess of at most 1e-3 is, at 4096²."""
    rows = [r for r in rows_of(records, "lorsum") if r.get("d_out") == r.get("d_in") == 4096 and "ms" in r]
    svds = [r["ms"] for r in rows if "linalg.svd" in r["method"]]
    good = [r["ms"] for r in rows if "LoRSum" in r["method"] and r["excess"] <= 1e-3]
    return min(svds) / min(good) if svds and good else None


def targets() -> Iterator[Target]:
    """Yield all goals."""
    for model in ("minilm", "roberta-base"):
        mine, loop = "PSILoRA exact, momentum (reference)", "per-layer loop, exact, momentum"
        yield Target(
            "CPU", f"step with momentum against the per-layer loop, {model}", 1.5, "×",
            _faster("step", loop, mine, model=model), at_least=True,
        )  # fmt: skip
        yield Target(
            "CPU", f"tangent step against foreach AdamW, {model}", 3, "×",
            _faster("step", "PSILoRA tangent (reference)", "AdamW, foreach", model=model),
            why="about 30 dependent passes over the stacked factors and their page faults against AdamW's 10",
        )  # fmt: skip
    for target in ("Gaussian", "power law"):
        yield Target(
            "CPU", f"LoRSum K=2 against torch.linalg.svd, 768², 1,024 tokens, {target}", 30, "×",
            _faster("lorsum", "torch.linalg.svd", "LoRSum, K=2 (reference)", d_out=768, d_in=768, target=target),
            at_least=True,
            why="X and S are read four times each, which is 2.4 of its 3 ms of one core, against 67 to 69 of the SVD",
        )  # fmt: skip
    yield Target(
        "CPU", "native solve against cholesky_ex + cholesky_solve, 224 systems, r ≤ 32, worst shape", 5, "×",
        _slowest_solve("psilora native"), at_least=True,
        why="r 4 with 4 columns takes 0.04 ms in all; fp64 with 768 columns is at 2.2× (r 32), others at 2 to 13×",
    )  # fmt: skip
    yield from _host_targets()
    yield from _gpu_targets()


def _host_targets() -> Iterator[Target]:
    """What a step on the kernels launches, and what it costs the host beside fused AdamW; no GPU is needed for it."""
    first = {"model": "llama-3-8b"}
    fixed, changing = "exact, momentum, fixed N", "exact, momentum, N changing every step"
    for kind, bound in (
        ("spectral", 10), ("spectral, bf16 adapters", 12), ("spectral, max_grad_norm", 14), ("tangent, momentum", 15),
        (fixed, 20),
    ):  # fmt: skip
        found = _field("host", "aten_launches", f"PSILoRA {kind}", **first)
        yield Target("CPU", f"PyTorch launches of a step, Llama-3-8B, {kind}", bound, "", found)
    for kind, most in (("spectral", 1.5), (fixed, 2.5), (changing, 3.0)):
        found = _field("host", "host_ratio", f"PSILoRA {kind}", **first)
        yield Target(
            "CPU", f"the host's time over that of fused AdamW, Llama-3-8B, {kind}", most, "×", found,
            why="X and S of every layer are new in every step, and what is kept of them lies outside the caches",
        )  # fmt: skip
    for model in ("llama-3-8b", "llama-3-8b-r64"):
        yield Target(
            "CPU", f"workspace over state of a spectral step, {model}", 0.2, "×",
            _field("host", "workspace_ratio", "PSILoRA spectral", model=model),
            why="the small matrices of all layers are held at once; in turns, a launch would fill less of a GPU",
        )  # fmt: skip


def _gpu_targets() -> Iterator[Target]:
    llama, roberta = {"model": "llama-3-8b"}, {"model": "roberta-base"}
    for kernel in ("xv", "stz"):
        yield Target(GPU, f"{kernel} over the copy bandwidth, Llama-3-8B", 0.85, "",
                     _field("products", "of_floor", kernel, **llama), at_least=True)  # fmt: skip
    for kind, bound in (("exact", 6.2), ("exact, momentum", 12), ("tangent", 0.5)):
        mine = _field("step", "ms", f"PSILoRA {kind} (triton)", **llama)
        yield Target(GPU, f"{kind} step, Llama-3-8B r 16, 4,096 tokens", bound, " ms", mine)
    yield Target(GPU, "exact, momentum step, RoBERTa-base q, v", 0.25, " ms",
                 _field("step", "ms", "PSILoRA exact, momentum (triton)", **roberta))  # fmt: skip
    for name, match, bound in (("Llama-3-8B", llama, 15), ("RoBERTa-base", roberta, 80)):
        speed_up = _faster("step", "per-layer loop, exact, momentum", "PSILoRA exact, momentum (triton)", **match)
        yield Target(GPU, f"step with momentum against the per-layer loop, {name}", bound, "×", speed_up, at_least=True)
    yield Target(GPU, "LoRSum K=2 against torch.linalg.svd, 4096²", 1000, "×",
                 _faster("lorsum", "torch.linalg.svd, gesvdj", "LoRSum, K=2 (triton)", d_out=4096, d_in=4096),
                 at_least=True)  # fmt: skip
    yield Target(GPU, "LoRSum at an excess ≤ 1e-3 against the fastest SVD, 4096²", 100, "×",
                 _converged_lorsum, at_least=True)  # fmt: skip
    yield Target(GPU, "Triton solve against cholesky_ex + cholesky_solve, 224 systems, r ≤ 32, worst shape", 5, "×",
                 _slowest_solve("Triton L^-1, two products"), at_least=True)  # fmt: skip
    for kind, bound in (("exact", 1.04), ("tangent", 1.01)):
        yield Target(GPU, f"whole training step, {kind}, over AdamW's", bound, "×",
                     _faster("train", f"PSILoRA {kind}", "AdamW"))  # fmt: skip
    yield Target(GPU, "peak memory of a tangent training step over AdamW's", 1.01, "×", _tangent_peak)


def _tangent_peak(records: Records) -> float | None:
    peaks = (value(records, "train", "peak_bytes", method) for method in ("PSILoRA tangent", "AdamW"))
    return ratio(*peaks)


def verdicts(records: Records) -> list[Row]:
    """Return the table of goals for the records of one machine."""
    device = str(next(iter(records.values()), {}).get("device", ""))
    return [target.verdict(records, gpu=GPU in device) for target in targets()]
