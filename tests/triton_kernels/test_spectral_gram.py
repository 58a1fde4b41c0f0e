"""The sums of partial Grams, which every entry of a spectral step's Γ comes from."""

from __future__ import annotations

import pytest
import torch

from psilora.triton_kernels import _compat

if not _compat.available():
    pytest.skip(_compat.unavailable_reason() or "", allow_module_level=True)

from psilora.triton_kernels.spectral_gram import FULL, PAIRS, PLAIN, SINGLE, SPANNED, places, summed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not _compat.interpreted(), reason="needs TRITON_INTERPRET=1 or CUDA"
)


@pytest.mark.parametrize("kinds", [PLAIN, SINGLE, FULL])
@pytest.mark.parametrize(("rank", "padded"), [(5, 16), (33, 64)])
def test_every_entry_has_one_writer(rank: int, padded: int, kinds: int) -> None:
    """A block with itself is its lower triangle, mirrored: its two halves need not round alike, as with weights."""
    tiles = [[[0, 3], [3, 1]], [[4, 1], [5, 2]]]  # per side and layer the first tile and their number
    partials = torch.randn(7, kinds, padded, padded, dtype=torch.float64, device=DEVICE)
    found = summed(
        partials, torch.tensor(tiles, dtype=torch.int32, device=DEVICE), places(kinds, torch.device(DEVICE)), rank
    )
    last = SPANNED[kinds] - 1
    for side in (0, 1):
        for layer, (first, count) in enumerate(tiles[side]):
            for kind, pair in enumerate(PAIRS[:kinds]):
                i, j = (min(block, last) for block in pair)
                total = torch.zeros(padded, padded, dtype=torch.float64, device=DEVICE)
                for part in partials[first : first + count, kind]:
                    total = total + part
                total = total[:rank, :rank]
                expected = total.tril() + total.tril(-1).mT if i == j else total
                block = found[side, layer].view(last + 1, rank, last + 1, rank)
                assert torch.equal(block[i, :, j], expected), (side, layer, pair)
                assert torch.equal(block[j, :, i], expected.mT), (side, layer, pair)
