"""What the baselines share: pairs, √s-scaled factors, the full gradient from captures, and a commit at the end."""

from __future__ import annotations

import math
import statistics
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from psilora.adapters.model import check_model
from psilora.adapters.pair import LoRAPair, describe, is_sparse
from psilora.capture.discards import all_zero, present
from psilora.capture.hooks import Capture
from psilora.linalg.precision import compute_dtype, full_precision
from psilora.options.checks import in_range, two_betas
from psilora.param_groups.adamw import AuxAdamW, adamw_group, check_adamw
from psilora.param_groups.lora import checked_pairs

#: ‖GAᵀ from .grad − GAᵀ‖ / ‖GAᵀ from .grad‖ above which a captured G is refused; 16-bit gradients stay below it.
CAPTURE_TOLERANCE = 0.1


@dataclass(frozen=True)
class Layer:
    """One pair in one step, in the units of the weight: B̃ = √s·B, Ã = √s·A, G = ∂L/∂W, in the compute dtype.

    Attributes:
        B, A: B̃ (d_out, r) and Ã (r, d_in).
        left, right: B̃ᵀG (r, d_in) and GÃᵀ (d_out, r): the LoRA gradients divided by √s.
        G: The full gradient (d_out, d_in), or None for methods that do not ask for it.
    """

    B: Tensor
    A: Tensor
    left: Tensor
    right: Tensor
    G: Tensor | None

    @property
    def gradient(self) -> Tensor:
        """G, for methods that asked for it."""
        if self.G is None:
            raise RuntimeError("this method was built without captures, so there is no full gradient")
        return self.G


State = dict[str, Tensor]
Proposal = tuple[Tensor, Tensor, State]


class PairOptimizer(torch.optim.Optimizer):
    """Base of the baselines: one proposal (ΔB̃, ΔÃ, new state) per pair, all computed before any is written.

    Works on √s-scaled factors, so the LoRA scaling does not matter. State is fp32 (fp64 for fp64 parameters) and lies
    under the `lora_B` weight of a pair; loading it rounds it to the parameter's dtype, as torch's optimizers do. The
    other trainable parameters go to `torch.optim.AdamW` in the last param group.

    Args:
        model: The model with LoRA adapters.
        settings: Defaults of the LoRA param group, with "lr".
        full_gradient: Whether to capture X and S and form G = SᵀX (d_out, d_in) for every layer.
        adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay: For the other trainable parameters.

    Raises:
        ValueError: A setting is out of range, no pair is found, or a layer cannot be captured but has to be.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Mapping[str, Any],
        *,
        full_gradient: bool,
        adamw_lr: float = 1e-3,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 0.0,
    ) -> None:
        in_range("lr", settings["lr"], 0, math.inf)
        adamw: dict[str, Any] = {
            "lr": adamw_lr,
            "betas": adamw_betas,
            "eps": adamw_eps,
            "weight_decay": adamw_weight_decay,
        }
        check_adamw(adamw, "adamw_")
        pairs = checked_pairs(check_model(model), "raise")
        blind = [pair for pair in pairs if pair.uncaptured is not None]
        if full_gradient and blind:
            raise ValueError(f"{type(self).__name__} needs activations that cannot be captured for {describe(blind)}")
        groups: list[dict[str, Any]] = [
            {**settings, "kind": "lora", "params": [p for pair in pairs for p in (pair.lora_A, pair.lora_B)]}
        ]
        taken = {id(p) for p in groups[0]["params"]}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
        if rest:
            groups.append(adamw_group(rest, **adamw, maximize=False))
        super().__init__(groups, {})
        self._pairs = pairs
        self._others = AuxAdamW(self)
        self._capture = Capture(pairs, ["rows"] * len(pairs)) if full_gradient else None

    @abstractmethod
    def propose(self, layer: Layer, state: State, group: Mapping[str, Any]) -> Proposal:
        """Return (ΔB̃, ΔÃ, new state) for one pair; change nothing."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; return the closure's loss, if there is one. Pairs without gradients or frozen are left alone.

        Raises:
            RuntimeError: A gradient is sparse, or G is needed and was not captured or does not reproduce `.grad`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group = self.param_groups[0]
        if self._capture is not None:
            self._capture.refresh()
        proposals = []
        for pair in self._pairs:
            if len(present(pair)) < 2 or not pair.trainable or self._unreached(pair):
                continue
            with full_precision(pair.lora_A.device.type):
                proposals.append((pair, self.propose(self._layer(pair), dict(self.state[pair.lora_B]), group)))
        for pair, (step_B, step_A, state) in proposals:
            root = math.sqrt(pair.scaling)
            pair.lora_B.add_((step_B / root).reshape(pair.lora_B.shape))
            pair.lora_A.add_((step_A / root).reshape(pair.lora_A.shape))
            self.state[pair.lora_B] = state
        self._others.step(torch.ones((), dtype=torch.bool, device=self._pairs[0].lora_A.device), None)
        if self._capture is not None:
            self._capture.clear()
        return loss

    def _layer(self, pair: LoRAPair) -> Layer:
        dA, dB = pair.lora_A.grad, pair.lora_B.grad
        if dA is None or dB is None or is_sparse(dA) or is_sparse(dB):
            raise RuntimeError(f"{pair.name}: sparse gradients are not supported; use dense ones")
        dtype, root = compute_dtype(pair.lora_A.dtype), math.sqrt(pair.scaling)
        B, A = pair.B.to(dtype) * root, pair.A.to(dtype) * root
        left, right = dA.flatten(1).to(dtype) / root, dB.flatten(1).to(dtype) / root
        return Layer(B, A, left, right, self._gradient(pair, A, right))

    def _unreached(self, pair: LoRAPair) -> bool:
        """Whether no backward pass has reached a captured pair, and its gradients are zero."""
        record = None if self._capture is None else self._capture.record(pair)
        return record is not None and record.idle and not any(map(is_sparse, present(pair))) and all_zero([pair])[0]

    def _gradient(self, pair: LoRAPair, A: Tensor, right: Tensor) -> Tensor | None:
        """G = c·S_BᵀX/s, checked against GÃᵀ from `.grad` where that is more than rounding."""
        if self._capture is None:
            return None
        record = self._capture.record(pair)
        if record is None or not record.captured:
            raise RuntimeError(f"{pair.name}: {type(self).__name__} needs activations, but none were captured")
        G = A.new_zeros(pair.d_out, pair.d_in)
        for x, s in record.chunks:
            G += s.to(A.dtype).mT @ x.to(A.dtype)
        G *= self._external_scale(self._capture) / pair.scaling
        error, rounding = (right - G @ A.mT).norm(), torch.finfo(A.dtype).eps ** 0.5 * G.norm() * A.norm()
        if bool(error > CAPTURE_TOLERANCE * right.norm() + rounding):
            raise RuntimeError(f"{pair.name}: the captured activations miss .grad by {float(error / right.norm()):.2g}")
        return G

    def _external_scale(self, capture: Capture) -> float:
        """c: the factor of clipping and the like, the median over layers of ⟨dB, dB as backward left it⟩ / ‖…‖²."""
        ratios = []
        for pair in self._pairs:
            record = capture.record(pair)
            if record is not None and record.left is not None and pair.lora_B.grad is not None:
                then = record.left.double()
                square = float(then.square().sum())
                if square > 0:
                    ratios.append(float((pair.lora_B.grad.double() * then).sum()) / square)
        return statistics.median(ratios) if ratios else 1.0

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients and drop what was captured for them."""
        super().zero_grad(set_to_none)
        if self._capture is not None:
            self._capture.clear(reset=True)

    def detach(self) -> None:
        """Remove every hook from the model."""
        if self._capture is not None:
            self._capture.close()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_others" not in self.__dict__:  # of a copy, and not of torch's load_state_dict
            self._others, self._capture = AuxAdamW(self), None
        self._others.link(self)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy is made of; copy model and optimizer in one call, `copy.deepcopy((model, optimizer))`.

        Raises:
            TypeError: It captures.
        """
        if self._capture is not None:
            raise TypeError(
                f"a {type(self).__name__} that captures holds hooks on its model and cannot be copied or pickled; use "
                "state_dict()"
            )
        return {**super().__getstate__(), "_pairs": self._pairs}


def adam_settings(
    lr: float, betas: tuple[float, float], eps: float, weight_decay: float, **more: Any
) -> dict[str, Any]:
    """Return the settings of a rule with Adam's moments; raise where β or wd is out of range."""
    two_betas("betas", betas)
    in_range("weight_decay", weight_decay, 0, math.inf)
    return {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **more}


def adam_direction(
    gradient: Tensor, state: State, name: str, betas: tuple[float, float], eps: float, t: int
) -> tuple[Tensor, State]:
    """Return m̂/(√v̂ + ε) and the new moments, with m̂ = m/(1 − β₁ᵗ) and v̂ = v/(1 − β₂ᵗ).

    Args:
        gradient: Any shape.
        state: Holds "first_{name}" and "second_{name}" from step 2 on.
        name: Of the factor, to tell moments apart.
        betas: β₁ and β₂.
        eps: ε.
        t: The number of this step, from 1.
    """
    zero = torch.zeros_like(gradient)
    first = torch.lerp(state.get(f"first_{name}", zero), gradient, 1 - betas[0])
    second = torch.lerp(state.get(f"second_{name}", zero), gradient.square(), 1 - betas[1])
    direction = (first / (1 - betas[0] ** t)) / ((second / (1 - betas[1] ** t)).sqrt() + eps)
    return direction, {f"first_{name}": first, f"second_{name}": second}
