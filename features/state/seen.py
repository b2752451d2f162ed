"""How far a process has read a table that others append to."""

from __future__ import annotations

from features.state.ports import Table


class Seen:
    """The version of a table that was read last, and which files have come since. It costs the same however many files the table has."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._version, self._digest = -1, None  # type: int, str | None
        self._looked = -1

    @property
    def version(self) -> int:
        """The version that is known; -1 before the first."""
        return self._version

    def news(self) -> list[str] | None:
        """The files that were appended since ``note``; None where all has to be read: rows were taken out, or commits are gone."""
        self._looked = current = self._table.version()
        if current == self._version and self._table.commit_digest(current) in (self._digest, None):
            return []
        # a repair may have put another commit in the place of the one that is known
        if self._version < 0 or self._table.commit_digest(self._version) not in (self._digest, None):
            return None
        return self._table.appended_since(self._version) if current > self._version else None

    def everything(self) -> list[str]:
        """All files of one version, which ``note`` then notes."""
        while True:
            self._looked = self._table.version()
            files = self._table.files()
            if self._table.version() == self._looked:
                return files

    def note(self, version: int | None = None) -> None:
        """What ``news`` told, or a *version* that this process has just written, is known from here on."""
        self._version = self._looked if version is None else version
        self._digest = self._table.commit_digest(self._version)
