"""The canonical event: its vocabulary, parsing and validation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, Literal, get_args

import msgspec

from features.events.identifiers import (
    KINDS,
    MAX_IDENTIFIER,
    OF_A_PERSON,
    IdentifierError,
    IdentifierKind,
    PersonalSearch,
    holds_personal,
    normalise_all,
)
from features.events.spelling import meant, meant_field, words_of

EventName = Literal[
    "view_item_list", "select_item", "view_item", "search", "add_to_cart", "remove_from_cart", "view_cart",
    "begin_checkout", "purchase", "refund", "view_promotion", "select_promotion", "sign_up", "login",
    "identify", "alias", "consent_update", "message_sent", "message_open", "message_click", "message_unsubscribe",
    "ad_impression", "ad_click", "offer_view", "offer_accept", "offer_decline", "offer_redeem", "store_visit", "booking", "call",
    "feedback", "complaint", "erasure",
    "page_view", "screen_view", "custom",
]  # fmt: skip
"""GA4's names, the omnichannel ones, and ``custom`` for whatever a shop counts beside (its trait ``event`` tells what)."""
EVENT_NAMES: tuple[str, ...] = get_args(EventName)
_KNOWN_NAMES = frozenset(EVENT_NAMES)
OwnEvents = Mapping[str, tuple[str, ...]]
"""The events that a domain adds to these: each with the fields that it must carry to mean anything."""
NO_OWN: OwnEvents = {}

Channel = Literal["store", "web", "app", "email", "sms", "push", "mail", "call_centre", "ads"]

Purpose = Literal["analytics", "personalization"]
"""What a customer's data is used for."""

ContactChannel = Literal["email", "sms", "push", "mail", "call_centre", "ads"]
"""The channels by which a customer is contacted, each with their permission; the others they come to themselves."""

FUTURE_TOLERANCE = timedelta(minutes=5)
"""How far a client's clock may run ahead before its event is rejected."""

# --- the bounds of what comes in: each is checked before anything is worked on
MAX_ID: Final = MAX_IDENTIFIER
"""Characters of an id, an identifier, the name of a trait, or a consent's source and policy_version."""
MAX_TEXT: Final = 1_024
"""Characters of a search query or of a trait's value."""
MAX_TRAITS: Final = 256
"""Traits of an event; of the person twice as many may be told."""
MAX_ITEMS: Final = 5_000
"""Items of an event: the invoices of wholesale have more than a thousand lines."""
MAX_QUANTITY: Final = 2**31
"""How many of an item one line may tell of."""
MAX_MONEY: Final = 2**40
"""Minor units of one line: so small that the sum over any table stays a 64-bit integer."""
MAX_DEPTH: Final = 16
"""How deep objects and lists may be nested in a message of another vendor's client."""
MAX_VALUES: Final = 20_000
"""Values of such a message, of all its objects and lists together."""
MAX_CHARACTERS: Final = 150_000
"""Characters of such a message, of all its texts and names together."""
MAX_LONG_TEXT: Final = 8_192
"""Characters of one text of such a message; what is kept of it is shorter."""
MAX_MAGNITUDE: Final = 10**40
"""No number of such a message reaches it; quantities and amounts are bounded closer, by ``number``."""
MAX_NUMBER_CHARACTERS: Final = 64
"""Characters of a quantity or an amount."""
MAX_NUMBER_DIGITS: Final = 13
"""Digits of a quantity or an amount before the point."""
MAX_NUMBER_PLACES: Final = 400
"""Digits of a quantity or an amount after the point: as many as the smallest number of JSON's usual readers has."""

NAME_FORM: Final = "[a-z][a-z0-9_]{0,63}"
"""What the name of an event looks like that a domain adds."""
Text = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_ID)]
LongText = Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]
Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_QUANTITY)]
Money = Annotated[int, msgspec.Meta(ge=0, le=MAX_MONEY)]
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
    """Which text the customer was shown."""
    source: Text | None = None
    """Where they said it: a form, a call, a counter."""


class Event(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """One thing that one customer did, or that was done to them, in any channel."""

    event_id: Text
    """What names it, however often it is sent: a repeat is recognised by it."""
    name: Text
    """One of ``EventName``, or of the shop's domain."""
    occurred_at: Annotated[datetime, msgspec.Meta(tz=True)]
    identifiers: dict[IdentifierKind, Text] = {}
    """By what the customer is known, in clear; only keyed hashes of it are stored."""
    channel: Channel | None = None
    store_id: Text | None = None
    session_id: Text | None = None
    currency: Annotated[str, msgspec.Meta(pattern="^[A-Z]{3}$")] | None = None
    items: Annotated[list[Item], msgspec.Meta(max_length=MAX_ITEMS)] = []
    offer_id: Text | None = None
    campaign_id: Text | None = None
    query: LongText | None = None
    decision_id: Text | None = None
    """The answer that it follows from."""
    traits: Annotated[dict[Text, LongText], msgspec.Meta(max_length=MAX_TRAITS)] = {}
    """What else is true of the event. Those of ``identify`` and ``sign_up`` are of a person, and taken as ``personal``."""
    personal: Annotated[dict[Text, LongText], msgspec.Meta(max_length=2 * MAX_TRAITS)] = {}
    """What is true of the person, such as ``first_name``; it goes into the encrypted contact table and nowhere else."""
    previous: dict[IdentifierKind, Text] = {}
    """By what the customer was known before (``alias``)."""
    consent: Consent | None = None


class SealedEvent(Event, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """An event with keyed hashes for its identifiers and nothing personal: what may be stored."""


REQUIRED_FIELDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("select_item", "view_item", "add_to_cart", "remove_from_cart", "purchase", "refund"), ("items",)),
    **dict.fromkeys(("offer_view", "offer_redeem"), ("offer_id",)),
    **dict.fromkeys(("offer_accept", "offer_decline"), ("offer_id|decision_id",)),
    **dict.fromkeys(("message_sent", "message_open", "message_click"), ("campaign_id|offer_id|decision_id",)),
    "search": ("query",),
    "identify": ("identifiers",),
    "alias": ("identifiers", "previous"),
    "consent_update": ("identifiers", "consent"),
}
"""What an event of this name must carry to mean anything; of names divided by ``|`` one."""

TextClass = Literal["key", "session", "free text", "identifier", "of a person", "fixed form"]
TEXTS: dict[str, dict[str, TextClass]] = {
    "Event": {
        "event_id": "key", "name": "fixed form", "identifiers": "identifier", "store_id": "key", "session_id": "session",
        "currency": "fixed form",
        "offer_id": "key", "campaign_id": "key", "query": "free text", "decision_id": "key", "traits": "free text",
        "personal": "of a person", "previous": "identifier",
    },
    "Item": {"item_id": "key"},
    "Consent": {"policy_version": "free text", "source": "free text"},
}  # fmt: skip
"""What each text of an event is, and so what becomes of an e-mail address or a phone number in it.

key: compared with a catalogue, or told to the client again, so it stays as it is: an address, or a phone number in international
form, is refused. Plain digits are no phone number here: they may be an article's or an order's.
session: only groups events; one that holds an address or a phone number is stored as its keyed hash.
free text: addresses and phone numbers, also those of the shop's own country, are blotted out; so they are in the names of traits.
identifier: stored as its keyed hash. of a person: goes, encrypted, into the contact table and nowhere else.
fixed form: nothing but what the form allows.
"""
_KEYS = tuple(field for field, kind in TEXTS["Event"].items() if kind == "key")
PRIVATE = ("identifiers", "previous", "personal", "traits")
"""The fields of which no message repeats what was sent."""
ABOUT_A_PERSON = ("identify", "sign_up")
NOT_A_KEY = "holds an e-mail address or a phone number: send an id of your own, and what is personal as an identifier"
_CLOSED: dict[str, Any] = {
    "channel": Channel, "identifiers": IdentifierKind, "previous": IdentifierKind, "purposes": Purpose,
    "permissions": ContactChannel,
}  # fmt: skip
_QUOTED = re.compile(r"'([^']*)'")
_TOLD = re.compile(r"(?!.*\d{7})[A-Za-z_][A-Za-z0-9_.-]{0,63}")
"""What a client may be told again of the names and words that it sent."""
_TOLD_CHARACTERS = 1_000
_NO_NAME = re.compile(r"[^a-z0-9]+")
_decoder = msgspec.json.Decoder(Event)
_PATH = re.compile(r" - at (?:`[a-z]+` in )?`\$\.?([^`]*)`$")
_NAMED_FIELD = re.compile(r"(missing required|unknown) field `([^`]+)`")


class RejectedEvent(ValueError):
    """An event that cannot be taken; ``field`` names the culprit and ``reason`` the mend."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


def parse_event(
    raw: bytes | dict[str, Any],
    received_at: datetime,
    currency: str | None = None,
    phone_region: str | None = None,
    own: OwnEvents = NO_OWN,
) -> Event:
    """Read and check one event of a shop that counts in *currency* (None: whichever the event names), and whose domain adds *own* events.

    A ``custom`` event whose trait ``event`` says one of *own*, in whatever spelling, is that event: the clients of other vendors know
    no other way to send it.

    Identifiers come back in the form in which they are compared, phone numbers without a country code read in *phone_region*. What is
    personal in other texts is refused, blotted out or made plain for the seal, as ``TEXTS`` says of each.

    Raises:
        RejectedEvent: the JSON is broken, a field is missing, unknown, of a wrong type or out of range, the event lacks
            what its name requires, carries money without a currency or in another than the shop's, holds what is personal in
            a key, or lies in the future.
    """
    try:
        event = _decoder.decode(raw) if isinstance(raw, bytes) else msgspec.convert(raw, Event)
        if not isinstance(raw, bytes):
            # half of a surrogate pair is a text in memory, and nowhere else
            msgspec.json.encode(event)
    except UnicodeEncodeError:
        raise RejectedEvent("$", "a text holds half of a surrogate pair: send valid Unicode") from None
    except msgspec.ValidationError as error:
        raise RejectedEvent(*explain(error, Event)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RejectedEvent("$", f"not valid JSON: {error}") from None
    if "\0" in event.event_id:
        raise RejectedEvent("event_id", "holds a character of the number 0, which not every database keeps: leave it out")
    event = _named(event, own)
    for field in REQUIRED_FIELDS.get(event.name) or own.get(event.name, ()):
        names = field.split("|")
        if not any(getattr(event, name) for name in names):
            more = f", or {' or '.join(names[1:])}" if len(names) > 1 else ""
            raise RejectedEvent(names[0], f"an event named {event.name} needs it{more}")
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


def _named(event: Event, own: OwnEvents) -> Event:
    if event.name in _KNOWN_NAMES:
        if own and event.name == "custom" and (said := plain_name(event.traits.get("event", ""))) in own:
            return msgspec.structs.replace(event, name=said)
    elif event.name not in own:
        told = repr(event.name) if _TOLD.fullmatch(event.name) else "that"
        known = (*EVENT_NAMES, *own)
        raise RejectedEvent("name", f"{told} is no event here: use one of {', '.join(known)}{meant(event.name, known)}")
    return event


def plain_name(said: str) -> str:
    """A name in the form of an event's: ``Plan Renewed`` is ``plan_renewed``."""
    return _NO_NAME.sub("_", said.lower()).strip("_")


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
    check_keys((field, getattr(event, field)) for field in _KEYS)
    check_keys((f"items[{number}].item_id", item.item_id) for number, item in enumerate(event.items))
    search = PersonalSearch(phone_region)
    if event.session_id:
        changed["session_id"] = search.made_plain(event.session_id)
    of_a_person = event.name in ABOUT_A_PERSON
    theirs, rest = dict(event.personal), {}
    for name, value in event.traits.items():
        if of_a_person or OF_A_PERSON.search(name):
            theirs.setdefault(name, value)
        else:
            rest[search.blotted(name, MAX_ID)] = search.blotted(value, MAX_TEXT)
    if theirs:
        # beside the encrypted values their names stand in clear
        changed["personal"] = {search.blotted(name, MAX_ID): value for name, value in theirs.items()}
    if event.traits:
        changed["traits"] = rest
    if event.query:
        changed["query"] = search.blotted(event.query, MAX_TEXT)
    if event.consent:
        said = {field: getattr(event.consent, field) for field in TEXTS["Consent"]}
        clean = {field: search.blotted(text, MAX_ID) for field, text in said.items() if text}
        changed["consent"] = msgspec.structs.replace(event.consent, **clean)
    return msgspec.structs.replace(event, **changed)


def check_keys(keys: Iterable[tuple[str, str | None]]) -> None:
    """See that no text of the class key, given with the name of its field, holds what is personal.

    Raises:
        RejectedEvent: one does; the error does not repeat it.
    """
    for field, text in keys:
        if text and holds_personal(text):
            raise RejectedEvent(field, NOT_A_KEY)


def bounded(message: Any) -> None:
    """See that a message of another vendor's client is within the bounds, before anything is worked on: one walk, itself bounded.

    Raises:
        RejectedEvent: it is not, or holds what JSON cannot; ``field`` is where.
    """
    values, characters = 1, 0
    waiting: list[tuple[Any, str, int]] = []
    if isinstance(message, dict | list):
        waiting.append((message, "", 1))
    else:
        characters += _measured(message, "", "")
    while waiting:
        holder, place, depth = waiting.pop()
        values += len(holder)
        if values > MAX_VALUES:
            raise RejectedEvent(place or "$", f"holds more than {MAX_VALUES} values: send less at once")
        if depth > MAX_DEPTH:
            raise RejectedEvent(place or "$", f"is nested more than {MAX_DEPTH} deep: send it flatter")
        named = isinstance(holder, dict)
        for name, value in holder.items() if named else enumerate(holder):
            if named:
                characters += _length(name, MAX_ID, place, "")
            if isinstance(value, dict | list):
                waiting.append((value, _told_place(place, name), depth + 1))
            else:
                characters += _measured(value, place, name)
        if characters > MAX_CHARACTERS:
            raise RejectedEvent("$", f"holds more than {MAX_CHARACTERS} characters: send less at once")


def _measured(value: Any, place: str, name: str | int) -> int:
    """The characters of a value that holds no others, which is within the bounds."""
    if isinstance(value, str):
        return _length(value, MAX_LONG_TEXT, place, name)
    if isinstance(value, int | float):
        # written so that what is not a number fails it too
        if not abs(value) < MAX_MAGNITUDE:
            raise RejectedEvent(_told_place(place, name), f"a number must be below {MAX_MAGNITUDE:.0e}: send a smaller one")
    elif value is not None:
        raise RejectedEvent(_told_place(place, name), "is nothing that JSON can hold")
    return 0


def _length(text: Any, most: int, place: str, name: str | int) -> int:
    if not isinstance(text, str) or len(text) > most:
        raise RejectedEvent(_told_place(place, name), f"a text or name here may hold {most} characters: shorten it")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RejectedEvent(_told_place(place, name), "a text holds half of a surrogate pair: send valid Unicode") from None
    return len(text)


def _told_place(place: str, name: str | int) -> str:
    if name == "":
        return place or "$"
    if isinstance(name, int):
        return f"{place}[{name}]"
    told = name if _TOLD.fullmatch(name) else "[...]"
    return f"{place}.{told}" if place else told


def explain(error: msgspec.ValidationError, shape: Any = None) -> tuple[str, str]:
    """Split a msgspec message into the field's path (``$`` for the whole body) and the reason; neither repeats what may be somebody's.

    With *shape*, the type that was asked for, a name that is not known brings the one that may be meant.
    """
    if isinstance(error.__cause__, RejectedEvent):
        return error.__cause__.field, error.__cause__.reason
    text = str(error)
    if len(text) > _TOLD_CHARACTERS:
        # the name of a field may be as long as a body
        return "$", "a name or word in it is longer than any that is known: see /openapi.json"
    at = _PATH.search(text)
    reason = text[: at.start()] if at else text
    path = at.group(1) if at else ""
    named = _NAMED_FIELD.search(reason)
    if named and _TOLD.fullmatch(named[2]):
        if named[1] == "unknown" and shape is not None:
            reason += meant_field(named[2], path, shape)
        path = f"{path}.{named[2]}" if path else named[2]
    elif named:
        reason = "holds a field that is not known"
    if reason.startswith("Invalid enum value"):
        known = get_args(_CLOSED.get(field := path.rpartition(".")[2]))
        if shape is not None:
            known = known or words_of(shape)[1].get(field, ())
        private, wrong = path.startswith(PRIVATE), _QUOTED.search(reason)
        reason = _QUOTED.sub(lambda said: said[0] if not private and _TOLD.fullmatch(said[1]) else "that", reason)
        reason += f": use one of {', '.join(known)}" if known else ""
        reason += meant(wrong[1], known) if wrong else ""
    if " of length <= " in reason:
        reason += ": shorten it or send less"
    return path or "$", reason


def identity_key(event: SealedEvent) -> str | None:
    """The event's strongest identifier as ``kind:hash``, or None for an anonymous event."""
    for kind in KINDS:
        if kind in event.identifiers:
            return f"{kind}:{event.identifiers[kind]}"
    return None
