"""LoRSum against every way to truncate one sum of low-rank matrices: time and relative excess error.

The sum is T = B·A − c·SᵀX with rank-r factors and N tokens, c such that both parts have the same Frobenius norm: far
more than a step changes, so that the methods differ. The excess is ‖T − Ŵ‖_F / ‖T − T_r‖_F − 1 over the best rank-r
T_r, in float64. Dense methods are given T; forming it is timed apart.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import minilm
from bench.candidate import Candidate, Row
from bench.measure import measure
from bench.shapes import Model
from bench.suites import Settings
from bench.workload import Workload
from psilora import PSILoRA, lorsum
from psilora.backends.dispatch import backend_unavailable

ITERATIONS = (1, 2, 4, 8, 16)
#: Of an fp32 result against the same method in float64, and of an excess below zero.
TOLERANCE = 1e-3
RANK = 8


@dataclass
class Problem:
    """One sum; `T` and `best` (the error of the best rank-r matrix) are in float64."""

    B: Tensor
    A: Tensor
    X: Tensor
    S: Tensor
    c: float
    T: Tensor
    best: float

    def excess(self, left: Tensor, right: Tensor) -> float:
        """Relative excess error of left·right over the optimum."""
        return float((self.T - left.double() @ right.double()).norm()) / self.best - 1

    def wide(self) -> Problem:
        """The same sum in float64."""
        B, A, X, S = (t.double() for t in (self.B, self.A, self.X, self.S))
        return Problem(B, A, X, S, self.c, self.T, self.best)


def make_problem(kind: str, d_out: int, d_in: int, tokens: int, rank: int, device: str) -> Problem:
    """Return a sum whose gradient is Gaussian, of a power-law spectrum (σ_i = 1/i), or a real one of MiniLM."""
    torch.manual_seed(0)
    if kind == "real":
        X, S = minilm.gradient(small=d_in < 384, tokens=tokens)
        X, S = X.to(device), S.to(device)
    elif kind == "power law":
        k = min(d_out, d_in, tokens)
        left, right, shared = (
            torch.linalg.qr(torch.randn(n, k, device=device, dtype=torch.float64))[0] for n in (d_out, d_in, tokens)
        )
        root = torch.arange(1, k + 1, device=device, dtype=torch.float64) ** -0.5
        X, S = ((shared * root) @ factor.mT for factor in (right, left))
    else:
        X, S = torch.randn(tokens, d_in, device=device), torch.randn(tokens, d_out, device=device)
    X, S = X.float(), S.float()
    B, A = torch.randn(S.shape[1], rank, device=device), torch.randn(rank, X.shape[1], device=device)
    G = S.double().mT @ X.double()
    c = float((B.double() @ A.double()).norm() / G.norm())
    T = B.double() @ A.double() - c * G
    tail = torch.linalg.svdvals(T)[rank:]
    return Problem(B, A, X, S, c, T, float(tail.norm()))


def run(settings: Settings) -> list[Row]:
    """Return the rows of all targets and sizes."""
    rows: list[Row] = []
    for kind, d_out, d_in, tokens in _cases(settings):
        problem = make_problem(kind, d_out, d_in, tokens, min(RANK, d_in // 4), settings.device)
        d_out, d_in = problem.T.shape
        case = f"{kind}, {d_out} x {d_in}, {len(problem.X)} tokens, r {problem.A.shape[0]}"
        candidates = list(_candidates(problem, settings))
        for row in measure(
            case, candidates, device=settings.device, repeats=settings.repeats, seconds=settings.seconds
        ):
            rows.append({"target": kind, "d_out": d_out, "d_in": d_in, "tokens": len(problem.X), **row})
    return rows


def _cases(settings: Settings) -> Iterator[tuple[str, int, int, int]]:
    if settings.small:
        sizes = [(48, 40, 64)]
    elif settings.device == "cuda":
        sizes = [(256, 256, 1024), (768, 768, 1024), (4096, 4096, 4096), (4096, 14336, 4096)]
    else:
        sizes = [(256, 256, 1024), (768, 768, 1024), (1024, 4096, 1024)]
    for d_out, d_in, tokens in sizes:
        yield "Gaussian", d_out, d_in, tokens
        yield "power law", d_out, d_in, tokens
    if settings.small:
        yield "real", 32, 32, 64
    elif minilm.available():
        yield "real", 384, 384, 1024


Method = Callable[[Problem], tuple[Tensor, Tensor]]


def _candidates(problem: Problem, settings: Settings) -> Iterator[Candidate]:
    for K in ITERATIONS:
        yield _candidate(f"LoRSum, K={K} (reference)", functools.partial(_lorsum, K), problem)
    for powers in (1, 2, 4):
        yield _candidate(f"Rayleigh-Ritz, {powers} powers", functools.partial(rayleigh_ritz, powers), problem)
    dense = problem.T.float()
    yield _dense("form T", lambda T: (T, torch.eye(T.shape[1], device=T.device)), problem, dense, forming=True)
    for driver in ("gesvd", "gesvdj", "gesvda") if settings.device == "cuda" else (None,):
        name = "torch.linalg.svd" + (f", {driver}" if driver else "")
        yield _dense(name, functools.partial(_svd, problem.A.shape[0], driver), problem, dense, optimal=True)
    yield _dense("torch.svd_lowrank", functools.partial(_svd_lowrank, problem.A.shape[0]), problem, dense)
    if backend_unavailable("triton") is None:
        for K in ITERATIONS[:1] if settings.small else ITERATIONS:
            yield _triton(problem, K, settings)


def _candidate(name: str, method: Method, problem: Problem) -> Candidate:
    left, right = method(problem)
    exact = method(problem.wide())
    product = exact[0] @ exact[1]
    difference = float((left.double() @ right.double() - product).norm() / product.norm())
    facts = {"excess": problem.excess(left, right)}
    run, check = functools.partial(method, problem), functools.partial(_sane, difference, facts["excess"])
    return Candidate(name, run, check, TOLERANCE, calls=(run,), facts=facts, count=False)


def _dense(
    name: str,
    method: Callable[[Tensor], tuple[Tensor, Tensor]],
    problem: Problem,
    T: Tensor,
    *,
    optimal: bool = False,
    forming: bool = False,
) -> Candidate:
    facts: Row = {} if forming else {"excess": problem.excess(*method(T))}
    difference = float((form(problem).double() - problem.T).norm() / problem.T.norm()) if forming else 0.0
    if optimal:
        difference = abs(facts["excess"])
    run = functools.partial(form, problem) if forming else functools.partial(method, T)
    check = functools.partial(_sane, difference, facts.get("excess", 0.0))
    return Candidate(name, run, check, TOLERANCE, facts=facts, count=False)


def _sane(difference: float, excess: float) -> float:
    """The larger of a method's rounding and of the amount by which it would beat the optimum, which none can."""
    return max(difference, -excess)


def form(problem: Problem) -> Tensor:
    """T as a matrix."""
    return torch.addmm(problem.B @ problem.A, problem.S.mT, problem.X, alpha=-problem.c)


def _lorsum(K: int, problem: Problem) -> tuple[Tensor, Tensor]:
    return lorsum(((problem.B, problem.A), (problem.S.mT, problem.X)), (1.0, -problem.c), num_iters=K)


def rayleigh_ritz(powers: int, problem: Problem) -> tuple[Tensor, Tensor]:
    """Return Q·(QᵀT) for an orthonormal basis Q of T(TᵀT)^(powers−1)Aᵀ, from thin products alone."""
    rows = problem.A
    for _ in range(powers):
        basis = rows.mT if rows is problem.A else torch.linalg.qr(rows.mT)[0]
        product = problem.B @ (problem.A @ basis) - problem.c * (problem.S.mT @ (problem.X @ basis))
        Q = torch.linalg.qr(product)[0]
        rows = (Q.mT @ problem.B) @ problem.A - problem.c * ((problem.S @ Q).mT @ problem.X)
    return Q, rows


def _svd(rank: int, driver: str | None, T: Tensor) -> tuple[Tensor, Tensor]:
    U, sigma, Vh = torch.linalg.svd(T, full_matrices=False, driver=driver)
    return U[:, :rank] * sigma[:rank], Vh[:rank]


def _svd_lowrank(rank: int, T: Tensor) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    U, sigma, V = torch.svd_lowrank(T, q=rank, niter=2)
    return U * sigma, V.mT


def _triton(problem: Problem, K: int, settings: Settings) -> Candidate:
    """LoRSum as the optimizer runs it: a step of rate c without momentum or prox."""
    d_out, d_in = problem.T.shape
    work = Workload(
        Model("sum", problem.A.shape[0], ((d_out, d_in, 0),)), len(problem.X), settings.device, torch.float32
    )
    work.X, work.S = [problem.X], [problem.S]

    def stepping(part: Workload) -> PSILoRA:
        return PSILoRA(part.adapters, problem.c, step="gradient", num_iters=K, momentum=0.0, prox=0.0, backend="triton")

    def started() -> Workload:
        part = work.copy()
        with torch.no_grad():
            for (A, B), new_A, new_B in zip(part.pairs(), [problem.A], [problem.B], strict=True):
                A.copy_(new_A)
                B.copy_(new_B)
        part.set_gradients()
        return part

    trial = started()
    optimizer = stepping(trial)
    trial.prime(optimizer)
    optimizer.step()
    A, B = trial.pairs()[0]
    facts = {"excess": problem.excess(B.detach(), A.detach())}
    left, right = _lorsum(K, problem.wide())
    difference = float((trial.weights()[0] - left @ right).norm() / (left @ right).norm())
    timed = started()
    again = stepping(timed)
    return Candidate(
        f"LoRSum, K={K} (triton)",
        again.step,
        functools.partial(_sane, difference, facts["excess"]),
        TOLERANCE,
        before=functools.partial(timed.prime, again),
        facts=facts,
        count=False,
    )
