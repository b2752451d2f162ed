"""What HTTP and batch both do with a customer's row: ask a pipeline, and make the answer and the decision to log."""

from __future__ import annotations

import hashlib
import logging
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import msgspec
import numpy as np

from features.definitions.segments import WrongContextError
from features.events.event import Channel
from features.state.clock import moment_of
from models.attributes import Attributes
from models.decision import Decision, Query
from models.kind import ScoreModel
from models.registry import NoChampionError
from serving.decide.champions import Champions, Loaded
from serving.decide.governor import Matter
from serving.decide.policy import UNASSIGNED, Assignment
from serving.decide.questions import (
    Answer,
    CustomerRequest,
    ItemChoice,
    ItemsAnswer,
    NextBestOfferRequest,
    OfferChoice,
    OffersAnswer,
    RecommendationsRequest,
    ScoreAnswer,
    ScoreRequest,
    SimilarItemsRequest,
    UnknownAttributeError,
)
from serving.decide.timing import AHEAD_HOURS, best_time, responses
from serving.decide.who import NOBODY, Who
from serving.decide.wishes import notes_on, wishes_of

logger = logging.getLogger("ubiquo")
MAX_FEATURE_AGE = timedelta(days=7)
"""Beyond this an answer says that its features are old."""
DecisionRecord = dict[str, Any]


NOTHING_LEFT = "no offer is left for this customer and question: removed tells why"
NOT_ASKED_FOR = "not among those asked for"
WITHDRAWN = "the customer does not allow their data to be used for personalization"


class Engine(Champions):
    """Answers with what is in force. Holds no customer data; a newer champion replaces an older one between two answers."""

    def recommendations(
        self,
        name: str,
        request: RecommendationsRequest,
        who: Who,
        row: Mapping[str, Any],
        as_of: datetime,
        decision_id: str = "",
        now: datetime | None = None,
    ) -> tuple[ItemsAnswer, DecisionRecord]:
        """What the customer will like; *now* is when the answer goes out, if that is not *as_of*."""
        loaded = self.champion(name)
        assert loaded.pipeline is not None
        asked = {
            "listing": request.listing,
            "item_ids": tuple(request.item_ids),
            "store_id": self._store(request)[0],
            "bought_within_days": request.exclude_bought_within_days,
            "promoted": _placed(request.promoted),
            "diversity": request.diversity,
            "novelty": request.novelty,
            "explore": request.explore,
            "explain": request.explain,
        }
        query = _query(request, who, row, as_of, loaded.attributes, request.exclude_item_ids, **asked)
        query, held = self.merchandiser.bound(query, loaded.shelf, now or as_of)
        decide = partial(loaded.pipeline.decide, rng=self._drawing(decision_id))
        decision_id = decision_id or uuid.uuid4().hex
        found = self.governor.decide(Matter(who.ids, query, decision_id, "items", request.dry_run, now or as_of, decide))
        decision, rules = self.merchandiser.told(query, held, _told(who, query, found.decision))
        return self._list(loaded, name, request, query, decision, decision_id, rules, found.assigned, found.held_out)

    def similar_items(self, request: SimilarItemsRequest, as_of: datetime) -> tuple[ItemsAnswer, DecisionRecord]:
        """What is like an item, by the first model that recommends items."""
        name = next((name for name, model in self.models.items() if model.kind.answers == "items"), None)
        if name is None:
            raise NoChampionError("no model that mlflow.yaml names recommends items: name one (kind: recommendations), and train it")
        loaded = self.champion(name)
        assert loaded.pipeline is not None
        asked = {"listing": "similar", "item_ids": (request.item_id,)}
        query = _query(request, NOBODY, {}, as_of, loaded.attributes, request.exclude_item_ids, **asked)
        query, held = self.merchandiser.bound(query, loaded.shelf, as_of)
        decision, rules = self.merchandiser.told(query, held, loaded.pipeline.decide(query, self._rng))
        return self._list(loaded, "similar-items", request, query, decision, uuid.uuid4().hex, rules)

    def next_best_offer(
        self,
        name: str,
        request: NextBestOfferRequest,
        who: Who,
        row: Mapping[str, Any],
        as_of: datetime,
        decision_id: str = "",
        now: datetime | None = None,
    ) -> tuple[OffersAnswer, DecisionRecord]:
        """What to offer the customer; *now* is when the answer goes out, if that is not *as_of*."""
        loaded = self.champion(name)
        assert loaded.pipeline is not None
        try:
            self.governor.vocabulary.check_context(request.context)
        except WrongContextError as error:
            raise UnknownAttributeError(error.field, error.reason) from None
        asked: dict[str, Any] = {name: getattr(request, name) for name in ("explore", "explain")}
        asked["without"] = frozenset(request.without)
        asked["store_id"], store_km = self._store(request)
        if request.offer_ids and loaded.terms is not None:
            asked["barred"] = {NOT_ASKED_FOR: ~loaded.terms.of(request.offer_ids)}
        query = _query(request, who, row, as_of, loaded.attributes, request.exclude_offer_ids, **asked)
        # whoever names it makes it again where it was broken off
        decide = partial(loaded.pipeline.decide, rng=self._drawing(decision_id))
        is_repeatable, decision_id = bool(decision_id), decision_id or uuid.uuid4().hex
        channels, zone, at = self._open_channels(request, who), self.governor.zone_of(query.row), now or as_of
        likely = responses(self._sending, channels, query.row, zone) if self._sending is not None and channels else {}
        later = timedelta(hours=AHEAD_HOURS) if request.best_time else timedelta()
        matter = Matter(
            who.ids, query, decision_id, "offers", request.dry_run, at, decide, loaded.terms, request.context, channels, likely, later,
            is_repeatable,
        )  # fmt: skip
        found = self.governor.decide(matter)
        query = replace(query, channel=found.channel)
        decision = _told(who, query, found.decision)
        fallback = decision.fallback or (self._age_note(name, query.row, as_of) if decision.choices else NOTHING_LEFT)
        about = self._about(name, loaded, query, fallback, decision_id)
        offers = [
            OfferChoice(offer_id=c.id, score=c.score, source=c.source, reason=c.reason, propensity=c.propensity, **c.details)
            for c in decision.choices
        ]
        answer = OffersAnswer(
            **about, offers=offers, removed=dict(decision.removed), left_out=_named(decision), channel=found.channel,
            store_id=query.store_id,
            store_km=store_km,
            channel_propensity=found.channel_propensity, offers_version=loaded.offers_digest[:12], promised_until=found.promised_until,
            notes=notes_on(request.include, request.exclude, loaded.attributes),
        )  # fmt: skip
        if request.best_time and offers and found.channel is not None:
            quiet = self.governor.policy.contact.quiet_hours
            timed = best_time(self._sending, found.channel, query.row, at, zone, quiet, self._rng)
            answer.send_at, answer.send_at_propensity = timed
        assigned, held_out = found.assigned, found.held_out
        self._assign(answer, assigned, held_out)
        return answer, self._record(name, request, answer, offers, query.row, held_out)

    def _drawing(self, decision_id: str) -> np.random.Generator:
        """What draws: for a decision that may be made again always the same, so that its log stays true."""
        if not decision_id:
            return self._rng
        return np.random.default_rng(int.from_bytes(hashlib.blake2b(decision_id.encode(), digest_size=8).digest()))

    def _store(self, request: RecommendationsRequest | NextBestOfferRequest) -> tuple[str | None, float | None]:
        """The store that a question names, or the nearest to where the customer is with how many kilometres away it is."""
        found = None if request.position is None else self._stores.nearest(request.position.lat, request.position.lon)
        return (request.store_id, None) if found is None else found

    @staticmethod
    def _open_channels(request: NextBestOfferRequest, who: Who) -> list[Channel]:
        """Those of the channels asked about by which the customer may be reached; where none is, the first, which will say so."""
        return [c for c in request.channels if c not in who.forbidden_channels] or request.channels[:1]

    def score(
        self, name: str, request: ScoreRequest, who: Who, row: Mapping[str, Any], as_of: datetime, decision_id: str = ""
    ) -> tuple[ScoreAnswer, DecisionRecord]:
        """A number about the customer, such as the probability that they are about to leave."""
        loaded = self.champion(name)
        model: ScoreModel = loaded.model.model
        query = Query.from_row(who.customer_id, as_of, row) if who.may_be_used else Query.from_row(None, as_of, {})
        why_not = who.not_reached(request.channel) or (model.why_not(row) if who.may_be_used else WITHDRAWN)
        about = self._about(name, loaded, query, why_not or self._age_note(name, row, as_of), decision_id or uuid.uuid4().hex)
        value, reasons = (None, []) if why_not else model.answer(row)
        said = [str(r["text"]) for r in reasons if r["effect"] == "raises"] or [str(r["text"]) for r in reasons]
        answer = ScoreAnswer(
            **about,
            score=value,
            unit=model.unit,
            probability=value if model.unit == "probability" else None,
            horizon_days=model.horizon_days,
            source=model.source,
            reason=why_not or "; ".join(said),
            reasons=[dict(r) for r in reasons],
        )
        self._assign(answer, self.governor.policy.assigned(query.customer_id), held_out=False)
        return answer, self._record(name, request, answer, [{"score": value, "unit": model.unit, "propensity": 1.0}], query.row)

    def _list(
        self,
        loaded: Loaded,
        kind: str,
        request: Any,
        query: Query,
        decision: Decision,
        decision_id: str,
        rules: Sequence[str],
        assigned: Assignment = UNASSIGNED,
        held_out: bool = False,
    ) -> tuple[ItemsAnswer, DecisionRecord]:
        fallback = decision.fallback or self._age_note(kind, query.row, query.as_of)
        name = loaded.label
        items = [ItemChoice(c.id, name(c.id), c.score, c.source, c.reason, c.propensity, **c.details) for c in decision.choices]
        about = self._about(kind, loaded, query, fallback, decision_id)
        # a picture and a price are for the page alone: the log would only grow by them
        shown = [msgspec.structs.replace(item, **loaded.shown(item.item_id)) for item in items]
        answer = ItemsAnswer(
            **about,
            items=shown,
            removed=dict(decision.removed),
            left_out=_named(decision),
            notes=notes_on(request.include, request.exclude, loaded.attributes),
        )
        self._assign(answer, assigned, held_out)
        record = self._record(kind, request, answer, items, query.row, held_out)
        if rules:
            record["assignment"]["rules"] = rules
        return answer, record

    @staticmethod
    def _assign(answer: Answer, assigned: Assignment, held_out: bool) -> None:
        """Write on an answer what its customer is in; one *held_out* gets nothing, while the log keeps what would have been."""
        answer.group, answer.variants = assigned.group, dict(assigned.variants)
        if not held_out:
            return
        if isinstance(answer, ItemsAnswer):
            answer.items = []
        elif isinstance(answer, OffersAnswer):
            answer.offers = []

    def _about(self, kind: str, loaded: Loaded, query: Query, fallback: str | None, decision_id: str) -> dict[str, Any]:
        oldest = self._oldest(kind, query.row)
        feature_at = None if oldest is None else moment_of(oldest)
        return {
            "decision_id": decision_id,
            "as_of": query.as_of,
            "customer_id": query.customer_id,
            "model": loaded.model.label,
            "feature_at": feature_at,
            "feature_age_seconds": None if feature_at is None else max(0.0, (query.as_of - feature_at).total_seconds()),
            "fallback": fallback,
        }

    def _age_note(self, name: str, row: Mapping[str, Any], as_of: datetime) -> str | None:
        oldest = self._oldest(name, row)
        # states are folded as events come in, so only the windowed features grow old by themselves
        if "customer_activity" not in self.views_of(name) or oldest is None:
            return None
        age = as_of - moment_of(oldest)
        if age <= MAX_FEATURE_AGE:
            return None
        command = f"python -m features materialize --as-of {as_of:%Y-%m-%d}"
        return f"the features are {age.days} days old (limit {MAX_FEATURE_AGE.days}): import what has happened since, then run {command}"

    def _record(self, kind: str, request: Any, answer: Any, choices: Any, row: Mapping[str, Any], held_out: bool = False) -> DecisionRecord:
        return {
            "decision_id": answer.decision_id,
            "kind": kind,
            "customer_id": answer.customer_id,
            "as_of": answer.as_of.astimezone(UTC),
            "model": answer.model,
            "feature_at": self._oldest(kind, row),
            "fallback": answer.fallback,
            # whom it is about stands in customer_id; identifiers in clear stand nowhere but in the contact table
            "request": _without_person(request),
            "choices": choices,
            "features": row,
            "assignment": {"group": answer.group, "variants": answer.variants, "held_out": held_out, **_ways(answer)},
        }

    def _oldest(self, name: str, row: Mapping[str, Any]) -> int | None:
        """The moment (Unix microseconds) of the oldest view that the answer reads, or None if none is known of them."""
        moments = (row.get(f"{view}_at") for view in self.views_of(name))
        return min((int(at) for at in moments if at is not None and not math.isnan(at)), default=None)


def _ways(answer: Any) -> dict[str, Any]:
    """By which channel and when an offer goes out, with the chances of both."""
    if not isinstance(answer, OffersAnswer):
        return {}
    names = ("channel", "channel_propensity", "send_at", "send_at_propensity", "offers_version")
    return {name: getattr(answer, name) for name in names}


def _without_person(request: Any) -> Any:
    """A question without whom it is about and where they are."""
    if not isinstance(request, CustomerRequest):
        return request
    told = msgspec.structs.replace(request, customer_id=None, identifiers={})
    return msgspec.structs.replace(told, position=None) if isinstance(told, RecommendationsRequest | NextBestOfferRequest) else told


def _told(who: Who, query: Query, decision: Decision) -> Decision:
    """The decision with the reason why it could not be the customer's own."""
    not_reached = who.not_reached(query.channel)
    if not_reached is not None:
        # the filters have left nothing; even one that forgets to look sends nothing out
        return replace(decision, choices=(), fallback=not_reached)
    refused = decision.fallback is not None and not decision.candidates
    return decision if who.may_be_used or refused else replace(decision, fallback=WITHDRAWN)


def _named(decision: Decision) -> dict[str, list[str]] | None:
    return None if decision.left_out is None else {reason: list(ids) for reason, ids in decision.left_out.items()}


def _query(
    request: RecommendationsRequest | SimilarItemsRequest | NextBestOfferRequest,
    who: Who,
    row: Mapping[str, Any],
    as_of: datetime,
    attributes: Attributes,
    banned: Sequence[str],
    **asked: Any,
) -> Query:
    if not who.may_be_used:
        # not even whose question it is: what is not allowed is not logged either
        who, row = replace(who, customer_id=None), {}
    asked |= {"channel": getattr(request, "channel", None), "forbidden_channels": who.forbidden_channels}
    include, exclude = wishes_of("include", request.include, attributes), wishes_of("exclude", request.exclude, attributes)
    return Query.from_row(
        who.customer_id, as_of, row, limit=request.limit, include=include, exclude=exclude, exclude_ids=frozenset(banned), **asked
    )


def _placed(promoted: Mapping[str, int]) -> dict[int, str]:
    """By place the item to stand there; where two claim one place, the later named takes the next that is free."""
    placed: dict[int, str] = {}
    for item_id, place in sorted(promoted.items(), key=lambda each: each[1]):
        while place in placed:
            place += 1
        placed[place] = item_id
    return placed
