"""Erasure and export of one customer, over every place that holds anything of theirs, with a proof by search."""

from __future__ import annotations

import contextlib
import logging
import threading
import time as time_module
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from dataclasses import replace
from functools import reduce

import msgspec

from features.catalogue.shop import Shop
from features.people.tombstones import Tombstones
from features.state.clock import Clock
from features.state.home import Home
from features.state.ports import DERIVED, LOG, LeaseTakenError
from features.store.decision_log import DecisionLog
from features.store.duckdb_compute import clear_spills
from features.store.event_log import EventLog
from features.store.keyed_state import KeyedState
from features.store.profile import UnknownCustomerError, events_of
from models.registry import Registry
from serving.decide.ledger import Ledger
from serving.intake.intake import Intake
from serving.journeys.runs import Runs
from serving.privacy.held_files import BatchFiles, Snapshots
from serving.privacy.holdings import (
    ContactTable,
    DeadLetterTable,
    Decisions,
    Events,
    IdentityTable,
    JourneyTable,
    OnlineRows,
    Place,
    Promises,
    RunTables,
    Stages,
    Subject,
    Waiting,
)
from serving.privacy.nightly import Nightly
from serving.privacy.orders import Order, Orders, Receipt
from serving.privacy.proof import prove

LET_GO_SECONDS = 0.05
ORDERING, ERASING = "ordering", "erasing"
"""Leases: of whoever writes an erasure down, and of whoever carries them out."""
logger = logging.getLogger("ubiquo")


class BusyHomeError(ValueError):
    """A service runs on the home, and holds in memory what is to go."""


class Office:
    """Everything of one home that an erasure or an export reaches."""

    def __init__(
        self,
        home: Home,
        clock: Clock,
        store: KeyedState,
        intake: Intake,
        decisions: DecisionLog,
        registry: Registry,
        purge_at: str | None = None,
    ) -> None:
        """Open the office; *purge_at* is the shop's own time of day at which files are purged, ``HH:MM``, or '' for at once."""
        shop, identities = Shop.load(home), intake.identities
        self._nightly = Nightly.at(home.settings.purge_at if purge_at is None else purge_at, shop.timezone)
        self._home, self._clock, self._identities, self._intake = home, clock, identities, intake
        # the intake's own: it remembers which identifiers are kept already
        self._contacts = intake.contacts
        self._tombstones = Tombstones(home, identities.vault)
        self._decisions = Decisions(decisions)
        self._log = EventLog(home, shop.timezone)
        self._online = OnlineRows(store)
        # the identity table goes last: a repeated erasure finds by it what a broken one has left
        self.places: list[Place] = [
            Events(home), Waiting(intake.inbox), DeadLetterTable(self._log), Snapshots(home), self._online, self._decisions,
            BatchFiles(home), RunTables(registry), Stages(home), ContactTable(self._contacts), Promises(Ledger(home)),
            JourneyTable(Runs(home)), IdentityTable(identities),
        ]  # fmt: skip
        self._orders = Orders(home.root / "erasures", identities.vault, self._tombstones)
        # one at a time
        self._hands = ThreadPoolExecutor(1, "ubiquo-erasure")
        self._running: dict[str, Future[Receipt]] = {}
        self._ordering = threading.Lock()
        self._closing = threading.Event()

    def subject(self, customer_id: str) -> Subject:
        """All that the customer is known by.

        Raises:
            UnknownCustomerError: nobody is known by that id.
        """
        subject = Subject.of(self._home, self._identities, self._contacts, customer_id)
        if subject is None:
            raise UnknownCustomerError("no customer is known by that id")
        return subject

    def export(self, customer_id: str) -> Iterator[bytes]:
        """Everything held of them, as JSON Lines, each with the place that holds it.

        Raises:
            UnknownCustomerError: nobody is known by that id.
        """
        self._intake.drain()
        subject = self.subject(customer_id)
        for place in self.places:
            for row in place.find(subject):
                yield msgspec.json.encode({"place": place.name, **row}, enc_hook=str) + b"\n"

    def erase(self, customer_id: str) -> Receipt:
        """Take them out of every place now, and search for what is left.

        Raises:
            UnknownCustomerError: nobody is known by that id.
        """
        receipt_id = self.begin(customer_id)
        if self._nightly is not None:
            self.purge()
        return self.receipt(receipt_id, timeout=None)

    def begin(self, customer_id: str) -> str:
        """Raise their tombstones and let nobody see anything of theirs from now on; returns the receipt's id.

        That costs what their own data costs, however much the files hold. Those are purged at once in the background, or together with
        others' when it is time. Nothing of theirs comes in until that is done and they begin anew. A crash is made good by
        ``resume``, and so is whatever fails once the order is written for good.

        Raises:
            UnknownCustomerError: nobody is known by that id.
        """
        receipt_id = uuid.uuid4().hex
        try:
            with self._ordering, self._home.lease.hold(ORDERING):
                self._ask_for(receipt_id, customer_id)
            if self._nightly is None:
                self.purge()
        except BaseException as error:
            if (asked := self._running.get(receipt_id)) is None:
                raise
            _fail(asked, error)
            if not isinstance(error, Exception):
                raise
            # whoever asked has the receipt's id, and need not ask again
            logger.exception("erasure %s broke off; it will be tried again", receipt_id)
        return receipt_id

    def _ask_for(self, receipt_id: str, customer_id: str) -> None:
        """Write the order and carry out what can be done at once; from the first writing on it is one of those that run."""
        self._intake.drain()
        # by the queue's time: later than everything of theirs that came in anywhere, whatever the clocks of other machines say
        subject, at = self.subject(customer_id), self._intake.inbox.moment()
        self._orders.write(receipt_id, subject, at)
        self._running[receipt_id] = Future()
        self._tombstones.add(subject.keys, at)
        # what came in before the tombstones stood is theirs too, from here or by an import that is just storing it
        self._intake.drain()
        with self._home.lease.hold(LOG):
            self._identities.refresh()
        now = Subject.of(self._home, self._identities, self._contacts, customer_id)
        if now is not None and now.customer_ids[0] == subject.customer_ids[0]:
            subject = subject.joined(now)
        self._orders.write(receipt_id, subject, at)
        self._tombstones.add(subject.keys, at)
        self._orders.write(receipt_id, subject, at, self._hide(subject))
        # other services look whom it hides before they answer next
        self._intake.inbox.moment()

    def _hide(self, subject: Subject) -> dict[str, int]:
        """What can be done at once: readers see nothing of theirs, what is personal and what answers is deleted; returns how much."""
        self._identities.hidden.add(subject.keys, subject.customer_ids, subject.event_ids)
        self._intake.forget(subject.customer_ids, subject.keys)
        contacts = self._contacts.erase([*subject.keys, *subject.lost])
        return {ContactTable.name: contacts, self._online.name: self._online.delete(subject)}

    def purge(self) -> None:
        """Have every erasure that was asked for carried out in the background, all in one run."""
        self._hands.submit(self._purge)

    def purge_if_due(self) -> bool:
        """Have the night's run begin, if it is time; returns whether it was."""
        due = self._nightly is not None and self._nightly.is_due(self._clock())
        if due:
            self.purge()
        return due

    def resume(self) -> list[str]:
        """Take up the erasures that a crash or a failure broke off; returns the receipts' ids of those that go on."""
        with contextlib.ExitStack() as held:
            # whoever carries them out holds these, and lets go a moment after it has told how that went
            for is_last in (False,) * 5 + (True,):
                try:
                    held.enter_context(self._home.lease.take(ERASING))
                    break
                except LeaseTakenError:
                    if is_last:
                        return []
                    time_module.sleep(LET_GO_SECONDS)
            held.enter_context(self._ordering)
            try:
                held.enter_context(self._home.lease.take(ORDERING))
            except LeaseTakenError:
                return []
            taken_up = [
                order.receipt_id
                for order, subject in self._orders.pending()
                if not self._is_under_way(order.receipt_id) and self._is_taken_up(order, subject)
            ]
        if taken_up and self._nightly is None:
            self.purge()
        return taken_up

    def _is_taken_up(self, order: Order, subject: Subject) -> bool:
        """Whether a broken erasure goes on; one that fails again keeps no other from it."""
        asked = self._running[order.receipt_id] = Future()
        try:
            # the crash may have come before they were hidden, and the night may be far
            self._tombstones.add(subject.keys, order.at)
            self._hide(subject)
        except BaseException as error:
            _fail(asked, error)
            if not isinstance(error, Exception):
                raise
            logger.exception("erasure %s broke off again; it will be tried again", order.receipt_id)
            return False
        return True

    def _is_under_way(self, receipt_id: str) -> bool:
        running = self._running.get(receipt_id)
        return running is not None and not (running.done() and running.exception() is not None)

    def failing(self) -> list[str]:
        """The receipts' ids of erasures that broke off here and are tried again."""
        failed = [receipt_id for receipt_id, asked in list(self._running.items()) if asked.done() and asked.exception() is not None]
        return [receipt_id for receipt_id in failed if self._orders.is_pending(receipt_id)]

    def receipt(self, receipt_id: str, timeout: float | None = 0.0) -> Receipt:
        """The receipt of an erasure, waited for so many seconds (None: to the end, or to its failure).

        Raises:
            TimeoutError: it is not done yet, or failed and will be tried again.
            LookupError: there is no such erasure.
        """
        running = self._running.get(receipt_id)
        if not receipt_id.isalnum():
            raise LookupError("there is no receipt of that id")
        # whoever carried it out, and whatever became of others that were carried out with it
        found = self._orders.receipt(receipt_id)
        if running is not None and (found is None or _is_done(running)):
            if timeout is not None and running.exception(timeout) is not None:
                raise TimeoutError("the erasure failed and will be tried again")
            return running.result(timeout)
        if found is not None:
            return found
        if self._orders.is_pending(receipt_id):
            raise TimeoutError("another service carries it out")
        raise LookupError("there is no receipt of that id")

    def close(self) -> None:
        """Finish what was begun; what still waits for others is taken up at the next start."""
        self._closing.set()
        self._hands.shutdown()
        self._tombstones.close()

    def _purge(self) -> None:
        try:
            with self._held(ERASING, "another service carries erasures out"):
                self._purge_asked()
        except BaseException as error:
            if isinstance(error, InterruptedError):
                logger.warning("erasures wait for the next start: %s", error)
            else:
                logger.exception("erasures could not be carried out; they will be tried again")
            for receipt_id, asked in list(self._running.items()):
                if not asked.done() and self._orders.is_pending(receipt_id):
                    _fail(asked, error)

    def _purge_asked(self) -> None:
        with self._ordering, self._held(ORDERING, "another service writes an erasure down"):
            # none that is half asked for
            asked = list(self._orders.pending())
        orders = [order for order, _ in asked]
        if not orders:
            return
        promised = [self._running.setdefault(order.receipt_id, Future()) for order in orders]
        for k, future in enumerate(promised):
            if future.done():
                promised[k] = self._running[orders[k].receipt_id] = Future()
        try:
            receipts = self._carried_out(orders, [subject for _, subject in asked])
        except BaseException as error:
            logger.exception("erasures %s broke off; they will be tried again", ", ".join(order.receipt_id for order in orders))
            for future in promised:
                _fail(future, error)
            return
        for future, receipt in zip(promised, receipts, strict=True):
            # one whose asking has failed meanwhile was told so
            with contextlib.suppress(InvalidStateError):
                future.set_result(receipt)

    @contextlib.contextmanager
    def _held(self, name: str, why: str) -> Iterator[None]:
        """Hold a lease, having waited for it as long as the service runs.

        Raises:
            InterruptedError: the service ended before that came about.
        """
        while True:
            with contextlib.suppress(LeaseTakenError):
                guard = self._home.lease.take(name)
                break
            if self._closing.wait(LET_GO_SECONDS):
                raise InterruptedError(f"{why}; what was asked for is carried out at the next start")
        with guard:
            yield

    def _empty(self, subject: Subject) -> dict[str, int]:
        """Take them out of every place, even if one fails; out of the identity table only if none did, as they are found by it."""
        counts: dict[str, int] = {}
        errors: list[Exception] = []
        for place in self.places:
            if errors and isinstance(place, IdentityTable):
                break
            try:
                counts[place.name] = place.erase(subject)
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return counts

    def _carried_out(self, orders: Sequence[Order], subjects: Sequence[Subject]) -> list[Receipt]:
        """Take all of them out of every place in one run, and prove it by one search."""
        pending = {self._orders.path(order.receipt_id) for order in orders}
        for order, subject in zip(orders, subjects, strict=True):
            # a crash may have come before the tombstones, or before they were hidden
            self._tombstones.add(subject.keys, order.at)
            self._hide(subject)
        everybody = reduce(Subject.joined, subjects)
        with self._held(DERIVED, "somebody still writes what follows from the log"):
            with self._intake.standing_still():
                # a broken order may not have seen what was stored last; from the tombstones on nothing is
                late = events_of(self._log, everybody.keys)
                everybody = everybody.joined(replace(everybody, event_ids=late))
                counts = self._empty(everybody)
                for name in counts:
                    counts[name] += sum(order.at_once.get(name, 0) for order in orders)
            self._intake.forget(everybody.customer_ids, everybody.keys)
            clear_spills(self._home)
            # other services forget them before they are hidden no more
            self._intake.inbox.moment()
            # until a moment ago they were still known, and may have been answered, by other services too
            counts[self._decisions.name] += self._decisions.erase_everywhere(everybody)
            # nothing holds them any more: nothing need be hidden
            self._identities.hidden.remove(everybody.keys, everybody.customer_ids, everybody.event_ids)
            proof = prove(self._home, everybody, leaving_out=pending)
        receipts = []
        for order, subject in zip(orders, subjects, strict=True):
            receipt = Receipt(order.receipt_id, order.at, counts, len(subject.keys), proof, len(orders))
            # whatever the proof says, for the receipt tells it: carried out again it would take what they are by then
            self._orders.end(order, subject, receipt)
            receipts.append(receipt)
        return receipts


def _fail(asked: Future[Receipt], error: BaseException) -> None:
    """End what was asked for by an error, unless it has ended."""
    with contextlib.suppress(InvalidStateError):
        asked.set_exception(error)


def _is_done(asked: Future[Receipt]) -> bool:
    """Whether what was asked for has been carried out here."""
    return asked.done() and asked.exception() is None
