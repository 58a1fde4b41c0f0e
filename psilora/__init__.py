"""psilora: the PSI-LoRA / OPLoRA optimizer for LoRA fine-tuning."""

from psilora import checkpoint, functional
from psilora.adapters.linear import LoRALinear
from psilora.lowrank.lorsum import lorsum
from psilora.lowrank.ritz import ritz
from psilora.lr_finder import LRSweep, lr_find
from psilora.optimizer import PSILoRA
from psilora.presets import OPLoRA, create_psilora_optimizer

__version__ = "0.1.0"

__all__ = [
    "LRSweep",
    "LoRALinear",
    "OPLoRA",
    "PSILoRA",
    "__version__",
    "checkpoint",
    "create_psilora_optimizer",
    "functional",
    "lorsum",
    "lr_find",
    "ritz",
]
