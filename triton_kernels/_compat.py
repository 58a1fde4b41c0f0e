"""The only place that imports Triton: whether a usable one is there, and whether its interpreter is on.

Importing `triton`, `tl` or what depends on it from here without a usable Triton raises ImportError with the reason, so
a module with kernels needs no guard of its own and its users ask `available()` before they import it.
"""

from __future__ import annotations

import os
from typing import Any

from psilora.triton_kernels import releases

__all__ = ["DOUBLE_PRODUCTS", "INTERPRET", "available", "interpreted", "tl", "triton", "unavailable_reason"]

_REASON: str | None = None

try:
    import numpy  # noqa: F401  (the tables of addresses are built with it)
    import triton
    import triton.language as tl
except ImportError as error:
    _REASON = f"{'numpy' if error.name == 'numpy' else 'Triton'} cannot be imported: {error}"
else:
    _REASON = releases.too_old(triton.__version__)
    if _REASON is not None:
        del triton, tl
    else:
        #: Whether products in float64 compile; `backend="auto"` finds out for itself which kernels do not.
        DOUBLE_PRODUCTS = releases.release(triton.__version__) >= releases.DOUBLE_PRODUCTS
        #: Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1, read when a kernel is defined).
        _KNOBS = getattr(triton, "knobs", None)  # from 3.4 on
        INTERPRET = tl.constexpr(
            bool(_KNOBS.runtime.interpret) if _KNOBS else os.environ.get("TRITON_INTERPRET", "0") == "1"
        )


def available() -> bool:
    """Whether Triton can be used (`unavailable_reason` says why not)."""
    return _REASON is None


def unavailable_reason() -> str | None:
    """Return why Triton cannot be used, or None where it can."""
    return _REASON


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return _REASON is None and bool(INTERPRET.value)


def __getattr__(name: str) -> Any:
    if name in {"triton", "tl", "INTERPRET", "DOUBLE_PRODUCTS"}:
        raise ImportError(f"psilora.triton_kernels: {_REASON}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
