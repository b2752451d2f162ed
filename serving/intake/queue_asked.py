"""What commands ask of the queue of an installation, whether or not a service runs on it."""

from __future__ import annotations

import time
from contextlib import closing
from datetime import datetime

import sqlalchemy as sa

from features.state.clock import Clock, microseconds
from features.state.ports import MissingStateError, State
from serving.intake.queue_tables import STANDING, TURN, WAITING, opened, received_last, standing_of

MOVED_SECONDS, LOOK_AGAIN_SECONDS = 60.0, 0.1
"""How long a command waits for a service that brings nothing into the log, and how often it looks."""
_SET_BACK = sa.update(TURN).values(received_at=sa.bindparam("at"))


def last_received(state: State) -> datetime | None:
    """The latest receipt of what waits in the inbox of an installation, or None."""
    with closing(opened(state).connect()) as session:
        return received_last(session)


def last_receipt(state: State) -> datetime | None:
    """The last receipt that the queue of an installation has given, whether or not it still waits."""
    with closing(opened(state).connect()) as session:
        rows = session.read(STANDING)
    return standing_of(rows).received_at if rows else None


def wait_until_moved(state: State, patience_seconds: float = MOVED_SECONDS) -> None:
    """Wait until the log and the online rows tell all that was accepted before this was called.

    Whoever reads them afterwards, from a process of its own, misses nothing that was acknowledged: no withdrawal, no purchase.

    Raises:
        MissingStateError: for so long nothing went on.
    """
    with closing(opened(state).connect()) as session:
        if not (rows := session.read(STANDING)):
            return
        until, left, since = standing_of(rows).last, -1, time.monotonic()
        while True:
            [(waiting,)] = session.read(sa.select(sa.func.count()).select_from(WAITING).where(WAITING.c.seq <= until))
            if waiting == 0:
                return
            if waiting != left:
                left, since = int(waiting), time.monotonic()
            elif time.monotonic() - since > patience_seconds:
                raise MissingStateError(
                    f"{left} events that were accepted are not in the log yet, and no service brings them there: start one "
                    "(python -m serving), and repeat this; what they say of consent would be missing"
                )
            time.sleep(LOOK_AGAIN_SECONDS)


def follow_own_clock(state: State, clock: Clock) -> None:
    """Give receipts by *clock* again, though the last was given by one far ahead; only while no other service follows the queue.

    Where several share it, receipts only grow: a clock that was wrong once would stop them all until its time has come.
    """
    database, at = opened(state), microseconds(clock())
    with closing(database.connect()) as session, session.writing() as connection:
        connection.execute(_SET_BACK, {"at": at})
