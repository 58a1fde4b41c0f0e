"""Rivals and oracles that PSILoRA is measured against: plain PyTorch, one layer at a time, written to be read."""

from psilora.baselines.alternating import AltLoRA, LoFT
from psilora.baselines.lora_pro import LoRAPro
from psilora.baselines.muon import LoRAMuon
from psilora.baselines.preconditioned import PreconditionedAdamW, PreconditionedSGD
from psilora.baselines.projected import ProjectedMomentum
from psilora.baselines.riemannion import Riemannion
from psilora.baselines.svd import SVDLoRA

__all__ = [
    "AltLoRA",
    "LoFT",
    "LoRAMuon",
    "LoRAPro",
    "PreconditionedAdamW",
    "PreconditionedSGD",
    "ProjectedMomentum",
    "Riemannion",
    "SVDLoRA",
]
