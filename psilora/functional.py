"""One whole step on tensors, without a model, a module or an optimizer: the core that `psilora.PSILoRA` runs on stacks.

Nothing is changed in place:

    state = init(B, A, step="spectral", momentum=0.9)
    B, A, state = step(B, A, state, lora_gradients=(dB, dA), lr=0.1, step="spectral", momentum=0.9)

The settings are those of `psilora.PSILoRA` from `step` to `loss_reduction`, with its defaults; both functions must be
given the same. Shapes: B (d_out, r), A (r, d_in), for the weight's low-rank part ΔW = scaling·B·A.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from psilora.adapters.pair import LoRAPair
from psilora.capture.record import stand_alone
from psilora.linalg.precision import compute_dtype, full_precision
from psilora.options import OPTION_NAMES, Options, check_rate, defaults, is_real, refuse_foreign, resolved
from psilora.param_groups.lora import check_pair
from psilora.steps import STEPS
from psilora.steps.problem import Problem, Scales
from psilora.steps.state import check_pair_state, init_state

#: What is remembered of (lora_B, lora_A) from step to step; see the state of `psilora.PSILoRA`.
State: TypeAlias = tuple[dict[str, Tensor], dict[str, Tensor]]


def init(B: Tensor, A: Tensor, **settings: Any) -> State:
    """Return the state before the first step, on the device of B and A, fp32 or (for fp64 factors) fp64.

    Args:
        B: The factor (d_out, r).
        A: The factor (r, d_in).
        settings: As for `step`.

    Raises:
        ValueError: A setting is out of range, belongs to the other kind of step or is not for factors of this size, or
            the factors are not floating-point matrices whose shapes chain.
    """
    options = _options(0.0, settings)
    pair = _pair(B, A, options, 1.0)
    state: State = {}, {}
    init_state(pair, options, *state)
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
    scaling: float | Tensor = 1.0,
    **settings: Any,
) -> tuple[Tensor, Tensor, State]:
    """Return the new (B, A, state) after one step; the arguments stay as they are.

    Args:
        B: The factor (d_out, r), of a floating dtype.
        A: The factor (r, d_in).
        state: From `init` or the last step.
        lr: η ≥ 0, a number or a one-element tensor.
        lora_gradients: (dB (d_out, r), dA (r, d_in)), what autograd leaves in `.grad` of B and A, for a spectral step
            or, without a metric, gradient="tangent".
        activations: (X (N, d_in), S (N, d_out)), the layer's input and the loss's gradient at the layer's output, or
            several of them, for a gradient step with gradient="exact": G = ∂L/∂W = SᵀX; or for the statistics of a
            metric with gradient="tangent". The LoRA gradients are computed from them.
        scaling: s > 0, a number or a one-element tensor.
        settings: Of the step; see above.

    Raises:
        ValueError: As for `init`; the settings ask for what was not given, or the state is not one of theirs.
    """
    options = _options(lr, settings)
    check_rate(lr)
    scaling = _number(scaling)
    pair = _pair(B, A, options, scaling)
    captured = options.captures is not None
    if (activations is None) == captured or (lora_gradients is None) != captured:
        needed = "activations" if captured else "lora_gradients"
        raise ValueError(
            f"step={options.step!r} with gradient={options.gradient!r} and metric={options.metric!r} needs {needed} "
            "and nothing else"
        )
    record = None
    if activations is not None:
        chunks = [_rows(pair, *call) for call in _calls(activations)]
        record = stand_alone(pair, [(x, scaling * s) for x, s in chunks])
        dB = sum((scaling * s.mT @ (x @ pair.A.to(x.dtype).mT) for x, s in chunks), torch.zeros_like(pair.B))
        dA = sum((scaling * (s @ pair.B.to(s.dtype)).mT @ x for x, s in chunks), torch.zeros_like(pair.A))
    else:
        dB, dA = _gradients(pair, lora_gradients)
    _check_state(pair, options, state)
    new_B, new_A = ({name: t.clone() for name, t in side.items()} for side in state)
    exact = options.gradient == "exact"
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
    options = Options.of_settings({**found, "lr": lr})
    if options.gradient not in ("exact", "tangent"):
        raise ValueError(f"Invalid gradient={options.gradient!r}. Must be 'exact' or 'tangent' without a model.")
    return options


def _pair(B: Tensor, A: Tensor, options: Options, scaling: float) -> LoRAPair:
    """A pair of copies of the factors, which these settings can serve."""
    B, A = _floating("B", B), _floating("A", A)
    if B.dim() != 2 or A.dim() != 2 or B.shape[1] != A.shape[0]:
        raise ValueError(
            f"the shapes {tuple(B.shape)} of B and {tuple(A.shape)} of A do not chain (d_out, r), (r, d_in)"
        )
    if 0 in (*B.shape, *A.shape):
        raise ValueError(f"Invalid B and A of shapes {tuple(B.shape)} and {tuple(A.shape)}. No side may be 0.")
    if compute_dtype(B.dtype) != compute_dtype(A.dtype):
        raise ValueError(f"Invalid dtypes {B.dtype} of B and {A.dtype} of A. Must be both float64, or neither.")
    lora_A, lora_B = (nn.Parameter(t.detach().clone(), requires_grad=False) for t in (A, B))
    pair = LoRAPair("the pair", lora_A, lora_B, SimpleNamespace(scaling=scaling))  # type: ignore[arg-type]
    check_pair(pair, options)
    return pair


def _check_state(pair: LoRAPair, options: Options, state: object) -> None:
    """Raise ValueError for what `init` would not have returned for these factors and settings."""
    if not (isinstance(state, (tuple, list)) and len(state) == 2 and all(isinstance(side, Mapping) for side in state)):
        raise ValueError(f"Invalid state={_said(state)}. Must be what init, or the last step, has returned.")
    check_pair_state(pair, options, {id(pair.lora_B): state[0], id(pair.lora_A): state[1]}, complete=True)


def _number(scaling: object) -> float:
    if isinstance(scaling, Tensor) and scaling.numel() != 1:
        raise ValueError(f"Invalid scaling of shape {tuple(scaling.shape)}. Must be a number or a one-element tensor.")
    value = scaling.item() if isinstance(scaling, Tensor) else scaling
    if not (is_real(value) and 0 < value < math.inf):  # type: ignore[operator]
        raise ValueError(f"Invalid scaling={value!r}. Must be finite and > 0.")
    return float(value)  # type: ignore[arg-type]


def _floating(name: str, value: object) -> Tensor:
    if not (isinstance(value, Tensor) and value.is_floating_point()):
        what = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"Invalid {name} of type {what}. Must be a tensor of a floating dtype.")
    return value


def _two(value: object) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(t, Tensor) for t in value)


def _said(value: object) -> str:
    """A value in an error; what may be large by its type alone."""
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_said, value))})"
    return type(value).__name__ if isinstance(value, (Tensor, Mapping)) else repr(value)


def _calls(activations: object) -> Sequence[tuple[Tensor, Tensor]]:
    calls: Any = [activations] if _two(activations) else activations
    if not (isinstance(calls, (tuple, list)) and calls and all(map(_two, calls))):
        raise ValueError(f"Invalid activations={_said(activations)}. Must be (X, S), or a list of one or more of them.")
    return calls


def _gradients(pair: LoRAPair, lora_gradients: object) -> tuple[Tensor, Tensor]:
    if not _two(lora_gradients):
        raise ValueError(f"Invalid lora_gradients={_said(lora_gradients)}. Must be two tensors (dB, dA).")
    given: Any = lora_gradients
    dB, dA = _floating("dB", given[0]), _floating("dA", given[1])
    for name, gradient, factor in (("dB", dB, pair.B), ("dA", dA, pair.A)):
        if gradient.shape != factor.shape:
            raise ValueError(f"Invalid {name} of shape {tuple(gradient.shape)}. Must be {tuple(factor.shape)}.")
    return dB, dA


def _rows(pair: LoRAPair, X: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    X, S = _floating("X", X), _floating("S", S)
    if X.dim() != 2 or S.dim() != 2 or len(X) != len(S) or (X.shape[1], S.shape[1]) != (pair.d_in, pair.d_out):
        raise ValueError(
            f"Invalid X and S of shapes {tuple(X.shape)} and {tuple(S.shape)}. Must be (N, {pair.d_in}) and "
            f"(N, {pair.d_out})."
        )
    return X.detach(), S.detach()
