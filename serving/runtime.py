"""Everything that one serving process holds, and the thread that does what need not be done within a request."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from features.clock import Clock, clock_from_environment
from features.consent import Consents, standing
from features.decision_log import DecisionLog
from features.event_log import EventLog
from features.home import Home
from features.identity import Identities
from features.shop import Shop
from features.store import FeatureStore
from serving.engine import Engine, OnlineReader, Who
from serving.erasure import Office
from serving.inbox import Inbox
from serving.intake import Intake
from serving.keys import Audit

logger = logging.getLogger("ubiquo")
TICK_SECONDS = 1.0
AGGREGATE_SECONDS = 5.0
"""How often the windowed features of the customers just seen are recomputed."""
MODEL_CHECK_SECONDS = 30.0


class Runtime:
    """Everything that one serving process holds, and the thread that does what need not be done within a request."""

    def __init__(self, home: Home, clock: Clock | None = None) -> None:
        shop = Shop.load(home)
        inbox = Inbox(home)
        self.home, self.currency, self.phone_region = home, shop.currency, shop.phone_region
        # whoever erases from outside must know that a service remembers
        self._held = home.held("serving")
        latest = [t for t in (EventLog(home, shop.timezone).latest_received(), inbox.last_received()) if t is not None]
        inbox.close()
        self.clock = clock or clock_from_environment(not_before=max(latest, default=None))
        self.identities = Identities(home)
        self.consents = Consents(home, shop.consent)
        writer = FeatureStore(home)
        writer.apply()
        # a connection of its own: a reader must not see, nor wait within, what the intake is writing
        self.engine = Engine(home)
        self.decisions = DecisionLog(home)
        self.intake = Intake(home, self.clock, writer, self.identities, self.consents)
        self.contacts = self.intake.contacts
        self.office = Office(home, self.clock, writer, self.intake, self.decisions)
        self.office.resume()
        self.audit = Audit(home, self.identities.vault)
        self.reader = OnlineReader(FeatureStore(home), self.intake.fresh)
        self._chores: list[tuple[str, Callable[[], Any], float]] = [
            ("moving events to the log", self.intake.drain_if_due, TICK_SECONDS),
            ("flushing decisions", self.decisions.flush, TICK_SECONDS),
            ("recomputing aggregates", self.intake.refresh_aggregates, AGGREGATE_SECONDS),
            ("taking up broken erasures", self.office.resume, MODEL_CHECK_SECONDS),
            ("looking for new champions", self._refresh_models, MODEL_CHECK_SECONDS),
            # an import by another process makes customers known that this one has not met
            ("looking for new customers", self._refresh_customers, MODEL_CHECK_SECONDS),
        ]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="ubiquo-background", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the background work, having brought everything into the logs."""
        self._stop.set()
        self._thread.join()
        self.office.close()
        self.intake.close()
        self.decisions.close()
        self._held.close()

    def _work(self) -> None:
        due = {name: time.monotonic() for name, _, _ in self._chores}
        while not self._stop.wait(TICK_SECONDS):
            for name, chore, seconds in self._chores:
                if time.monotonic() < due[name]:
                    continue
                due[name] = time.monotonic() + seconds
                try:
                    chore()
                except Exception:
                    # it is tried again when next due, and keeps no other chore from its turn; nothing waiting is lost,
                    # as an event leaves the inbox only once it is in the log
                    logger.exception("%s failed; it will be tried again", name)

    def who(self, customer_id: str | None) -> Who:
        """The customer with what she allows now."""
        if customer_id is None:
            return Who(None, True, self.consents.forbidden_channels(()))
        customer_id = self.identities.current(customer_id)
        if not self.identities.members(customer_id):
            # whatever text was sent: what nobody is known by is not repeated, nor logged
            return Who(None, True, self.consents.forbidden_channels(()))
        allowed = standing(self.consents, self.identities, customer_id)
        return Who(customer_id, allowed.personalization, allowed.forbidden_channels)

    def _refresh_customers(self) -> None:
        self.identities.refresh()
        self.consents.refresh()

    def _refresh_models(self) -> None:
        for label in self.engine.refresh():
            logger.info("now serving %s", label)
