"""How identifiers came to whom they belong to: the steps of the identifiers table, looked up by identifier and by customer."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import UTC
from typing import Any, ClassVar, NamedTuple

import sqlalchemy as sa
from sqlalchemy import Connection

from features.people.identity_state import Step
from features.state.clock import microseconds, moment_of
from features.state.sql import BIG, put, run_many
from features.state.table_index import TableIndex


class NumberedStep(NamedTuple):
    """A step and its place in the table."""

    seq: int
    step: Step


_STEPS = sa.Table(
    "steps",
    sa.MetaData(),
    sa.Column("seq", BIG, primary_key=True),
    sa.Column("identity_key", sa.Text, nullable=False),
    sa.Column("customer_id", sa.Text),
    sa.Column("known_at", BIG, nullable=False),
    sa.Column("event_id", sa.Text),
    sa.Column("cause", sa.Text),
    sa.Column("through", sa.Text),
    sa.Index("by_key", "identity_key"),
    sa.Index("by_customer", "customer_id"),
    sa.Index("by_through", "through"),
)
_OF_KEYS, _OF_CUSTOMERS = (
    sa.select(_STEPS).where(column.in_(sa.bindparam("values", expanding=True))) for column in (_STEPS.c.identity_key, _STEPS.c.customer_id)
)
_FORGET_KEY, _FORGET_CUSTOMER = (
    sa.delete(_STEPS).where(column == sa.bindparam("value")) for column in (_STEPS.c.identity_key, _STEPS.c.customer_id)
)
_PUT = put(_STEPS).on_conflict_do_nothing()


class StepIndex(TableIndex[NumberedStep]):
    """The index of one home's identifiers table."""

    format: ClassVar[int] = 2
    sql: ClassVar[tuple[sa.Table, ...]] = (_STEPS,)

    def about(self, keys: Collection[str], customers: Collection[str]) -> list[Step]:
        """The steps of these identifiers and of these customers, in the order in which they were written."""
        with self._lock:
            rows = {row[0]: row for row in self._chunked(_OF_KEYS, sorted(keys))}
            rows.update({row[0]: row for row in self._chunked(_OF_CUSTOMERS, sorted(customers))})
        return [Step(key, who, moment_of(at), *rest) for _, (_, key, who, at, *rest) in sorted(rows.items())]

    def forget(self, keys: Collection[str], customers: Collection[str], event_ids: Sequence[str], version: int) -> None:
        """Let go of what is told of these identifiers, customers and events; *version* is the table without them.

        Hold the lease of the log.
        """
        columns = _STEPS.c
        with self.changing(version) as connection:
            run_many(connection, _FORGET_KEY, [(key,) for key in keys])
            run_many(connection, _FORGET_CUSTOMER, [(customer,) for customer in customers])
            for column, values in ((columns.event_id, event_ids), (columns.through, keys)):
                # no index finds an event: some hundreds of them in one go through the table
                blanked = sa.update(_STEPS).values({column: sa.null()}).where(column.in_(sa.bindparam("values", expanding=True)))
                list(self._chunked(blanked.returning(columns.seq), list(values), connection))
        self.scrub()

    def _insert(self, connection: Connection, rows: Sequence[NumberedStep]) -> None:
        columns = [(seq, s.identity_key, s.customer_id, microseconds(s.known_at), s.event_id, s.cause, s.through) for seq, s in rows]
        run_many(connection, _PUT, columns)

    @staticmethod
    def _from_row(row: Mapping[str, Any]) -> NumberedStep:
        values = [row[name] for name in Step._fields]
        return NumberedStep(row["seq"], Step._make(values)._replace(known_at=row["known_at"].astimezone(UTC)))
