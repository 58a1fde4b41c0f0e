"""The streaming kernels `xv` and `stz` over all layers of a model, as a share of the copy bandwidth (Triton only)."""

from __future__ import annotations

import functools

import torch

from bench.candidate import Candidate, Row
from bench.measure import bandwidth, measure
from bench.shapes import MODELS
from bench.suites import Settings
from bench.workload import Workload
from psilora.backends.dispatch import backend_unavailable

#: Tensor cores truncate their fp32 sums: a bias of up to 2.2e-5 over 14336 products; a wrong index is off by far more.
TOLERANCE = 1e-4


def run(settings: Settings) -> list[Row]:
    """Return the rows of all models; none where no kernel can run."""
    if backend_unavailable("triton") is not None:
        return []
    rate = bandwidth(settings.device)
    rows = []
    for name in settings.choice(cpu=("tiny",), cuda=("roberta-base", "llama-3-8b")):
        tokens = settings.tokens or (4096 if settings.device == "cuda" else 17)
        work = Workload(MODELS[name], tokens, settings.device, settings.dtype)
        case = f"{name}, r {work.model.rank}, {tokens} tokens"
        measured = measure(
            case, _candidates(work, rate), device=settings.device, repeats=settings.repeats, seconds=settings.seconds
        )
        rows += [{"model": name, "tokens": tokens, **row} for row in measured]
    return rows


def _candidates(work: Workload, rate: float) -> list[Candidate]:
    from psilora.triton_kernels.stz import STZPlan
    from psilora.triton_kernels.xv import XVPlan

    factors = [A.detach() for A, _ in work.pairs()]
    P = [torch.full((work.tokens, work.model.rank), float("nan"), device=work.device) for _ in factors]
    H = [torch.full((s.shape[1], work.model.rank), float("nan"), device=work.device) for s in work.S]
    shrink = XVPlan(work.X, factors, P)
    expand = STZPlan(work.S, P, list(range(len(P))), H)
    shrink.table.upload()
    expand.table.upload()

    def error(name: str) -> float:
        shrink.launch()
        expand.launch()
        worst = 0.0
        for i in work.sample():
            if name == "xv":
                got, want = P[i], work.X[i].double() @ factors[i].double().mT
            else:
                got, want = H[i], work.S[i].double().mT @ P[i].double()
            worst = max(worst, float((got.double() - want).norm() / want.norm()))
        return worst

    found = []
    shared = {x.data_ptr(): x.nbytes for x in work.X}
    for name, plan, read, out in (
        ("xv", shrink, sum(shared.values()), P),
        ("stz", expand, sum(s.nbytes for s in work.S), H),
    ):
        moved = read + sum(t.nbytes for t in (*P, *(out if name == "stz" else ())))
        facts = {"bytes": moved, "floor_ms": 1e3 * moved / rate}
        check = functools.partial(error, name)
        found.append(Candidate(name, plan.launch, check, TOLERANCE, calls=(plan.launch,), facts=facts, count=False))
    return found
