"""Which of a catalogue's words is meant by one that no item has."""

from __future__ import annotations

import difflib
from bisect import bisect_left
from collections.abc import Iterable
from functools import cached_property

LONGEST = 64
"""Characters of a word for which another is looked for."""
MOST_COMPARED = 300
"""How many words one that is not known is compared with, so that a hint costs some milliseconds at most."""
MOST_KEPT = 1_000
LIKE = 0.7


class Spelling:
    """The words of one attribute, to find the nearest to another; made ready when the first is asked for."""

    def __init__(self, words: Iterable[str]) -> None:
        self._words = words
        self._found: dict[str, str | None] = {}

    @cached_property
    def _folded(self) -> dict[str, str]:
        return {word.casefold(): word for word in self._words}

    @cached_property
    def _sorted(self) -> list[str]:
        return sorted(self._folded)

    def nearest(self, said: str) -> str | None:
        """The same word in another case, else the one of those that begin alike from which few letters part it, else None."""
        if len(said) > LONGEST:
            return None
        if said not in self._found:
            if len(self._found) >= MOST_KEPT:
                self._found.clear()
            self._found[said] = self._look(said.casefold())
        return self._found[said]

    def _look(self, folded: str) -> str | None:
        if (same := self._folded.get(folded)) is not None:
            return same
        # the neighbours by alphabet are the ones that begin alike
        at = bisect_left(self._sorted, folded)
        around = self._sorted[max(0, at - MOST_COMPARED // 2) : at + MOST_COMPARED // 2]
        near = difflib.get_close_matches(folded, around, 1, LIKE)
        return self._folded[near[0]] if near else None
