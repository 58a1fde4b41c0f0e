"""What the compile gates build of every kernel: a module lists its variants in `VARIANTS`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: Compute capabilities that every kernel must compile for.
TARGETS = (80, 89, 90, 100)
#: The one for which also variants are compiled that would take too long for all.
SLOW_TARGET = 90
#: Those that products of captures and the default step's kernels must compile for, consumer cards included; the latter
#: at the padded rank 16.
JOINT_TARGETS = (80, 86, 89, 90, 100, 120)
#: The same ones in groups that share a choice of tiles.
GENERATIONS = {"ampere": (80,), "consumer": (86, 89), "hopper": (90, 100), "sm120": (120,)}
#: Those of them whose float64 is at least half as fast as fp32; on the others it is a 64th.
DOUBLE_TARGETS = (80, 90, 100)
#: Those of them that do at the other padded ranks: one whose products read registers, one for shared memory.
_JOINT_RANKS_TARGETS = (80, 90)
#: Padded ranks whose spectral kernels are compiled for every target: the ends. Those between differ in loop counts and
#: are compiled for SLOW_TARGET alone, since all together would take minutes.
EVERYWHERE = (16, 128)
#: Largest padded rank whose kernels are compiled for fp32 parameters as well as 16-bit ones, for SLOW_TARGET alone.
FP32_UP_TO = 64


def joint_targets(padded: int) -> tuple[int, ...]:
    """Return the compute capabilities that the default step's kernels of a padded rank are compiled for."""
    return JOINT_TARGETS if padded == EVERYWHERE[0] else _JOINT_RANKS_TARGETS


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
        max_registers: Budget of registers per thread. With 4 warps 168 let 3 programs share a multiprocessor and 255
            let 2; with 8 warps 128 let 2.
        targets: Compute capabilities to compile for.
        maxnreg: The launch's bound on registers per thread, where it has one.
        fusion: Whether products and sums may be contracted.
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
    fusion: bool = True

    def sampled(self, target: int) -> bool:
        """Whether an ordinary run of the tests compiles it for `target`: else only the sweep of all variants does.

        What depends on the target shows at the least padded rank, what grows with the rank at the largest.
        """
        least, largest = EVERYWHERE
        padded = self.constexprs.get("RP", least)
        return bool(padded == least or (padded == largest and target == SLOW_TARGET))
