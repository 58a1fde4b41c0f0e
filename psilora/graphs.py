"""CUDA graphs."""

from __future__ import annotations

import torch


def capturing(device: torch.device) -> bool:
    """Whether what is launched on a device goes into a CUDA graph instead of being run."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
