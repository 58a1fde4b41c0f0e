"""A small generator of pairwise-covering test cases."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any


def pairwise(choices: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Return cases in which every pair of values of every two parameters occurs; greedy, the same every time."""
    names = list(choices)
    missing = {
        (a, i, b, j)
        for a, b in itertools.combinations(names, 2)
        for i in range(len(choices[a]))
        for j in range(len(choices[b]))
    }
    cases = []
    while missing:
        a, i, b, j = min(missing, key=lambda pair: (names.index(pair[0]), names.index(pair[2]), pair[1], pair[3]))
        case = {a: i, b: j}
        for name in names:
            if name not in case:
                case[name] = max(range(len(choices[name])), key=lambda v: _gain(missing, names, case, name, v))
        missing -= {(x, case[x], y, case[y]) for x, y in itertools.combinations(names, 2)}
        cases.append({name: choices[name][case[name]] for name in names})
    return cases


def _gain(missing: set[Any], names: list[str], case: Mapping[str, int], name: str, value: int) -> int:
    """How many missing pairs a value of one more parameter would cover."""
    pairs = [
        (name, value, other, case[other])
        if names.index(name) < names.index(other)
        else (other, case[other], name, value)
        for other in case
    ]
    return sum(pair in missing for pair in pairs)
