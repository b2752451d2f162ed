"""The contact ledger: what was decided to go out and is not known to have gone yet, so that two callers at once break no cap."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import OperationalError

from features.state.clock import microseconds
from features.state.ports import DatabaseSession, State
from features.state.sql import BIG, put, run_many
from serving.decide.contact import Contacted

RESERVATIONS = sa.Table(
    "reservations",
    sa.MetaData(),
    sa.Column("decision_id", sa.Text, primary_key=True),
    sa.Column("offer_id", sa.Text, primary_key=True),
    sa.Column("customer_id", sa.Text, nullable=False),
    sa.Column("at", BIG, nullable=False),
    sa.Column("channel", sa.Text, nullable=False),
    sa.Column("expires_at", BIG, nullable=False),
    sa.Index("reservations_of", "customer_id"),
    sa.Index("reservations_until", "expires_at"),
)
WAIT_SECONDS = 2.0
"""How long a decision waits for whoever writes: the answers behind it wait too."""
TIDIED_AT_ONCE = 200
"""How many of those that have expired are let go of with each promise: a batch leaves many at once."""
_R = RESERVATIONS.c
# made once: to make a statement costs more than to run it
_THEIRS = _R.customer_id.in_(sa.bindparam("ids", expanding=True))
_STANDING = sa.select(_R.at, _R.channel, _R.offer_id, _R.decision_id).where(_THEIRS, _R.expires_at > sa.bindparam("now"))
_SOME_EXPIRED = sa.select(_R.decision_id).where(_R.expires_at <= sa.bindparam("now")).limit(TIDIED_AT_ONCE)
_EXPIRED = sa.delete(RESERVATIONS).where(_R.decision_id.in_(_SOME_EXPIRED.scalar_subquery()))
_SAME = sa.delete(RESERVATIONS).where(_R.decision_id == sa.bindparam("decision"))
_ALL, _ERASE = sa.select(RESERVATIONS).where(_THEIRS), sa.delete(RESERVATIONS).where(_THEIRS)
_PROMISE = put(RESERVATIONS)


class Ledger:
    """Reservations by customer. Each counts until it expires; once its message is sent, the message counts in its place.

    Exact among threads and processes: a reservation is checked and written in one transaction, which no other can come into.
    """

    def __init__(self, state: State) -> None:
        self._database = state.database("reservations", RESERVATIONS)
        self._opening = threading.Lock()
        self._session: DatabaseSession | None = None

    def reserve(
        self,
        customer_ids: Sequence[str],
        decision_id: str,
        channel: str,
        offer_ids: Sequence[str],
        now: datetime,
        kept: timedelta,
        allows: Callable[[Sequence[Contacted]], bool],
    ) -> bool:
        """Promise a message, if *allows* says so of all that is promised already; returns whether it was.

        Args:
            customer_ids: the customer's id, and those that were merged into it.
            offer_ids: what it offers; none is a message without an offer.
            kept: after how long the promise is no more.
        """
        at, until = microseconds(now), microseconds(now + kept)
        with self._opened().writing() as connection:
            connection.execute(_EXPIRED, {"now": at})
            rows = connection.execute(_STANDING, {"ids": list(customer_ids), "now": at}).fetchall()
            # whoever asks for one decision again, such as a batch that is run anew, takes its own place
            others = [_contact(*row) for row in rows if row[3] != decision_id]
            if not allows(others):
                return False
            if len(others) < len(rows):
                # its own, which may have other offers now
                connection.execute(_SAME, {"decision": decision_id})
            promise = [(decision_id, offer, customer_ids[0], at, channel, until) for offer in offer_ids or [""]]
            run_many(connection, _PROMISE, promise)
        return True

    def promised(self, customer_ids: Sequence[str], now: datetime, but: str = "") -> list[Contacted]:
        """What is promised to the customer and has not expired, *but* what one decision promised."""
        if not self._database.exists:
            return []
        rows = self._opened().read(_STANDING, {"ids": list(customer_ids), "now": microseconds(now)})
        return [_contact(*row) for row in rows if row[3] != but]

    def find(self, customer_ids: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Everything kept of a customer."""
        if self._database.exists:
            rows = self._opened().read(_ALL, {"ids": list(customer_ids)})
            yield from (dict(row._mapping) for row in rows)

    def erase(self, customer_ids: Sequence[str]) -> int:
        """Let go of everything about a customer, leaving no trace in the file; returns how many rows."""
        if not self._database.exists:
            return 0
        with self._opened().writing() as connection:
            gone = connection.execute(_ERASE, {"ids": list(customer_ids)}).rowcount
        self._opened().scrub()
        return gone

    def _opened(self) -> DatabaseSession:
        with self._opening:
            until = time.monotonic() + WAIT_SECONDS
            while self._session is None:
                try:
                    self._session = self._database.connect(WAIT_SECONDS)
                except OperationalError:
                    # SQLite does not wait where several make one file at the same moment
                    if time.monotonic() > until:
                        raise
                    time.sleep(0.01)
            return self._session


def _contact(at: int, channel: str, offer_id: str, decision_id: str) -> Contacted:
    return Contacted(datetime.fromtimestamp(at / 1e6, UTC), channel, offer_id, decision_id, decision_id)
