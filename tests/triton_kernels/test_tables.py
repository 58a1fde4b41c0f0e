"""Pointer tables, token spans and the checks of grouped launches."""

from __future__ import annotations

import pytest
import torch

from psilora.triton_kernels.tables import (
    MIN_BLOCKS_PER_SPLIT,
    PointerTable,
    Spans,
    block_rank,
    int32_table,
    members,
    padded,
    partial_buffers,
)

CPU = torch.device("cpu")


def test_blocks_of_a_table_hold_the_addresses() -> None:
    table = PointerTable(CPU)
    first, second = table.reserve(3, 1), table.reserve(2, 2)
    tensors = [torch.zeros(i + 1) for i in range(3)]
    first.set(0, tensors)
    second.set(1, [tensors[2], None])
    table.upload()
    assert first.device.flatten().tolist() == [t.data_ptr() for t in tensors]
    assert second.device.tolist() == [[0, tensors[2].data_ptr()], [0, 0]]
    address = second.device.data_ptr()
    assert address % 16 == 0
    second.set(0, tensors[:2])
    table.upload()
    assert second.device[:, 0].tolist() == [t.data_ptr() for t in tensors[:2]]
    assert second.device.data_ptr() == address


def test_a_table_in_use_takes_no_more_blocks() -> None:
    table = PointerTable(CPU)
    block = table.reserve(1, 1)
    table.upload()
    with pytest.raises(RuntimeError, match="reserve every block before the first upload"):
        table.reserve(1, 1)
    with pytest.raises(ValueError, match="got 2 tensors for 1 rows"):
        block.set(0, [None, None])


@pytest.mark.parametrize("sizes", [[], [0], [1], [1000], [64, 0, 1, 65, 127, 300], [7] * 40])
@pytest.mark.parametrize("wanted", [1, 2, 3, 100])
def test_spans_cover_every_token_once(sizes: list[int], wanted: int) -> None:
    spans = Spans()
    spans.add([0], [200], 64, 1)
    items = [i + 5 for i in range(len(sizes))]
    ranges = spans.add(items, sizes, 64, wanted)
    assert 1 <= len(ranges) <= wanted
    covered = [(i, n) for first, end in ranges for i, begin, stop in spans.rows[first:end] for n in range(begin, stop)]
    assert covered == [(i, n) for i, size in zip(items, sizes, strict=True) for n in range(size)]
    counts = [sum(-(-(stop - begin) // 64) for _, begin, stop in spans.rows[first:end]) for first, end in ranges]
    if len(ranges) > 1:
        assert min(counts) >= MIN_BLOCKS_PER_SPLIT and max(counts) - min(counts) <= 1


def test_members_of_groups() -> None:
    assert members([0, 0, 2], 4) == [[0, 1], [], [2], []]
    for groups in ([1, 0], [3], [-1]):
        with pytest.raises(ValueError, match="must not decrease"):
            members(groups, 3)


def test_partials_share_an_allocation_and_are_aligned() -> None:
    a, b, c = partial_buffers([(3, 5, 1), None, (2, 2, 2)], CPU)
    assert a is not None and b is None and c is not None
    assert a.shape == (3, 5, 1) and c.data_ptr() - a.data_ptr() == 64


def test_dimensions_beyond_31_bits_are_refused() -> None:
    assert int32_table([], 3, CPU).shape == (0, 3)
    assert int32_table([(2**31 - 1, 0)], 2, CPU).dtype == torch.int32
    for value in (2**31, -1):
        with pytest.raises(ValueError, match="does not fit"):
            int32_table([(value,)], 1, CPU)


def test_padded_ranks() -> None:
    assert [padded(k) for k in (1, 16, 17, 33, 64, 129)] == [16, 16, 32, 64, 64, 256]
    assert [block_rank(k) for k in (1, 16, 17, 33, 64, 129)] == [16, 16, 32, 64, 64, 64]
    assert [block_rank(k, fast=False) for k in (1, 17, 64, 129)] == [16, 32, 32, 32]


def test_a_second_capture_needs_an_upload_outside_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU stands for a device whose stream is being captured."""
    table = PointerTable(CPU)
    block = table.reserve(1, 1)
    table.upload()
    table.device, table._spare = torch.device("cuda"), torch.zeros(table._size, dtype=torch.int64)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    block.set(0, [block.device])
    table.upload()
    assert block.device.item() == block.device.data_ptr()
    with pytest.raises(RuntimeError, match="run it once outside a capture before every capture"):
        table.upload()


@pytest.mark.gpu
def test_uploads_follow_one_another_and_enter_graphs() -> None:
    device = torch.device("cuda")
    table = PointerTable(device)
    block = table.reserve(1000, 2)
    tensors = [torch.zeros(1, device=device) for _ in range(1000)]
    seen = []
    for shift in range(20):
        block.set(1, tensors[shift:] + tensors[:shift])
        table.upload()
        seen.append(block.device.clone())
    for shift, copy in enumerate(seen):
        assert copy[:, 1].tolist() == [t.data_ptr() for t in tensors[shift:] + tensors[:shift]]
    graph, result = torch.cuda.CUDAGraph(), torch.empty_like(block.device)
    block.set(1, tensors)
    with torch.cuda.graph(graph):
        table.upload()
        result.copy_(block.device)
    block.set(1, tensors[::-1])
    table.upload()
    graph.replay()
    assert result[:, 1].tolist() == [t.data_ptr() for t in tensors]
