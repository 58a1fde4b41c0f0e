"""Rayleigh–Ritz on the Triton backend: its products one by one, whole updates against float64, and exact no-ops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import in_float64, make_problem
from tolerances import assert_accurate
from torch import Tensor

from psilora.backends import dispatch
from psilora.backends.triton import backend as triton_backend
from psilora.lowrank.gradient_operator import ActivationGradient
from psilora.steps.gradient.reference import reference_update
from psilora.steps.problem import Problem, Scales
from psilora.steps.update import all_finite

if triton_backend.unavailable_reason() is not None:
    pytest.skip(str(triton_backend.unavailable_reason()), allow_module_level=True)

from psilora.backends.triton.gradient import ritz
from psilora.backends.triton.gradient.ritz import KernelGradient, PreparedProducts
from psilora.triton_kernels.tables import Launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
#: As for the other solvers: twice the error of the fp32 reference, plus a floor for one that happens to be exact.
FACTOR, FLOOR = 2.0, 2e-6


def captured(rows: list[list[int]], d_out: int, d_in: int, dtype: torch.dtype) -> list[list[tuple[Tensor, Tensor]]]:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE).to(dtype)

    return [[(random(n, d_in), random(n, d_out)) for n in calls] for calls in rows]


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize(("d_out", "d_in", "k"), [(33, 40, 5), (64, 48, 20), (17, 9, 1)])
def test_products_are_those_of_the_gradient(dtype: torch.dtype, d_out: int, d_in: int, k: int) -> None:
    chunks = captured([[19], [3, 0, 40], [0]], d_out, d_in, dtype)
    scale = torch.tensor([0.5, -2.0, 1.0], device=DEVICE)
    plain, kernels = ActivationGradient(chunks, scale), KernelGradient(chunks, scale, PreparedProducts())
    wide = [[(x.double(), s.double()) for x, s in calls] for calls in chunks]
    sizes = [[(x.abs(), s.abs()) for x, s in calls] for calls in wide]
    exact, magnitude = ActivationGradient(wide, scale.double()), ActivationGradient(sizes, scale.double().abs())
    B, A = torch.randn(3, d_out, k, device=DEVICE), torch.randn(3, k, d_in, device=DEVICE)
    turned_B, turned_A = (F.mT.contiguous().mT for F in (B, A))  # factors arrive in either order
    for side, factors in (("left", (B, turned_B)), ("right", (A, turned_A))):
        for F in factors:
            got, own = (getattr(gradient, side)(F) for gradient in (kernels, plain))
            want, size = getattr(exact, side)(F.double()), getattr(magnitude, side)(F.double().abs())
            assert_accurate("product", got, own, want, size)


def test_layers_of_a_shape_share_their_launches_and_the_tables_last(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    run = Launch.run
    monkeypatch.setattr(Launch, "run", lambda self, *a: (launched.append(self.kernel.__name__), run(self, *a)))
    problems = [make_problem((16, 24, 4), solver="ritz", momentum_rank=4, device=DEVICE) for _ in range(4)]
    want = [reference_update([p], Scales()) for p in problems]
    backends: triton_backend.Backends = {}
    for _ in range(2):
        launched.clear()
        (update,) = triton_backend.compute(problems, Scales(), backends)
        assert [launched.count(kernel) for kernel in ("_xv_kernel", "_stz_kernel")] == [2, 2], "BᵀG and GAᵀ"
        torch.testing.assert_close(update.step_A, torch.cat([u.step_A for u in want]), rtol=1e-3, atol=1e-5)
        (backend,) = backends.values()
        products = backend._products
        assert products is not None and len(products._kept) == 2
        for p in problems:  # the next step's lie elsewhere
            p.record.chunks[:] = [(x.clone(), s.clone()) for x, s in p.record.chunks]  # type: ignore[union-attr]


def test_tables_of_few_sets_of_shapes_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of ever new lengths must not fill the memory with tables."""
    monkeypatch.setattr(ritz, "KEPT_PRODUCTS", 2)
    products = PreparedProducts()
    for rows in (3, 5, 4, 3):
        chunks = captured([[rows]], 9, 8, FP32)
        scale = torch.ones(1, device=DEVICE)
        B = torch.randn(1, 9, 2, device=DEVICE)
        got = KernelGradient(chunks, scale, products).left(B)
        torch.testing.assert_close(got, ActivationGradient(chunks, scale).left(B))
        assert len(products._kept) <= 2


CASES: list[dict[str, Any]] = [
    {},
    {"momentum_rank": 3, "num_iters": 2, "first": "B", "weight_decay": 0.1},
    {"momentum_rank": 5, "metric": "kfac", "maximize": True, "rows": (7, 0, 19)},
    {"momentum_rank": 8, "metric": "shampoo", "metric_bias_correction": False, "first": "B", "scaling": 0.5},
    {"momentum_rank": 4, "dtype": BF16, "metric": "kfac", "loss_reduction": "sum"},
    {"dtype": FP16, "num_iters": 3},
]


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_updates_agree_with_the_float64_reference(settings: dict[str, Any]) -> None:
    """Errors as their root mean square over layers of one shape: one sample of rounding says nothing."""
    shapes = [(37, 45, 5)] * 3 + [(30, 44, 4)] * 3
    problems = [make_problem(shape, solver="ritz", device=DEVICE, **settings) for shape in shapes]
    assert {triton_backend.unsupported(p) for p in problems} == {None}
    scales = Scales(*(torch.tensor(c, device=DEVICE) for c in (0.7, 1.3)))
    updates = triton_backend.compute(problems, scales)
    assert [len(update.problems) for update in updates] == [3, 3]
    for update in updates:
        usual = reference_update(update.problems, scales)
        exact = [reference_update([in_float64(p)], scales) for p in update.problems]
        for name in ("step_B", "step_A", "momentum_B", "momentum_A", "metric_B", "metric_A"):
            if getattr(usual, name) is None:
                assert getattr(update, name) is None
                continue
            want = torch.cat([getattr(e, name) for e in exact])
            errors = [(getattr(u, name).double() - want).flatten(1).norm(dim=1) for u in (update, usual)]
            mine, theirs = (float((e / want.flatten(1).norm(dim=1)).square().mean().sqrt()) for e in errors)
            assert mine <= FACTOR * theirs + FLOOR, f"{name}: error {mine:.1e}, the reference's {theirs:.1e}"


def snapshot(problem: Problem) -> list[Tensor]:
    tensors = [problem.pair.lora_A, problem.pair.lora_B, *problem.state_A.values(), *problem.state_B.values()]
    return [t.detach().clone() for t in tensors]


def bits(tensors: list[Tensor]) -> list[Tensor]:
    return [t.reshape(-1).view(torch.uint8) for t in tensors]


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize(
    "settings",
    [{"lr": 0.0, "momentum_rank": 3}, {"zero_gradient": True}, {"zero_gradient": True, "zero_B": True}],
    ids=str,
)
def test_no_gradient_or_no_rate_changes_no_bit_of_the_parameters(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    problem = make_problem((20, 24, 4), dtype=dtype, device=DEVICE, num_iters=2, solver="ritz", **settings)
    before = snapshot(problem)[:2]
    for write in dispatch.stage(dispatch.compute([problem], Scales(), "triton"), torch.tensor(True, device=DEVICE)):
        write()
    assert all(torch.equal(a, b) for a, b in zip(bits(before), bits(snapshot(problem)[:2]), strict=True))


@pytest.mark.parametrize("where", ["x", "s", "B", "momentum"])
def test_a_nonfinite_number_marks_its_layer_and_nothing_is_written(where: str) -> None:
    problems = [make_problem((20, 24, 4), momentum_rank=4, solver="ritz", device=DEVICE) for _ in range(3)]
    bad = problems[1]
    x, s = bad.record.chunks[0]  # type: ignore[union-attr]
    with torch.no_grad():
        {"x": x, "s": s, "B": bad.pair.lora_B, "momentum": bad.state_B["momentum"]}[where][1, 1] = float("nan")
    before = [t for p in problems for t in snapshot(p)]
    (bucket,) = dispatch.compute(problems, Scales(), "triton")
    marks = torch.stack([torch.isfinite(t).flatten(1).all(1) for t in bucket.update.tensors()]).all(0)
    assert marks.tolist() == [True, False, True]
    ok = all_finite(bucket.update.tensors(), torch.device(DEVICE))
    for write in dispatch.stage([bucket], ok):
        write()
    after = [t for p in problems for t in snapshot(p)]
    assert all(torch.equal(a, b) for a, b in zip(bits(before), bits(after), strict=True))


@pytest.mark.parametrize("settings", [{}, {"num_iters": 2, "metric": "kfac", "first": "B"}], ids=str)
def test_repeated_runs_are_bitwise_equal(settings: dict[str, Any]) -> None:
    problems = [
        make_problem((60, 52, 6), momentum_rank=6, rows=(200, 9), device=DEVICE, solver="ritz", **settings)
        for _ in range(2)
    ]
    runs = [[t for update in triton_backend.compute(problems, Scales()) for t in update.tensors()] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_what_has_no_products_goes_to_the_reference() -> None:
    for settings, reason in (
        ({"gradient": "tangent"}, "solver='ritz' without X and S"),
        ({"dtype": torch.float64}, "fp64 parameters"),
    ):
        problem = make_problem((20, 24, 4), solver="ritz", device=DEVICE, **settings)
        assert triton_backend.unsupported(problem) == reason
