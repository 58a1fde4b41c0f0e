"""The norm of the full gradient G = ∂L/∂W of every layer, by the cheapest exact route or an unbiased estimate."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from psilora.capture.storage import Dense
from psilora.distributed.communicator import Communicator
from psilora.lowrank.gradient_operator import TangentGradient, activation_blocks
from psilora.steps.batch import Batch
from psilora.steps.problem import Problem, Scales, grouped

#: Multiply-adds per layer above which ‖G‖² is estimated: about 1 ms of fp32 products on a current GPU.
SKETCH_ABOVE = 2**33
#: Random columns of an estimate. Its relative standard deviation is at most √(2/128) = 0.125 for the square of one
#: layer, reached at rank 1, and less for the sum over layers.
COLUMNS = 128


def full_squares(
    problems: Sequence[Problem], external: Tensor | None, communicator: Communicator | None, device: torch.device
) -> Tensor:
    """Return Σ‖G‖² over layers, 0-d float64 on `device`, without waiting for it. Layers known by `.grad` count ‖G_T‖².

    From X and S of N rows the square is ⟨XXᵀ, SSᵀ⟩, N²(d_in + d_out) multiply-adds, or that of G formed in blocks,
    N·d_in·d_out; above `SKETCH_ABOVE` it is ‖GΩ‖² with `COLUMNS` columns Ω/√k of fixed standard normal numbers. With
    several processes each has a part of G, whose squares do not add: GΩ is summed over them in one all-reduce, with
    Ω = I where that is no larger.

    Args:
        problems: The pairs that have gradients.
        external: c on SᵀX, or None for 1.
        communicator: Of several processes, or None.
        device: Where the result is wanted.
    """
    exact = [p for p in problems if p.exact]
    squares = [square.to(device).double() for square in _tangent_squares([p for p in problems if not p.exact])]
    scales = [1 / p.pair.scaling**2 for p in exact]
    found = [captured_square(p) for p in exact] if communicator is None else _joint_squares(exact, communicator)
    total = [scale * square.to(device).double() for scale, square in zip(scales, found, strict=True)]
    if total:
        captured = torch.stack(total).sum()
        squares.append(captured if external is None else captured * external.square())
    return torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=device)


def _tangent_squares(problems: Sequence[Problem]) -> list[Tensor]:
    return [_tangent_square(Batch(group, Scales())) for group in grouped(problems)]


def _tangent_square(b: Batch) -> Tensor:
    """Σ‖G_T‖² of layers of one shape, of gradients scaled to 1, whose squares cannot overflow."""
    largest = torch.maximum(b.left.abs().amax((1, 2)), b.right.abs().amax((1, 2)))[:, None, None]
    largest = torch.where(largest == 0, 1.0, largest)
    columns, _ = TangentGradient(b.B, b.A, b.left / largest, b.right / largest).squares()
    return (columns.sum(1).double() * largest.flatten().double().square()).sum()


def captured_square(problem: Problem) -> Tensor:
    """Return ‖S_BᵀX‖² of one layer in one process, 0-d float64: squares overflow in fp32 where products do not."""
    if problem.record is not None and isinstance(problem.record.held, Dense):
        return _square(problem.record.held.tensors()[0])
    chunks = problem.record.chunks if problem.record is not None else []
    rows, d_in, d_out = sum(len(x) for x, _ in chunks), problem.pair.d_in, problem.pair.d_out
    if rows == 0:
        return problem.pair.lora_A.new_zeros((), dtype=torch.float64)
    grams, blocks = rows**2 * (d_in + d_out), rows * d_in * d_out
    if min(grams, blocks) > SKETCH_ABOVE:
        return _square(_sketch(problem))
    if grams > blocks:
        return torch.stack([_square(block) for block in activation_blocks(chunks, problem.dtype)]).sum()
    X, S = (torch.cat([pair[i].to(problem.dtype) for pair in chunks]) for i in (0, 1))
    scale_X, scale_S = (torch.where(m == 0, 1.0, m) for m in (X.abs().amax(), S.abs().amax()))
    X, S = X / scale_X, S / scale_S
    return ((X @ X.mT) * (S @ S.mT)).sum().clamp_min(0) * (scale_X.double() * scale_S.double()).square()


def _square(matrix: Tensor) -> Tensor:
    """Return the sum of squares, 0-d float64."""
    norm: Tensor = torch.linalg.vector_norm(matrix, dtype=torch.float64)
    return norm.square()


def _joint_squares(problems: Sequence[Problem], communicator: Communicator) -> list[Tensor]:
    """Return ‖S_BᵀX‖² of layers whose rows are spread over processes and whose loss is the mean of theirs."""
    sketches = [_sketch(problem) / communicator.world_size for problem in problems]
    return [_square(sketch) for sketch in communicator.sums(sketches)]


def _sketch(problem: Problem) -> Tensor:
    """Return S_BᵀX·Ω, or ΩᵀS_BᵀX where that is smaller, such that the mean of its square is ‖S_BᵀX‖²."""
    pair, dtype, record = problem.pair, problem.dtype, problem.record
    columns = _columns(max(pair.d_in, pair.d_out), dtype, pair.lora_A.device)
    over_inputs = pair.d_in >= pair.d_out
    if record is not None and isinstance(record.held, Dense):
        matrix = record.held.tensors()[0]
        return torch.matmul(matrix, columns) if over_inputs else torch.matmul(columns.mT, matrix)
    size = pair.d_out if over_inputs else pair.d_in
    total = columns.new_zeros(size, columns.shape[1])
    for x, s in record.chunks if record is not None else ():
        wide, narrow = (x, s) if over_inputs else (s, x)
        total += narrow.to(dtype).mT @ (wide.to(dtype) @ columns)
    return total


@functools.lru_cache(maxsize=32)
def _columns(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return Ω/√k (size, k), the same in every process and step; the identity for size ≤ k."""
    if size <= COLUMNS:
        return torch.eye(size, dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(size, COLUMNS, generator=generator, dtype=dtype, device="cpu")
    columns: Tensor = numbers / COLUMNS**0.5
    return columns.to(device)
