"""Find the LoRA pairs of a model."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from psilora.adapters.pair import LoRAPair, Unsupported, listed
from psilora.adapters.peft import no_capture, other_kind, refusal
from psilora.adapters.registry import registered
from psilora.adapters.tied import tied


def find_pairs(model: nn.Module) -> tuple[list[LoRAPair], list[Unsupported]]:
    """Return the trainable LoRA pairs of `model` in module order, and what looks like LoRA but cannot be one pair.

    Recognised are PEFT's LoRA layers (the trainable adapters of each), `psilora.LoRALinear` and any module whose
    `lora_A` and `lora_B` are linear or convolutions with a numeric `scaling`, modules with bare parameters, and what
    `psilora.adapters.register` was told of, torchtune's layers and the home-made x @ lora_A @ lora_B among them.
    Modules that share both parameters are one pair; pairs whose parameters are others on shared memory are none.
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


def none_found(model: nn.Module) -> str:
    """Return why a model has no trainable pair, and what to do about it."""
    frozen = [pair.name for path, module in model.named_modules() for pair in _held(path, module)]
    if frozen:
        return (
            f"its pairs are frozen (requires_grad=False): {listed(frozen)}; load adapters to train on with "
            "PeftModel.from_pretrained(…, is_trainable=True), choose one by set_adapter(name), or set requires_grad"
        )
    kinds: dict[str, str] = {}
    for path, module in model.named_modules():
        kind = other_kind(module)
        if kind is not None:
            kinds.setdefault(kind, path)
    if kinds:
        found = listed([f"{kind} ({path})" for kind, path in kinds.items()])
        return (
            f"its adapters are {found}, whose parameters are not the two factors of one product; train them with "
            "torch.optim.AdamW, or adapt the model by a LoraConfig"
        )
    return "add adapters before building the optimizer"


def _candidates(path: str, module: nn.Module) -> Iterator[LoRAPair | Unsupported]:
    for pair in _held(path, module):
        yield from _classify(pair)


def _held(path: str, module: nn.Module) -> Iterator[LoRAPair]:
    """The pairs of a module, whether trainable or not."""
    known = registered(module)
    for entry in known:
        name = path if entry.name is None else f"{path} ({entry.name})"
        for pair in _pair(name, module, entry.lora_A, entry.lora_B, entry.name):
            pair.scale, pair.uncaptured, pair.refused = entry.scaling, entry.uncaptured, entry.refused
            yield pair
    if known:
        return
    for prefix in ("lora_", "lora_embedding_"):
        A, B = getattr(module, f"{prefix}A", None), getattr(module, f"{prefix}B", None)
        if isinstance(A, (nn.ModuleDict, nn.ParameterDict)) and isinstance(B, (nn.ModuleDict, nn.ParameterDict)):
            for adapter in A:
                if adapter in B:
                    name = path if adapter == "default" else f"{path} ({adapter})"
                    yield from _pair(name, module, A[adapter], B[adapter], adapter)
        elif A is not None and B is not None:
            yield from _pair(path, module, A, B, None)


def _pair(name: str, owner: nn.Module, A: object, B: object, adapter: str | None) -> Iterator[LoRAPair]:
    weight_A, weight_B = (x if isinstance(x, nn.Parameter) else getattr(x, "weight", None) for x in (A, B))
    if not isinstance(weight_A, nn.Parameter) or not isinstance(weight_B, nn.Parameter):
        return
    pair = LoRAPair(name, weight_A, weight_B, owner, adapter)
    if isinstance(A, nn.Module) and isinstance(B, nn.Module):
        pair.sites.append((A, B))
    yield pair


def _classify(pair: LoRAPair) -> Iterator[LoRAPair | Unsupported]:
    """Yield the pair with `uncaptured` set, an `Unsupported`, or nothing for a frozen adapter."""
    if not (pair.lora_A.requires_grad or pair.lora_B.requires_grad):
        return
    reason = refusal(pair)
    if reason is not None:
        yield _refuse(pair, reason)
        return
    pair.uncaptured = no_capture(pair)
    yield pair


def _refuse(pair: LoRAPair, reason: str) -> Unsupported:
    trainable = [p for p in (pair.lora_A, pair.lora_B) if p.requires_grad]
    return Unsupported(pair.name, reason, trainable)
