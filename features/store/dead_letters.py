"""The dead letters: rows that could not be taken, whole and encrypted, each once, with the field at fault and the reason."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import duckdb
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


class Tally(NamedTuple):
    """How many letters of one source have one field at fault, and when the newest came."""

    source: str
    field: str
    letters: int
    newest: datetime


_CHOSEN = "FROM read_parquet($files) WHERE ($source = '' OR source = $source) AND ($field = '' OR field = $field)"
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
        """Store letters; the same from a repeated import is kept once.

        Raises:
            MovedOnError: another process has stored some meanwhile, as the lease was lost; none was stored: try again.
        """
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
            version = self._table.append(pa.Table.from_pylist(rows, SCHEMA), expected_version=self._index.version)
            self._index.add([row["letter_id"] for row in rows], version)

    def read(self) -> list[dict[str, Any]]:
        """Every letter in clear, oldest first: ``letter_id, received_at, source, field, reason, raw``."""
        table = self._table.read()
        rows: list[dict[str, Any]] = [] if table is None else table.to_pylist()
        for row in rows:
            row |= msgspec.json.decode(self._vault.decrypt(row.pop("token")))
        return sorted(rows, key=lambda row: (row["received_at"], row["letter_id"]))

    def tallies(self) -> list[Tally]:
        """How many letters there are of each source and field, the most frequent first; what they say is not read."""
        query = "SELECT source, field, count(*), max(received_at) FROM read_parquet($files) GROUP BY 1, 2 ORDER BY 3 DESC, 1, 2"
        return [Tally(*row) for row in self._query(query)]

    def newest(self, source: str = "", field: str = "", limit: int = 50, offset: int = 0) -> list[dict[str, Any]]:
        """Some letters in clear as ``read`` gives them, newest first: of one source, or with one field at fault, where they are named."""
        query = f"SELECT letter_id, received_at {_CHOSEN} ORDER BY received_at DESC, letter_id LIMIT $limit OFFSET $offset"
        return self._opened(self._query(query, source=source, field=field, limit=limit, offset=offset))

    def letter(self, letter_id: str) -> dict[str, Any] | None:
        """One letter in clear, as ``read`` gives it; None if there is none of that id."""
        query = "SELECT letter_id, received_at FROM read_parquet($files) WHERE letter_id = $letter"
        found = self._opened(self._query(query, letter=letter_id))
        return found[0] if found else None

    def _opened(self, chosen: Sequence[tuple[Any, ...]]) -> list[dict[str, Any]]:
        """Letters by id and receipt: the encrypted column is read where they lie, and nowhere else."""
        if not chosen:
            return []
        moments = [at for _, at in chosen]
        query = """SELECT letter_id, received_at, source, field, token FROM read_parquet($files)
                   WHERE received_at BETWEEN $first AND $last AND list_contains($letters, letter_id)"""
        rows = self._query(query, first=min(moments), last=max(moments), letters=[letter_id for letter_id, _ in chosen])
        found = {}
        for letter_id, received_at, source, field, token in rows:
            said = msgspec.json.decode(self._vault.decrypt(bytes(token)))
            found[letter_id] = {"letter_id": letter_id, "received_at": received_at, "source": source, "field": field, **said}
        return [found[letter_id] for letter_id, _ in chosen if letter_id in found]

    def _query(self, query: str, **values: Any) -> list[tuple[Any, ...]]:
        files = self._table.files()
        if not files:
            return []
        with contextlib.closing(duckdb.connect()) as connection:
            connection.execute("SET TimeZone='UTC'")
            rows: list[tuple[Any, ...]] = connection.execute(query, {"files": files, **values}).fetchall()
        return rows

    def forget(self, letter_ids: Sequence[str]) -> int:
        """Delete letters: what was replayed, or belonged to a person who is erased; returns how many there were."""
        self._index.catch_up()
        gone = self._table.erase("letter_id", letter_ids, expected_version=self._index.version)
        self._index.forget(letter_ids, gone.version)
        return gone.rows

    def maintain(self, kept_seconds: float) -> None:
        """Keep the table in few files, and within its bound."""
        self._table.keep_newest("received_at", MOST_BYTES)
        self._table.maintain(kept_seconds)

    def _sealed(self, letter: DeadLetter) -> bytes:
        return self._vault.encrypt(msgspec.json.encode({"reason": letter.reason, "raw": letter.raw}))
