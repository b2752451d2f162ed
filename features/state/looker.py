"""A database that is looked at again and again by those who answer."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from sqlalchemy import Executable

from features.state.ports import AnyRow, Database, DatabaseSession

PATIENCE_SECONDS = 1.0
"""How long whoever writes is waited for: a request may wait for this."""


class Looker:
    """Reads a database on a connection that stays open: it takes no turn of those who write. Hold a lock around each call."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._session: DatabaseSession | None = None
        self._identity: Hashable | None = None

    def read(self, statement: Executable) -> Sequence[AnyRow]:
        """The rows of a query, of the database that is there now."""
        if self._session is not None and self._identity != self._database.identity():
            # deleted and made anew, or put back from a backup
            self.close()
        if self._session is None:
            session = self._session = self._database.connect(PATIENCE_SECONDS)
            self._identity = self._database.identity()
        else:
            session = self._session
        try:
            return session.read(statement)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the connection; the next read opens another."""
        session, self._session = self._session, None
        if session is not None:
            session.close()
