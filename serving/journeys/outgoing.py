"""What is to leave, and what became of it: rows beside the runs, so that a step and its message are one transaction."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from features.state.ports import DatabaseSession
from features.state.sql import BIG, put, run_many

METADATA = sa.MetaData()
OUTBOX = sa.Table(
    "outbox",
    METADATA,
    sa.Column("decision_id", sa.Text, primary_key=True),
    sa.Column("run_id", sa.Text, nullable=False),
    sa.Column("customer_id", sa.Text, nullable=False),
    sa.Column("channel", sa.Text, nullable=False),
    sa.Column("sink", sa.Text, nullable=False),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("created_at", BIG, nullable=False),
    sa.Column("due_at", BIG, nullable=False),
    sa.Column("expires_at", BIG),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("reason", sa.Text),
    sa.Column("attempts", BIG, nullable=False),
    sa.Column("ended_at", BIG),
    sa.Index("outbox_due", "sink", "status", "due_at"),
    sa.Index("outbox_of", "customer_id"),
    sa.Index("outbox_run", "run_id"),
    sa.Index("outbox_ended", "ended_at"),
    sa.Index("outbox_expires", "status", "expires_at"),
)
"""``status`` is ``waiting``; ``sending`` while a receiver has it; ``writing`` while a file is made of it; ``taken`` or
``written`` once it has left; ``sent`` once that is in the log of events; or ``dropped`` or ``failed``, with the ``reason``.
"""
LEFT = ("taken", "written")
CALLED_OFF = "called off: "
_O = OUTBOX.c
_NOW: sa.BindParameter[Any] = sa.bindparam("now")
_SEND = put(OUTBOX).on_conflict_do_nothing()
_CALL_OFF = (
    sa.update(OUTBOX)
    .where(_O.run_id == sa.bindparam("run"), _O.status == "waiting")
    .values(status="dropped", reason=sa.bindparam("why"), ended_at=_NOW)
    .returning(_O.decision_id)
)
# a receiver may have it by now: should it not, it is not tried again
_NO_MORE = sa.update(OUTBOX).where(_O.run_id == sa.bindparam("run"), _O.status == "sending").values(reason=sa.bindparam("why"))
_TO_SEND = (
    sa.select(OUTBOX)
    .where(_O.sink == sa.bindparam("sink"), _O.status.in_(("waiting", "sending")), _O.due_at <= _NOW)
    .order_by(_O.due_at, _O.decision_id)
    .limit(sa.bindparam("most"))
)
_BECOME = (
    sa.update(OUTBOX)
    .where(_O.decision_id == sa.bindparam("decision"), _O.status == sa.bindparam("was"))
    .values(status=sa.bindparam("became"), reason=sa.bindparam("why"), ended_at=sa.bindparam("ended"))
)
_PUT_OFF = (
    sa.update(OUTBOX)
    .where(_O.decision_id == sa.bindparam("decision"), _O.status == "sending")
    .values(status="waiting", reason=sa.bindparam("why"), due_at=sa.bindparam("again"), attempts=_O.attempts + 1)
)
_REASON = sa.select(_O.reason).where(_O.decision_id == sa.bindparam("decision"))
_LEFT = sa.select(OUTBOX).where(_O.status.in_(LEFT)).order_by(_O.created_at).limit(sa.bindparam("most"))
_EXPIRED = sa.select(OUTBOX).where(_O.status == "waiting", _O.expires_at <= _NOW).limit(sa.bindparam("most"))


@dataclass(frozen=True)
class Outgoing:
    """One message that is to leave; moments are microseconds since 1970.

    Attributes:
        expires_at: until when its place under the caps and in a budget is held; None where it holds none.
    """

    decision_id: str
    run_id: str
    customer_id: str
    channel: str
    sink: str
    body: str
    created_at: int
    due_at: int
    expires_at: int | None = None
    status: str = "waiting"
    reason: str | None = None
    attempts: int = 0
    ended_at: int | None = None

    def offer(self) -> dict[str, Any]:
        """What it offers."""
        told: dict[str, Any] = json.loads(self.body)["offer"]
        return told


def send(connection: Connection, messages: Sequence[Outgoing]) -> None:
    """Let messages wait to leave."""
    run_many(connection, _SEND, [tuple(vars(message).values()) for message in messages])


def call_off(connection: Connection, run_id: str, why: str, now: int) -> list[str]:
    """Drop what waits of a run; returns the decisions of what had not begun to leave."""
    told = {"run": run_id, "why": CALLED_OFF + why}
    connection.execute(_NO_MORE, told)
    return [decision for (decision,) in connection.execute(_CALL_OFF, {**told, "now": now}).fetchall()]


class Outgoings:
    """What waits and what has left, of one home. Each method is one transaction."""

    def __init__(self, session: DatabaseSession) -> None:
        self._session = session

    def to_send(self, sink: str, now: int, most: int) -> list[Outgoing]:
        """The messages that are to leave by a sink now; one that a kill left on its way is among them."""
        return [Outgoing(**row._mapping) for row in self._session.read(_TO_SEND, {"sink": sink, "now": now, "most": most})]

    def become(self, message: Outgoing, status: str, was: str, reason: str | None = None, ended: int | None = None) -> bool:
        """Note what became of a message that *was* so; returns whether it still was."""
        told = {"decision": message.decision_id, "was": was, "became": status, "why": reason, "ended": ended}
        with self._session.writing() as connection:
            return connection.execute(_BECOME, told).rowcount == 1

    def claim(self, message: Outgoing) -> bool:
        """Take a message out of reach of whatever would call it off; returns whether it was still there."""
        return message.status == "sending" or self.become(message, "sending", "waiting", message.reason)

    def put_off(self, message: Outgoing, why: str, again: int, now: int) -> bool:
        """Let a message that did not get through wait until *again*; returns False where it was called off meanwhile, and is dropped."""
        with self._session.writing() as connection:
            reason = connection.execute(_REASON, {"decision": message.decision_id}).scalar()
            if reason is not None and str(reason).startswith(CALLED_OFF):
                told = {"decision": message.decision_id, "was": "sending", "became": "dropped", "why": reason, "ended": now}
                connection.execute(_BECOME, told)
                return False
            connection.execute(_PUT_OFF, {"decision": message.decision_id, "why": why, "again": again})
            return True

    def holds(self, decision_id: str) -> bool:
        """Whether that decision's message was ever to leave."""
        return bool(self._session.read(_REASON, {"decision": decision_id}))

    def left(self, most: int) -> list[Outgoing]:
        """What has left and is not in the log of events yet."""
        return [Outgoing(**row._mapping) for row in self._session.read(_LEFT, {"most": most})]

    def expired(self, now: int, most: int) -> list[Outgoing]:
        """What waits though its place is held no longer."""
        return [Outgoing(**row._mapping) for row in self._session.read(_EXPIRED, {"now": now, "most": most})]

    def of_sink(self, sink: str, statuses: Sequence[str]) -> list[Outgoing]:
        """The messages for a sink, by when they were decided."""
        query = sa.select(OUTBOX).where(_O.sink == sink, _O.status.in_(statuses)).order_by(_O.created_at, _O.decision_id)
        return [Outgoing(**row._mapping) for row in self._session.read(query)]

    def counts(self) -> list[tuple[str, str, int]]:
        """By sink and status how many messages there are."""
        query = sa.select(_O.sink, _O.status, sa.func.count()).group_by(_O.sink, _O.status).order_by(_O.sink, _O.status)
        return [(str(sink), str(status), int(number)) for sink, status, number in self._session.read(query)]
