"""Every customer known at a moment, as a batch asks about them: their feature rows, what they allow, and the answers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from features.catalogue.shop import Shop
from features.events.event import Channel
from features.people.consent import Consents, standing
from features.people.identity import Identities
from features.state.clock import clock_of, microseconds
from features.state.home import Home
from features.state.ports import MissingStateError
from features.store.event_log import EventLog
from features.store.feature_store import FeatureStore
from models.kind import Answers
from models.recommender.listings import Listing
from models.registry import ModelSettings
from serving.decide.engine import WITHDRAWN, DecisionRecord, Engine
from serving.decide.questions import (
    ItemsAnswer,
    NextBestOfferRequest,
    OffersAnswer,
    RecommendationsRequest,
    ScoreAnswer,
    ScoreRequest,
)
from serving.decide.who import Who

AnyAnswer = ScoreAnswer | ItemsAnswer | OffersAnswer
CHUNK = 500


@dataclass(frozen=True)
class Asking:
    """What a batch asks of each customer, whose row and permissions it is told: nothing here grows with how many they are.

    Attributes:
        answers: what the model answers with.
        now: when the answers go out.
    """

    engine: Engine
    name: str
    answers: Answers
    as_of: datetime
    now: datetime

    def ask(
        self, who: Who, row: Mapping[str, Any], limit: int, channel: Channel | None, listing: Listing, dry_run: bool = False
    ) -> tuple[AnyAnswer, DecisionRecord]:
        """The answer that HTTP would give, and its decision; run again they keep their ids."""
        name = self.decision_id(row["customer_id"], channel, listing)
        told: tuple[AnyAnswer, DecisionRecord]
        if self.answers == "score":
            told = self.engine.score(self.name, ScoreRequest(channel=channel), who, row, self.as_of, name)
        elif self.answers == "items":
            wish = RecommendationsRequest(limit=limit, channel=channel, listing=listing, dry_run=dry_run)
            told = self.engine.recommendations(self.name, wish, who, row, self.as_of, name, self.now)
        else:
            offer = NextBestOfferRequest(limit=limit, channel=channel, dry_run=dry_run)
            told = self.engine.next_best_offer(self.name, offer, who, row, self.as_of, name, self.now)
        answer, record = told
        # what comes of a decision is counted from when it is given out
        return answer, {**record, "as_of": self.now.astimezone(UTC)}

    def decision_id(self, customer: str, channel: Channel | None, listing: Listing) -> str:
        """Names the decision about a customer: the same whenever the same batch is run."""
        said = f"{self.name}/{listing}/{channel}/{self.as_of.isoformat()}/{customer}"
        return hashlib.blake2b(said.encode(), digest_size=16).hexdigest()


@dataclass
class Population:
    """Every customer known at a moment, and what a model is asked of each; memory holds one chunk of them.

    Attributes:
        settings: what is read of each.
        customers: who has feature rows, in the order in which they are asked.
        silent: who does not allow their data to be used, and so has none.
        now: when the answers go out.
        asked: how many have been asked, the chunk at hand among them.
        counted: whether it has been looked up, once for all chunks, what was sent to each by now.
    """

    engine: Engine
    name: str
    settings: ModelSettings
    as_of: datetime
    store: FeatureStore
    identities: Identities
    consents: Consents
    customers: Sequence[str]
    silent: Sequence[str]
    now: datetime
    asked: int = 0
    counted: bool = False

    @classmethod
    def open(cls, home: Home, engine_of: Callable[[Home], Engine], name: str, as_of: datetime) -> Population:
        """Everybody known at *as_of*, for the model *name*.

        Raises:
            MissingStateError: no customer was known then, or the log ends long before.
        """
        shop = Shop.load(home)
        EventLog(home, shop.timezone).check_reaches(as_of)
        engine = engine_of(home)
        store, settings = FeatureStore(home, engine.services()), engine.reading(name)
        kind = settings.kind
        store.apply()
        for view in kind.views:
            store.backfill(view, {as_of: None})
        customers = pq.ParquetFile(store.snapshot(kind.views[0], as_of)).read(columns=["customer_id"])["customer_id"].to_pylist()
        if not customers:
            raise MissingStateError(f"no customer was known before {as_of.isoformat()}: choose a later --as-of")
        identities, consents = Identities(home), Consents(home, shop.consent)
        silent = sorted(withdrawn(identities, consents) - set(customers))
        now = max(as_of, clock_of(home.settings)())
        return cls(engine, name, settings, as_of, store, identities, consents, customers, silent, now)

    def chunks(self) -> Iterator[Sequence[str]]:
        """The customers, some at a time."""
        for start in range(0, len(self.customers), CHUNK):
            chunk = self.customers[start : start + CHUNK]
            self.asked = start + len(chunk)
            yield chunk

    def rows(self, chunk: Sequence[str], channel: Channel | None) -> list[dict[str, Any]]:
        """Feature rows as the online reader would give them: None for unknown, and the moment of each view.

        What was sent to a customer is told as of now, whatever the moment of the batch: that is when its messages go out.
        """
        rows = _rows(self.store, self.settings, chunk, self.as_of)
        if not (folds := self.sent_folds(channel)):
            return rows
        spine = pd.DataFrame({"customer_id": chunk, "event_timestamp": pd.Timestamp(self.now)})
        frame = self.store.historical(spine, "state_v1", folds).drop(columns="event_timestamp")
        sent = {row["customer_id"]: row for row in frame.to_dict("records")}
        return [{**row, **{name: _plain(value) for name, value in sent.get(row["customer_id"], {}).items()}} for row in rows]

    def sent_folds(self, channel: Channel | None) -> tuple[str, ...]:
        """Which folds tell of what was sent to each by now, where that is read; their snapshot is there then."""
        folds = self.engine.reads(self.name, (channel,))
        if folds and not self.counted:
            self.store.backfill("customer_state", {self.now: None})
            self.counted = True
        return folds

    def who(self, customer: str) -> Who:
        """A customer with what they allow now."""
        return _who(self.identities, self.consents, customer)

    @property
    def asking(self) -> Asking:
        """What is asked of each."""
        return Asking(self.engine, self.name, self.settings.kind.answers, self.as_of, self.now)

    def ask(
        self, row: Mapping[str, Any], limit: int, channel: Channel | None, listing: Listing, dry_run: bool = False
    ) -> tuple[AnyAnswer, DecisionRecord]:
        """The answer that HTTP would give about the customer of a feature row, and its decision; run again they keep their ids."""
        return self.asking.ask(self.who(row["customer_id"]), row, limit, channel, listing, dry_run)

    def refusal(self, customer: str, channel: Channel | None, listing: Listing) -> tuple[str, DecisionRecord]:
        """Why a customer of whom nothing may be used gets no answer, and the decision, which does not name them."""
        why = self.who(customer).not_reached(channel) or WITHDRAWN
        return why, {
            "decision_id": self.asking.decision_id(customer, channel, listing), "kind": self.name, "customer_id": None,
            "as_of": self.now.astimezone(UTC), "model": self.engine.champion(self.name).model.label, "feature_at": None, "fallback": why,
            "request": {"channel": channel}, "choices": [], "features": {},
            "assignment": {"group": None, "variants": {}, "held_out": False},
        }  # fmt: skip


def _rows(store: FeatureStore, settings: ModelSettings, customers: Sequence[str], as_of: datetime) -> list[dict[str, Any]]:
    """Feature rows as the online reader would give them: None for unknown, and the moment of each view."""
    spine = pd.DataFrame({"customer_id": customers, "event_timestamp": pd.Timestamp(as_of)})
    frame = store.historical(spine, settings.feature_service, settings.kind.folds).drop(columns="event_timestamp")
    frame = frame.astype(object).where(frame.notna(), None)
    stamps = {f"{view}_at": microseconds(as_of) for view in settings.kind.views}
    return [{**{k: _plain(v) for k, v in row.items()}, **stamps} for row in frame.to_dict("records")]


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def withdrawn(identities: Identities, consents: Consents) -> set[str]:
    """The customers who do not allow their data to be used: they have no feature rows."""
    speakers = consents.speakers(identities.owners())
    return {customer for customer in speakers if not _who(identities, consents, customer).may_be_used}


def _who(identities: Identities, consents: Consents, customer: str) -> Who:
    # their row may carry a name that they had before a merge: what they say counts for both
    current = identities.current(customer)
    allowed = standing(consents, identities, current)
    return Who(customer, allowed.personalization, allowed.forbidden_channels, (current, *identities.former(current)))
