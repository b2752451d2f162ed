"""Takes every customer through their journeys: events start, hasten and end them, the clock moves them on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import date, datetime, time, timedelta
from typing import Any, Protocol
from zoneinfo import ZoneInfo

import msgspec

from features.definitions.conditions import ConditionError
from features.definitions.folds.messages import ANSWERS
from features.definitions.segments import Vocabulary, of_the_question
from features.events.event import SealedEvent
from features.state.clock import microseconds
from serving.decide.questions import NextBestOfferRequest, OffersAnswer
from serving.intake.draining import Followed
from serving.journeys.outgoing import Outgoing
from serving.journeys.plan import JourneyPlan, OfferStep, Operation, Plans, facts_of, seconds_of
from serving.journeys.runs import Changes, Run, Runs, decision_id_of, run_id_of

logger = logging.getLogger("ubiquo")
LOOKED_AT_ONCE = 500
"""How many customers are looked at for a daily journey before anything else has its turn."""
DUE_AT_ONCE = 200
"""How many runs are moved on before anything else has its turn."""
AGAIN = timedelta(minutes=15)
"""How soon is tried again what may not go out now."""
WORDS_SECONDS = 120
"""How long a run waits for the words that its journey names: each service reads them every half minute."""
MOST_OPERATIONS = 500
"""As many without a wait are a circle."""
OPENED = frozenset({"message_open", "offer_view"})
Facts = Callable[[str, Mapping[str, Any], datetime], Mapping[str, Any]]
CONVERTED = "converted"
CALLED_OFF = "called off"
DONE = "done"
SECOND = 1_000_000
HEARD = 20
"""How many events a run remembers to have heard: a crash lets it hear the last ones again."""


class Decider(Protocol):
    """What a journey asks of the rest of the service."""

    def present(self, customer_id: str) -> tuple[str, tuple[str, ...]] | None:
        """The id that a customer has now, and all of theirs; None where nobody is known by it any more."""

    def row(self, customer_id: str, now: datetime) -> Mapping[str, Any] | None:
        """Their features; None where their data may not be used."""

    def offer(self, customer_id: str, request: NextBestOfferRequest, decision_id: str, now: datetime) -> OffersAnswer:
        """Decide an offer, as for any other question, and log it."""

    def release(self, decision_id: str) -> None:
        """Nothing will come of that decision."""

    def everybody(self) -> Iterable[str]:
        """The ids of all customers."""

    def facts_of_day(self, day: date) -> Facts:
        """What tells the facts of that day about a customer with these features."""


class Runner:
    """Moves the runs of one home. Events come from one thread, the clock from another.

    Args:
        plans: the journeys in force; may be replaced.
        vocabulary: what their conditions may name.
    """

    def __init__(self, runs: Runs, plans: Plans, vocabulary: Vocabulary, decider: Decider, zone: ZoneInfo) -> None:
        self.runs, self.plans, self.vocabulary = runs, plans, vocabulary
        self._decider, self._zone = decider, zone
        self._earlier: dict[str, JourneyPlan | None] = {}
        self._read_with = vocabulary
        """By which words those were read, or could not be."""
        self._sweep: Iterator[str] = iter(())
        self._swept: tuple[JourneyPlan, str, Facts] | None = None
        self._stepping = threading.Lock()

    # --- events

    def follow(self, events: Sequence[Followed]) -> None:
        """Take in events: what they start begins, what waits for them goes on, what they end is ended. The same events again do nothing
        more.
        """
        known = {event.customer_id: self._decider.present(event.customer_id) for event in events if event.customer_id is not None}
        ids = sorted({each for present in known.values() if present is not None for each in present[1]})
        standing = self.runs.active(ids) if ids else []
        if not standing and not any(event.event.name in self.plans.starts for event in events):
            return
        for run in standing:
            # an earlier form of a journey is read before the transaction
            self._plan(run)
        called_off: list[str] = []
        with self.runs.changing() as change:
            active: dict[str, list[Run]] = {}
            for run in change.active(ids):
                active.setdefault(run.customer_id, []).append(run)
            for followed in events:
                if followed.customer_id is None or (present := known[followed.customer_id]) is None:
                    continue
                theirs = [run for each in present[1] for run in active.pop(each, ())]
                told = [self._hears(change, run, followed, called_off) for run in theirs]
                active[present[0]] = [run for run in (*told, *self._begun(change, followed, present, told)) if run.due_at is not None]
        for decision_id in called_off:
            self._decider.release(decision_id)

    def _hears(self, change: Changes, run: Run, followed: Followed, called_off: list[str]) -> Run:
        """The run as it stands once it has heard of an event."""
        plan, event, now = self._held_plan(run), followed.event, microseconds(followed.received_at)
        if plan is None or now < run.started_at or event.event_id in run.state.get("heard", ()):
            return run
        to, why = _told(plan, run, event, now)
        if to is run:
            return run
        to = replace(to, state={**to.state, "heard": [*run.state.get("heard", ()), event.event_id][-HEARD:]})
        called_off += change.move(to, calls_off=why, now=now) or []
        return replace(to, revision=run.revision + 1)

    def _begun(self, change: Changes, followed: Followed, present: tuple[str, tuple[str, ...]], theirs: Sequence[Run]) -> list[Run]:
        """The runs that an event begins."""
        event, (customer_id, ids) = followed.event, present
        begun: list[Run] = []
        for plan in self.plans.starts.get(event.name, ()) if followed.usable else ():
            name, at = plan.journey.name, microseconds(followed.received_at)
            if any(run.journey == name and run.due_at is not None for run in theirs) or not _may_begin(change, plan, ids, at):
                # it has done what it does: taken in again later it begins nothing either
                change.see(f"{name} {event.event_id}", at)
                continue
            due = at + (seconds_of(plan.journey.start.after) * SECOND if plan.journey.start.after else 0)
            occurred = microseconds(event.occurred_at)
            state = {"begins": True, "event": event.event_id, "heard": [event.event_id], "occurred_at": occurred, **facts_of(event)}
            run = Run(run_id_of(name, customer_id, event.event_id), name, plan.digest, customer_id, 0, due, at, at, state)
            if change.begin(run, plan.text, f"{name} {event.event_id}"):
                begun.append(run)
        return begun

    # --- the clock

    def step_due(self, now: datetime) -> int:
        """Do what is due: returns how many runs were moved."""
        moved = 0
        with self._stepping:
            for run in self.runs.due(microseconds(now), DUE_AT_ONCE):
                try:
                    moved += self._advance(run, now)
                except Exception:
                    # one run that cannot go on holds up no other; it is tried again later
                    logger.exception("a run of the journey %s cannot go on; it is tried again", run.journey)
                    self.runs.move(replace(run, due_at=microseconds(now + AGAIN)))
        return moved

    def _advance(self, run: Run, now: datetime) -> bool:
        """Take one run as far as it goes; what it sends is written in the same transaction as where it is then."""
        plan, present, at = self._plan(run), self._decider.present(run.customer_id), microseconds(now)
        if plan is None and present is not None and (unread := run.state.get("unread", at)) > at - WORDS_SECONDS * SECOND:
            # another service may have read words already that this one has yet to read
            self.runs.move(replace(run, due_at=at + WORDS_SECONDS * SECOND // 2, state={**run.state, "unread": unread}))
            return True
        if plan is None or present is None:
            self.runs.move(
                replace(run, due_at=None, since=at, outcome="nobody is known by that id" if plan is not None else "no such journey")
            )
            return True
        run = replace(run, customer_id=present[0], state={name: value for name, value in run.state.items() if name != "unread"})
        if len(present[1]) > 1 and self._is_second(run, present[1]):
            # of two customers who proved to be one, both of whom were in it
            self.runs.move(replace(run, due_at=None, since=at, outcome="another run of theirs goes on"))
            return True
        if run.state.get("begins"):
            run = replace(run, state={name: value for name, value in run.state.items() if name != "begins"}, since=at)
            if plan.when is not None and not plan.when.holds(self._told_of(run, now)):
                self.runs.move(replace(run, due_at=None, outcome="its condition does not hold"))
                return True
        for _ in range(MOST_OPERATIONS):
            operation = plan.operations[run.position]
            if operation.kind == "offer":
                # a step that sends is one transaction of its own
                return self._offer(run, operation, now)
            if operation.kind == "wait" and run.due_at is not None and at < run.since + operation.seconds * SECOND:
                self.runs.move(replace(run, due_at=run.since + operation.seconds * SECOND))
                return True
            if operation.kind == "end":
                self.runs.move(replace(run, due_at=None, since=at, outcome=run.outcome or DONE))
                return True
            run = replace(run, position=self._next(run, operation, now), since=at)
        raise RuntimeError(f"the journey {run.journey} goes round in a circle")

    def _is_second(self, run: Run, ids: Sequence[str]) -> bool:
        others = (each for each in self.runs.active(ids) if each.journey == run.journey and each.run_id != run.run_id)
        return any((each.started_at, each.run_id) < (run.started_at, run.run_id) for each in others)

    def _next(self, run: Run, operation: Operation, now: datetime) -> int:
        if operation.kind == "go":
            return operation.target
        if operation.kind == "unless":
            assert operation.condition is not None
            return run.position + 1 if operation.condition.holds(self._told_of(run, now)) else operation.target
        return run.position + 1

    def _offer(self, run: Run, operation: Operation, now: datetime) -> bool:
        assert operation.offer is not None
        step, at = operation.offer, microseconds(now)
        tried = int(run.state.get("tried", 0))
        decision_id = decision_id_of(run, tried)
        answer = self._decider.offer(run.customer_id, _request(step), decision_id, now)
        if not answer.offers or answer.channel is None:
            until = run.since + (seconds_of(step.patience) * SECOND if step.patience else 0)
            if at < until and answer.group != "control":
                later = min(until, microseconds(now + AGAIN))
                self.runs.move(replace(run, due_at=later, state={**run.state, "tried": tried + 1, "why": answer.fallback}))
                return True
            self.runs.move(_after(run, at, {"why": answer.fallback}))
            return True
        sink = self.plans.sink_of(step, answer.channel)
        if sink is None:
            # it was taken out of the file since this run began
            self._decider.release(decision_id)
            self.runs.move(_after(run, at, {"why": f"no sink takes {answer.channel}"}))
            return True
        goes_at = at if answer.send_at is None else microseconds(answer.send_at)
        offer = answer.offers[0]
        body = {
            "journey": run.journey, "decision_id": decision_id, "as_of": answer.as_of, "offer": offer, "variants": answer.variants,
            "send_at": answer.send_at,
        }  # fmt: skip
        expires = None if answer.promised_until is None else microseconds(answer.promised_until)
        said = msgspec.json.encode(body).decode()
        message = Outgoing(decision_id, run.run_id, run.customer_id, answer.channel, sink.name, said, at, goes_at, expires)
        told = {
            "messages": int(run.state.get("messages", 0)) + 1, "answered": False, "opened": False, "decision": decision_id,
            "offer": offer.offer_id, "why": None,
        }  # fmt: skip
        if not self.runs.move(_after(run, at, told), [message]) and not self.runs.outgoing.holds(decision_id):
            # an event came first: it has ended, or gone on, without this message. Had another service taken the same step, as the
            # lease was lost, the promise would be that of the message which is about to leave
            self._decider.release(decision_id)
        return True

    def _told_of(self, run: Run, now: datetime) -> Mapping[str, Any]:
        facts = {"answered": False, "opened": False, "messages": 0, **run.state}
        question = of_the_question(now, self._zone, None, run.state.get("event_store_id"))
        return self.vocabulary.told(self._decider.row(run.customer_id, now) or {}, {**question, **facts})

    def _plan(self, run: Run) -> JourneyPlan | None:
        """The journey as it stood when the run began."""
        current = self.plans.plans.get(run.journey)
        if current is not None and current.digest == run.plan:
            return current
        if self._read_with is not self.vocabulary:
            # what could not be read before may be by now
            self._earlier, self._read_with = {name: plan for name, plan in self._earlier.items() if plan is not None}, self.vocabulary
        if run.plan not in self._earlier and (text := self.runs.plan_text(run.plan)) is not None:
            try:
                self._earlier[run.plan] = JourneyPlan.of_text(text, self.vocabulary)
            except (ConditionError, msgspec.DecodeError) as error:
                logger.error("another form of the journey %s cannot be read, and ends unless it soon can be: %s", run.journey, error)
                self._earlier[run.plan] = None
        return self._earlier.get(run.plan)

    def _held_plan(self, run: Run) -> JourneyPlan | None:
        """As ``_plan``, of what has been read."""
        current = self.plans.plans.get(run.journey)
        return current if current is not None and current.digest == run.plan else self._earlier.get(run.plan)

    # --- every day

    def look_daily(self, now: datetime) -> int:
        """Look at some more customers for the journeys whose condition is looked at every day, if their time has come; returns how many
        began.

        After a break it begins anew: whoever began that day does not begin twice.
        """
        begun, local = 0, now.astimezone(self._zone)
        if self._swept is None:
            plan = next((each for each in self.plans.daily if self._is_due(each, local)), None)
            if plan is None:
                return 0
            facts = self._decider.facts_of_day(local.date())
            self._swept, self._sweep = (plan, local.date().isoformat(), facts), iter(self._decider.everybody())
        plan, day, facts = self._swept
        for looked, customer_id in enumerate(self._sweep, 1):
            try:
                begun += self._begins_today(plan, customer_id, day, now, facts)
            except Exception:
                # one of whom nothing can be told holds up nobody else
                logger.exception("a customer cannot be looked at for the journey %s", plan.journey.name)
            if looked == LOOKED_AT_ONCE:
                return begun
        self._swept = None
        self.runs.end_day(plan.journey.name, day)
        return begun

    def _is_due(self, plan: JourneyPlan, local: datetime) -> bool:
        due = local.time() >= time.fromisoformat(plan.journey.start.at)
        return due and self.runs.last_day(plan.journey.name) != local.date().isoformat()

    def _begins_today(self, plan: JourneyPlan, customer_id: str, day: str, now: datetime, facts: Facts) -> bool:
        row, name, at = self._decider.row(customer_id, now), plan.journey.name, microseconds(now)
        present = self._decider.present(customer_id)
        if row is None or plan.when is None or present is None:
            return False
        question = {**of_the_question(now, self._zone, None, None), **facts(customer_id, row, now)}
        if not plan.when.holds(self.vocabulary.told(row, question)):
            return False
        run = Run(run_id_of(name, customer_id, day), name, plan.digest, customer_id, 0, at, at, at, {"event": day})
        with self.runs.changing() as change:
            runs_already = any(each.journey == name for each in change.active(present[1]))
            return (
                not runs_already
                and _may_begin(change, plan, present[1], at)
                and change.begin(run, plan.text, f"{name} {customer_id} {day}")
            )


def _may_begin(change: Changes, plan: JourneyPlan, ids: Sequence[str], now: int) -> bool:
    again, last = plan.journey.again_after, change.started_last(ids, plan.journey.name)
    return last is None or again is None or now - last >= seconds_of(again) * SECOND


def _told(plan: JourneyPlan, run: Run, event: SealedEvent, now: int) -> tuple[Run, str | None]:
    """Where an event takes a run, and why what waits to be sent is called off, if it is; the run itself where it takes it nowhere."""
    journey, begins = plan.journey, run.state.get("begins", False)
    if microseconds(event.occurred_at) < run.state.get("occurred_at", 0) and event.name in (*journey.stop_on, *journey.start.unless):
        # it came late: it had happened before
        return run, None
    if begins and event.name in (*journey.start.unless, *journey.stop_on):
        return replace(run, due_at=None, since=now, outcome=CALLED_OFF), CALLED_OFF
    if begins:
        if event.name not in journey.start.on or journey.start.after is None:
            return run, None
        later = max(run.due_at or 0, now + seconds_of(journey.start.after) * SECOND)
        return replace(run, due_at=later, state={**run.state, **facts_of(event)}), None
    if event.name in journey.stop_on and run.position < plan.conversion:
        return replace(run, position=plan.conversion, due_at=now, since=now, outcome=CONVERTED), CONVERTED
    state, is_about = run.state, _is_about(event, run.state)
    if state.get("messages") and is_about:
        state = {**state, "answered": True} if event.name in ANSWERS else {**state, "opened": True} if event.name in OPENED else state
    at = plan.operations[run.position]
    if at.kind == "wait" and event.name in at.until and (is_about or event.name not in ANSWERS | OPENED):
        # a wait that ends is followed by what comes after it
        return replace(run, state=state, position=run.position + 1, due_at=now, since=now), None
    return (run if state is run.state else replace(run, state=state)), None


def _request(step: OfferStep) -> NextBestOfferRequest:
    wanted = {"stage": step.stages, "kind": step.kinds, "category": step.categories}
    include: dict[str, Any] = {name: list(values) for name, values in wanted.items() if values}
    return NextBestOfferRequest(channels=list(step.channels), include=include, offer_ids=list(step.offer_ids), best_time=step.best_time)


def _after(run: Run, at: int, told: Mapping[str, Any]) -> Run:
    state = {name: value for name, value in {**run.state, **told}.items() if name != "tried"}
    return replace(run, position=run.position + 1, due_at=at, since=at, state=state)


def _is_about(event: SealedEvent, state: Mapping[str, Any]) -> bool:
    """Whether what a customer does is about the journey's last message, as far as it is told."""
    if event.decision_id is not None:
        return bool(event.decision_id == state.get("decision"))
    return event.offer_id is None or event.offer_id == state.get("offer")
