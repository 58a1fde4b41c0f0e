"""Which LoRA pairs a model has, how each reads its input, layouts of other libraries, and a plain LoRA layer."""

from psilora.adapters.find import find_pairs
from psilora.adapters.model import check_model
from psilora.adapters.pair import LoRAPair, Unsupported, as_matrix, describe, is_sparse, listed
from psilora.adapters.registry import Adapter, register, unregister

__all__ = [
    "Adapter",
    "LoRAPair",
    "Unsupported",
    "as_matrix",
    "check_model",
    "describe",
    "find_pairs",
    "is_sparse",
    "listed",
    "register",
    "unregister",
]
