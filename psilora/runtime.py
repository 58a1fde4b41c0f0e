"""Where this code runs: the line of the program that called it, and what a device lets the host do."""

from __future__ import annotations

import inspect
import warnings

import torch


def warn(message: str) -> None:
    """Warn at the line that called into this package, outside it and torch's wrappers.

    Every time: it is for whoever warns, and not for the memory of Python's default filter, to say it once.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_back is not None and _package(frame.f_globals) in ("psilora", "torch"):
        frame = frame.f_back
    if frame is not None:
        name = str(frame.f_globals.get("__name__"))
        warnings.warn_explicit(f"psilora: {message}", UserWarning, frame.f_code.co_filename, frame.f_lineno, name)


def _package(names: dict[str, object]) -> str:
    return str(names.get("__name__", "")).partition(".")[0]


def capturing(device: torch.device) -> bool:
    """Whether what is launched on a device goes into a CUDA graph instead of being run."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def at_hand(device: torch.device) -> bool:
    """Whether the host can look at a number on a device without waiting for it."""
    return device.type == "cpu"
