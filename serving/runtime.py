"""Everything that one serving process holds, and the thread that does what need not be done within a request."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import pyarrow as pa
from sqlalchemy.exc import SQLAlchemyError

from features.catalogue.shop import Shop
from features.people.consent import Consents
from features.people.identity import Identities
from features.state.clock import AHEAD, Clock, WatchedClock
from features.state.disk import RESERVED_BYTES, DamagedStateError, NoSpaceError
from features.state.home import Home
from features.state.ports import SERVING, Held, Lease, LeaseLostError, LeaseTakenError, MissingStateError, UnreachableError
from features.store.decision_log import DecisionLog
from features.store.event_log import EventLog
from models.registry import ModelSettings
from serving.decide.engine import Engine
from serving.decide.reader import OnlineReader
from serving.decide.who import Who, who_is
from serving.intake.event_queue import SET_RIGHT
from serving.intake.intake import Intake
from serving.journeys.journeys import Journeys
from serving.privacy.erasure import Office
from serving.privacy.keys import Audit

logger = logging.getLogger("ubiquo")
TICK_SECONDS = 1.0
AGGREGATE_SECONDS = 5.0
"""How often the windowed features of the customers just seen are recomputed."""
SYNC_SECONDS = 0.05
"""How often promises are brought onto the disk."""
MODEL_CHECK_SECONDS = 30.0
TIDY_SECONDS, RETIRE_SECONDS = 60.0, 600.0
UNREAD = "what is known of the customer cannot be read now"
BEHIND = "what was just done may be missing, as the database cannot be reached"


class AlreadyServedError(MissingStateError):
    """Another service runs on the home."""


def give_back() -> None:
    """Give what is free of this process's memory back to the system: DuckDB, Arrow and glibc keep what a large batch once needed.

    What has survived is not looked at again: a collection of all objects holds the interpreter, and the event loop, for a tenth of a
    second and more. It is freed by its reference counts as before; only circles among long-lived objects would stay.
    """
    gc.collect()
    gc.freeze()
    pa.default_memory_pool().release_unused()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def hold(home: Home, is_shared: bool) -> Held:
    """The lease of a service of an installation, alone or shared with others; it ends with the process.

    Raises:
        AlreadyServedError: another process holds it.
    """
    try:
        return home.lease.take(SERVING, shared=is_shared)
    except LeaseTakenError:
        raise AlreadyServedError(
            f"another service runs on {home.place}, or an erasure: end it first, or give another UBIQUO_HOME"
        ) from None


class Turns:
    """Chores of which one service at a time has each: it keeps it as long as it lives, and another takes it up then."""

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self._held: dict[str, Held] = {}
        self._lock = threading.Lock()

    def taken(self, name: str, chore: Callable[[], Any]) -> Callable[[], Any]:
        """The *chore*, done only where this service has it, or nobody."""

        def do() -> Any:
            return chore() if self._has(name) else None

        return do

    def _has(self, name: str) -> bool:
        with self._lock:
            if name in self._held and not self._held[name].still_held():
                # the connection that held it was lost, and another may have it by now
                with contextlib.suppress(LeaseLostError):
                    self._held.pop(name).close()
            if name not in self._held:
                with contextlib.suppress(LeaseTakenError):
                    self._held[name] = self._lease.take(name)
            return name in self._held

    def close(self) -> None:
        """Leave them to others."""
        with self._lock:
            for held in self._held.values():
                with contextlib.suppress(LeaseLostError):
                    held.close()
            self._held.clear()


class Parts(NamedTuple):
    """What a running service consists of."""

    home: Home
    shop: Shop
    held: Held
    is_shared: bool
    """Whether other services may run on the same state."""
    clock: Clock
    log: EventLog
    is_ahead: bool
    """Whether the log holds events known only from a time to come."""
    identities: Identities
    consents: Consents
    engine: Engine
    decisions: DecisionLog
    intake: Intake
    office: Office
    audit: Audit
    reader: OnlineReader
    journeys: Journeys


class Failure(NamedTuple):
    """How often in a row a chore has failed, why, and whether that is because a server elsewhere cannot be reached."""

    times: int
    why: str
    is_elsewhere: bool


class Worker:
    """A thread that does what need not be done within a request, each chore in its turn.

    Args:
        name: of the thread.
        chores: their names, what to do, and every how many seconds.
        tick: how often it looks what is due, in seconds.
    """

    def __init__(self, name: str, chores: Sequence[tuple[str, Callable[[], Any], float]], tick: float = TICK_SECONDS) -> None:
        self._chores, self._tick = chores, tick
        self.failures: dict[str, Failure] = {}
        """How often in a row a chore has failed, and why."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether it goes on."""
        return self._thread.is_alive()

    def told(self) -> list[tuple[Failure, str]]:
        """The chores that fail again and again, in words."""
        failing = [(name, failure) for name, failure in dict(self.failures).items() if failure.times >= 3]
        return [(failure, f"{name} has failed {failure.times} times in a row: {failure.why}") for name, failure in failing]

    def close(self) -> None:
        """End after the chore at hand."""
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        due = {name: time.monotonic() for name, _, _ in self._chores}
        while not self._stop.wait(self._tick):
            for name, chore, seconds in self._chores:
                if time.monotonic() < due[name]:
                    continue
                due[name] = time.monotonic() + seconds
                try:
                    chore()
                    self.failures.pop(name, None)
                except Exception as error:
                    # it is tried again when next due, and keeps no other chore from its turn; nothing waiting is lost,
                    # as an event leaves the inbox only once it is in the log
                    before = self.failures[name].times if name in self.failures else 0
                    self.failures[name] = Failure(before + 1, f"{type(error).__name__}: {error}"[:200], isinstance(error, UnreachableError))
                    if isinstance(error, (NoSpaceError, DamagedStateError)):
                        logger.error("%s failed; it will be tried again: %s", name, error)
                    else:
                        logger.exception("%s failed; it will be tried again", name)


class Runtime:
    """Everything that one serving process holds, and the threads that do what need not be done within a request."""

    def __init__(self, parts: Parts) -> None:
        self.home, self.currency, self.phone_region = parts.home, parts.shop.currency, parts.shop.phone_region
        self.clock, self._log, self._held, self._ahead = parts.clock, parts.log, parts.held, parts.is_ahead
        self.identities, self.consents, self.engine = parts.identities, parts.consents, parts.engine
        self.decisions, self.intake, self.contacts = parts.decisions, parts.intake, parts.intake.contacts
        self.office, self.audit, self.reader = parts.office, parts.audit, parts.reader
        self.journeys = parts.journeys
        self.is_shared = parts.is_shared
        self.behind: str | None = None
        """Why answers may lack what was just done."""
        self.office.resume()
        turns = self._turns = Turns(self.home.lease)
        chores: list[tuple[str, Callable[[], Any], float]] = [
            ("moving events to the log", self.intake.drain_if_due, TICK_SECONDS),
            ("flushing decisions", self.decisions.flush_if_due, TICK_SECONDS),
            ("recomputing aggregates", self.intake.refresh_if_due, AGGREGATE_SECONDS),
            ("taking up broken erasures", self.office.resume, MODEL_CHECK_SECONDS),
            ("purging files of who was erased", self.office.purge_if_due, MODEL_CHECK_SECONDS),
            ("looking for new champions", self._refresh_models, MODEL_CHECK_SECONDS),
            # an import by another process makes customers known that this one has not met
            ("looking for new customers", self._refresh_customers, MODEL_CHECK_SECONDS),
            ("tidying the log", turns.taken("tidying", self._log.maintain), TIDY_SECONDS),
            ("retiring old events", turns.taken("tidying", self._retire), RETIRE_SECONDS),
            ("tidying the decisions", turns.taken("tidying", self.decisions.maintain), TIDY_SECONDS),
            ("giving memory back", give_back, TIDY_SECONDS),
        ]
        if self.is_shared:
            chores.append(("keeping the lease of a service", self._keep_lease, AGGREGATE_SECONDS))
        self._worker = Worker("ubiquo-background", chores)
        steps: list[tuple[str, Callable[[], Any], float]] = [
            ("moving journeys on", turns.taken("journeys", self.journeys.step), TICK_SECONDS),
            ("reading the journeys", self.journeys.refresh, MODEL_CHECK_SECONDS),
            ("tidying the journeys", turns.taken("journeys", self.journeys.tidy), TIDY_SECONDS),
        ]
        following: list[tuple[str, Callable[[], Any], float]] = [
            ("following other services", self._catch_up, TICK_SECONDS),
            ("relieving silent services", self.home.relieve, AGGREGATE_SECONDS),
        ]
        # a receiver that is slow holds up neither steps nor events
        self._others = [
            Worker("ubiquo-journeys", steps),
            Worker("ubiquo-outbox", [("sending messages", turns.taken("outbox", self.journeys.send), TICK_SECONDS)]),
            # little at a time, so that no decision waits long for the disk
            # also where nobody asks: what others take must not pile up
            *([Worker("ubiquo-following", following)] if self.is_shared else []),
            Worker("ubiquo-promises", [("bringing promises onto the disk", self.engine.governor.sync, SYNC_SECONDS)], SYNC_SECONDS),
        ]

    def close(self) -> None:
        """Stop the background work, having brought everything into the logs."""
        for worker in (*self._others, self._worker):
            worker.close()
        self.office.close()
        self.intake.close()
        self.journeys.close()
        self.decisions.close()
        self._turns.close()
        with contextlib.suppress(LeaseLostError):
            self._held.close()

    @property
    def log(self) -> EventLog:
        """The log, for who reads it or takes dead letters out."""
        return self._log

    def problems(self) -> list[str]:
        """Why events cannot be taken, or answers not be trusted: empty where all is well."""
        found = [told for failure, told in self._worker.told() if not failure.is_elsewhere]
        if not self._worker.is_alive:
            found.append("the background work has ended: restart the service")
        if not self.intake.inbox.is_open:
            found.append("the inbox takes no events: restart the service")
        last = self.intake.inbox.standing().received_at
        if self.is_shared and last is not None and last > self.clock() + AHEAD:
            found.append(f"the queue's last receipt is of {last.isoformat()}, and events are refused here: {SET_RIGHT}")
        free = self.home.free_bytes()
        if free < RESERVED_BYTES:
            found.append(f"the disk has {free // 1_000_000} MB left: events are refused until there is room")
        if isinstance(self.clock, WatchedClock) and self.clock.leap:
            found.append(f"the machine's clock leapt by {self.clock.leap}: set it right, or restart the service to follow it")
        return found

    def degraded(self) -> list[str]:
        """What answers less than it should."""
        found = [f"{kind}: {why}" for kind, why in self.engine.broken.items()]
        found += [] if self.behind is None else [f"{self.behind}: events are refused meanwhile"]
        # a server that cannot be reached here answers no other service either: to send callers elsewhere would help nobody
        found += [told for failure, told in self._worker.told() if failure.is_elsewhere]
        found += self.journeys.degraded()
        for worker in self._others:
            found += [told for _, told in worker.told()]
            if not worker.is_alive:
                found.append("the work on journeys, messages, promises or other services has ended: restart the service")
        if failing := self.office.failing():
            found.append(f"{len(failing)} erasures have broken off and are tried again; the log says why: {', '.join(failing[:3])}")
        if self.intake.unfollowed:
            found.append(f"{self.intake.unfollowed} events were not seen by the journeys")
        found += [f"{kind}: no champion" for kind in self.engine.missing() if kind not in self.engine.broken]
        if self._ahead:
            found.append("the log holds events known only from a time to come: a clock was wrong (python -m features repair --clock)")
        if self.decisions.unlogged:
            found.append(f"{self.decisions.unlogged} decisions could not be kept")
        return found

    def _retire(self) -> int:
        days = self.home.settings.keep_days
        return self._log.retire(self.clock() - timedelta(days=days)) if days else 0

    def _keep_lease(self) -> None:
        if not self._held.still_held():
            # the connection that held it was lost; while an erasure from outside has it this fails, and readyz says so
            with contextlib.suppress(OSError, RuntimeError):
                self._held.close()
            self._held = hold(self.home, is_shared=True)

    def catch_up(self) -> None:
        """Know what any service had taken before this was called. Where that cannot be told, ``behind`` says why, until it can again."""
        if not self.is_shared or self.behind is not None:
            return
        try:
            self.intake.catch_up()
        except (OSError, SQLAlchemyError, DamagedStateError) as error:
            # what is known already is answered from; the background tries again
            self.behind = BEHIND
            logger.error("what other services have taken cannot be read: %s", error)

    def _catch_up(self) -> None:
        try:
            self.intake.catch_up()
        except BaseException:
            self.behind = BEHIND
            raise
        self.behind = None
        self.intake.take_in()

    def row(
        self, model: ModelSettings, customer_id: str | None, as_of: datetime, more: Sequence[str] = ()
    ) -> tuple[Mapping[str, Any], str | None]:
        """What a model is told of a customer, and what may be missing in it; nothing where their rows cannot be reached."""
        behind = self.behind if customer_id is not None else None
        try:
            return self.reader.row(model, customer_id, as_of, more), behind
        except UnreachableError as error:
            logger.error("a customer is answered as one of whom nothing is known: %s", error)
            return {}, UNREAD

    def who(self, customer_id: str | None) -> Who:
        """The customer with what they allow now."""
        return who_is(self.identities, self.consents, customer_id)

    def _refresh_customers(self) -> None:
        # before who is known by numbers that were read in it
        self.phone_region = self.intake.refresh_region()
        self.identities.refresh()
        self.consents.refresh()

    def _refresh_models(self) -> None:
        for label in self.engine.refresh():
            logger.info("now serving %s", label)
