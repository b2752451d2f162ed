"""Segment's tracking messages to canonical events: its field names, its e-commerce names, its correction of clients' clocks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, get_args

import msgspec

from features.events.event import MAX_ID, MAX_TEXT, Channel, EventName, RejectedEvent, bounded
from features.events.identifiers import KINDS, shortened
from features.people.consent import CONTACT_CHANNELS, PURPOSES
from features.sources.money import minor, number

SOURCE = "segment"
CALLS = ("identify", "track", "page", "screen", "alias", "group")
"""The kinds of messages, each with an endpoint of its own beside ``batch``."""
SHORT_CALLS = {call[0]: call for call in CALLS}
"""As the library for browsers calls them: ``/v1/t`` is ``/v1/track``."""
MAX_MESSAGE_BYTES = 32_768
"""What Segment takes of one message; its own libraries send no more."""
MAX_BATCH_BYTES = 512_000
MAX_TIME = 64
"""Characters of a time."""

EVENT_NAMES: dict[str, EventName] = {
    "products searched": "search", "product list viewed": "view_item_list", "product list filtered": "view_item_list",
    "promotion viewed": "view_promotion", "promotion clicked": "select_promotion", "product clicked": "select_item",
    "product viewed": "view_item", "product added": "add_to_cart", "product removed": "remove_from_cart", "cart viewed": "view_cart",
    "checkout started": "begin_checkout", "order completed": "purchase", "order refunded": "refund", "signed up": "sign_up",
    "signed in": "login", "email delivered": "message_sent", "email opened": "message_open", "email link clicked": "message_click",
    "unsubscribed": "message_unsubscribe", "push notification tapped": "message_click",
    "segment consent preference updated": "consent_update", "consent preference updated": "consent_update",
}  # fmt: skip
"""The names of Segment's e-commerce, e-mail and lifecycle specs, in lower case; ubiquo's own names are taken as they are."""
_OWN: dict[str, EventName] = {name.replace("_", " "): name for name in get_args(EventName)}
_ITEM_EVENTS = ("select_item", "view_item", "add_to_cart", "remove_from_cart")
_WHOLE_ORDER = ("purchase", "refund", "begin_checkout")
_PERSONAL = frozenset(
    {
        "name", "first_name", "last_name", "firstname", "lastname", "middle_name", "birthday", "date_of_birth", "dob", "gender", "title",
        "street", "address", "city", "postal_code", "postalcode", "zip", "state", "country", "age", "avatar", "username", "website",
        "description", "company", "ip", "latitude", "longitude",
    }
)  # fmt: skip
"""Properties that are of a person wherever they stand."""
_OF_WHAT_IS_SHOWN = frozenset({"name", "title", "description"})
"""Of these, what a page or a product has too."""
_DEVICE_CHANNELS: dict[str, Channel] = {"ios": "app", "android": "app", "mobile": "app", "browser": "web", "web": "web"}


def to_event(message: Any, received_at: datetime, currency: str | None = None) -> dict[str, Any]:
    """The canonical event of one message, ready to be parsed.

    Args:
        message: as a Segment library sends it, with the batch's ``sentAt`` where it has none of its own.
        received_at: when the server got it.
        currency: the shop's, for amounts that name none.

    Raises:
        RejectedEvent: the message lacks what Segment requires, a field has a type that cannot be read, or something in it is
            larger than it may be.
    """
    if not isinstance(message, dict):
        raise RejectedEvent("$", "a message must be a JSON object")
    if _size(message) > MAX_MESSAGE_BYTES:
        raise RejectedEvent("$", f"a message may hold {MAX_MESSAGE_BYTES} bytes: send less at once")
    bounded(message)
    call = message.get("type") or message.get("action")
    if call not in CALLS:
        raise RejectedEvent("type", f"must be one of {', '.join(CALLS)}")
    properties = {_snake(k): v for k, v in _mapping(message, "traits" if call in ("identify", "group") else "properties").items()}
    context = _mapping(message, "context")
    traits = {_snake(k): v for k, v in _mapping(context, "traits", "context.traits").items()}
    name = _name(call, message)
    event: dict[str, Any] = {
        "event_id": _text(message.get("messageId")) or _derived_id(message),
        "name": name,
        "occurred_at": occurred_at(message, received_at).isoformat(),
        "identifiers": dict(_identifiers(call, message, properties, context, traits)),
        "channel": _channel(name, properties, context),
    }
    if call == "alias":
        previous = _text(message.get("previousId"))
        if previous is None:
            raise RejectedEvent("previousId", "alias needs the id that the user had before")
        # the library does not tell whether it was a user's id or an anonymous one
        event["previous"] = {"user_id": previous, "cookie": previous}
    if call == "track" and not message.get("event"):
        raise RejectedEvent("event", "track needs the name of what happened")
    if not message.get("userId") and not message.get("anonymousId") and not event["identifiers"]:
        raise RejectedEvent("userId", "a message needs userId or anonymousId")
    if name == "search":
        event["query"] = _text(properties.pop("query", None) or properties.pop("search_term", None))
    items, named_currency = list(_items(name, properties, currency)), _text(properties.pop("currency", None))
    if items:
        event |= {"items": items, "currency": (named_currency or currency or "").upper() or None}
    for field, keys in (
        ("campaign_id", ("campaign_id", "promotion_id", "campaign_name")), ("offer_id", ("offer_id", "coupon_id", "coupon")),
        ("store_id", ("store_id", "store")), ("decision_id", ("decision_id",)), ("session_id", ("session_id",)),
    ):  # fmt: skip
        found = next((properties.pop(key) for key in keys if properties.get(key) is not None), None)
        if found is not None:
            event[field] = _text(found)
    campaign = _mapping(context, "campaign", "context.campaign").get("name")
    if campaign and "campaign_id" not in event:
        event["campaign_id"] = _text(campaign)
    consent = _consent(name, properties, context)
    if consent:
        event["consent"] = consent
    event["traits"], event["personal"] = _rest(call, message, properties, traits)
    return {field: value for field, value in event.items() if value not in (None, {}, [])}


def occurred_at(message: Mapping[str, Any], received_at: datetime) -> datetime:
    """When it happened by the server's clock: receipt minus the client's own difference between sending and happening.

    As Segment corrects it: ``timestamp = receivedAt - (sentAt - originalTimestamp)``
    (Segment documentation, "Spec: Common fields", timestamps).
    """
    happened = _time(message, "originalTimestamp") or _time(message, "timestamp")
    sent = _time(message, "sentAt")
    if happened is None:
        return received_at
    return received_at - (sent - happened) if sent is not None else happened


def _size(message: Mapping[str, Any]) -> int:
    try:
        return len(msgspec.json.encode(message))
    except (RecursionError, TypeError, ValueError):
        # what cannot be written is out of other bounds, which are told
        return 0


def _name(call: str, message: Mapping[str, Any]) -> EventName:
    if call in ("page", "screen"):
        return "page_view" if call == "page" else "screen_view"
    if call in ("identify", "group"):
        return "identify"
    if call == "alias":
        return "alias"
    said = str(message.get("event") or "").strip().lower()
    plain = said.replace("_", " ")
    return EVENT_NAMES.get(plain) or _OWN.get(plain) or "custom"


def _identifiers(
    call: str, message: Mapping[str, Any], properties: dict[str, Any], context: Mapping[str, Any], traits: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    for field, kind in (("userId", "user_id"), ("anonymousId", "cookie")):
        if (value := _text(message.get(field))) is not None:
            yield kind, value
    device = _mapping(context, "device", "context.device").get("id")
    if (value := _text(device)) is not None:
        yield "device", value
    for kind in ("email", "phone", "loyalty_card"):
        # a receiver's address in a message's properties is theirs; a group's traits are the company's
        found = properties.pop(kind, None) if call != "group" else None
        if (value := _text(found if found is not None else traits.get(kind))) is not None:
            yield kind, value
    if (value := _text(properties.pop("order_id", None) or properties.pop("receipt", None))) is not None:
        yield "receipt", value
    externals = context.get("externalIds")
    for external in externals if isinstance(externals, list) else []:
        if isinstance(external, dict) and external.get("type") in KINDS and (value := _text(external.get("id"))) is not None:
            yield external["type"], value


def _channel(name: EventName, properties: dict[str, Any], context: Mapping[str, Any]) -> str | None:
    said = properties.pop("channel", None)
    if said is not None:
        return str(said)
    if name.startswith("message_"):
        return "email"
    if name.startswith("ad_"):
        return "ads"
    if name == "call":
        return "call_centre"
    device = str(_mapping(context, "device", "context.device").get("type") or "").lower()
    if device in _DEVICE_CHANNELS:
        return _DEVICE_CHANNELS[device]
    if name == "screen_view":
        return "app"
    return "web" if "page" in context or name == "page_view" else None


def _items(name: EventName, properties: dict[str, Any], currency: str | None) -> Iterator[dict[str, Any]]:
    listed = properties.pop("products", None)
    if listed is None and name in (*_ITEM_EVENTS, *_WHOLE_ORDER, "page_view") and ("product_id" in properties or "sku" in properties):
        keys = ("product_id", "sku", "price", "quantity", "discount", "coupon")
        listed = [{key: properties.pop(key) for key in keys if key in properties}]
    if listed is None:
        return
    if not isinstance(listed, list):
        raise RejectedEvent("properties.products", "must be a list")
    code = str(properties.get("currency") or currency or "").upper() or None
    for position, product in enumerate(listed):
        place = f"properties.products[{position}]"
        if not isinstance(product, dict):
            raise RejectedEvent(place, "must be an object")
        product = {_snake(k): v for k, v in product.items()}
        item_id = _text(product.get("product_id") or product.get("sku"))
        if item_id is None:
            raise RejectedEvent(f"{place}.product_id", "a product needs product_id or sku")
        count = int(number(product.get("quantity", 1), f"{place}.quantity"))
        item: dict[str, Any] = {"item_id": item_id, "quantity": count}
        for field, ours, times in (("price", "amount_minor", count), ("discount", "discount_minor", 1)):
            if product.get(field) is not None:
                amount = number(product[field], f"{place}.{field}", "an amount")
                if amount < 0:
                    raise RejectedEvent(f"{place}.{field}", "must be an amount of zero or more")
                item[ours] = minor(amount * times, code, f"{place}.{field}")
        yield item


def _consent(name: EventName, properties: dict[str, Any], context: Mapping[str, Any]) -> dict[str, Any]:
    """Purposes and permissions from Segment's consent object and, of a consent update, from its properties."""
    said = _mapping(_mapping(context, "consent", "context.consent"), "categoryPreferences", "context.consent.categoryPreferences")
    if name == "consent_update":
        for group in ("purposes", "permissions"):
            if isinstance(more := properties.pop(group, None), dict):
                said = {**said, **more}
        said = {**said, **{k: properties.pop(k) for k in (*PURPOSES, *CONTACT_CHANNELS) if isinstance(properties.get(k), bool)}}
    answers = {_snake(category): allowed for category, allowed in said.items() if isinstance(allowed, bool)}
    consent: dict[str, Any] = {
        "purposes": {p: answers[p] for p in PURPOSES if p in answers},
        "permissions": {c: answers[c] for c in CONTACT_CHANNELS if c in answers},
    }
    if not consent["purposes"] and not consent["permissions"]:
        return {}
    for field in ("policy_version", "source"):
        if (value := _text(properties.pop(field, None) if name == "consent_update" else None)) is not None:
            consent[field] = value
    return {k: v for k, v in consent.items() if v}


def _rest(
    call: str, message: Mapping[str, Any], properties: dict[str, Any], traits: Mapping[str, Any]
) -> tuple[dict[str, str], dict[str, str]]:
    """What is left, as texts: of the event, and of the person."""
    person = dict(_flat(traits))
    about: dict[str, str] = {}
    # a page has a title, a product a name
    personal = _PERSONAL - _OF_WHAT_IS_SHOWN if call in ("page", "screen") or _name(call, message) in _ITEM_EVENTS else _PERSONAL
    for field, value in _flat(properties):
        (person if call == "identify" or field.split(".")[0] in personal else about)[field] = value
    for kind in ("email", "phone", "loyalty_card"):
        person.pop(kind, None)
    if call == "track":
        about["event"] = shortened(str(message.get("event")), MAX_TEXT)
    elif message.get("name"):
        about["name"] = shortened(str(message["name"]), MAX_TEXT)
    if call == "group" and message.get("groupId"):
        about, person = {}, {**person, **{f"group.{k}": v for k, v in about.items()}, "group_id": str(message["groupId"])}
    return about, person


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for field, value in values.items():
        if isinstance(value, dict):
            yield from _flat({_snake(k): v for k, v in value.items()}, f"{prefix}{field}.")
        elif value is not None and not isinstance(value, list):
            text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
            if text:
                # addresses within a page's location are of nobody's concern
                text = text.partition("?")[0] if field in ("url", "referrer", "search") else text
                yield shortened(f"{prefix}{field}", MAX_ID) or "-", shortened(text, MAX_TEXT) or "-"


def _mapping(parent: Mapping[str, Any], field: str, place: str = "") -> dict[str, Any]:
    value = parent.get(field)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RejectedEvent(place or field, "must be an object")
    return value


def _time(message: Mapping[str, Any], field: str) -> datetime | None:
    value = message.get(field)
    if value is None:
        return None
    try:
        if not isinstance(value, str) or len(value) > MAX_TIME:
            raise ValueError
        moment = datetime.fromisoformat(value)
    except ValueError:
        raise RejectedEvent(field, "must be an ISO 8601 time such as 2018-01-01T12:00:00.000Z") from None
    moment = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    if not timedelta(days=1) < moment - datetime(1, 1, 1, tzinfo=UTC) < timedelta(days=3_650_000):
        raise RejectedEvent(field, "is no time of this age")
    return moment


def _derived_id(message: Mapping[str, Any]) -> str:
    """For a message without a messageId: the same message sent again is the same event."""
    plain = {k: v for k, v in message.items() if k != "sentAt"}
    return "segment-" + hashlib.blake2b(msgspec.json.encode(plain, order="sorted"), digest_size=16).hexdigest()


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, dict | list | bool):
        return None
    text = str(value).strip()
    return shortened(text, MAX_ID) or None


def _snake(name: str) -> str:
    """``firstName``, ``First Name`` and ``first-name`` as ``first_name``."""
    text = "".join(f"_{c.lower()}" if c.isupper() and k and name[k - 1].islower() else c.lower() for k, c in enumerate(str(name)))
    return text.replace(" ", "_").replace("-", "_")
