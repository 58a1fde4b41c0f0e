"""LoRSum against its definition, its limits, and bad input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import literal
from torch import Tensor

from psilora import lorsum
from psilora.linalg.spd import spd_solve

F64 = torch.float64


def pair(d_out: int, d_in: int, rank: int, *batch: int, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    return torch.randn(*batch, d_out, rank, dtype=dtype), torch.randn(*batch, rank, d_in, dtype=dtype)


@settings(max_examples=60, deadline=None)
@given(
    d_out=st.integers(1, 12),
    d_in=st.integers(1, 12),
    rank=st.integers(1, 5),
    others=st.lists(st.integers(1, 7), max_size=3),
    num_iters=st.integers(0, 3),
    first=st.sampled_from("AB"),
    with_metric=st.booleans(),
    prox=st.sampled_from([1e-2, 1e-1, 1.0]),
    seed=st.integers(0, 10_000),
)
def test_matches_the_definition(d_out, d_in, rank, others, num_iters, first, with_metric, prox, seed) -> None:
    torch.manual_seed(seed)
    terms = [pair(d_out, d_in, rank)] + [pair(d_out, d_in, k) for k in others]
    coefficients = [0.9] + torch.randn(len(others), dtype=F64).mul(0.3).tolist()
    metric = (torch.rand(d_out, dtype=F64) + 0.1, torch.rand(d_in, dtype=F64) + 0.1) if with_metric else None
    expected = literal(terms, coefficients, num_iters, prox, metric, first)
    got = lorsum(terms, coefficients, num_iters=num_iters, prox=prox, metric=metric, first=first)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


def test_dense_metric_equals_its_diagonal() -> None:
    terms = [pair(9, 7, 3), pair(9, 7, 4)]
    M_B, M_A = torch.rand(9, dtype=F64) + 0.1, torch.rand(7, dtype=F64) + 0.1
    settings_ = {"num_iters": 2, "prox": 0.1}
    diagonal = lorsum(terms, [1.0, -0.3], metric=(M_B, M_A), **settings_)
    dense = lorsum(terms, [1.0, -0.3], metric=(torch.diag(M_B), torch.diag(M_A)), **settings_)
    torch.testing.assert_close(diagonal, dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [None, "diagonal", "matrix", "shared diagonal", "shared matrix"])
def test_batch_dimensions_equal_a_loop(kind: str | None) -> None:
    terms = [pair(6, 5, 2, 3, 2), pair(6, 5, 4, 3, 2)]
    metric = None
    if kind is not None:
        shared = kind.startswith("shared")
        M_B = torch.rand(*(() if shared else (3, 2)), 6, dtype=F64) + 0.1
        M_A = torch.rand(*(() if shared else (3, 2)), 5, dtype=F64) + 0.1
        metric = (torch.diag_embed(M_B), torch.diag_embed(M_A)) if kind.endswith("matrix") else (M_B, M_A)
    c = torch.randn(3, 2, dtype=F64)
    prox = torch.rand(3, 2, dtype=F64) + 0.1
    B, A = lorsum(terms, [1.0, c], num_iters=2, prox=prox, metric=metric)
    for i in range(3):
        for j in range(2):
            here = [(B_k[i, j], A_k[i, j]) for B_k, A_k in terms]
            local = metric if metric is None or kind.startswith("shared") else (metric[0][i, j], metric[1][i, j])
            want = lorsum(here, [1.0, c[i, j]], num_iters=2, prox=prox[i, j], metric=local)
            torch.testing.assert_close((B[i, j], A[i, j]), want, rtol=1e-11, atol=1e-11)


def test_unbatched_term_broadcasts() -> None:
    first, second = pair(6, 5, 2, 3), pair(6, 5, 4)
    B, A = lorsum([first, second], [1.0, -0.5])
    want = lorsum([first, (second[0].expand(3, -1, -1), second[1].expand(3, -1, -1))], [1.0, -0.5])
    assert torch.equal(B, want[0]) and torch.equal(A, want[1])


@pytest.mark.parametrize("ratio", [0.5, 0.8])
def test_converges_to_the_truncated_svd_at_the_stated_rate(ratio: float) -> None:
    """λ = 0: the error of the product falls as (σ_{r+1}/σ_r)^{2K}."""
    rank, size = 4, 40
    left, right = (torch.linalg.qr(torch.randn(size, size, dtype=F64))[0] for _ in range(2))
    sigma = torch.cat([torch.linspace(4, 2, rank, dtype=F64), 2 * ratio * torch.ones(size - rank, dtype=F64)])
    target = left @ torch.diag(sigma) @ right.T
    best = left[:, :rank] @ torch.diag(sigma[:rank]) @ right[:, :rank].T
    start = pair(size, size, rank)
    terms = [start, start, (target, torch.eye(size, dtype=F64))]  # 1·W − 1·W + 1·target

    def error(num_iters: int) -> float:
        B, A = lorsum(terms, [1.0, -1.0, 1.0], num_iters=num_iters)
        return ((B @ A - best).norm() / best.norm()).item()

    few, many = (8, 14) if ratio == 0.5 else (16, 32)
    measured = math.log(error(many) / error(few)) / (many - few)
    assert measured == pytest.approx(2 * math.log(ratio), rel=0.1)


def test_zero_iterations_is_preconditioned_lora() -> None:
    (B, A), G, lr, prox = pair(9, 7, 3), torch.randn(9, 7, dtype=F64), 0.1, 1e-3
    got = lorsum([(B, A), (G, torch.eye(7, dtype=F64))], [1.0, -lr], num_iters=0, prox=prox)
    eye = torch.eye(3, dtype=F64)
    want_A = A - lr * torch.linalg.solve(B.T @ B + prox * eye, B.T @ G)
    want_B = B - lr * torch.linalg.solve(A @ A.T + prox * eye, A @ G.T).T
    torch.testing.assert_close(got, (want_B, want_A), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_iters", [0, 1, 3])
@pytest.mark.parametrize("B_zero", [False, True])
def test_zero_change_is_a_bitwise_no_op(dtype: torch.dtype, num_iters: int, B_zero: bool) -> None:
    B, A = pair(9, 7, 3, dtype=dtype)
    if B_zero:
        B = torch.zeros_like(B)
    other = pair(9, 7, 4, dtype=dtype)
    for coefficient, term in ((0.0, other), (1.0, (torch.zeros_like(other[0]), other[1]))):
        got = lorsum([(B, A), term], [1.0, coefficient], num_iters=num_iters, prox=0.0)
        assert torch.equal(got[0], B) and torch.equal(got[1], A)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_fp32(dtype: torch.dtype) -> None:
    terms = [pair(9, 7, 3, dtype=dtype), pair(9, 7, 4, dtype=dtype)]
    got = lorsum(terms, [1.0, -0.1], num_iters=2, prox=1e-2)
    want = lorsum([(B.double(), A.double()) for B, A in terms], [1.0, -0.1], num_iters=2, prox=1e-2)
    assert got[0].dtype == dtype
    for value, exact in zip(got, want, strict=True):
        rounding = torch.finfo(dtype).eps * exact.abs().max().item()
        assert (value.double() - exact).abs().max().item() <= max(rounding, 2e-5)


def test_a_global_tf32_switch_does_not_reach_the_grams() -> None:
    terms = [pair(9, 7, 3, dtype=torch.float32), pair(9, 7, 4, dtype=torch.float32)]
    want = lorsum(terms, [1.0, -0.1])
    torch.set_float32_matmul_precision("medium")
    try:
        got = lorsum(terms, [1.0, -0.1])
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_autocast_does_not_reach_the_grams() -> None:
    terms = [pair(9, 7, 3, dtype=torch.float32), pair(9, 7, 4, dtype=torch.float32)]
    want = lorsum(terms, [1.0, -0.1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = lorsum(terms, [1.0, -0.1])
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


class TestSpdSolve:
    def test_clean_systems(self) -> None:
        X = torch.randn(5, 6, 20, dtype=F64)
        gram, rhs = X @ X.mT, torch.randn(5, 6, 3, dtype=F64)
        solution, info = spd_solve(gram, rhs)
        torch.testing.assert_close(solution, torch.linalg.solve(gram, rhs))
        assert info.tolist() == [0] * 5

    def test_a_singular_system_is_repaired_beside_clean_ones(self) -> None:
        good = torch.eye(3, dtype=F64)
        bad = torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, -1e-16]], dtype=F64)
        rhs = torch.ones(2, 3, 1, dtype=F64)
        solution, info = spd_solve(torch.stack([good, bad]), rhs)
        assert torch.equal(solution[0], rhs[0]) and info[0] == 0
        assert bool(torch.isfinite(solution).all()) and 1 <= int(info[1]) <= 3
        torch.testing.assert_close((bad @ solution[1])[:2], rhs[1, :2], rtol=1e-2, atol=1e-2)

    def test_hopeless_systems_give_zero(self) -> None:
        grams = torch.stack([torch.zeros(2, 2), torch.full((2, 2), float("nan")), -torch.eye(2)]).double()
        solution, info = spd_solve(grams, torch.ones(3, 2, 1, dtype=F64))
        assert torch.equal(solution, torch.zeros_like(solution)) and info.tolist() == [4, 4, 4]

    def test_a_zero_right_hand_side_is_solved_exactly_and_not_counted(self) -> None:
        solution, info = spd_solve(torch.zeros(1, 2, 2, dtype=F64), torch.zeros(1, 2, 4, dtype=F64))
        assert torch.equal(solution, torch.zeros(1, 2, 4, dtype=F64)) and info.tolist() == [0]


B34, A35 = torch.ones(4, 3), torch.ones(3, 5)
BAD = [
    ({"terms": [], "coefficients": []}, ValueError, "terms is empty"),
    ({"coefficients": [1.0, 2.0]}, ValueError, "got 2 coefficients for 1 terms"),
    ({"num_iters": -1}, ValueError, r"Invalid num_iters=-1. Must be an integer >= 0."),
    ({"num_iters": 1.5}, ValueError, r"Invalid num_iters=1.5. Must be an integer >= 0."),
    ({"num_iters": True}, ValueError, "Invalid num_iters=True"),
    ({"prox": -0.1}, ValueError, r"Invalid prox=-0.1. Must be finite and >= 0."),
    ({"prox": math.nan}, ValueError, "Invalid prox=nan"),
    ({"first": "C"}, ValueError, "Invalid first='C'. Must be 'A' or 'B'."),
    ({"terms": [(B34, torch.ones(2, 5))]}, ValueError, "rank mismatch in term 1"),
    (
        {"terms": [(B34, A35), (torch.ones(5, 3), A35)], "coefficients": [1.0, 1.0]},
        ValueError,
        "term 2 is a 5×5 matrix; the first term makes it 4×5",
    ),
    ({"terms": [(B34.int(), A35)]}, TypeError, "B_1 has dtype torch.int32; must be a real floating dtype"),
    ({"terms": [(B34.cfloat(), A35)]}, TypeError, "B_1 has dtype torch.complex64"),
    ({"terms": [(torch.ones(4), A35)]}, ValueError, "must have at least 2 dimensions"),
    ({"metric": (torch.ones(3), torch.ones(5))}, ValueError, r"M_B has shape \(3,\)"),
    ({"metric": (torch.ones(4), torch.zeros(5))}, ValueError, "M_A must be positive definite; its smallest"),
    ({"metric": (torch.ones(4, 4), torch.ones(5))}, ValueError, "M_B must be positive definite; its Cholesky"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input_names_the_value(change, error, message) -> None:
    arguments = {"terms": [(B34, A35)], "coefficients": [1.0], **change}
    with pytest.raises(error, match=message):
        lorsum(arguments.pop("terms"), arguments.pop("coefficients"), **arguments)


@pytest.mark.parametrize("start_turn", ["in", "out"])
def test_the_published_listing_is_called_as_the_docstring_says(start_turn: str) -> None:
    """OPLoRA's Listing 1, line for line, whose pairs are (in, out)."""
    factors = [(A, B) for B, A in (pair(7, 7, k) for k in (3, 2, 4))]
    coefficients, num_iters, lmbd = [0.9, -0.3, 1.4], 2, 0.05
    weight_in, weight_out = factors[0]
    weight_in_t, weight_out_t = weight_in.clone(), weight_out.clone()
    eye_r = torch.eye(3, dtype=F64)
    for i in range(2 * num_iters):
        if (start_turn == "in") == (i % 2 == 0):
            sum_in = weight_in.mul(lmbd)
            for coeff, (factor_in, factor_out) in zip(coefficients, factors, strict=True):
                sum_in.add_((weight_out_t.T @ factor_out) @ factor_in, alpha=coeff)
            weight_in_t = torch.linalg.solve(weight_out_t.T @ weight_out_t + eye_r.mul(lmbd), sum_in)
        else:
            sum_out = weight_out.mul(lmbd)
            for coeff, (factor_in, factor_out) in zip(coefficients, factors, strict=True):
                sum_out.add_(factor_out @ (factor_in @ weight_in_t.T), alpha=coeff)
            weight_out_t = torch.linalg.solve(weight_in_t @ weight_in_t.T + eye_r.mul(lmbd), sum_out.T).T
    B, A = lorsum(
        [(B, A) for A, B in factors],
        coefficients,
        num_iters=num_iters,
        prox=lmbd,
        first={"in": "A", "out": "B"}[start_turn],
    )
    torch.testing.assert_close((B, A), (weight_out_t, weight_in_t), rtol=1e-9, atol=1e-9)
