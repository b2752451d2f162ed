"""The shop's policy at work: who is held out, what may be offered, whether a customer may be contacted now, and the promise that a
decision is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import numpy as np
from sqlalchemy.exc import SQLAlchemyError

from features.catalogue.shop import Shop
from features.catalogue.yaml_file import wrong
from features.definitions.conditions import ConditionError
from features.definitions.segments import Vocabulary, of_the_question
from features.definitions.standing import Risk
from features.people.consent import CONTACT_CHANNELS
from features.state.disk import DamagedStateError
from features.state.home import Home
from models.decision import Decision, Query
from models.kind import Answers
from serving.decide.contact import RESTING, Contacted, ContactPolicy, answers_of, sent_to, together
from serving.decide.ledger import Ledger, Promise
from serving.decide.policy import HELD_OUT, UNASSIGNED, Assignment, Policy
from serving.decide.terms import Mask, Terms

logger = logging.getLogger("ubiquo")
POLICY = "policy.yaml"
"""The file of a home that says who is held out, who sees which variant, and how often customers are contacted."""
MESSAGES, LAST_TOUCH = "messages", "last_touch"
"""The folds that tell what was sent to a customer, and where they are."""
LONGEST = timedelta(days=32)
"""A calendar month is no longer."""
TRIES = 3
"""How often a decision is made anew where another takes the place that it was made for."""
TRIES_FOR_A_BUDGET = 60
"""As often, where what others took are offers: each time there are fewer of them left to take."""
ELSEWHERE = 0.05
"""The share of decisions that go by a channel drawn from those that are open, so that each is known to be tried."""
COUNTED_ANEW = "what was sent to the customer is being counted anew: ask again in a minute"
UNCOUNTED = "the ledger of what goes out cannot be read or written, so nothing goes out: the service's log tells why"
TAKEN = "other decisions took the customer's last place meanwhile: ask again"
STAND_IN = "nothing else may be offered now: this offer stands in"
USED_UP = "given out, or redeemed, as often as there are"
ITEM_RESTS = "one of its items was offered lately"


@dataclass(frozen=True)
class Matter:
    """One question to decide.

    Attributes:
        customer_ids: whom it is about: their id, and those that were merged into it; none is nobody known.
        dry_run: whether nothing is promised.
        now: when the answer goes out.
        decide: what answers within a query.
        terms: those of the offers; None where items are asked for.
        context: what the question tells beside.
        channels: by which it may go out, if that is to be decided too; none is by the query's.
        responses: by channel how much likelier the customer answers there than on average.
        later: how much later than now it may go out.
        is_repeatable: whether the same decision may be made again, as a batch or a step of a journey is after it was broken off.
        settled: whether the best is wanted, though the question asks to explore.
    """

    customer_ids: Sequence[str]
    query: Query
    decision_id: str
    answers: Answers
    dry_run: bool
    now: datetime
    decide: Callable[[Query], Decision]
    terms: Terms | None = None
    context: Mapping[str, Any] = field(default_factory=dict)
    channels: Sequence[str] = ()
    responses: Mapping[str, float] = field(default_factory=dict)
    later: timedelta = timedelta()
    is_repeatable: bool = False
    settled: bool = False


class Governed(NamedTuple):
    """A decision as the policy lets it stand, what its customer is in, whether they are held out, and through which channel it goes.

    ``channel_propensity`` is the chance of that channel among those that were open; after ``promised_until`` what it holds goes back.
    """

    decision: Decision
    assigned: Assignment
    held_out: bool
    channel: str | None
    channel_propensity: float = 1.0
    promised_until: datetime | None = None


class _Plan(NamedTuple):
    """What would be decided by one channel, what has to be promised for it, and whether that may be."""

    channel: str | None
    decision: Decision
    promise: Promise | None = None
    allows: Callable[[Sequence[Contacted]], bool] = lambda standing: True


class Governor:
    """Keeps the policy of one home. Nothing goes out past it, over HTTP as in batch.

    Raises:
        WrittenError: the policy or the segments have a mistake: nothing may go out without them.
    """

    def __init__(self, home: Home, risk: Risk | None = None) -> None:
        self._home, self._shop, self._risk = home, Shop.load(home), risk
        self.policy, self.vocabulary = self.read()
        """The last that were whole."""
        self._ledger, self._zone = Ledger(home), ZoneInfo(self._shop.timezone)
        self._rng = np.random.default_rng()

    def read(self) -> tuple[Policy, Vocabulary]:
        """Policy and segments as they are written now.

        Raises:
            WrittenError: one of them has a mistake.
        """
        vocabulary = Vocabulary.load(self._home, self._shop.domain, self._risk)
        path = self._home.root / POLICY
        policy = Policy.read(path)
        for number, rule in enumerate(policy.arbitration.context):
            try:
                vocabulary.parse_condition(rule.when)
            except ConditionError as error:
                raise wrong(path.read_bytes(), POLICY, f"arbitration.context[{number}].when", str(error)) from None
        return policy, vocabulary

    def zone_of(self, row: Mapping[str, Any]) -> ZoneInfo:
        """The zone whose hours count for a customer."""
        return self.policy.contact.zone_of(row, self._zone)

    def release(self, decision_id: str) -> None:
        """Nothing will come of a decision: what it promised is free again."""
        self._ledger.release(decision_id)

    def taken(self, budgets: Sequence[str], stocks: Sequence[str], now: datetime) -> tuple[dict[str, int], dict[str, int]]:
        """How often each of these offers is given out, and redeemed."""
        return self._ledger.taken(budgets, stocks, now)

    @property
    def gives(self) -> bool:
        """Whether anything was ever given out of which there are so many."""
        return self._ledger.gives

    def sync(self) -> None:
        """Bring every promise onto the disk."""
        self._ledger.sync()

    def reached(self, decision_ids: Sequence[str], redemptions: Sequence[tuple[str, str]]) -> None:
        """Decisions are known to have reached somebody, and offers (by event) to have been redeemed."""
        self._ledger.reached(decision_ids, redemptions)

    def reads(self, channels: Sequence[str | None], terms: Terms | None = None) -> tuple[str, ...]:
        """The folds that it must be told of a customer whom an answer is to reach by one of *channels*."""
        contact, found = self.policy.contact, set(terms.folds if terms is not None else ())
        if contact.complaint_days is not None or (contact and any(channel in CONTACT_CHANNELS for channel in channels)):
            found |= {MESSAGES, LAST_TOUCH}
        return tuple(sorted(found))

    def decide(self, matter: Matter) -> Governed:
        """What is answered within the policy; a message that is to go out, and an offer of which there are so many, is promised in the
        ledger.
        """
        query = matter.query
        # who does not allow their data to be used stays held out, though nothing is told of them
        standing = self.policy.assigned(matter.customer_ids[0] if matter.customer_ids else None)
        assigned = standing if query.customer_id is not None else UNASSIGNED
        channels: Sequence[str | None] = list(matter.channels) or [query.channel]
        if any(self.policy.holds_out(standing, matter.answers, channel) for channel in channels):
            # what would have been is decided freely, and goes nowhere
            free = self._bound(matter, channels[0])
            return Governed(replace(self._best(matter, free), fallback=HELD_OUT), assigned, True, channels[0])
        is_limited = matter.terms is not None and bool(matter.terms.budgets or matter.terms.stocks)
        try:
            for _ in range(TRIES_FOR_A_BUDGET if is_limited else TRIES):
                plan, chance = self._chosen(matter, channels)
                held = plan.promise is None or matter.dry_run or not plan.decision.choices
                if held or self._ledger.reserve(plan.promise, plan.allows):  # type: ignore[arg-type]
                    return Governed(plan.decision, assigned, False, plan.channel, chance, self._until(matter, plan))
            told = Decision([], 0, {}, TAKEN)
        except (DamagedStateError, OSError, SQLAlchemyError) as error:
            # what cannot be counted does not go out; pages and scores go on
            logger.error("nothing goes out by %s: %s", channels, error)
            told = Decision([], 0, {}, UNCOUNTED)
        return Governed(told, assigned, False, channels[0])

    def _chosen(self, matter: Matter, channels: Sequence[str | None]) -> tuple[_Plan, float]:
        """The plan for the channel of the highest priority, now and then for another, and the chance of that channel.

        The channel is chosen by what is best on each; only then is drawn, so that the chances of draw and channel multiply.
        """
        if len(channels) == 1:
            return self._plan(matter, channels[0]), 1.0
        settled = replace(matter, settled=True)
        picked, chance = self._picked([self._plan(settled, channel) for channel in channels])
        explores = matter.query.explore or self.policy.exploration.always
        return (self._plan(matter, picked.channel) if explores and picked.decision.choices else picked), chance

    def _picked(self, plans: Sequence[_Plan]) -> tuple[_Plan, float]:
        """The plan of the highest priority, now and then one of the others, and the chance of it."""
        open_ = [plan for plan in plans if plan.decision.choices]
        if len(open_) < 2:
            return (open_ or plans)[0], 1.0
        best = max(range(len(open_)), key=lambda k: open_[k].decision.choices[0].score)
        drawn = int(self._rng.integers(len(open_))) if self._rng.random() < ELSEWHERE else best
        return open_[drawn], ELSEWHERE / len(open_) + (1.0 - ELSEWHERE if drawn == best else 0.0)

    def _plan(self, matter: Matter, channel: str | None) -> _Plan:
        """What is decided if it goes by *channel*, as things stand."""
        query, contact = self._bound(matter, channel), self.policy.contact
        limits = self._used_up(matter)
        if limits is not None:
            query = replace(query, barred={**query.barred, USED_UP: limits})
        if (complaint := contact.complained(query.row, matter.now)) is not None:
            if matter.terms is None and channel in CONTACT_CHANNELS:
                return _Plan(channel, Decision([], 0, {}, complaint))
            if matter.terms is not None:
                query = replace(query, barred={**query.barred, complaint: ~matter.terms.transactional})
        contacts = contact and channel is not None and channel in CONTACT_CHANNELS and channel not in query.forbidden_channels
        if not contacts or channel is None:
            decision = self._best(matter, query)
            return _Plan(channel, decision, self._promise(matter, None, decision))
        return self._contact(matter, query, contact, channel)

    def _contact(self, matter: Matter, query: Query, contact: ContactPolicy, channel: str) -> _Plan:
        """What is decided if the customer is contacted by *channel*."""
        terms, now, zone = matter.terms, matter.now, self.zone_of(query.row)
        sent = sent_to(query.row) if query.customer_id is not None else []
        if sent is None:
            return _Plan(channel, Decision([], 0, {}, COUNTED_ANEW))
        # of nobody known nothing can be counted; what holds for all holds for them too
        promised = self._ledger.promised(matter.customer_ids, now, matter.decision_id) if matter.customer_ids else []
        known = self._counting(matter, together(sent, promised, now))
        why = contact.why_not(known, channel, now, zone)
        if matter.answers == "offers" and channel in contact.closed:
            why = f"no offer goes out by {channel}"
        barred: dict[str, Mask] = {}
        if terms is not None:
            rests = contact.rests(known, answers_of(query.row), now)
            resting = contact.resting(known, channel, now, zone)
            barred = {reason: terms.of(offers) for reason, offers in ({RESTING: resting} | rests).items() if offers}
            if lately := contact.sent_lately(known, now):
                barred[ITEM_RESTS] = terms.sharing_items(lately)
            if why is not None:
                barred[why] = np.ones(len(terms.transactional), bool)
            barred = {reason: mask & ~terms.transactional for reason, mask in barred.items()}
        if why is not None and (terms is None or not terms.transactional.any()):
            return _Plan(channel, Decision([], 0, {}, why))
        decision = self._best(matter, replace(query, barred={**query.barred, **barred}))
        if not decision.choices:
            return _Plan(channel, replace(decision, fallback=why or decision.fallback))
        offers = [choice.id for choice in decision.choices] if terms is not None else []
        is_owed = terms is not None and terms.is_owed(offers)

        def allows(promised: Sequence[Contacted]) -> bool:
            standing = self._counting(matter, together(sent, promised, now))
            free = is_owed or contact.why_not(standing, channel, now, zone) is None
            return free and not (frozenset() if is_owed else contact.resting(standing, channel, now, zone)) & set(offers)

        return _Plan(channel, decision, self._promise(matter, channel if matter.customer_ids else None, decision), allows)

    @staticmethod
    def _until(matter: Matter, plan: _Plan) -> datetime | None:
        promise = plan.promise
        if promise is None or matter.dry_run or not plan.decision.choices:
            return None
        ends = [*([promise.kept] if promise.channel is not None else []), *([promise.held] if promise.limits else [])]
        return matter.now + min(ends) if ends else None

    def _promise(self, matter: Matter, channel: str | None, decision: Decision) -> Promise | None:
        """What has to be written before a decision is given out; None where nothing has."""
        offers = [choice.id for choice in decision.choices] if matter.answers == "offers" else []
        limits = matter.terms.limits(offers) if matter.terms is not None else {}
        is_limited = matter.terms is not None and bool(matter.terms.budgets)
        if channel is None and not limits and not (is_limited and matter.is_repeatable):
            return None
        held = kept = timedelta(minutes=self.policy.contact.reserved_minutes) + matter.later
        if matter.query.customer_id is None:
            # nothing tells later whether it was sent: it counts as if it was
            kept = max(kept, LONGEST)
        return Promise(matter.customer_ids, matter.decision_id, channel, offers, matter.now, kept, limits, held, is_limited)

    def _counting(self, matter: Matter, contacts: Sequence[Contacted]) -> Sequence[Contacted]:
        """Those that caps and rests count: not what is owed to the customer."""
        if matter.terms is None or not matter.terms.transactional.any():
            return contacts
        owed = matter.terms.owed
        return [contact for contact in contacts if contact.offer_id not in owed]

    def _used_up(self, matter: Matter) -> Mask | None:
        if matter.terms is None or not (matter.terms.budgets or matter.terms.stocks):
            return None
        gone = self._ledger.used_up(matter.terms.budgets, matter.terms.stocks, matter.now, matter.decision_id)
        return matter.terms.of(gone) if gone else None

    def _bound(self, matter: Matter, channel: str | None) -> Query:
        """The query as it is if the answer goes by *channel*, within the terms of the offers."""
        query = replace(matter.query, channel=channel)
        if matter.terms is None:
            return query
        zone = self.zone_of(query.row)
        question = {**matter.context, **of_the_question(matter.now, zone, channel, query.store_id)}
        bound = matter.terms.bound(query, self.vocabulary.told(query.row, question))
        if matter.settled:
            bound = replace(bound, explore=False)
        if (response := matter.responses.get(channel or "")) is not None:
            bound = replace(bound, factors={**bound.factors, "channel": np.full(len(matter.terms.transactional), response)})
        return bound

    def _best(self, matter: Matter, query: Query) -> Decision:
        """What is answered, or what stands in for it where nothing is left."""
        decision = matter.decide(query)
        if decision.choices or matter.terms is None or not matter.terms.has_fallback:
            return decision
        instead = matter.decide(replace(query, stopgap=True, least=None))
        return replace(decision, choices=instead.choices, fallback=STAND_IN) if instead.choices else decision
