"""What a first attempt at each piece looks like: the behaviour that the scenario tests guard against."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class WrapperHooks:
    """Hooks on the adapted layer itself: X is what entered the layer last, S the gradient at its output.

    Attributes:
        X, S: Per layer name, what every forward and every backward left.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
        self.X: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        self.S: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        self.handles: list[RemovableHandle] = []
        for name, module in self.layers.items():
            self.handles.append(module.register_forward_hook(self._hook(name)))

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if module.training:
                self.X[name].append(args[0].detach())
            if output.requires_grad:
                output.register_hook(lambda grad: self.S[name].append(grad.detach()))

        return hook

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()

    def clear(self) -> None:
        for store in (self.X, self.S):
            for held in store.values():
                held.clear()

    def error(self, name: str, adapter: str = "default") -> float:
        """‖dB − s·SᵀXAᵀ‖ / ‖dB‖, X and S paired in the order they came; infinite where their rows do not match."""
        layer: Any = self.layers[name]
        X = torch.cat([x.flatten(0, -2) for x in self.X[name]]) if self.X[name] else torch.zeros(0)
        S = torch.cat([s.flatten(0, -2) for s in self.S[name]]) if self.S[name] else torch.zeros(0)
        if X.shape[0] != S.shape[0] or X.numel() == 0:
            return float("inf")
        A, dB = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight.grad
        own = layer.scaling[adapter] * S.to(A.dtype).mT @ (X.to(A.dtype) @ A.detach().mT)
        return float((own - dB).norm() / dB.norm())

    def worst(self) -> float:
        return max(self.error(name) for name in self.layers)


class PlainState(torch.optim.Optimizer):
    """SGD with fp32 momentum that leaves saving and loading to torch, and ignores its closure."""

    def __init__(self, params: Iterable[Tensor], lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["momentum"] = torch.full(p.shape, 1 / 3, dtype=torch.float32)

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    m = self.state[p]["momentum"].mul_(0.9).add_(p.grad)
                    p.sub_(group["lr"] * m)


def jittered_turn(B: Tensor, A: Tensor, lr: float, dA: Tensor, jitter: float = 1e-6) -> Tensor:
    """One A-turn with λ = 0, the jitter in the Gram matrix only: (BᵀB + jitter·I)⁻¹ (BᵀB·A − lr·dA)."""
    gram = B.mT @ B
    return torch.linalg.solve(gram + jitter * torch.eye(len(gram), dtype=B.dtype), gram @ A - lr * dA)
