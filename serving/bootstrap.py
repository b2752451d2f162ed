"""What stands behind each port of the service: the one place that chooses engines and hands them in."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from features.catalogue.shop import Shop
from features.people.consent import Consents
from features.people.identity import Identities
from features.people.vault import Vault
from features.state.clock import AHEAD, Clock, clock_of, system_clock
from features.state.home import Home
from features.state.ports import SERVING, LeaseTakenError
from features.store.decision_log import DecisionLog
from features.store.event_log import EventLog
from features.store.feature_store import FeatureStore
from models.registry import Registry, RegistrySettings, load_settings
from serving.decide.engine import Engine
from serving.decide.reader import OnlineReader
from serving.intake.event_queue import ClocksApartError
from serving.intake.inbox import Inbox
from serving.intake.intake import Intake
from serving.intake.queue_asked import follow_own_clock, last_receipt, last_received
from serving.journeys.desk import JourneyDesk
from serving.journeys.journeys import Journeys
from serving.privacy.erasure import BusyHomeError, Office
from serving.privacy.keys import Audit
from serving.runtime import Parts, Runtime, hold

logger = logging.getLogger("ubiquo")


def model_settings(home: Home) -> RegistrySettings:
    """The ``mlflow.yaml`` of an installation."""
    return load_settings(home.root, home.settings.models_file, home.settings.tracking_uri)


def open_engine(home: Home) -> Engine:
    """The champions of an installation."""
    return Engine(home, Registry(model_settings(home)))


def start(home: Home, clock: Clock | None = None) -> Runtime:
    """The one service of an installation, with its work in the background begun.

    Raises:
        AlreadyServedError: another service, or an erasure, runs on it.
        ClocksApartError: this machine's clock is not that of the others.
        DamagedStateError, NoSpaceError: as the message says.
    """
    shop = Shop.load(home)
    is_shared = home.settings.shared or bool(home.settings.database)
    if is_shared and clock is None and home.settings.clock == "system":
        check_clocks(home, system_clock)
    # whoever serves or erases from outside must know that a service remembers
    held = hold(home, is_shared)
    home.check_room()
    # before anything is read: a wrong secret, what a power cut left, what is damaged
    Vault.open(home)
    log = EventLog(home, shop.timezone)
    log.recover()
    latest = max((t for t in (log.latest_received(), last_received(home)) if t is not None), default=None)
    # a clock of its own that runs on goes before no receipt
    clock = clock or clock_of(home.settings, max((t for t in (latest, last_receipt(home)) if t is not None), default=None))
    inbox = Inbox(home, clock)
    identities, consents = Identities(home), Consents(home, shop.consent)
    engine = open_engine(home)
    # Feast writes its registry in one file, which others read
    with home.lease.hold("registry"):
        writer = FeatureStore(home, engine.services())
        writer.apply()
    decisions = DecisionLog(home)
    intake = Intake(home, clock, inbox, writer, identities, consents)
    with home.lease.hold("registry"):
        # a connection of its own: a reader must not see, nor wait within, what the intake is writing
        reader = OnlineReader(FeatureStore(home, engine.services()), shop.timezone, intake.recent)
        steps = OnlineReader(FeatureStore(home, engine.services()), shop.timezone, intake.recent)
    desk = JourneyDesk(home, engine, steps, decisions, identities, consents, intake.contacts, intake.accept, engine.governor.release)
    journeys = Journeys(home, engine, desk, clock, identities.vault)
    intake.followed_by(journeys.follow)
    return Runtime(
        Parts(
            home=home,
            shop=shop,
            held=held,
            is_shared=is_shared,
            clock=clock,
            log=log,
            is_ahead=latest is not None and latest > clock() + AHEAD,
            identities=identities,
            consents=consents,
            engine=engine,
            decisions=decisions,
            intake=intake,
            office=Office(home, clock, writer, intake, decisions, engine.registry),
            audit=Audit(home, identities.vault),
            reader=reader,
            journeys=journeys,
        )
    )


def check_clocks(home: Home, clock: Clock) -> None:
    """See that a service may join the others: from its first moment on its clock dates what all of them take.

    Where nobody else is there, it follows its own clock, though the queue's last receipt was given by one far ahead.

    Raises:
        ClocksApartError: its clock is not that of the database server.
    """
    told = home.time_of_server()
    if told is not None and abs(told - clock()) > AHEAD:
        raise ClocksApartError(
            f"this machine's clock says {clock().isoformat()}, the database server's {told.isoformat()}: set both right, then start again"
        )
    last = last_receipt(home)
    if last is not None and last > clock() + AHEAD:
        with contextlib.suppress(LeaseTakenError), home.lease.take(SERVING):
            logger.warning("the queue's last receipt, of %s, was given by a wrong clock: this machine's is followed", last.isoformat())
            follow_own_clock(home, clock)


@contextlib.contextmanager
def open_office(home: Home, clock: Clock, purge_at: str = "") -> Iterator[Office]:
    """The office of an installation that no service runs on; nobody waits for a night that this process does not see, unless told to.

    Raises:
        BusyHomeError: a service runs on it, and would go on with what it has in memory.
    """
    try:
        guard = home.lease.take(SERVING)
    except LeaseTakenError:
        raise BusyHomeError("a service runs on this home: ask it (DELETE or GET /v1/customers/{id}), or end it first") from None
    with guard:
        registry = Registry(model_settings(home))
        store, identities, decisions = FeatureStore(home), Identities(home), DecisionLog(home)
        store.apply()
        intake = Intake(home, clock, Inbox(home, clock), store, identities, Consents(home, Shop.load(home).consent))
        try:
            office = Office(home, clock, store, intake, decisions, registry, purge_at)
            office.resume()
            yield office
            office.close()
        finally:
            intake.close()
            decisions.close()
