"""What was accepted goes on, off the request: into the log, into the online rows, and what broke off is taken up again."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import NamedTuple

import msgspec

from features.events.event import SealedEvent
from features.people.consent import Consents
from features.people.identity import Identities
from features.people.vault import Personal, Vault
from features.state.ports import Held, Lease, LeaseTakenError, MissingStateError
from features.store.customer_rows import CustomerRows
from features.store.dead_letters import DeadLetter
from features.store.event_index import Incoming
from features.store.event_log import EventLog
from serving.intake.backlog import Backlog, Taken
from serving.intake.elsewhere import MovedElsewhere
from serving.intake.event_queue import TICK, Accepted, EventQueue, Progress, Refused
from serving.intake.recent import RecentlyLearnt

logger = logging.getLogger("ubiquo")
MOVING = "moving"
"""The lease of whoever moves events into the log."""
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
        identities, consents, vault: who is who and what they allow, and what opens what is encrypted.
        lease: who among several processes moves events on.
        waiting, recent: what the intake shares with it.
        usable: whether an event of a customer may be used.
        show, learn: let events that were taken count in answers, and say whose they are.
        max_waiting: with half as many waiting nothing is postponed any more.
    """

    def __init__(
        self,
        *,
        inbox: EventQueue,
        log: EventLog,
        rows: CustomerRows,
        identities: Identities,
        consents: Consents,
        vault: Vault,
        lease: Lease,
        waiting: Backlog,
        recent: RecentlyLearnt,
        usable: Callable[[str, datetime], bool],
        show: Callable[[Sequence[Taken]], None],
        learn: Callable[[SealedEvent, datetime], str | None],
        max_waiting: int,
    ) -> None:
        self._inbox, self._log, self.rows, self._identities, self._vault = inbox, log, rows, identities, vault
        self._consents, self._lease, self._waiting, self._recent, self._usable = consents, lease, waiting, recent, usable
        self._show, self._learn = show, learn
        self._max_waiting = max_waiting
        self._moving, self._depth = threading.RLock(), 0
        """One thread of one process at a time moves what waits into the log."""
        self._held: Held
        self._spoilt: set[str] = set()
        """Customers whose online rows a failure left half brought up to date."""
        self._marking = threading.Lock()
        """Held while the next is looked at or changed."""
        self._disturbed: dict[str, datetime] = {}
        """Customers who gained or lost an identifier, and the last receipt given when that was noticed: until rows know that they
        are made anew, as what disturbed them may still be on its way to the log."""
        self._postponed = self._refresh_postponed = self._seen_waiting = 0
        self.follow: Follow | None = None
        """Who goes on with events that were folded."""
        self.unfollowed = 0
        """How many events have left without that, as it failed again and again."""
        self._failed_to_follow = 0
        self.elsewhere = MovedElsewhere(self._take_in)
        """What other processes have moved on."""
        recent.is_missing = lambda: self.elsewhere.is_missing
        self._touched: set[str] = set()
        """Of whom the log holds more than their windowed features know, as far as the queue was not told yet."""

    def drain_if_due(self) -> int:
        """As ``drain``; under load only now and then, so that the core is there for those who wait for an answer."""
        more, self._seen_waiting = len(self._waiting) - self._seen_waiting, len(self._waiting)
        if more > BUSY_EVENTS and len(self._waiting) < self._max_waiting // 2 and self._postponed < MAX_POSTPONED:
            self._postponed += 1
            return 0
        self._postponed = 0
        # another process may be at it
        with contextlib.suppress(LeaseTakenError), self._alone(is_patient=False):
            return self.drain()
        return 0

    @contextlib.contextmanager
    def _alone(self, is_patient: bool = True) -> Iterator[None]:
        """Nobody else moves events on, in this process or another.

        Raises:
            LeaseTakenError: another process does, and it is not to be waited for.
        """
        with self._moving, contextlib.ExitStack() as stack:
            if self._depth == 0:
                self._held = stack.enter_context(self._lease.hold(MOVING) if is_patient else self._lease.take(MOVING))
                # what another has moved meanwhile is known before anything is taken up
                self._inbox.catch_up()
                self.elsewhere.take_in()
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if self._depth == 0 and not self._held.still_held():
                    # another may have deleted meanwhile what this one has written after all
                    self._spoilt |= self.rows.written

    def drain(self) -> int:
        """Move what waits into the log, and what is new of it into the online rows, in batches; returns how many events."""
        moved = 0
        with self._alone():
            self._log.catch_up()
            self.rows.begin(self._inbox.standing().moved_until)
            more = True
            while more:
                # only as long as a pass leaves what was there when it began: under a steady stream it would never end
                taken, more = self._drain_some()
                moved += taken
        return moved

    def _drain_some(self) -> tuple[int, bool]:
        """Append what waits to the log in one commit, then fold it: a customer's row is written once however often they came."""
        # what was stored just now is not known here yet: whose it is, what it allows, that it waits
        followed = self._inbox.followed()
        refused = [each for each in self._inbox.refused(REFUSED_AT_ONCE) if each.seq <= followed]
        self._log.reject([dead for each in refused if (dead := self._dead_letter(each)) is not None])
        letters, left = self._oldest(followed)
        batch: list[Incoming] = []
        if letters:
            batch = self._read(letters)
            try:
                fresh = self._log.append(batch, self._identities).fresh
                # what lies in the log already may be of one that broke off here: whether the rows know it nobody can tell
                known = {row.event.event_id for row in batch} - {row.event.event_id for row in fresh}
                again = (self._identities.customer_of(row.event) for row in batch if row.event.event_id in known)
                self._spoilt |= {customer for customer in again if customer is not None}
            except BaseException:
                # it may lie in the log all the same, and is no news then: the rows are made anew from the log
                self._spoilt |= {customer for row in batch if (customer := self._identities.customer_of(row.event))}
                raise
            self._fold(fresh, letters[-1].received_at + TICK)
        elif self._spoilt and (until := self._inbox.standing().moved_until) is not None:
            self._fold((), until)
        self._follow(batch)
        self._inbox.drained(letters, refused, self._touched)
        self._touched = set()
        self._waiting.moved(letters, refused)
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

    def _oldest(self, followed: int) -> tuple[list[Accepted], bool]:
        """The events up to a place that have waited longest, as many as are folded at once, and whether there may be more."""
        letters: list[Accepted] = []
        for _ in range(BATCHES_FOLDED_AT_ONCE):
            more = [each for each in self._inbox.waiting(after=letters[-1].seq if letters else 0) if each.seq <= followed]
            if not more:
                return letters, False
            letters += more
        return letters, True

    def refresh_if_due(self) -> int:
        """As ``refresh_aggregates``; under load less often, as those who come again and again would be computed again and again.

        Where another process has the turn, or there is nothing to compute, nothing is waited for, nor put into the queue.
        """
        if len(self._waiting) > BUSY_EVENTS and self._refresh_postponed < MAX_REFRESH_POSTPONED:
            self._refresh_postponed += 1
            return 0
        self._refresh_postponed = 0
        if not (self._recent.ahead or self._inbox.has_to_compute()):
            return 0
        with contextlib.suppress(LeaseTakenError), self._alone(is_patient=False):
            return self.refresh_aggregates()
        return 0

    def refresh_aggregates(self) -> int:
        """Recompute the windowed features of the customers whose events have just reached the log.

        Everything received before the moment of the features is in the log when they are computed, so that a replay of
        the log at that moment finds the same.
        """
        with self._alone():
            at = self._inbox.moment()
            self.drain()
            # whoever moved on what is not in them yet, and may have ended since
            customers = self._inbox.to_compute()
            if customers:
                self.rows.compute(customers, at)
                self.rows.tell_until(at)
                # only now: a failure leaves them for the next time, as does an event that came while this one drained
                self._inbox.computed(customers, at)
            ahead, self._recent.ahead = sorted(self._recent.ahead), set()
            if ahead:
                logger.warning("%d customers have rows of a time to come, or of another version: they are made anew", len(ahead))
                self.rows.rebuild(ahead, at)
                self.rows.compute(ahead, at)
            return len(customers)

    @contextlib.contextmanager
    def standing_still(self) -> Iterator[None]:
        """Bring everything into the log, and let nothing more get there meanwhile; events are still taken into the inbox."""
        with self._alone():
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
        disturbed = (
            self._spoilt
            | self._note_disturbed(until).keys()
            | {customer for row in events if is_about_consent(row.event) and (customer := self._identities.customer_of(row.event))}
        )
        by_customer: dict[str, list[SealedEvent]] = {}
        for row in events:
            if (customer := self._identities.customer_of(row.event)) is not None:
                by_customer.setdefault(customer, []).append(row.event)
        self._touched |= disturbed | by_customer.keys()
        ordinary = {customer: theirs for customer, theirs in by_customer.items() if customer not in disturbed}
        again = disturbed | self.rows.fold(ordinary, until, self._recent.minted.__contains__, self._usable)
        if again:
            self.rows.rebuild(sorted(again), until)
        # nothing leaves the inbox, nor what is remembered, before the rows are known to tell it
        self.rows.tell_until(until)
        self._spoilt = set()
        with self._marking:
            self._disturbed = {customer: at for customer, at in self._disturbed.items() if at >= until}
        self._recent.told(by_customer, until)

    def _note_disturbed(self, until: datetime, are_made: bool = False) -> dict[str, datetime]:
        """Who gained or lost an identifier, with who did so lately; *are_made*: the rows of those disturbed before a moment know it."""
        with self._marking:
            taken = self._identities.take_disturbed()
            # afterwards: whatever disturbed them was received by then
            self._disturbed |= dict.fromkeys(taken, self._inbox.standing().received_at or until)
            if are_made:
                self._disturbed = {customer: at for customer, at in self._disturbed.items() if at >= until}
            return dict(self._disturbed)

    def recover(self) -> None:
        """After a crash: what was acknowledged and has not left the inbox counts in answers again, as if it had just come in.

        The next drain brings it into log and rows. What it told of identity, and the event itself, may have been stored already and
        have reached the rows or not, so the rows of all who had a past are made anew. What cannot be read or learnt is skipped here:
        that drain makes a dead letter of it.
        """
        found: list[Taken] = []
        self._inbox.followed_by(lambda letters: found.extend(self._take(letters)), self._moved_elsewhere)
        self.elsewhere.take_in()
        for _, customer, _ in found:
            if customer is not None and customer not in self._recent.minted:
                self._spoilt.add(customer)
        if found:
            # who was merged or parted by these events may stand in the table already, and the rows not know it yet
            self._spoilt |= self._identities.disturbed_since(found[0].received_at)
        self._inbox.followed_by(self._take, self._moved_elsewhere)

    def _take(self, letters: Sequence[Accepted]) -> list[Taken]:
        """Let what another process has stored, or this one before it ended, count in answers."""
        # an erasure takes a place in the queue, so that all look whom it hides
        self._identities.hidden.look_again()
        self._waiting.enter(letters)
        taken = []
        for letter in letters:
            try:
                event = msgspec.json.decode(letter.payload, type=SealedEvent)
            except (msgspec.DecodeError, ValueError, TypeError) as error:
                logger.error("a letter in the inbox cannot be taken up (%s)", type(error).__name__)
                continue
            taken.append(Taken(event, self._learn(event, letter.received_at), letter.received_at))
        self._show(taken)
        return taken

    def _moved_elsewhere(self, standing: Progress, is_missing: bool) -> None:
        """Another process has brought events into the log and the rows: what was remembered until then is let go.

        Where it was faster than this one could follow, what those events told is to be read from the log.
        """
        until = standing.moved_until
        assert until is not None
        self._waiting.moved_elsewhere(standing.moved)
        self._recent.told((), until)
        self.elsewhere.note(until, is_missing)

    def _take_in(self, until: datetime, is_missing: bool) -> None:
        # what this process has learnt too stands in the table now
        self._identities.refresh()
        if is_missing:
            self._consents.refresh()
        self._consents.settle(until)
        self._waiting.left_elsewhere(self._inbox.count_refused())
        # who was disturbed by what is still on its way is made anew once that is moved on
        self._note_disturbed(until, are_made=True)

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


def is_about_consent(event: SealedEvent) -> bool:
    """Whether the event changes which purposes a customer's data may be used for."""
    return event.consent is not None and bool(event.consent.purposes)
