"""What the kernels of the joint spectral step share: their tables, the rows of a side, and the weights of its columns.

A side of a layer has the rows Y = [F·v; M₁; M₂; D] (4r, d): the factor F, A or Bᵀ; the two halves of its momentum; and
the gradient of F; v > 0 are the squared weights of the d columns. Whitened they are Z = Y/√v. A row of block b and
number k has index b·RP + k, where RP is r padded to a power of two.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from psilora.triton_kernels import slots
from psilora.triton_kernels._compat import tl, triton
from psilora.triton_kernels.layout import UNALIGNED, address, element, sizes
from psilora.triton_kernels.variants import JOINT_TARGETS, Variant, joint_targets

# Columns of the address table (int64, one row per layer); column c of A's side is c, of B's side c + 1.
FACTOR = tl.constexpr(slots.J_FACTOR)
GRAD = tl.constexpr(slots.J_GRAD)
MOMENTUM = tl.constexpr(slots.J_MOMENTUM)
METRIC = tl.constexpr(slots.J_METRIC)
FRESH_ROOT = tl.constexpr(slots.J_FRESH)
STEPS = tl.constexpr(slots.J_STEPS)
COUNT = tl.constexpr(slots.J_COUNT)
NORMS = tl.constexpr(slots.J_NORMS)
LR = tl.constexpr(slots.J_LR)
ADDRESSES = tl.constexpr(slots.J_ADDRESSES)

# Columns of the settings (fp32, one row per layer).
BETA = tl.constexpr(slots.S_BETA)
BETA_REST = tl.constexpr(slots.S_BETA_REST)
DAMPING = tl.constexpr(slots.S_DAMPING)
POWER = tl.constexpr(slots.S_POWER)
MU = tl.constexpr(slots.S_MU)
MU_REST = tl.constexpr(slots.S_MU_REST)
FRESH = tl.constexpr(slots.S_FRESH)
DECAY = tl.constexpr(slots.S_DECAY)
RIDGE = tl.constexpr(slots.S_RIDGE)
RATE_FACTOR = tl.constexpr(slots.S_FACTOR)
SCALING = tl.constexpr(slots.S_SCALING)
SIGN = tl.constexpr(slots.S_SIGN)
CAP = tl.constexpr(slots.S_CAP)
LOOSE = tl.constexpr(slots.S_LOOSE)
COUNTING = tl.constexpr(slots.COUNTING)
SETTINGS = tl.constexpr(slots.S_SETTINGS)

# Columns of a tile's sums (fp32).
NEW_UNIT = tl.constexpr(0)  # a power of two above every root in the tile, and Σ (root/unit)²
NEW_SUM = tl.constexpr(1)
OLD_UNIT = tl.constexpr(2)
OLD_SUM = tl.constexpr(3)
SUMS = tl.constexpr(4)

# Columns of what is found out about a layer's gradient (fp32, one row per layer).
TAKEN = tl.constexpr(0)  # κ
SHARE = tl.constexpr(1)  # φ
SIGMA = tl.constexpr(2)  # √mean(D⁺) of sides A and B, 2 and 3; 1 where D⁺ = 0
NEW_STEPS = tl.constexpr(4)  # t, n̂ and n̄
SEEN = tl.constexpr(8)

#: A mean gradient norm below which a layer counts as one without a gradient.
LEAST_NORM = tl.constexpr(slots.LEAST_NORM)
#: The largest gradient norm that is counted, in units of the mean.
LARGEST = tl.constexpr(slots.LARGEST)


@triton.jit
def parts_of(parts_ptr, layers, problem, SIDE: tl.constexpr):
    """Return the first tile of a side of a layer, and how many there are."""
    at = parts_ptr + (SIDE * layers + problem) * 2
    return tl.load(at), tl.load(at + 1)


@triton.jit
def _gathered(sums_ptr, parts_ptr, layers, problem, SIDE: tl.constexpr, COLUMN: tl.constexpr):
    """Return (unit, Σ/unit²) of a side from the units and sums of its tiles."""
    first, count = parts_of(parts_ptr, layers, problem, SIDE)
    tile = tl.arange(0, 32)
    unit = tl.full((), 0.0, tl.float32)
    for t in range(0, count, 32):
        inside = t + tile < count
        units = tl.load(sums_ptr + (first + t + tile) * SUMS + COLUMN, mask=inside, other=0.0)
        unit = tl.maximum(unit, tl.max(units, axis=0))
    total = tl.full((), 0.0, tl.float32)
    safe = tl.where(unit > 0.0, unit, 1.0)
    for t in range(0, count, 32):
        inside = t + tile < count
        at = sums_ptr + (first + t + tile) * SUMS + COLUMN
        share = tl.load(at, mask=inside, other=0.0) / safe
        total += tl.sum(tl.load(at + 1, mask=inside, other=0.0) * share * share, axis=0)
    return unit, total


@triton.jit
def _hypot(a, b):
    """Return √(a² + b²) for a, b ≥ 0 of any magnitude."""
    top = tl.maximum(a, b)
    unit = tl.where(top > 0.0, top, 1.0)
    return top * tl.sqrt_rn((a / unit) * (a / unit) + (b / unit) * (b / unit))


@triton.jit
def _raised(base, exponent):
    """Return base^exponent for an integer exponent ≥ 0 by repeated squares."""
    result = tl.full((), 1.0, tl.float32)
    while exponent > 0:
        result = tl.where((exponent & 1) == 1, result * base, result)
        base = base * base
        exponent = exponent >> 1
    return result


@triton.jit
def seen(
    addresses_ptr, settings_ptr, dims_ptr, parts_ptr, sums_ptr, frozen_ptr, layers, problem,
    FOLLOWS: tl.constexpr, FADES: tl.constexpr,
):  # fmt: skip
    """Return κ, φ, √mean(D⁺) of A and of B, and the new t, n̂, n̄ of a layer: see `psilora.lowrank.spectral.followed`."""
    r, _, d_in = sizes(dims_ptr, problem, 0)
    _, _, d_out = sizes(dims_ptr, problem, 1)
    own = settings_ptr + problem * SETTINGS
    new_unit_a, new_sum_a = _gathered(sums_ptr, parts_ptr, layers, problem, 0, NEW_UNIT)
    new_unit_b, new_sum_b = _gathered(sums_ptr, parts_ptr, layers, problem, 1, NEW_UNIT)
    old_unit_a, old_sum_a = _gathered(sums_ptr, parts_ptr, layers, problem, 0, OLD_UNIT)
    old_unit_b, old_sum_b = _gathered(sums_ptr, parts_ptr, layers, problem, 1, OLD_UNIT)
    new_a = new_unit_a * tl.sqrt_rn(new_sum_a)
    new_b = new_unit_b * tl.sqrt_rn(new_sum_b)
    taken = tl.full((), 1.0, tl.float32)
    share = tl.full((), 1.0, tl.float32)
    t = tl.full((), 0.0, tl.float32)
    recent = tl.full((), 0.0, tl.float32)
    mean = tl.full((), 0.0, tl.float32)
    if FOLLOWS:
        norm = _hypot(new_a, new_b) * tl.sqrt_rn(r.to(tl.float32))
        norms = address(addresses_ptr, problem, NORMS, tl.float64, ADDRESSES)
        t = tl.load(norms).to(tl.float32)
        recent = tl.load(norms + 1).to(tl.float32)
        mean = tl.load(norms + 2).to(tl.float32)
        begun = mean >= LEAST_NORM
        cap = tl.load(own + CAP)
        taken = tl.where(begun & (norm > cap * mean), cap * mean / tl.where(norm > 0.0, norm, 1.0), 1.0)
        norm = tl.where(begun, tl.minimum(norm, LARGEST * mean), norm)
        t = tl.where(begun, t + 1.0, 1.0)
        mu = tl.load(own + MU)
        recent = mu * recent + tl.load(own + MU_REST) * norm
        mean = tl.where(begun, mean + (norm - mean) / t, norm)
        if FADES:
            size = recent / (1.0 - _raised(mu, t.to(tl.int32)))
            counts = mean >= LEAST_NORM
            share = tl.where(counts, tl.minimum(size / tl.where(counts, mean, 1.0), 1.0), 0.0)
    fresh = tl.sqrt_rn(tl.load(own + BETA_REST)) * taken
    beta = tl.sqrt_rn(tl.load(own + BETA))
    old_a = old_unit_a * tl.sqrt_rn(old_sum_a)
    old_b = old_unit_b * tl.sqrt_rn(old_sum_b)
    sigma_a = tl.where(tl.load(frozen_ptr + problem) != 0, old_a, _hypot(beta * old_a, fresh * new_a))
    sigma_b = _hypot(beta * old_b, fresh * new_b)
    sigma_a /= tl.sqrt_rn(d_in.to(tl.float32))
    sigma_b /= tl.sqrt_rn(d_out.to(tl.float32))
    sigma_a = tl.where(sigma_a > 0.0, sigma_a, 1.0)
    sigma_b = tl.where(sigma_b > 0.0, sigma_b, 1.0)
    return taken, share, sigma_a, sigma_b, t, recent, mean


@triton.jit
def raised(settings_ptr, base):
    """Return base^γ."""
    gamma = tl.load(settings_ptr + POWER)
    return tl.where(gamma == 1.0, base, tl.exp2(gamma * tl.log2(base)))


@triton.jit
def weights(addresses_ptr, settings_ptr, problem, taken, sigma, frozen, n, inside, SIDE: tl.constexpr):
    """Return v = (D̂ + δ)^γ of columns n, 1 on a frozen side, √(D⁺), and D̂ = D⁺/mean(D⁺)."""
    own = settings_ptr + problem * SETTINGS
    old = tl.load(address(addresses_ptr, problem, METRIC + SIDE, tl.float32, ADDRESSES) + n, mask=inside, other=0.0)
    new = tl.load(address(addresses_ptr, problem, FRESH_ROOT + SIDE, tl.float32, ADDRESSES) + n, mask=inside, other=0.0)
    a = old / sigma
    b = new / sigma * taken
    ratio = tl.load(own + BETA) * (a * a) + tl.load(own + BETA_REST) * (b * b)
    v = tl.where(frozen, 1.0, raised(own, ratio + tl.load(own + DAMPING)))
    return v, tl.where(frozen, old, sigma * tl.sqrt_rn(ratio)), ratio


@triton.jit
def spread(
    addresses_ptr, settings_ptr, dims_ptr, problem, taken, sigma, frozen, SIDE: tl.constexpr, SPAN: tl.constexpr
):  # fmt: skip
    """Return N_U of a side, see `psilora.lowrank.spectral.spread`; 1 on a frozen side."""
    r, _, d = sizes(dims_ptr, problem, SIDE)
    own = settings_ptr + problem * SETTINGS
    counted = tl.zeros((SPAN,), tl.float32)
    inverse = tl.zeros((SPAN,), tl.float32)
    for first in range(0, d, SPAN):
        n = first + tl.arange(0, SPAN)
        inside = n < d
        v, _root, ratio = weights(addresses_ptr, settings_ptr, problem, taken, sigma, frozen, n, inside, SIDE)
        p = tl.where(inside, (1.0 + COUNTING) * ratio / (ratio + COUNTING), 0.0)
        counted += p
        inverse += p / v
    total = tl.sum(counted, axis=0)
    most = tl.minimum(r, d).to(tl.float32)
    elsewhere = tl.maximum(most - total, 0.0) / raised(own, tl.load(own + DAMPING))
    return tl.where(frozen, 1.0, (tl.sum(inverse, axis=0) + elsewhere) / tl.maximum(total, most))


@triton.jit
def _across(x, AXIS: tl.constexpr):
    return x[:, None] if AXIS == 0 else x[None, :]


@triton.jit
def aligned(base, offset, AXIS: tl.constexpr, TRANSPOSED: tl.constexpr, WHOLE: tl.constexpr):
    """Return base + offset, pointers to rows along AXIS, stored as (k, n) or TRANSPOSED as (n, k), as WHOLE promises.

    The sum is formed here: what is said of an argument is lost, as is what is said of what a call returns.
    """
    at = base + offset
    if not WHOLE:
        return at
    elif (AXIS == 1) == TRANSPOSED:  # memory runs along axis 1
        return tl.multiple_of(tl.max_contiguous(at, (1, 8)), (1, 16))
    else:
        return tl.multiple_of(tl.max_contiguous(at, (8, 1)), (16, 1))


@triton.jit
def rows_of(
    addresses_ptr, dims_ptr, problem, row, n, end,
    SIDE: tl.constexpr, RP: tl.constexpr, AXIS: tl.constexpr, WHOLE: tl.constexpr, F_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
):  # fmt: skip
    """Return the rows [F; M₁; M₂; D] of index `row` at columns n < end in fp32, and where they are those of F.

    `row` and `n` are vectors; rows run along AXIS. Rows come in eights of one block. WHOLE: r is RP,
    all n are below the end and d is a multiple of 64, and rows and matrices begin at multiples of 16 bytes.
    """
    r, _, d = sizes(dims_ptr, problem, SIDE)
    T: tl.constexpr = SIDE == 1
    block = row // RP
    k = row % RP
    own = (block > 0) & (block < 3)
    column = _across(n, 1 - AXIS)
    of_f = _across(block, AXIS) == 0
    inside = of_f | True
    if WHOLE:
        r = RP
    else:
        inside = _across(k, AXIS) < r
        inside = inside & (column < end)
    if F_TYPE == tl.float32 and G_TYPE == tl.float32:
        f = tl.load(addresses_ptr + problem * ADDRESSES + FACTOR + SIDE)
        g = tl.load(addresses_ptr + problem * ADDRESSES + GRAD + SIDE)
        m = tl.load(addresses_ptr + problem * ADDRESSES + MOMENTUM + SIDE)
        start = tl.where(block == 0, f, tl.where(block == 3, g, m)).to(tl.pointer_type(tl.float32))
        start = tl.max_constancy(start, 8)
        index = tl.max_contiguous(tl.where(own, (block - 1) * r + k, k), 8)
        leading = tl.max_constancy(tl.where(own, 2 * r, r), 8) if T else tl.zeros_like(row) + d
        offset = element(_across(index, AXIS), column, _across(leading, AXIS), T)
        at = aligned(_across(start, AXIS), offset, AXIS, T, WHOLE)
        if WHOLE:
            return tl.load(at), of_f
        else:
            return tl.load(at, mask=inside, other=0.0), of_f
    else:
        f = address(addresses_ptr, problem, FACTOR + SIDE, F_TYPE, ADDRESSES)
        g = address(addresses_ptr, problem, GRAD + SIDE, G_TYPE, ADDRESSES)
        m = address(addresses_ptr, problem, MOMENTUM + SIDE, tl.float32, ADDRESSES)
        at = element(_across(tl.max_contiguous(k, 8), AXIS), column, r if T else d, T)
        index = tl.max_contiguous((block - 1) * r + k, 8)
        at_m = element(_across(index, AXIS), column, 2 * r if T else d, T)
        block = _across(block, AXIS)
        last_of = block == 3
        middle_of = (block > 0) & (block < 3)
        first_of = of_f
        if not WHOLE:
            first_of, middle_of, last_of = first_of & inside, middle_of & inside, last_of & inside
        first = tl.load(aligned(f, at, AXIS, T, WHOLE), mask=first_of, other=0.0).to(tl.float32)
        last = tl.load(aligned(g, at, AXIS, T, WHOLE), mask=last_of, other=0.0).to(tl.float32)
        middle = tl.load(aligned(m, at_m, AXIS, T, WHOLE), mask=middle_of, other=0.0)
        return first + last + middle, of_f


def rows_of_piece(padded: int, blocks: int) -> int:
    """Return the rows and columns of a piece of Γ that one program forms.

    Up to 64 rows all at once. Of more, whose pieces are also products of rows with others, 32: larger ones would be
    formed by sm_90's asynchronous products, which compiled code run on a CPU left as NaN.
    """
    rows = padded * blocks
    return max(16, rows) if rows <= 64 else 32


def pieces_table(padded: int, blocks: int, device: torch.device) -> Tensor:
    """Return the pieces that cover the lower triangle of Γ, (pieces, 2) int32: of rows, and of columns."""
    return torch.tensor(pieces_of(padded, blocks), dtype=torch.int32, device=device)


def pieces_of(padded: int, blocks: int) -> list[tuple[int, int]]:
    """Return the pieces that cover the lower triangle of Γ: of rows, and of columns."""
    rows = rows_of_piece(padded, blocks)
    return [(i, j) for i in range(-(-padded * blocks // rows)) for j in range(i + 1)]


_TYPES = {
    "addresses_ptr": "*i64", "settings_ptr": "*fp32", "dims_ptr": "*i32", "tiles_ptr": "*i32", "parts_ptr": "*i32",
    "pieces_ptr": "*i32", "sums_ptr": "*fp32", "frozen_ptr": "*i32", "out_ptr": "*fp32", "exponents_ptr": "*i32",
    "flags_ptr": "*i32", "roots_ptr": "*fp32", "clip_ptr": "*fp32", "layers": "i32",
}  # fmt: skip


def variant(
    name: str, kernel: Any, padded: int, constexprs: dict[str, Any], shape: dict[str, Any],
    targets: tuple[int, ...] = JOINT_TARGETS, **limits: Any,
) -> Variant:  # fmt: skip
    """Return a variant of one of these kernels, `shape` its blocks and how it is compiled."""
    signature = {n: _TYPES[n] for n in kernel.arg_names if n in _TYPES}
    own = {key: value for key, value in shape.items() if key in kernel.arg_names}
    return Variant(
        name=f"{name}_r{padded}",
        kernel=kernel,
        signature=signature,
        constexprs={"RP": padded, **constexprs, **own},
        aligned=tuple(n for n in signature if n.endswith("_ptr") and n not in (*UNALIGNED, "settings_ptr", "clip_ptr")),
        **{key: value for key, value in shape.items() if key not in own},
        **limits,
        targets=tuple(target for target in joint_targets(padded) if target in targets),
    )


#: Types of the rows that are compiled, by what they add to a variant's name.
TYPES = {
    "": {"F_A": tl.bfloat16, "F_B": tl.float32, "G_A": tl.float32, "G_B": tl.bfloat16, "WHOLE": False},
    "_fp32": {**dict.fromkeys(("F_A", "F_B", "G_A", "G_B"), tl.float32), "WHOLE": True},
}
