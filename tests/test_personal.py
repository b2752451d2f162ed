"""An e-mail address or a phone number in any text of an event or a question is stored nowhere in clear."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, unquote

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from features.events.event import MAX_ID, MAX_TEXT, TEXTS, Consent, Event, Item, RejectedEvent, explain, parse_event
from features.events.identifiers import BLOT, MAX_DIALLED, PersonalSearch, holds_personal
from features.people.vault import Sealed, Vault
from serving.decide.questions import (
    QUESTION_TEXTS,
    NextBestOfferRequest,
    Question,
    RecommendationsRequest,
    ScoreRequest,
    SimilarItemsRequest,
)

NOW = datetime(2018, 1, 1, 12, tzinfo=UTC)
VAULT = Vault(b"a secret of the tests")
WHOLE: dict[str, Any] = {
    "event_id": "e1", "name": "search", "occurred_at": NOW.isoformat(), "channel": "web", "currency": "GBP", "query": "bread",
    "identifiers": {"user_id": "u1"}, "items": [{"item_id": "i1"}], "consent": {"purposes": {"analytics": True}},
}  # fmt: skip
PHONES = ["+44 20 7946 0018", "+442079460018", "+1-202-555-0143", "+49 (30) 1234567", "+33.1.23.45.67.89"]
NATIONAL = ["020 7946 0018", "(020) 7946 0018", "020-7946-0018", "07911 123456", "07911123456"]


def placed(place: str, text: str) -> dict[str, Any]:
    """The whole event with *text* at one of its places."""
    if place in ("consent.source", "consent.policy_version"):
        return {**WHOLE, "consent": {**WHOLE["consent"], place.partition(".")[2]: text}}
    if place.startswith(("identifiers.", "previous.", "personal.", "traits.")):
        field, _, name = place.partition(".")
        return {**WHOLE, field: {name: text}}
    special: dict[str, dict[str, Any]] = {
        "items.item_id": {"items": [{"item_id": "i0"}, {"item_id": text}]},
        "the name of a trait": {"traits": {text: "1"}},
        "the name of what is personal": {"personal": {text: "1"}},
        "a trait of identify": {"name": "identify", "traits": {"note": text}},
        "the name of a trait of identify": {"name": "identify", "traits": {text: "1"}},
        "a kind of identifier": {"identifiers": {text: "1"}},
        "a purpose": {"consent": {"purposes": {text: True}}},
        "a field": {text: "1"},
        "a field of an item": {"items": [{"item_id": "1", text: 1}]},
    }
    return {**WHOLE, **special.get(place, {place: text})}


KEYS = ["event_id", "store_id", "offer_id", "campaign_id", "decision_id", "items.item_id"]
FREE = [
    "query", "traits.note", "consent.source", "consent.policy_version", "the name of a trait", "the name of what is personal",
    "personal.note", "a trait of identify", "the name of a trait of identify",
]  # fmt: skip
HASHED = ["session_id", "identifiers.user_id", "identifiers.receipt", "identifiers.email", "identifiers.phone", "previous.cookie"]
CLOSED = ["name", "channel", "currency", "occurred_at", "a kind of identifier", "a purpose", "a field", "a field of an item"]

addresses = st.builds(
    "zq{}@{}".format,
    st.text("abcdefghijklmnopqrstuvwxyz0123456789.+_-", min_size=6, max_size=14),
    st.sampled_from(["example.org", "mail.example.co.uk", "EXAMPLE.com", "bücher.example", "xn--bcher-kva.example"]),
)


def every_byte(text: str) -> str:
    return "".join(f"%{byte:02x}" for byte in text.encode())


def encoded(text: str, how: str, times: int) -> str:
    if how == "wide":
        return text.replace("@", "＠").replace("+", "＋")
    if how == "invisible":
        return text.replace("@", "\u200b@\u2060")
    for _ in range(times):
        text = {"quoted": quote, "every byte": every_byte, "every byte once": every_byte}[how](text)
        if how != "quoted":
            how = "quoted"
    return text


ways = st.tuples(st.sampled_from(["quoted", "every byte", "wide", "invisible"]), st.integers(0, 6))


def texts_of(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, each in value.items():
            yield from (name, *texts_of(each))
    elif isinstance(value, list):
        for each in value:
            yield from texts_of(each)


def traces(needle: str, texts: Iterator[str]) -> list[str]:
    """The texts in which the needle stands, plainly or encoded; of a phone number its last seven digits are looked for."""
    digits = re.sub(r"\D", "", needle)[-7:]
    found = []
    for text in texts:
        plain = text
        for _ in range(20):
            plain = unquote(plain)
        plain = re.sub("[\u200b\u2060]", "", plain).lower().replace("＠", "@")
        if needle.partition("@")[0].lower() in plain if "@" in needle else digits in re.sub(r"\D", "", plain):
            found.append(text)
    return found


def check_leaves_no_trace(needle: str, raw: dict[str, Any]) -> Sealed | None:
    try:
        sealed = VAULT.seal(parse_event(raw, NOW, None, "GB"))
    except RejectedEvent as error:
        told = [error.field, error.reason, str(error)]
        sealed = None
    if sealed is None:
        assert not traces(needle, iter(told))
        return None
    assert not traces(needle, texts_of(msgspec.json.decode(msgspec.json.encode(sealed.event))))
    # beside the encrypted values the names stand in clear
    assert not traces(needle, (row.field for row in sealed.personal))
    # what was sealed must be read again, from the inbox
    assert msgspec.json.decode(msgspec.json.encode(sealed.event), type=type(sealed.event)) == sealed.event
    return sealed


@given(st.sampled_from([*KEYS, *FREE, *HASHED, *CLOSED]), addresses, ways, st.sampled_from(["{}", "for {} now", "/u/{}/home"]))
@example("session_id", "zqadaada@example.org", ("quoted", 2), "{}")
def test_no_address_is_stored_in_clear_wherever_it_stands(place: str, address: str, way: tuple[str, int], around: str) -> None:
    text = around.format(encoded(address, *way))
    sealed = check_leaves_no_trace(address, placed(place, text))
    if place in KEYS or place in CLOSED:
        assert sealed is None
    elif len(text) <= MAX_ID and place not in ("identifiers.email", "identifiers.phone"):
        assert sealed is not None


@given(st.sampled_from([*KEYS, *FREE, *HASHED, *CLOSED]), st.sampled_from(PHONES), ways, st.sampled_from(["{}", "for {} now", "n-{}."]))
def test_no_international_number_is(place: str, number: str, way: tuple[str, int], around: str) -> None:
    sealed = check_leaves_no_trace(number, placed(place, around.format(encoded(number, *way))))
    if place in KEYS or place in CLOSED:
        assert sealed is None


@given(st.sampled_from([*FREE, *HASHED]), st.sampled_from(NATIONAL), ways, st.sampled_from(["{}", "for {} now", "2 {}", "{} 2"]))
def test_no_number_of_the_shops_country_is(place: str, number: str, way: tuple[str, int], around: str) -> None:
    check_leaves_no_trace(number, placed(place, around.format(encoded(number, *way))))


def test_without_a_country_the_numbers_of_none_are_looked_for() -> None:
    assert parse_event(placed("query", NATIONAL[0]), NOW).query == NATIONAL[0]
    assert parse_event(placed("query", PHONES[0]), NOW).query == BLOT


@pytest.mark.parametrize("place", KEYS)
@pytest.mark.parametrize("text", ["ada@example.org", "ada%25252540example.org", "+44 20 7946 0018", "%2B442079460018"])
def test_a_key_that_is_personal_is_refused_with_its_field_and_the_mend(place: str, text: str) -> None:
    with pytest.raises(RejectedEvent, match="send an id of your own") as rejected:
        parse_event(placed(place, text), NOW)
    assert rejected.value.field == place.replace("items.", "items[1].")


@pytest.mark.parametrize("layers", [0, 3, 7, 20, 200])
def test_what_is_encoded_without_end_is_taken_for_an_address_that_hides(layers: int) -> None:
    # each round of decoding makes plain only the innermost
    hidden = f"ada%2{'%3' * layers}540example.org"
    assert holds_personal(hidden)
    assert PersonalSearch().blotted(hidden, MAX_TEXT) == BLOT


def test_a_session_that_names_somebody_still_groups_and_names_nobody() -> None:
    said = ["ada@example.org", "ADA@example.org", "020 7946 0018", "(020) 7946-0018", "+44 20 7946 0018", "020%207946%200018", "s-1"]
    kept = [VAULT.seal(parse_event(placed("session_id", text), NOW, None, "GB")).event.session_id or "" for text in said]
    assert kept[0] == kept[1] != kept[2] == kept[3] == kept[5]
    assert all(re.fullmatch("[0-9a-f]{32}", each) for each in kept[:-1])
    assert kept[-1] == "s-1"


uuids = st.uuids().map(str)
articles = st.from_regex(r"\A(?:\d{8}|\d{13}|\d{14})\Z").filter(str.isascii)
googles = st.from_regex(r"\A[1-9][0-9]{8,9}\.1[0-9]{9}\Z")
moments = st.datetimes(datetime(2000, 1, 1), datetime(2030, 1, 1), timezones=st.just(UTC))
times = st.builds(lambda at, whole: at.isoformat() if whole else at.date().isoformat(), moments, st.booleans()) | moments.map(
    lambda at: at.isoformat().replace("+00:00", "+10:00")
)
hashes = st.binary(min_size=8, max_size=32).map(bytes.hex)


@given(
    uuids | articles | googles | times | hashes, st.sampled_from([*KEYS, "session_id", "query", "traits.note", "consent.source"]),
    st.sampled_from([None, "GB", "US", "DE"]),
)  # fmt: skip
@example("2025550143.1514764800", "session_id", "US")
@example("0123456789abcdef", "session_id", "GB")
@example("1514764800", "session_id", "DE")
@example("5901234123457", "query", "DE")
def test_ordinary_ids_are_neither_refused_nor_changed(ordinary: str, place: str, region: str | None) -> None:
    sealed = VAULT.seal(parse_event(placed(place, ordinary), NOW, None, region)).event
    field, _, name = place.partition(".")
    held: Any = getattr(sealed, field)
    held = held[1].item_id if field == "items" else held[name] if field == "traits" else held.source if field == "consent" else held
    assert held == ordinary


@given(st.from_regex(r"\A[0-9]{1,30}\Z"), st.sampled_from(KEYS))
def test_plain_digits_are_an_articles_or_an_orders(digits: str, place: str) -> None:
    parse_event(placed(place, digits), NOW, None, "GB")


@given(st.text(max_size=300), st.sampled_from([None, "GB", "US"]))
def test_blotting_never_lengthens_beyond_what_may_be_stored(text: str, region: str | None) -> None:
    assert len(PersonalSearch(region).blotted(text * 3, MAX_TEXT)) <= MAX_TEXT


def test_blots_longer_than_what_they_hide_are_cut_to_what_may_be_read_again() -> None:
    sealed = VAULT.seal(parse_event({**WHOLE, "query": "a@b.cd " * 146, "traits": {"a@b.cd " * 36: "x"}}, NOW)).event
    assert len(sealed.query or "") == MAX_TEXT
    assert msgspec.json.decode(msgspec.json.encode(sealed), type=type(sealed)) == sealed


def test_digits_beyond_what_is_checked_count_as_numbers() -> None:
    many = " ".join(["11 22 33 44"] * MAX_DIALLED)[:MAX_TEXT]
    assert PersonalSearch("GB").blotted(many, MAX_TEXT) == BLOT


# --- the tables are whole


def holds_text(kind: msgspec.inspect.Type) -> bool:
    if isinstance(kind, msgspec.inspect.StrType):
        return True
    if isinstance(kind, msgspec.inspect.UnionType):
        return any(map(holds_text, kind.types))
    if isinstance(kind, msgspec.inspect.DictType):
        return holds_text(kind.key_type) or holds_text(kind.value_type)
    if isinstance(kind, msgspec.inspect.ListType):
        return holds_text(kind.item_type)
    return False


def text_fields(struct: type[msgspec.Struct]) -> set[str]:
    info = msgspec.inspect.type_info(struct)
    assert isinstance(info, msgspec.inspect.StructType)
    return {field.name for field in info.fields if holds_text(field.type)}


def structs_within(struct: type[msgspec.Struct]) -> set[type[msgspec.Struct]]:
    found: set[type[msgspec.Struct]] = {struct}

    def walk(kind: Any) -> None:
        if isinstance(kind, msgspec.inspect.StructType) and kind.cls not in found:
            found.update(structs_within(kind.cls))
        for part in (*getattr(kind, "types", ()), *(getattr(kind, name, None) for name in ("item_type", "key_type", "value_type"))):
            if part is not None:
                walk(part)

    info = msgspec.inspect.type_info(struct)
    assert isinstance(info, msgspec.inspect.StructType)
    for field in info.fields:
        walk(field.type)
    return found


def test_every_text_of_an_event_has_its_class() -> None:
    assert structs_within(Event) == {Event, Item, Consent}
    assert {struct.__name__: text_fields(struct) for struct in structs_within(Event)} == {
        name: set(fields) for name, fields in TEXTS.items()
    }


def questions(kind: type[Question] = Question) -> set[type[Question]]:
    return {kind}.union(*(questions(each) for each in kind.__subclasses__()))


def test_every_text_of_a_question_has_its_class() -> None:
    assert set().union(*(text_fields(kind) for kind in questions())) == set(QUESTION_TEXTS)


@pytest.mark.parametrize(
    ("kind", "body", "field"),
    [
        (RecommendationsRequest, {"include": {"brand": ["N", "ada@example.org"]}}, "include.brand[1]"),
        (RecommendationsRequest, {"exclude": {"ada%2540example.org": []}}, "exclude"),
        (RecommendationsRequest, {"exclude_item_ids": ["i1", "+44 20 7946 0018"]}, "exclude_item_ids[1]"),
        (SimilarItemsRequest, {"item_id": "ada@example.org"}, "item_id"),
        (SimilarItemsRequest, {"item_id": "1", "exclude_item_ids": ["ada@example.org"]}, "exclude_item_ids[0]"),
        (NextBestOfferRequest, {"exclude_offer_ids": ["ada@example.org"]}, "exclude_offer_ids[0]"),
        (ScoreRequest, {"customer_id": "ada@example.org"}, "customer_id"),
        (RecommendationsRequest, {"listing": "ada@example.org"}, "listing"),
        (RecommendationsRequest, {"ada@example.org": 1}, "$"),
    ],
)
def test_a_question_that_names_somebody_where_a_thing_belongs_is_refused(kind: type[Question], body: dict[str, Any], field: str) -> None:
    with pytest.raises(msgspec.ValidationError) as refused:
        msgspec.json.decode(msgspec.json.encode(body), type=kind)
    told, reason = explain(refused.value)
    assert told == field
    assert not traces("ada@example.org", iter([told, reason]))
    assert not traces("+44 20 7946 0018", iter([told, reason]))


def test_a_question_may_name_the_customer_by_what_identifies_them() -> None:
    asked = msgspec.json.decode(
        b'{"identifiers": {"email": "ada@example.org"}, "exclude_item_ids": ["0012345678905"]}', type=RecommendationsRequest
    )
    assert asked.identifiers == {"email": "ada@example.org"}
