"""One whole step on tensors, without a model, a module or an optimizer: the core that `psilora.PSILoRA` runs on stacks.

Nothing is changed in place:

    state = init(B, A, step="spectral", momentum=0.9)
    B, A, state = step(B, A, state, lora_gradients=(dB, dA), lr=0.1, step="spectral", momentum=0.9)

The settings are those of `psilora.PSILoRA` from `step` to `loss_reduction`, with its defaults; both functions must be
given the same. Shapes: B (d_out, r), A (r, d_in), for the weight's low-rank part ΔW = scaling·B·A.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from psilora.adapters.pair import LoRAPair
from psilora.capture.record import stand_alone
from psilora.linalg.precision import full_precision
from psilora.options import OPTION_NAMES, Options, check_rate, defaults, refuse_foreign, resolved
from psilora.steps import STEPS
from psilora.steps.problem import Problem, Scales
from psilora.steps.state import init_state

#: What is remembered of (lora_B, lora_A) from step to step; see the state of `psilora.PSILoRA`.
State: TypeAlias = tuple[dict[str, Tensor], dict[str, Tensor]]


def init(B: Tensor, A: Tensor, **settings: Any) -> State:
    """Return the state before the first step, on the device of B and A, fp32 or (for fp64 factors) fp64.

    Args:
        B: The factor (d_out, r).
        A: The factor (r, d_in).
        settings: As for `step`.

    Raises:
        ValueError: A setting is out of range or belongs to the other kind of step, or the shapes do not chain.
    """
    pair = _pair(B, A, 1.0)
    state: State = {}, {}
    init_state(pair, _options(0.0, settings), *state)
    return state


@torch.no_grad()
def step(
    B: Tensor,
    A: Tensor,
    state: State,
    *,
    lr: float | Tensor,
    lora_gradients: tuple[Tensor, Tensor] | None = None,
    activations: tuple[Tensor, Tensor] | Sequence[tuple[Tensor, Tensor]] | None = None,
    scaling: float = 1.0,
    **settings: Any,
) -> tuple[Tensor, Tensor, State]:
    """Return the new (B, A, state) after one step; the arguments stay as they are.

    Args:
        B: The factor (d_out, r), of a floating dtype.
        A: The factor (r, d_in).
        state: From `init` or the last step.
        lr: η ≥ 0, a number or a one-element tensor.
        lora_gradients: (dB (d_out, r), dA (r, d_in)), what autograd leaves in `.grad` of B and A, for a spectral step
            or gradient="tangent".
        activations: (X (N, d_in), S (N, d_out)), the layer's input and the loss's gradient at the layer's output, or
            several of them, for a gradient step with gradient="exact": G = ∂L/∂W = SᵀX. The LoRA gradients are computed
            from them.
        scaling: s > 0.
        settings: Of the step; see above.

    Raises:
        ValueError: As for `init`; or the settings ask for what was not given.
    """
    options = _options(lr, settings)
    check_rate(lr)
    pair = _pair(B, A, scaling)
    exact = options.captures is not None
    if (activations is None) == exact or (lora_gradients is None) != exact:
        needed = "activations" if exact else "lora_gradients"
        raise ValueError(f"step={options.step!r} with gradient={options.gradient!r} needs {needed} and nothing else")
    if exact and options.gradient != "exact":
        raise ValueError(f"Invalid gradient={options.gradient!r}. Must be 'exact' or 'tangent' without a model.")
    if not isinstance(scaling, (int, float)) or not scaling > 0:
        raise ValueError(f"Invalid scaling={scaling!r}. Must be > 0.")
    record = None
    if activations is not None:
        calls = [activations] if isinstance(activations[0], Tensor) else list(activations)
        chunks = [_rows(pair, *call) for call in calls]  # type: ignore[misc]
        record = stand_alone(pair, [(x, scaling * s) for x, s in chunks])
        dB = sum((scaling * s.mT @ (x @ pair.A.to(x.dtype).mT) for x, s in chunks), torch.zeros_like(pair.B))
        dA = sum((scaling * (s @ pair.B.to(s.dtype)).mT @ x for x, s in chunks), torch.zeros_like(pair.A))
    else:
        dB, dA = lora_gradients  # type: ignore[misc]
        for name, given, wanted in (("dB", dB, B), ("dA", dA, A)):
            if given.shape != wanted.shape:
                raise ValueError(f"Invalid {name} of shape {tuple(given.shape)}. Must be {tuple(wanted.shape)}.")
    new_B, new_A = ({name: t.clone() for name, t in side.items()} for side in state)
    problem = Problem(pair, options, dA.detach(), dB.detach(), record, exact, state_A=new_A, state_B=new_B)
    with full_precision(B.device.type):
        (update,) = STEPS[options.step].updates([[problem]], Scales(), None)
        for write in update.stage(torch.ones((), dtype=torch.bool, device=B.device)):
            write()
    return pair.lora_B.detach(), pair.lora_A.detach(), (new_B, new_A)


def _options(lr: float | Tensor, settings: Mapping[str, Any]) -> Options:
    unknown = set(settings) - set(OPTION_NAMES)
    if unknown:
        raise ValueError(f"unknown settings {sorted(unknown)}; allowed are {', '.join(OPTION_NAMES)}")
    given = {**defaults(), "step": "spectral", "metric": "auto", "gradient": None, **settings}
    found = resolved(given)
    refuse_foreign(settings, found["step"])
    return Options.of_settings({**found, "lr": lr})


def _pair(B: Tensor, A: Tensor, scaling: float) -> LoRAPair:
    """A pair of copies of the factors."""
    if B.dim() != 2 or A.dim() != 2 or B.shape[1] != A.shape[0]:
        raise ValueError(
            f"the shapes {tuple(B.shape)} of B and {tuple(A.shape)} of A do not chain (d_out, r), (r, d_in)"
        )
    lora_A, lora_B = (nn.Parameter(t.detach().clone(), requires_grad=False) for t in (A, B))
    return LoRAPair("the pair", lora_A, lora_B, SimpleNamespace(scaling=scaling))  # type: ignore[arg-type]


def _rows(pair: LoRAPair, X: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    if X.dim() != 2 or S.dim() != 2 or len(X) != len(S) or (X.shape[1], S.shape[1]) != (pair.d_in, pair.d_out):
        raise ValueError(
            f"Invalid X and S of shapes {tuple(X.shape)} and {tuple(S.shape)}. Must be (N, {pair.d_in}) and "
            f"(N, {pair.d_out})."
        )
    return X.detach(), S.detach()
