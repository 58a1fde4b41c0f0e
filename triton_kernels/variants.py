"""What the compile gates build of every kernel: a module lists its variants in `VARIANTS`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: Compute capabilities that every kernel must compile for.
TARGETS = (80, 89, 90, 100)
#: The one that a variant marked as slow is always compiled for.
SLOW_TARGET = 90
#: Padded ranks whose spectral kernels are compiled for every target: the ends. Those between differ in loop counts and
#: are compiled for SLOW_TARGET alone, since all together would take minutes.
EVERYWHERE = (16, 128)
#: Largest padded rank whose kernels are compiled for fp32 parameters as well as 16-bit ones, for SLOW_TARGET alone.
FP32_UP_TO = 64


@dataclass(frozen=True)
class Variant:
    """One compilation of a kernel, as the JIT would make it for a launch.

    Attributes:
        name: Unique among all variants.
        kernel: The function decorated with `triton.jit`.
        signature: Type of every run-time parameter in Triton's spelling ("*i64", "*fp32", "i32", "fp32").
        constexprs: Value of every `tl.constexpr` parameter.
        aligned: Run-time parameters that the JIT would find divisible by 16: pointers of whole tensors.
        streaming: Whether its loop must be fed by asynchronous copies.
        max_registers: Budget of registers per thread.
        targets: Compute capabilities to compile for.
        maxnreg: The launch's bound on registers per thread, where it has one.
        slow: Compiles for many seconds: where slow tests are left out, it is compiled for SLOW_TARGET alone.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    max_registers: int
    aligned: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    streaming: bool = False
    targets: tuple[int, ...] = TARGETS
    maxnreg: int | None = None
    slow: bool = False
