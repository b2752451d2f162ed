"""The shop's policy at work: who is held out, whether a customer may be contacted now, and the promise that a decision is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import NamedTuple
from zoneinfo import ZoneInfo

from sqlalchemy.exc import SQLAlchemyError

from features.catalogue.shop import Shop
from features.people.consent import CONTACT_CHANNELS
from features.state.disk import DamagedStateError
from features.state.home import Home
from models.decision import Decision, Query
from models.kind import Answers
from serving.decide.contact import Contacted, ContactPolicy, sent_to, together
from serving.decide.ledger import Ledger
from serving.decide.policy import HELD_OUT, UNASSIGNED, Assignment, Policy

logger = logging.getLogger("ubiquo")
POLICY = "policy.yaml"
"""The file of a home that says who is held out, who sees which variant, and how often customers are contacted."""
MESSAGES = "messages"
"""The fold that tells what was sent to a customer."""
LONGEST = timedelta(days=32)
"""A calendar month is no longer."""
TRIES = 3
"""How often a decision is made anew where another takes the place that it was made for."""
COUNTED_ANEW = "what was sent to the customer is being counted anew: ask again in a minute"
UNCOUNTED = "the ledger of what goes out cannot be read or written, so nothing goes out: the service's log tells why"
TAKEN = "other decisions took the customer's last place meanwhile: ask again"


class Governed(NamedTuple):
    """A decision as the policy lets it stand, what its customer is in, and whether they are held out."""

    decision: Decision
    assigned: Assignment
    held_out: bool


class Governor:
    """Keeps the policy of one home. Nothing goes out past it, over HTTP as in batch.

    Raises:
        PolicyError: the policy file has a mistake: nothing may go out without it.
    """

    def __init__(self, home: Home) -> None:
        self._path = home.root / POLICY
        self.policy = Policy.read(self._path)
        """The last that was whole."""
        self._ledger, self._zone = Ledger(home), ZoneInfo(Shop.load(home).timezone)

    def refresh(self) -> bool:
        """Read the policy again; returns whether it has changed.

        Raises:
            PolicyError: it has a mistake; the one before stays in force.
        """
        found = Policy.read(self._path)
        changed, self.policy = found != self.policy, found
        return changed

    def reads(self, channel: str | None) -> tuple[str, ...]:
        """The folds that it must be told of a customer whom an answer is to reach by *channel*."""
        return (MESSAGES,) if self.policy.contact and channel in CONTACT_CHANNELS else ()

    def decide(
        self,
        customer_ids: Sequence[str],
        query: Query,
        decision_id: str,
        answers: Answers,
        dry_run: bool,
        now: datetime,
        decide: Callable[[Query], Decision],
    ) -> Governed:
        """What *decide* answers within the policy; a message that is to go out is promised in the ledger.

        Args:
            customer_ids: whom it is about: their id, and those that were merged into it; none is nobody known.
            dry_run: whether nothing is promised.
            now: when the answer goes out.
        """
        # who does not allow their data to be used stays held out, though nothing is told of them
        standing = self.policy.assigned(customer_ids[0] if customer_ids else None)
        assigned = standing if query.customer_id is not None else UNASSIGNED
        if self.policy.holds_out(standing, answers, query.channel):
            # what would have been is decided freely, and goes nowhere
            return Governed(replace(decide(query), fallback=HELD_OUT), assigned, True)
        contact, channel = self.policy.contact, query.channel
        if not contact or channel is None or channel not in CONTACT_CHANNELS or channel in query.forbidden_channels:
            return Governed(decide(query), assigned, False)
        if answers == "offers" and channel in contact.closed:
            return Governed(Decision([], 0, {}, f"no offer goes out by {channel}"), assigned, False)
        sent = sent_to(query.row) if query.customer_id is not None else []
        if sent is None:
            return Governed(Decision([], 0, {}, COUNTED_ANEW), assigned, False)
        if not customer_ids:
            # of nobody known nothing can be counted; what holds for all holds for them too
            why = contact.why_not([], channel, now, self._zone)
            return Governed(decide(query) if why is None else Decision([], 0, {}, why), assigned, False)
        kept = timedelta(minutes=contact.reserved_minutes)
        if query.customer_id is None:
            # nothing tells later whether it was sent: it counts as if it was
            kept = max(kept, LONGEST)
        try:
            decision = self._within(contact, customer_ids, sent, query, channel, decision_id, answers, dry_run, now, kept, decide)
        except (DamagedStateError, OSError, SQLAlchemyError) as error:
            # what cannot be counted does not go out; pages and scores go on
            logger.error("nothing goes out by %s: %s", channel, error)
            decision = Decision([], 0, {}, UNCOUNTED)
        return Governed(decision, assigned, False)

    def _within(
        self,
        contact: ContactPolicy,
        customer_ids: Sequence[str],
        sent: Sequence[Contacted],
        query: Query,
        channel: str,
        decision_id: str,
        answers: Answers,
        dry_run: bool,
        now: datetime,
        kept: timedelta,
        decide: Callable[[Query], Decision],
    ) -> Decision:
        for _ in range(TRIES):
            known = together(sent, self._ledger.promised(customer_ids, now, decision_id), now)
            if (why := contact.why_not(known, channel, now, self._zone)) is not None:
                return Decision([], 0, {}, why)
            resting = contact.resting(known, channel, now, self._zone) if answers == "offers" else frozenset()
            decision = decide(replace(query, resting_ids=resting))
            if dry_run or not decision.choices:
                return decision
            offers = [choice.id for choice in decision.choices] if answers == "offers" else []

            def allows(promised: Sequence[Contacted], offers: Sequence[str] = offers) -> bool:
                standing = together(sent, promised, now)
                free = contact.why_not(standing, channel, now, self._zone) is None
                return free and not contact.resting(standing, channel, now, self._zone) & set(offers)

            if self._ledger.reserve(customer_ids, decision_id, channel, offers, now, kept, allows):
                return decision
        return Decision([], 0, {}, TAKEN)
