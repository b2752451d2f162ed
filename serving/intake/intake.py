"""Events in: parse, seal, store durably, acknowledge; then, off the request, log, online rows and aggregates."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import msgspec
from sqlalchemy.exc import SQLAlchemyError

from features.catalogue.shop import Shop
from features.definitions.domain import domain_named
from features.definitions.folds.registered import Touch
from features.events.event import RejectedEvent, SealedEvent, parse_event
from features.events.identifiers import holds_personal
from features.people.consent import Consents
from features.people.contacts import Contacts
from features.people.identity import Identities
from features.people.tombstones import STARTS_ANEW, Tombstones
from features.people.vault import Personal, Sealed
from features.state.clock import AHEAD, Clock, WatchedClock
from features.state.disk import DamagedStateError, NoSpaceError
from features.state.home import Home
from features.state.ports import MissingStateError
from features.store.customer_rows import CustomerRows
from features.store.dead_letters import DeadLetter
from features.store.event_index import Incoming
from features.store.event_log import EventLog
from features.store.keyed_state import KeyedState
from serving.intake.event_queue import EPOCH, Accepted, EventQueue, Refused
from serving.intake.receipts import EventReceipt, EventsAnswer
from serving.intake.recent import RecentlyLearnt

logger = logging.getLogger("ubiquo")
SOURCE = "http"
TICK = timedelta(microseconds=1)
STORE_SECONDS = 4.0
"""How long the disk is waited for."""
MAX_SHOWN = 256
REFUSED_AT_ONCE = 1_000
MAX_WAITING_BYTES = 512_000_000
"""How many bytes of events may wait for the log."""
BATCHES_FOLDED_AT_ONCE = 5
MAX_KEPT = 32_768
"""How much is kept of a row that could not be taken."""
BUSY_EVENTS = 2_000
"""How many more events wait than a tick ago when the intake counts as busy."""
MAX_POSTPONED = 5
"""How many ticks the log may be kept waiting by a busy intake."""
MAX_REFRESH_POSTPONED = 2
"""How many times in a row a busy intake may keep the windowed features waiting."""
Translate = Callable[[Any, datetime], Any]
"""A client's own message and when it was received, to a canonical event.

Raises:
    RejectedEvent: it means nothing here.
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
    taken: list[tuple[SealedEvent, str | None, datetime]] = field(default_factory=list)
    repeated: list[Future[None]] = field(default_factory=list)
    bytes: int = 0
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
        self._lock = threading.Lock()
        """Receipts are given one after the other."""
        self._moving = threading.RLock()
        """One thread at a time moves what waits into the log."""
        self._max_waiting = home.settings.max_waiting
        self._waiting: dict[str, tuple[str, Future[None]]] = {}
        """The content hash of each event that is not in the log yet, and what is done once it is on the disk."""
        self._spoilt: set[str] = set()
        """Customers whose online rows a failure left half brought up to date."""
        self._disturbed: dict[str, datetime] = {}
        """Customers who gained or lost an identifier, and the last receipt given when that was noticed: until rows know that they
        are made anew, as what disturbed them may still be on its way to the log."""
        self.recent = RecentlyLearnt(identities)
        self._rows = CustomerRows(home, store, self._log, identities, consents)
        self._unfolded: list[Incoming] = []
        self._postponed = self._refresh_postponed = self._seen_waiting = 0
        self._touched: dict[str, datetime] = {}
        """Customers whose aggregates do not know what the log holds, and before when all of that was received."""
        self._generation = self._bytes = 0
        """How often something was moved into the log, and how many bytes wait for it."""
        self._counting = threading.Lock()
        self._refused_waiting = len(self.inbox.refused(-1))
        self._last: datetime | None = None
        last = self.inbox.last_received()
        self._log.catch_up()
        self._recover()
        if last is not None and last <= clock() + AHEAD:
            self._last = last

    @property
    def contacts(self) -> Contacts:
        """The contact table that it writes to."""
        return self._log.contacts

    # --- in

    def accept(self, raw_events: Sequence[Any], source: str = SOURCE, translate: Translate | None = None) -> EventsAnswer:
        """Take a batch; good events are on the disk, and count in the next answer, when this returns.

        A bad one is kept as a dead letter and told with its field and reason; it does not hold the others up.

        Raises:
            InboxFullError: too many events wait; none of these was taken.
        """
        self._home.check_room()
        parsed = [self._parse(raw, translate) for raw in raw_events]
        stored: Future[None] = Future()
        ids = [p.event.event_id for p in parsed if isinstance(p, Sealed)]
        # the log is looked at before anybody else has to wait
        generation, logged = self._generation, self._log.hashes_of(ids)
        with self._lock:
            if generation != self._generation:
                # what waited then may lie in the log by now
                logged = self._log.hashes_of(ids)
            if self._bytes > MAX_WAITING_BYTES:
                raise InboxFullError(f"{self._bytes // 1_000_000} MB of events wait for the log: send again in a few seconds")
            if self.waiting + len(parsed) > self._max_waiting:
                raise InboxFullError(f"{self.waiting} events wait for the log: send again in a few seconds")
            entry = _Entry()
            try:
                self._enter(entry, raw_events, parsed, logged, stored, source)
                entry.bytes = sum(len(x.payload) for x in entry.letters) + sum(len(x.token) for x in entry.refused)
                with self._counting:
                    self._refused_waiting += len(entry.refused)
                    self._bytes += entry.bytes
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
            at = self._next_moment()
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
                        self._waiting[event.event_id] = sealed.content_hash, stored
                        entry.taken.append((event, customer, at))
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
            entry.refused.append(self._refused(at, source, error, raw))
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
            for letter in entry.letters:
                self._waiting.pop(letter.event_id, None)
            with self._counting:
                self._refused_waiting = max(0, self._refused_waiting - len(entry.refused))
                self._bytes = max(0, self._bytes - entry.bytes)
            # a new beginning that was not stored is none
            self._tombstones.read_again()

    @property
    def waiting(self) -> int:
        """How many events and refused rows wait to be moved on."""
        return len(self._waiting) + self._refused_waiting

    def _parse(self, raw: Any, translate: Translate | None) -> Sealed | RejectedEvent:
        now = self._clock()
        # where the machine's clock was set right and is not followed yet, its honest clients are not from the future
        latest = now + max(timedelta(), self._clock.leap) if isinstance(self._clock, WatchedClock) else now
        try:
            said = raw if translate is None else _translated(translate, raw, now)
            if not isinstance(said, dict):
                return RejectedEvent("$", "an event must be a JSON object")
            # a translated time is corrected by when it was sent: the same message sent again is the same message
            timeless = translate is not None
            return self._vault.seal(parse_event(said, latest, self._shop.currency, self._shop.phone_region, self.own_events), timeless)
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

    def _show(self, taken: Sequence[tuple[SealedEvent, str | None, datetime]]) -> None:
        for event, _, at in taken:
            self._consents.note(event, at)
        for event, customer, at in taken:
            if customer is not None and self._usable(customer, event.occurred_at):
                self.recent.show(customer, at, Touch.of(event, self._zone))

    def _usable(self, customer: str, occurred_at: datetime) -> bool:
        if self._consents.silent:
            return self._shop.consent.default("personalization")
        return self._consents.usable(self.identities.members(customer), "personalization", occurred_at)

    def _next_moment(self) -> datetime:
        """The time of receipt: the clock's, but always later than the last, so that the order of events is their order."""
        now = self._clock()
        self._last = now if self._last is None or now > self._last + TICK else self._last + 2 * TICK
        return self._last

    # --- on

    def drain_if_due(self) -> int:
        """As ``drain``; under load only now and then, so that the core is there for those who wait for an answer."""
        waiting, self._seen_waiting = len(self._waiting) - self._seen_waiting, len(self._waiting)
        if waiting > BUSY_EVENTS and len(self._waiting) < self._max_waiting // 2 and self._postponed < MAX_POSTPONED:
            self._postponed += 1
            return 0
        self._postponed = 0
        return self.drain()

    def drain(self) -> int:
        """Move what waits into the log, and what is new of it into the online rows, in batches; returns how many events."""
        moved = 0
        with self._moving:
            self._log.catch_up()
            more = True
            while more:
                # only as long as a pass leaves what was there when it began: under a steady stream it would never end
                taken, more = self._drain_some()
                moved += taken
        return moved

    def _drain_some(self) -> tuple[int, bool]:
        """Append what waits to the log in one commit, then fold it: a customer's row is written once however often they came."""
        refused = self.inbox.refused(REFUSED_AT_ONCE)
        self._log.reject([dead for each in refused if (dead := self._dead_letter(each)) is not None])
        letters, left = self._oldest()
        if letters:
            # what an earlier failure left unfolded goes first: only when all is folded may it leave the inbox
            batch = self._read(letters)
            try:
                self._unfolded += self._log.append(batch, self.identities).fresh
            except BaseException:
                # it may lie in the log all the same, and is no news then: the rows are made anew from the log
                self._spoilt |= {customer for row in batch if (customer := self.identities.customer_of(row.event))}
                raise
            self._fold(self._unfolded, letters[-1].received_at + TICK)
        self._unfolded = []
        self.inbox.drained(letters, refused)
        for letter in letters:
            self._waiting.pop(letter.event_id, None)
        with self._counting:
            self._generation += 1
            self._refused_waiting = max(0, self._refused_waiting - len(refused))
            self._bytes = max(0, self._bytes - sum(len(x.payload) for x in letters) - sum(len(x.token) for x in refused))
        return len(letters) + len(refused), left or len(refused) >= REFUSED_AT_ONCE

    def _oldest(self) -> tuple[list[Accepted], bool]:
        """The events that have waited longest, as many as are folded at once, and whether there may be more."""
        letters: list[Accepted] = []
        for _ in range(BATCHES_FOLDED_AT_ONCE):
            more = self.inbox.waiting(after=letters[-1].received_at if letters else EPOCH)
            if not more:
                return letters, False
            letters += more
        return letters, True

    def refresh_if_due(self) -> int:
        """As ``refresh_aggregates``; under load less often, as those who come again and again would be computed again and again."""
        if len(self._waiting) > BUSY_EVENTS and self._refresh_postponed < MAX_REFRESH_POSTPONED:
            self._refresh_postponed += 1
            return 0
        self._refresh_postponed = 0
        return self.refresh_aggregates()

    def refresh_aggregates(self) -> int:
        """Recompute the windowed features of the customers whose events have just reached the log.

        Everything received before the moment of the features is in the log when they are computed, so that a replay of
        the log at that moment finds the same.
        """
        with self._lock:
            at = self._next_moment()
            earlier: Future[None] = Future()
            self.inbox.submit([], [], earlier)
        earlier.result(STORE_SECONDS * 10)
        with self._moving:
            self.drain()
            customers = sorted(self._touched)
            if customers:
                self._rows.compute(customers, at)
                # only now: a failure leaves them for the next time, as does an event that came while this one drained
                self._touched = {customer: until for customer, until in self._touched.items() if until > at}
            ahead, self.recent.ahead = sorted(self.recent.ahead), set()
            if ahead:
                logger.warning("%d customers have rows of a time to come, or of another version: they are made anew", len(ahead))
                self._rows.rebuild(ahead, at)
                self._rows.compute(ahead, at)
            return len(customers)

    @contextlib.contextmanager
    def standing_still(self) -> Iterator[None]:
        """Bring everything into the log, and let nothing more get there meanwhile; events are still taken into the inbox."""
        with self._moving:
            self.drain()
            yield

    def forget(self, customer_ids: Sequence[str], keys: Sequence[str]) -> None:
        """Let go of what is in memory of customers who were erased."""
        self.recent.forget(customer_ids)
        for customer in customer_ids:
            self._touched.pop(customer, None)
        self._consents.forget(keys)
        self._consents.refresh()

    def close(self) -> None:
        """Bring everything into the log and let go of the inbox."""
        self.drain()
        self.inbox.close()

    def _fold(self, events: Sequence[Incoming], until: datetime) -> None:
        """Bring the states of customers up to *until*: everything received before is in the log."""
        try:
            self._fold_rows(events, until)
        except BaseException:
            # some rows may know these events by now and others not: next time they are made anew
            self._spoilt |= {customer for row in events if (customer := self.identities.customer_of(row.event))}
            raise

    def _fold_rows(self, events: Sequence[Incoming], until: datetime) -> None:
        taken = self.identities.take_disturbed()
        # afterwards: whatever disturbed them was received by then
        self._disturbed |= dict.fromkeys(taken, self._last or until)
        disturbed = (
            self._spoilt
            | self._disturbed.keys()
            | {customer for row in events if is_about_consent(row.event) and (customer := self.identities.customer_of(row.event))}
        )
        by_customer: dict[str, list[SealedEvent]] = {}
        for row in events:
            if (customer := self.identities.customer_of(row.event)) is not None:
                by_customer.setdefault(customer, []).append(row.event)
        self._touched |= dict.fromkeys(disturbed | by_customer.keys(), until)
        ordinary = {customer: theirs for customer, theirs in by_customer.items() if customer not in disturbed}
        again = disturbed | self._rows.fold(ordinary, until, self.recent.minted.__contains__, self._usable)
        if again:
            self._rows.rebuild(sorted(again), until)
        self._spoilt = set()
        self._disturbed = {customer: at for customer, at in self._disturbed.items() if at >= until}
        self.recent.told(by_customer, until)

    def _recover(self) -> None:
        """After a crash: what was acknowledged and has not left the inbox counts in answers again, as if it had just come in.

        The next drain brings it into log and rows. What it told of identity, and the event itself, may have been stored already and
        have reached the rows or not, so the rows of all who had a past are made anew. What cannot be read or learnt is skipped here:
        that drain makes a dead letter of it.
        """
        stored: Future[None] = Future()
        stored.set_result(None)
        after = EPOCH
        while letters := self.inbox.waiting(after=after):
            after = letters[-1].received_at
            taken = []
            for letter in letters:
                self._waiting[letter.event_id] = letter.content_hash, stored
                self._bytes += len(letter.payload)
                try:
                    event = self._incoming(letter).event
                    customer = self.recent.learn(event, letter.received_at)
                except Exception as error:
                    logger.error("a letter in the inbox cannot be taken up again (%s)", type(error).__name__)
                    continue
                taken.append((event, customer, letter.received_at))
                if customer is not None and customer not in self.recent.minted:
                    self._spoilt.add(customer)
                    self._touched[customer] = letter.received_at + TICK
            self._show(taken)

    def _incoming(self, letter: Accepted) -> Incoming:
        event = msgspec.json.decode(letter.payload, type=SealedEvent)
        personal = [] if letter.personal is None else msgspec.json.decode(self._vault.decrypt(letter.personal), type=list[Personal])
        return Incoming(event, letter.content_hash, letter.received_at, letter.received_at, letter.source, personal=personal)

    def _read(self, letters: Sequence[Accepted]) -> list[Incoming]:
        """The events of letters; one that cannot be read becomes a dead letter."""
        batch = []
        for letter in letters:
            try:
                batch.append(self._incoming(letter))
            except (msgspec.DecodeError, ValueError, TypeError) as error:
                logger.error("a letter in the inbox cannot be read (%s); it becomes a dead letter", type(error).__name__)
                reason = "what lay in the inbox cannot be read"
                self._log.reject([DeadLetter(letter.received_at, letter.source, "$", reason, letter.payload.decode("utf-8", "replace"))])
        return batch

    def _dead_letter(self, refused: Refused) -> DeadLetter | None:
        try:
            said: Mapping[str, str] = msgspec.json.decode(self._vault.decrypt(refused.token))
        except (MissingStateError, msgspec.DecodeError):
            logger.error("a refused row in the inbox cannot be read; it is let go")
            return None
        return DeadLetter(refused.received_at, refused.source, said["field"], said["reason"], said["raw"])


def _translated(translate: Translate, raw: Any, now: datetime) -> Any:
    try:
        return translate(raw, now)
    except (TypeError, ValueError, ArithmeticError) as error:
        if isinstance(error, RejectedEvent):
            raise
        # what a client may send has no end; the error's own words may repeat it
        raise RejectedEvent("$", f"a value in it is of a kind or size that cannot be read ({type(error).__name__})") from None


def is_about_consent(event: SealedEvent) -> bool:
    """Whether the event changes which purposes a customer's data may be used for."""
    return event.consent is not None and bool(event.consent.purposes)
