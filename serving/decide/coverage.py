"""Who ends with nothing, and at which stage: what a batch over everybody would say, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime

from features.events.event import Channel
from features.state.home import Home
from models.recommender.listings import Listing
from serving.decide.engine import WITHDRAWN, Engine
from serving.decide.population import AnyAnswer, Population
from serving.decide.questions import ItemsAnswer, ScoreAnswer

NOTHING_THERE = "there was nothing to choose from"


@dataclass
class Coverage:
    """How many customers there are, and what becomes of them.

    Attributes:
        own: who gets an answer of their own.
        general: who gets a general answer, by its reason.
        nothing: who gets nothing, by the reason, or the stage that took the last of what there was.
    """

    customers: int = 0
    own: int = 0
    general: Counter[str] = field(default_factory=Counter)
    nothing: Counter[str] = field(default_factory=Counter)

    def add(self, told: AnyAnswer) -> None:
        """Count one answer."""
        self.customers += 1
        if isinstance(told, ScoreAnswer):
            answered = told.score is not None
        else:
            answered = bool(told.items if isinstance(told, ItemsAnswer) else told.offers)
        if answered and told.fallback is None:
            self.own += 1
        elif answered:
            self.general[str(told.fallback)] += 1
        else:
            # stages are counted in their order: the last that removed anything left nothing
            stages = [] if isinstance(told, ScoreAnswer) else list(told.removed)
            self.nothing[told.fallback or (stages[-1] if stages else NOTHING_THERE)] += 1


def coverage(
    home: Home,
    engine_of: Callable[[Home], Engine],
    name: str,
    as_of: datetime,
    limit: int,
    channel: Channel | None = None,
    listing: Listing = "for_you",
    advance: Callable[[int, int], None] = lambda done, of: None,
) -> Coverage:
    """Ask the model *name* about every customer known at *as_of*, and count; nothing is written.

    Raises:
        MissingStateError: no customer was known then, or the log ends long before.
        NoChampionError: the model has no champion.
    """
    crowd, found = Population.open(home, engine_of, name, as_of), Coverage()
    for chunk in crowd.chunks():
        for row in crowd.rows(chunk, channel):
            found.add(crowd.ask(row, limit, channel, listing, dry_run=True)[0])
        advance(crowd.asked, len(crowd.customers))
    for customer in crowd.silent:
        found.customers += 1
        found.nothing[crowd.who(customer).not_reached(channel) or WITHDRAWN] += 1
    return found
