"""Events in: parse, seal, store durably, acknowledge; then, off the request, log, online rows and aggregates."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from datetime import datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import msgspec
from sqlalchemy.exc import SQLAlchemyError

from features.catalogue.shop import Shop
from features.definitions.domain import domain_named
from features.definitions.folds.registered import Touch
from features.events.event import Event, RejectedEvent, SealedEvent, parse_event
from features.events.identifiers import holds_personal
from features.people.consent import Consents
from features.people.contacts import Contacts
from features.people.identity import Identities
from features.people.tombstones import STARTS_ANEW, Tombstones
from features.people.vault import Personal, Sealed
from features.state.clock import Clock, WatchedClock
from features.state.disk import DamagedStateError, NoSpaceError
from features.state.home import Home
from features.store.customer_rows import CustomerRows
from features.store.event_log import EventLog
from features.store.keyed_state import KeyedState
from serving.intake.backlog import Backlog, Taken
from serving.intake.draining import STORE_SECONDS, Drain, Follow
from serving.intake.event_queue import Accepted, EventQueue, Refused, Turn
from serving.intake.receipts import EventReceipt, EventsAnswer
from serving.intake.recent import RecentlyLearnt

logger = logging.getLogger("ubiquo")
SOURCE = "http"
MISSING_SECONDS = 1.0
"""How long a question waits for what others have moved on before it could be followed."""
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


class _Batch:
    """The events of one request on their way into the queue."""

    def __init__(self, intake: Intake, raw: Sequence[Any], parsed: Sequence[Sealed | RejectedEvent], source: str) -> None:
        self._intake, self._raw, self._parsed, self._source = intake, raw, parsed, source
        self.receipts: list[EventReceipt] = []
        self._letters: list[tuple[Accepted, SealedEvent, EventReceipt]] = []
        self._refused: list[Refused] = []
        ids = [each.event.event_id for each in parsed if isinstance(each, Sealed)]
        # before anybody else has to wait
        self._moved, self._logged = intake.inbox.standing().moved, intake.hashes_of(ids)
        self._ids = ids
        self._sealed = {id(each): intake.seal(each) for each in parsed if isinstance(each, Sealed)}

    def enter(self, turn: Turn) -> tuple[Sequence[Accepted], Sequence[Refused]]:
        """Give every event its receipt, and each new one its place.

        Raises:
            InboxFullError: too many events wait; none of these was taken.
        """
        intake = self._intake
        intake.check_room_for(len(self._parsed))
        if turn.moved != self._moved:
            # what waited when the log was looked at may lie in it by now
            self._logged = intake.hashes_of(self._ids)
        welcome = iter(intake.tombstones.welcome(p.event for p in self._parsed if isinstance(p, Sealed)))
        own: dict[str, str] = {}
        for raw, sealed in zip(self._raw, self._parsed, strict=True):
            if isinstance(sealed, RejectedEvent):
                self._refuse(raw, sealed, turn)
                continue
            event = sealed.event
            if not next(welcome):
                self.receipts.append(EventReceipt("erased", event.event_id))
                continue
            known = own.get(event.event_id) or turn.entered.get(event.event_id) or intake.backlog.get(event.event_id)
            known = known or self._logged.get(event.event_id)
            if known is None:
                own[event.event_id] = sealed.content_hash
                seq, at = turn.next()
                payload, personal = self._sealed[id(sealed)]
                if intake.has_lost(sealed):
                    personal = intake.seal_personal(sealed.personal)
                letter = Accepted(event.event_id, sealed.content_hash, at, payload, self._source, personal, seq)
                receipt = EventReceipt("accepted", event.event_id)
                self._letters.append((letter, event, receipt))
                self.receipts.append(receipt)
                continue
            if event.name in STARTS_ANEW:
                # it lifted a tombstone in memory, and is not stored
                intake.tombstones.read_again()
            if known == sealed.content_hash:
                self.receipts.append(EventReceipt("duplicate", event.event_id))
            else:
                reason = f"{event.event_id!r} is already stored with other content: give a corrected event an id of its own"
                self._refuse(raw, RejectedEvent("event_id", reason), turn)
        turn.entered.update(own)
        return [letter for letter, _, _ in self._letters], self._refused

    def stored(self) -> None:
        """What was entered counts from here on."""
        self._intake.backlog.enter((letter for letter, _, _ in self._letters), len(self._refused))
        taken = []
        for letter, event, receipt in self._letters:
            receipt.customer_id = self._intake.learn(event, letter.received_at)
            taken.append(Taken(event, receipt.customer_id, letter.received_at))
        self._intake.show(taken)

    def _refuse(self, raw: Any, error: RejectedEvent, turn: Turn) -> None:
        seq, at = turn.next()
        self._refused.append(Refused(at, self._source, self._intake.sealed_refusal(error, raw), seq))
        name = raw.get("event_id") if isinstance(raw, dict) else None
        # an id is repeated only if it could have been one
        shown = name if isinstance(name, str) and len(name) <= MAX_SHOWN and not holds_personal(name) else None
        self.receipts.append(EventReceipt("rejected", shown, field=error.field, reason=error.reason))


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
        self.tombstones = Tombstones(home, self._vault)
        self.inbox = inbox
        self._max_waiting = home.settings.max_waiting
        self.backlog = Backlog(refused=inbox.count_refused())
        self.recent = RecentlyLearnt(identities)
        self._drain = Drain(
            inbox=inbox, log=self._log, rows=CustomerRows(home, store, self._log, identities, consents), identities=identities,
            consents=consents, vault=self._vault, lease=home.lease, waiting=self.backlog, recent=self.recent, usable=self._usable,
            show=self.show, learn=self.learn, max_waiting=self._max_waiting,
        )  # fmt: skip
        # whom another process erases this one forgets too
        identities.hidden.followed_by(self._forget_keys, self._forget_purged)
        self._log.catch_up()
        self._drain.recover()

    def followed_by(self, follow: Follow) -> None:
        """Hand every event on once it is folded; what waited from before is seen too."""
        self._drain.follow = follow

    def _forget_purged(self) -> None:
        # what they said, and others have moved on since, is in the log no more
        self._drain.elsewhere.take_in()
        self._consents.refresh()

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
        try:
            batch = _Batch(self, raw_events, parsed, source)
            self.inbox.submit(batch, stored)
            stored.result(STORE_SECONDS)
        except TimeoutError:
            # it may be stored yet: whoever sends it again is told once it is
            logger.error("the disk takes longer than %.0f s", STORE_SECONDS)
            raise NotStoredError("the disk takes long: send the same again") from None
        except InboxFullError:
            raise
        except (SQLAlchemyError, OSError, DamagedStateError, RuntimeError) as error:
            # a new beginning that was not stored is none
            self.tombstones.read_again()
            if isinstance(error, NoSpaceError):
                raise
            logger.error("events could not be stored: %s", error)
            raise NotStoredError("the events could not be stored: send the same again, what was stored is not taken twice") from None
        receipts = batch.receipts
        counts = {status: sum(r.status == status for r in receipts) for status in ("accepted", "duplicate", "rejected", "erased")}
        return EventsAnswer(counts["accepted"], counts["duplicate"], counts["rejected"], counts["erased"], receipts)

    def check_room_for(self, events: int) -> None:
        """See that so many more may wait.

        Raises:
            InboxFullError: too many wait.
        """
        if self.backlog.bytes > MAX_WAITING_BYTES:
            raise InboxFullError(f"{self.backlog.bytes // 1_000_000} MB of events wait for the log: send again in a few seconds")
        if self.waiting + events > self._max_waiting:
            raise InboxFullError(f"{self.waiting} events wait for the log: send again in a few seconds")

    def hashes_of(self, event_ids: Sequence[str]) -> Mapping[str, str]:
        """The content hash of each of *event_ids* that the log holds."""
        return self._log.hashes_of(event_ids)

    def learn(self, event: SealedEvent, at: datetime) -> str | None:
        """Learn from an event who is who; returns its customer. One that cannot be understood teaches nothing: the log refuses it."""
        try:
            # it is stored: whoever was erased and begins anew by it does so in every process
            self.tombstones.begun(event)
        except (OSError, SQLAlchemyError) as error:
            logger.error("whether somebody who was erased begins anew is known here once the event is in the log: %s", error)
        try:
            return self.recent.learn(event, at)
        except Exception:
            logger.exception("an event cannot be understood as to whose it is; it becomes a dead letter")
            return None

    def catch_up(self) -> None:
        """Know all that any process of the installation had stored before this was called.

        Raises:
            OSError: it cannot be read now, or not soon; the message says what.
        """
        self.inbox.catch_up()
        self._drain.elsewhere.wait(MISSING_SECONDS)

    def take_in(self) -> None:
        """Read what other processes have brought into the log, however long it takes."""
        self._drain.elsewhere.take_in()

    @property
    def waiting(self) -> int:
        """How many events and refused rows wait to be moved on."""
        return self.backlog.rows

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

    def seal(self, sealed: Sealed) -> tuple[bytes, bytes | None]:
        """An event as the queue keeps it, and encrypted what of it the contact table lacks."""
        return msgspec.json.encode(sealed.event), self.seal_personal(self._log.contacts.news(sealed.personal))

    def has_lost(self, sealed: Sealed) -> bool:
        """Whether the contact table may lack what this process takes for kept, as it was erased by another; call it after a welcome."""
        return bool(sealed.personal and self.tombstones.standing(each.identity_key for each in sealed.personal))

    def seal_personal(self, personal: Sequence[Personal]) -> bytes | None:
        """What is to be kept in the contact table, encrypted."""
        return self._vault.encrypt(msgspec.json.encode(personal)) if personal else None

    def sealed_refusal(self, error: RejectedEvent, raw: Any) -> bytes:
        """What was refused and why, encrypted."""
        try:
            said = msgspec.json.encode(raw).decode()
        except (RecursionError, ValueError, TypeError, OverflowError) as failure:
            said = f"a message that cannot be written down again ({type(failure).__name__})"
        if len(said) > MAX_KEPT:
            said = f"{said[:MAX_KEPT]}... ({len(said)} characters)"
        return self._vault.encrypt(msgspec.json.encode({"field": error.field, "reason": error.reason, "raw": said}))

    def show(self, taken: Sequence[Taken]) -> None:
        """Let events that are stored count in answers."""
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
        self._consents.forget(keys)
        self._consents.refresh()

    def _forget_keys(self, keys: frozenset[str]) -> None:
        self.contacts.forget(keys)
        self._consents.forget(keys)

    def close(self) -> None:
        """Bring everything into the log and let go of the inbox."""
        try:
            self.drain()
        except (OSError, SQLAlchemyError, RuntimeError) as error:
            logger.error("what waits stays in the queue, for another service or the next start: %s", error)
        self._drain.rows.close()
        self.inbox.close()
        self.tombstones.close()
        self.identities.close()


def _translated(translate: Translate, raw: Any, now: datetime) -> Any:
    try:
        return translate(raw, now)
    except (TypeError, ValueError, ArithmeticError) as error:
        if isinstance(error, RejectedEvent):
            raise
        # what a client may send has no end; the error's own words may repeat it
        raise RejectedEvent("$", f"a value in it is of a kind or size that cannot be read ({type(error).__name__})") from None
