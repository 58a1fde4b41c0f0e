"""dA and dB recomputed from what was captured, against autograd's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from psilora import PSILoRA
from psilora.adapters import LoRAPair

#: Settings of PEFT's LoRA that a capture must not notice.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dropout": {"lora_dropout": 0.3},
    "dora and dropout": {"use_dora": True, "lora_dropout": 0.3},
    "lora_bias": {"lora_bias": True},
}


def captured_gradients(optimizer: PSILoRA, pair: LoRAPair, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """dA = (S_B·B)ᵀX and dB = S_Bᵀ(XAᵀ) of a pair, in `dtype` or that of its factors."""
    record = optimizer._capture.record(pair)
    assert record is not None and record.captured
    A, B = (pair.A, pair.B) if dtype is None else (pair.A.to(dtype), pair.B.to(dtype))
    chunks = [(x.to(B.dtype), s.to(B.dtype)) for x, s in record.chunks]
    assert chunks
    dA = sum((s @ B).mT @ x for x, s in chunks)
    return dA, sum(s.mT @ (x @ A.mT) for x, s in chunks)


def assert_exact(optimizer: PSILoRA, tolerance: float = 1e-12) -> None:
    """Assert that every pair's capture gives its `.grad`."""
    pairs = list(optimizer._pairs.values())
    assert pairs
    for pair in pairs:
        dA, dB = captured_gradients(optimizer, pair)
        assert dB.norm() > 0 and dA.norm() > 0
        torch.testing.assert_close(dA, pair.lora_A.grad.flatten(1), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(dB, pair.lora_B.grad.flatten(1), rtol=tolerance, atol=tolerance)
