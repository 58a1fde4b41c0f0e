"""Whether loads know how their addresses are aligned: those of tables say nothing by themselves."""

from __future__ import annotations

import re

_OPERATION = re.compile(r"\s*(%[\w$.-]+)(?::\d+)? = (.*)$")
_LOAD = re.compile(r"tt\.load (%[\w$.-]+)(?! *,).* : tensor<(\d+)x(\d+)x!tt\.ptr")
_SHAPES = re.compile(r"(?:tt\.(?:addptr|broadcast|splat|expand_dims)) (%[\w$.-]+)")


def unsaid(ttir: str) -> list[str]:
    """The loads of whole tiles, without a mask, from addresses of a table that carry no alignment.

    They become one load for each element. A hint counts where it is given, in the function that forms the address: on
    an argument, or on what a call returns, it is lost.
    """
    defined: dict[str, str] = {}
    found = []
    for line in ttir.splitlines():
        operation = _OPERATION.match(line)
        if not operation:
            continue
        defined[operation[1]] = operation[2]
        load = _LOAD.match(operation[2])
        if not load or "1" in load.groups()[1:] or "tt.divisibility" in defined.get(load[1], ""):
            continue
        base = load[1]
        while (step := _SHAPES.match(defined.get(base, ""))) is not None:
            base = step[1]
        if defined.get(base, "").startswith("tt.int_to_ptr"):
            found.append(f"{operation[1]} ({load[2]}, {load[3]})")
    return found
