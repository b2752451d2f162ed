"""What the offers in force ask for, as masks over their positions: eligibility, channels, stores, budgets, and what counts for more."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from features.definitions.conditions import CelCondition, ConditionError, folds_of
from features.definitions.segments import Told, Vocabulary
from models.decision import Query
from models.offers import OfferBook
from serving.decide.policy import Policy

Mask = NDArray[np.bool_]
NOT_ELIGIBLE = "the customer is not eligible"
NOT_HERE = "not in this store"


class Terms:
    """The terms of one book of offers under one policy. Holds no customer data.

    Raises:
        ConditionError: an offer's eligibility names what is not known any more; the message names the offer.
    """

    def __init__(self, book: OfferBook, vocabulary: Vocabulary, policy: Policy) -> None:
        self._book, self._policy, offers = book, policy, book.offers
        self._place = {offer_id: k for k, offer_id in enumerate(book.offer_ids)}
        self.transactional: Mask = np.array([offer.transactional for offer in offers], bool)
        """Which are owed to the customer: caps, rests and complaints do not hold them."""
        self.owed = frozenset(offer.offer_id for offer in offers if offer.transactional)
        """Their ids."""
        self.has_fallback = bool(book.is_fallback.any())
        """Whether any stands in where nothing else may be offered."""
        self.budgets = {offer.offer_id: offer.budget for offer in offers if offer.budget is not None}
        self.stocks = {offer.offer_id: offer.stock for offer in offers if offer.stock is not None}
        asked: dict[CelCondition, list[int]] = {}
        for k, offer in enumerate(offers):
            if offer.eligible:
                try:
                    asked.setdefault(vocabulary.parse_condition(offer.eligible), []).append(k)
                except ConditionError as error:
                    raise ConditionError(f"offer {offer.offer_id!r}, eligible: {error}") from None
        self._eligible = {condition: self._mask(places) for condition, places in asked.items()}
        self._channels = [frozenset(offer.channels) for offer in offers]
        self._by_channel: dict[str, Mask] = {}
        self._stores = [(k, frozenset(offer.store_ids)) for k, offer in enumerate(offers) if offer.store_ids]
        self._rules: list[tuple[CelCondition, float, Mask]] = []
        for rule in policy.arbitration.context:
            fits = [
                (not rule.kinds or offer.kind in rule.kinds)
                and (not rule.stages or offer.stage in rule.stages)
                and (not rule.categories or offer.category in rule.categories)
                for offer in offers
            ]
            self._rules.append((vocabulary.parse_condition(rule.when), rule.factor, np.array(fits, bool)))
        conditions = [*asked, *(condition for condition, _, _ in self._rules)]
        self.folds = folds_of(frozenset().union(*(vocabulary.needs(condition) for condition in conditions)))
        """The folds whose state the conditions read."""

    def bound(self, query: Query, told: Told) -> Query:
        """The query with what the terms bar and what counts for more."""
        barred: dict[str, Mask] = dict(query.barred)
        if query.channel is not None and (elsewhere := self._not_by(query.channel)).any():
            barred[f"not offered by {query.channel}"] = elsewhere
        if self._stores and query.store_id is not None:
            barred[NOT_HERE] = self._mask([k for k, stores in self._stores if query.store_id not in stores])
        shut = [mask for condition, mask in self._eligible.items() if not condition.holds(told)]
        if shut:
            barred[NOT_ELIGIBLE] = np.logical_or.reduce(shut)
        factors = dict(query.factors)
        held = [(factor, mask) for condition, factor, mask in self._rules if condition.holds(told)]
        if self._rules:
            context = np.ones(len(self._channels))
            for factor, mask in held:
                context[mask] *= factor
            factors["context"] = context
        arbitration, exploration = self._policy.arbitration, self._policy.exploration
        return replace(
            query,
            barred=barred,
            factors=factors,
            without=query.without | frozenset(arbitration.leave_out),
            costs=arbitration.sending_minor.get(query.channel, 0.0) if query.channel else 0.0,  # type: ignore[call-overload]
            least=arbitration.least,
            owed=self.transactional,
            explore=query.explore or exploration.always,
            temperature=exploration.temperature,
            uniform=exploration.uniform,
        )

    def of(self, offer_ids: Iterable[str]) -> Mask:
        """Where these offers stand; what is not in force stands nowhere."""
        return self._mask([self._place[each] for each in offer_ids if each in self._place])

    def sharing_items(self, offer_ids: Iterable[str]) -> Mask:
        """Where the offers stand that are on an item of one of these, themselves among them."""
        places = np.flatnonzero(self.of(offer_ids))
        items = np.asarray(self._book.by_offer[places].sum(axis=0)).ravel() > 0
        shared: Mask = np.asarray(self._book.by_offer @ items) > 0
        return shared | self.of(offer_ids)

    def limits(self, offer_ids: Iterable[str]) -> Mapping[str, int]:
        """The budgets of those of these offers that have one."""
        return {each: self.budgets[each] for each in offer_ids if each in self.budgets}

    def is_owed(self, offer_ids: Iterable[str]) -> bool:
        """Whether all of these are owed to the customer."""
        return all(self.transactional[self._place[each]] for each in offer_ids)

    def _mask(self, places: list[int]) -> Mask:
        mask = np.zeros(len(self._place), bool)
        mask[places] = True
        return mask

    def _not_by(self, channel: str) -> Mask:
        if channel not in self._by_channel:
            self._by_channel[channel] = np.array([bool(own) and channel not in own for own in self._channels], bool)
        return self._by_channel[channel]
