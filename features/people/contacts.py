"""The contact table: the one place that holds what is personal, encrypted, keyed by the identifier that it came with."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from features.people.vault import IDENTIFIER, Personal, Vault
from features.state.clock import microseconds
from features.state.disk import open_database, roll_back
from features.state.home import Home

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_CHUNK = 500
_REMEMBER = """
    INSERT INTO contacts VALUES (?, ?, ?, ?)
    ON CONFLICT DO UPDATE SET known_at = excluded.known_at, token = excluded.token WHERE excluded.known_at >= contacts.known_at
"""


class Contact(NamedTuple):
    """One thing known of a person."""

    identity_key: str
    field: str
    value: str
    known_at: datetime


class Contacts:
    """A SQLite file of encrypted values. A person is found through her identifiers, so that merges stay reversible.

    Several processes may write: each statement is a transaction of its own. Deleted rows are overwritten.
    """

    def __init__(self, home: Home, vault: Vault) -> None:
        self._vault = vault
        self._lock = threading.Lock()
        self._db = open_database(
            home.contacts,
            "PRAGMA journal_mode=WAL",
            "PRAGMA synchronous=FULL",
            "PRAGMA secure_delete=ON",
            "CREATE TABLE IF NOT EXISTS contacts (identity_key TEXT NOT NULL, field TEXT NOT NULL, known_at INTEGER NOT NULL, "
            "token BLOB NOT NULL, PRIMARY KEY (identity_key, field)) WITHOUT ROWID",
        )
        self._kept = {key for (key,) in self._db.execute("SELECT identity_key FROM contacts WHERE field = ?", [IDENTIFIER])}

    def news(self, personal: Iterable[Personal]) -> list[Personal]:
        """What of *personal* the table may lack: an identifier in clear is kept once."""
        return [each for each in personal if each.field != IDENTIFIER or each.identity_key not in self._kept]

    def remember(self, rows: Iterable[tuple[Personal, datetime]]) -> None:
        """Keep each row; of one field of one identifier the value known last stays."""
        sealed = [(row.identity_key, row.field, microseconds(known_at), self._vault.encrypt(row.value.encode())) for row, known_at in rows]
        if not sealed:
            return
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                self._db.executemany(
                    _REMEMBER,
                    sealed,
                )
                self._db.execute("COMMIT")
            except BaseException:
                roll_back(self._db)
                raise
            self._kept.update(key for key, field, _, _ in sealed if field == IDENTIFIER)

    def of(self, identity_keys: Sequence[str]) -> list[Contact]:
        """Everything held under *identity_keys*, in clear, oldest first."""
        found: list[Contact] = []
        for start in range(0, len(identity_keys), _CHUNK):
            chunk = identity_keys[start : start + _CHUNK]
            marks = ",".join("?" * len(chunk))
            with self._lock:
                rows = self._db.execute(
                    f"SELECT identity_key, field, token, known_at FROM contacts WHERE identity_key IN ({marks})", chunk
                ).fetchall()
            found += [Contact(k, f, self._vault.decrypt(t).decode(), _EPOCH + timedelta(microseconds=at)) for k, f, t, at in rows]
        return sorted(found, key=lambda contact: (contact.known_at, contact.identity_key, contact.field))

    def identifiers(self, identity_keys: Sequence[str]) -> dict[str, str]:
        """The clear value of each identifier, by its key."""
        found: dict[str, str] = {}
        for start in range(0, len(identity_keys), _CHUNK):
            chunk = identity_keys[start : start + _CHUNK]
            marks = ",".join("?" * len(chunk))
            query = f"SELECT identity_key, token FROM contacts WHERE field = ? AND identity_key IN ({marks})"
            with self._lock:
                rows = self._db.execute(query, [IDENTIFIER, *chunk]).fetchall()
            found |= {key: self._vault.decrypt(token).decode() for key, token in rows}
        return found

    def everything(self) -> list[Contact]:
        """All contacts in clear, for the search for people who are known twice."""
        with self._lock:
            rows = self._db.execute("SELECT identity_key, field, token, known_at FROM contacts").fetchall()
        return [Contact(k, f, self._vault.decrypt(t).decode(), _EPOCH + timedelta(microseconds=at)) for k, f, t, at in rows]

    def erase(self, identity_keys: Sequence[str]) -> int:
        """Delete what is held under *identity_keys*, leaving no trace in the file; returns how many rows."""
        with self._lock:
            count = 0
            for key in identity_keys:
                self._kept.discard(key)
                count += self._db.execute("DELETE FROM contacts WHERE identity_key = ?", (key,)).rowcount
            # the write-ahead log still holds the pages as they were
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            return count

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._db.close()
