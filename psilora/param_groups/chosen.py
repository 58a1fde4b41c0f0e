"""Which layers or parameters an entry of `groups` means, by their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from psilora.adapters.pair import listed


class Chosen:
    """A regular expression that is searched in names, or a list of names.

    Args:
        key: Where it stands in the entry, "layers" or "parameters".
        wanted: What stands there.

    Raises:
        ValueError: It is neither.
    """

    def __init__(self, key: str, wanted: object) -> None:
        self._key = key
        self._pattern: re.Pattern[str] | None = None
        self._names: list[str] = []
        if isinstance(wanted, str):
            try:
                self._pattern = re.compile(wanted)
            except re.error as error:
                raise ValueError(f"Invalid {key}={wanted!r}. Must be a regular expression: {error}.") from error
        elif isinstance(wanted, Sequence) and all(isinstance(name, str) for name in wanted):
            self._names = list(wanted)
        else:
            raise ValueError(f"Invalid {key}={wanted!r}. Must be a regular expression or a list of names.")

    def means(self, *names: str) -> bool:
        """Whether what has these names is meant."""
        if self._pattern is not None:
            return any(map(self._pattern.search, names))
        return any(name in self._names for name in names)

    def check(self, there: Iterable[str], shown: Sequence[str]) -> None:
        """Raise ValueError for names in the list that are none of those `there`, of which some are `shown`."""
        wrong = sorted(set(self._names) - set(there))
        if wrong:
            raise ValueError(
                f"Invalid {self._key}={self._names!r}. Must be names of what is trained, which {listed(wrong)} "
                f"{'is' if len(wrong) == 1 else 'are'} not; there are {listed(list(shown)) or 'none'}"
            )
