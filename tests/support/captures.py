"""dA and dB recomputed from what was captured, against autograd's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from psilora import PSILoRA
from psilora.capture import Captured
from psilora.monitor.summary import PairInfo

#: Settings of PEFT's LoRA that a capture must not notice.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dropout": {"lora_dropout": 0.3},
    "dora and dropout": {"use_dora": True, "lora_dropout": 0.3},
    "lora_bias": {"lora_bias": True},
}


def held(optimizer: PSILoRA) -> list[tuple[PairInfo, Captured]]:
    """Every pair with what is held of it, X and S of every call."""
    found = list(zip(optimizer.pairs(), optimizer.captured(), strict=True))
    assert found and all(captured.calls == len(captured.chunks) > 0 for _, captured in found)
    return found


def captured_gradients(pair: PairInfo, captured: Captured, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """dA = (S_B·B)ᵀX and dB = S_Bᵀ(XAᵀ) of a pair, in `dtype` or that of its factors."""
    A, B = (pair.A, pair.B) if dtype is None else (pair.A.to(dtype), pair.B.to(dtype))
    chunks = [(x.to(B.dtype), s.to(B.dtype)) for x, s in captured.chunks]
    dA = sum(((s @ B).mT @ x for x, s in chunks), torch.zeros_like(A))
    return dA, sum((s.mT @ (x @ A.mT) for x, s in chunks), torch.zeros_like(B))


def scales_and_residuals(optimizer: PSILoRA, scaled: bool = True) -> dict[str, tuple[float, float]]:
    """Per pair, the c and ‖dB − c·S_Bᵀ(XAᵀ)‖ / ‖dB‖ of the best c, or of c = 1 unless `scaled`."""
    found = {}
    for pair, captured in held(optimizer):
        own, dB = captured_gradients(pair, captured)[1], pair.lora_B.grad
        assert dB is not None
        if not own.any() and not dB.any():  # as where every reward of a group is the same
            found[pair.name] = 1.0, 0.0
            continue
        scale = float((own * dB).sum() / own.square().sum()) if scaled else 1.0
        found[pair.name] = scale, float((own * scale - dB).norm() / dB.norm())
    return found


def assert_exact(optimizer: PSILoRA, tolerance: float = 1e-12) -> None:
    """Assert that every pair's capture gives its `.grad`."""
    for pair, captured in held(optimizer):
        dA, dB = captured_gradients(pair, captured)
        assert dB.norm() > 0 and dA.norm() > 0
        torch.testing.assert_close(dA, pair.lora_A.grad.flatten(1), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(dB, pair.lora_B.grad.flatten(1), rtol=tolerance, atol=tolerance)
