"""What a batch file says of one customer, line by line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from serving.decide.population import AnyAnswer
from serving.decide.questions import ItemChoice, ItemsAnswer, OfferChoice, OffersAnswer, ScoreAnswer

NOTHING = "nothing to offer"


class Answered(NamedTuple):
    """The lines about one customer, best first, and the decision where another process has made it."""

    customer: str
    lines: Sequence[Mapping[str, Any]]
    decision: bytes | None = None


def lines_of(told: AnyAnswer, customer: str) -> Iterator[dict[str, Any]]:
    """One customer's lines, best first."""
    common = {
        "customer_id": customer, "as_of": told.as_of, "model": told.model, "fallback": told.fallback, "group": told.group,
        "variants": msgspec.json.encode(told.variants).decode() if told.variants else None, "decision_id": told.decision_id,
    }  # fmt: skip
    if isinstance(told, ScoreAnswer):
        yield {**common, "rank": 1, "id": None, "score": told.score, "source": told.source, "reason": told.reason, "propensity": 1.0}
        return
    found: Sequence[ItemChoice | OfferChoice] = told.items if isinstance(told, ItemsAnswer) else told.offers
    if not found:
        nothing = {"rank": 1, "id": None, "score": None, "source": None, "reason": None, "propensity": None}
        yield {**common, **nothing, "fallback": common["fallback"] or NOTHING}
    for rank, choice in enumerate(found, 1):
        line = msgspec.structs.asdict(choice)
        line["id"] = line.get("item_id") or line.get("offer_id")
        if isinstance(told, OffersAnswer):
            line["offers_version"] = told.offers_version
        yield {**common, "rank": rank, **line}
