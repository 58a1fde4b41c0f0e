"""PEFT's layers: which adapters cannot be one product, and which cannot be captured."""

from __future__ import annotations

import math
import numbers

from torch import Tensor, nn

from psilora.adapters.convolution import reading
from psilora.adapters.pair import LoRAPair

# PEFT layer classes that run `lora_B(lora_A(dropout(x)))` on the inner linears, and variants that keep G = SᵀX there.
_PEFT_LINEAR = frozenset(
    "Linear Linear8bitLt Linear4bit GPTQLoraLinear AwqLoraLinear AqlmLoraLinear EetqLoraLinear HqqLoraLinear "
    "IncLoraLinear TorchaoLoraLinear TeLinear".split()
)
_PEFT_CONVOLUTION = frozenset({"_ConvNd"})
_EXACT_VARIANTS = frozenset(
    "DoraLinearVariant DoraConv1dVariant DoraConv2dVariant DoraConv3dVariant ALoraLinearVariant QALoraLinearVariant "
    "MiCALinearVariant".split()
)

# ΔW = s·B·A holds, so `.grad` is right, but the inner layers are not run on the layer's input.
_GRAD_ONLY = {
    "MultiheadAttention": "it adds the adapter to the weight instead of calling lora_A",
    "VeloraLinearVariant": "VeLoRA keeps a compressed input",
    "MontecloraLinearVariant": "MonteCLoRA perturbs lora_A's weight in the forward pass",
}
# ΔW is not one product s·B·A, so neither the activations nor the gradients of B and A describe it.
_REFUSED = {
    "KasaLinearVariant": "KaSA puts singular values between B and A",
    "BdLoraLinearVariant": "BD-LoRA packs a block-diagonal factor",
    "ArrowLinearVariant": "Arrow mixes several adapters per token",
}
# Layers whose weights are (out, in, …) by their type; bare parameters and other modules may hold the transpose.
_ORIENTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (
    "lora_A must be (r, d_in) and lora_B (d_out, r): for x @ lora_A @ lora_B store their transposes, or make both "
    "nn.Linear, as psilora.LoRALinear does"
)
# Names of PEFT's other methods, by the folder that holds them.
_KINDS = {
    "adalora": "AdaLoRA",
    "boft": "BOFT",
    "fourierft": "FourierFT",
    "hra": "HRA",
    "ia3": "(IA)³",
    "loha": "LoHa",
    "lokr": "LoKr",
    "oft": "OFT",
    "randlora": "RandLora",
    "vblora": "VB-LoRA",
    "vera": "VeRA",
}


def refusal(pair: LoRAPair) -> str | None:
    """Return why the pair cannot be trained as one product ΔW = s·B·A, or None."""
    owner, A, B = pair.owner, pair.lora_A, pair.lora_B
    if not (A.requires_grad and B.requires_grad):
        return f"only {'lora_A' if A.requires_grad else 'lora_B'} is trainable; the two factors move together"
    kind = other_kind(owner)
    if kind is not None:
        return f"{kind}'s parameters are not the two factors of one product"
    if isinstance(getattr(owner, "lora_A", None), nn.ParameterDict):
        return f"{type(owner).__name__} keeps lora_A as a parameter, not as a layer"
    if pair.refused is not None:
        return pair.refused
    scaling = pair.stated_scaling
    if not isinstance(scaling, (numbers.Real, Tensor)):
        return "it has no LoRA scaling"
    if isinstance(scaling, Tensor) and scaling.numel() != 1:
        return f"its LoRA scaling has shape {tuple(scaling.shape)}, and must be one number"
    if not (isinstance(scaling, Tensor) and scaling.is_meta) and not 0 < float(scaling) < math.inf:
        return f"its LoRA scaling is {float(scaling)}, and must be finite and > 0"
    if A.is_complex() or B.is_complex():
        return f"it is complex ({A.dtype}); factors must have a real floating dtype"
    groups = max((getattr(module, "groups", 1) for site in pair.sites for module in site), default=1)
    if groups != 1:
        return f"its convolution has groups={groups}, each with a product of its own"
    misread = _shapes(pair)
    if misread is not None:
        return misread
    if getattr(owner, "num_experts", 1) != 1:
        return f"it holds one product for each of {owner.num_experts} experts"
    variant = _variant(pair)
    if variant is None:
        return None
    if variant in _REFUSED:
        return _REFUSED[variant]
    known = variant in _EXACT_VARIANTS or variant in _GRAD_ONLY or variant.startswith(("Dora", "MiCA"))
    return None if known else f"the LoRA variant {variant} is not known"


def _shapes(pair: LoRAPair) -> str | None:
    """Return why the factors' shapes are not those of A (r, d_in) and B (d_out, r), or leave it open, or None.

    As x @ lora_A @ lora_B, with A (d_in, r) and B (r, d_out), only square layers chain here, as a pair of rank d_in.
    """
    A, B = pair.lora_A, pair.lora_B
    shapes = f"the shapes {tuple(B.shape)} of lora_B and {tuple(A.shape)} of lora_A"
    if A.dim() < 2 or B.dim() < 2 or B.shape[1:].numel() != A.shape[0]:
        other = A.dim() == B.dim() == 2 and A.shape[1] == B.shape[0]
        return f"{shapes} do not chain (rank mismatch)" + (f"; {_TRANSPOSED}" if other else "")
    layers = [module for site in pair.sites for module in site]
    if pair.adapter is not None or (layers and all(isinstance(layer, _ORIENTED) for layer in layers)):
        return None
    if B.shape[0] != A.shape[1] or A.shape[1] > A.shape[0]:
        return None
    if A.shape[0] == A.shape[1]:
        return f"{shapes} do not tell these matrices from their transposes; {_TRANSPOSED}"
    return f"{shapes} would make a rank of {A.shape[0]} in a layer of {B.shape[0]}×{A.shape[1]}; {_TRANSPOSED}"


def other_kind(module: nn.Module) -> str | None:
    """Return the name of the method of PEFT whose adapters a module holds, where it is not LoRA; None elsewhere."""
    if not hasattr(module, "adapter_layer_names"):
        return None
    for cls in type(module).__mro__:
        package, _, kind = cls.__module__.partition("peft.tuners.")
        kind = kind.partition(".")[0]
        if package == "" and kind == "lora":
            return None
        if package == "" and kind not in ("", "tuners_utils"):
            return _KINDS.get(kind, kind)
    return None


def no_capture(pair: LoRAPair) -> str | None:
    """Return why X and S cannot be captured at the pair's inner layers, or None when they can; notes a convolution."""
    variant = _variant(pair)
    if variant in _GRAD_ONLY:
        return _GRAD_ONLY[variant]
    if pair.uncaptured is not None:
        return pair.uncaptured
    if not pair.sites:
        return "its factors are bare parameters, so their inputs cannot be seen"
    for cls in type(pair.owner).__mro__:
        if cls.__name__ in _GRAD_ONLY:
            return _GRAD_ONLY[cls.__name__]
    linear = all(isinstance(module, nn.Linear) for site in pair.sites for module in site)
    if not linear:
        ((lora_A, lora_B),) = pair.sites
        how = reading(lora_A, lora_B)
        if isinstance(how, str):
            return how
        pair.convolution = how
    if pair.adapter is None or pair.scale is not None:
        return None
    names = {cls.__name__ for cls in type(pair.owner).__mro__ if cls.__module__.startswith("peft.")}
    if names & (_PEFT_LINEAR if linear else _PEFT_CONVOLUTION) and variant in {None, *_EXACT_VARIANTS}:
        return None
    return f"{type(pair.owner).__name__} is not a layer known to run lora_B(lora_A(x))"


def _variant(pair: LoRAPair) -> str | None:
    variant = getattr(pair.owner, "lora_variant", {}).get(pair.adapter)
    return None if variant is None else type(variant).__name__
