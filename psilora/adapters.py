"""Find the LoRA pairs of a model and say, per pair, whether their activations can be captured."""

from __future__ import annotations

import numbers
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from psilora.patches import Convolution, reading
from psilora.tied import tied

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


@dataclass(eq=False)
class LoRAPair:
    """The two factors of one adapter, ΔW = scaling · B · A.

    Attributes:
        name: Path of the adapted module, with the adapter's name where it is not "default".
        lora_A, lora_B: The parameters; `A` and `B` view them as matrices (r, d_in) and (d_out, r).
        sites: The (lora_A, lora_B) modules to capture at; more than one where modules share the parameters.
        uncaptured: Why activations cannot be captured, or None when they can.
        convolution: How lora_A reads its input where it is a convolution, or None; see `psilora.patches`.
    """

    name: str
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    owner: nn.Module
    adapter: str | None = None
    sites: list[tuple[nn.Module, nn.Module]] = field(default_factory=list)
    uncaptured: str | None = None
    convolution: Convolution | None = None

    @property
    def scaling(self) -> float:
        """The current s, read from the module because adapters can be rescaled while training."""
        scaling = self.owner.scaling
        value = float(scaling[self.adapter] if self.adapter is not None else scaling)  # type: ignore[index, arg-type]
        if not value > 0:
            raise ValueError(f"{self.name}: invalid LoRA scaling={value}. Must be > 0.")
        return value

    @property
    def trainable(self) -> bool:
        """Whether both factors require a gradient now; one that does not is never moved, and they move together."""
        return self.lora_A.requires_grad and self.lora_B.requires_grad

    @property
    def path(self) -> str:
        """The path of the adapted module alone."""
        return self.name.removesuffix(f" ({self.adapter})")

    @property
    def A(self) -> Tensor:
        """`lora_A` as a matrix (r, d_in), sharing its storage."""
        return as_matrix(self.lora_A)

    @property
    def B(self) -> Tensor:
        """`lora_B` as a matrix (d_out, r), sharing its storage."""
        return as_matrix(self.lora_B)

    @property
    def rank(self) -> int:
        """Return r."""
        return self.lora_A.shape[0]

    @property
    def d_in(self) -> int:
        """Return the width of A, the layer's input width for a linear layer."""
        return self.lora_A.shape[1:].numel()

    @property
    def d_out(self) -> int:
        """Return the height of B, the layer's output width for a linear layer."""
        return self.lora_B.shape[0]


def as_matrix(tensor: Tensor) -> Tensor:
    """Return a factor (or its gradient) as a matrix: convolution kernels are flattened behind the first dimension."""
    return tensor.detach().flatten(1)


@dataclass(eq=False)
class Unsupported:
    """Adapter parameters that are not the two factors of one product, and why."""

    name: str
    reason: str
    parameters: list[nn.Parameter]


def find_pairs(model: nn.Module) -> tuple[list[LoRAPair], list[Unsupported]]:
    """Return the trainable LoRA pairs of `model` in module order, and what looks like LoRA but cannot be one pair.

    Recognised are PEFT's LoRA layers (the trainable adapters of each), `psilora.LoRALinear` and any module whose
    `lora_A` and `lora_B` are linear or convolutions with a numeric `scaling`, and modules with bare parameters. Modules
    that share both parameters are one pair; pairs whose parameters are others on shared memory are none.
    """
    pairs: list[LoRAPair] = []
    unsupported: list[Unsupported] = []
    by_factors: dict[tuple[int, int], LoRAPair] = {}
    seen: dict[int, str] = {}
    for path, module in model.named_modules():
        for found in _candidates(path, module):
            if isinstance(found, Unsupported):
                unsupported.append(found)
                continue
            factors = (id(found.lora_A), id(found.lora_B))
            if factors in by_factors:  # two modules tied to the same pair: one pair, captured at both
                _tie(by_factors[factors], found)
                continue
            shared = [seen[key] for key in factors if key in seen]
            if shared:
                unsupported.append(_refuse(found, f"it shares one factor with {shared[0]}, but not the other"))
                continue
            by_factors[factors] = found
            seen.update(dict.fromkeys(factors, found.name))
            pairs.append(found)
    partners = tied([[(pair.name, pair.lora_A), (pair.name, pair.lora_B)] for pair in pairs])
    for pair, partner in zip(pairs, partners, strict=True):
        if partner is not None:
            reason = (
                f"its factors lie in the memory of those of {partner}, as with PEFT's ensure_weight_tying, and would "
            )
            unsupported.append(_refuse(pair, f"{reason}be moved by two steps at once; freeze one of the two"))
    return [pair for pair, partner in zip(pairs, partners, strict=True) if partner is None], unsupported


def _tie(pair: LoRAPair, other: LoRAPair) -> None:
    """Capture at another pair's modules too, which hold the same parameters."""
    hooked = {id(module) for site in pair.sites for module in site}
    pair.sites.extend(site for site in other.sites if not hooked & set(map(id, site)))
    pair.uncaptured = pair.uncaptured or other.uncaptured
    if pair.uncaptured is None and pair.convolution != other.convolution:
        pair.uncaptured = f"it shares its factors with {other.name}, which reads its input in another way"


def _candidates(path: str, module: nn.Module) -> Iterator[LoRAPair | Unsupported]:
    for prefix in ("lora_", "lora_embedding_"):
        A, B = getattr(module, f"{prefix}A", None), getattr(module, f"{prefix}B", None)
        if isinstance(A, (nn.ModuleDict, nn.ParameterDict)) and isinstance(B, (nn.ModuleDict, nn.ParameterDict)):
            for adapter in A:
                if adapter in B:
                    name = path if adapter == "default" else f"{path} ({adapter})"
                    yield from _classify(_pair(name, module, A[adapter], B[adapter], adapter))
        elif A is not None and B is not None:
            yield from _classify(_pair(path, module, A, B, None))


def _pair(name: str, owner: nn.Module, A: object, B: object, adapter: str | None) -> LoRAPair | None:
    weight_A, weight_B = (x if isinstance(x, nn.Parameter) else getattr(x, "weight", None) for x in (A, B))
    if not isinstance(weight_A, nn.Parameter) or not isinstance(weight_B, nn.Parameter):
        return None
    pair = LoRAPair(name, weight_A, weight_B, owner, adapter)
    if isinstance(A, nn.Module) and isinstance(B, nn.Module):
        pair.sites.append((A, B))
    return pair


def _classify(pair: LoRAPair | None) -> Iterator[LoRAPair | Unsupported]:
    """Yield the pair with `uncaptured` set, an `Unsupported`, or nothing for a frozen adapter."""
    if pair is None or not (pair.lora_A.requires_grad or pair.lora_B.requires_grad):
        return
    reason = _refusal(pair)
    if reason is not None:
        yield _refuse(pair, reason)
        return
    pair.uncaptured = _no_capture(pair)
    yield pair


def _refusal(pair: LoRAPair) -> str | None:
    """Return why the pair cannot be trained as one product ΔW = s·B·A, or None."""
    owner, A, B = pair.owner, pair.lora_A, pair.lora_B
    if not (A.requires_grad and B.requires_grad):
        return f"only {'lora_A' if A.requires_grad else 'lora_B'} is trainable; the two factors move together"
    if isinstance(getattr(owner, "lora_A", None), nn.ParameterDict):
        return f"{type(owner).__name__} keeps lora_A as a parameter, not as a layer"
    scaling = getattr(owner, "scaling", None)
    if isinstance(scaling, dict):
        scaling = scaling.get(pair.adapter)
    if not isinstance(scaling, (numbers.Real, Tensor)):
        return "it has no LoRA scaling"
    if not (isinstance(scaling, Tensor) and scaling.is_meta) and not float(scaling) > 0:
        return f"its LoRA scaling is {float(scaling)}, and must be > 0"
    if A.is_complex() or B.is_complex():
        return f"it is complex ({A.dtype}); factors must have a real floating dtype"
    groups = max((getattr(module, "groups", 1) for site in pair.sites for module in site), default=1)
    if groups != 1:
        return f"its convolution has groups={groups}, each with a product of its own"
    if A.dim() < 2 or B.dim() < 2 or B.shape[1:].numel() != A.shape[0]:
        return f"the shapes {tuple(B.shape)} of lora_B and {tuple(A.shape)} of lora_A do not chain (rank mismatch)"
    if getattr(owner, "num_experts", 1) != 1:
        return f"it holds one product for each of {owner.num_experts} experts"
    variant = _variant(pair)
    if variant is None:
        return None
    if variant in _REFUSED:
        return _REFUSED[variant]
    known = variant in _EXACT_VARIANTS or variant in _GRAD_ONLY or variant.startswith(("Dora", "MiCA"))
    return None if known else f"the LoRA variant {variant} is not known"


def _no_capture(pair: LoRAPair) -> str | None:
    """Return why X and S cannot be captured at the pair's inner layers, or None when they can; notes a convolution."""
    variant = _variant(pair)
    if variant in _GRAD_ONLY:
        return _GRAD_ONLY[variant]
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
    if pair.adapter is None:
        return None
    names = {cls.__name__ for cls in type(pair.owner).__mro__ if cls.__module__.startswith("peft.")}
    if names & (_PEFT_LINEAR if linear else _PEFT_CONVOLUTION) and variant in {None, *_EXACT_VARIANTS}:
        return None
    return f"{type(pair.owner).__name__} is not a layer known to run lora_B(lora_A(x))"


def _variant(pair: LoRAPair) -> str | None:
    variant = getattr(pair.owner, "lora_variant", {}).get(pair.adapter)
    return None if variant is None else type(variant).__name__


def _refuse(pair: LoRAPair, reason: str) -> Unsupported:
    trainable = [p for p in (pair.lora_A, pair.lora_B) if p.requires_grad]
    return Unsupported(pair.name, reason, trainable)


def check_model(model: object, *, sharded: bool = False) -> nn.Module:
    """Return `model` if it can be optimized here; refuse wrappers whose gradients cannot be used, by name.

    Args:
        model: What the user passed.
        sharded: Whether parameters may be DTensors.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}; pass the model, not its parameters")
    if isinstance(model, nn.DataParallel):
        raise ValueError(
            "the model is wrapped in nn.DataParallel, whose replicas hide their activations; "
            "use DistributedDataParallel or a single device"
        )
    if any(cls.__name__ == "DeepSpeedEngine" for cls in type(model).__mro__) or any(
        hasattr(parameter, "ds_id") for parameter in model.parameters()
    ):
        raise ValueError("the model is managed by DeepSpeed, which owns its gradients; use DDP or a single device")
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.is_complex():
            raise ValueError(f"{name} is complex ({parameter.dtype}); must have a real floating dtype")
        if not sharded and type(parameter).__name__ == "DTensor":
            raise ValueError(f"{name} is sharded (DTensor); this optimizer needs whole parameters, as under DDP")
        if parameter.device.type == "meta":
            raise ValueError(f"{name} is on the meta device; materialise the model first")
    return model


def listed(names: list[str], limit: int = 8) -> str:
    """Return "name, name … and n more" for an error or warning, cut after `limit` names."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def describe(items: list[LoRAPair] | list[Unsupported]) -> str:
    """Return "name (reason), …" for an error or warning."""
    return listed([f"{i.name} ({i.reason if isinstance(i, Unsupported) else i.uncaptured})" for i in items])


def is_sparse(tensor: Tensor) -> bool:
    """Whether a gradient is in a sparse layout, which the thin products cannot use."""
    return tensor.layout != torch.strided
