"""What was accepted goes on, off the request: into the log, into the online rows, and what broke off is taken up again."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from datetime import datetime
from typing import NamedTuple

import msgspec

from features.events.event import SealedEvent
from features.people.identity import Identities
from features.people.vault import Personal, Vault
from features.state.ports import MissingStateError
from features.store.customer_rows import CustomerRows
from features.store.dead_letters import DeadLetter
from features.store.event_index import Incoming
from features.store.event_log import EventLog
from serving.intake.backlog import TICK, Backlog, Taken, Turn
from serving.intake.event_queue import EPOCH, Accepted, EventQueue, Refused
from serving.intake.recent import RecentlyLearnt

logger = logging.getLogger("ubiquo")
STORE_SECONDS = 4.0
"""How long the disk is waited for."""
REFUSED_AT_ONCE = 1_000
BATCHES_FOLDED_AT_ONCE = 5
BUSY_EVENTS = 2_000
"""How many more events wait than a tick ago when the intake counts as busy."""
MAX_POSTPONED = 5
"""How many ticks the log may be kept waiting by a busy intake."""
FOLLOW_TRIES = 3
"""How often what follows events may fail before they leave the inbox all the same."""
MAX_REFRESH_POSTPONED = 2
"""How many times in a row a busy intake may keep the windowed features waiting."""


class Followed(NamedTuple):
    """An event on its way out of the inbox; it may be seen again after a crash."""

    event: SealedEvent
    customer_id: str | None
    received_at: datetime
    usable: bool
    """Whether the customer allows that it is used for personalization."""


Follow = Callable[[Sequence[Followed]], None]
"""Takes in what has just been folded; the same again must change nothing."""


class Drain:
    """Moves events from the inbox into the log and the online rows; an event leaves the inbox only once it is in both.

    Args:
        inbox, log, rows: from where to where.
        identities, vault: who is who, and what opens what is encrypted.
        turn, waiting, recent: what the intake shares with it.
        usable: whether an event of a customer may be used.
        show: lets events that were taken count in answers.
        max_waiting: with half as many waiting nothing is postponed any more.
    """

    def __init__(
        self,
        *,
        inbox: EventQueue,
        log: EventLog,
        rows: CustomerRows,
        identities: Identities,
        vault: Vault,
        turn: Turn,
        waiting: Backlog,
        recent: RecentlyLearnt,
        usable: Callable[[str, datetime], bool],
        show: Callable[[Sequence[Taken]], None],
        max_waiting: int,
    ) -> None:
        self._inbox, self._log, self.rows, self._identities, self._vault = inbox, log, rows, identities, vault
        self._turn, self._waiting, self._recent, self._usable, self._show = turn, waiting, recent, usable, show
        self._max_waiting = max_waiting
        self._moving = threading.RLock()
        """One thread at a time moves what waits into the log."""
        self._spoilt: set[str] = set()
        """Customers whose online rows a failure left half brought up to date."""
        self._disturbed: dict[str, datetime] = {}
        """Customers who gained or lost an identifier, and the last receipt given when that was noticed: until rows know that they
        are made anew, as what disturbed them may still be on its way to the log."""
        self._unfolded: list[Incoming] = []
        self._postponed = self._refresh_postponed = self._seen_waiting = 0
        self.follow: Follow | None = None
        """Who goes on with events that were folded."""
        self.unfollowed = 0
        """How many events have left without that, as it failed again and again."""
        self._failed_to_follow = 0
        self._touched: dict[str, datetime] = {}
        """Customers whose aggregates do not know what the log holds, and before when all of that was received."""

    def drain_if_due(self) -> int:
        """As ``drain``; under load only now and then, so that the core is there for those who wait for an answer."""
        more, self._seen_waiting = len(self._waiting) - self._seen_waiting, len(self._waiting)
        if more > BUSY_EVENTS and len(self._waiting) < self._max_waiting // 2 and self._postponed < MAX_POSTPONED:
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
        refused = self._inbox.refused(REFUSED_AT_ONCE)
        self._log.reject([dead for each in refused if (dead := self._dead_letter(each)) is not None])
        letters, left = self._oldest()
        batch: list[Incoming] = []
        if letters:
            # what an earlier failure left unfolded goes first: only when all is folded may it leave the inbox
            batch = self._read(letters)
            try:
                self._unfolded += self._log.append(batch, self._identities).fresh
            except BaseException:
                # it may lie in the log all the same, and is no news then: the rows are made anew from the log
                self._spoilt |= {customer for row in batch if (customer := self._identities.customer_of(row.event))}
                raise
            self._fold(self._unfolded, letters[-1].received_at + TICK)
        self._unfolded = []
        self._follow(batch)
        self._inbox.drained(letters, refused)
        self._waiting.let_go(letters, refused, moved=True)
        return len(letters) + len(refused), left or len(refused) >= REFUSED_AT_ONCE

    def _follow(self, batch: Sequence[Incoming]) -> None:
        """Hand on what was folded; a failure keeps it in the inbox for another try or two, and then holds the intake up no longer."""
        if self.follow is None or not batch:
            return
        told = []
        for row in batch:
            customer = self._identities.customer_of(row.event)
            usable = customer is not None and self._usable(customer, row.event.occurred_at)
            told.append(Followed(row.event, customer, row.received_at, usable))
        try:
            self.follow(told)
        except Exception:
            self._failed_to_follow += 1
            if self._failed_to_follow < FOLLOW_TRIES:
                raise
            # one by one, so that what cannot be followed costs nobody else
            for each in told:
                try:
                    self.follow([each])
                except Exception:
                    logger.exception("what follows an event failed again and again: it leaves without it")
                    self.unfollowed += 1
        self._failed_to_follow = 0

    def _oldest(self) -> tuple[list[Accepted], bool]:
        """The events that have waited longest, as many as are folded at once, and whether there may be more."""
        letters: list[Accepted] = []
        for _ in range(BATCHES_FOLDED_AT_ONCE):
            more = self._inbox.waiting(after=letters[-1].received_at if letters else EPOCH)
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
        with self._turn.lock:
            at = self._turn.next_moment()
            earlier: Future[None] = Future()
            self._inbox.submit([], [], earlier)
        earlier.result(STORE_SECONDS * 10)
        with self._moving:
            self.drain()
            customers = sorted(self._touched)
            if customers:
                self.rows.compute(customers, at)
                # only now: a failure leaves them for the next time, as does an event that came while this one drained
                self._touched = {customer: until for customer, until in self._touched.items() if until > at}
            ahead, self._recent.ahead = sorted(self._recent.ahead), set()
            if ahead:
                logger.warning("%d customers have rows of a time to come, or of another version: they are made anew", len(ahead))
                self.rows.rebuild(ahead, at)
                self.rows.compute(ahead, at)
            return len(customers)

    @contextlib.contextmanager
    def standing_still(self) -> Iterator[None]:
        """Bring everything into the log, and let nothing more get there meanwhile; events are still taken into the inbox."""
        with self._moving:
            self.drain()
            yield

    def _fold(self, events: Sequence[Incoming], until: datetime) -> None:
        """Bring the states of customers up to *until*: everything received before is in the log."""
        try:
            self._fold_rows(events, until)
        except BaseException:
            # some rows may know these events by now and others not: next time they are made anew
            self._spoilt |= {customer for row in events if (customer := self._identities.customer_of(row.event))}
            raise

    def _fold_rows(self, events: Sequence[Incoming], until: datetime) -> None:
        taken = self._identities.take_disturbed()
        # afterwards: whatever disturbed them was received by then
        self._disturbed |= dict.fromkeys(taken, self._turn.last or until)
        disturbed = (
            self._spoilt
            | self._disturbed.keys()
            | {customer for row in events if is_about_consent(row.event) and (customer := self._identities.customer_of(row.event))}
        )
        by_customer: dict[str, list[SealedEvent]] = {}
        for row in events:
            if (customer := self._identities.customer_of(row.event)) is not None:
                by_customer.setdefault(customer, []).append(row.event)
        self._touched |= dict.fromkeys(disturbed | by_customer.keys(), until)
        ordinary = {customer: theirs for customer, theirs in by_customer.items() if customer not in disturbed}
        again = disturbed | self.rows.fold(ordinary, until, self._recent.minted.__contains__, self._usable)
        if again:
            self.rows.rebuild(sorted(again), until)
        self._spoilt = set()
        self._disturbed = {customer: at for customer, at in self._disturbed.items() if at >= until}
        self._recent.told(by_customer, until)

    def recover(self) -> None:
        """After a crash: what was acknowledged and has not left the inbox counts in answers again, as if it had just come in.

        The next drain brings it into log and rows. What it told of identity, and the event itself, may have been stored already and
        have reached the rows or not, so the rows of all who had a past are made anew. What cannot be read or learnt is skipped here:
        that drain makes a dead letter of it.
        """
        stored: Future[None] = Future()
        stored.set_result(None)
        after = EPOCH
        while letters := self._inbox.waiting(after=after):
            after = letters[-1].received_at
            taken = []
            for letter in letters:
                self._waiting.enter(letter, stored)
                try:
                    event = self._incoming(letter).event
                    customer = self._recent.learn(event, letter.received_at)
                except Exception as error:
                    logger.error("a letter in the inbox cannot be taken up again (%s)", type(error).__name__)
                    continue
                taken.append(Taken(event, customer, letter.received_at))
                if customer is not None and customer not in self._recent.minted:
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

    def forget(self, customer_ids: Sequence[str]) -> None:
        """Let go of what is in memory of customers who were erased."""
        for customer in customer_ids:
            self._touched.pop(customer, None)


def is_about_consent(event: SealedEvent) -> bool:
    """Whether the event changes which purposes a customer's data may be used for."""
    return event.consent is not None and bool(event.consent.purposes)
