"""Which Triton comes with which torch, and what of the kernels it compiles: for guard, doctor and documents.

Imports neither of them.
"""

from __future__ import annotations

#: Triton that the Linux wheels of a torch with CUDA ask for, as their metadata on PyPI say.
BROUGHT = {
    (2, 6): (3, 2),
    (2, 7): (3, 3),
    (2, 8): (3, 4),
    (2, 9): (3, 5),
    (2, 10): (3, 6),
    (2, 11): (3, 6),
    (2, 12): (3, 7),
    (2, 13): (3, 7),
    (2, 14): (3, 8),
}
#: The first Triton that compiles the kernels at all.
OLDEST = (3, 3)
#: The first that compiles products in float64, see `runs`.
DOUBLE_PRODUCTS = (3, 5)

Release = tuple[int, int]


def release(version: str) -> Release:
    """Return the first two numbers of a version: (3, 6) of "3.6.0", (2, 13) of "2.13.0+cpu"."""
    major, minor = version.split(".")[:2]
    return int(major), int("".join(filter(str.isdigit, minor)))


def text(found: Release) -> str:
    """Return a release as it is written: "3.6"."""
    return f"{found[0]}.{found[1]}"


def too_old(version: str) -> str | None:
    """Return why a Triton cannot compile the kernels and which torch brings one that can, or None where it can."""
    if release(version) >= OLDEST:
        return None
    torch = next(torch for torch, triton in BROUGHT.items() if triton >= OLDEST)
    return f"Triton {version} is too old: {text(OLDEST)} or newer is needed, which torch {text(torch)} brings"


def runs(triton: Release) -> str:
    """Return in words which steps have kernels on CUDA with a Triton; the reference takes the others, with a warning.

    Spectral steps that differ from the default in structure (`joint=False`, `momentum=0`, `metric=None`, `num_iters`
    other than 1), and any on layers narrower than twice their rank, multiply in float64. So do the default's kernels on
    8.0, 9.0 and 10.0, which without it use pairs of fp32.
    """
    if triton < OLDEST:
        return "none"
    return "all" if triton >= DOUBLE_PRODUCTS else "gradient steps and the default's spectral step"


def table() -> list[tuple[str, str, str]]:
    """Return torch, the Triton it brings and `runs`, the oldest first."""
    return [(text(torch), text(triton), runs(triton)) for torch, triton in BROUGHT.items()]


def spans() -> list[tuple[str, str, str]]:
    """Return the same with releases of which the same runs together: "2.9 to 2.14"."""
    rows = table()
    found = []
    for steps in dict.fromkeys(steps for *_, steps in rows):
        torch, triton = ([row[i] for row in rows if row[2] == steps] for i in (0, 1))
        found.append((_span(torch), _span(triton), steps))
    return found


def _span(names: list[str]) -> str:
    return names[0] if names[0] == names[-1] else f"{names[0]} to {names[-1]}"
