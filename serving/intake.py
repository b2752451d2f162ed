"""Events in: parse, store durably, fold into the customer's online row; then, off the request, log and aggregates."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import msgspec

from features.clock import Clock
from features.event_log import DeadLetter, EventLog, Incoming
from features.events import Event, RejectedEvent, content_hash, parse_event
from features.folds import History, Touch, fold_history
from features.home import Home
from features.identity import Identities
from features.shop import Shop
from features.snapshots import compute, replay
from features.store import FeatureStore
from features.timeline import open_timeline
from serving.inbox import EPOCH, Inbox, Letter
from serving.schemas import EventReceipt, EventsAnswer

SOURCE = "http"
TICK = timedelta(microseconds=1)


class Intake:
    """The way in for live events of one process.

    The online history row is as of just after the event, so that what a feature row knows is always "strictly before".
    """

    def __init__(self, home: Home, clock: Clock, store: FeatureStore, identities: Identities) -> None:
        self._home, self._clock, self._store, self._identities = home, clock, store, identities
        shop = Shop.load(home)
        self._currency = shop.currency
        self._log = EventLog(home, shop.timezone)
        self._inbox = Inbox(home)
        self._lock = threading.Lock()
        self._last = self._inbox.last_received()
        self._folded = EPOCH
        """What was received up to here is in the online rows; what is not must stay in the inbox, for a restart to see."""
        self._minted: set[str] = set()
        """Customers first seen by this process, who have no past to look up."""
        self._unfolded: list[tuple[Event, datetime]] = []
        self._touched: set[str] = set()
        self._recover()

    def accept(self, raw_events: Sequence[Any]) -> EventsAnswer:
        """Take a batch; good events are on the disk and in the customers' online rows when this returns.

        A bad one is kept as a dead letter and told with its field and reason; it does not hold the others up.
        """
        with self._lock:
            receipts: list[EventReceipt] = []
            fresh: list[tuple[Event, Letter]] = []
            letters: list[DeadLetter] = []
            ids = [e["event_id"] for e in raw_events if isinstance(e, dict) and isinstance(e.get("event_id"), str)]
            known = {**self._log.hashes_of(ids), **self._inbox.hashes(ids)}
            for raw in raw_events:
                at = self._next_moment()
                try:
                    event, digest = self._parse(raw, at, known)
                except RejectedEvent as error:
                    letters.append(DeadLetter(at, SOURCE, error.field, error.reason, msgspec.json.encode(raw).decode()))
                    name = raw.get("event_id") if isinstance(raw, dict) else None
                    receipts.append(
                        EventReceipt("rejected", name if isinstance(name, str) else None, field=error.field, reason=error.reason)
                    )
                    continue
                if event.event_id in known:
                    receipts.append(EventReceipt("duplicate", event.event_id))
                    continue
                known[event.event_id] = digest
                fresh.append((event, Letter(event.event_id, digest, at, msgspec.json.encode(event))))
                known_before = self._identities.resolve(event.identifiers)
                customer = self._identities.learn(event, at)
                if customer and known_before is None:
                    self._minted.add(customer)
                receipts.append(EventReceipt("accepted", event.event_id, customer))
            if fresh or letters:
                self._inbox.store([letter for _, letter in fresh], letters)
            # what an earlier failure left unfolded goes first: only when all is folded may it leave the inbox
            self._unfolded += [(event, letter.received_at) for event, letter in fresh]
            self._fold(self._unfolded)
            self._unfolded = []
            self._folded = self._last or EPOCH
        accepted, duplicates, rejected = (sum(r.status == s for r in receipts) for s in ("accepted", "duplicate", "rejected"))
        return EventsAnswer(accepted, duplicates, rejected, receipts)

    def drain(self) -> int:
        """Move waiting events that are folded, and dead letters, to the log, in batches; returns how many events."""
        moved, until = 0, self._folded
        while True:
            letters, rejected = self._inbox.waiting()
            letters = [letter for letter in letters if letter.received_at <= until]
            if not letters and not rejected:
                return moved
            batch = [self._incoming(letter) for letter in letters]
            self._log.append(batch, self._identities)
            self._log.reject(rejected)
            self._inbox.drained(letters, len(rejected))
            moved += len(letters)
            self._touched.update(c for row in batch if (c := self._identities.resolve(row.event.identifiers)))

    def refresh_aggregates(self) -> int:
        """Recompute the windowed features of the customers whose events have just reached the log.

        Everything received before the moment of the features is in the log when they are computed, so that a replay of
        the log at that moment finds the same.
        """
        with self._lock:
            at = self._next_moment()
        self.drain()
        customers = sorted(self._touched)
        if customers:
            self._push_view("customer_activity", customers, at)
            # only now: a failure leaves them for the next time
            self._touched -= set(customers)
        return len(customers)

    def close(self) -> None:
        """Bring everything into the log and let go of the inbox."""
        self.drain()
        self._inbox.close()

    def _parse(self, raw: Any, at: datetime, known: dict[str, str]) -> tuple[Event, str]:
        if not isinstance(raw, dict):
            raise RejectedEvent("$", "an event must be a JSON object")
        event = parse_event(raw, at, self._currency)
        digest = content_hash(event)
        if known.get(event.event_id, digest) != digest:
            raise RejectedEvent(
                "event_id", f"{event.event_id!r} is already stored with other content: give a corrected event an id of its own"
            )
        return event, digest

    def _next_moment(self) -> datetime:
        """The time of receipt: the clock's, but always later than the last, so that the order of events is their order."""
        now = self._clock()
        self._last = now if self._last is None or now > self._last + TICK else self._last + 2 * TICK
        return self._last

    def _fold(self, events: Sequence[tuple[Event, datetime]]) -> None:
        by_customer: dict[str, list[tuple[Event, datetime]]] = {}
        for event, at in events:
            customer = self._identities.resolve(event.identifiers)
            if customer:
                by_customer.setdefault(customer, []).append((event, at))
        if not by_customer:
            return
        customers = list(by_customer)
        rows = self._store.online("recommendations_v1", customers)
        offline = {customer for customer, row in zip(customers, rows, strict=True) if row["bought_item_ids"] is None}
        unknown = sorted(offline - self._minted)
        # not online yet is not the same as without a past: the log knows
        logged = self._replayed(unknown) if unknown else {}
        for customer, row in zip(customers, rows, strict=True):
            history = logged.get(customer) or History.from_row(row)
            for event, _ in by_customer[customer]:
                ids = [item.item_id for item in event.items if item.quantity > 0]
                history = fold_history(history, Touch(event.name, event.occurred_at, event.channel, ids))
            last = by_customer[customer][-1][1]
            self._store.push("customer_history", [{"customer_id": customer, **history.to_row()}], last + TICK)

    def _replayed(self, customers: Sequence[str]) -> dict[str, History]:
        if not self._log.exists:
            return {}
        [(_, histories)] = list(replay(open_timeline(self._home, self._next_moment(), customers), [self._next_moment()]))
        return histories

    def _recover(self) -> None:
        """After a crash: what was acknowledged but not folded or logged is brought in now, from the log itself.

        The letters leave the inbox last, so that a crash during the recovery only means another one.
        """
        letters, _ = self._inbox.waiting(limit=-1)
        batch = [self._incoming(letter) for letter in letters]
        self._log.append(batch, self._identities)
        self._touched = {c for row in batch if (c := self._identities.resolve(row.event.identifiers))}
        if self._touched:
            at = self._next_moment()
            rows = [{"customer_id": c, **h.to_row()} for c, h in self._replayed(sorted(self._touched)).items()]
            self._store.push("customer_history", rows, at)
        self._inbox.drained(letters, 0)
        self._folded = self._last or EPOCH

    def _push_view(self, view: str, customers: Sequence[str], at: datetime) -> None:
        for _, table in compute(open_timeline(self._home, at, customers), view, {at: None}):
            rows = [{k: v for k, v in row.items() if k != "event_timestamp"} for row in table.to_pylist()]
            with self._lock:
                self._store.push(view, rows, at)

    @staticmethod
    def _incoming(letter: Letter) -> Incoming:
        event = msgspec.json.decode(letter.payload, type=Event)
        return Incoming(event, known_at=letter.received_at, received_at=letter.received_at, source=SOURCE)
