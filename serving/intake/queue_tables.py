"""The tables of the queue, and what their rows say."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime

import sqlalchemy as sa

from features.state.clock import moment_of
from features.state.ports import AnyRow, Database, DatabaseSession, State
from features.state.sql import BIG, put, run_many
from serving.intake.event_queue import Accepted, Progress

_META = sa.MetaData()
WAITING = sa.Table(
    "waiting",
    _META,
    sa.Column("seq", BIG, primary_key=True, autoincrement=False),
    sa.Column("received_at", BIG, nullable=False),
    sa.Column("event_id", sa.Text, nullable=False),
    sa.Column("content_hash", sa.Text, nullable=False),
    sa.Column("payload", sa.LargeBinary, nullable=False),
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("personal", sa.LargeBinary),
)
REFUSED = sa.Table(
    "refused",
    _META,
    sa.Column("seq", BIG, primary_key=True, autoincrement=False),
    sa.Column("received_at", BIG, nullable=False),
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("token", sa.LargeBinary, nullable=False),
)
TURN = sa.Table(
    "turn",
    _META,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("seq", BIG, nullable=False),
    sa.Column("received_at", BIG),
    sa.Column("moved", BIG, nullable=False),
    sa.Column("moved_until", BIG),
)
"""One row: how far the queue is."""
TO_COMPUTE = sa.Table(
    "to_compute", _META, sa.Column("customer_id", sa.Text, primary_key=True), sa.Column("until", BIG, nullable=False),
    sqlite_with_rowid=False,
)  # fmt: skip
"""The customers whose windowed features do not know what the log holds, and before when all of that was received."""
TABLES = (WAITING, REFUSED, TURN, TO_COMPUTE)
STANDING = sa.select(TURN.c.seq, TURN.c.received_at, TURN.c.moved, TURN.c.moved_until)
BEGIN = put(TURN).on_conflict_do_nothing()


def opened(state: State) -> Database:
    """The database of an installation's queue."""
    database = state.database("inbox", *TABLES)
    if not state.settings.database:
        _bring_up_to_date(database)
    return database


def letter_of(row: AnyRow) -> Accepted:
    """An event as it waits."""
    seq, at, event_id, content_hash, payload, source, personal = row
    return Accepted(event_id, content_hash, moment_of(at), payload, source, personal, seq)


def standing_of(rows: Sequence[AnyRow]) -> Progress:
    """How far the queue is."""
    [(last, received_at, moved, until)] = rows
    return Progress(last, None if received_at is None else moment_of(received_at), moved, None if until is None else moment_of(until))


def received_last(session: DatabaseSession) -> datetime | None:
    """The latest receipt of what waits, or None."""
    found = [session.read(sa.select(sa.func.max(each.c.received_at))) for each in (WAITING, REFUSED)]
    latest = max((at for [(at,)] in found if at is not None), default=None)
    return None if latest is None else moment_of(latest)


def _bring_up_to_date(database: Database) -> None:
    """An inbox of before had the receipt for a place: what waits in it keeps its order."""
    with database.begin() as connection:
        if "seq" in {column["name"] for column in sa.inspect(connection).get_columns("waiting")}:
            return
        place = 0
        for table in (WAITING, REFUSED):
            names = [column.name for column in table.columns if column.name != "seq"]
            old = sa.table(table.name, *(sa.column(name) for name in names))
            rows = connection.execute(sa.select(*(old.c[name] for name in names)).order_by(old.c.received_at)).fetchall()
            table.drop(connection)
            table.create(connection)
            run_many(connection, sa.insert(table), [(place + k, *row) for k, row in enumerate(rows, 1)])
            place += len(rows)
        with suppress(ValueError):
            latest = max(at for each in (WAITING, REFUSED) for (at,) in connection.execute(sa.select(each.c.received_at)))
            run_many(connection, BEGIN, [(0, place, latest, 0, None)])
