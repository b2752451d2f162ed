"""The shapes of questions and answers, the same over HTTP and in batch."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec

from features.definitions.segments import ContextValue
from features.events.event import MAX_ID, Channel, RejectedEvent, Text, TextClass, check_keys
from features.events.identifiers import IdentifierKind
from models.kind import Answers
from models.recommender.listings import Listing
from serving.decide.policy import Factor

Limit = Annotated[int, msgspec.Meta(ge=1, le=100)]
MAX_VALUES_ASKED = 1_000
"""Values of one attribute, and ids, that a question may name."""
MAX_ATTRIBUTES_ASKED = 20
MAX_ITEMS_ASKED = 50
Ids = Annotated[list[Text], msgspec.Meta(max_length=MAX_VALUES_ASKED)]
Value = Annotated[str, msgspec.Meta(max_length=MAX_ID)] | float


class Between(msgspec.Struct, forbid_unknown_fields=True):
    """Numbers from ``min`` to ``max``, both included; either may be left out."""

    min: float | None = None
    max: float | None = None


Values = Annotated[
    dict[Text, Annotated[list[Value], msgspec.Meta(max_length=MAX_VALUES_ASKED)] | Between], msgspec.Meta(max_length=MAX_ATTRIBUTES_ASKED)
]


class Question(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What is asked; it is logged with its answer, so nothing personal may stand in what names things."""

    def __post_init__(self) -> None:
        """Refuse addresses and phone numbers where an id or a value belongs: a ``RejectedEvent`` that names the field."""
        for field, kind in QUESTION_TEXTS.items():
            if kind == "key":
                check_keys(_texts(field, getattr(self, field, None)))


class CustomerRequest(Question, kw_only=True, forbid_unknown_fields=True):
    """Whom a question is about: ubiquo's own id of the customer, or any identifier of theirs; neither for a stranger."""

    customer_id: Text | None = None
    identifiers: dict[IdentifierKind, Text] = {}


class DeliveredRequest(CustomerRequest, kw_only=True, forbid_unknown_fields=True):
    """A question whose answer is, or leads to, something that reaches the customer."""

    channel: Channel | None = None
    """Through what the customer will be reached: by e-mail, SMS, push, mail, call or ads only with their permission."""
    dry_run: bool = False
    """Whether the answer is only looked at: no message is promised, so no cap counts it."""

    @property
    def reached_by(self) -> list[Channel | None]:
        """The channels by which the customer may be reached."""
        return [self.channel]


Share = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]


Place = Annotated[int, msgspec.Meta(ge=1, le=100)]


class Position(msgspec.Struct, forbid_unknown_fields=True):
    """Where the customer is, in degrees."""

    lat: Annotated[float, msgspec.Meta(ge=-90, le=90)]
    lon: Annotated[float, msgspec.Meta(ge=-180, le=180)]


class RecommendationsRequest(DeliveredRequest, kw_only=True, forbid_unknown_fields=True):
    """What will the customer like? Each ``listing`` is a list of its own; those about items need ``item_ids``.

    ``for_you`` what they will buy next; ``also_like`` what is new to them; ``buy_again`` what they may need again; ``email`` another
    selection each week; ``trending`` what sells more than before, in ``store_id`` or everywhere; ``basket`` what goes with the items in
    the basket (by default the customer's open cart), ``session`` what is like the items looked at (by default their own looks);
    ``similar``, ``bought_together`` and ``up_sell`` what is like an item, goes with it, or is like it and costs more.
    """

    listing: Listing = "for_you"
    """Which list."""
    limit: Limit = 10
    item_ids: Annotated[list[Text], msgspec.Meta(max_length=MAX_ITEMS_ASKED)] = []
    """The items that the list is about: on the page, in the basket, looked at."""
    store_id: Text | None = None
    """The store where the customer is: what sells there counts in ``trending``."""
    position: Position | None = None
    """Where the customer is, instead of ``store_id``: the nearest store counts. It is not logged."""
    include: Values = {}
    """Attribute to allowed values, e.g. ``{"department": ["PRODUCE"]}``; of numbers also ``{"weight_g": {"min": 100}}``."""
    exclude: Values = {}
    exclude_item_ids: Ids = []
    exclude_bought_within_days: Annotated[int, msgspec.Meta(ge=0, le=36_500)] | None = None
    """Leave out what the customer bought so lately."""
    promoted: Annotated[dict[Text, Place], msgspec.Meta(max_length=MAX_ITEMS_ASKED)] = {}
    """Item to the place of the list, counted from 1, at which the shop puts it if the filters let it."""
    diversity: Share = 0.0
    """By how much of its score each further item of one kind falls behind: 0 not at all, 1 one of each kind."""
    novelty: Share | None = None
    """How much of its score the most popular item loses for being popular; if not given 0.3 in ``also_like``, elsewhere 0."""
    explore: bool = False
    explain: bool = False
    """Whether each item tells what every input of the ranker added to its score, and what was removed is named under its reason."""

    def __post_init__(self) -> None:
        """A store, or a place to find the nearest: not both."""
        super().__post_init__()
        _one_place(self)


class SimilarItemsRequest(Question, kw_only=True, forbid_unknown_fields=True):
    """What is like this item?"""

    item_id: Text
    limit: Limit = 10
    include: Values = {}
    exclude: Values = {}
    exclude_item_ids: Ids = []


class NextBestOfferRequest(DeliveredRequest, kw_only=True, forbid_unknown_fields=True):
    """What should the customer be offered next?"""

    limit: Limit = 1
    include: Values = {}
    """Attribute (campaign_id, campaign_type, kind, stage, category) to allowed values."""
    exclude: Values = {}
    exclude_offer_ids: Ids = []
    offer_ids: Ids = []
    """Only these offers; none named: all."""
    channels: Annotated[list[Channel], msgspec.Meta(max_length=9)] = []
    """Through which channels it may go out, if the best of them is to be chosen; ``channel`` is then left out."""
    store_id: Text | None = None
    """The store where the customer is: what holds elsewhere alone is left out."""
    position: Position | None = None
    """Where the customer is, instead of ``store_id``: the nearest store counts. It is not logged."""
    context: Annotated[dict[Text, ContextValue], msgspec.Meta(max_length=MAX_ATTRIBUTES_ASKED)] = {}
    """What else is so, as ``segments.yaml`` declares it, for eligibility and context rules."""
    best_time: bool = False
    """Whether it may go out within the next day, at the hour at which the customer is likeliest to answer."""
    without: Annotated[list[Factor], msgspec.Meta(max_length=5)] = []
    """Which parts of a priority are left out."""
    explore: bool = False
    explain: bool = False
    """Whether the offers that were removed are named, each under its reason."""

    def __post_init__(self) -> None:
        """One channel, or several to choose from: not both."""
        super().__post_init__()
        _one_place(self)
        if self.channel is not None and self.channels:
            raise RejectedEvent("channels", "leave out channel where the best of several channels is to be chosen")

    @property
    def reached_by(self) -> list[Channel | None]:
        """The channels by which the customer may be reached."""
        return [*self.channels] or [self.channel]


def _one_place(request: RecommendationsRequest | NextBestOfferRequest) -> None:
    if request.position is not None and request.store_id is not None:
        raise RejectedEvent("position", "leave out store_id where the nearest store is to be found")


class ScoreRequest(DeliveredRequest, kw_only=True, forbid_unknown_fields=True):
    """What number does a model give for the customer?"""


QUESTION_TEXTS: dict[str, TextClass] = {
    "customer_id": "key", "identifiers": "identifier", "include": "key", "exclude": "key", "item_id": "key", "exclude_item_ids": "key",
    "exclude_offer_ids": "key", "offer_ids": "key", "context": "key", "item_ids": "key", "store_id": "key", "promoted": "key",
}  # fmt: skip
"""What each text of a question is, in the classes of an event's texts; what identifies the customer is not logged."""


def _texts(field: str, value: str | list[Value] | dict[str, list[Value] | Between | ContextValue] | None) -> Iterator[tuple[str, str]]:
    """Each text of a field with its place, the names of attributes among them."""
    if isinstance(value, str):
        yield field, value
    elif isinstance(value, list):
        yield from ((f"{field}[{number}]", text) for number, text in enumerate(value) if isinstance(text, str))
    elif value:
        for name, texts in value.items():
            # checked before it names the place of its values
            yield field, name
            if isinstance(texts, str):
                yield f"{field}.{name}", texts
            if isinstance(texts, list):
                yield from ((f"{field}.{name}[{number}]", text) for number, text in enumerate(texts) if isinstance(text, str))


class Answer(msgspec.Struct, kw_only=True):
    """What every answer tells beside its content."""

    decision_id: str
    """What names this answer: put it on the events that follow from it."""
    as_of: datetime
    customer_id: str | None
    model: str
    feature_at: datetime | None
    """The moment of the oldest features that the answer used."""
    feature_age_seconds: float | None
    fallback: str | None
    """Why the answer is general rather than the customer's own, or None."""
    group: Literal["control", "treated"] | None = None
    """Whether the customer is in the control group, which is offered nothing; null where there is none or nobody is known."""
    variants: dict[str, str] = {}
    """By experiment: which variant the customer sees."""
    logged: bool = True
    """Whether the decision was kept: false where the disk did not take it, so that nothing can be learnt from it later."""


class ItemChoice(msgspec.Struct, omit_defaults=True):
    """One recommended item."""

    item_id: str
    name: str
    score: float
    source: str
    reason: str
    propensity: float
    because_of: str | None = None
    """The item that speaks for it, where one does."""
    expected_at: datetime | None = None
    """When the customer will need it again by their own rhythm, in ``buy_again``."""
    price_minor: int | None = None
    """What it costs in minor units of the shop's currency: as the catalogue tells, or else as was paid for it."""
    image_url: str | None = None
    url: str | None = None
    """Its picture and its page, where the catalogue tells them."""
    contributions: dict[str, float] | None = None
    """What each input of the ranker added to its score, where ``explain`` asks."""
    rule_ids: list[str] | None = None
    """The merchandising rules that pinned it or moved its score."""


class OfferChoice(msgspec.Struct, kw_only=True):
    """One offer, best first. Its ``score`` is its priority in minor units: probability x (margin - cost) x lever x factors, less what it
    costs to send.
    """

    offer_id: str
    campaign_id: str
    kind: str
    stage: str | None
    title: str | None
    text: str | None
    channel: str | None
    benefit_percent: float | None
    benefit_minor: int | None
    score: float
    source: str
    reason: str
    propensity: float
    probability: float
    margin_minor: int
    cost_minor: int
    sending_minor: float
    lever: float
    factors: dict[str, float]
    """What else its priority was multiplied by: ``context`` by the rules of the policy, ``channel`` by how well the channel is answered."""
    affinity: float
    reasons: list[dict[str, Any]]


class ItemsAnswer(Answer, kw_only=True):
    """Recommended or similar items."""

    items: list[ItemChoice]
    removed: dict[str, int]
    """How many candidates were removed, by reason."""
    left_out: dict[str, list[str]] | None = None
    """Which they were, where ``explain`` asks: at most 200 a reason."""
    notes: list[str] = []
    """What of the question may be a mistake, such as a value to filter by that nothing in the catalogue has."""


class OffersAnswer(Answer, kw_only=True):
    """Offers for a customer."""

    offers: list[OfferChoice]
    removed: dict[str, int]
    channel: str | None = None
    """Through which it goes out."""
    store_id: str | None = None
    """The store that it was decided for."""
    store_km: float | None = None
    """How far it is from the customer, where ``position`` was told."""
    channel_propensity: float = 1.0
    """The chance with which that channel was chosen."""
    promised_until: datetime | None = None
    """Until when its place under the caps, and in a budget, is held: what goes out later has to be decided anew."""
    send_at: datetime | None = None
    """When it should go out, where ``best_time`` asks."""
    send_at_propensity: float = 1.0
    """The chance with which that hour was chosen."""
    offers_version: str = ""
    """Names the table of offers that it was chosen from."""
    left_out: dict[str, list[str]] | None = None
    notes: list[str] = []
    """See ``ItemsAnswer``."""


class ScoreAnswer(Answer, kw_only=True):
    """A number about the customer; null where the question makes no sense, with the reason."""

    score: float | None
    unit: Literal["probability", "days"]
    """What the number is."""
    probability: float | None
    """The number again, where it is a probability: null otherwise."""
    horizon_days: int
    """How far ahead it looks."""
    source: str
    reason: str
    reasons: list[dict[str, Any]]


SHAPES: dict[Answers, tuple[type[DeliveredRequest], type[Answer]]] = {
    "score": (ScoreRequest, ScoreAnswer),
    "items": (RecommendationsRequest, ItemsAnswer),
    "offers": (NextBestOfferRequest, OffersAnswer),
}
"""What is asked of a model that answers so, and what it answers."""


class UnknownAttributeError(ValueError):
    """A question wishes for an attribute that cannot be filtered by; ``field`` names it."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field, self.reason = field, reason
