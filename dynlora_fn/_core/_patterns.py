"""Select names by names and globs."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from fnmatch import translate

from dynlora_fn._core._check import check_patterns, first_names

_FIRST_GLOB = re.compile(r"[*?[]")


class Patterns:
    """Names and globs, prepared so that many names can be matched quickly.

    An exact name is found in a dict. A glob is tried only on names that start with the glob's text before the first
    wildcard. With one pattern for each weight or layer, the time does not grow with the square of their number.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        self._positions: dict[str, int] = {}
        for pattern in patterns:
            self._positions.setdefault(pattern, len(self._positions))
        self._globs: dict[str, list[tuple[str, re.Pattern[str] | None]]] = defaultdict(list)
        for pattern in self._positions:
            if glob := _FIRST_GLOB.search(pattern):
                start, rest = pattern[: glob.start()], pattern[glob.start() :]
                self._globs[start].append((pattern, None if rest == "*" else re.compile(translate(rest))))
        self._lengths = sorted({len(start) for start in self._globs})

    def matching(self, names: Iterable[str]) -> list[str]:
        """Return the patterns that match at least one of the names, in pattern order."""
        if not self._lengths:  # no globs
            plain = {name for name in names if name in self._positions}
            return [*plain] if len(plain) < 2 else sorted(plain, key=self._positions.__getitem__)
        found = set()
        for name in names:
            if name in self._positions:
                found.add(name)
            for length in self._lengths:
                globs = self._globs.get(name[:length], ()) if length <= len(name) else ()
                found |= {pattern for pattern, glob in globs if glob is None or glob.match(name[length:])}
        return sorted(found, key=self._positions.__getitem__)


def match(names: Iterable[str], patterns: Sequence[str], argument: str) -> list[str]:
    """Return the names that match any of the patterns, in the order of the names.

    Args:
        names: The names to select from.
        patterns: The names or globs to select by.
        argument: The name of the caller's argument, for the error message.

    Raises:
        TypeError: If `patterns` is not a sequence of strings.
        ValueError: If a pattern matches none of the names.
    """
    check_patterns(argument, patterns)
    if not patterns:
        return []
    names, prepared = list(names), Patterns(patterns)
    matching = {name: prepared.matching([name]) for name in names}
    used = {pattern for found in matching.values() for pattern in found}
    for pattern in patterns:
        if pattern not in used:
            raise ValueError(
                f"`{argument}` contains {pattern!r}, which matches no name; use names or globs of: {first_names(names)}"
            )
    return [name for name in names if matching[name]]
