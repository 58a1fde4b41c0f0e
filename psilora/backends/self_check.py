"""Before backend="auto" trusts the kernels on a device, they take a made-up step that is known in float64.

Once for every kind of problem (settings that choose kernels, padded rank, dtypes): a few small layers with random
factors, gradients, momentum and metric, none of them zero, are stepped and committed by the kernels, and computed in
float64 on the CPU. A kernel that does not compile, or disagrees, is replaced by the reference for that kind, with one
warning: nobody asked for it by name, and training silently wrong is worse than training slowly. An explicit
backend="triton" is not checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from psilora import runtime
from psilora.adapters.pair import LoRAPair
from psilora.backends.triton import backend as triton_backend
from psilora.backends.triton.launch import PADDED_RANKS
from psilora.options import Options, SpectralOptions
from psilora.steps import STEPS
from psilora.steps.problem import Problem, Scales
from psilora.steps.update import Update

#: ‖Δ − Δ₆₄‖ / ‖Δ₆₄‖ of every increment and state of a layer. The layers are well conditioned: fp32 is off by 1e-6 to
#: 1e-5, 16-bit products by 1e-5; a wrong index or a lost term is off by far more.
TOLERANCE = 1e-3
#: Rows of the calls of a layer with captured activations.
ROWS = (37, 21)
#: The rate, and what multiplies the gradient.
RATE, CLIP = 0.05, 0.5


@dataclass(frozen=True)
class Kind:
    """What decides which kernels a problem takes.

    Attributes:
        padded: The padded rank of its launches.
        structure: `Options.structure`.
        dtypes: Of A, B, dA, dB, and of X and S where they are captured.
        exact: Whether the gradient comes from X and S.
        aligned: Whether rows of all X and S can be read 16 bytes at a time.
        narrow: Whether the kernels for narrow layers take a spectral step; see `joint.narrow`.
    """

    device: torch.device
    padded: int
    structure: tuple[object, ...]
    dtypes: tuple[torch.dtype, ...]
    exact: bool
    aligned: bool
    narrow: bool

    def __str__(self) -> str:
        dtype = str(self.dtypes[0]).removeprefix("torch.")
        layers = ", narrow layers" if self.narrow else ""
        return f"{self.structure[0]} steps of {dtype} adapters up to rank {self.padded}{layers}"


_verdicts: dict[Kind, bool] = {}
_distrusted: list[Kind] = []


def verdicts() -> int:
    """Return a number that changes whenever kernels are found to be wrong."""
    return len(_distrusted)


def kind_of(problem: Problem) -> Kind:
    """Return the kind of a problem that the kernels support."""
    pair = problem.pair
    momentum = problem.state_A.get("momentum")
    of_gradient = STEPS[problem.options.step].remembers_gradient
    rank = max(pair.rank, momentum.shape[0] if of_gradient and momentum is not None else 0)
    chunks = problem.record.chunks if problem.exact and problem.record is not None else []
    return Kind(
        pair.lora_A.device,
        next(p for p in PADDED_RANKS if p >= rank),
        problem.options.structure,
        tuple(t.dtype for t in (pair.lora_A, pair.lora_B, problem.dA, problem.dB, *(chunks[0] if chunks else ()))),
        problem.exact,
        all(_aligned(t) for chunk in chunks for t in chunk),
        _narrow(problem),
    )


def _narrow(problem: Problem) -> bool:
    if not isinstance(problem.options, SpectralOptions):
        return False
    from psilora.backends.triton import joint

    return joint.narrow(problem)


def _aligned(matrix: Tensor) -> bool:
    return matrix.shape[1] % 16 == 0 and matrix.stride(1) == 1 and matrix.stride(0) % 16 == 0


def parted(problems: Sequence[Problem]) -> tuple[list[Problem], list[Problem]]:
    """Return the problems whose kernels have proved right, and the others; a new kind is checked now.

    A check waits for the device. One that runs out of memory is no verdict: the reference takes this step, and the
    check is made again in the next.

    Raises:
        RuntimeError: A kind has not been checked, and a CUDA graph is being captured.
    """
    found: dict[Kind, bool] = {}
    kinds = [kind_of(problem) for problem in problems]
    for kind, problem in zip(kinds, problems, strict=True):
        if kind not in found:
            found[kind] = _verdicts[kind] if kind in _verdicts else check(kind, problem.options, _ranks(problem))
    right: list[Problem] = []
    wrong: list[Problem] = []
    for kind, problem in zip(kinds, problems, strict=True):
        (right if found[kind] else wrong).append(problem)
    return right, wrong


def undecided(problems: Sequence[Problem]) -> int:
    """Return of how many problems the kind has no verdict, because the check ran out of memory."""
    return sum(kind_of(problem) not in _verdicts for problem in problems)


def compute(
    problems: Sequence[Problem], scales: Scales, backends: triton_backend.Backends | None = None
) -> list[triton_backend.Computed] | None:
    """Return the kernels' executions for proven problems of one device, or None where they fail after all.

    Raises:
        torch.OutOfMemoryError: It says nothing about the kernels.
    """
    try:
        return triton_backend.compute(problems, scales, backends)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the compiler or the driver raises, the reference still works
        for kind in {kind_of(problem) for problem in problems}:
            _distrust(kind, f"{type(error).__name__}: {error}")
        if backends is not None:
            backends.pop(problems[0].pair.lora_A.device, None)
        return None


def check(kind: Kind, options: Options, ranks: tuple[int, int]) -> bool:
    """Return whether the kernels of a kind are right, and remember it; False without a verdict if memory runs out.

    Args:
        kind: What is checked.
        options: Settings of that kind.
        ranks: r and r_m, the rank of a gradient step's momentum.
    """
    if runtime.capturing(kind.device):
        raise RuntimeError(
            f"the kernels for {kind} have not been checked on {kind.device}, which cannot be done while a CUDA graph "
            "is captured; take one step before"
        )
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.device("cpu"):
            name, off = worst_error(kind, options, ranks)
    except torch.OutOfMemoryError:
        return False
    except Exception as error:
        _distrust(kind, f"{type(error).__name__}: {error}")
        return False
    if not off <= TOLERANCE:
        _distrust(kind, f"their {name} is off by {off:.1e} in a step that is known")
        return False
    _verdicts[kind] = True
    return True


def worst_error(kind: Kind, options: Options, ranks: tuple[int, int]) -> tuple[str, float]:
    """Return what the kernels' step on made-up layers is most wrong in, and by how much."""
    torch.manual_seed(0)
    options = replace(options, lr=RATE)
    layers = [_layer(kind, options, ranks, shape) for shape in _shapes(kind, ranks[0])]
    problems = [problem for problem, _ in layers]
    scales = Scales(clip=torch.tensor(CLIP, device="cpu"))
    exact = [STEPS[options.step].updates([[oracle]], scales, None)[0] for _, oracle in layers]
    old = [_written(problem) for problem in problems]
    backends: triton_backend.Backends = {kind.device: triton_backend.Backend(narrow=kind.narrow)}
    here = Scales(clip=torch.tensor(CLIP, device=kind.device))
    _commit(triton_backend.compute(problems, here, backends), False)
    found: list[tuple[str, float]] = []
    for problem, before in zip(problems, old, strict=True):
        for name, t in _written(problem).items():
            if not torch.equal(t, before[name]):
                found.append((f"{name} of a refused step", float("inf")))
    executions = triton_backend.compute(problems, here, backends)
    steps = {
        id(problem): tuple(t.to("cpu", torch.float64, copy=True) for t in step)
        for execution in executions
        for problem, step in zip(execution.problems, execution.increments(), strict=True)
    }
    _commit(executions, True)
    for problem, before, update in zip(problems, old, exact, strict=True):
        found += _errors(problem, before, steps[id(problem)], update).items()
    return max(found, key=lambda item: float("inf") if item[1] != item[1] else item[1])


def _commit(executions: Sequence[triton_backend.Computed], ok: bool) -> None:
    """Write what was computed, or have it refused as a step is that is not finite."""
    for execution in executions:
        here = torch.full((), ok, dtype=torch.bool, device=execution.problems[0].pair.lora_A.device)
        if ok or not runtime.at_hand(here.device) or isinstance(execution, triton_backend.Execution):
            for write in execution.stage(here):
                write()


def _written(problem: Problem) -> dict[str, Tensor]:
    """Copies on the CPU of all that a commit writes, in float64."""
    found = {"B": problem.pair.lora_B.detach(), "A": problem.pair.lora_A.detach()}
    for side, state in (("B", problem.state_B), ("A", problem.state_A)):
        found.update({f"{name} of {side}": value for name, value in state.items()})
    return {name: t.to("cpu", torch.float64, copy=True) for name, t in found.items()}


def _errors(problem: Problem, old: dict[str, Tensor], steps: tuple[Tensor, ...], update: Update) -> dict[str, float]:
    """Relative errors of the increments, of how they were written, and of the new state of a committed layer."""
    new, found = _written(problem), {}
    exact = update.step_B[0], update.step_A[0]
    for side, step, wanted in zip("BA", steps, exact, strict=True):
        found[f"step of {side}"] = _relative(step, wanted)
        eps = torch.finfo(problem.pair.lora_A.dtype if side == "A" else problem.pair.lora_B.dtype).eps
        excess = (new[side] - old[side] - step).abs() - eps * (old[side].abs() + step.abs())
        found[f"commit of {side}"] = float(excess.clamp_min(0).norm() / step.norm())
    if STEPS[problem.options.step].balances(problem.options):  # their product alone is determined
        before = old["B"] @ old["A"]
        change, wanted = ((old["B"] + b) @ (old["A"] + a) - before for b, a in (steps, exact))
        found["step of B"] = found["step of A"] = _relative(change, wanted)
    for name in ("momentum", "metric"):
        state = {side: getattr(update, f"{name}_{side}") for side in ("B", "A")}
        if state["B"] is None:
            continue
        pair = {side: (new[f"{name} of {side}"], state[side][0]) for side in ("B", "A")}
        errors = {side: _relative(*both) for side, both in pair.items()}
        if name == "momentum" and max(errors.values()) > TOLERANCE:  # as a product, it may have been balanced otherwise
            (B, exact_B), (A, exact_A) = pair["B"], pair["A"]
            errors = {side: min(error, _relative(B @ A, exact_B @ exact_A)) for side, error in errors.items()}
        found.update({f"{name} of {side}": error for side, error in errors.items()})
    if update.norms is not None:
        found["norms"] = _relative(new["norms of B"], update.norms[0])
    for side in ("B", "A"):
        found[f"step count of {side}"] = float((new[f"step of {side}"] - old[f"step of {side}"] - 1).abs())
    return found


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))


def _ranks(problem: Problem) -> tuple[int, int]:
    momentum = problem.state_A.get("momentum")
    return problem.pair.rank, 0 if momentum is None else momentum.shape[0]


def _shapes(kind: Kind, rank: int) -> list[tuple[int, int]]:
    """(d_out, d_in) of the layers: wide enough for a momentum of rank 2r; odd unless rows of X and S are aligned."""
    odd = [(3 * rank + 37, 3 * rank + 50), (4 * rank + 20, 3 * rank + 85)]
    if not (kind.exact and kind.aligned):
        return odd
    return [(-(-a // 16) * 16, -(-b // 16) * 16) for a, b in odd]


def _layer(kind: Kind, options: Options, ranks: tuple[int, int], shape: tuple[int, int]) -> tuple[Problem, Problem]:
    """A problem of a kind on its device, and its twin in float64 on the CPU; nothing of either is zero."""
    (d_out, d_in), rank = shape, ranks[0]
    types = kind.dtypes
    A = (torch.randn(rank, d_in, device="cpu") / d_in**0.5).to(types[0])
    B = (torch.randn(d_out, rank, device="cpu") * (0.3 / rank**0.5)).to(types[1])
    chunks = []
    if kind.exact:
        total = sum(ROWS)
        chunks = [
            (
                torch.randn(n, d_in, device="cpu").to(types[4]),
                (torch.randn(n, d_out, device="cpu") / total).to(types[5]),
            )
            for n in ROWS
        ]
        wide = [(x.double(), s.double()) for x, s in chunks]
        dA = sum(((s @ B.double()).mT @ x for x, s in wide), torch.zeros(rank, d_in, dtype=torch.float64, device="cpu"))
        dB = sum(
            (s.mT @ (x @ A.double().mT) for x, s in wide), torch.zeros(d_out, rank, dtype=torch.float64, device="cpu")
        )
    else:
        dA, dB = (
            torch.randn(rank, d_in, device="cpu").double() / d_in,
            torch.randn(d_out, rank, device="cpu").double() / d_out,
        )
    squares = (torch.rand(d_in, device="cpu") + 0.1, (torch.rand(d_out, device="cpu") + 0.1) / sum(ROWS) ** 2)
    owner = SimpleNamespace(scaling=2.0)
    states: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    plain = LoRAPair("layer", nn.Parameter(A.float()), nn.Parameter(B.float()), owner)  # type: ignore[arg-type]
    STEPS[options.step].init_state(plain, options, *states)
    for i, (state, size, norm) in enumerate(((states[0], d_out, 1 / d_out**0.5), (states[1], d_in, float(dB.norm())))):
        state["step"] = torch.tensor(3.0, device="cpu")
        if "momentum" in state:
            rank_m = ranks[1] or state["momentum"].shape[1 - i]
            state["momentum"] = torch.randn((rank_m, size) if i else (size, rank_m), device="cpu") * norm
        if "metric" in state:
            state["metric"] = torch.rand_like(state["metric"]) + 0.1
    if "norms" in states[0]:
        norm = float(dB.norm() / A.double().norm())
        states[0]["norms"] = torch.tensor([3.0, 0.2 * norm, 5 * norm], dtype=torch.float64, device="cpu")
    low = kind.exact and (types[2].itemsize < 4 or types[3].itemsize < 4)  # the kernels form these products anew
    gradients = dA.to(types[2]), dB.to(types[3])
    exact = (dA, dB) if low else (gradients[0].double(), gradients[1].double())

    def problem(device: torch.device, double: bool) -> Problem:
        def put(t: Tensor) -> Tensor:
            return t.to(device, torch.float64 if double else t.dtype, copy=True)

        pair = LoRAPair("layer", nn.Parameter(put(A)), nn.Parameter(put(B)), owner)  # type: ignore[arg-type]
        record = SimpleNamespace(
            chunks=[(put(x), put(s)) for x, s in chunks], rows=sum(ROWS), captured=True, holds="rows", held=None,
            sum_x2=None if kind.exact else put(squares[0]), sum_s2=None if kind.exact else put(squares[1]),
        )  # fmt: skip
        known = record if kind.exact or options.captures is not None else None
        mine = [{name: put(t) for name, t in state.items()} for state in states]
        grads = [put(t) for t in (exact if double else gradients)]
        return Problem(pair, options, grads[0], grads[1], known, kind.exact, mine[1], mine[0])  # type: ignore[arg-type]

    return problem(kind.device, False), problem(torch.device("cpu"), True)


def _distrust(kind: Kind, reason: str) -> None:
    _verdicts[kind] = False
    _distrusted.append(kind)
    runtime.warn(
        f"the Triton kernels are not used on {kind.device} for {kind}: {reason}. The reference backend takes over; "
        "please report this with the output of `python -m psilora.doctor`"
    )
