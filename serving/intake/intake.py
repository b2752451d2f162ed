"""Events in: parse, seal, store durably, acknowledge; then, off the request, log, online rows and aggregates."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import msgspec
from sqlalchemy.exc import SQLAlchemyError

from features.catalogue.shop import Shop
from features.definitions.domain import domain_named
from features.definitions.folds.registered import Touch
from features.events.event import Event, RejectedEvent, parse_event
from features.events.identifiers import holds_personal
from features.people.consent import Consents
from features.people.contacts import Contacts
from features.people.identity import Identities
from features.people.tombstones import STARTS_ANEW, Tombstones
from features.people.vault import Sealed
from features.state.clock import AHEAD, Clock, WatchedClock
from features.state.disk import DamagedStateError, NoSpaceError
from features.state.home import Home
from features.store.customer_rows import CustomerRows
from features.store.event_log import EventLog
from features.store.keyed_state import KeyedState
from serving.intake.backlog import Backlog, Taken, Turn
from serving.intake.draining import STORE_SECONDS, Drain, Follow
from serving.intake.event_queue import Accepted, EventQueue, Refused
from serving.intake.receipts import EventReceipt, EventsAnswer
from serving.intake.recent import RecentlyLearnt

logger = logging.getLogger("ubiquo")
SOURCE = "http"
MAX_SHOWN = 256
MAX_WAITING_BYTES = 512_000_000
"""How many bytes of events may wait for the log."""
MAX_KEPT = 32_768
"""How much is kept of a row that could not be taken."""
Translate = Callable[[Any, datetime], Any]
"""A client's own message and when it was received, to a canonical event.

Raises:
    RejectedEvent: it means nothing here.
"""
Admit = Callable[[Event], Event]
"""An event as its sender may send it.

Raises:
    RejectedEvent: this sender may not say that.
"""


class InboxFullError(RuntimeError):
    """So many events wait that no more are taken for now."""


class NotStoredError(RuntimeError):
    """What was sent could not be stored; nothing of it was taken, or it cannot be told yet."""


@dataclass
class _Entry:
    """What one batch has entered so far."""

    receipts: list[EventReceipt] = field(default_factory=list)
    letters: list[Accepted] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    taken: list[Taken] = field(default_factory=list)
    repeated: list[Future[None]] = field(default_factory=list)
    settled: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


class Intake:
    """The way in for live events of one process.

    An event is in the next answer at once, through ``recent``; the online row follows, as of just after the last event
    that it knows, so that what a feature row knows is always "strictly before".
    """

    def __init__(self, home: Home, clock: Clock, inbox: EventQueue, store: KeyedState, identities: Identities, consents: Consents) -> None:
        self._home, self._clock, self.identities, self._consents = home, clock, identities, consents
        self._shop = Shop.load(home)
        self._zone = ZoneInfo(self._shop.timezone)
        self.own_events = domain_named(self._shop.domain).events
        """What the shop's domain counts beside the events of every shop."""
        self._vault = identities.vault
        self._log = EventLog(home, self._shop.timezone)
        self._tombstones = Tombstones(home, self._vault)
        self.inbox = inbox
        self._max_waiting = home.settings.max_waiting
        self._turn, self._waiting = Turn(clock), Backlog(refused=len(inbox.refused(-1)))
        self.recent = RecentlyLearnt(identities)
        self._drain = Drain(
            inbox=inbox, log=self._log, rows=CustomerRows(home, store, self._log, identities, consents), identities=identities,
            vault=self._vault, turn=self._turn, waiting=self._waiting, recent=self.recent, usable=self._usable, show=self._show,
            max_waiting=self._max_waiting,
        )  # fmt: skip
        last = inbox.last_received()
        self._log.catch_up()
        self._drain.recover()
        if last is not None and last <= clock() + AHEAD:
            self._turn.last = last

    def followed_by(self, follow: Follow) -> None:
        """Hand every event on once it is folded; what waited from before is seen too."""
        self._drain.follow = follow

    def refresh_region(self) -> str | None:
        """Read phone numbers from now on in the shop's region as it is described now: an import may have named it. Returns the region."""
        self._shop = msgspec.structs.replace(self._shop, phone_region=Shop.load(self._home).phone_region)
        return self._shop.phone_region

    @property
    def unfollowed(self) -> int:
        """How many events left the inbox without what follows them."""
        return self._drain.unfollowed

    @property
    def contacts(self) -> Contacts:
        """The contact table that it writes to."""
        return self._log.contacts

    # --- in

    def accept(
        self, raw_events: Sequence[Any], source: str = SOURCE, translate: Translate | None = None, admit: Admit | None = None
    ) -> EventsAnswer:
        """Take a batch; good events are on the disk, and count in the next answer, when this returns.

        A bad one is kept as a dead letter and told with its field and reason; it does not hold the others up.

        Raises:
            InboxFullError: too many events wait; none of these was taken.
        """
        self._home.check_room()
        parsed = [self._parse(raw, translate, admit) for raw in raw_events]
        stored: Future[None] = Future()
        ids = [p.event.event_id for p in parsed if isinstance(p, Sealed)]
        # the log is looked at before anybody else has to wait
        generation, logged = self._waiting.generation, self._log.hashes_of(ids)
        with self._turn.lock:
            if generation != self._waiting.generation:
                # what waited then may lie in the log by now
                logged = self._log.hashes_of(ids)
            if self._waiting.bytes > MAX_WAITING_BYTES:
                raise InboxFullError(f"{self._waiting.bytes // 1_000_000} MB of events wait for the log: send again in a few seconds")
            if self.waiting + len(parsed) > self._max_waiting:
                raise InboxFullError(f"{self.waiting} events wait for the log: send again in a few seconds")
            entry = _Entry()
            try:
                self._enter(entry, raw_events, parsed, logged, stored, source)
                self.inbox.submit(entry.letters, entry.refused, stored)
            except BaseException as failure:
                self._settle(entry, failure)
                raise
        # also where nobody waits for it any more
        stored.add_done_callback(lambda done: self._settle(entry, done.exception()))
        try:
            stored.result(STORE_SECONDS)
        except TimeoutError:
            # it may be stored yet: whoever sends it again is told once it is
            logger.error("the disk takes longer than %.0f s", STORE_SECONDS)
            raise NotStoredError("the disk takes long: send the same again") from None
        except (SQLAlchemyError, OSError, DamagedStateError, RuntimeError) as error:
            self._settle(entry, error)
            if isinstance(error, NoSpaceError):
                raise
            logger.error("events could not be stored: %s", error)
            raise NotStoredError("the events could not be stored: nothing of this request was taken") from None
        self._settle(entry, None)
        for other in entry.repeated:
            # what is only repeated may not be on the disk yet, and may never get there
            try:
                other.result(STORE_SECONDS)
            except Exception:
                raise NotStoredError("what was sent before could not be stored: send the same again") from None
        counts = {status: sum(r.status == status for r in entry.receipts) for status in ("accepted", "duplicate", "rejected", "erased")}
        return EventsAnswer(counts["accepted"], counts["duplicate"], counts["rejected"], counts["erased"], entry.receipts)

    def _enter(
        self,
        entry: _Entry,
        raw_events: Sequence[Any],
        parsed: Sequence[Sealed | RejectedEvent],
        logged: Mapping[str, str],
        stored: Future[None],
        source: str,
    ) -> None:
        """Give every event its receipt, and each new one its place; *entry* tells at any moment what was entered."""
        welcome = iter(self._tombstones.welcome(p.event for p in parsed if isinstance(p, Sealed)))
        for raw, sealed in zip(raw_events, parsed, strict=True):
            at = self._turn.next_moment()
            error = sealed if isinstance(sealed, RejectedEvent) else None
            if isinstance(sealed, Sealed):
                event = sealed.event
                if not next(welcome):
                    entry.receipts.append(EventReceipt("erased", event.event_id))
                    continue
                held = self._waiting.get(event.event_id)
                known = held[0] if held else logged.get(event.event_id)
                if known is None:
                    try:
                        letter, customer = self._letter(sealed, at, source), self.recent.learn(event, at)
                    except Exception as failure:
                        # whatever it is that cannot be taken in, it must not hold up the others
                        logger.exception("an event cannot be taken in; it becomes a dead letter")
                        error = RejectedEvent("$", f"what it says cannot be taken in ({type(failure).__name__})")
                    else:
                        entry.letters.append(letter)
                        self._waiting.enter(letter, stored)
                        entry.taken.append(Taken(event, customer, at))
                        entry.receipts.append(EventReceipt("accepted", event.event_id, customer))
                        continue
                elif known == sealed.content_hash:
                    if held and held[1] is not stored:
                        entry.repeated.append(held[1])
                    entry.receipts.append(EventReceipt("duplicate", event.event_id))
                    continue
                else:
                    reason = f"{event.event_id!r} is already stored with other content: give a corrected event an id of its own"
                    error = RejectedEvent("event_id", reason)
                if event.name in STARTS_ANEW:
                    # it lifted a tombstone in memory, and is not stored
                    self._tombstones.read_again()
            assert error is not None
            refused = self._refused(at, source, error, raw)
            entry.refused.append(refused)
            self._waiting.refuse([refused])
            name = raw.get("event_id") if isinstance(raw, dict) else None
            # an id is repeated only if it could have been one
            shown = name if isinstance(name, str) and len(name) <= MAX_SHOWN and not holds_personal(name) else None
            entry.receipts.append(EventReceipt("rejected", shown, field=error.field, reason=error.reason))

    def _settle(self, entry: _Entry, failure: BaseException | None) -> None:
        """Show what is stored, or take back what is not: once, whoever comes first."""
        with entry.lock:
            if entry.settled:
                return
            entry.settled = True
            if failure is None:
                self._show(entry.taken)
                return
            self._waiting.let_go(entry.letters, entry.refused)
            # a new beginning that was not stored is none
            self._tombstones.read_again()

    @property
    def waiting(self) -> int:
        """How many events and refused rows wait to be moved on."""
        return self._waiting.rows

    def revision(self, customer_id: str) -> str:
        """What changes whenever the log has more of a customer, or they have another identifier."""
        keys = self.identities.members(customer_id)
        return f"{len(keys)}-{sum(self._log.index.counts(keys).values())}"

    def _parse(self, raw: Any, translate: Translate | None, admit: Admit | None) -> Sealed | RejectedEvent:
        now = self._clock()
        # where the machine's clock was set right and is not followed yet, its honest clients are not from the future
        latest = now + max(timedelta(), self._clock.leap) if isinstance(self._clock, WatchedClock) else now
        try:
            said = raw if translate is None else _translated(translate, raw, now)
            if not isinstance(said, dict):
                return RejectedEvent("$", "an event must be a JSON object")
            # a translated time is corrected by when it was sent: the same message sent again is the same message
            timeless = translate is not None
            event = parse_event(said, latest, self._shop.currency, self._shop.phone_region, self.own_events)
            return self._vault.seal(event if admit is None else admit(event), timeless)
        except RejectedEvent as error:
            return error

    def _letter(self, sealed: Sealed, at: datetime, source: str) -> Accepted:
        news = self._log.contacts.news(sealed.personal)
        personal = self._vault.encrypt(msgspec.json.encode(news)) if news else None
        return Accepted(sealed.event.event_id, sealed.content_hash, at, msgspec.json.encode(sealed.event), source, personal)

    def _refused(self, at: datetime, source: str, error: RejectedEvent, raw: Any) -> Refused:
        try:
            said = msgspec.json.encode(raw).decode()
        except (RecursionError, ValueError, TypeError, OverflowError) as failure:
            said = f"a message that cannot be written down again ({type(failure).__name__})"
        if len(said) > MAX_KEPT:
            said = f"{said[:MAX_KEPT]}... ({len(said)} characters)"
        letter = {"field": error.field, "reason": error.reason, "raw": said}
        return Refused(at, source, self._vault.encrypt(msgspec.json.encode(letter)))

    def _show(self, taken: Sequence[Taken]) -> None:
        for event, _, at in taken:
            self._consents.note(event, at)
        for event, customer, at in taken:
            if customer is not None and self._usable(customer, event.occurred_at):
                self.recent.show(customer, at, Touch.of(event, self._zone))

    def _usable(self, customer: str, occurred_at: datetime) -> bool:
        if self._consents.silent:
            return self._shop.consent.default("personalization")
        return self._consents.usable(self.identities.members(customer), "personalization", occurred_at)

    # --- on

    def drain(self) -> int:
        """Move what waits into the log, and what is new of it into the online rows; returns how many events."""
        return self._drain.drain()

    def drain_if_due(self) -> int:
        """As ``drain``; under load only now and then."""
        return self._drain.drain_if_due()

    def refresh_aggregates(self) -> int:
        """Recompute the windowed features of the customers whose events have just reached the log; returns how many."""
        return self._drain.refresh_aggregates()

    def refresh_if_due(self) -> int:
        """As ``refresh_aggregates``; under load less often."""
        return self._drain.refresh_if_due()

    def standing_still(self) -> AbstractContextManager[None]:
        """Bring everything into the log, and let nothing more get there meanwhile; events are still taken into the inbox."""
        return self._drain.standing_still()

    def forget(self, customer_ids: Sequence[str], keys: Sequence[str]) -> None:
        """Let go of what is in memory of customers who were erased."""
        self.recent.forget(customer_ids)
        self._drain.forget(customer_ids)
        self._consents.forget(keys)
        self._consents.refresh()

    def close(self) -> None:
        """Bring everything into the log and let go of the inbox."""
        self.drain()
        self.inbox.close()


def _translated(translate: Translate, raw: Any, now: datetime) -> Any:
    try:
        return translate(raw, now)
    except (TypeError, ValueError, ArithmeticError) as error:
        if isinstance(error, RejectedEvent):
            raise
        # what a client may send has no end; the error's own words may repeat it
        raise RejectedEvent("$", f"a value in it is of a kind or size that cannot be read ({type(error).__name__})") from None
