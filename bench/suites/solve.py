"""Batched r×r solves: psilora's native operator and Triton factor against torch's Cholesky, on the optimizer's shapes.

`psilora.linalg.spd.spd_solve` is the plain-PyTorch solve with the repair ladder, which the native operator replaces on
the CPU where this suite says that it is faster (`psilora.linalg.spd` names the ranks).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.candidate import Candidate, Row
from bench.measure import measure
from bench.suites import Settings
from psilora.backends.dispatch import backend_unavailable
from psilora.backends.triton.launch import PADDED_RANKS
from psilora.linalg import native, spd

RANKS = (4, 8, 16, 32, 64, 128)
COUNTS = (1, 24, 224, 1000)
#: Errors in units of torch's own on the same systems, of which rounding alone makes a few; see the check.
ALLOWED = 8.0
LARGEST = 1e7  # numbers in a right-hand side
DTYPES = (torch.float32, torch.float64)

Solve = Callable[[Tensor, Tensor], Tensor]


def run(settings: Settings) -> list[Row]:
    """Return the rows of all ranks, counts and widths."""
    rows = []
    for dtype, rank, count, columns in _cases(settings):
        gram, rhs = problem(rank, count, columns, dtype, settings.device)
        candidates = _candidates(gram, rhs, settings)
        name = str(dtype).removeprefix("torch.")
        case = f"{count} systems, r {rank}, {columns} columns, {name}"
        measured = measure(
            case, candidates, device=settings.device, repeats=settings.repeats, seconds=settings.seconds / 20
        )
        rows += [{"dtype": name, "rank": rank, "systems": count, "columns": columns, **row} for row in measured]
    return rows


def _cases(settings: Settings) -> Iterator[tuple[torch.dtype, int, int, int]]:
    """The right-hand side is square, and as wide as a factor of a layer where memory allows."""
    if settings.small:
        yield from ((dtype, 4, 3, 20) for dtype in DTYPES)
        return
    for dtype in DTYPES:
        for rank in RANKS:
            for count in COUNTS if dtype == torch.float32 else COUNTS[2:3]:
                for columns in dict.fromkeys((rank, 768)):
                    if count * rank * columns <= LARGEST:
                        yield dtype, rank, count, columns


def problem(rank: int, count: int, columns: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Return well-conditioned systems (L, r, r) and right-hand sides (L, r, n)."""
    generator = torch.Generator().manual_seed(1000 * rank + columns)
    factor = torch.randn(count, rank, 4 * rank, generator=generator, dtype=dtype)
    gram = factor @ factor.mT / (4 * rank) + 1e-3 * torch.eye(rank, dtype=dtype)
    rhs = torch.randn(count, rank, columns, generator=generator, dtype=dtype)
    return gram.to(device), rhs.to(device)


def _candidates(gram: Tensor, rhs: Tensor, settings: Settings) -> list[Candidate]:
    solves: dict[str, Solve] = {
        "cholesky_ex + cholesky_solve": torch_solve,
        "psilora.linalg.spd": lambda g, b: spd.spd_solve(g, b)[0],
    }
    if native.available():
        solves["psilora native"] = lambda g, b: native.spd_solve(g, b)[0]
    if backend_unavailable("triton") is None and gram.dtype == torch.float32 and gram.shape[-1] <= PADDED_RANKS[-1]:
        solves["Triton L^-1, two products"] = triton_solve
    exact = torch.linalg.solve(gram.double(), rhs.double())
    own = max(relative(torch_solve(gram, rhs), exact), torch.finfo(torch.float32).eps)

    def error(solve: Solve) -> float:
        return relative(solve(gram, rhs), exact)

    copies = [(gram.clone(), rhs.clone()) for _ in range(8 if settings.device == "cuda" else 1)]
    return [
        Candidate(
            name,
            functools.partial(solve, gram, rhs),
            functools.partial(error, solve),
            ALLOWED * own,
            calls=[functools.partial(solve, *pair) for pair in copies],
            facts={"bytes": gram.nbytes + 2 * rhs.nbytes},
            count=False,
        )
        for name, solve in solves.items()
    ]


def relative(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖."""
    return float((got.double() - want).norm() / want.norm())


def torch_solve(gram: Tensor, rhs: Tensor) -> Tensor:
    """The library's way: cholesky_ex, which does not wait for the device, then cholesky_solve."""
    factor, _ = torch.linalg.cholesky_ex(gram)
    return torch.cholesky_solve(rhs, factor)


def triton_solve(gram: Tensor, rhs: Tensor) -> Tensor:
    """The kernel's explicit L⁻¹ at the padded rank, then L⁻ᵀ(L⁻¹ rhs), as the solve kernels use it."""
    from psilora.triton_kernels.spd import inverse_factors

    count, rank = gram.shape[:2]
    padded = next(p for p in PADDED_RANKS if p >= rank)
    wide = gram.new_zeros(count, padded, padded)
    wide[:, :rank, :rank] = gram
    ranks = torch.full((count,), rank, dtype=torch.int32, device=gram.device)
    inverse = inverse_factors(wide, ranks)[0][:, :rank, :rank]
    return inverse.mT @ (inverse @ rhs)
