"""Rivals and oracles that PSILoRA is measured against: plain PyTorch, one layer at a time, written to be read."""

from psilora.baselines.muon import LoRAMuon
from psilora.baselines.preconditioned import PreconditionedAdamW, PreconditionedSGD
from psilora.baselines.projected import ProjectedMomentum
from psilora.baselines.svd import SVDLoRA

__all__ = ["LoRAMuon", "PreconditionedAdamW", "PreconditionedSGD", "ProjectedMomentum", "SVDLoRA"]
