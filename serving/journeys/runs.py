"""Who is where in which journey, until when they wait, and what is to leave: in one database, so that a step and its message are one."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from features.state.ports import State
from features.state.sql import BIG, put, run_many
from serving.journeys.outgoing import METADATA, OUTBOX, Outgoing, Outgoings, call_off, send

RUNS = sa.Table(
    "runs",
    METADATA,
    sa.Column("run_id", sa.Text, primary_key=True),
    sa.Column("journey", sa.Text, nullable=False),
    sa.Column("plan", sa.Text, nullable=False),
    sa.Column("customer_id", sa.Text, nullable=False),
    sa.Column("position", BIG, nullable=False),
    sa.Column("due_at", BIG),
    sa.Column("since", BIG, nullable=False),
    sa.Column("started_at", BIG, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("revision", BIG, nullable=False),
    sa.Column("outcome", sa.Text),
    sa.Index("runs_due", "due_at", "run_id"),
    sa.Index("runs_since", "since"),
    sa.Index("runs_of", "customer_id"),
    sa.Index("runs_plan", "plan"),
)
SEEN = sa.Table(
    "seen", METADATA, sa.Column("event", sa.Text, primary_key=True), sa.Column("at", BIG, nullable=False), sa.Index("seen_at", "at")
)
"""The events that started a journey, so that none does so twice: by a hash, so that an erased event leaves nothing to be compared."""
PLANS = sa.Table("plans", METADATA, sa.Column("digest", sa.Text, primary_key=True), sa.Column("text", sa.Text, nullable=False))
"""The journeys as they stood when runs of them began."""
DAYS = sa.Table("days", METADATA, sa.Column("journey", sa.Text, primary_key=True), sa.Column("day", sa.Text, nullable=False))
"""The last day on which each daily journey was looked at to the end."""
DAY = 86_400_000_000
TIDIED_AT_ONCE = 2_000
KEPT_DAYS = 40
"""For how long is known what started a journey, and what has ended."""
_R = RUNS.c
_IDS: sa.BindParameter[Any] = sa.bindparam("ids", expanding=True)
_NOW: sa.BindParameter[Any] = sa.bindparam("now")
_DUE = sa.select(RUNS).where(_R.due_at <= _NOW).order_by(_R.due_at, _R.run_id).limit(sa.bindparam("most"))
_ACTIVE = sa.select(RUNS).where(_R.customer_id.in_(_IDS), _R.due_at.is_not(None))
_LATEST = sa.select(sa.func.max(_R.started_at)).where(_R.customer_id.in_(_IDS), _R.journey == sa.bindparam("journey"))
_START = put(RUNS).on_conflict_do_nothing()
_SEE = put(SEEN).on_conflict_do_nothing()
_MOVE = (
    sa.update(RUNS)
    .where(_R.run_id == sa.bindparam("run"), _R.revision == sa.bindparam("known"))
    .values(
        customer_id=sa.bindparam("who"), position=sa.bindparam("to"), due_at=sa.bindparam("until"), since=sa.bindparam("from"),
        state=sa.bindparam("told"), outcome=sa.bindparam("came"), revision=_R.revision + 1,
    )
)  # fmt: skip
_END_DAY = put(DAYS)
# one that has lost its turn, and ends a day late, takes no later day back
_END_DAY = _END_DAY.on_conflict_do_update(
    index_elements=[DAYS.c.journey], set_={"day": _END_DAY.excluded.day}, where=_END_DAY.excluded.day > DAYS.c.day
)
_PLAN = put(PLANS).on_conflict_do_nothing()


@dataclass(frozen=True)
class Run:
    """One customer in one journey; moments are microseconds since 1970.

    Attributes:
        position: which operation is next.
        due_at: when it is done; None once the journey has ended.
        since: when the step at hand was begun.
        state: what conditions may know: the event that started it, messages, what was answered.
        outcome: how it ended.
    """

    run_id: str
    journey: str
    plan: str
    customer_id: str
    position: int
    due_at: int | None
    since: int
    started_at: int
    state: dict[str, Any] = field(default_factory=dict)
    revision: int = 0
    outcome: str | None = None


class Changes:
    """One transaction on the runs: nobody else moves any meanwhile."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def active(self, customer_ids: Sequence[str]) -> list[Run]:
        """The runs of these customers that have not ended."""
        return [_run(row) for row in self._connection.execute(_ACTIVE, {"ids": list(customer_ids)}).fetchall()]

    def started_last(self, customer_ids: Sequence[str], journey: str) -> int | None:
        """When a customer last began a journey."""
        at = self._connection.execute(_LATEST, {"ids": list(customer_ids), "journey": journey}).scalar()
        return None if at is None else int(at)

    def begin(self, run: Run, plan_text: str, event: str) -> bool:
        """Begin a run, unless its *event* has begun one before; returns whether it did."""
        if not self.see(event, run.started_at):
            return False
        run_many(self._connection, _PLAN, [(run.plan, plan_text)])
        return self._connection.execute(_START, _row(run)).rowcount == 1

    def see(self, event: str, at: int) -> bool:
        """Note that an event did what it does; returns whether it had not before."""
        name = hashlib.blake2b(event.encode(), digest_size=16).hexdigest()
        return self._connection.execute(_SEE, {"event": name, "at": at}).rowcount == 1

    def move(self, run: Run, messages: Sequence[Outgoing] = (), calls_off: str | None = None, now: int = 0) -> list[str] | None:
        """Put *run*, as it was read but for where it goes, in its new place, with what that sends; None where something else moved it.

        Returns the decisions whose messages it called off, where *calls_off* says why.
        """
        where = {"run": run.run_id, "known": run.revision, "who": run.customer_id, "to": run.position, "until": run.due_at}
        told = {"from": run.since, "told": json.dumps(run.state), "came": run.outcome}
        if self._connection.execute(_MOVE, {**where, **told}).rowcount != 1:
            return None
        send(self._connection, messages)
        return [] if calls_off is None else call_off(self._connection, run.run_id, calls_off, now)


class Runs:
    """The runs and the outbox of one home."""

    def __init__(self, state: State) -> None:
        self._database = state.database("journeys", RUNS, SEEN, PLANS, OUTBOX, DAYS)
        self._session = self._database.connect()
        self.outgoing = Outgoings(self._session)
        """What waits to leave, and what has left."""

    @contextlib.contextmanager
    def changing(self) -> Iterator[Changes]:
        """One transaction; it is on the disk at its end, or undone where it raises."""
        with self._session.writing() as connection:
            yield Changes(connection)

    def move(self, run: Run, messages: Sequence[Outgoing] = ()) -> bool:
        """``Changes.move`` in a transaction of its own; returns whether it was moved."""
        with self.changing() as change:
            return change.move(run, messages) is not None

    def active(self, customer_ids: Sequence[str]) -> list[Run]:
        """The runs of these customers that have not ended."""
        return [_run(row) for row in self._session.read(_ACTIVE, {"ids": list(customer_ids)})]

    def due(self, now: int, most: int) -> list[Run]:
        """The runs whose next step is due, the longest overdue first."""
        return [_run(row) for row in self._session.read(_DUE, {"now": now, "most": most})]

    def plan_text(self, digest: str) -> str | None:
        """A journey as it stood when a run of it began."""
        rows = self._session.read(sa.select(PLANS.c.text).where(PLANS.c.digest == digest))
        return str(rows[0][0]) if rows else None

    def counts(self) -> list[tuple[str, str, int]]:
        """By journey and state (``waiting``, or how it ended) how many runs there are."""
        state = sa.func.coalesce(_R.outcome, "waiting")
        query = sa.select(_R.journey, state, sa.func.count()).group_by(_R.journey, state).order_by(_R.journey, state)
        return [(str(j), str(s), int(n)) for j, s, n in self._session.read(query)]

    def standing(self) -> list[tuple[str, str, int, int, int]]:
        """By journey, form of it (``plan``) and position how many customers stand there, and how many of these have yet to begin."""
        begins = sa.func.sum(sa.case((_R.state.like('%"begins": true%'), 1), else_=0))
        query = sa.select(_R.journey, _R.plan, _R.position, sa.func.count(), begins).where(_R.due_at.is_not(None))
        rows = self._session.read(query.group_by(_R.journey, _R.plan, _R.position))
        return [(str(j), str(p), int(at), int(n), int(b)) for j, p, at, n, b in rows]

    def messages(self) -> list[tuple[str, str, int]]:
        """By journey and status how many messages its runs have brought about."""
        query = sa.select(_R.journey, OUTBOX.c.status, sa.func.count()).join_from(OUTBOX, RUNS, OUTBOX.c.run_id == _R.run_id)
        rows = self._session.read(query.group_by(_R.journey, OUTBOX.c.status))
        return [(str(j), str(s), int(n)) for j, s, n in rows]

    def last_day(self, journey: str) -> str | None:
        """The last day on which a daily journey was looked at to the end."""
        rows = self._session.read(sa.select(DAYS.c.day).where(DAYS.c.journey == journey))
        return str(rows[0][0]) if rows else None

    def end_day(self, journey: str, day: str) -> None:
        """A daily journey was looked at for everybody."""
        with self._session.writing() as connection:
            run_many(connection, _END_DAY, [(journey, day)])

    def tidy(self, now: int, kept: int) -> None:
        """Let go of what ended longer than *kept* ago: what has begun a journey, what was sent, and plans that nobody is in."""
        before, some = now - kept, sa.select(_R.run_id).where(_R.since < now - kept, _R.due_at.is_(None)).limit(TIDIED_AT_ONCE)
        if not self._session.read(some.limit(1)) and not self._session.read(sa.select(SEEN.c.event).where(SEEN.c.at < before).limit(1)):
            return
        with self._session.writing() as connection:
            few = sa.select(SEEN.c.event).where(SEEN.c.at < before).limit(TIDIED_AT_ONCE)
            connection.execute(sa.delete(SEEN).where(SEEN.c.event.in_(few.scalar_subquery())))
            connection.execute(sa.delete(RUNS).where(_R.run_id.in_(some.scalar_subquery())))
            old = sa.select(OUTBOX.c.decision_id).where(OUTBOX.c.ended_at < before).limit(TIDIED_AT_ONCE)
            connection.execute(sa.delete(OUTBOX).where(OUTBOX.c.decision_id.in_(old.scalar_subquery())))
            connection.execute(sa.delete(PLANS).where(~sa.exists().where(_R.plan == PLANS.c.digest)))

    def find(self, customer_ids: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Everything kept of a customer."""
        for table in (RUNS, OUTBOX):
            rows = self._session.read(sa.select(table).where(table.c.customer_id.in_(_IDS)), {"ids": list(customer_ids)})
            yield from (dict(row._mapping) for row in rows)

    def erase(self, customer_ids: Sequence[str]) -> int:
        """Let go of everything about a customer, leaving no trace in the file; returns how many rows."""
        with self._session.writing() as connection:
            told = {"ids": list(customer_ids)}
            gone = sum(connection.execute(sa.delete(table).where(table.c.customer_id.in_(_IDS)), told).rowcount for table in (RUNS, OUTBOX))
        self._session.scrub()
        return int(gone)

    def close(self) -> None:
        """Let go of the file."""
        self._session.close()


def run_id_of(journey: str, customer_id: str, start: str) -> str:
    """The name of a run: one a journey, a customer and what started it."""
    return hashlib.blake2b(f"{journey}\0{customer_id}\0{start}".encode(), digest_size=16).hexdigest()


def decision_id_of(run: Run, again: int) -> str:
    """The name of the decision of a run's step: the same however often the step is begun, so that a broken one takes its own place."""
    return hashlib.blake2b(f"{run.run_id}\0{run.position}\0{run.since}\0{again}".encode(), digest_size=16).hexdigest()


def _row(run: Run) -> dict[str, Any]:
    return {**vars(run), "state": json.dumps(run.state)}


def _run(row: Any) -> Run:
    told = Run(**row._mapping)
    return replace(told, state=json.loads(row.state))
