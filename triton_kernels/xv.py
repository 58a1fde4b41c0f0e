"""`xv`: P_i = X_i·F_iᵀ for the rows X of all layers in one launch (the shrink product).

X is read once from memory. F is fp32 and small: it is split into three 16-bit parts as it arrives, which reads fewer
bytes from the L2 cache than parts made beforehand (4 per entry instead of 6), needs no workspace, and still compiles to
asynchronous 16-byte copies of both operands in front of tensor-core products, on every target.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from psilora.triton_kernels._compat import tl, triton
from psilora.triton_kernels.split import TRITON_DTYPES, _operand, _power_of_two, split3
from psilora.triton_kernels.tables import (
    Launch,
    Layouts,
    PointerTable,
    aligned_matrix,
    blocks,
    capability_of,
    common_device,
    fill_target,
    int32_table,
    launch_key,
)
from psilora.triton_kernels.variants import GENERATIONS, Variant

# Columns of the tables, each with the number of them last: addresses, sizes and strides of an item, and the tile map.
# The number of rows lies beside the addresses, since both change from step to step.
X, F, P, N, POINTERS = map(tl.constexpr, range(5))
D, K, X_STRIDE_N, X_STRIDE_D, F_STRIDE_K, F_STRIDE_D, P_STRIDE_N, DIMS = map(tl.constexpr, range(8))
ITEM, M_BLOCK, R_BLOCK, TILE = map(tl.constexpr, range(4))

ANY, ALONG_D, ALONG_K = 0, 1, 2


@triton.jit
def _xv_kernel(
    pointers_ptr,
    dims_ptr,
    tiles_ptr,
    X_DTYPE: tl.constexpr,
    X_UNIT: tl.constexpr,
    F_ORDER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """P = X·Fᵀ, one (BLOCK_M, BLOCK_R) tile per program.

    X_UNIT: entries of X per 16 bytes where its rows are aligned to that, else 0. F_ORDER: 0 any strides, 1 unit stride
    along d, 2 along k, both aligned to 16 bytes.
    """
    tile = tl.program_id(0).to(tl.int64)
    item = tl.load(tiles_ptr + tile * TILE + ITEM).to(tl.int64)
    offs_m = tl.load(tiles_ptr + tile * TILE + M_BLOCK).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.load(tiles_ptr + tile * TILE + R_BLOCK).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = tl.arange(0, BLOCK_D)
    x_ptr = tl.load(pointers_ptr + item * POINTERS + X).to(tl.pointer_type(X_DTYPE))
    f_ptr = tl.load(pointers_ptr + item * POINTERS + F).to(tl.pointer_type(tl.float32))
    p_ptr = tl.load(pointers_ptr + item * POINTERS + P).to(tl.pointer_type(tl.float32))
    n = tl.load(pointers_ptr + item * POINTERS + N)
    d = tl.load(dims_ptr + item * DIMS + D)
    k = tl.load(dims_ptr + item * DIMS + K)
    stride_x_n = tl.load(dims_ptr + item * DIMS + X_STRIDE_N)
    stride_f_k = tl.load(dims_ptr + item * DIMS + F_STRIDE_K)
    stride_f_d = tl.load(dims_ptr + item * DIMS + F_STRIDE_D)
    stride_p_n = tl.load(dims_ptr + item * DIMS + P_STRIDE_N).to(tl.int64)
    # A tile beyond the rows of this step, which a plan for more has, reads nothing.
    d = tl.where(tl.load(tiles_ptr + tile * TILE + M_BLOCK).to(tl.int64) * BLOCK_M < n, d, 0)
    # Without these hints on what was loaded from a table, the copies fall back to single elements.
    if X_UNIT > 0:
        x_ptr = tl.multiple_of(x_ptr, 16)
        d = tl.multiple_of(d, X_UNIT)
        x_ptrs = x_ptr + offs_m[:, None] * tl.multiple_of(stride_x_n, X_UNIT).to(tl.int64) + offs_d[None, :]
        step_x = BLOCK_D
    else:
        stride_x_d = tl.load(dims_ptr + item * DIMS + X_STRIDE_D).to(tl.int64)
        x_ptrs = x_ptr + offs_m[:, None] * stride_x_n.to(tl.int64) + offs_d[None, :] * stride_x_d
        step_x = BLOCK_D * stride_x_d
    if F_ORDER == 1:
        f_ptr = tl.multiple_of(f_ptr, 16)
        if X_UNIT == 0:  # a second hint would replace the first, not add to it
            d = tl.multiple_of(d, 4)
        f_ptrs = f_ptr + offs_r[None, :] * tl.multiple_of(stride_f_k, 4).to(tl.int64) + offs_d[:, None]
        step_f = BLOCK_D
    elif F_ORDER == 2:
        f_ptr = tl.multiple_of(f_ptr, 16)
        k = tl.multiple_of(k, 4)
        stride_f_d = tl.multiple_of(stride_f_d, 4).to(tl.int64)
        f_ptrs = f_ptr + offs_r[None, :] + offs_d[:, None] * stride_f_d
        step_f = BLOCK_D * stride_f_d
    else:
        f_ptrs = f_ptr + offs_r[None, :] * stride_f_k.to(tl.int64) + offs_d[:, None] * stride_f_d.to(tl.int64)
        step_f = BLOCK_D * stride_f_d.to(tl.int64)
    rows = (offs_m < n)[:, None]
    columns = (offs_r < k)[None, :]

    main = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    if X_DTYPE == tl.float32:
        for d0 in range(0, d, BLOCK_D):
            inside = offs_d < d - d0
            x = tl.load(x_ptrs, mask=rows & inside[None, :], other=0.0)  # [BM, BD]
            f = tl.load(f_ptrs, mask=inside[:, None] & columns, other=0.0)  # [BD, BR]
            main = tl.dot(x, f, main, input_precision="ieee")
            x_ptrs += step_x
            f_ptrs += step_f
    else:
        scale = tl.full((BLOCK_R,), 1.0, dtype=tl.float32)
        if X_DTYPE == tl.float16:
            top = tl.zeros((BLOCK_R,), dtype=tl.float32)
            top_ptrs = f_ptrs
            for d0 in range(0, d, BLOCK_D):
                f = tl.load(top_ptrs, mask=(offs_d < d - d0)[:, None] & columns, other=0.0)
                top = tl.maximum(top, tl.max(tl.abs(f), axis=0))
                top_ptrs += step_f
            scale, unscale = _power_of_two(top)
        # One accumulator per part: chaining products into one is miscompiled for some Blackwell chips.
        second = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        third = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        for d0 in range(0, d, BLOCK_D):
            inside = offs_d < d - d0
            x = _operand(tl.load(x_ptrs, mask=rows & inside[None, :], other=0.0))  # [BM, BD]
            f = tl.load(f_ptrs, mask=inside[:, None] & columns, other=0.0)  # [BD, BR]
            if X_DTYPE == tl.float16:
                f = f * scale[None, :]
            hi, mid, lo = split3(f, X_DTYPE)
            main = tl.dot(x, hi, main)
            second = tl.dot(x, mid, second)
            third = tl.dot(x, lo, third)
            x_ptrs += step_x
            f_ptrs += step_f
        main = main + (second + third)
        if X_DTYPE == tl.float16:
            main = main * unscale[None, :]
    p_ptrs = p_ptr + offs_m[:, None] * stride_p_n + offs_r[None, :]
    tl.store(p_ptrs, main, mask=rows & columns)


@dataclass(frozen=True)
class XVConfig:
    """Tile sizes of `_xv_kernel` and how it is compiled."""

    block_m: int
    block_d: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


def xv_config(
    dtype: torch.dtype, fast: bool, order: object, block_r: int, capability: int, few: bool = False
) -> XVConfig:
    """Return the tiles for rows of `dtype` on a device of this compute capability (90 for 9.0).

    `order`: how F is read. `few`: there are too few tiles of the usual size to fill the device.
    """
    if dtype == torch.float32 or not fast:
        # Left alone, ptxas takes 233 registers with Triton 3.9: two programs on a multiprocessor, not three.
        bound = dtype == torch.bfloat16 and order == ANY and block_r == 32 and capability in (86, 89, 120)
        return XVConfig(block_m=64, block_d=32, num_warps=4, num_stages=2, maxnreg=168 if bound else None)
    if few and block_r == 32 and capability >= 120:
        return XVConfig(block_m=64, block_d=32, num_warps=4, num_stages=4)
    if few:
        return XVConfig(block_m=64, block_d=64 if block_r < 64 else 32, num_warps=4, num_stages=3)
    # Tensor cores that multiply from registers. On 12.0 wider tiles take more registers than let two programs share a
    # multiprocessor.
    if (block_r > 32 and not 90 <= capability < 120) or (block_r == 32 and capability >= 120):
        return XVConfig(block_m=128, block_d=32, num_warps=8, num_stages=4)
    return XVConfig(block_m=128, block_d=64, num_warps=4 if block_r < 32 else 8, num_stages=3)


def xv(x: Sequence[Tensor], f: Sequence[Tensor], *, out: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Return P_i = X_i·F_iᵀ for every item i, in one launch per group of equal dtype, alignment and padded rank.

    16-bit X is multiplied with a three-way split of F and fp32 accumulators, fp32 X in fp32: both are as accurate as an
    fp32 product. Bitwise reproducible. Nothing waits for the device.

    Args:
        x: X_i, (N_i, d_i), bf16, fp16 or fp32, any strides; several items may share one tensor.
        f: F_i, (k_i, d_i), fp32, any strides, k_i ≥ 1; several items may share one tensor.
        out: P_i, (N_i, k_i), fp32, unit inner stride, fully overwritten; allocated if None.

    Raises:
        ValueError: shapes that do not match, a dtype, stride or size outside the above.
    """
    if out is None:
        out = [
            torch.empty(a.shape[0], b.shape[0], dtype=torch.float32, device=a.device) for a, b in zip(x, f, strict=True)
        ]
    if len(x):
        plan = XVPlan(x, f, out)
        plan.table.upload()
        plan.launch()
    return list(out)


def xv_ref(x: Sequence[Tensor], f: Sequence[Tensor]) -> list[Tensor]:
    """Return P_i = X_i·F_iᵀ in float64."""
    return [a.double() @ b.double().T for a, b in zip(x, f, strict=True)]


class XVPlan:
    """`xv` prepared for one set of shapes: tables built once, addresses refreshed every step.

    ::

        plan = XVPlan(x, f, out, table=table)   # once per set of shapes; binds too
        plan.bind(x, f, out)                    # every step; None leaves a column as it is
        table.upload()                          # every step, once for all plans and kernels of the table
        plan.launch()

    Only shapes, strides, dtypes and alignment of the tensors are kept: the caller keeps them alive until the launch.
    """

    def __init__(
        self,
        x: Sequence[Tensor],
        f: Sequence[Tensor],
        out: Sequence[Tensor],
        *,
        table: PointerTable | None = None,
        programs: int | None = None,
        capability: int | None = None,
        rows: Sequence[int] | None = None,
    ) -> None:
        """Build the tables.

        Args:
            x: X_i, as in `xv`.
            f: F_i, as in `xv`.
            out: P_i, as in `xv`.
            table: The pointer table shared by the kernels of a step (None: the plan makes its own).
            programs: How many programs fill the device; default two per multiprocessor.
            capability: Compute capability to choose tiles for (90 for 9.0); default that of the device.
            rows: The most rows N_i that X_i may ever have, for which `out` has room; None for as many as now.
        """
        _check(x, f, out, rows)
        device = common_device([*x, *f, *out])
        self.device = device
        self.table = PointerTable(device) if table is None else table
        self._pointers = self.table.reserve(len(x), POINTERS.value)
        limits = (rows, None, rows)
        self._layouts = [Layouts(*column) for column in zip("xfp", (x, f, out), limits, strict=True)]
        self._dims = int32_table(
            (
                (a.shape[1], b.shape[0], a.stride(0), a.stride(1), b.stride(0), b.stride(1), p.stride(0))
                for a, b, p in zip(x, f, out, strict=True)
            ),
            DIMS.value,
            device,
        )
        self._launches = _launches(
            x,
            f,
            [a.shape[0] for a in x] if rows is None else rows,
            device,
            fill_target(device) if programs is None else programs,
            capability_of(device) if capability is None else capability,
        )
        self.bind(x, f, out)

    def bind(
        self,
        x: Sequence[Tensor] | None = None,
        f: Sequence[Tensor] | None = None,
        out: Sequence[Tensor] | None = None,
    ) -> None:
        """Stage new addresses; ValueError if a tensor's shape, strides, dtype or alignment are not the plan's."""
        for column, tensors in enumerate((x, f, out)):
            if tensors is not None:
                self._layouts[column].require(tensors)
                self._pointers.set(column, tensors)
        if x is not None:
            self._pointers.put(N.value, [a.shape[0] for a in x])

    def follow(self, addresses: Sequence[int], rows: Sequence[int]) -> None:
        """Stage the addresses of X of a known layout, and their rows: `bind` without its checks."""
        self._pointers.put(0, addresses)
        self._pointers.put(N.value, rows)

    def launch(self) -> None:
        """Run the kernel with the addresses last uploaded; no host synchronisation."""
        for launch in self._launches:
            launch.run(self._pointers.device, self._dims)


def _check(x: Sequence[Tensor], f: Sequence[Tensor], out: Sequence[Tensor], rows: Sequence[int] | None) -> None:
    if not len(x) == len(f) == len(out):
        raise ValueError(f"xv: got {len(x)} x, {len(f)} f and {len(out)} out; one of each per item is needed")
    for i, (a, b, p) in enumerate(zip(x, f, out, strict=True)):
        room = a.shape[0] if rows is None else rows[i]
        if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1] or p.shape != (room, b.shape[0]):
            shapes = tuple(a.shape), tuple(b.shape), tuple(p.shape)
            raise ValueError(f"xv: item {i} has shapes {shapes}; must be (N, d), (k, d) and (N, k)")
        if a.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"xv: x[{i}] has dtype {a.dtype}; must be bfloat16, float16 or float32")
        if b.dtype != torch.float32 or p.dtype != torch.float32:
            raise ValueError(f"xv: f[{i}] and out[{i}] have dtypes {b.dtype} and {p.dtype}; must be float32")
        if p.shape[1] > 1 and p.stride(1) != 1:
            raise ValueError(f"xv: out[{i}] has strides {p.stride()}; the inner one must be 1")


def _f_order(f: Tensor) -> int:
    """Return how the kernel may read F (k, d): 16 bytes along d or along k, or entry by entry."""
    if f.data_ptr() % 16:
        return ANY
    if f.stride(1) == 1 and f.shape[1] % 4 == 0 and f.stride(0) % 4 == 0:
        return ALONG_D
    if f.stride(0) == 1 and f.shape[0] % 4 == 0 and f.stride(1) % 4 == 0:
        return ALONG_K
    return ANY


def _launches(
    x: Sequence[Tensor],
    f: Sequence[Tensor],
    rows: Sequence[int],
    device: torch.device,
    programs: int,
    capability: int,
) -> list[Launch]:
    groups: dict[tuple[torch.dtype, bool, object, int], list[int]] = {}
    for i, (a, b) in enumerate(zip(x, f, strict=True)):
        key = launch_key(a.dtype, aligned_matrix(a), _f_order(b), b.shape[0])
        groups.setdefault(key, []).append(i)
    launches = []
    for (dtype, fast, order, block_r), members in groups.items():
        config = xv_config(dtype, fast, order, block_r, capability)
        usual = sum(blocks(rows[i], config.block_m) * blocks(f[i].shape[0], block_r) for i in members)
        if usual < programs:
            config = xv_config(dtype, fast, order, block_r, capability, few=True)
        tiles = [
            (i, m, r)
            for i in members
            for m in range(blocks(rows[i], config.block_m))
            for r in range(blocks(f[i].shape[0], block_r))
        ]
        tile_map = int32_table(tiles, TILE.value, device)
        constexprs = _constexprs(dtype, fast, order, block_r, config)
        launches.append(Launch(_xv_kernel, tile_map, constexprs, config.num_warps, config.num_stages, config.maxnreg))
    return launches


def _constexprs(dtype: torch.dtype, fast: bool, order: object, block_r: int, config: XVConfig) -> dict[str, object]:
    return {
        "X_DTYPE": TRITON_DTYPES[dtype],
        "X_UNIT": 16 // dtype.itemsize if fast else 0,
        "F_ORDER": order,
        "BLOCK_M": config.block_m,
        "BLOCK_D": config.block_d,
        "BLOCK_R": block_r,
    }


def _variants() -> list[Variant]:
    signature = {"pointers_ptr": "*i64", "dims_ptr": "*i32", "tiles_ptr": "*i32"}
    cases = [
        (torch.bfloat16, True, ALONG_D, 16, False, 168),
        (torch.bfloat16, True, ALONG_D, 32, False, 128),
        (torch.bfloat16, True, ALONG_K, 32, False, 128),
        (torch.bfloat16, True, ALONG_D, 64, False, 255),
        (torch.bfloat16, True, ALONG_K, 64, False, 255),
        (torch.bfloat16, True, ALONG_D, 32, True, 168),
        (torch.bfloat16, True, ALONG_D, 64, True, 200),
        (torch.bfloat16, False, ANY, 32, False, 168),
        (torch.float16, True, ALONG_D, 32, False, 152),
        (torch.float16, True, ALONG_D, 64, False, 255),
        (torch.float32, True, ALONG_D, 64, False, 168),
        (torch.float32, False, ANY, 32, False, 224),
    ]
    variants = []
    for dtype, fast, order, block_r, few, registers in cases:
        for generation, targets in GENERATIONS.items():
            config = xv_config(dtype, fast, order, block_r, targets[0], few)
            kind = str(dtype).removeprefix("torch.") + ("" if fast else "_slow") + ("_few" if few else "")
            variants.append(
                Variant(
                    name=f"xv_{kind}_r{block_r}_order{order}_{generation}",
                    kernel=_xv_kernel,
                    signature=signature,
                    constexprs=_constexprs(dtype, fast, order, block_r, config),
                    aligned=tuple(signature),
                    num_warps=config.num_warps,
                    num_stages=config.num_stages,
                    streaming=fast,
                    max_registers=registers,
                    targets=targets,
                    maxnreg=config.maxnreg,
                )
            )
    return variants


VARIANTS = _variants()
