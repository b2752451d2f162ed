"""Journeys as a shop writes them: what starts one, its steps, what ends it; checked whole, and laid out as a flat list of operations."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from features.catalogue.offers import OfferKind, Stage
from features.catalogue.yaml_file import read_yaml, wrong
from features.definitions.conditions import CelCondition, ConditionError, Names
from features.definitions.segments import Vocabulary
from features.events.event import Channel, Text
from serving.decide.contact import TimeOfDay
from serving.journeys.today import OF_THE_DAY

JOURNEYS = "journeys.yaml"
"""The file of a home that declares journeys and sinks."""
OF_THE_JOURNEY: Names = {
    "answered": "truth", "opened": "truth", "messages": "number", "event_channel": "text", "event_store_id": "text",
    "event_value_minor": "number", "event_items": "list",
}  # fmt: skip
"""What a condition of a journey may name beside: whether the last message was answered or opened, how many were sent, and the event
that started it.
"""
MAX_STEPS = 200
Duration = Annotated[str, msgspec.Meta(pattern=r"^[1-9][0-9]{0,4}[smhd]$")]
_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
EventNames = Annotated[tuple[Text, ...], msgspec.Meta(max_length=20)]


class OfferStep(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Decide an offer as any other question is decided, and send it by the best of these channels that is open."""

    channels: Annotated[tuple[Channel, ...], msgspec.Meta(min_length=1)]
    stages: tuple[Stage, ...] = ()
    kinds: tuple[OfferKind, ...] = ()
    categories: tuple[Text, ...] = ()
    offer_ids: tuple[Text, ...] = ()
    """Which offers; none named: all."""
    patience: Duration | None = None
    """How long to try again where nothing may go out now, such as in quiet hours; unsaid, the next step follows at once."""
    sink: Text | None = None
    """Through which sink; unsaid, the first that takes the channel."""
    best_time: bool = False
    """Whether it goes out within the next day, at the hour at which the customer is likeliest to answer."""


class Branch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One way on, if its condition holds; one without a condition always does."""

    steps: tuple[JourneyStep, ...] = ()
    when: str | None = None


class JourneyStep(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One step: an offer, a wait, or a branch."""

    offer: OfferStep | None = None
    wait: Duration | None = None
    until: EventNames = ()
    """What ends a wait before its time."""
    branch: tuple[Branch, ...] | None = None

    def __post_init__(self) -> None:
        """Exactly one thing is done in a step."""
        if sum(each is not None for each in (self.offer, self.wait, self.branch)) != 1:
            raise ValueError("say one of offer, wait and branch")
        if self.until and self.wait is None:
            raise ValueError("until belongs to a wait: say for how long at most")


class Start(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What starts a journey: an event, or a condition that is looked at every day."""

    on: EventNames = ()
    """Events of the customer."""
    every: Literal["day"] | None = None
    at: TimeOfDay = "09:00"
    """At which time of the shop's day it is looked at."""
    when: str | None = None
    """A condition in CEL on the customer, and on the event."""
    after: Duration | None = None
    """How long after the event; a further such event begins the time anew."""
    unless: EventNames = ()
    """What in the meantime calls it off."""

    def __post_init__(self) -> None:
        """An event or a day, and a day needs a condition."""
        if bool(self.on) == (self.every is not None):
            raise ValueError("say either on (events) or every: day")
        if self.every is not None and (self.when is None or self.after or self.unless):
            raise ValueError("every: day needs when, and has neither after nor unless")


class Journey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One journey."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9-]{0,63}$")]
    start: Start
    steps: Annotated[tuple[JourneyStep, ...], msgspec.Meta(min_length=1)]
    again_after: Duration | None = None
    """How long after its start a customer may begin it again; unsaid, as soon as it has ended."""
    stop_on: EventNames = ()
    """What it is for: once it happens the steps end, nothing that waits goes out, and ``after_conversion`` follows."""
    after_conversion: tuple[JourneyStep, ...] = ()


class Sink(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where what was decided leaves to."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9-]{0,63}$")]
    channels: Annotated[tuple[Channel, ...], msgspec.Meta(min_length=1)]
    url: Annotated[str, msgspec.Meta(pattern=r"^https?://[^\s]{1,2000}$")] | None = None
    """A webhook; unsaid, the rows wait to be exported as a file."""
    with_contact: bool = False
    """Whether e-mail address and phone number go along."""
    give_up_after: Duration = "3d"
    counts_as_sent: bool = True
    """Whether what it took counts as sent; false where whoever sends tells so by a ``message_sent`` with the ``decision_id``."""


class JourneysFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole of a journeys file."""

    journeys: tuple[Journey, ...] = ()
    sinks: tuple[Sink, ...] = ()


class Operation(NamedTuple):
    """One thing to do: ``offer`` it, ``wait``, go on at ``target`` ``unless`` a condition holds, ``go`` there, or ``end``."""

    kind: Literal["offer", "wait", "unless", "go", "end"]
    offer: OfferStep | None = None
    seconds: int = 0
    until: tuple[str, ...] = ()
    condition: CelCondition | None = None
    target: int = 0

    def told(self) -> str:
        """In words."""
        if self.offer is not None:
            chosen = [*self.offer.stages, *self.offer.kinds, *self.offer.categories, *self.offer.offer_ids]
            return f"offer by {' or '.join(self.offer.channels)}" + (f": {', '.join(chosen)}" if chosen else "")
        if self.kind == "wait":
            return f"wait {told_duration(self.seconds)}" + (f", or until {' or '.join(self.until)}" if self.until else "")
        if self.condition is not None:
            return f"go to {self.target} unless {self.condition.text}"
        return f"go to {self.target}" if self.kind == "go" else "end"


class PlacedStep(NamedTuple):
    """A step with the position at which whoever is there stands, and of a branch its ways on."""

    position: int
    step: JourneyStep
    ways: tuple[tuple[Branch, tuple[PlacedStep, ...]], ...] = ()


class JourneyPlan:
    """One journey laid out; equal declarations have one digest.

    Attributes:
        operations: what to do, by position.
        steps, after: the steps, and those after conversion, with where they stand.
        conversion: where it goes on once what it is for has happened.
    """

    def __init__(self, journey: Journey, vocabulary: Vocabulary) -> None:
        self.journey, self._vocabulary = journey, vocabulary
        more = OF_THE_DAY if journey.start.every is not None else {}
        self.when = None if journey.start.when is None else self._condition(journey.start.when, more)
        self.text = msgspec.json.encode(journey).decode()
        self.digest = hashlib.sha256(self.text.encode()).hexdigest()[:16]
        self.operations: list[Operation] = []
        self.steps = self._lay(journey.steps)
        self.operations.append(Operation("end"))
        self.conversion = len(self.operations)
        self.after = self._lay(journey.after_conversion)
        self.operations.append(Operation("end"))

    @classmethod
    def of_text(cls, text: str, vocabulary: Vocabulary) -> JourneyPlan:
        """That of a journey as it stood when it was begun."""
        return cls(msgspec.json.decode(text, type=Journey), vocabulary)

    def _lay(self, steps: Sequence[JourneyStep]) -> tuple[PlacedStep, ...]:
        placed: list[PlacedStep] = []
        for step in steps:
            at = len(self.operations)
            ways: tuple[tuple[Branch, tuple[PlacedStep, ...]], ...] = ()
            if step.offer is not None:
                self.operations.append(Operation("offer", offer=step.offer))
            elif step.wait is not None:
                self.operations.append(Operation("wait", seconds=seconds_of(step.wait), until=step.until))
            else:
                ways = self._branch(step.branch or ())
            placed.append(PlacedStep(at, step, ways))
        return tuple(placed)

    def _branch(self, branches: Sequence[Branch]) -> tuple[tuple[Branch, tuple[PlacedStep, ...]], ...]:
        ends: list[int] = []
        ways: list[tuple[Branch, tuple[PlacedStep, ...]]] = []
        for branch in branches:
            at = len(self.operations)
            condition = None if branch.when is None else self._condition(branch.when)
            if condition is not None:
                self.operations.append(Operation("unless", condition=condition))
            ways.append((branch, self._lay(branch.steps)))
            ends.append(len(self.operations))
            self.operations.append(Operation("go"))
            if condition is not None:
                self.operations[at] = Operation("unless", condition=condition, target=len(self.operations))
        for end in ends:
            self.operations[end] = Operation("go", target=len(self.operations))
        return tuple(ways)

    def _condition(self, text: str, more: Names | None = None) -> CelCondition:
        return CelCondition.parse(text, {**self._vocabulary.names, **OF_THE_JOURNEY, **(more or {})})


class Plans:
    """All journeys and sinks in force."""

    def __init__(self, said: JourneysFile, vocabulary: Vocabulary) -> None:
        self.said, self.sinks = said, {sink.name: sink for sink in said.sinks}
        self.plans = {journey.name: JourneyPlan(journey, vocabulary) for journey in said.journeys}
        self.starts: dict[str, list[JourneyPlan]] = {}
        """By event the journeys that it starts."""
        for plan in self.plans.values():
            for name in plan.journey.start.on:
                self.starts.setdefault(name, []).append(plan)
        self.daily = [plan for plan in self.plans.values() if plan.journey.start.every == "day"]

    @classmethod
    def read(cls, path: Path, vocabulary: Vocabulary, events: frozenset[str]) -> Plans:
        """Read and check a journeys file; where there is none, nothing is done.

        Args:
            path: the file.
            vocabulary: what conditions may name.
            events: the names of events that there are.

        Raises:
            WrittenError: it has a mistake; the message names line, field and fix.
        """
        text = path.read_bytes() if path.exists() else b""
        said = read_yaml(text, path.name, JourneysFile)
        for field, reason in _mistakes(said, events):
            raise wrong(text, path.name, field, reason)
        for number, journey in enumerate(said.journeys):
            try:
                plan = JourneyPlan(journey, vocabulary)
            except ConditionError as error:
                raise wrong(text, path.name, f"journeys[{number}]", f"{journey.name}: a condition {error}") from None
            if len(plan.operations) > MAX_STEPS:
                raise wrong(text, path.name, f"journeys[{number}].steps", f"has more than {MAX_STEPS} steps: make two journeys of it")
        return cls(said, vocabulary)

    def sink_of(self, step: OfferStep, channel: str) -> Sink | None:
        """Through what an offer leaves; None where no sink takes the channel, and the row waits to be read."""
        if step.sink is not None:
            return self.sinks.get(step.sink)
        return next((sink for sink in self.said.sinks if channel in sink.channels), None)


def _mistakes(said: JourneysFile, events: frozenset[str]) -> Iterator[tuple[str, str]]:
    for what, called in (("journeys", [j.name for j in said.journeys]), ("sinks", [s.name for s in said.sinks])):
        for number, name in enumerate(called):
            if name in called[:number]:
                yield f"{what}[{number}].name", f"{name!r} is the name of another too: give each its own"
    sinks = {sink.name: sink for sink in said.sinks}
    for number, journey in enumerate(said.journeys):
        at = f"journeys[{number}]"
        named = (("start.on", journey.start.on), ("start.unless", journey.start.unless), ("stop_on", journey.stop_on))
        for field, names in named:
            yield from ((f"{at}.{field}", f"{n!r} is no event: {_near(n, events)}") for n in names if n not in events)
        for part in ("steps", "after_conversion"):
            for field, step in _steps(getattr(journey, part), f"{at}.{part}"):
                yield from ((f"{field}.until", f"{n!r} is no event: {_near(n, events)}") for n in step.until if n not in events)
                if step.offer is not None and step.offer.sink is not None and step.offer.sink not in sinks:
                    yield f"{field}.offer.sink", f"{step.offer.sink!r} is no sink: declare it under sinks"
                elif step.offer is not None and step.offer.sink is None:
                    taken = {channel for sink in said.sinks for channel in sink.channels}
                    for channel in (c for c in step.offer.channels if c not in taken):
                        yield f"{field}.offer.channels", f"no sink takes {channel!r}: declare one under sinks"
                if step.branch is not None and any(branch.when is None for branch in step.branch[:-1]):
                    yield f"{field}.branch", "what follows a branch without when is never reached: put that one last"


def _steps(steps: Sequence[JourneyStep], at: str) -> Iterator[tuple[str, JourneyStep]]:
    for number, step in enumerate(steps):
        yield f"{at}[{number}]", step
        for other, branch in enumerate(step.branch or ()):
            yield from _steps(branch.steps, f"{at}[{number}].branch[{other}].steps")


def _near(name: str, events: frozenset[str]) -> str:
    words = set(re.split("_", name))
    near = sorted((e for e in events if words & set(e.split("_"))), key=lambda e: -len(words & set(e.split("_"))))
    return f"use one such as {', '.join((near or sorted(events))[:4])}"


def seconds_of(duration: str) -> int:
    """The seconds of ``90m``, ``2d`` and the like."""
    return int(duration[:-1]) * _SECONDS[duration[-1]]


def told_duration(seconds: int) -> str:
    """The largest unit that tells it in whole numbers."""
    unit = next(u for u in "dhms" if seconds % _SECONDS[u] == 0)
    return f"{seconds // _SECONDS[unit]}{unit}"


def facts_of(event: Any) -> Mapping[str, Any]:
    """What conditions may know of the event that starts a journey."""
    return {
        "event_channel": event.channel,
        "event_store_id": event.store_id,
        "event_value_minor": sum(item.amount_minor for item in event.items),
        "event_items": [item.item_id for item in event.items][:50],
    }
