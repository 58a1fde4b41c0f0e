"""Every kernel compiles for every target without spills, with asynchronous copies and without banned patterns."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from psilora.triton_kernels import _compat

if not _compat.available():
    pytest.skip(_compat.unavailable_reason() or "", allow_module_level=True)

import gate_addresses
import gate_allowances
import gate_offenders
import kernel_gates

from psilora.triton_kernels.variants import EVERYWHERE, JOINT_TARGETS, TARGETS

VARIANTS = kernel_gates.variants(kernel_gates.kernel_modules())
JOBS = [(name, target) for name, variant in VARIANTS.items() for target in variant.targets]


def marked(name: str, target: int) -> Any:
    """The parameters of `test_gate`: what only the sweep compiles, and what takes long where nothing is cached."""
    marks = [] if VARIANTS[name].sampled(target) else [pytest.mark.sweep]
    slow = [pytest.mark.slow] if VARIANTS[name].constexprs.get("RP") == max(EVERYWHERE) else []
    return pytest.param(name, target, marks=[*marks, *slow])


MUST_REGISTER = ("xv", "stz", "squares", "reduce", "verdict", "norms", "span", "moments", "spread", "joint")


@pytest.fixture(scope="module")
def compiler() -> Iterator[kernel_gates.Compiler]:
    started = kernel_gates.Compiler([*kernel_gates.kernel_modules(), gate_offenders.__name__])
    yield started
    started.close()


@pytest.mark.parametrize(("name", "target"), [marked(name, target) for name, target in JOBS])
def test_gate(name: str, target: int, compiler: kernel_gates.Compiler) -> None:
    report = compiler.report(name, target)
    assert report["problems"] == [], kernel_gates.row(report)


@pytest.mark.parametrize(("variant", "expected"), gate_offenders.CASES, ids=lambda value: getattr(value, "name", ""))
def test_gate_catches(variant: Any, expected: str | None, compiler: kernel_gates.Compiler) -> None:
    problems = [p for target in variant.targets for p in compiler.report(variant.name, target)["problems"]]
    if expected is None:
        assert problems == []
    else:
        assert any(expected in problem for problem in problems), problems


@pytest.mark.parametrize("kernel", MUST_REGISTER)
def test_every_target_is_compiled(kernel: str) -> None:
    targets = {target for name, target in JOBS if name.split("_")[0] == kernel and VARIANTS[name].sampled(target)}
    assert targets == set(JOINT_TARGETS if kernel in ("joint", "xv", "stz") else TARGETS)


@pytest.mark.parametrize("padded", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("target", [80, 90])
def test_the_default_step_is_compiled_at_every_rank(target: int, padded: int) -> None:
    joint = [n for n, t in JOBS if t == target and n.startswith("joint") and VARIANTS[n].constexprs["RP"] == padded]
    launched = {name.split("_")[1] for name in joint if "twofold" not in name}
    assert launched == {"gram", "roots", "moments", "collect", "tangent", "finish", "apply"}


TOO_MUCH = "spills: {} bytes of stack, 0 of local memory"
TOO_LITTLE = "spills {} bytes of stack, where {} are allowed"


@pytest.mark.parametrize(
    ("version", "stack", "expected"),
    [
        ("3.6.0", 80, []),
        ("3.6.0", 88, [TOO_MUCH.format(88)]),
        ("3.6.0", 72, [TOO_LITTLE.format(72, 80)]),
        ("3.8.0", 72, []),
        ("3.8.0", 88, [TOO_MUCH.format(88)]),
        ("3.9.0", 80, [TOO_MUCH.format(80)]),
        ("3.10.0", 16, []),
        ("3.5.1", 8, [TOO_MUCH.format(8)]),
    ],
)
def test_an_allowance_to_spill_belongs_to_one_triton(
    version: str, stack: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate_allowances, "SPILLED", {(3, 6): {"kernel": {90: 80}}, (3, 9): {"kernel": {90: 16}}})
    assert over_limits(version, stack=stack) == expected
    assert over_limits("3.6.0", stack=80, target=100) == [TOO_MUCH.format(80)]


def test_an_allowance_of_registers_belongs_to_one_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_allowances, "REGISTERS", {(3, 9): {"kernel": {90: 205}}})
    assert over_limits("3.9.0", registers=205) == over_limits("3.6.0", registers=168) == []
    assert over_limits("3.6.0", registers=205) == ["205 registers; its budget is 168"]
    assert over_limits("3.9.0", registers=206) == ["206 registers; its budget is 205"]


def over_limits(version: str, *, stack: int = 0, registers: int = 168, target: int = 90) -> list[str]:
    """What the gates object to in a kernel with a budget of 168 registers."""
    unused = dict.fromkeys(("local", "shared", "copies", "narrow_copies"), 0)
    report = {"name": "kernel", "target": target, "stack": stack, "registers": registers, **unused}
    return kernel_gates.over_limits(report, SimpleNamespace(max_registers=168, streaming=False), version)


def test_allowances_are_of_what_is_compiled_and_needed() -> None:
    spilled, registers = (
        [(name, target, count) for own in table.values() for name, by in own.items() for target, count in by.items()]
        for table in (gate_allowances.SPILLED, gate_allowances.REGISTERS)
    )
    assert {(name, target) for name, target, _ in spilled + registers} <= set(JOBS)
    assert all(count > 0 for *_, count in spilled)
    assert all(count > VARIANTS[name].max_registers for name, _, count in registers)


def test_only_floating_point_atomics_are_banned() -> None:
    assert kernel_gates.banned("", "", "red.relaxed.gpu.global.add.f32 [%rd1], %f1;", 90)
    assert kernel_gates.banned("", "", "atom.global.gpu.acq_rel.add.f32 %f1, [%rd1], %f2;", 90)
    assert not kernel_gates.banned("", "", "atom.global.gpu.acq_rel.add.u32 %r1, [%rd1], %r2;", 90)
    assert not kernel_gates.banned("", "", "redux.sync.add.s32 %r1, %r2, %r3;", 90)


def test_a_frame_that_nothing_uses_is_no_spill() -> None:
    frame = "\t.local .align 1 .b8 \t__local_depot0[4];\n\t.reg .b32 \t%SPL;\n"
    assert kernel_gates.unused_stack(frame) == 8
    assert kernel_gates.unused_stack(f"{frame}\tmov.u64 %SPL, __local_depot0;\n") == 0
    assert kernel_gates.unused_stack(f"{frame}\tst.local.u8 [%rd1], %rs1;\n") == 0
    assert kernel_gates.unused_stack("") == 0


def test_registers_of_an_asynchronous_product_are_left_alone_until_its_wait() -> None:
    product = "\twgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r1,%r2,%r3,%r4}, %rd1, %rd2, %p1, 1, 1, 0, 0;\n"
    wait = "\t// wait for regs: %r1,%r2,%r3,%r4\n\twgmma.wait_group.sync.aligned 0;\n"
    commit = "\twgmma.commit_group.sync.aligned;\n\tmov.b32 \t%r11, %r5;\n"
    copy = "\tmov.b32 \t%r12, %r3;\n"
    assert kernel_gates.banned("", "", product * 2 + commit + copy + wait, 90)
    assert not kernel_gates.banned("", "", product * 2 + commit + wait + copy, 90)
    assert not kernel_gates.banned("", "", copy + product, 90)


def test_whole_tiles_say_how_their_addresses_are_aligned() -> None:
    """From an address of the table, unless there is a mask; what is a pointer to begin with knows by itself."""
    table = """
  %f = tt.int_to_ptr %address : i64 -> !tt.ptr<f32>
  %start = tt.splat %f : !tt.ptr<f32> -> tensor<16x64x!tt.ptr<f32>>
  %at = tt.addptr %start, %offset HINT: tensor<16x64x!tt.ptr<f32>>, tensor<16x64xi32>
"""
    load = "  %x = tt.load %at : tensor<16x64x!tt.ptr<f32>>"
    hint = "{tt.contiguity = dense<[1, 8]> : tensor<2xi32>, tt.divisibility = dense<[1, 16]> : tensor<2xi32>} "
    masked = "  %x = tt.load %at, %inside, %zero : tensor<16x64x!tt.ptr<f32>>"
    assert gate_addresses.unsaid(table.replace("HINT", "") + load) == ["%x (16, 64)"]
    assert gate_addresses.unsaid(table.replace("HINT", hint) + load) == []
    assert gate_addresses.unsaid(table.replace("HINT", "") + masked) == []
    assert gate_addresses.unsaid(table.replace("int_to_ptr", "call @given").replace("HINT", "") + load) == []


SIBLINGS = """
tt.func public @_kernel(%x: !tt.ptr<f32>) attributes {noinline = false} {
  %zero = arith.constant dense<0.000000e+00> : tensor<16x16xf32>
  %first = scf.for %i = %c0 to %n step %c1 iter_args(%total = %zero) -> (tensor<16x16xf32>) : i32 {
    %sum = tt.dot %a, %b, %total, inputPrecision = ieee : tensor<16x16xf32> * tensor<16x16xf32> -> tensor<16x16xf32>
    scf.yield %sum : tensor<16x16xf32>
  }
  %second = scf.for %i = %c0 to %n step %c1 iter_args(%total = %zero) -> (tensor<16x16xf32>) : i32 {
    %sum = arith.addf %total, %a : tensor<16x16xf32>
    scf.yield %sum : tensor<16x16xf32>
  }
  %turned = tt.trans %SOURCE {order = array<i32: 1, 0>} : tensor<16x16xf32> -> tensor<16x16xf32>
  %last = tt.dot %turned, %b, %zero, inputPrecision = ieee : tensor<16x16xf32> * tensor<16x16xf32> -> tensor<16x16xf32>
}
"""


@pytest.mark.parametrize(("source", "expected"), [("first", True), ("second", False)])
def test_names_of_sibling_loops_are_told_apart(source: str, expected: bool) -> None:
    assert kernel_gates.Flow(SIBLINGS.replace("SOURCE", source)).transposed_into_dot() is expected
