"""`stz`: H_l = Σ_i S_iᵀP_i over the captured calls i of every layer l in one launch (the expand product).

S is read once from memory; P is fp32 and thin, and is split into three 16-bit parts as it arrives (see `xv`). A program
takes a block of columns of S and a range of tokens, which may span several calls. Where the layers have too few column
blocks to fill the device, tokens are split: each range leaves a partial, and partials are summed in a fixed order.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from psilora.triton_kernels import reduce as sums
from psilora.triton_kernels._compat import tl, triton
from psilora.triton_kernels.reduce import TokenSum
from psilora.triton_kernels.split import TRITON_DTYPES, _operand, _power_of_two, split3
from psilora.triton_kernels.tables import (
    Launch,
    PointerTable,
    Scratch,
    aligned_matrix,
    capability_of,
    fill_target,
    int32_table,
    launch_key,
    members,
)
from psilora.triton_kernels.variants import GENERATIONS, Variant

# Columns of the tables of items, each with the number of them last; those of outputs, tiles and spans are `reduce`'s.
# The rows of an item, of which a span may hold more, lie beside its addresses, since both change from step to step.
S, P, ROWS, ITEM_POINTERS = map(tl.constexpr, range(4))
S_STRIDE_N, S_STRIDE_D, P_STRIDE_N, ITEM_DIMS = map(tl.constexpr, range(4))


@triton.jit
def _stz_kernel(
    pointers_ptr, dims_ptr, layer_pointers_ptr, layer_dims_ptr, spans_ptr, tiles_ptr,
    S_DTYPE: tl.constexpr, S_UNIT: tl.constexpr, P_UNIT: tl.constexpr, S_FIRST: tl.constexpr, K_INNER: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """H = Σ SᵀP over the spans [item, begin, end) of tokens of a tile, one (BLOCK_D, BLOCK_R) tile per program.

    S_UNIT, P_UNIT: entries per 16 bytes where rows are aligned to that, else 0. S_FIRST: form SᵀP, S feeding the wide
    side of the product (Hopper, Blackwell); else its transpose PᵀS, which keeps S on the asynchronous path elsewhere.
    K_INNER: rows of every H of the launch are contiguous; not knowing it makes the store scatter.
    """
    tile = tl.program_id(0).to(tl.int64)
    layer = tl.load(tiles_ptr + tile * sums.TILE + sums.TILE_OUTPUT).to(tl.int64)
    offs_d = tl.load(tiles_ptr + tile * sums.TILE + sums.D_BLOCK) * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_r = tl.load(tiles_ptr + tile * sums.TILE + sums.R_BLOCK) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.load(tiles_ptr + tile * sums.TILE + sums.SPLIT).to(tl.int64)
    first = tl.load(tiles_ptr + tile * sums.TILE + sums.FIRST_SPAN)
    end = tl.load(tiles_ptr + tile * sums.TILE + sums.END_SPAN)
    offs_n = tl.arange(0, BLOCK_N)
    d = tl.load(layer_dims_ptr + layer * sums.OUTPUT + sums.OUT_D)
    k = tl.load(layer_dims_ptr + layer * sums.OUTPUT + sums.OUT_K)
    # Without these hints on what was loaded from a table, the copies fall back to single elements.
    if S_UNIT > 0:
        d = tl.multiple_of(d, S_UNIT)
    if P_UNIT > 0:
        k = tl.multiple_of(k, P_UNIT)
    columns_d = offs_d < d
    columns_r = offs_r < k

    scale = tl.full((BLOCK_R,), 1.0, dtype=tl.float32)
    unscale = scale
    if S_DTYPE == tl.float16:
        top = tl.zeros((BLOCK_R,), dtype=tl.float32)
        for span in range(first, end):
            item = tl.load(spans_ptr + span * sums.SPAN + sums.ITEM).to(tl.int64)
            p_ptr = tl.load(pointers_ptr + item * ITEM_POINTERS + P).to(tl.pointer_type(tl.float32))
            stride_p_n = tl.load(dims_ptr + item * ITEM_DIMS + P_STRIDE_N)
            if P_UNIT > 0:
                p_ptr = tl.multiple_of(p_ptr, 16)
                stride_p_n = tl.multiple_of(stride_p_n, P_UNIT)
            known = tl.load(pointers_ptr + item * ITEM_POINTERS + ROWS).to(tl.int32)
            stop = tl.minimum(tl.load(spans_ptr + span * sums.SPAN + sums.STOP), known)
            for n0 in range(tl.load(spans_ptr + span * sums.SPAN + sums.BEGIN), stop, BLOCK_N):
                rows = n0 + offs_n
                p_ptrs = p_ptr + rows[:, None] * stride_p_n.to(tl.int64) + offs_r[None, :]
                p = tl.load(p_ptrs, mask=(rows < stop)[:, None] & columns_r[None, :], other=0.0)
                top = tl.maximum(top, tl.max(tl.abs(p), axis=0))
        scale, unscale = _power_of_two(top)

    # One accumulator per part: chaining products into one is miscompiled for some Blackwell chips.
    if S_FIRST:
        main = tl.zeros((BLOCK_D, BLOCK_R), dtype=tl.float32)
        second = tl.zeros((BLOCK_D, BLOCK_R), dtype=tl.float32)
        third = tl.zeros((BLOCK_D, BLOCK_R), dtype=tl.float32)
    else:
        main = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
        second = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
        third = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    for span in range(first, end):
        item = tl.load(spans_ptr + span * sums.SPAN + sums.ITEM).to(tl.int64)
        begin = tl.load(spans_ptr + span * sums.SPAN + sums.BEGIN)
        known = tl.load(pointers_ptr + item * ITEM_POINTERS + ROWS).to(tl.int32)
        # Not below `begin`: with a length that may be negative the loop spills where it is compiled for Blackwell.
        stop = tl.maximum(begin, tl.minimum(tl.load(spans_ptr + span * sums.SPAN + sums.STOP), known))
        s_ptr = tl.load(pointers_ptr + item * ITEM_POINTERS + S).to(tl.pointer_type(S_DTYPE))
        p_ptr = tl.load(pointers_ptr + item * ITEM_POINTERS + P).to(tl.pointer_type(tl.float32))
        stride_s_n = tl.load(dims_ptr + item * ITEM_DIMS + S_STRIDE_N)
        stride_p_n = tl.load(dims_ptr + item * ITEM_DIMS + P_STRIDE_N)
        offs_b = (begin + offs_n).to(tl.int64)
        if S_UNIT > 0:
            s_ptr = tl.multiple_of(s_ptr, 16)
            stride_s_n = tl.multiple_of(stride_s_n, S_UNIT).to(tl.int64)
            s_ptrs = s_ptr + offs_b[:, None] * stride_s_n + offs_d[None, :]
        else:
            stride_s_n = stride_s_n.to(tl.int64)
            stride_s_d = tl.load(dims_ptr + item * ITEM_DIMS + S_STRIDE_D).to(tl.int64)
            s_ptrs = s_ptr + offs_b[:, None] * stride_s_n + offs_d[None, :] * stride_s_d
        if P_UNIT > 0:
            p_ptr = tl.multiple_of(p_ptr, 16)
            stride_p_n = tl.multiple_of(stride_p_n, P_UNIT)
        stride_p_n = stride_p_n.to(tl.int64)
        if S_FIRST:
            p_ptrs = p_ptr + offs_b[:, None] * stride_p_n + offs_r[None, :]
        else:
            p_ptrs = p_ptr + offs_b[None, :] * stride_p_n + offs_r[:, None]
        for n0 in range(begin, stop, BLOCK_N):
            rows = offs_n < stop - n0
            s = _operand(tl.load(s_ptrs, mask=rows[:, None] & columns_d[None, :], other=0.0))  # [BN, BD]
            if S_FIRST:
                s = tl.trans(s)
                p = tl.load(p_ptrs, mask=rows[:, None] & columns_r[None, :], other=0.0)  # [BN, BR]
            else:
                p = tl.load(p_ptrs, mask=columns_r[:, None] & rows[None, :], other=0.0)  # [BR, BN]
            if S_DTYPE == tl.float32:
                if S_FIRST:
                    main = tl.dot(s, p, main, input_precision="ieee")
                else:
                    main = tl.dot(p, s, main, input_precision="ieee")
            else:
                if S_DTYPE == tl.float16:
                    p = p * (scale[None, :] if S_FIRST else scale[:, None])
                hi, mid, lo = split3(p, S_DTYPE)
                if S_FIRST:
                    main = tl.dot(s, hi, main)
                    second = tl.dot(s, mid, second)
                    third = tl.dot(s, lo, third)
                else:
                    main = tl.dot(hi, s, main)
                    second = tl.dot(mid, s, second)
                    third = tl.dot(lo, s, third)
            s_ptrs += BLOCK_N * stride_s_n
            p_ptrs += BLOCK_N * stride_p_n
    total = main + (second + third)

    h_ptr = tl.load(layer_pointers_ptr + layer).to(tl.pointer_type(tl.float32))
    stride_h_d = tl.load(layer_dims_ptr + layer * sums.OUTPUT + sums.OUT_STRIDE_D).to(tl.int64)
    columns_h = offs_r
    if not K_INNER:
        columns_h = offs_r * tl.load(layer_dims_ptr + layer * sums.OUTPUT + sums.OUT_STRIDE_K).to(tl.int64)
    h_ptr += split * tl.load(layer_dims_ptr + layer * sums.OUTPUT + sums.OUT_STRIDE_SPLIT)
    if S_FIRST:
        h_ptrs = h_ptr + offs_d[:, None] * stride_h_d + columns_h[None, :]
        tl.store(h_ptrs, total * unscale[None, :], mask=columns_d[:, None] & columns_r[None, :])
    else:
        h_ptrs = h_ptr + offs_d[None, :] * stride_h_d + columns_h[:, None]
        tl.store(h_ptrs, total * unscale[:, None], mask=columns_r[:, None] & columns_d[None, :])


@dataclass(frozen=True)
class STZConfig:
    """Tile sizes of `_stz_kernel` and how it is compiled."""

    block_n: int
    block_d: int
    num_warps: int
    num_stages: int
    s_first: bool
    maxnreg: int | None = None


def stz_config(dtype: torch.dtype, fast: bool, block_r: int, capability: int) -> STZConfig:
    """Return the tiles for S of `dtype` on a device of this compute capability (90 for 9.0)."""
    s_first = 90 <= capability < 120
    if dtype == torch.float32 or not fast:
        return STZConfig(block_n=32, block_d=64, num_warps=4 if fast else 8, num_stages=2, s_first=s_first)
    num_warps = 4 if block_r < 32 else 8
    if block_r > 32 or not s_first:
        # Left alone, ptxas takes 158 registers for 12.0, with which one program fits a multiprocessor, not two.
        bound = 128 if block_r == 32 and capability >= 120 else None
        if dtype == torch.float16 and block_r < 32 and capability in (86, 89):
            bound = 168  # alone it takes 128 and spills 8 bytes, but shared memory lets no more than two programs in
        return STZConfig(block_n=32, block_d=128, num_warps=num_warps, num_stages=4, s_first=s_first, maxnreg=bound)
    return STZConfig(block_n=64, block_d=128, num_warps=num_warps, num_stages=3, s_first=s_first)


def stz(
    s: Sequence[Tensor], p: Sequence[Tensor], layers: Sequence[int], *, out: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Return H_l = Σ_{i: layers[i] = l} S_iᵀP_i for every layer l.

    16-bit S is multiplied with a three-way split of P and fp32 accumulators, fp32 S in fp32: both are as accurate as an
    fp32 product. Bitwise reproducible. Nothing waits for the device.

    Args:
        s: S_i, (N_i, d_l), bf16, fp16 or fp32, any strides; one dtype per layer.
        p: P_i, (N_i, k_l), fp32, unit inner stride, k_l ≥ 1.
        layers: The layer of each item, non-decreasing. Without `out`, every layer 0 … max must have an item.
        out: H_l, (d_l, k_l), fp32, any strides (pass `h.T` to fill a (k, d) matrix), fully overwritten; a layer without
            items or tokens becomes 0. Allocated if None.

    Raises:
        ValueError: shapes that do not match, a dtype, stride or size outside the above.
    """
    if out is None:
        shapes = {layer: (a.shape[1], b.shape[1]) for layer, a, b in zip(layers, s, p, strict=True)}
        if sorted(shapes) != list(range(len(shapes))):
            raise ValueError(f"stz: layers {sorted(shapes)} have items; without out it must be 0, 1, 2 …")
        out = [torch.empty(shapes[i], dtype=torch.float32, device=s[0].device) for i in range(len(shapes))]
    if len(out):
        plan = STZPlan(s, p, layers, out)
        plan.table.upload()
        plan.launch()
    return list(out)


def stz_ref(s: Sequence[Tensor], p: Sequence[Tensor], layers: Sequence[int]) -> list[Tensor]:
    """Return H_l = Σ S_iᵀP_i in float64, for layers 0 … max that all have an item."""
    totals: dict[int, Tensor] = {}
    for a, b, layer in zip(s, p, layers, strict=True):
        product = a.double().T @ b.double()
        totals[layer] = totals[layer] + product if layer in totals else product
    return [totals[layer] for layer in sorted(totals)]


class STZPlan(TokenSum):
    """`stz` prepared for one set of shapes; used like `XVPlan`, the constructor binds too.

    With `reduce=True` the sums over split tokens are taken by a second small launch and `out` is filled. With
    `reduce=False` there is no `out`: every layer leaves its partials and the consumer adds them in order.

    Attributes:
        num_splits: Per layer, the number of partials, at least 1.
    """

    def __init__(
        self,
        s: Sequence[Tensor],
        p: Sequence[Tensor],
        layers: Sequence[int],
        out: Sequence[Tensor] | None,
        *,
        shapes: Sequence[tuple[int, int]] | None = None,
        table: PointerTable | None = None,
        reduce: bool = True,
        programs: int | None = None,
        capability: int | None = None,
        scratch: Scratch | None = None,
        rows: Sequence[int] | None = None,
    ) -> None:
        """Build the tables.

        Args:
            s: S_i, as in `stz`.
            p: P_i, as in `stz`.
            layers: The layer of each item, as in `stz`.
            out: H_l, as in `stz`; None with `reduce=False`.
            shapes: (d_l, k_l) per layer, needed where `out` is None.
            table: The pointer table shared by the kernels of a step (None: the plan makes its own).
            reduce: Whether this plan adds the partials.
            programs: How many programs fill the device; default two per multiprocessor.
            capability: Compute capability to choose tiles for (90 for 9.0); default that of the device.
            scratch: Where the partials lie; default memory of their own.
            rows: The most rows N_i that S_i may ever have, for which P_i has room; None for as many as now.
        """
        if out is not None:
            shapes = [(h.shape[0], h.shape[1]) for h in out]
        if shapes is None or (out is None) == reduce:
            raise ValueError("stz: give out with reduce=True, or shapes and no out with reduce=False")
        _check(s, p, layers, shapes, out, rows)
        super().__init__({"s": s, "p": p}, layers, shapes, out, table, scratch, rows)
        strides = ((*a.stride(), b.stride(0)) for a, b in zip(s, p, strict=True))
        self._item_dims = int32_table(strides, ITEM_DIMS.value, self.device)
        groups: dict[tuple[torch.dtype, bool, object, int], list[int]] = {}
        for layer, ((_, k), items) in enumerate(zip(shapes, self._members, strict=True)):
            dtype = s[items[0]].dtype if items else torch.float32
            fast_s, fast_p = (all(aligned_matrix(t[i]) for i in items) for t in (s, p))
            groups.setdefault(launch_key(dtype, fast_s, fast_p, k), []).append(layer)
        launches = []
        for (dtype, fast_s, aligned_p, block_r), group in groups.items():
            config = stz_config(dtype, fast_s, block_r, capability or capability_of(self.device))
            tiles = self._cut(group, config.block_n, config.block_d, block_r, programs or fill_target(self.device))
            tile_map = int32_table(tiles, sums.TILE.value, self.device)
            inner = all(out is None or self.num_splits[o] > 1 or out[o].stride(1) == 1 for o in group)
            constexprs = _constexprs(dtype, fast_s, bool(aligned_p), inner, block_r, config)
            launches.append(
                Launch(_stz_kernel, tile_map, constexprs, config.num_warps, config.num_stages, config.maxnreg)
            )
        self._complete(launches, out)
        self.bind(s, p, out)

    def bind(
        self,
        s: Sequence[Tensor] | None = None,
        p: Sequence[Tensor] | None = None,
        out: Sequence[Tensor] | None = None,
    ) -> None:
        """Stage new addresses; ValueError if a tensor's shape, strides, dtype or alignment are not the plan's."""
        self._bind((s, p), out)

    def launch(self) -> None:
        """Run the kernels with the addresses last uploaded; no host synchronisation."""
        self._launch(self._item_dims)

    def partials(self, layer: int) -> Tensor:
        """Return the (num_splits, d, k) fp32 partials of a layer, contiguous; their address never changes.

        Raises:
            ValueError: the layer has none, because its one part is written to `out`.
        """
        part = self._partials[layer]
        if part is None:
            raise ValueError(f"layer {layer} is not split: its sum is written to out")
        return part


def _check(
    s: Sequence[Tensor],
    p: Sequence[Tensor],
    layers: Sequence[int],
    shapes: Sequence[tuple[int, int]],
    out: Sequence[Tensor] | None,
    rows: Sequence[int] | None,
) -> None:
    if not len(s) == len(p) == len(layers):
        raise ValueError(f"stz: got {len(s)} s, {len(p)} p and {len(layers)} layers; one of each per item")
    for i, h in enumerate(out or ()):
        if h.dtype != torch.float32:
            raise ValueError(f"stz: out[{i}] has dtype {h.dtype}; must be float32")
    for layer, items in enumerate(members(layers, len(shapes))):
        d, k = shapes[layer]
        for i in items:
            a, b = s[i], p[i]
            if a.dim() != 2 or b.dim() != 2 or a.shape[1] != d or b.shape != (rows[i] if rows else a.shape[0], k):
                got = tuple(a.shape), tuple(b.shape)
                raise ValueError(f"stz: item {i} has shapes {got}; layer {layer} needs (N, {d}) and (N, {k})")
            if a.dtype not in TRITON_DTYPES or a.dtype != s[items[0]].dtype:
                raise ValueError(f"stz: s[{i}] has dtype {a.dtype}; must be 16-bit or float32, one per layer")
            if b.dtype != torch.float32 or (k > 1 and b.stride(1) != 1):
                raise ValueError(f"stz: p[{i}] is {b.dtype} with strides {b.stride()}; must be float32, inner stride 1")


def _constexprs(
    dtype: torch.dtype, fast_s: bool, fast_p: bool, k_inner: bool, block_r: int, config: STZConfig
) -> dict[str, object]:
    return {
        "S_DTYPE": TRITON_DTYPES[dtype],
        "S_UNIT": 16 // dtype.itemsize if fast_s else 0,
        "P_UNIT": 4 if fast_p else 0,
        "S_FIRST": config.s_first,
        "K_INNER": k_inner,
        "BLOCK_N": config.block_n,
        "BLOCK_D": config.block_d,
        "BLOCK_R": block_r,
    }


def _variants() -> Iterator[Variant]:
    names = ("pointers_ptr", "dims_ptr", "layer_pointers_ptr", "layer_dims_ptr", "spans_ptr", "tiles_ptr")
    signature = {name: "*i64" if "pointers" in name else "*i32" for name in names}
    cases = [
        (torch.bfloat16, True, True, 16, 168),
        (torch.bfloat16, True, True, 32, 128),
        (torch.bfloat16, True, False, 16, 168),
        (torch.bfloat16, True, True, 64, 255),
        (torch.bfloat16, False, False, 32, 168),
        (torch.float16, True, True, 16, 168),
        (torch.float16, True, True, 32, 168),
        (torch.float32, True, True, 64, 168),
        (torch.float32, False, False, 32, 168),
    ]
    for dtype, fast_s, fast_p, block_r, registers in cases:
        for name, targets in GENERATIONS.items():
            config = stz_config(dtype, fast_s, block_r, targets[0])
            kind = str(dtype).removeprefix("torch.") + ("" if fast_s else "_slow") + ("" if fast_p else "_p")
            yield Variant(
                name=f"stz_{kind}_r{block_r}_{name}",
                kernel=_stz_kernel,
                signature=signature,
                constexprs=_constexprs(dtype, fast_s, fast_p, fast_s, block_r, config),
                aligned=names,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
                streaming=fast_s and fast_p,
                max_registers=registers,
                maxnreg=config.maxnreg,
                targets=targets,
            )


VARIANTS = list(_variants())
