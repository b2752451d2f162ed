"""How identifiers came to whom they belong to: the steps of the identifiers table, looked up by identifier and by customer."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar, NamedTuple

from features.people.identity_graph import Step
from features.state.clock import microseconds
from features.state.table_index import TableIndex

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class NumberedStep(NamedTuple):
    """A step and its place in the table."""

    seq: int
    step: Step


class StepIndex(TableIndex[NumberedStep]):
    """The index of one home's identifiers table."""

    format: ClassVar[int] = 2
    statements: ClassVar[Mapping[str, str]] = {
        "steps": """CREATE TABLE steps (
            seq INTEGER PRIMARY KEY, identity_key TEXT NOT NULL, customer_id TEXT, known_at INTEGER NOT NULL, event_id TEXT, cause TEXT,
            through TEXT
        );
        CREATE INDEX by_key ON steps (identity_key);
        CREATE INDEX by_customer ON steps (customer_id);
        CREATE INDEX by_through ON steps (through)""",
    }

    def about(self, keys: Collection[str], customers: Collection[str]) -> list[Step]:
        """The steps of these identifiers and of these customers, in the order in which they were written."""
        with self._lock:
            rows = {row[0]: row for row in self._select("SELECT * FROM steps WHERE identity_key IN ({})", sorted(keys))}
            rows.update({row[0]: row for row in self._select("SELECT * FROM steps WHERE customer_id IN ({})", sorted(customers))})
        return [Step(key, who, _EPOCH + timedelta(microseconds=at), *rest) for _, (_, key, who, at, *rest) in sorted(rows.items())]

    def forget(self, keys: Collection[str], customers: Collection[str], event_ids: Sequence[str], version: int) -> None:
        """Let go of what is told of these identifiers, customers and events; *version* is the table without it.

        Hold the lock of the log.
        """
        with self.changing(version):
            list(self._select("UPDATE steps SET event_id = NULL WHERE event_id IN ({}) RETURNING seq", event_ids))
            self._db.executemany("DELETE FROM steps WHERE identity_key = ?", [(key,) for key in keys])
            self._db.executemany("DELETE FROM steps WHERE customer_id = ?", [(customer,) for customer in customers])
            self._db.executemany("UPDATE steps SET through = NULL WHERE through = ?", [(key,) for key in keys])
        self.scrub()

    def _insert(self, rows: Sequence[NumberedStep]) -> None:
        columns = [(seq, s.identity_key, s.customer_id, microseconds(s.known_at), s.event_id, s.cause, s.through) for seq, s in rows]
        self._db.executemany("INSERT OR IGNORE INTO steps VALUES (?, ?, ?, ?, ?, ?, ?)", columns)

    @staticmethod
    def _from_row(row: Mapping[str, Any]) -> NumberedStep:
        values = [row[name] for name in Step._fields]
        return NumberedStep(row["seq"], Step._make(values)._replace(known_at=row["known_at"].astimezone(UTC)))
