"""SVDLoRA: the full step on the weight, cut back to rank r by an exact SVD; the oracle of OPLoRA and PSI-LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from psilora.baselines.base import Layer, PairOptimizer, Proposal, State, adam_direction
from psilora.options.checks import in_range, two_betas


class SVDLoRA(PairOptimizer):
    r"""ΔW ← rank-r truncated SVD of (1 − η·wd)·ΔW − η·D, ΔW = s·B·A (arXiv 2509.19977, section 4).

    D is a full-rank direction from the full gradient G = SᵀX:

    - rule="sgd": M ← μM + G, D = M; M is (d_out, d_in).
    - rule="adamw": D = m̂/(√v̂ + ε) with Adam's moments of G.

    With ΔW = U Σ Vᵀ the new factors are √s·B = U√Σ and √s·A = √Σ Vᵀ. Where D and wd are zero, or η is, nothing changes,
    bit for bit. State: "momentum", or "first_W" and "second_W", (d_out, d_in). One SVD per layer and step: for oracles
    on small layers.

    Args:
        model: The model; hooks on its LoRA layers capture X and S.
        lr: η ≥ 0.
        rule: "sgd" or "adamw".
        momentum: μ in [0, 1), for "sgd".
        betas, eps: Of "adamw".
        weight_decay: wd ≥ 0, decoupled, on ΔW.
        **adamw: `adamw_lr` and the like, for the other trainable parameters.

    Raises:
        ValueError: A setting is out of range, or a layer cannot be captured.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        *,
        rule: str = "sgd",
        momentum: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **adamw: Any,
    ) -> None:
        if rule not in ("sgd", "adamw"):
            raise ValueError(f"Invalid rule={rule!r}. Must be one of 'sgd', 'adamw'.")
        in_range("momentum", momentum, 0, 1)
        two_betas("betas", betas)
        in_range("weight_decay", weight_decay, 0, float("inf"))
        settings = {
            "lr": lr,
            "rule": rule,
            "momentum": momentum,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(model, settings, full_gradient=True, **adamw)

    def propose(self, layer: Layer, state: State, group: Mapping[str, Any]) -> Proposal:
        """Form the full step and truncate it."""
        G = layer.gradient
        state["step"] = state.get("step", torch.zeros((), device="cpu")) + 1
        if group["rule"] == "adamw":
            D, moments = adam_direction(G, state, "W", group["betas"], group["eps"], int(state["step"]))
            state |= moments
        elif group["momentum"] > 0:
            D = state["momentum"] = group["momentum"] * state.get("momentum", torch.zeros_like(G)) + G
        else:
            D = G
        W = layer.B @ layer.A
        change = -group["lr"] * (D + group["weight_decay"] * W)
        B, A = truncated(W + change, layer.A.shape[0])
        moved = (change != 0).any()
        zero = torch.zeros((), dtype=W.dtype, device=W.device)
        return torch.where(moved, B - layer.B, zero), torch.where(moved, A - layer.A, zero), state


def truncated(W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the balanced factors (U√Σ, √ΣVᵀ) of the best rank-`rank` approximation of W (d_out, d_in).

    Where W has fewer than `rank` singular values, the remaining columns and rows are zero.
    """
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = S[:rank].sqrt()
    missing = rank - root.shape[0]
    B, A = U[:, :rank] * root, root[:, None] * Vh[:rank]
    return nn.functional.pad(B, (0, missing)), nn.functional.pad(A, (0, 0, 0, missing))
