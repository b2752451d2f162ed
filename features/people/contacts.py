"""The contact table: the one place that holds what is personal, encrypted, keyed by the identifier that it came with."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import NamedTuple

import sqlalchemy as sa

from features.people.vault import CONTACTS, IDENTIFIER, Personal, Vault
from features.state.clock import microseconds, moment_of
from features.state.ports import AnyRow, State
from features.state.sql import put, run_many

_CHUNK = 500
KEPT_AT_MOST = 200_000
"""So many identifiers are remembered as kept; one that is forgotten is kept again, which changes nothing."""
_ROWS = sa.select(CONTACTS.c.identity_key, CONTACTS.c.field, CONTACTS.c.token, CONTACTS.c.known_at)
_PUT = put(CONTACTS)
_REMEMBER = _PUT.on_conflict_do_update(
    index_elements=[CONTACTS.c.identity_key, CONTACTS.c.field],
    set_={"known_at": _PUT.excluded.known_at, "token": _PUT.excluded.token},
    # an identifier's value never changes
    where=sa.and_(_PUT.excluded.known_at >= CONTACTS.c.known_at, CONTACTS.c.field != sa.literal_column(f"'{IDENTIFIER}'")),
)


class Contact(NamedTuple):
    """One thing known of a person."""

    identity_key: str
    field: str
    value: str
    known_at: datetime


class Contacts:
    """A database of encrypted values. A person is found through their identifiers, so that merges stay reversible.

    Several processes may write: each statement is a transaction of its own. Deleted rows are overwritten.
    """

    def __init__(self, state: State, vault: Vault) -> None:
        self._vault = vault
        self._lock = threading.Lock()
        self._session = state.database("contacts", CONTACTS).connect()
        self._kept: set[str] = set()
        """Identifiers that this process has lately kept in clear, so that each of their events need not bring them along."""

    def news(self, personal: Iterable[Personal]) -> list[Personal]:
        """What of *personal* the table may lack: an identifier in clear is kept once, as far as is remembered here."""
        return [each for each in personal if each.field != IDENTIFIER or each.identity_key not in self._kept]

    def forget(self, identity_keys: Iterable[str]) -> None:
        """Take nothing for kept that another process erases."""
        # at once, without the lock: whoever holds it may wait for the database
        self._kept.difference_update(list(identity_keys))

    def remember(self, rows: Iterable[tuple[Personal, datetime]]) -> None:
        """Keep each row; of one field of one identifier the value known last stays."""
        sealed = [(row.identity_key, row.field, microseconds(known_at), self._vault.encrypt(row.value.encode())) for row, known_at in rows]
        if not sealed:
            return
        with self._lock:
            with self._session.writing() as connection:
                run_many(connection, _REMEMBER, sealed)
            if len(self._kept) > KEPT_AT_MOST:
                self._kept.clear()
            self._kept.update(key for key, field, _, _ in sealed if field == IDENTIFIER)

    def of(self, identity_keys: Sequence[str]) -> list[Contact]:
        """Everything held under *identity_keys*, in clear, oldest first."""
        found: list[Contact] = []
        for start in range(0, len(identity_keys), _CHUNK):
            some = CONTACTS.c.identity_key.in_(identity_keys[start : start + _CHUNK])
            found += map(self._opened, self._session.read(_ROWS.where(some)))
        return sorted(found, key=lambda contact: (contact.known_at, contact.identity_key, contact.field))

    def identifiers(self, identity_keys: Sequence[str]) -> dict[str, str]:
        """The clear value of each identifier, by its key."""
        found: dict[str, str] = {}
        for start in range(0, len(identity_keys), _CHUNK):
            some = CONTACTS.c.identity_key.in_(identity_keys[start : start + _CHUNK])
            rows = self._session.read(_ROWS.where(CONTACTS.c.field == IDENTIFIER, some))
            found |= {key: self._vault.decrypt(token).decode() for key, _, token, _ in rows}
        return found

    def told(self, fields: Sequence[str]) -> Iterator[Contact]:
        """Whatever is held in one of these fields, in clear."""
        with self._session.streaming(_ROWS.where(CONTACTS.c.field.in_(list(fields)))) as rows:
            yield from map(self._opened, rows)

    def everything(self) -> list[Contact]:
        """All contacts in clear, for the search for people who are known twice."""
        return [self._opened(row) for row in self._session.read(_ROWS)]

    def erase(self, identity_keys: Sequence[str]) -> int:
        """Delete what is held under *identity_keys*, leaving no trace in the file; returns how many rows."""
        with self._lock:
            count = 0
            with self._session.writing() as connection:
                for key in identity_keys:
                    self._kept.discard(key)
                    count += connection.execute(sa.delete(CONTACTS).where(CONTACTS.c.identity_key == key)).rowcount
            self._session.scrub()
            return count

    def close(self) -> None:
        """Let go of the file."""
        self._session.close()

    def _opened(self, row: AnyRow) -> Contact:
        key, field, token, known_at = row
        return Contact(key, field, self._vault.decrypt(token).decode(), moment_of(known_at))
