"""psilora: the PSI-LoRA / OPLoRA optimizer for LoRA fine-tuning."""

from psilora.lora import LoRALinear
from psilora.lorsum import lorsum
from psilora.optimizer import PSILoRA
from psilora.presets import OPLoRA, create_psilora_optimizer
from psilora.rayleigh_ritz import ritz

__version__ = "0.1.0"

__all__ = ["LoRALinear", "OPLoRA", "PSILoRA", "__version__", "create_psilora_optimizer", "lorsum", "ritz"]
