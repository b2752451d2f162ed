"""The contact ledger: what was decided to go out and is not known to have gone yet, so that two callers at once break no cap."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa

from features.state.clock import microseconds
from features.state.ports import State
from features.state.sql import BIG, put
from serving.decide.contact import Contact

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
)
_R = RESERVATIONS.c


class Ledger:
    """Reservations by customer. Each counts until it expires; once its message is sent, the message counts in its place.

    Exact among threads and processes: a reservation is checked and written in one transaction, which no other can come into.
    """

    def __init__(self, state: State) -> None:
        self._database = state.database("reservations", RESERVATIONS)

    def reserve(
        self,
        customer_ids: Sequence[str],
        decision_id: str,
        channel: str,
        offer_ids: Sequence[str],
        now: datetime,
        kept: timedelta,
        allows: Callable[[Sequence[Contact]], bool],
    ) -> bool:
        """Promise a message, if *allows* says so of all that is promised already; returns whether it was.

        Args:
            customer_ids: the customer's id, and those that were merged into it.
            offer_ids: what it offers; none is a message without an offer.
            kept: after how long the promise is no more.
        """
        with self._database.begin() as connection:
            connection.execute(sa.delete(RESERVATIONS).where(_R.expires_at <= microseconds(now)))
            rows = connection.execute(self._of(customer_ids, now)).fetchall()
            # whoever asks for one decision again, such as a batch that is run anew, takes its own place
            if not allows([_contact(*row) for row in rows if row[3] != decision_id]):
                return False
            connection.execute(sa.delete(RESERVATIONS).where(_R.decision_id == decision_id))
            row = {
                "decision_id": decision_id, "customer_id": customer_ids[0], "at": microseconds(now), "channel": channel,
                "expires_at": microseconds(now + kept),
            }  # fmt: skip
            connection.execute(put(RESERVATIONS), [{**row, "offer_id": offer} for offer in offer_ids or [""]])
        return True

    def promised(self, customer_ids: Sequence[str], now: datetime, but: str = "") -> list[Contact]:
        """What is promised to the customer and has not expired, *but* what one decision promised."""
        if not self._database.exists:
            return []
        with contextlib.closing(self._database.connect()) as session:
            return [_contact(*row) for row in session.read(self._of(customer_ids, now)) if row[3] != but]

    def find(self, customer_ids: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Everything kept of a customer."""
        if self._database.exists:
            with contextlib.closing(self._database.connect()) as session:
                yield from (dict(row._mapping) for row in session.read(sa.select(RESERVATIONS).where(_R.customer_id.in_(customer_ids))))

    def erase(self, customer_ids: Sequence[str]) -> int:
        """Let go of everything about a customer, leaving no trace in the file; returns how many rows."""
        if not self._database.exists:
            return 0
        with contextlib.closing(self._database.connect()) as session:
            with session.writing() as connection:
                gone = connection.execute(sa.delete(RESERVATIONS).where(_R.customer_id.in_(customer_ids))).rowcount
            session.scrub()
        return gone

    @staticmethod
    def _of(customer_ids: Sequence[str], now: datetime) -> sa.Select[Any]:
        standing = _R.customer_id.in_(customer_ids), _R.expires_at > microseconds(now)
        return sa.select(_R.at, _R.channel, _R.offer_id, _R.decision_id).where(*standing)


def _contact(at: int, channel: str, offer_id: str, decision_id: str) -> Contact:
    return Contact(datetime.fromtimestamp(at / 1e6, UTC), channel, offer_id, decision_id)
