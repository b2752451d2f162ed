"""The ledger of what goes out: messages that are promised and not known to have gone, and how often each offer was given out, exact among
threads and processes.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection
from sqlalchemy.exc import OperationalError

from features.state.clock import microseconds
from features.state.ports import DatabaseSession, State
from features.state.sql import BIG, put, run_many
from serving.decide.contact import Contacted

_METADATA = sa.MetaData()
RESERVATIONS = sa.Table(
    "reservations",
    _METADATA,
    sa.Column("decision_id", sa.Text, primary_key=True),
    sa.Column("offer_id", sa.Text, primary_key=True),
    sa.Column("customer_id", sa.Text, nullable=False),
    sa.Column("at", BIG, nullable=False),
    sa.Column("channel", sa.Text, nullable=False),
    sa.Column("expires_at", BIG, nullable=False),
    sa.Index("reservations_of", "customer_id"),
    sa.Index("reservations_until", "expires_at"),
)
GIVEN = sa.Table(
    "given",
    _METADATA,
    sa.Column("decision_id", sa.Text, primary_key=True),
    sa.Column("offer_id", sa.Text, primary_key=True),
    sa.Column("expires_at", BIG, nullable=False),
    sa.Index("given_of", "offer_id", "expires_at"),
    sa.Index("given_until", "expires_at"),
)
"""What was given out of offers with a budget; it expires unless it is known to have reached somebody. It names no customer."""
TIMES = sa.Table("times", _METADATA, sa.Column("offer_id", sa.Text, primary_key=True), sa.Column("times", BIG, nullable=False))
"""How many rows of ``given`` each offer has, those that have expired and are still there among them; and how many redemptions."""
REDEEMED = sa.Table(
    "redeemed",
    _METADATA,
    sa.Column("event_id", sa.Text, primary_key=True),
    sa.Column("offer_id", sa.Text, nullable=False),
)
"""The redemptions of offers of which there are so many and no more: by a hash of the event, which names nobody."""
WAIT_SECONDS = 2.0
"""How long a decision waits for whoever writes: the answers behind it wait too."""
TIDIED_AT_ONCE = 200
"""How many of those that have expired are let go of at a time: a batch leaves many at once."""
TIDIED_EVERY_SECONDS = 0.5
FREE_SECONDS = 0.2
"""For how long offers that were all to be had are taken to be so, before a promise looks again."""
FOREVER = 2**62
_R, _G = RESERVATIONS.c, GIVEN.c
# made once: to make a statement costs more than to run it
_THEIRS = _R.customer_id.in_(sa.bindparam("ids", expanding=True))
_STANDING = sa.select(_R.at, _R.channel, _R.offer_id, _R.decision_id).where(_THEIRS, _R.expires_at > sa.bindparam("now"))
# most customers have one id: a list of parameters is put together anew at each use
_STANDING_OF_ONE = sa.select(_R.at, _R.channel, _R.offer_id, _R.decision_id).where(
    _R.customer_id == sa.bindparam("id"), _R.expires_at > sa.bindparam("now")
)
_SOME_EXPIRED = sa.select(_R.decision_id).where(_R.expires_at <= sa.bindparam("now")).limit(TIDIED_AT_ONCE)
_EXPIRED = sa.delete(RESERVATIONS).where(_R.decision_id.in_(_SOME_EXPIRED.scalar_subquery()))
_SAME = sa.delete(RESERVATIONS).where(_R.decision_id == sa.bindparam("decision"))
_ALL, _ERASE = sa.select(RESERVATIONS).where(_THEIRS), sa.delete(RESERVATIONS).where(_THEIRS)
_PROMISE = put(RESERVATIONS)
_OFFERS: sa.BindParameter[Any] = sa.bindparam("offers", expanding=True)
_TIMES = sa.select(TIMES.c.offer_id, TIMES.c.times).where(TIMES.c.offer_id.in_(_OFFERS))
# those that do not count: expired and still there, or the decision's own
_NO_MORE = sa.select(_G.offer_id, -sa.func.count()).where(_G.offer_id.in_(_OFFERS), _G.expires_at <= sa.bindparam("now"))
_OWN = sa.select(_G.offer_id, -sa.func.count()).where(
    _G.decision_id == sa.bindparam("but"), _G.offer_id.in_(_OFFERS), _G.expires_at > sa.bindparam("now")
)
# but those that have expired and are still there, and the decision's own: each by an index
_COUNTED = _TIMES.union_all(_NO_MORE.group_by(_G.offer_id), _OWN.group_by(_G.offer_id))
_GIVE = put(GIVEN)
# its own of before, which may have expired; what has reached somebody stays for good
_LATER = sa.case((_GIVE.excluded.expires_at > _G.expires_at, _GIVE.excluded.expires_at), else_=_G.expires_at)
_GIVE = _GIVE.on_conflict_do_update(index_elements=[_G.decision_id, _G.offer_id], set_={"expires_at": _LATER})
_HELD = sa.select(_G.offer_id).where(_G.decision_id == sa.bindparam("decision"))
_TAKE_BACK = (
    sa.delete(GIVEN)
    .where(_G.decision_id == sa.bindparam("decision"), _G.expires_at < FOREVER, _G.offer_id.not_in(_OFFERS))
    .returning(_G.offer_id)
)
_SOME_UNUSED = sa.select(_G.decision_id).where(_G.expires_at <= sa.bindparam("now")).limit(TIDIED_AT_ONCE)
_UNUSED = (
    sa.delete(GIVEN).where(_G.decision_id.in_(_SOME_UNUSED.scalar_subquery()), _G.expires_at <= sa.bindparam("now")).returning(_G.offer_id)
)
_REACHED = sa.update(GIVEN).where(_G.decision_id.in_(sa.bindparam("decisions", expanding=True))).values(expires_at=FOREVER)
_COUNT = put(TIMES)
_COUNT = _COUNT.on_conflict_do_update(index_elements=[TIMES.c.offer_id], set_={"times": TIMES.c.times + _COUNT.excluded.times})
_REDEEM = put(REDEEMED).on_conflict_do_nothing()


@dataclass(frozen=True)
class Promise:
    """What a decision is about to give out.

    Attributes:
        customer_ids: the customer's id, and those that were merged into it; none of nobody known.
        channel: through which they are contacted; None where nothing is sent.
        offer_ids: what it offers; none is a message without an offer.
        kept: after how long the promise of the message is no more.
        limits: of the offers on it of which there are so many, how often each may be given out.
        held: after how long what is not known to have reached anybody goes back to the others.
        is_limited: whether an earlier answer to the same question may hold something of which there are so many.
    """

    customer_ids: Sequence[str]
    decision_id: str
    channel: str | None
    offer_ids: Sequence[str]
    now: datetime
    kept: timedelta
    limits: Mapping[str, int]
    held: timedelta
    is_limited: bool = False


class Ledger:
    """Reservations by customer, and what is given out of each offer. Each counts until it expires; once its message is sent, the message
    counts in its place.

    Exact among threads and processes: a reservation is checked and written in one transaction, which no other can come into. It outlives
    a kill at once; a power cut may take back what was promised since the last ``sync``.
    """

    def __init__(self, state: State) -> None:
        self._database = state.database("reservations", RESERVATIONS, GIVEN, TIMES, REDEEMED)
        self._opening = threading.Lock()
        self._session: DatabaseSession | None = None
        self._tidied_at = self._free_at = 0.0
        self._gives = False
        self._free: int | None = None
        """Which offers were all to be had when that was last looked at."""

    def reserve(self, promise: Promise, allows: Callable[[Sequence[Contacted]], bool] = lambda standing: True) -> bool:
        """Promise a message, and give out what it offers, if *allows* says so of all that is promised already and the limits leave as
        much; returns whether it was.
        """
        at = microseconds(promise.now)
        self._tidy(at)
        with self._opened().writing() as connection:
            if promise.limits:
                counted = _given(connection.execute, list(promise.limits), at, promise.decision_id)
                if any(counted.get(offer, 0) >= limit for offer, limit in promise.limits.items()):
                    self._free = None
                    return False
            if promise.channel is not None and not self._promise(connection, promise, at, allows):
                return False
            if promise.limits or promise.is_limited:
                self._give(connection, promise)
        return True

    def _tidy(self, now: int) -> None:
        """Let go of some that have expired, now and then."""
        if time.monotonic() - self._tidied_at > TIDIED_EVERY_SECONDS:
            with self._opened().writing() as connection:
                connection.execute(_EXPIRED, {"now": now})
                _count(connection, connection.execute(_UNUSED, {"now": now}).fetchall(), -1)
            self._tidied_at = time.monotonic()

    @staticmethod
    def _give(connection: Connection, promise: Promise) -> None:
        own = {"decision": promise.decision_id}
        # what an earlier answer to the same question held and this one does not
        _count(connection, connection.execute(_TAKE_BACK, {**own, "offers": list(promise.limits)}).fetchall(), -1)
        held = {offer for (offer,) in connection.execute(_HELD, own)}
        until = microseconds(promise.now + promise.held)
        run_many(connection, _GIVE, [(promise.decision_id, offer, until) for offer in promise.limits])
        _count(connection, [(offer,) for offer in promise.limits if offer not in held], 1)

    @staticmethod
    def _promise(connection: Connection, promise: Promise, at: int, allows: Callable[[Sequence[Contacted]], bool]) -> bool:
        rows = _standing(connection.execute, promise.customer_ids, at)
        # whoever asks for one decision again, such as a batch that is run anew, takes its own place
        others = [_contact(*row) for row in rows if row[3] != promise.decision_id]
        if not allows(others):
            return False
        # its own, which may have other offers now, or have expired
        connection.execute(_SAME, {"decision": promise.decision_id})
        until, who = microseconds(promise.now + promise.kept), promise.customer_ids[0]
        lines = [(promise.decision_id, offer, who, at, promise.channel, until) for offer in promise.offer_ids or [""]]
        run_many(connection, _PROMISE, lines)
        return True

    def promised(self, customer_ids: Sequence[str], now: datetime, but: str = "") -> list[Contacted]:
        """What is promised to the customer and has not expired, *but* what one decision promised."""
        if not self._database.exists:
            return []
        rows = _standing(self._opened().read, customer_ids, microseconds(now))
        return [_contact(*row) for row in rows if row[3] != but]

    def used_up(self, budgets: Mapping[str, int], stocks: Mapping[str, int], now: datetime, but: str = "") -> frozenset[str]:
        """The offers that have been given out, or redeemed, as often as they may; what one decision holds itself does *but* not count."""
        if not self._database.exists or not (budgets or stocks):
            return frozenset(offer for offer, limit in (*budgets.items(), *stocks.items()) if limit == 0)
        asked = hash((frozenset(budgets.items()), frozenset(stocks.items())))
        if self._free == asked and time.monotonic() - self._free_at < FREE_SECONDS:
            # a promise looks again, in the transaction that makes it
            return frozenset()
        read = self._opened().read
        given = _given(read, list(budgets), microseconds(now), but) if budgets else {}
        redeemed = _added(read(_TIMES, {"offers": [_redeemed(offer) for offer in stocks]})) if stocks else {}
        gone = {offer for offer, limit in budgets.items() if given.get(offer, 0) >= limit}
        gone |= {offer for offer, limit in stocks.items() if redeemed.get(_redeemed(offer), 0) >= limit}
        self._free, self._free_at = None if gone else asked, time.monotonic()
        return frozenset(gone)

    def taken(self, budgets: Sequence[str], stocks: Sequence[str], now: datetime) -> tuple[dict[str, int], dict[str, int]]:
        """How often each of these offers is given out, and redeemed; of none that never was is anything told."""
        if not self._database.exists:
            return {}, {}
        read = self._opened().read
        given = _given(read, budgets, microseconds(now), "") if budgets else {}
        counted = _added(read(_TIMES, {"offers": [_redeemed(offer) for offer in stocks]})) if stocks else {}
        return given, {offer: counted[name] for offer in stocks if (name := _redeemed(offer)) in counted}

    def reached(self, decision_ids: Sequence[str], redemptions: Sequence[tuple[str, str]] = ()) -> None:
        """Count for good what decisions gave out, as they are known to have reached somebody, and redemptions (event and offer); each
        counts once however often it is told.
        """
        if not self._database.exists and not redemptions:
            return
        with self._opened().writing() as connection:
            if decision_ids:
                connection.execute(_REACHED, {"decisions": list(decision_ids)})
            for event, offer in redemptions:
                name = hashlib.blake2b(event.encode(), digest_size=16).hexdigest()
                if connection.execute(_REDEEM, {"event_id": name, "offer_id": offer}).rowcount:
                    _count(connection, [(_redeemed(offer),)], 1)

    @property
    def gives(self) -> bool:
        """Whether anything was ever given out of which there are so many."""
        if not self._gives and self._database.exists:
            self._gives = bool(self._opened().read(sa.select(TIMES.c.offer_id).limit(1)))
        return self._gives

    def sync(self) -> None:
        """Bring every promise onto the disk: until then one outlives the process, and not a power cut."""
        self._database.sync()

    def release(self, decision_id: str) -> None:
        """Give back what a decision promised, as nothing will come of it; what is known to have reached somebody stays."""
        if not self._database.exists:
            return
        with self._opened().writing() as connection:
            connection.execute(_SAME, {"decision": decision_id})
            _count(connection, connection.execute(_TAKE_BACK, {"decision": decision_id, "offers": []}).fetchall(), -1)

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


def _redeemed(offer_id: str) -> str:
    """Under what the redemptions of an offer are counted."""
    return f"redeemed {offer_id}"


def _standing(run: Callable[..., Any], customer_ids: Sequence[str], now: int) -> Sequence[Any]:
    """What is promised to a customer."""
    if len(customer_ids) == 1:
        return list(run(_STANDING_OF_ONE, {"id": customer_ids[0], "now": now}))
    return list(run(_STANDING, {"ids": list(customer_ids), "now": now}))


def _given(run: Callable[..., Any], offers: Sequence[str], now: int, but: str) -> dict[str, int]:
    """How often each offer is given out, but by one decision."""
    return _added(run(_COUNTED, {"offers": list(offers), "now": now, "but": but}))


def _count(connection: Connection, rows: Sequence[Any], by: int) -> None:
    """Add to, or take from, the times of the offers of *rows*."""
    if rows:
        numbers = _added([(offer, by) for (offer,) in rows])
        run_many(connection, _COUNT, list(numbers.items()))


def _added(*counts: Sequence[Any]) -> dict[str, int]:
    """The sums of several lists of offers and numbers."""
    found: dict[str, int] = {}
    for rows in counts:
        for offer, number in rows:
            found[offer] = found.get(offer, 0) + int(number)
    return found


def _contact(at: int, channel: str, offer_id: str, decision_id: str) -> Contacted:
    return Contacted(datetime.fromtimestamp(at / 1e6, UTC), channel, offer_id, decision_id, decision_id)
