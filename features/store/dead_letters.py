"""The dead letters: rows that could not be taken, whole and encrypted, each once, with the field at fault and the reason."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import msgspec
import pyarrow as pa
import sqlalchemy as sa
from sqlalchemy import Connection

from features.people.vault import Vault
from features.state.ports import DEAD_LETTERS, State
from features.state.sql import put, run_many
from features.state.table_index import MARK, TableIndex

SCHEMA = pa.schema(
    [
        ("letter_id", pa.string()),
        ("received_at", pa.timestamp("us", tz="UTC")),
        ("source", pa.string()),
        ("field", pa.string()),
        ("token", pa.binary()),
    ]
)
MOST_BYTES = 1_000_000_000
"""How much the dead letters may hold before the older half of them is let go."""


class DeadLetter(NamedTuple):
    """A row that could not be taken, whole, with the field at fault and the reason."""

    received_at: datetime
    source: str
    field: str
    reason: str
    raw: str


_LETTERS = sa.Table("letters", sa.MetaData(), sa.Column("id", sa.Text, primary_key=True), sqlite_with_rowid=False)
_HELD = sa.select(_LETTERS.c.id).where(_LETTERS.c.id.in_(sa.bindparam("values", expanding=True)))
_FORGET = sa.delete(_LETTERS).where(_LETTERS.c.id == sa.bindparam("letter"))
_PUT = put(_LETTERS).on_conflict_do_nothing()


class LetterIndex(TableIndex[str]):
    """Which letters are kept, by id."""

    format: ClassVar[int] = 2
    columns: ClassVar[list[str] | None] = ["letter_id"]
    sql: ClassVar[tuple[sa.Table, ...]] = (_LETTERS,)

    def held(self, letter_ids: Collection[str]) -> set[str]:
        """Those of *letter_ids* that are kept."""
        return {letter_id for (letter_id,) in self._chunked(_HELD, sorted(letter_ids))}

    def forget(self, letter_ids: Sequence[str], version: int) -> None:
        """Let go of letters that were deleted; *version* is the table without them."""
        with self.changing(version) as connection:
            run_many(connection, _FORGET, [(letter_id,) for letter_id in letter_ids])

    def _insert(self, connection: Connection, rows: Sequence[str]) -> None:
        run_many(connection, _PUT, [(row,) for row in rows])

    @staticmethod
    def _from_row(row: Mapping[str, Any]) -> str:
        return str(row["letter_id"])


class DeadLetters:
    """The table of one home's dead letters. Who changes it holds the lease of the log."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._table = state.tables[DEAD_LETTERS]

    @cached_property
    def _vault(self) -> Vault:
        return Vault.open(self._state)

    @cached_property
    def _index(self) -> LetterIndex:
        return LetterIndex(self._state.database("letter_index", MARK), self._table)

    def keep(self, letters: Sequence[DeadLetter]) -> None:
        """Store letters; the same from a repeated import is kept once."""
        if not letters:
            return
        by_id = {self._vault.hash("letter", "\0".join(letter[1:])): letter for letter in letters}
        self._index.catch_up()
        held = self._index.held(by_id)
        rows: list[dict[str, Any]] = [
            {"letter_id": i, "received_at": x.received_at, "source": x.source, "field": x.field, "token": self._sealed(x)}
            for i, x in by_id.items()
            if i not in held
        ]
        if rows:
            self._table.append(pa.Table.from_pylist(rows, SCHEMA))
            self._index.add([row["letter_id"] for row in rows], self._table.version())

    def read(self) -> list[dict[str, Any]]:
        """Every letter in clear, oldest first: ``letter_id, received_at, source, field, reason, raw``."""
        table = self._table.read()
        rows: list[dict[str, Any]] = [] if table is None else table.to_pylist()
        for row in rows:
            row |= msgspec.json.decode(self._vault.decrypt(row.pop("token")))
        return sorted(rows, key=lambda row: (row["received_at"], row["letter_id"]))

    def forget(self, letter_ids: Sequence[str]) -> int:
        """Delete letters: what was replayed, or belonged to a person who is erased; returns how many there were."""
        self._index.catch_up()
        gone = self._table.erase("letter_id", letter_ids)
        self._index.forget(letter_ids, self._table.version())
        return gone

    def maintain(self, kept_seconds: float) -> None:
        """Keep the table in few files, and within its bound."""
        self._table.keep_newest("received_at", MOST_BYTES)
        self._table.maintain(kept_seconds)

    def _sealed(self, letter: DeadLetter) -> bytes:
        return self._vault.encrypt(msgspec.json.encode({"reason": letter.reason, "raw": letter.raw}))
