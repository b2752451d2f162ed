"""A journey as it is drawn: what starts it, its steps with who stands at each, and where it leads once it has done what it is for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from serving.console.words import Words
from serving.journeys.plan import Branch, JourneyPlan, OfferStep, PlacedStep, Start, seconds_of

_UNITS = ((86_400, "%(n)s day", "%(n)s days"), (3_600, "%(n)s hour", "%(n)s hours"), (60, "%(n)s minute", "%(n)s minutes"))


@dataclass(frozen=True)
class FlowWay:
    """One way on from a branch; without a condition it is taken where no other is."""

    when: str | None
    nodes: Sequence[FlowNode]


@dataclass(frozen=True)
class FlowNode:
    """One step as it is drawn.

    Attributes:
        title: what is done.
        details: what to know of it, in words.
        standing: how many customers stand there.
    """

    kind: Literal["offer", "wait", "branch"]
    title: str
    details: Sequence[str] = ()
    standing: int = 0
    ways: Sequence[FlowWay] = ()


@dataclass(frozen=True)
class Flow:
    """A whole journey as it is drawn.

    Attributes:
        begins: what starts it.
        when: the condition beside, in CEL.
        yet_to_begin: how many wait out the time before the first step.
        stops_on: the events that it is for.
    """

    begins: Sequence[str]
    when: str | None
    yet_to_begin: int
    nodes: Sequence[FlowNode]
    stops_on: Sequence[str]
    after: Sequence[FlowNode]
    standing: Mapping[int, int] = field(default_factory=dict)


def flow_of(plan: JourneyPlan, standing: Mapping[int, int], yet_to_begin: int, words: Words) -> Flow:
    """The drawing of a journey, with how many stand at each position."""
    journey, at_steps = plan.journey, {**standing, 0: standing.get(0, 0) - yet_to_begin}
    return Flow(
        begins=_begins(journey.start, words),
        when=journey.start.when,
        yet_to_begin=yet_to_begin,
        nodes=_nodes(plan.steps, at_steps, words),
        stops_on=journey.stop_on,
        after=_nodes(plan.after, at_steps, words),
        standing=at_steps,
    )


def told_wait(seconds: int, words: Words) -> str:
    """A duration in the largest unit that tells it in whole numbers."""
    for size, one, more in (*_UNITS, (1, "%(n)s second", "%(n)s seconds")):
        if seconds % size == 0:
            number = seconds // size
            return words.many(one, more, number) % {"n": words.number(number)}
    raise AssertionError(f"every number of seconds is whole: {seconds}")


def told_events(names: Sequence[str], words: Words) -> str:
    """Events by their names, as a reader says them."""
    return ", ".join(words.say(name.replace("_", " ")) for name in names)


def _begins(start: Start, words: Words) -> list[str]:
    if start.every is not None:
        return [words.say("Every day at %(time)s") % {"time": start.at}]
    told = [words.say("When a customer does: %(events)s") % {"events": told_events(start.on, words)}]
    if start.after:
        told.append(words.say("and %(time)s have passed") % {"time": told_wait(seconds_of(start.after), words)})
    if start.unless:
        told.append(words.say("unless in the meantime: %(events)s") % {"events": told_events(start.unless, words)})
    return told


def _nodes(placed: Sequence[PlacedStep], standing: Mapping[int, int], words: Words) -> list[FlowNode]:
    return [_node(each, standing, words) for each in placed]


def _node(placed: PlacedStep, standing: Mapping[int, int], words: Words) -> FlowNode:
    step, here = placed.step, standing.get(placed.position, 0)
    if step.offer is not None:
        title = words.say("Offer by %(channels)s") % {"channels": words.say(" or ").join(map(words.say, step.offer.channels))}
        return FlowNode("offer", title, _offered(step.offer, words), here)
    if step.wait is not None:
        title = words.say("Wait %(time)s") % {"time": told_wait(seconds_of(step.wait), words)}
        until = [words.say("or until: %(events)s") % {"events": told_events(step.until, words)}] if step.until else []
        return FlowNode("wait", title, until, here)
    ways = [_way(branch, steps, standing, words) for branch, steps in placed.ways]
    return FlowNode("branch", words.say("Which way?"), ways=ways)


def _way(branch: Branch, steps: Sequence[PlacedStep], standing: Mapping[int, int], words: Words) -> FlowWay:
    return FlowWay(branch.when, _nodes(steps, standing, words))


def _offered(step: OfferStep, words: Words) -> list[str]:
    chosen = [*map(words.say, (*step.stages, *step.kinds)), *step.categories, *step.offer_ids]
    told = [words.say("of: %(chosen)s") % {"chosen": ", ".join(chosen)} if chosen else words.say("the best of all offers")]
    if step.best_time:
        told.append(words.say("at the hour at which the customer is likeliest to answer"))
    if step.patience:
        told.append(words.say("tried for %(time)s where it may not go out") % {"time": told_wait(seconds_of(step.patience), words)})
    return told
