"""Addresses, dimensions and tiles of a grouped launch: one kernel over the matrices of all layers.

A kernel gets three tables and finds its work in them:

- addresses: a `PointerBlock`, int64 (rows, columns), one row per problem. All blocks of a step live in one
  `PointerTable` and reach the device in one asynchronous copy, so the addresses may change every step;
- dims: int32 (rows, columns), shapes and strides in elements, built once per set of shapes with `int32_table`;
- tiles: int32 (programs, columns), what each program does, built once per set of shapes with `int32_table`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: Bytes to which a matrix, its rows and the tables themselves are aligned on the fast path.
ALIGNMENT = 16


class PointerBlock:
    """Rows of addresses that one kernel reads: a window of a `PointerTable`.

    Attributes:
        rows, columns: Its shape.
        offset: Where it begins in the table, in int64 elements.
    """

    def __init__(self, table: PointerTable, offset: int, rows: int, columns: int) -> None:
        self.table = table
        self.offset = offset
        self.rows = rows
        self.columns = columns

    def set(self, column: int, tensors: Sequence[Tensor | None]) -> None:
        """Put the address of one tensor per row (0 for None) into a column, to be sent by the next `upload`."""
        if len(tensors) != self.rows:
            raise ValueError(f"got {len(tensors)} tensors for {self.rows} rows of a pointer block")
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        self.table.staged(self.offset, self.rows, self.columns)[:, column] = addresses

    def put(self, column: int, numbers: Sequence[int]) -> None:
        """Put a number per row into a column, to be sent by the next `upload`."""
        self.table.staged(self.offset, self.rows, self.columns)[:, column] = numbers

    @property
    def device(self) -> Tensor:
        """The block on the device, (rows, columns) int64: a kernel's argument. Its address never changes."""
        return self.table.window(self.offset, self.rows, self.columns)


class PointerTable:
    """The addresses of one step in one int64 buffer, sent to the device with one asynchronous copy.

    Blocks are reserved first; the first `upload` fixes the layout. On CUDA the copy starts from pinned memory; two
    pinned buffers alternate and an event guards each, so the host never overwrites what a copy still reads. Under CUDA
    graph capture a buffer of its own is left to the graph, which then replays with the addresses it was captured with.
    Pinned memory cannot be had during a capture, so the next `upload` outside one makes the buffer of the next graph.

    Args:
        device: Where the kernels run. On the CPU (Triton's interpreter) the table is used as it is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device(device)
        self._size = 0
        self._staged = np.zeros(0, dtype=np.int64)
        self._sent: Tensor | None = None
        self._pinned: list[tuple[Tensor, torch.cuda.Event]] = []
        self._captured: list[Tensor] = []
        self._spare: Tensor | None = None
        self._turn = 0

    def reserve(self, rows: int, columns: int) -> PointerBlock:
        """Return a new block; not possible after the first `upload` or use of a block on the device."""
        if self._sent is not None:
            raise RuntimeError("the pointer table is in use: reserve every block before the first upload")
        block = PointerBlock(self, self._size, rows, columns)
        step = ALIGNMENT // 8
        self._size += -(-rows * columns // step) * step
        grown = np.zeros(self._size, dtype=np.int64)
        grown[: self._staged.size] = self._staged
        self._staged = grown
        return block

    def staged(self, offset: int, rows: int, columns: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        """Return a (rows, columns) window of the host copy."""
        return self._staged[offset : offset + rows * columns].reshape(rows, columns)

    def window(self, offset: int, rows: int, columns: int) -> Tensor:
        """Return a (rows, columns) window of the device copy."""
        return self._buffer()[offset : offset + rows * columns].view(rows, columns)

    def upload(self) -> None:
        """Send every address set so far to the device, ordered on the current stream, without waiting.

        Raises:
            RuntimeError: A second capture, be it a retry of one that failed, without an upload outside any in between.
        """
        buffer = self._buffer()
        values = torch.from_numpy(self._staged)
        if self.device.type != "cuda":
            buffer.copy_(values)
        elif torch.cuda.is_current_stream_capturing():
            if self._spare is None:
                raise RuntimeError(
                    "this step has been captured in a CUDA graph, or an attempt was made, since it last ran outside "
                    "one: run it once outside a capture before every capture"
                )
            self._spare.copy_(values)
            buffer.copy_(self._spare, non_blocking=True)
            self._captured.append(self._spare)
            self._spare = None
        else:
            if self._spare is None:
                self._spare = self._pin()
            pinned, event = self._pinned[self._turn]
            self._turn = (self._turn + 1) % len(self._pinned)
            event.synchronize()
            pinned.copy_(values)
            with torch.cuda.device(self.device):
                buffer.copy_(pinned, non_blocking=True)
                event.record()

    def _buffer(self) -> Tensor:
        if self._sent is None:
            self._sent = torch.zeros(self._size, dtype=torch.int64, device=self.device)
            if self.device.type == "cuda":
                self._pinned = [(self._pin(), torch.cuda.Event()) for _ in range(2)]
                self._spare = self._pin()
        return self._sent

    def _pin(self) -> Tensor:
        return torch.zeros(self._size, dtype=torch.int64, device="cpu", pin_memory=True)


def int32_table(rows: Iterable[Sequence[int]], columns: int, device: torch.device) -> Tensor:
    """Return a (rows, columns) int32 table on `device`.

    Raises:
        ValueError: a value needs more than 31 bits (a dimension or stride too large for the kernels).
    """
    table = np.array(list(rows), dtype=np.int64).reshape(-1, columns)
    if table.size and (table.max() >= 2**31 or table.min() < 0):
        raise ValueError(
            f"{int(table.max())} or {int(table.min())} does not fit the kernels' 31-bit dimensions and strides"
        )
    return torch.from_numpy(table.astype(np.int32)).to(device)


def blocks(size: int, block: int) -> int:
    """Return how many blocks cover `size`."""
    return -(-size // block)


def padded(rank: int) -> int:
    """Return a rank padded to a power of two of at least 16, what a tensor-core product needs."""
    return max(16, 1 << (rank - 1).bit_length())


def block_rank(rank: int, fast: bool = True) -> int:
    """Return the width of the tiles that cover the columns of a product of this rank; fewer without alignment."""
    return min(padded(rank), 64 if fast else 32)


def launch_key(dtype: torch.dtype, fast: bool, other: object, columns: int) -> tuple[torch.dtype, bool, object, int]:
    """Return what items of `xv`, or layers of `stz`, must have in common to share a launch.

    Args:
        dtype: Of what is streamed: X of xv, S of stz.
        fast: Whether it can be read 16 bytes at a time (`aligned_matrix`).
        other: How the other operand can be read: the order of F, or whether P is aligned.
        columns: k of the product.
    """
    return dtype, fast, other, block_rank(columns, fast)


def aligned_matrix(matrix: Tensor) -> bool:
    """Whether rows of (n, d) can be read 16 bytes at a time: unit inner stride; base, row stride and d aligned."""
    unit = ALIGNMENT // matrix.element_size()
    return (
        matrix.stride(1) == 1
        and matrix.shape[1] % unit == 0
        and matrix.stride(0) % unit == 0
        and matrix.data_ptr() % ALIGNMENT == 0
    )


def common_device(tensors: Iterable[Tensor]) -> torch.device:
    """Return the one device of all tensors.

    Raises:
        ValueError: there is none, or more than one.
    """
    devices = {tensor.device for tensor in tensors}
    if len(devices) != 1:
        raise ValueError(f"the tensors of a grouped launch must be on one device; got {sorted(map(str, devices))}")
    return devices.pop()


def fill_target(device: torch.device) -> int:
    """Return how many programs fill the device: two per multiprocessor."""
    if device.type != "cuda":
        return 4
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def capability_of(device: torch.device) -> int:
    """Return the compute capability as one number (90 for 9.0); 90 where there is no GPU."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


#: A token range shorter than this many blocks is not worth a program and a partial of its own.
MIN_BLOCKS_PER_SPLIT = 4


class Spans:
    """Ranges of tokens of grouped items, [item, begin, end): what the programs of a sum over tokens go through.

    Attributes:
        rows: The table, in the order of `add`.
    """

    def __init__(self) -> None:
        self.rows: list[tuple[int, int, int]] = []

    def add(self, items: Sequence[int], sizes: Sequence[int], block: int, wanted: int) -> list[tuple[int, int]]:
        """Cut the tokens of one output into at most `wanted` parts of whole blocks.

        Args:
            items: The items that are summed, in order.
            sizes: Their numbers of tokens.
            block: Tokens that a program takes at a time; a block never crosses items.
            wanted: How many parts would fill the device; parts of fewer than MIN_BLOCKS_PER_SPLIT blocks are not made.

        Returns:
            Per part, the range of its rows in the table; one empty part where there are no tokens.
        """
        pieces = [
            (i, n, min(n + block, size)) for i, size in zip(items, sizes, strict=True) for n in range(0, size, block)
        ]
        parts = max(1, min(wanted, len(pieces) // MIN_BLOCKS_PER_SPLIT))
        ranges = []
        for part in range(parts):
            first = len(self.rows)
            for item, begin, end in pieces[len(pieces) * part // parts : len(pieces) * (part + 1) // parts]:
                if len(self.rows) > first and self.rows[-1][0] == item:
                    self.rows[-1] = (item, self.rows[-1][1], end)
                else:
                    self.rows.append((item, begin, end))
            ranges.append((first, len(self.rows)))
        return ranges

    def table(self, device: torch.device) -> Tensor:
        """Return the rows as int32 (rows, 3)."""
        return int32_table(self.rows, 3, device)


class Scratch:
    """Device memory of what prepared steps need while they run, which they share because they never run at once.

    A plan takes its pieces when it is made. Those that do not fit get memory of their own, and `short` is true: whoever
    made the plan lets go of all plans, calls `grow` and makes it again.
    """

    def __init__(self, device: torch.device) -> None:
        self.buffer = torch.empty(0, dtype=torch.float32, device=device)
        self._taken = 0

    def begin(self) -> None:
        """Begin a plan: its first piece lies at the start."""
        self._taken = 0

    def take(self, count: int) -> Tensor:
        """Return the next `count` fp32 numbers."""
        first, self._taken = self._taken, self._taken + blocks(count, 4) * 4
        if self.short:
            return torch.empty(count, dtype=torch.float32, device=self.buffer.device)
        return self.buffer[first : first + count]

    @property
    def short(self) -> bool:
        """Whether more was taken since `begin` than there is."""
        return self._taken > self.buffer.numel()

    def grow(self) -> None:
        """Have as much as was taken since `begin`, and an eighth more for what comes; earlier pieces are not ours."""
        wanted, device = self._taken + self._taken // 8, self.buffer.device
        self.buffer = torch.empty(0, dtype=torch.float32, device=device)  # the old one goes first
        self.buffer = torch.empty(wanted, dtype=torch.float32, device=device)


def partial_buffers(
    shapes: Sequence[tuple[int, ...] | None], device: torch.device, scratch: Scratch | None = None
) -> list[Tensor | None]:
    """Return fp32 tensors of the given shapes in one piece, each aligned to 16 bytes; None for None.

    The piece is part of the scratch, or an allocation of its own.
    """
    sizes = [0 if shape is None else blocks(math.prod(shape), 4) * 4 for shape in shapes]
    total = sum(sizes)
    pool = torch.empty(total, dtype=torch.float32, device=device) if scratch is None else scratch.take(total)
    pieces = pool.split(sizes)
    return [
        None if shape is None else piece[: math.prod(shape)].view(shape)
        for shape, piece in zip(shapes, pieces, strict=True)
    ]


def members(groups: Sequence[int], count: int) -> list[list[int]]:
    """Return the items of each of `count` groups from the group of each item.

    Raises:
        ValueError: the groups decrease, or one is outside 0 … count − 1.
    """
    result: list[list[int]] = [[] for _ in range(count)]
    previous = 0
    for item, group in enumerate(groups):
        if not previous <= group < count:
            raise ValueError(f"item {item} is of {group}, after {previous}; must not decrease and be below {count}")
        result[group].append(item)
        previous = group
    return result


class Layouts:
    """What a plan has built into its tables about the tensors of one column: all but their addresses.

    Args:
        name: Of the column.
        tensors: For their layouts.
        rows: How many rows of each there may be at most; None for exactly as many as now.
    """

    def __init__(self, name: str, tensors: Sequence[Tensor], rows: Sequence[int] | None = None) -> None:
        self.name = name
        self.rows = rows
        self.expected = [(t.shape, t.stride(), t.dtype, t.data_ptr() % ALIGNMENT == 0) for t in tensors]

    def _fits(self, i: int, shape: torch.Size, expected: torch.Size) -> bool:
        return shape == expected if self.rows is None else shape[0] <= self.rows[i] and shape[1:] == expected[1:]

    def require(self, tensors: Sequence[Tensor]) -> None:
        """Raise ValueError at the first tensor that does not fit the plan; a better alignment than planned fits."""
        if len(tensors) != len(self.expected):
            raise ValueError(f"got {len(tensors)} {self.name}; the plan was made for {len(self.expected)}")
        for i, (tensor, (shape, strides, dtype, aligned)) in enumerate(zip(tensors, self.expected, strict=True)):
            if (
                not self._fits(i, tensor.shape, shape)
                or tensor.stride() != strides
                or tensor.dtype != dtype
                or (aligned and tensor.data_ptr() % ALIGNMENT)
            ):
                raise ValueError(
                    f"{self.name}[{i}] is {tuple(tensor.shape)}, strides {tensor.stride()}, {tensor.dtype}, address "
                    f"{tensor.data_ptr():#x}; the plan was made for {tuple(shape)}, strides {strides}, {dtype}"
                    f"{', 16-byte aligned' if aligned else ''}"
                )


@dataclass(frozen=True, eq=False)
class Launch:
    """One grouped launch: a kernel, its tile map (one program per row) and how it is compiled.

    Attributes:
        kernel: A function decorated with `triton.jit`.
        tiles: int32 (programs, columns); nothing is launched if it is empty.
        constexprs: Compile-time arguments by name.
        maxnreg: A bound on registers per thread, where it has one.
    """

    kernel: Any
    tiles: Tensor
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    maxnreg: int | None = None

    def run(self, *args: Tensor) -> None:
        """Call the kernel with `args` followed by the tile map."""
        if self.tiles.shape[0] == 0:
            return
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.maxnreg is not None:
            options["maxnreg"] = self.maxnreg
        grid = (self.tiles.shape[0],)
        if self.tiles.device.type == "cuda":
            with torch.cuda.device(self.tiles.device):
                self.kernel[grid](*args, self.tiles, **self.constexprs, **options)
        else:
            self.kernel[grid](*args, self.tiles, **self.constexprs, **options)
