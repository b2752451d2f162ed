"""What HTTP and batch both do with a customer's row: ask a pipeline, and make the answer and the decision to log."""

from __future__ import annotations

import logging
import math
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import numpy as np

from features.catalogue.tables import ITEM_ATTRIBUTES, Catalogue
from features.definitions.folds import History, Touch, fold_history
from features.state.clock import AHEAD, microseconds
from features.state.home import Home
from features.store.feature_store import FeatureStore, moment_of
from models.churn import Churn, eligible
from models.decision import Decision, Pipeline, Query
from models.next_best_offer import ATTRIBUTES as OFFER_ATTRIBUTES
from models.next_best_offer import NextBestOffer
from models.offers import Offer
from models.recommender.recommender import Recommender
from models.registry import KINDS, Kind, LoadedModel, NoChampionError, Registry
from serving.decide.questions import (
    ChurnAnswer,
    ChurnRequest,
    CustomerRequest,
    ItemChoice,
    ItemsAnswer,
    NextBestOfferRequest,
    OfferChoice,
    OffersAnswer,
    RecommendationsRequest,
    SimilarItemsRequest,
    UnknownAttributeError,
)

logger = logging.getLogger("ubiquo")
MAX_FEATURE_AGE = timedelta(days=7)
"""Beyond this an answer says that its features are old."""
VIEWS_OF: dict[str, tuple[str, ...]] = {
    "churn": ("customer_activity",),
    "recommendations": ("customer_history",),
    "next-best-offer": ("customer_activity", "customer_history"),
}
SERVICE_OF: dict[str, str] = {
    "churn": "churn_v1",
    "recommendations": "recommendations_v1",
    "next-best-offer": "next_best_offer_v1",
}
DecisionRecord = dict[str, Any]


WITHDRAWN = "the customer does not allow their data to be used for personalization"


@dataclass(frozen=True)
class Who:
    """Whom an answer is about, and what she allows."""

    customer_id: str | None
    may_be_used: bool = True
    """Whether her data may be used for personalization."""
    forbidden_channels: frozenset[str] = frozenset()

    def not_reached(self, channel: str | None) -> str | None:
        """Why nothing may be decided that is to go out by *channel*; None where it may, or where nothing goes out."""
        return f"the customer has not permitted contact by {channel}" if channel in self.forbidden_channels else None


NOBODY = Who(None)


@dataclass(frozen=True)
class Loaded:
    """A champion with the pipeline that serves it."""

    model: LoadedModel
    pipeline: Pipeline[Any] | None


class Engine:
    """The champions of one home. Holds no customer data; a newer champion replaces an older one between two answers."""

    def __init__(self, home: Home, registry: Registry | None = None) -> None:
        self._home = home
        self._registry = registry or Registry()
        self._loaded: dict[str, Loaded] = {}
        self.broken: dict[str, str] = {}
        """The kinds whose champion cannot be loaded, and why."""
        self._offers = ""
        """Which offers the pipeline of the champion was built on."""
        self._rng = np.random.default_rng()
        self.refresh()

    def refresh(self) -> list[str]:
        """Load champions that are new since the last call, and offers; returns what was loaded."""
        news = []
        offers = Catalogue(self._home).digest("offers")
        for kind in KINDS:
            version = self._registry.version_of(kind, self._registry.settings.champion)
            held = self._loaded.get(kind)
            if version is None:
                continue
            if held is not None and held.model.version == version:
                if kind == "next-best-offer" and offers != self._offers:
                    self._loaded[kind] = Loaded(held.model, self._pipeline(kind, held.model.model))
                    news.append(f"{held.model.label} with new offers")
                continue
            try:
                loaded = self._registry.load(f"{kind}@{self._registry.settings.champion}")
                self._loaded[kind] = Loaded(loaded, self._pipeline(kind, loaded.model))
            except Exception as error:
                # the others go on, and so does the champion before, if there was one
                why = f"version {version} cannot be loaded: {error}"[:300]
                if self.broken.get(kind) != why:
                    logger.exception("%s: version %s cannot be loaded", kind, version)
                self.broken[kind] = why
                continue
            self.broken.pop(kind, None)
            news.append(loaded.label)
        self._offers = offers
        return news

    def missing(self) -> list[str]:
        """The kinds that have no champion."""
        return [kind for kind in KINDS if kind not in self._loaded]

    def recommendations(
        self, request: RecommendationsRequest, who: Who, row: Mapping[str, Any], as_of: datetime
    ) -> tuple[ItemsAnswer, DecisionRecord]:
        """What she will like."""
        loaded = self._champion("recommendations")
        assert loaded.pipeline is not None
        asked = {"listing": request.listing, "explore": request.explore}
        query = _query(request, who, row, as_of, ITEM_ATTRIBUTES, request.exclude_item_ids, **asked)
        decision = _told(who, query, loaded.pipeline.decide(query, self._rng))
        return self._items(loaded, "recommendations", request, query, decision)

    def similar_items(self, request: SimilarItemsRequest, as_of: datetime) -> tuple[ItemsAnswer, DecisionRecord]:
        """What is like an item."""
        loaded = self._champion("recommendations")
        model: Recommender = loaded.model.model
        banned = [*request.exclude_item_ids, request.item_id]
        query = _query(request, NOBODY, {"item_id": request.item_id}, as_of, ITEM_ATTRIBUTES, banned)
        return self._items(loaded, "similar-items", request, query, model.similar.decide(query, self._rng))

    def next_best_offer(
        self, request: NextBestOfferRequest, who: Who, row: Mapping[str, Any], as_of: datetime
    ) -> tuple[OffersAnswer, DecisionRecord]:
        """What to offer her."""
        loaded = self._champion("next-best-offer")
        assert loaded.pipeline is not None
        query = _query(request, who, row, as_of, OFFER_ATTRIBUTES, request.exclude_offer_ids, explore=request.explore)
        decision = _told(who, query, loaded.pipeline.decide(query, self._rng))
        fallback = decision.fallback or self._age_note("next-best-offer", query.row, as_of)
        about = self._about("next-best-offer", loaded, query, fallback)
        offers = [
            OfferChoice(offer_id=c.id, score=c.score, source=c.source, reason=c.reason, propensity=c.propensity, **c.details)
            for c in decision.choices
        ]
        answer = OffersAnswer(**about, offers=offers, removed=dict(decision.removed))
        return answer, self._record("next-best-offer", request, answer, offers, query.row)

    def churn(self, request: ChurnRequest, who: Who, row: Mapping[str, Any], as_of: datetime) -> tuple[ChurnAnswer, DecisionRecord]:
        """Whether she is about to leave."""
        loaded = self._champion("churn")
        model: Churn = loaded.model.model
        query = Query.from_row(who.customer_id, as_of, row) if who.may_be_used else Query.from_row(None, as_of, {})
        why_not = who.not_reached(request.channel) or (eligible(row) if who.may_be_used else WITHDRAWN)
        about = self._about("churn", loaded, query, why_not or self._age_note("churn", row, as_of))
        probability, reasons = (None, []) if why_not else model.answer(row)
        said = [str(r["text"]) for r in reasons if r["effect"] == "raises"] or [str(r["text"]) for r in reasons]
        answer = ChurnAnswer(
            **about,
            probability=probability,
            score=probability,
            horizon_days=model.horizon_days,
            source=model.model.kind,
            reason=why_not or "; ".join(said),
            reasons=[dict(r) for r in reasons],
        )
        return answer, self._record("churn", request, answer, [{"probability": probability, "propensity": 1.0}], query.row)

    def _pipeline(self, kind: Kind, model: Any) -> Pipeline[Any] | None:
        if kind == "recommendations":
            recommender: Recommender = model
            return recommender.pipeline
        if kind == "next-best-offer":
            offers: NextBestOffer = model
            rows = Catalogue(self._home).read("offers").to_pylist()
            return offers.pipeline(offers.book(Offer.from_row(row) for row in rows))
        return None

    def _champion(self, kind: str) -> Loaded:
        try:
            return self._loaded[kind]
        except KeyError:
            detail = f"no champion for {kind}: train and promote one (python -m training {kind})"
            if kind in self.broken:
                detail = f"the champion for {kind} cannot be loaded: train and promote another, or roll back (python -m training rollback)"
            raise NoChampionError(detail) from None

    def _items(self, loaded: Loaded, kind: str, request: Any, query: Query, decision: Decision) -> tuple[ItemsAnswer, DecisionRecord]:
        fallback = decision.fallback or self._age_note(kind, query.row, query.as_of)
        name = loaded.model.model.label
        items = [ItemChoice(c.id, name(c.id), c.score, c.source, c.reason, c.propensity) for c in decision.choices]
        about = self._about(kind, loaded, query, fallback)
        answer = ItemsAnswer(**about, items=items, removed=dict(decision.removed))
        return answer, self._record(kind, request, answer, items, query.row)

    def _about(self, kind: str, loaded: Loaded, query: Query, fallback: str | None) -> dict[str, Any]:
        oldest = _oldest(kind, query.row)
        feature_at = None if oldest is None else moment_of(oldest)
        return {
            "decision_id": uuid.uuid4().hex,
            "as_of": query.as_of,
            "customer_id": query.customer_id,
            "model": loaded.model.label,
            "feature_at": feature_at,
            "feature_age_seconds": None if feature_at is None else max(0.0, (query.as_of - feature_at).total_seconds()),
            "fallback": fallback,
        }

    @staticmethod
    def _age_note(kind: str, row: Mapping[str, Any], as_of: datetime) -> str | None:
        oldest = _oldest(kind, row)
        # the history is folded as events come in, so only the windowed aggregates grow old by themselves
        if "customer_activity" not in VIEWS_OF.get(kind, ()) or oldest is None:
            return None
        age = as_of - moment_of(oldest)
        if age <= MAX_FEATURE_AGE:
            return None
        command = f"python -m features materialize --as-of {as_of:%Y-%m-%d}"
        return f"the features are {age.days} days old (limit {MAX_FEATURE_AGE.days}): import what has happened since, then run {command}"

    @staticmethod
    def _record(kind: str, request: Any, answer: Any, choices: Any, row: Mapping[str, Any]) -> DecisionRecord:
        return {
            "decision_id": answer.decision_id,
            "kind": kind,
            "customer_id": answer.customer_id,
            "as_of": answer.as_of.astimezone(UTC),
            "model": answer.model,
            "feature_at": _oldest(kind, row),
            "fallback": answer.fallback,
            # whom it is about stands in customer_id; identifiers in clear stand nowhere but in the contact table
            "request": msgspec.structs.replace(request, customer_id=None, identifiers={})
            if isinstance(request, CustomerRequest)
            else request,
            "choices": choices,
            "features": row,
        }


class OnlineReader:
    """Feature rows of one customer for the request path: one read, and what has happened since the row was written."""

    def __init__(
        self,
        store: FeatureStore,
        fresh: Callable[[str], Sequence[tuple[datetime, Touch]]] = lambda customer_id: (),
        make_anew: Callable[[str], None] = lambda customer_id: None,
    ) -> None:
        self._store, self._fresh, self._make_anew = store, fresh, make_anew
        self._lock = threading.Lock()

    def row(self, kind: str, customer_id: str | None, as_of: datetime) -> Mapping[str, Any]:
        """The customer's row for that kind of question; empty for nobody, and for a row from a time to come, which is made anew."""
        if customer_id is None:
            return {}
        # before the row: what is taken from here has reached the row by then
        fresh = self._fresh(customer_id) if "customer_history" in VIEWS_OF[kind] else ()
        with self._lock:
            [row] = self._store.online(SERVICE_OF[kind], [customer_id])
        if any((row.get(f"{view}_at") or 0) > microseconds(as_of + AHEAD) for view in VIEWS_OF[kind]):
            self._make_anew(customer_id)
            return {}
        return with_touches(row, fresh) if fresh else row


def with_touches(row: Mapping[str, Any], fresh: Sequence[tuple[datetime, Touch]]) -> Mapping[str, Any]:
    """The feature row with those of *fresh* folded in that it does not know, as of just after the last."""
    unknown = [(at, touch) for at, touch in fresh if microseconds(at) >= (row.get("customer_history_at") or 0)]
    if not unknown:
        return row
    history = History.from_row(row)
    for _, touch in unknown:
        fold_history(history, touch)
    return {**row, **history.to_row(), "customer_history_at": microseconds(unknown[-1][0]) + 1}


def _told(who: Who, query: Query, decision: Decision) -> Decision:
    """The decision with the reason why it could not be the customer's own."""
    not_reached = who.not_reached(query.channel)
    if not_reached is not None:
        # the filters have left nothing; even one that forgets to look sends nothing out
        return replace(decision, choices=(), fallback=not_reached)
    return decision if who.may_be_used else replace(decision, fallback=WITHDRAWN)


def _query(
    request: RecommendationsRequest | SimilarItemsRequest | NextBestOfferRequest,
    who: Who,
    row: Mapping[str, Any],
    as_of: datetime,
    attributes: tuple[str, ...],
    banned: Sequence[str],
    **asked: Any,
) -> Query:
    if not who.may_be_used:
        # not even whose question it is: what is not allowed is not logged either
        who, row = replace(who, customer_id=None), {}
    asked |= {"channel": getattr(request, "channel", None), "forbidden_channels": who.forbidden_channels}
    include, exclude = _wanted("include", request.include, attributes), _wanted("exclude", request.exclude, attributes)
    return Query.from_row(
        who.customer_id, as_of, row, limit=request.limit, include=include, exclude=exclude, exclude_ids=frozenset(banned), **asked
    )


def _wanted(field: str, wishes: Mapping[str, list[str]], allowed: tuple[str, ...]) -> dict[str, frozenset[str]]:
    for name in wishes:
        if name not in allowed:
            raise UnknownAttributeError(f"{field}.{name}", f"{name!r} is not an attribute to filter by: use one of {', '.join(allowed)}")
    return {name: frozenset(values) for name, values in wishes.items()}


def _oldest(kind: str, row: Mapping[str, Any]) -> int | None:
    """The moment (Unix microseconds) of the oldest view that the answer reads, or None if none is known of her."""
    moments = (row.get(f"{view}_at") for view in VIEWS_OF.get(kind, ()))
    return min((int(at) for at in moments if at is not None and not math.isnan(at)), default=None)
