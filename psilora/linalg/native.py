"""The compiled operator `torch.ops.psilora.spd_solve`: loading it, its fake kernel and a documented wrapper.

The extension is optional. Everything it does has a plain-PyTorch twin, so callers ask `available()` first.
"""

from __future__ import annotations

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor


def _load() -> str | None:
    """Load the library psilora/_C, which registers the operators; return why it is not there, or None."""
    candidates = [Path(__file__).parents[1] / f"_C{suffix}" for suffix in EXTENSION_SUFFIXES]
    library = next((path for path in candidates if path.exists()), None)
    if library is None:
        return "psilora was installed without its native extension (see PSILORA_BUILD_EXT)"
    try:
        torch.ops.load_library(library)
    except (OSError, RuntimeError) as error:
        return f"the native extension does not load with torch {torch.__version__}: {error}"
    return None


_UNAVAILABLE_REASON = _load()


def available() -> bool:
    """Whether the compiled operators are loaded (`unavailable_reason` says why not)."""
    return _UNAVAILABLE_REASON is None


def unavailable_reason() -> str | None:
    """Return why the compiled operators are not loaded, or None where they are."""
    return _UNAVAILABLE_REASON


def spd_solve(gram: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor]:
    """Solve `gram[l] @ x[l] = rhs[l]` for symmetric positive semidefinite systems, repairing failed pivots.

    Cholesky is tried on `gram` as it is, then with ridge_j = 8·r·eps·1024^(j−1)·max_i |gram_ii|, j = 1, 2, 3,
    on its diagonal; each system takes the first factorisation whose pivots are all positive and finite. The
    solution is exactly 0 where none is, and where the right-hand side is identically zero.

    Factorisation and substitution run in the dtype of the inputs. The result is bitwise reproducible and does
    not depend on the number of threads. Nothing is mutated, no host synchronisation takes place, and the
    operator is not differentiable: a backward through it raises.

    Args:
        gram: (L, r, r), 1 ≤ r ≤ 128, float32 or float64, any strides; only its lower triangle is read. The
            proximal weight is already on its diagonal.
        rhs: (L, r, n), same dtype and device, any strides.

    Returns:
        The solution (L, r, n), contiguous, and `info` (L,), int32: the number of failed attempts per system
        (0 clean, 1 to 3 repaired, 4 given up), 0 where the right-hand side is zero.

    Raises:
        RuntimeError: the extension is not available.
        TypeError: a dtype other than float32 or float64, or two different ones.
        ValueError: shapes that do not match, r outside [1, 128], or tensors on different devices.
    """
    if _UNAVAILABLE_REASON is not None:
        raise RuntimeError(f"psilora.native.spd_solve: {_UNAVAILABLE_REASON}")
    solution, info = torch.ops.psilora.spd_solve(gram, rhs)
    return solution, info


def _spd_solve_fake(gram: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor]:
    solution = torch.empty_like(rhs, memory_format=torch.contiguous_format)
    return solution, rhs.new_empty((rhs.shape[0],), dtype=torch.int32)


if available():
    torch.library.register_fake("psilora::spd_solve", _spd_solve_fake)
