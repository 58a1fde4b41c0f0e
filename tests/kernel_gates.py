"""Compile every registered kernel variant ahead of time, without a GPU, and look for what must never be in the result.

`python tests/kernel_gates.py [pattern]` prints the table of registers, shared memory and asynchronous copies.
The tests run it in subprocesses, because Triton decides at import whether it interprets or compiles.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

#: Shared memory of one block, in bytes.
SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}

PACKAGE = "psilora.triton_kernels"
PROCESSES = 2


def kernel_modules() -> list[str]:
    """Every module of the kernel package."""
    package = importlib.import_module(PACKAGE)
    return [f"{PACKAGE}.{module.name}" for module in pkgutil.iter_modules(package.__path__)]


def variants(modules: list[str]) -> dict[str, Any]:
    """The registered variants of the modules that have any, by name."""
    found: dict[str, Any] = {}
    for module in modules:
        for variant in getattr(importlib.import_module(module), "VARIANTS", ()):
            if variant.name in found:
                raise ValueError(f"two kernel variants are called {variant.name!r}")
            found[variant.name] = variant
    return found


def compile_all(modules: list[str]) -> dict[tuple[str, int], dict[str, Any]]:
    """Compile all variants of the modules for all their targets in subprocesses; a report per (name, target)."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        workers = []
        for part in range(PROCESSES):
            command = [sys.executable, __file__, "--part", str(part), "--out", f"{folder}/{part}.json", "--modules"]
            workers.append(subprocess.Popen([*command, *modules], env=environment))
        codes = [worker.wait() for worker in workers]
        if any(codes):
            raise RuntimeError(f"the compiling subprocesses ended with {codes}")
        reports = [r for part in range(PROCESSES) for r in json.loads(Path(folder, f"{part}.json").read_text())]
    return {(report["name"], report["target"]): report for report in reports}


def compile_variant(variant: Any, target: int) -> dict[str, Any]:
    """Compile one variant for one target; measurements, and `problems`: what the gates object to."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = variant.kernel
    report: dict[str, Any] = {"name": variant.name, "target": target, "problems": []}
    if not isinstance(kernel, triton.JITFunction):
        report["problems"] = [f"a {type(kernel).__name__}, not a plain triton.jit function: no autotuning in place"]
        return report
    try:
        signature = {name: variant.signature.get(name, "constexpr") for name in kernel.arg_names}
        hints = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in variant.aligned}
        source = ASTSource(kernel, signature, dict(variant.constexprs), hints)
        options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
        compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    except Exception as error:  # whatever the compiler says belongs into the report
        report["problems"] = [f"does not compile: {type(error).__name__}: {error}"]
        return report
    text = compiled.asm
    report |= resources(text["cubin"])
    report["shared"] = compiled.metadata.shared
    report["copies"] = len(re.findall(r"cp\.async\.cg\.|cp\.async\.bulk\.", text["ptx"]))
    report["narrow_copies"] = len(re.findall(r"cp\.async\.ca\.", text["ptx"]))
    report["problems"] = over_limits(report, variant) + banned(text["ttir"], text["ttgir"], text["ptx"], target)
    return report


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local bytes of a cubin, from cuobjdump."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = str(tool) if tool.exists() else shutil.which("cuobjdump")
    if command is None:
        raise RuntimeError("cuobjdump is neither in Triton nor on PATH")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([command, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {key.lower(): int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return {"registers": found["reg"], "stack": found["stack"], "local": found["local"]}


def over_limits(report: dict[str, Any], variant: Any) -> list[str]:
    """Problems with what a compiled kernel uses."""
    problems = []
    if report["stack"] or report["local"]:
        problems.append(f"spills: {report['stack']} bytes of stack, {report['local']} of local memory")
    if report["registers"] > variant.max_registers:
        problems.append(f"{report['registers']} registers; its budget is {variant.max_registers}")
    if report["shared"] > SHARED_LIMIT[report["target"]]:
        problems.append(f"{report['shared']} bytes of shared memory; a block has {SHARED_LIMIT[report['target']]}")
    if variant.streaming and not report["copies"]:
        problems.append("a streaming kernel without asynchronous 16-byte copies")
    if variant.streaming and report["narrow_copies"]:
        problems.append(f"{report['narrow_copies']} asynchronous copies of less than 16 bytes: an alignment hint is lost")
    return problems


def banned(ttir: str, ttgir: str, ptx: str, target: int) -> list[str]:
    """Patterns that are miscompiled, not reproducible or debugging leftovers."""
    problems = []
    if re.search(r"\b(?:atom|red)\.[\w.:]*\b(?:f16|bf16|f16x2|bf16x2|f32|f64)\b", ptx):
        problems.append("a floating-point atomic: the sum depends on the order of the programs")
    if re.search(r"vprintf|__assertfail", ptx) or re.search(r"\btt\.(?:print|assert)\b", ttir):
        problems.append("a device print or assert")
    if re.search(r"warp_group_dot (?!.*_wait).* : tensor<", ttgir):
        problems.append("wgmma with its first operand in registers: miscompiled by ptxas before 13.3")
    if re.search(r"make_tensor_descriptor|cp\.async\.bulk\.tensor", ttir + ptx):
        problems.append("a TMA descriptor: its allocator can leave dangling pointers in captured graphs")
    for precision in sorted(set(re.findall(r"inputPrecision = (tf32x3|bf16x\d)\b", ttir))):
        problems.append(f"input precision {precision}: becomes wgmma from registers on Hopper")
    if re.search(r"tt\.dot .*inputPrecision = tf32 : tensor<[\dx]*xf32>", ttir):
        problems.append("a tf32 product of fp32 operands")
    flow = Flow(ttir)
    if flow.transposed_into_dot():
        problems.append("a transposed dot result feeds a dot: miscompiled on Hopper and Blackwell")
    if target >= 100 and flow.chained_dots():
        problems.append("two dots chained into one accumulator inside a loop: miscompiled on sm_103")
    return problems


_VALUE = re.compile(r"%[\w$.-]+(?:#\d+)?")
_ELEMENTWISE = re.compile(r"(?:arith|math)\.|tt\.(?:bitcast|fp_to_fp|clampf|precise_\w+|extern_elementwise|reshape)\b")


class Flow:
    """Who feeds whom in the text of a TTIR module: enough of its structure to follow dot results."""

    def __init__(self, ttir: str) -> None:
        self.operation: dict[str, str] = {}
        self.operands: dict[str, list[str]] = {}
        self.block: dict[str, int] = {}
        self.in_loop: dict[str, bool] = {}
        self.edges: dict[str, set[str]] = defaultdict(set)  # value → loop and branch results that may carry it
        frames: list[tuple[str | None, list[str], bool, int]] = []
        count = 0
        for raw in ttir.splitlines():
            line = re.sub(r"\s*loc\(.*$", "", raw).strip()
            closes = line.startswith("}")
            opens = line.endswith(("{", "({"))
            if closes and not opens and frames:
                frames.pop()
                continue
            if closes:  # "} else {" and "} do {" go on yielding to the same results
                continue
            match = re.match(r"(%[\w$.-]+)(?::\d+)? = \"?([\w.]+)\"?(.*)$", line)
            name, operation, rest = match.groups() if match else (None, line.split(" ")[0], line)
            if operation == "scf.yield" and frames:
                owner, arguments, _, _ = frames[-1]
                values = _VALUE.findall(rest.split(" : ")[0])
                for i, value in enumerate(values):
                    if owner is not None:
                        self.edges[value].add(owner if len(values) == 1 else f"{owner}#{i}")
                    if i < len(arguments):
                        self.edges[value].add(arguments[i])
            if name is not None:
                self.operation[name] = operation
                self.operands[name] = _VALUE.findall(rest.split(" : ")[0])
                self.block[name] = frames[-1][3] if frames else -1
                self.in_loop[name] = any(loop for _, _, loop, _ in frames)
            if opens:
                pairs = re.findall(r"(%[\w$.-]+) = (%[\w$.-]+(?:#\d+)?)", rest)
                loop = operation in ("scf.for", "scf.while")
                arguments = [a for a, _ in pairs[1 if operation == "scf.for" else 0 :]] if loop else []
                for argument, value in pairs:
                    self.edges[value].add(argument)
                count += 1
                frames.append((name, arguments, loop, count))

    def transposed_into_dot(self) -> bool:
        """Whether a dot has an operand that is elementwise a transpose of, elementwise, another dot's result."""
        straight = self._reach({n for n, op in self.operation.items() if op == "tt.dot"})
        turned = {n for n, op in self.operation.items() if op == "tt.trans" and straight & set(self.operands[n])}
        turned = self._reach(turned)
        return any(op == "tt.dot" and turned & set(self.operands[n][:2]) for n, op in self.operation.items())

    def chained_dots(self) -> bool:
        """Whether, inside a loop, a dot accumulates onto the result of a dot of the same block."""
        return any(
            op == "tt.dot"
            and self.in_loop[name]
            and self.operation.get(self.operands[name][2]) == "tt.dot"
            and self.block[self.operands[name][2]] == self.block[name]
            for name, op in self.operation.items()
        )

    def _reach(self, start: set[str]) -> set[str]:
        """The values that `start` reaches through elementwise operations, loops and branches."""
        users: dict[str, set[str]] = defaultdict(set)
        for name, operation in self.operation.items():
            if _ELEMENTWISE.match(operation):
                for operand in self.operands[name]:
                    users[operand].add(name)
        reached, queue = set(start), list(start)
        while queue:
            value = queue.pop()
            for user in (users[value] | self.edges[value]) - reached:
                reached.add(user)
                queue.append(user)
        return reached


def table(reports: list[dict[str, Any]]) -> str:
    """The reports as text, one line each."""
    lines = [f"{'kernel':44s} {'sm':>4s} {'registers':>9s} {'shared':>7s} {'copies':>6s}  problems"]
    for r in reports:
        numbers = (r.get("registers", "-"), r.get("shared", "-"), r.get("copies", "-"))
        line = f"{r['name']:44s} {r['target']:4d} {numbers[0]!s:>9s} {numbers[1]!s:>7s} {numbers[2]!s:>6s}"
        lines.append(f"{line}  {'; '.join(r['problems'])}".rstrip())
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pattern", nargs="?", default="", help="regular expression that selects variants")
    parser.add_argument("--modules", nargs="*", help="default: every module of the kernel package")
    parser.add_argument("--part", type=int, help="compile one share of the work, for --out")
    parser.add_argument("--out", help="write the reports as JSON instead of printing a table")
    options = parser.parse_args()
    found = variants(options.modules or kernel_modules())
    jobs = [(variant, target) for name, variant in found.items() if re.search(options.pattern, name) for target in variant.targets]
    if options.part is not None:
        jobs = jobs[options.part :: PROCESSES]
    reports = [compile_variant(variant, target) for variant, target in jobs]
    if options.out:
        Path(options.out).write_text(json.dumps(reports))
    else:
        print(table(reports))


if __name__ == "__main__":
    main()
