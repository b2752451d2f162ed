"""Journeys: how many customers are on the way in each, each drawn as a flow, and what is to leave."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from starlette.responses import Response

from serving.console.pages.marketing.flow import flow_of
from serving.console.port import RefusedError
from serving.console.visit import Page, Visit
from serving.journeys.journeys import Journeys
from serving.journeys.plan import JOURNEYS, Sink
from serving.journeys.runner import CONVERTED
from serving.journeys.runs import KEPT_DAYS

SENT, WAITING = ("taken", "written", "sent"), ("waiting", "sending", "writing")
"""What a message's status in the outbox means to a marketer."""


@dataclass
class Numbers:
    """How many customers of one journey are where.

    Attributes:
        standing: by position, of those who began it as it stands now, those too who have yet to begin.
        yet_to_begin: how many of these wait out the time before the first step.
        earlier: how many go through it as it stood before.
        outcomes: by how it ended.
        converted: how many did what it is for, on their way still or not.
        messages: by status.
    """

    standing: dict[int, int] = field(default_factory=dict)
    yet_to_begin: int = 0
    earlier: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    converted: int = 0
    messages: Counter[str] = field(default_factory=Counter)

    @property
    def on_the_way(self) -> int:
        """How many have begun and not ended."""
        return sum(self.standing.values()) - self.yet_to_begin + self.earlier

    @property
    def sent(self) -> int:
        """How many messages have left."""
        return sum(self.messages[status] for status in SENT)


@dataclass(frozen=True)
class SinkState:
    """A sink with how many of its messages are how."""

    name: str
    sink: Sink | None
    waiting: int
    sent: int
    failed: int
    dropped: int
    stuck: str | None


def numbers_of(journeys: Journeys) -> dict[str, Numbers]:
    """By journey who is where; those too that are in the file no more and have somebody in them."""
    plans, found = journeys.runner.plans.plans, {name: Numbers() for name in journeys.runner.plans.plans}
    for name, digest, position, number, begin in journeys.runs.standing():
        each = found.setdefault(name, Numbers())
        if name in plans and plans[name].digest == digest:
            each.standing[position] = number
            each.yet_to_begin += begin
        else:
            each.earlier += number
    for name, state, number in journeys.runs.counts():
        each = found.setdefault(name, Numbers())
        if state == CONVERTED:
            each.converted += number
        elif state != "waiting":
            each.outcomes[state] += number
    for name, status, number in journeys.runs.messages():
        found.setdefault(name, Numbers()).messages[status] += number
    return found


def sinks_of(journeys: Journeys) -> list[SinkState]:
    """Every sink with what waits for it and what has left; those too that are in the file no more."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in journeys.runner.plans.sinks}
    for name, status, number in journeys.runs.outgoing.counts():
        counts.setdefault(name, Counter())[status] += number
    stuck = journeys.sender.stuck
    return [
        SinkState(
            name, journeys.runner.plans.sinks.get(name), sum(each[status] for status in WAITING), sum(each[status] for status in SENT),
            each["failed"], each["dropped"], stuck.get(name),
        )
        for name, each in counts.items()
    ]  # fmt: skip


async def journeys_page(visit: Visit) -> Response:
    """All journeys, and the outbox."""
    journeys = visit.runtime.journeys
    numbers = await visit.port.work(numbers_of, journeys)
    sinks = await visit.port.work(sinks_of, journeys)
    plans = journeys.runner.plans.plans
    starts = {name: flow_of(plan, {}, 0, visit.words).begins for name, plan in plans.items()}
    return visit.page("journeys.html", numbers=numbers, starts=starts, sinks=sinks, broken=journeys.broken, file=JOURNEYS, kept=KEPT_DAYS)


async def journey_page(visit: Visit) -> Response:
    """One journey as a flow."""
    journeys, name = visit.runtime.journeys, visit.part("name")
    numbers = await visit.port.work(numbers_of, journeys)
    if name not in numbers:
        raise RefusedError(404, visit.words.say("There is no journey of that name:") + f" {name}")
    plan, each = journeys.runner.plans.plans.get(name), numbers[name]
    flow = None if plan is None else flow_of(plan, each.standing, each.yet_to_begin, visit.words)
    return visit.page("journey.html", name=name, flow=flow, numbers=each, file=JOURNEYS, kept=KEPT_DAYS)


PAGES: Sequence[Page] = [
    Page("/journeys", journeys_page, "decide", menu="Journeys", group="Marketing"),
    Page("/journeys/{name}", journey_page, "decide"),
]
