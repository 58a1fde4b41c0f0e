"""Inputs that several layers cast from one tensor are kept once, in the narrowest dtype they passed through."""

from __future__ import annotations

import pytest
import torch
from captures import held
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from psilora import PSILoRA
from psilora.capture.casts import origin_of

BF16, F32 = torch.bfloat16, torch.float32
ROWS, WIDTH = 48, 32


class Attention(nn.Module):
    """Three projections of one input, which has a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.checkpointed = False

    def mix(self, x: Tensor) -> Tensor:
        return self.q(x) * self.k(x) + self.v(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return checkpoint(self.mix, x, use_reentrant=False) if self.checkpointed else self.mix(x)


def captured(base: torch.dtype, adapters: torch.dtype, *, autocast: bool = False, **settings: object) -> PSILoRA:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q", "k", "v"], lora_dropout=settings.get("dropout", 0.0))
    attention = Attention().to(base)
    attention.checkpointed = bool(settings.get("checkpointed", False))
    model = get_peft_model(attention, config, autocast_adapter_dtype=False).train()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape).to(adapters) * 0.1
    optimizer = PSILoRA(model, 0.1, step="gradient")
    x = torch.randn(ROWS, WIDTH, dtype=base).requires_grad_()
    with torch.autocast("cpu", dtype=BF16, enabled=autocast):
        loss = model(x).float().square().mean()
    loss.backward()
    return optimizer


def storages(optimizer: PSILoRA) -> set[int]:
    return {x.untyped_storage().data_ptr() for r in optimizer.captured() for x, _ in r.chunks}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(("base", "adapters", "autocast"), [(BF16, F32, False), (F32, F32, True), (BF16, F32, True)])
def test_q_k_and_v_keep_one_16_bit_copy(
    base: torch.dtype, adapters: torch.dtype, autocast: bool, checkpointed: bool
) -> None:
    """Each holds a cast of its own: three copies of X, in fp32 without autocast, if they are kept as they are."""
    optimizer = captured(base, adapters, autocast=autocast, checkpointed=checkpointed)
    assert len(storages(optimizer)) == 1
    S = 2 if autocast else 4
    assert optimizer.capture_bytes() == ROWS * WIDTH * (2 + 3 * S)
    for pair, record in held(optimizer):
        ((x, s),) = record.chunks
        assert x.dtype == BF16
        expected = s.double().mT @ (x.double() @ pair.A.double().mT)
        error = (pair.lora_B.grad.double() - expected).norm() / expected.norm()
        assert error < (2e-2 if autocast else 1e-6)  # narrowing lost nothing; under autocast dB itself is 16-bit
    optimizer.step()  # the first capture is checked against .grad


def test_inputs_that_differ_are_kept_apart() -> None:
    assert len(storages(captured(BF16, F32, dropout=0.5))) == 3


def test_origins() -> None:
    leaf = torch.randn(3, requires_grad=True)
    source = leaf * 2
    assert origin_of(leaf) is None and origin_of(source) is None and origin_of(torch.randn(3).to(BF16)) is None
    once, again, back = source.to(BF16), source.to(BF16), source.to(BF16).float()
    assert origin_of(once) == origin_of(again) != origin_of((leaf * 2).to(BF16))
    assert origin_of(once).dtype == origin_of(back).dtype == BF16
    assert origin_of(back) != origin_of(once)  # other casts, though of one tensor
    assert origin_of(source.double()).dtype == F32
    assert origin_of(leaf.double()) == origin_of(leaf.double())
    first, second = (part.to(BF16) for part in torch.stack([source, source]).unbind())
    assert origin_of(first) != origin_of(second)
