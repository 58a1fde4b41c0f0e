"""L⁻¹ of r×r systems: accuracy against float64, the repair ladder, and isolation of the padding."""

from __future__ import annotations

import pytest
import torch

from psilora.linalg.spd import spd_solve
from psilora.triton_kernels import _compat

if _compat.unavailable_reason() is not None:
    pytest.skip(str(_compat.unavailable_reason()), allow_module_level=True)

from psilora.triton_kernels.spd import inverse_factors, inverse_factors_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not _compat.interpreted(), reason="needs TRITON_INTERPRET=1 or CUDA"
)


def systems(count: int, padded: int, rank: int, condition: float = 10.0) -> torch.Tensor:
    """SPD matrices (count, padded, padded) with NaN beyond the rank, where nothing may be read."""
    basis = torch.linalg.qr(torch.randn(count, rank, rank, dtype=torch.float64))[0]
    values = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), rank, dtype=torch.float64)
    gram = torch.full((count, padded, padded), float("nan"), device=DEVICE)
    gram[:, :rank, :rank] = (basis * values @ basis.mT).float().to(DEVICE)
    return gram


def ranks(gram: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.full((gram.shape[0],), rank, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize(
    ("padded", "rank"), [(16, 1), (16, 8), (16, 16), (32, 17), (32, 32), (64, 33), (64, 64), (128, 65), (128, 128)]
)
@pytest.mark.parametrize("condition", [10.0, 1e4])
def test_residual_is_as_small_as_cholesky_and_padding_is_zero(padded: int, rank: int, condition: float) -> None:
    gram = systems(2, padded, rank, condition)
    inverse, info = inverse_factors(gram, ranks(gram, rank))
    assert info.tolist() == [0, 0]
    assert not bool(inverse[:, rank:].any()) and not bool(inverse[:, :, rank:].any())
    assert not bool(inverse.triu(1).any())
    exact = inverse_factors_ref(gram, ranks(gram, rank))[:, :rank, :rank]
    ours = (inverse[:, :rank, :rank].double() - exact).norm() / exact.norm()
    own = torch.linalg.inv(torch.linalg.cholesky(gram[:, :rank, :rank]))
    theirs = (own.double() - exact).norm() / exact.norm()
    assert ours <= 4 * theirs + 2.0**-22


@pytest.mark.parametrize("padded", [16, 64, 128])
@pytest.mark.parametrize("kind", ["zero", "singular", "indefinite", "nan", "inf"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_repairs_and_their_counts_are_those_of_the_reference(padded: int, kind: str) -> None:
    rank = padded - 3
    gram = systems(1, padded, rank)
    if kind == "zero":
        gram[:, :rank, :rank] = 0
    elif kind == "singular":  # two equal rows and columns, exactly
        gram[:, rank - 1, :rank] = gram[:, 0, :rank]
        gram[:, :rank, rank - 1] = gram[:, :rank, 0]
        gram[:, rank - 1, rank - 1] = gram[:, 0, 0]
    elif kind == "indefinite":
        gram[:, 2, 2] = -1.0
    else:
        gram[:, rank - 1, rank - 1] = float(kind)
    inverse, info = inverse_factors(gram, ranks(gram, rank))
    rhs = torch.randn(1, rank, 3, device=DEVICE)
    solution, expected = spd_solve(gram[:, :rank, :rank], rhs)
    L = inverse[:, :rank, :rank]
    if kind == "singular":  # the pivot that should be 0 is rounding: it may have either sign
        assert int(info) <= 1 and int(expected) <= 1
        assert bool(L.isfinite().all())
        return
    assert info.tolist() == expected.tolist()
    assert info.tolist() == [4] or kind == "indefinite"
    torch.testing.assert_close(L.mT @ (L @ rhs), solution, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padded", [16, 32])
def test_ladder_takes_the_smallest_sufficient_ridge(padded: int) -> None:
    gram = systems(1, padded, 5)
    gram[:, :5, :5] = torch.diag(torch.tensor([1.0, 1.0, 1.0, 1.0, -1e-3], device=DEVICE))
    inverse, info = inverse_factors(gram, ranks(gram, 5))
    expected = spd_solve(gram[:, :5, :5], torch.eye(5, device=DEVICE)[None])
    assert info.tolist() == expected[1].tolist() == [2]
    L = inverse[:, :5, :5]
    torch.testing.assert_close(L.mT @ L, expected[0], rtol=1e-4, atol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_range(scale: float) -> None:
    gram = systems(1, 16, 7)
    gram[:, :7, :7] *= scale
    inverse, info = inverse_factors(gram, ranks(gram, 7))
    assert info.tolist() == [0]
    L = inverse[0, :7, :7].double()
    eye = torch.eye(7, dtype=torch.float64, device=DEVICE)
    torch.testing.assert_close(L @ gram[0, :7, :7].double() @ L.mT, eye, rtol=1e-4, atol=1e-4)


def test_mixed_ranks_and_none() -> None:
    gram = torch.cat([systems(1, 16, rank) for rank in (3, 11, 16)])
    sizes = torch.tensor([3, 11, 16], dtype=torch.int32, device=DEVICE)
    inverse, info = inverse_factors(gram, sizes)
    exact = inverse_factors_ref(gram, sizes)
    torch.testing.assert_close(inverse.double(), exact, rtol=1e-4, atol=1e-5)
    assert info.tolist() == [0, 0, 0]
    empty, none = inverse_factors(gram[:0], sizes[:0])
    assert empty.shape == (0, 16, 16) and none.shape == (0,)
