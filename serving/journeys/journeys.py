"""The journeys of one home at work: the file that declares them, who goes on with events, and what is due."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from zoneinfo import ZoneInfo

from features.catalogue.shop import Shop
from features.catalogue.yaml_file import WrittenError
from features.definitions.domain import domain_named
from features.events.event import EVENT_NAMES
from features.people.vault import Vault
from features.state.clock import Clock, microseconds
from features.state.home import Home
from serving.decide.engine import Engine
from serving.intake.draining import Followed
from serving.journeys.desk import JourneyDesk
from serving.journeys.outbox import Sender
from serving.journeys.plan import JOURNEYS, JourneysFile, Plans, seconds_of
from serving.journeys.runner import Runner
from serving.journeys.runs import DAY, KEPT_DAYS, Runs

logger = logging.getLogger("ubiquo")


def plans_of(home: Home, engine: Engine) -> Plans:
    """The journeys as they are written now.

    Raises:
        WrittenError: the file has a mistake; the message names line, field and fix.
    """
    events = frozenset((*EVENT_NAMES, *domain_named(Shop.load(home).domain).events))
    return Plans.read(home.root / JOURNEYS, engine.governor.vocabulary, events)


class Journeys:
    """Starts, moves on and ends journeys, and sends what they decide. A mistake in the file leaves the last good one in force.

    Raises:
        WrittenError: there is a mistake in the file from the beginning.
    """

    def __init__(self, home: Home, engine: Engine, desk: JourneyDesk, clock: Clock, vault: Vault) -> None:
        self._home, self._engine, self._clock = home, engine, clock
        self.runs = Runs(home)
        self.broken: str | None = None
        """Why the file as it is written is not in force."""
        none = Plans(JourneysFile(), engine.governor.vocabulary)
        self.runner = Runner(self.runs, none, engine.governor.vocabulary, desk, ZoneInfo(Shop.load(home).timezone))
        self.sender = Sender(self.runs.outgoing, desk, vault.webhook_key, lambda: self.runner.plans, clock)
        # as the policy: with a mistake in the file the service does not start
        self.runner.plans = plans_of(home, engine)

    def refresh(self) -> None:
        """Read the file again."""
        try:
            plans = plans_of(self._home, self._engine)
        except (WrittenError, OSError) as error:
            if self.broken != (why := f"the journeys before stay in force: {error}"):
                logger.error("%s", why)
            self.broken = why
            return
        self.broken = None
        self.runner.plans, self.runner.vocabulary = plans, self._engine.governor.vocabulary

    def follow(self, events: Sequence[Followed]) -> None:
        """Take in events on their way out of the inbox; the same again change nothing."""
        _, stocks = self._engine.limited()
        if stocks or self._engine.governor.gives:
            decisions = sorted({event.event.decision_id for event in events if event.event.decision_id})
            redeemed = [
                (event.event.event_id, event.event.offer_id)
                for event in events
                if event.event.name == "offer_redeem" and event.event.offer_id in stocks
            ]
            if decisions or redeemed:
                self._engine.governor.reached(decisions, [(name, offer) for name, offer in redeemed if offer is not None])
        self.runner.follow(events)

    def step(self) -> int:
        """Do what is due; returns how many runs were moved."""
        return self.runner.step_due(self._clock()) + self.runner.look_daily(self._clock())

    def send(self) -> int:
        """Send what is due, and note what was written into files; returns how many messages have left."""
        return self.sender.note_left() + self.sender.send_due()

    def tidy(self) -> None:
        """Let go of what ended long ago."""
        plans = self.runner.plans.plans.values()
        again = max((seconds_of(p.journey.again_after) for p in plans if p.journey.again_after), default=0)
        self.runs.tidy(microseconds(self._clock()), max(KEPT_DAYS * DAY, (again + 86_400) * 1_000_000))

    def degraded(self) -> list[str]:
        """What does less than it should."""
        found = [] if self.broken is None else [f"{JOURNEYS}: {self.broken}"]
        return found + [f"the sink {name} takes nothing ({why}): it is tried again" for name, why in dict(self.sender.stuck).items()]

    def close(self) -> None:
        """Let go of the database."""
        self.runs.close()
