"""Longest prefix: which row of a deck a number belongs to.

A dict by prefix and, per leading pair of digits, the longest length worth trying; a look-up in
50,000 prefixes is a few dict probes.
"""

from collections.abc import Mapping
from typing import Generic, TypeVar

Row = TypeVar("Row")


class Prefixes(Generic[Row]):
    """Rows by digit strings; `find` answers with the row of the longest prefix of a number."""

    __slots__ = ("_longest", "_rows")

    def __init__(self, rows: Mapping[str, Row]) -> None:
        self._rows = dict(rows)
        self._longest: dict[str, tuple[int, ...]] = {}
        lengths: dict[str, set[int]] = {}
        for prefix in self._rows:
            lengths.setdefault(prefix[:2], set()).add(len(prefix))
        for start, found in lengths.items():
            if len(start) == 2:
                # A prefix of one digit is shared by all pairs that begin with it.
                found = found | ({1} if start[0] in self._rows else set())
            self._longest[start] = tuple(sorted(found, reverse=True))

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> Mapping[str, Row]:
        """All rows, by prefix."""
        return self._rows

    def find(self, digits: str) -> Row | None:
        """The row of the longest prefix; None when there is none."""
        lengths = self._longest.get(digits[:2])
        if lengths is None:
            return self._rows.get(digits[:1])
        rows = self._rows
        for length in lengths:
            row = rows.get(digits[:length])
            if row is not None:
                return row
        return None
