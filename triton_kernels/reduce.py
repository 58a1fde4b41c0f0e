"""Sums over the tokens of grouped items: how they are cut into parts, and the small second launch that adds the parts.

Parts are added in a fixed order and every part is one program's, so results are bitwise reproducible.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from psilora.triton_kernels._compat import tl, triton
from psilora.triton_kernels.tables import (
    Launch,
    Layouts,
    PointerTable,
    Scratch,
    Spans,
    blocks,
    common_device,
    int32_table,
    members,
    partial_buffers,
)
from psilora.triton_kernels.variants import Variant

# Columns of a sum's tables, each with the number of them last: of the tile map, of an output, and of a span of tokens.
TILE_OUTPUT, D_BLOCK, R_BLOCK, SPLIT, FIRST_SPAN, END_SPAN, TILE = map(tl.constexpr, range(7))
OUT_D, OUT_K, OUT_STRIDE_D, OUT_STRIDE_K, OUT_STRIDE_SPLIT, OUTPUT = map(tl.constexpr, range(6))
ITEM, BEGIN, STOP, SPAN = map(tl.constexpr, range(4))

# Columns of the reduction's tables: addresses, sizes and strides of an output, and its tile map.
PARTIALS, OUT, POINTERS = map(tl.constexpr, range(3))
SPLITS, SUM_D, SUM_K, SUM_STRIDE_D, SUM_STRIDE_K, SUM = map(tl.constexpr, range(6))
SUM_OUTPUT, SUM_BLOCK, SUM_TILE = map(tl.constexpr, range(3))
BLOCK = 1024


@triton.jit
def _reduce_kernel(pointers_ptr, dims_ptr, tiles_ptr, BLOCK: tl.constexpr):
    """out[d, k] = Σ_s partials[s, d, k] in the order of s, BLOCK entries per program."""
    tile = tl.program_id(0).to(tl.int64)
    output = tl.load(tiles_ptr + tile * SUM_TILE + SUM_OUTPUT).to(tl.int64)
    offs = tl.load(tiles_ptr + tile * SUM_TILE + SUM_BLOCK) * BLOCK + tl.arange(0, BLOCK)
    partials_ptr = tl.load(pointers_ptr + output * POINTERS + PARTIALS).to(tl.pointer_type(tl.float32))
    out_ptr = tl.load(pointers_ptr + output * POINTERS + OUT).to(tl.pointer_type(tl.float32))
    splits = tl.load(dims_ptr + output * SUM + SPLITS)
    d = tl.load(dims_ptr + output * SUM + SUM_D)
    k = tl.load(dims_ptr + output * SUM + SUM_K)
    size = d * k
    inside = offs < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)  # [BLOCK]
    partials_ptrs = tl.multiple_of(partials_ptr, 16) + offs
    for _ in range(splits):
        total += tl.load(partials_ptrs, mask=inside, other=0.0)
        partials_ptrs += size
    stride_d = tl.load(dims_ptr + output * SUM + SUM_STRIDE_D).to(tl.int64)
    stride_k = tl.load(dims_ptr + output * SUM + SUM_STRIDE_K).to(tl.int64)
    tl.store(out_ptr + (offs // k) * stride_d + (offs % k) * stride_k, total, mask=inside)


class Reduction:
    """The sums of partials (splits_o, d_o, k_o) into outputs (d_o, k_o), for the outputs that were split.

    Args:
        partials: Per output its partials, contiguous fp32 at fixed addresses, or None where the kernel before writes
            the output itself.
        out: Per output, (d, k) fp32, any strides; `bind` stages their addresses.
        table: Where the addresses go.
    """

    def __init__(self, partials: Sequence[Tensor | None], out: Sequence[Tensor], table: PointerTable) -> None:
        pairs = [(o, part) for o, part in enumerate(partials) if part is not None]
        self._outputs = [o for o, _ in pairs]
        device = table.device
        self._pointers = table.reserve(len(pairs), POINTERS.value)
        self._pointers.set(0, [part for _, part in pairs])
        self._dims = int32_table(((*part.shape, *out[o].stride()) for o, part in pairs), SUM.value, device)
        tiles = [(i, b) for i, (_, part) in enumerate(pairs) for b in range(blocks(part[0].numel(), BLOCK))]
        self._launch = Launch(_reduce_kernel, int32_table(tiles, SUM_TILE.value, device), {"BLOCK": BLOCK}, 4, 2)

    def bind(self, out: Sequence[Tensor]) -> None:
        """Stage the addresses of the outputs."""
        self._pointers.set(1, [out[o] for o in self._outputs])

    def launch(self) -> None:
        """Run the kernel; nothing if no output was split."""
        self._launch.run(self._pointers.device, self._dims)


def reduce_ref(partials: Tensor) -> Tensor:
    """Return Σ_s partials[s] in float64."""
    return partials.double().sum(0)


class TokenSum:
    """What plans of sums over tokens share: the tables of items and outputs, the parts, and their reduction.

    A subclass calls `_cut` for each of its groups of outputs and `_complete` once. Its kernel finds the
    columns named above (TILE, OUTPUT, SPAN) in its tile map, its table of outputs and that of the spans of tokens.

    Attributes:
        num_splits: Per output, the number of partials, at least 1.
    """

    def __init__(
        self,
        inputs: Mapping[str, Sequence[Tensor]],
        outputs: Sequence[int],
        shapes: Sequence[tuple[int, int]],
        out: Sequence[Tensor] | None,
        table: PointerTable | None,
        scratch: Scratch | None,
        rows: Sequence[int] | None,
    ) -> None:
        """Reserve the tables; every output of `shapes` (d, k) sums its items in `inputs`, of at most `rows` rows."""
        self._scratch = scratch
        every = [tensor for tensors in (*inputs.values(), out or ()) for tensor in tensors]
        self.device = common_device(every) if table is None or every else table.device
        self.table = PointerTable(self.device) if table is None else table
        self.num_splits = [1] * len(shapes)
        self._shapes = shapes
        self._members = members(outputs, len(shapes))
        self._sizes = [t.shape[0] for t in next(iter(inputs.values()))] if rows is None else list(rows)
        self._layouts = [Layouts(name, tensors, rows) for name, tensors in inputs.items()]
        self._out_layout = None if out is None else Layouts("out", out)
        self._items = self.table.reserve(len(self._sizes), len(inputs) + 1)
        self._outputs = self.table.reserve(len(shapes), 1)
        self._spans = Spans()
        self._launches: list[Launch] = []
        self._partials: list[Tensor | None] = []
        self._reduction: Reduction | None = None

    def _cut(
        self, outputs: Sequence[int], block_n: int, block_d: int, block_r: int, programs: int
    ) -> list[tuple[int, ...]]:
        """Cut the tokens of some outputs so that about `programs` programs share the work; return their tile map."""
        grid = {o: (blocks(self._shapes[o][0], block_d), blocks(self._shapes[o][1], block_r)) for o in outputs}
        wanted = blocks(programs, max(1, sum(a * b for a, b in grid.values())))
        tiles: list[tuple[int, ...]] = []
        for o, (d_blocks, r_blocks) in grid.items():
            sizes = [self._sizes[item] for item in self._members[o]]
            ranges = self._spans.add(self._members[o], sizes, block_n, wanted)
            self.num_splits[o] = len(ranges)
            tiles += [
                (o, d, r, split, *part)
                for split, part in enumerate(ranges)
                for d in range(d_blocks)
                for r in range(r_blocks)
            ]
        return tiles

    def _complete(self, launches: list[Launch], out: Sequence[Tensor] | None) -> None:
        """Allocate the partials and build the remaining tables; `out` as matrices (d, k)."""
        self._launches = launches
        self._span_table = self._spans.table(self.device)
        self._partials = partial_buffers(
            [
                (splits, *shape) if splits > 1 or out is None else None
                for splits, shape in zip(self.num_splits, self._shapes, strict=True)
            ],
            self.device,
            self._scratch,
        )
        strides = [
            (*out[o].stride(), 0) if part is None and out is not None else (k, 1, d * k)
            for o, ((d, k), part) in enumerate(zip(self._shapes, self._partials, strict=True))
        ]
        rows = ((*shape, *stride) for shape, stride in zip(self._shapes, strides, strict=True))
        self._output_dims = int32_table(rows, 5, self.device)
        if out is None:
            self._outputs.set(0, self._partials)
        else:
            self._reduction = Reduction(self._partials, out, self.table)

    def _bind(self, inputs: Sequence[Sequence[Tensor] | None], out: Sequence[Tensor] | None) -> None:
        for column, (layout, tensors) in enumerate(zip(self._layouts, inputs, strict=True)):
            if tensors is not None:
                layout.require(tensors)
                self._items.set(column, tensors)
        if inputs[0] is not None:
            self._items.put(len(inputs), [t.shape[0] for t in inputs[0]])
        if out is None:
            return
        if self._out_layout is None or self._reduction is None:
            raise ValueError("the plan was made without out")
        self._out_layout.require(out)
        self._outputs.set(0, [h if part is None else part for h, part in zip(out, self._partials, strict=True)])
        self._reduction.bind(out)

    def follow(self, addresses: Sequence[int], rows: Sequence[int]) -> None:
        """Stage the addresses of the first input, of a known layout, and their rows: `bind` without its checks."""
        self._items.put(0, addresses)
        self._items.put(len(self._layouts), rows)

    def _launch(self, item_dims: Tensor) -> None:
        for launch in self._launches:
            launch.run(self._items.device, item_dims, self._outputs.device, self._output_dims, self._span_table)
        if self._reduction is not None:
            self._reduction.launch()


VARIANTS = [
    Variant(
        name="reduce",
        kernel=_reduce_kernel,
        signature={"pointers_ptr": "*i64", "dims_ptr": "*i32", "tiles_ptr": "*i32"},
        constexprs={"BLOCK": BLOCK},
        aligned=("pointers_ptr", "dims_ptr", "tiles_ptr"),
        num_warps=4,
        num_stages=2,
        max_registers=64,
    )
]
