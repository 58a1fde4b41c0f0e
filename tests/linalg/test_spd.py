"""The choice of the r×r solve: it agrees with the kept measurement, and both codes agree with each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import data, factors, peft_mlp, train

from psilora import PSILoRA
from psilora.linalg import native, spd

MEASURED = Path(__file__).parents[2] / "bench" / "results" / "cpu" / "solve.json"
needs_native = pytest.mark.skipif(not native.available(), reason=f"needs the extension: {native.unavailable_reason()}")


def systems(dtype: torch.dtype, count: int = 5, rank: int = 6, columns: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    factor = torch.randn(count, rank, 2 * rank, dtype=dtype)
    return factor @ factor.mT, torch.randn(count, rank, columns, dtype=dtype)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_solves_agree_on_results_repairs_and_info(dtype: torch.dtype) -> None:
    gram, rhs = systems(dtype)
    gram[1] = 0  # given up
    gram[2] = 1  # singular: repaired
    rhs[3] = 0
    assert spd.takes_native(gram)
    ours, info = spd.fastest_spd_solve(gram, rhs)
    plain, plain_info = spd.spd_solve(gram, rhs)
    assert info.tolist() == plain_info.tolist() and info[2] > 0
    sound = [0, 3, 4]
    torch.testing.assert_close(ours[sound], plain[sound], rtol=1e-3 if dtype == torch.float32 else 1e-9, atol=1e-6)
    assert not bool(ours[1].any()) and not bool(ours[3].any())


def test_what_the_native_operator_does_not_support_is_solved_by_pytorch() -> None:
    gram, rhs = systems(torch.float32, rank=130, columns=2)
    assert not spd.takes_native(gram) and not spd.takes_native(gram[0])
    torch.testing.assert_close(spd.fastest_spd_solve(gram, rhs)[0], spd.spd_solve(gram, rhs)[0])


@needs_native
def test_the_reference_step_uses_it_and_the_oracle_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    right = native.spd_solve
    monkeypatch.setattr(native, "spd_solve", lambda *a: calls.append(a) or right(*a))
    model = peft_mlp()
    results = []
    for available in (True, False):
        monkeypatch.setattr(native, "available", lambda available=available: available)
        torch.manual_seed(0)
        model = peft_mlp()
        train(model, PSILoRA(model, 0.1, step="gradient", backend="reference"), [data()] * 3)
        results.append(factors(model))
        if available:
            assert calls
            calls.clear()
    assert not calls
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-9, atol=1e-12)


@pytest.mark.skipif(not MEASURED.exists(), reason="there is no measurement of this commit's suite")
def test_the_choice_is_the_measured_one() -> None:
    """Wherever the optimizer takes the native operator, the kept measurement has it ahead of plain PyTorch."""
    rows: dict[tuple[str, int], dict[str, list[float]]] = {}
    for row in json.loads(MEASURED.read_text())["rows"]:
        by_method = rows.setdefault((row["dtype"], row["rank"]), {})
        by_method.setdefault(row["method"], []).append(row["ms"])
    for dtype, largest in spd.NATIVE_RANKS.items():
        name = str(dtype).removeprefix("torch.")
        measured = {rank: methods for (kind, rank), methods in rows.items() if kind == name and rank <= largest}
        assert measured and max(measured) == largest
        for rank, methods in measured.items():
            ours, plain = sum(methods["psilora native"]), sum(methods["psilora.linalg.spd"])
            assert ours < plain, f"{name}, r {rank}: native {ours:.3f} ms, PyTorch {plain:.3f} ms"
