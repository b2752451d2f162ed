"""Google Analytics 4 measurement-protocol payloads to canonical events."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, get_args

import msgspec

from features.events.event import MAX_ID, MAX_TEXT, EventName, RejectedEvent, bounded
from features.events.identifiers import shortened
from features.sources.money import minor, number
from features.state.clock import moment_of

SOURCE = "ga4"
MAX_EVENTS = 25
"""What the protocol allows in one request."""
MAX_BYTES = 130_000
"""What the protocol allows a request to hold; what it says of all its events is kept with each."""
_NAMES = frozenset(get_args(EventName))
_USED = frozenset({"items", "currency", "transaction_id", "search_term", "session_id", "campaign", "campaign_id", "promotion_id",
                   "affiliation", "value", "coupon", "engagement_time_msec", "decision_id", "decisionId"})  # fmt: skip


def messages(body: Any) -> list[dict[str, Any]]:
    """One message an event, each with what the request says of all of them.

    Raises:
        RejectedEvent: the request is not of the protocol's form.
    """
    if not isinstance(body, dict):
        raise RejectedEvent("$", "a request must be a JSON object")
    events = body.get("events")
    if not isinstance(events, list) or not 1 <= len(events) <= MAX_EVENTS:
        raise RejectedEvent("events", f"must be a list of 1 to {MAX_EVENTS} events")
    common = {k: v for k, v in body.items() if k != "events"}
    return [{**common, "event": event, "position": position} for position, event in enumerate(events)]


def to_event(message: Any, received_at: datetime, currency: str | None = None) -> dict[str, Any]:
    """The canonical event of one message of ``messages``; names outside the vocabulary become ``custom``.

    Raises:
        RejectedEvent: a field has a type that cannot be read, something is larger than it may be, or nobody is named.
    """
    if not isinstance(message, dict) or not isinstance(message.get("event"), dict):
        raise RejectedEvent("events", "each event must be an object with a name")
    bounded(message)
    event = message["event"]
    params = event.get("params") or {}
    if not isinstance(params, dict):
        raise RejectedEvent("params", "must be an object")
    name = event.get("name")
    if not isinstance(name, str) or not name:
        raise RejectedEvent("name", "an event needs a name")
    identifiers = {
        kind: text
        for kind, value in (
            ("user_id", message.get("user_id")), ("cookie", message.get("client_id")), ("device", message.get("app_instance_id")),
            ("receipt", params.get("transaction_id")),
        )
        if (text := _text(value)) is not None
    }  # fmt: skip
    if not identifiers:
        raise RejectedEvent("client_id", "a request needs client_id, app_instance_id or user_id")
    code = str(params.get("currency") or currency or "").upper() or None
    items = list(_items(params.get("items"), code))
    said: dict[str, Any] = {
        "event_id": _id(message, received_at),
        "name": name if name in _NAMES else "custom",
        "occurred_at": _moment(event.get("timestamp_micros") or message.get("timestamp_micros"), received_at).isoformat(),
        "identifiers": identifiers,
        "channel": "app" if "app_instance_id" in message else "web",
        "items": items,
        "currency": code if items else None,
        "query": params.get("search_term"),
        "session_id": _text(params.get("session_id")),
        "campaign_id": _text(params.get("campaign_id") or params.get("promotion_id") or params.get("campaign")),
        "offer_id": _text(params.get("coupon")),
        "store_id": _text(params.get("affiliation")),
        "decision_id": _text(params.get("decision_id") or params.get("decisionId")),
        "consent": _consent(message.get("consent")),
        "traits": {**dict(_rest(params)), "event": name},
    }  # fmt: skip
    return {field: value for field, value in said.items() if value not in (None, {}, [], "")}


def _rest(params: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in params.items():
        if name not in _USED and isinstance(value, str | int | float) and value != "":
            # what stands behind a page's location may name its reader
            yield shortened(str(name), MAX_ID) or "-", shortened(str(value).partition("?")[0], MAX_TEXT) or "-"


def _items(listed: Any, currency: str | None) -> Iterator[dict[str, Any]]:
    if listed is None:
        return
    if not isinstance(listed, list):
        raise RejectedEvent("params.items", "must be a list")
    for position, each in enumerate(listed):
        place = f"params.items[{position}]"
        item_id = _text(each.get("item_id")) if isinstance(each, dict) else None
        if item_id is None:
            raise RejectedEvent(f"{place}.item_id", "an item needs item_id")
        count = int(number(each.get("quantity", 1), f"{place}.quantity"))
        item: dict[str, Any] = {"item_id": item_id, "quantity": count}
        for field, ours in (("price", "amount_minor"), ("discount", "discount_minor")):
            if each.get(field) is not None:
                item[ours] = minor(number(each[field], f"{place}.{field}", "an amount") * count, currency, f"{place}.{field}")
        yield item


def _consent(said: Any) -> dict[str, Any]:
    """Google's two answers: whether data may be kept for ads, and whether ads may be personal."""
    if not isinstance(said, dict):
        return {}
    words = {"GRANTED": True, "DENIED": False}
    for field in ("ad_user_data", "ad_personalization"):
        if not isinstance(said.get(field, ""), str):
            # passed over it might be a refusal that nobody hears
            raise RejectedEvent(f"consent.{field}", "must be GRANTED or DENIED")
    permissions = {"ads": words[said["ad_user_data"]]} if said.get("ad_user_data") in words else {}
    purposes = {"personalization": words[said["ad_personalization"]]} if said.get("ad_personalization") in words else {}
    return {k: v for k, v in (("purposes", purposes), ("permissions", permissions)) if v}


def _moment(micros: Any, received_at: datetime) -> datetime:
    if micros is None:
        return received_at
    try:
        return moment_of(int(micros))
    except (ValueError, TypeError, OverflowError):
        raise RejectedEvent("timestamp_micros", "must be microseconds since 1970") from None


def _id(message: Mapping[str, Any], received_at: datetime) -> str:
    """The protocol has no ids: the same request with a time of its own is the same event; without one nobody can tell."""
    if message["event"].get("timestamp_micros") is None and message.get("timestamp_micros") is None:
        message = {**message, "received_at": received_at}
    return "ga4-" + hashlib.blake2b(msgspec.json.encode(message, order="sorted"), digest_size=16).hexdigest()


def _text(value: Any) -> str | None:
    return None if value in (None, "") or isinstance(value, dict | list) else shortened(str(value), MAX_ID) or None
