"""The optimizers that are compared: how each is built, and where its grid of learning rates is centred."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from psilora import PSILoRA
from psilora.adapters import find_pairs
from psilora.baselines import (
    AltLoRA,
    LoFT,
    LoRAMuon,
    LoRAPro,
    PreconditionedAdamW,
    PreconditionedSGD,
    ProjectedMomentum,
    Riemannion,
    SVDLoRA,
)
from psilora.options import PAPER

BETAS = (0.9, 0.99)
LORAPLUS_RATIO = 16.0

Build = Callable[[nn.Module, float, float], list[torch.optim.Optimizer]]


@dataclass(frozen=True)
class Method:
    """An optimizer under comparison.

    Attributes:
        title: Its name in tables.
        build: (model, lr of the adapters, lr of the head) to optimizers that step one after the other.
        centre: Centre of its grid of rates.
    """

    title: str
    build: Build
    centre: float


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """lora_A, lora_B of every pair, in this order."""
    return [p for pair in find_pairs(model)[0] for p in (pair.lora_A, pair.lora_B)]


def head(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """AdamW for the trainable parameters outside the adapters, if there are any."""
    taken = {id(p) for p in adapter_parameters(model)}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    return [torch.optim.AdamW(rest, lr=lr, betas=BETAS, weight_decay=0.0)] if rest else []


@contextlib.contextmanager
def only_adapters(model: nn.Module) -> Iterator[None]:
    """Hide the other trainable parameters from a builder that takes all that it finds."""
    taken = {id(p) for p in adapter_parameters(model)}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    for p in rest:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in rest:
            p.requires_grad_(True)


def factor_rule(cls: type[torch.optim.Optimizer], **settings: Any) -> Build:
    """An optimizer of the factors as of any parameters."""

    def build(model: nn.Module, lr: float, head_lr: float) -> list[torch.optim.Optimizer]:
        return [cls(adapter_parameters(model), lr=lr, **settings), *head(model, head_lr)]  # type: ignore[call-arg]

    return build


def pair_rule(cls: Callable[..., torch.optim.Optimizer], **settings: Any) -> Build:
    """An optimizer of this package, which finds the pairs itself and trains the head by AdamW."""

    def build(model: nn.Module, lr: float, head_lr: float) -> list[torch.optim.Optimizer]:
        return [cls(model, lr, adamw_lr=head_lr, adamw_betas=BETAS, **settings)]

    return build


def loraplus(model: nn.Module, lr: float, head_lr: float) -> list[torch.optim.Optimizer]:
    """LoRA+ of PEFT: AdamW with B's rate 16 times A's; `lr` is B's, which the grids of AdamW and LoRA+ share."""
    from peft.optimizers import create_loraplus_optimizer

    with only_adapters(model):
        optimizer = create_loraplus_optimizer(
            model,
            torch.optim.AdamW,
            lr=lr / LORAPLUS_RATIO,
            loraplus_lr_ratio=LORAPLUS_RATIO,
            betas=BETAS,
            weight_decay=0.0,
        )
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    return [optimizer, *head(model, head_lr)]


def riemannian(model: nn.Module, lr: float, head_lr: float) -> list[torch.optim.Optimizer]:
    """Riemannian preconditioned AdamW of PEFT."""
    from peft.optimizers import create_riemannian_optimizer

    with only_adapters(model):
        optimizer = create_riemannian_optimizer(model, torch.optim.AdamW, lr=lr, betas=BETAS, weight_decay=0.0)
    return [optimizer, *head(model, head_lr)]


def lora_rite(model: nn.Module, lr: float, head_lr: float) -> list[torch.optim.Optimizer]:
    """LoRA-RITE of pytorch_optimizer."""
    from pytorch_optimizer import LoRARite

    return [LoRARite(adapter_parameters(model), lr=lr, betas=BETAS), *head(model, head_lr)]


#: The papers' scripts, scaled form: the metric starts at 1, and γ, β₂, δ, ρ, K as there.
PAPER_GLUE = {**PAPER, "num_iters": 0, "prox": 1e-2}
PAPER_SQUAD = {**PAPER, "num_iters": 0, "metric_beta": 0.9}
GRADIENT = {"step": "gradient", "metric": "kfac", "momentum": 0.0}

METHODS = {
    "adamw": Method("AdamW", factor_rule(torch.optim.AdamW, betas=BETAS, weight_decay=0.0), 1e-2),
    "adamw-999": Method("AdamW, β₂ = .999", factor_rule(torch.optim.AdamW, betas=(0.9, 0.999), weight_decay=0.0), 1e-2),
    "nadam": Method("NAdam", factor_rule(torch.optim.NAdam, betas=BETAS), 1e-2),
    "sgd": Method("SGD, momentum .9", factor_rule(torch.optim.SGD, momentum=0.9), 0.1),
    "loraplus": Method("LoRA+ (PEFT)", loraplus, 2e-2),
    "riemannian": Method("Riemannian AdamW (PEFT)", riemannian, 2e-2),
    "lora-rite": Method("LoRA-RITE", lora_rite, 2e-2),
    "lora-muon": Method("LoRA-Muon", pair_rule(LoRAMuon), 0.2),
    "riemannion": Method("Riemannion", pair_rule(Riemannion), 0.1),
    "altlora": Method("AltLoRA", pair_rule(AltLoRA, betas=BETAS), 0.1),
    "altlora-plus": Method("AltLoRA+", pair_rule(AltLoRA, betas=BETAS, second=True), 2e-2),
    "loft": Method("LoFT-AdamW", pair_rule(LoFT, betas=BETAS), 2e-3),
    "lora-pro": Method("LoRA-Pro", pair_rule(LoRAPro, betas=BETAS), 2e-3),
    "preconditioned-sgd": Method("Preconditioned SGD", pair_rule(PreconditionedSGD, momentum=0.9), 0.1),
    "preconditioned-adamw": Method("Preconditioned AdamW", pair_rule(PreconditionedAdamW, betas=BETAS), 2e-2),
    "projected": Method("Projected momentum, K = 1", pair_rule(ProjectedMomentum), 0.1),
    "svdlora": Method("SVDLoRA, SGD (oracle)", pair_rule(SVDLoRA, momentum=0.9), 0.1),
    "svdlora-adamw": Method("SVDLoRA, AdamW (oracle)", pair_rule(SVDLoRA, rule="adamw", betas=BETAS), 2e-3),
    "oplora": Method("PSILoRA as OPLoRA", pair_rule(PSILoRA, step="gradient", metric=None), 0.1),
    "psilora-exact": Method("PSILoRA gradient, exact", pair_rule(PSILoRA, gradient="exact", **GRADIENT), 0.1),
    "psilora-tangent": Method("PSILoRA gradient, tangent", pair_rule(PSILoRA, gradient="tangent", **GRADIENT), 0.1),
    "psilora-paper": Method("PSILoRA as published", pair_rule(PSILoRA, **PAPER), 0.2),
    "psilora-glue": Method("PSILoRA as published for GLUE", pair_rule(PSILoRA, **PAPER_GLUE), 0.2),
    "psilora-squad": Method("PSILoRA as published for SQuAD", pair_rule(PSILoRA, **PAPER_SQUAD), 0.2),
    "psilora-wikitext": Method("PSILoRA as published, K = 2", pair_rule(PSILoRA, **{**PAPER, "num_iters": 2}), 0.2),
    "spectral": Method("PSILoRA spectral", pair_rule(PSILoRA, step="spectral", metric="lora", controller=None), 0.1),
    "spectral-plain": Method(
        "PSILoRA spectral, no metric", pair_rule(PSILoRA, step="spectral", metric=None, controller=None), 0.1
    ),
    "spectral-slope": Method(
        "PSILoRA spectral, slope",
        pair_rule(PSILoRA, step="spectral", metric="lora", controller="slope"),
        0.1,
    ),
    "psilora-dense": Method(
        "PSILoRA gradient, dense K-FAC",
        pair_rule(PSILoRA, gradient="exact", **{**GRADIENT, "metric": "kfac-dense"}),
        0.1,
    ),
    "psilora-low-rank": Method(
        "PSILoRA gradient, low-rank K-FAC",
        pair_rule(PSILoRA, gradient="exact", **{**GRADIENT, "metric": "kfac-low-rank"}),
        0.1,
    ),
}
