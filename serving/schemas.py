"""The shapes of HTTP: what is asked, what is answered, and what a mistake is answered with."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec

from features.events import Channel, Text
from features.identifiers import IdentifierKind

Limit = Annotated[int, msgspec.Meta(ge=1, le=100)]
Values = dict[str, list[str]]


class CustomerRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Whom a question is about: ubiquo's own id of the customer, or any identifier of hers."""

    customer_id: Text | None = None
    identifiers: dict[IdentifierKind, Text] = {}


class DeliveredRequest(CustomerRequest, kw_only=True, forbid_unknown_fields=True):
    """A question whose answer is, or leads to, something that reaches the customer."""

    channel: Channel | None = None
    """Through what the customer will be reached: by e-mail, SMS, push, mail, call or ads only with their permission."""


class RecommendationsRequest(DeliveredRequest, kw_only=True, forbid_unknown_fields=True):
    """What will she like? ``for_you`` may repeat what she buys; ``also_like`` shows only what is new to her."""

    listing: Literal["for_you", "also_like"] = "for_you"
    limit: Limit = 10
    include: Values = {}
    """Attribute to allowed values, e.g. ``{"department": ["PRODUCE"]}``."""
    exclude: Values = {}
    exclude_item_ids: Annotated[list[Text], msgspec.Meta(max_length=1000)] = []
    explore: bool = False


class SimilarItemsRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What is like this item?"""

    item_id: Text
    limit: Limit = 10
    include: Values = {}
    exclude: Values = {}
    exclude_item_ids: Annotated[list[Text], msgspec.Meta(max_length=1000)] = []


class NextBestOfferRequest(DeliveredRequest, kw_only=True, forbid_unknown_fields=True):
    """What should she be offered next?"""

    limit: Limit = 1
    include: Values = {}
    """Attribute (channel, campaign_id, campaign_type) to allowed values."""
    exclude: Values = {}
    exclude_offer_ids: Annotated[list[Text], msgspec.Meta(max_length=1000)] = []
    explore: bool = False


class ChurnRequest(DeliveredRequest, kw_only=True, forbid_unknown_fields=True):
    """Is she about to leave?"""


class Answer(msgspec.Struct, kw_only=True):
    """What every answer tells beside its content."""

    decision_id: str
    as_of: datetime
    customer_id: str | None
    model: str
    feature_at: datetime | None
    """The moment of the oldest features that the answer used."""
    feature_age_seconds: float | None
    fallback: str | None
    """Why the answer is general rather than hers, or None."""


class ItemChoice(msgspec.Struct):
    """One recommended item."""

    item_id: str
    name: str
    score: float
    source: str
    reason: str
    propensity: float


class OfferChoice(msgspec.Struct, kw_only=True):
    """One offer, best priority first; priority is probability times margin (minor units)."""

    offer_id: str
    campaign_id: str
    channel: str
    score: float
    source: str
    reason: str
    propensity: float
    probability: float
    margin_minor: int
    affinity: float
    reasons: list[dict[str, Any]]


class ItemsAnswer(Answer, kw_only=True):
    """Recommended or similar items."""

    items: list[ItemChoice]
    removed: dict[str, int]
    """How many candidates were removed, by reason."""


class OffersAnswer(Answer, kw_only=True):
    """Offers for a customer."""

    offers: list[OfferChoice]
    removed: dict[str, int]


class ChurnAnswer(Answer, kw_only=True):
    """The probability that she stays away for the horizon; null where the question makes no sense, with the reason."""

    probability: float | None
    horizon_days: int
    score: float | None
    """The probability again, under the name that every answer has."""
    source: str
    reason: str
    reasons: list[dict[str, Any]]


class EventReceipt(msgspec.Struct):
    """What became of one event."""

    status: Literal["accepted", "duplicate", "rejected", "erased"]
    event_id: str | None
    customer_id: str | None = None
    field: str | None = None
    reason: str | None = None


class EventsAnswer(msgspec.Struct):
    """What became of each event, in the order in which they were sent."""

    accepted: int
    duplicates: int
    rejected: int
    erased: int
    """Of people who were erased: nothing was kept."""
    events: list[EventReceipt]


class Problem(msgspec.Struct, kw_only=True, omit_defaults=True):
    """RFC 9457 problem details, with the field at fault."""

    title: str
    status: int
    detail: str
    type: str = "about:blank"
    field: str | None = None


class HttpProblem(Exception):
    """A request that cannot be answered, on its way to becoming a ``Problem``."""

    def __init__(self, status: int, title: str, detail: str, field: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(detail)
        self.retry_after = retry_after
        self.problem = Problem(title=title, status=status, detail=detail, field=field)
