"""The canonical event: its vocabulary, parsing and validation."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

import msgspec

from features.identifiers import ADDRESS, KINDS, NUMBER, OF_A_PERSON, IdentifierError, IdentifierKind, normalise_all

EventName = Literal[
    "view_item_list", "select_item", "view_item", "search", "add_to_cart", "remove_from_cart", "view_cart",
    "begin_checkout", "purchase", "refund", "view_promotion", "select_promotion", "sign_up", "login",
    "identify", "alias", "consent_update", "message_sent", "message_open", "message_click", "message_unsubscribe",
    "ad_impression", "ad_click", "offer_view", "offer_redeem", "store_visit", "booking", "call", "feedback", "erasure",
    "page_view", "screen_view", "custom",
]  # fmt: skip
"""GA4's names, the omnichannel ones, and ``custom`` for whatever a shop counts beside (its trait ``event`` tells what)."""

Channel = Literal["store", "web", "app", "email", "sms", "push", "mail", "call_centre", "ads"]

Purpose = Literal["analytics", "personalization"]
"""What a customer's data is used for."""

ContactChannel = Literal["email", "sms", "push", "mail", "call_centre", "ads"]
"""The channels by which a customer is contacted, each with her permission; the others she comes to herself."""

FUTURE_TOLERANCE = timedelta(minutes=5)
"""How far a client's clock may run ahead before its event is rejected."""

Text = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**31)]
Money = Annotated[int, msgspec.Meta(ge=0, le=2**40)]
"""Small enough that the sum over any table stays a 64-bit integer."""
EARLIEST = datetime(2000, 1, 1, tzinfo=UTC)
"""No customer event is older; a time before it is a broken clock or a missing value."""


class Item(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of an event: an item, how many, and its money in minor units."""

    item_id: Text
    quantity: Count = 1
    amount_minor: Money = 0
    """What the retailer received for the whole line."""
    discount_minor: Money = 0
    """What the retailer took off the line's shelf price."""
    coupon_minor: Money = 0
    """What a manufacturer's coupon paid of the line."""


class Consent(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """What a customer has said that may be done, and may not; what it does not name stays as it was."""

    purposes: dict[Purpose, bool] = {}
    permissions: dict[ContactChannel, bool] = {}
    policy_version: Text | None = None
    """Which text she was shown."""
    source: Text | None = None
    """Where she said it: a form, a call, a counter."""


class Event(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """One thing that one customer did, or that was done to her, in any channel."""

    event_id: Text
    name: EventName
    occurred_at: Annotated[datetime, msgspec.Meta(tz=True)]
    identifiers: dict[IdentifierKind, Text] = {}
    channel: Channel | None = None
    store_id: Text | None = None
    session_id: Text | None = None
    currency: Annotated[str, msgspec.Meta(pattern="^[A-Z]{3}$")] | None = None
    items: Annotated[list[Item], msgspec.Meta(max_length=5_000)] = []
    offer_id: Text | None = None
    campaign_id: Text | None = None
    query: Annotated[str, msgspec.Meta(max_length=1024)] | None = None
    decision_id: Text | None = None
    traits: dict[Text, Annotated[str, msgspec.Meta(max_length=1024)]] = {}
    """What else is true of the event. Those of ``identify`` and ``sign_up`` are of a person, and taken as ``personal``."""
    personal: dict[Text, Annotated[str, msgspec.Meta(max_length=1024)]] = {}
    """What is true of the person, such as ``first_name``; it goes into the encrypted contact table and nowhere else."""
    previous: dict[IdentifierKind, Text] = {}
    """By what the customer was known before (``alias``)."""
    consent: Consent | None = None


class SealedEvent(Event, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """An event with keyed hashes for its identifiers and nothing personal: what may be stored."""


REQUIRED_FIELDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("select_item", "view_item", "add_to_cart", "remove_from_cart", "purchase", "refund"), ("items",)),
    **dict.fromkeys(("offer_view", "offer_redeem"), ("offer_id",)),
    **dict.fromkeys(("message_sent", "message_open", "message_click"), ("campaign_id",)),
    "search": ("query",),
    "identify": ("identifiers",),
    "alias": ("identifiers", "previous"),
    "consent_update": ("identifiers", "consent"),
}
"""What an event of this name must carry to mean anything."""

PRIVATE = ("identifiers", "previous", "personal", "traits")
"""The fields of which no message repeats what was sent."""
_QUOTED = re.compile(r"'[^']*'")
ABOUT_A_PERSON = ("identify", "sign_up")
BLOT = "[blotted out]"
_IDS = ("event_id", "session_id", "store_id", "offer_id", "campaign_id", "decision_id")
_decoder = msgspec.json.Decoder(Event)
_PATH = re.compile(r" - at (?:`[a-z]+` in )?`\$\.?([^`]*)`$")
_NAMED_FIELD = re.compile(r"(?:missing required|unknown) field `([^`]+)`")


class RejectedEvent(ValueError):
    """An event that cannot be taken; ``field`` names the culprit and ``reason`` the mend."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


def parse_event(raw: bytes | dict[str, Any], received_at: datetime, currency: str | None = None, phone_region: str | None = None) -> Event:
    """Read and check one event of a shop that counts in *currency* (None: whichever the event names).

    Identifiers come back in the form in which they are compared, phone numbers without a country code read in *phone_region*;
    e-mail addresses within free texts are blotted out.

    Raises:
        RejectedEvent: the JSON is broken, a field is missing, unknown, of a wrong type or out of range, the event lacks
            what its name requires, carries money without a currency or in another than the shop's, or lies in the future.
    """
    try:
        event = _decoder.decode(raw) if isinstance(raw, bytes) else msgspec.convert(raw, Event)
    except msgspec.ValidationError as error:
        raise RejectedEvent(*explain(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RejectedEvent("$", f"not valid JSON: {error}") from None
    for field in REQUIRED_FIELDS.get(event.name, ()):
        if not getattr(event, field):
            raise RejectedEvent(field, f"an event named {event.name} needs it")
    if event.currency is None and any(i.amount_minor or i.discount_minor or i.coupon_minor for i in event.items):
        raise RejectedEvent("currency", "items carry money, so an ISO 4217 currency such as 'USD' is needed")
    if currency is not None and event.currency not in (None, currency):
        raise RejectedEvent("currency", f"{event.currency} where the shop counts in {currency}: sums cannot mix, so convert it first")
    if event.occurred_at < EARLIEST:
        raise RejectedEvent("occurred_at", f"{event.occurred_at.isoformat()} lies before {EARLIEST.year}: check the clock")
    if event.occurred_at > received_at + FUTURE_TOLERANCE:
        raise RejectedEvent(
            "occurred_at", f"{event.occurred_at.isoformat()} lies after it was received ({received_at.isoformat()}): check the clock"
        )
    return _in_order(event, phone_region)


def _in_order(event: Event, phone_region: str | None) -> Event:
    changed: dict[str, Any] = {"occurred_at": event.occurred_at.astimezone(UTC)}
    for field in ("identifiers", "previous"):
        given = getattr(event, field)
        if given:
            try:
                changed[field] = normalise_all(given, phone_region)
            except IdentifierError as error:
                kind, _, mend = str(error).partition(": ")
                raise RejectedEvent(f"{field}.{kind}", mend) from None
    for field in _IDS:
        if ADDRESS.search(getattr(event, field) or ""):
            raise RejectedEvent(field, "holds an e-mail address: use an id of your own")
    if event.traits and event.name in ABOUT_A_PERSON:
        changed |= {"personal": {**event.traits, **event.personal}, "traits": {}}
    elif event.traits:
        hers = {name: value for name, value in event.traits.items() if OF_A_PERSON.search(name)}
        rest = {_blotted(name): _blotted(value) for name, value in event.traits.items() if name not in hers}
        changed |= {"personal": {**hers, **event.personal}, "traits": rest}
    if event.query:
        changed["query"] = _blotted(event.query)
    return msgspec.structs.replace(event, **changed)


def _blotted(text: str) -> str:
    """A free text without e-mail addresses and international phone numbers."""
    if "@" in text or "%40" in text:
        text = ADDRESS.sub(BLOT, text)
    return NUMBER.sub(BLOT, text) if "+" in text else text


def explain(error: msgspec.ValidationError) -> tuple[str, str]:
    """Split a msgspec message into the field's path (``$`` for the whole body) and the reason."""
    text = str(error)
    at = _PATH.search(text)
    reason = text[: at.start()] if at else text
    path = at.group(1) if at else ""
    named = _NAMED_FIELD.search(text)
    if named:
        path = f"{path}.{named.group(1)}" if path else named.group(1)
    if path.startswith(PRIVATE):
        # what stands there may be somebody's
        reason = _QUOTED.sub("that", reason)
    return path or "$", reason


def identity_key(event: SealedEvent) -> str | None:
    """The event's strongest identifier as ``kind:hash``, or None for an anonymous event."""
    for kind in KINDS:
        if kind in event.identifiers:
            return f"{kind}:{event.identifiers[kind]}"
    return None
