"""Layouts of other libraries, and the registry through which more are added."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from models import bare, mse, train
from torch import Tensor, nn

from psilora import LoRALinear, PSILoRA
from psilora.adapters import Adapter, find_pairs, register, unregister

F64 = torch.float64
STEPS = [{"step": "spectral"}, {"step": "gradient", "gradient": "tangent", "momentum_rank": 2}]


class TorchtuneLinear(nn.Module):
    """As `torchtune.modules.peft.LoRALinear`."""

    def __init__(self, d_in: int, d_out: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.rank, self.alpha, self.dropout = rank, alpha, nn.Dropout(0.0)
        self.weight = nn.Parameter(torch.randn(d_out, d_in), requires_grad=False)
        self.lora_a = nn.Linear(d_in, rank, bias=False)
        self.lora_b = nn.Linear(rank, d_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = nn.functional.linear(x, self.weight)
        return out + (self.alpha / self.rank) * self.lora_b(self.lora_a(self.dropout(x)))


class LitGPTLinear(nn.Module):
    """As `litgpt.lora.LoRALinear`."""

    def __init__(self, d_in: int, d_out: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.linear = nn.Linear(d_in, d_out).requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(rank, d_in))
        self.lora_B = nn.Parameter(torch.randn(d_out, rank))
        self.scaling = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        lora = (x @ self.lora_A.transpose(0, 1) @ self.lora_B.transpose(0, 1)) * self.scaling
        return self.linear(x) + lora


class HomeMade(nn.Module):
    """x @ lora_A @ lora_B, as in countless notebooks."""

    def __init__(self, d_in: int, d_out: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.linear = nn.Linear(d_in, d_out).requires_grad_(False)
        self.alpha = alpha
        self.lora_A = nn.Parameter(torch.randn(d_in, rank))
        self.lora_B = nn.Parameter(torch.randn(rank, d_out))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.alpha / self.lora_A.shape[1] * (x @ self.lora_A @ self.lora_B)


class Loop(nn.Module):
    """Of no library, and known to nobody: the rows of one parameter and the columns of another."""

    def __init__(self, d_in: int, d_out: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.linear = nn.Linear(d_in, d_out).requires_grad_(False)
        self.down, self.up, self.gain = (
            nn.Linear(d_in, rank, bias=False),
            nn.Linear(rank, d_out, bias=False),
            alpha / rank,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.gain * self.up(self.down(x))


@pytest.fixture
def loop_layout() -> Iterator[Callable[[nn.Module], Iterator[Adapter]]]:
    @register
    def layout(module: nn.Module) -> Iterator[Adapter]:
        if isinstance(module, Loop):
            yield Adapter(module.down, module.up, scaling=lambda: module.gain)

    yield layout
    unregister(layout)


def twin_of(layer: nn.Module, alpha: float) -> LoRALinear:
    """A `LoRALinear` with the same pair."""
    (pair,), _ = find_pairs(layer)
    twin = LoRALinear(nn.Linear(pair.d_in, pair.d_out, bias=False), pair.rank, alpha).to(F64)
    twin.lora_A.weight.data.copy_(pair.A)
    twin.lora_B.weight.data.copy_(pair.B)
    return twin


def weight(layer: nn.Module) -> Tensor:
    (pair,), _ = find_pairs(layer)
    return pair.scaling * pair.B @ pair.A


@pytest.mark.parametrize("kind", STEPS, ids=str)
@pytest.mark.parametrize("cls", [TorchtuneLinear, LitGPTLinear, HomeMade, Loop])
def test_a_layout_is_trained_as_the_pair_that_it_holds(
    cls: type[nn.Module], kind: dict, loop_layout: object, recwarn: pytest.WarningsRecorder
) -> None:
    """Two steps equal those of a plain LoRA layer with the same pair, whose gradients are computed independently."""
    d_in, d_out, rank, alpha = 9, 7, 3, 6.0
    layer = cls(d_in, d_out, rank, alpha).to(F64)
    for parameter in layer.parameters():
        parameter.data.mul_(0.3)
    twin = twin_of(layer, alpha)
    (pair,), unsupported = find_pairs(layer)
    assert not unsupported and pair.scaling == alpha / rank
    ours, theirs = bare(layer, 0.1, **kind), bare(twin, 0.1, **kind)
    start = weight(layer)
    for _ in range(2):
        x = torch.randn(5, d_in, dtype=F64)
        ours.zero_grad()
        layer(x).backward(torch.randn(5, d_out, dtype=F64))
        wanted = [pair.lora_A.grad.clone(), pair.lora_B.grad.clone()]
        twin.lora_A.weight.grad, twin.lora_B.weight.grad = wanted
        ours.step()
        theirs.step()
    moved = (weight(layer) - start).norm() / start.norm()
    assert moved > 1e-3
    torch.testing.assert_close(weight(layer), weight(twin), rtol=1e-9, atol=1e-11)


def test_the_home_made_product_is_the_transposed_pair() -> None:
    """Its gradients are those of ΔWᵀ = s·lora_A·lora_B, and an exact first step is the formula's on the weight."""
    layer = HomeMade(9, 7, 3, 6.0).to(F64)
    (pair,), _ = find_pairs(layer)
    assert (pair.lora_B is layer.lora_A) and (pair.lora_A is layer.lora_B) and (pair.d_out, pair.d_in) == (9, 7)
    x, s = torch.randn(5, 9, dtype=F64), torch.randn(5, 7, dtype=F64)
    layer(x).backward(s)
    G = x.T @ s
    torch.testing.assert_close(pair.lora_A.grad, pair.scaling * pair.B.T @ G)
    torch.testing.assert_close(pair.lora_B.grad, pair.scaling * G @ pair.A.T)


@pytest.mark.parametrize("cls", [TorchtuneLinear, Loop])
def test_layers_run_in_sequence_are_captured(cls: type[nn.Module], loop_layout: object) -> None:
    """The captured rows are X and S of the layer's own forward and backward pass: two steps equal a plain layer's."""
    layer = cls(9, 7, 3, 6.0).to(F64)
    twin = twin_of(layer, 6.0)
    optimizers = [bare(net, 0.1, gradient="exact", metric="kfac") for net in (layer, twin)]
    assert list(optimizers[0].gradients().values()) == ["exact"]
    for _ in range(2):
        x, s = torch.randn(8, 9, dtype=F64), torch.randn(8, 7, dtype=F64)
        for net, optimizer in zip((layer, twin), optimizers, strict=True):
            optimizer.zero_grad()
            net(x).backward(s)
            optimizer.step()
    torch.testing.assert_close(weight(layer), weight(twin), rtol=1e-9, atol=1e-11)


def test_loralib_by_its_own_layers(recwarn: pytest.WarningsRecorder) -> None:
    """Linear, convolution and embedding are pairs known by `.grad`; what packs several products is refused by name."""
    lora = pytest.importorskip("loralib")
    model = nn.Sequential(lora.Embedding(11, 6, r=2, lora_alpha=4), lora.Linear(6, 5, r=2, lora_alpha=4))
    conv = lora.Conv2d(3, 4, 3, r=2, lora_alpha=4)
    lora.mark_only_lora_as_trainable(model)
    lora.mark_only_lora_as_trainable(conv)
    pairs, unsupported = find_pairs(nn.ModuleList([model, conv]))
    assert [(p.d_out, p.rank, p.d_in, p.scaling) for p in pairs] == [(6, 2, 11, 2.0), (5, 2, 6, 2.0), (12, 6, 9, 2.0)]
    assert not unsupported and all(p.uncaptured for p in pairs)
    optimizer = PSILoRA(model, 0.05)
    table = model[0].weight.detach() + 2.0 * (model[0].lora_B @ model[0].lora_A).T.detach()
    torch.testing.assert_close(model[0](torch.arange(11)), table)
    words, wanted = torch.arange(11), torch.randn(11, 5)
    before = mse(model, (words, wanted)).item()
    train(model, optimizer, [(words, wanted)] * 12)
    assert mse(model, (words, wanted)) < 0.9 * before
    merged = lora.MergedLinear(6, 9, r=2, enable_lora=[True, False, True])
    pairs, unsupported = find_pairs(merged)
    assert not pairs and "packs one product for each of 2 enabled parts" in unsupported[0].reason
    with pytest.raises(ValueError, match="packs one product for each of 2 enabled parts"):
        PSILoRA(nn.ModuleList([merged, copy.deepcopy(model)]), 0.05)
    one = lora.MergedLinear(6, 9, r=2, enable_lora=[False, True, False])
    assert [(p.d_out, p.rank, p.d_in) for p in find_pairs(one)[0]] == [(3, 2, 6)]


def test_a_layout_can_be_forgotten_and_must_be_a_function() -> None:
    layer = Loop(9, 7, 3, 6.0)
    assert find_pairs(layer) == ([], [])
    layout = register(lambda module: [Adapter(module.down, module.up, 2.0)] if isinstance(module, Loop) else [])
    try:
        assert [pair.scaling for pair in find_pairs(layer)[0]] == [2.0]
    finally:
        unregister(layout)
    assert find_pairs(layer) == ([], [])
    with pytest.raises(ValueError, match="Must be one that was registered"):
        unregister(layout)
    with pytest.raises(TypeError, match="Invalid layout 3. Must be a function"):
        register(3)  # type: ignore[arg-type]
