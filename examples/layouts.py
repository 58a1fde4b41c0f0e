"""LoRA without PEFT: loralib's layers, torchtune's layout, and one of your own.

python examples/layouts.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import psilora
from psilora import PSILoRA

WIDTH, CLASSES = 32, 4


class TorchtuneLinear(nn.Module):
    """Laid out as torchtune's LoRALinear: `lora_a`, `lora_b`, `alpha` and `rank`."""

    def __init__(self, d_in: int, d_out: int, rank: int = 4, alpha: float = 8.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_out, d_in) / d_in**0.5, requires_grad=False)
        self.lora_a, self.lora_b = nn.Linear(d_in, rank, bias=False), nn.Linear(rank, d_out, bias=False)
        self.rank, self.alpha = rank, alpha
        nn.init.zeros_(self.lora_b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.alpha / self.rank * self.lora_b(self.lora_a(x))


def loralib_linear(d_in: int, d_out: int) -> nn.Module:
    import loralib

    return loralib.Linear(d_in, d_out, r=4, lora_alpha=8, bias=False)


# --8<-- [start:register]
class OurLinear(nn.Module):
    """A layer that keeps its factors under names of its own."""

    def __init__(self, d_in: int, d_out: int, rank: int = 4) -> None:
        super().__init__()
        self.base = nn.Linear(d_in, d_out, bias=False).requires_grad_(False)
        self.down, self.up = nn.Linear(d_in, rank, bias=False), nn.Linear(rank, d_out, bias=False)
        self.strength = 2.0
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.strength * self.up(self.down(x))


@psilora.adapters.register
def ours(module: nn.Module) -> Iterator[psilora.adapters.Adapter]:
    if isinstance(module, OurLinear):
        yield psilora.adapters.Adapter(module.down, module.up, scaling=lambda: module.strength)


# --8<-- [end:register]

LAYOUTS: dict[str, Callable[[int, int], nn.Module]] = {
    "loralib": loralib_linear,
    "torchtune": TorchtuneLinear,
    "your own": OurLinear,
}


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args(arguments)
    found = {}
    for name, layer in LAYOUTS.items():
        torch.manual_seed(0)
        model = nn.Sequential(layer(WIDTH, WIDTH), nn.Tanh(), layer(WIDTH, CLASSES))
        target = torch.randn(WIDTH, CLASSES)
        optimizer = PSILoRA(model, lr=0.1)
        losses = []
        for _ in range(options.steps):
            x = torch.randn(64, WIDTH)
            loss = nn.functional.cross_entropy(model(x), (x @ target).argmax(1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"{name}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
        found[name] = losses
    return found


if __name__ == "__main__":
    main()
