"""Every kernel compiles for every target without spills, with asynchronous copies and without banned patterns."""

from __future__ import annotations

from typing import Any

import pytest

from psilora.triton_kernels import _compat

if not _compat.available():
    pytest.skip(_compat.unavailable_reason() or "", allow_module_level=True)

import gate_offenders
import kernel_gates

VARIANTS = kernel_gates.variants(kernel_gates.kernel_modules())
JOBS = [(name, target) for name, variant in VARIANTS.items() for target in variant.targets]
MUST_REGISTER = ("xv", "stz", "squares", "reduce")


@pytest.fixture(scope="module")
def reports() -> dict[tuple[str, int], dict[str, Any]]:
    found = kernel_gates.compile_all([*kernel_gates.kernel_modules(), gate_offenders.__name__])
    print(kernel_gates.table([report for report in found.values() if report["name"] in VARIANTS]))
    return found


@pytest.mark.parametrize(("name", "target"), JOBS)
def test_gate(name: str, target: int, reports: dict[tuple[str, int], dict[str, Any]]) -> None:
    assert reports[name, target]["problems"] == []


@pytest.mark.parametrize(("variant", "expected"), gate_offenders.CASES, ids=lambda value: getattr(value, "name", ""))
def test_gate_catches(variant: Any, expected: str | None, reports: dict[tuple[str, int], dict[str, Any]]) -> None:
    problems = [problem for target in variant.targets for problem in reports[variant.name, target]["problems"]]
    if expected is None:
        assert problems == []
    else:
        assert any(expected in problem for problem in problems), problems


@pytest.mark.parametrize("kernel", MUST_REGISTER)
def test_every_target_is_compiled(kernel: str) -> None:
    targets = {target for name, target in JOBS if name.split("_")[0] == kernel}
    assert targets == set(kernel_gates.SHARED_LIMIT)


def test_only_floating_point_atomics_are_banned() -> None:
    assert kernel_gates.banned("", "", "red.relaxed.gpu.global.add.f32 [%rd1], %f1;", 90)
    assert kernel_gates.banned("", "", "atom.global.gpu.acq_rel.add.f32 %f1, [%rd1], %f2;", 90)
    assert not kernel_gates.banned("", "", "atom.global.gpu.acq_rel.add.u32 %r1, [%rd1], %r2;", 90)
    assert not kernel_gates.banned("", "", "redux.sync.add.s32 %r1, %r2, %r3;", 90)
