"""Compile every registered kernel variant ahead of time, without a GPU, and look for what must never be in the result.

`python tests/support/kernel_gates.py [pattern]` prints the table of registers, shared memory and asynchronous copies.
The tests run it in a subprocess, because Triton decides at import whether it interprets or compiles.
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
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gate_addresses
import gate_allowances

#: Shared memory of one block, in bytes.
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}

PACKAGE = "psilora.triton_kernels"


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


class Compiler:
    """A subprocess that has imported Triton and the modules, and compiles the variants it is asked for."""

    def __init__(self, modules: list[str]) -> None:
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        command = [sys.executable, __file__, "--serve", "--modules", *modules]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def report(self, name: str, target: int) -> dict[str, Any]:
        """What `compile_variant` says of the variant of that name."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        if process.poll() is None:
            print(json.dumps([name, target]), file=process.stdin, flush=True)
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the compiling subprocess ended with {process.wait()} at {name}, sm_{target}")
        return dict(json.loads(line))

    def close(self) -> None:
        """End the subprocess."""
        self._process.communicate()


def serve(found: dict[str, Any]) -> None:
    """Answer each line of stdin, a JSON list of a name and a target, with a line of JSON, its report."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the compiler prints is no answer
    for line in sys.stdin:
        name, target = json.loads(line)
        print(json.dumps(compile_variant(found[name], target)), file=answers, flush=True)


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
        if not variant.fusion:
            options["enable_fp_fusion"] = False
        if variant.maxnreg is not None:
            options["maxnreg"] = variant.maxnreg
        start = time.perf_counter()
        compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    except Exception as error:  # whatever the compiler says belongs into the report
        report["problems"] = [f"does not compile: {type(error).__name__}: {error}"]
        return report
    text = compiled.asm
    report["seconds"] = time.perf_counter() - start
    report |= resources(text["cubin"])
    report["stack"] -= unused_stack(text["ptx"])
    report["shared"] = compiled.metadata.shared
    report["copies"] = len(re.findall(r"cp\.async\.cg\.|cp\.async\.bulk\.", text["ptx"]))
    report["narrow_copies"] = len(re.findall(r"cp\.async\.ca\.", text["ptx"]))
    report["problems"] = over_limits(report, variant, triton.__version__)
    report["problems"] += banned(text["ttir"], text["ttgir"], text["ptx"], target)
    if variant.constexprs.get("WHOLE") and (loads := gate_addresses.unsaid(text["ttir"])):
        report["problems"].append(f"alignment of whole tiles is lost: {', '.join(loads)}")
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


def unused_stack(ptx: str) -> int:
    """Bytes of stack that ptxas reserves for a frame that nothing refers to, as the LLVM of Triton 3.9 leaves some."""
    found = 0
    for name, size in re.findall(r"\.local\s+\.align\s+\d+\s+\.b8\s+(\w+)\[(\d+)\]", ptx):
        used = len(re.findall(rf"\b{name}\b", ptx)) > 1 or re.search(r"\b(?:ld|st)\.local\b", ptx)
        found += 0 if used else -(-int(size) // 8) * 8
    return found


def over_limits(report: dict[str, Any], variant: Any, version: str) -> list[str]:
    """Problems with what a kernel uses that this version of Triton compiled."""
    problems = []
    at = version, report["name"], report["target"]
    spilled = gate_allowances.allowed(gate_allowances.SPILLED, *at)
    if report["stack"] > spilled or report["local"]:
        problems.append(f"spills: {report['stack']} bytes of stack, {report['local']} of local memory")
    elif report["stack"] < spilled and gate_allowances.measured(version):
        problems.append(f"spills {report['stack']} bytes of stack, where {spilled} are allowed")
    budget = max(variant.max_registers, gate_allowances.allowed(gate_allowances.REGISTERS, *at))
    if report["registers"] > budget:
        problems.append(f"{report['registers']} registers; its budget is {budget}")
    if report["shared"] > SHARED_LIMIT[report["target"]]:
        problems.append(f"{report['shared']} bytes of shared memory; a block has {SHARED_LIMIT[report['target']]}")
    if variant.streaming and not report["copies"]:
        problems.append("a streaming kernel without asynchronous 16-byte copies")
    if variant.streaming and report["narrow_copies"]:
        problems.append(
            f"{report['narrow_copies']} asynchronous copies of less than 16 bytes: an alignment hint is lost"
        )
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
    early = read_in_flight(ptx)
    if early:
        problems.append(f"registers of an asynchronous product are used before its wait: {early}")
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


def read_in_flight(ptx: str) -> str | None:
    """The first instruction that uses registers into which a wgmma of sm_90 is still adding, if there is one.

    PTX leaves undefined what it reads. ptxas then has every product of the kernel wait for the one before.
    """
    flying: set[str] = set()
    for line in ptx.splitlines():
        code = line.partition("//")[0].strip()
        if code.startswith("wgmma.mma_async"):
            flying.update(re.findall(r"%\w+", code[code.index("{") : code.index("}")]))
        elif code.startswith("wgmma.wait_group"):
            flying.clear()
        elif flying and flying & set(re.findall(r"%\w+", code)):
            return " ".join(code.split())
    return None


_VALUE = re.compile(r"%[\w$.-]+(?:#\d+)?")
_ELEMENTWISE = re.compile(r"(?:arith|math)\.|tt\.(?:bitcast|fp_to_fp|clampf|precise_\w+|extern_elementwise|reshape)\b")


@dataclass
class _Region:
    """An open region: its operation's result, the arguments of its block, and the names visible in it alone."""

    number: int
    owner: str | None = None
    loop: bool = False
    arguments: list[str] = field(default_factory=list)
    condition: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)


class Flow:
    """Who feeds whom in the text of a TTIR module: enough of its structure to follow dot results.

    Names are only unique within a region, so every definition gets a name of its own first.
    """

    def __init__(self, ttir: str) -> None:
        self.operation: dict[str, str] = {}
        self.operands: dict[str, list[str]] = {}
        self.region: dict[str, int] = {}
        self.in_loop: dict[str, bool] = {}
        self.edges: dict[str, set[str]] = defaultdict(set)  # value → loop and branch results that may carry it
        self._open = [_Region(0)]
        self._count = 0
        for raw in ttir.splitlines():
            self._read(re.sub(r"\s*loc\(.*$", "", raw).strip())

    def _define(self, name: str) -> str:
        self._count += 1
        self._open[-1].names[name] = f"{name}@{self._count}"
        return self._open[-1].names[name]

    def _resolve(self, text: str) -> list[str]:
        """The values that are named in `text`, in order."""
        found = []
        for value in _VALUE.findall(text):
            name, _, part = value.partition("#")
            known = next((r.names[name] for r in reversed(self._open) if name in r.names), name)
            found.append(f"{known}#{part}" if part else known)
        return found

    def _read(self, line: str) -> None:
        region = self._open[-1]
        opens = line.endswith("{")
        if line.startswith("}") and not opens:
            if len(self._open) > 1:
                self._open.pop()
            return
        if line.startswith("}"):  # "} else {" and "} do {": the next region of the same operation
            region.names.clear()
            return
        if line.startswith("^"):
            arguments = [self._define(name) for name in re.findall(r"(%[\w$.-]+):", line)]
            for argument, value in zip(arguments, region.condition, strict=False):
                self.edges[value].add(argument)
            return
        match = re.match(r"(%[\w$.-]+)(?::\d+)? = \"?([\w.]+)\"?(.*)$", line)
        name, operation, rest = match.groups() if match else (None, re.split(r"[ (]", line)[0], line)
        values = self._resolve(rest.split(" : ")[0])
        if operation in ("scf.yield", "scf.condition"):
            if operation == "scf.condition":
                values = region.condition = values[1:]
            for i, value in enumerate(values):
                if region.owner is not None:
                    self.edges[value].add(region.owner if len(values) == 1 else f"{region.owner}#{i}")
                if operation == "scf.yield" and i < len(region.arguments):
                    self.edges[value].add(region.arguments[i])
        carried = re.findall(r"(%[\w$.-]+) = (%[\w$.-]+(?:#\d+)?)", rest) if opens else []
        initial = [self._resolve(value)[0] for _, value in carried]
        result = None if name is None else self._define(name)
        if result is not None:
            self.operation[result] = operation
            self.operands[result] = values
            self.region[result] = region.number
            self.in_loop[result] = any(r.loop for r in self._open)
        if opens:
            self._count += 1
            loop = operation in ("scf.for", "scf.while")
            self._open.append(_Region(self._count, owner=result, loop=loop))
            arguments = [self._define(argument) for argument, _ in carried]
            for argument, value in zip(arguments, initial, strict=True):
                self.edges[value].add(argument)
            # The first pair of a for loop is its counter and where that begins.
            self._open[-1].arguments = arguments[1:] if operation == "scf.for" else arguments

    def transposed_into_dot(self) -> bool:
        """Whether a dot has an operand that is elementwise a transpose of, elementwise, another dot's result."""
        straight = self._reach({n for n, op in self.operation.items() if op == "tt.dot"})
        turned = {n for n, op in self.operation.items() if op == "tt.trans" and straight & set(self.operands[n])}
        turned = self._reach(turned)
        return any(op == "tt.dot" and turned & set(self.operands[n][:2]) for n, op in self.operation.items())

    def chained_dots(self) -> bool:
        """Whether, inside a loop, a dot accumulates onto the result of a dot of the same region."""
        return any(
            op == "tt.dot"
            and self.in_loop[name]
            and self.operation.get(self.operands[name][2]) == "tt.dot"
            and self.region[self.operands[name][2]] == self.region[name]
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


HEAD = f"{'kernel':40s} {'sm':>4s} {'registers':>9s} {'shared':>7s} {'copies':>6s} {'seconds':>7s}  problems"


def row(report: dict[str, Any]) -> str:
    """A report as a line under `HEAD`."""
    widths = (("registers", 9), ("shared", 7), ("copies", 6))
    numbers = " ".join(str(report.get(key, "-")).rjust(width) for key, width in widths)
    line = f"{report['name']:40s} {report['target']:4d} {numbers} {report.get('seconds', 0):7.1f}"
    return f"{line}  {'; '.join(report['problems'])}".rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pattern", nargs="?", default="", help="regular expression that selects variants")
    parser.add_argument("--modules", nargs="*", help="default: every module of the kernel package")
    parser.add_argument(
        "--targets", nargs="*", type=int, help="compute capabilities, 90 for 9.0; default: a variant's own"
    )
    parser.add_argument("--sampled", action="store_true", help="only what an ordinary run of the tests compiles")
    parser.add_argument("--record", type=Path, help="a JSON file to keep the outcome in, under the version of Triton")
    parser.add_argument("--serve", action="store_true", help="compile what stdin asks for")
    options = parser.parse_args()
    found = variants(options.modules or kernel_modules())
    if options.serve:
        serve(found)
        return
    selected = [variant for name, variant in found.items() if re.search(options.pattern, name)]
    chosen = [(v, t) for v in selected for t in v.targets if options.targets is None or t in options.targets]
    print(HEAD)
    reports: list[dict[str, Any]] = []
    for variant, target in chosen:
        if variant.sampled(target) or not options.sampled:
            reports.append(compile_variant(variant, target))
            print(row(reports[-1]), flush=True)
    if options.record is not None:
        keep(options.record, reports)


def keep(path: Path, reports: list[dict[str, Any]]) -> None:
    """Keep how many variants were compiled for which targets, and what the gates object to, under this Triton."""
    import triton

    records = json.loads(path.read_text()) if path.exists() else {}
    objections = {
        f"{report['name']}, sm_{report['target']}": "; ".join(report["problems"]).partition("\n")[0][:200]
        for report in reports
        if report["problems"]
    }
    records[triton.__version__] = {
        "targets": sorted({report["target"] for report in reports}),
        "compiled": len(reports),
        "problems": objections,
    }
    path.write_text(json.dumps(dict(sorted(records.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
