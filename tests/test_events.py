"""What an event must be to be taken, and what a bad one is told."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scene import event

from features.events.event import Event, RejectedEvent, parse_event
from features.people.vault import Vault

VAULT = Vault(b"a secret of the tests")
NOW = datetime(2018, 1, 1, 12, tzinfo=UTC)
GOOD = event("e1", "purchase", NOW, items=[("i1", 2, 399)])


def changed(**fields: Any) -> dict[str, Any]:
    return {k: v for k, v in {**GOOD, **fields}.items() if v is not ...}


def test_an_event_in_another_currency_than_the_shops_is_not_summed_with_the_others() -> None:
    assert parse_event(GOOD, NOW, "USD").currency == "USD"
    with pytest.raises(RejectedEvent, match="USD where the shop counts in EUR"):
        parse_event(GOOD, NOW, "EUR")


def test_a_good_event_is_taken_with_its_time_in_utc() -> None:
    parsed = parse_event(changed(occurred_at="2018-01-01T07:00:00-05:00"), NOW)
    assert parsed.occurred_at == NOW
    assert parsed.occurred_at.tzinfo == UTC
    assert parsed.identifiers == {"loyalty_card": "1"}


OWN = {"plan_renewed": (), "add_to_wishlist": ("items",)}


def test_an_event_of_the_domain_is_known_there_and_nowhere_else() -> None:
    renewed = changed(name="plan_renewed", items=[], currency=None)
    assert parse_event(renewed, NOW, own=OWN).name == "plan_renewed"
    with pytest.raises(RejectedEvent, match=r"'plan_renewed' is no event here: use one of view_item_list.*custom$"):
        parse_event(renewed, NOW)
    with pytest.raises(RejectedEvent, match=r"items: an event named add_to_wishlist needs it"):
        parse_event(changed(name="add_to_wishlist", items=[]), NOW, own=OWN)
    with pytest.raises(RejectedEvent, match="plan_renewed, add_to_wishlist"):
        parse_event(changed(name="plan_ended"), NOW, own=OWN)


@pytest.mark.parametrize("said", ["plan_renewed", "Plan Renewed", " plan-renewed!"])
def test_a_custom_event_that_the_domain_knows_is_that_event(said: str) -> None:
    custom = changed(name="custom", items=[], currency=None, traits={"event": said, "plan": "gold"})
    parsed = parse_event(custom, NOW, own=OWN)
    assert (parsed.name, parsed.traits["plan"]) == ("plan_renewed", "gold")
    assert parse_event(custom, NOW).name == "custom"
    assert parse_event(changed(name="custom", traits={"event": "something else"}), NOW, own=OWN).name == "custom"
    with pytest.raises(RejectedEvent, match="items"):
        parse_event(changed(name="custom", items=[], currency=None, traits={"event": "Add to wishlist"}), NOW, own=OWN)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"event_id": ...}, "event_id"),
        ({"event_id": "a\0b"}, "event_id"),
        ({"name": "bought"}, "name"),
        ({"occurred_at": "2018-01-01T07:00:00"}, "occurred_at"),
        ({"occurred_at": "yesterday"}, "occurred_at"),
        ({"occurred_at": (NOW + timedelta(days=1)).isoformat()}, "occurred_at"),
        ({"occurred_at": "0001-01-01T00:00:00+14:00"}, "occurred_at"),
        ({"occurred_at": "9999-12-31T23:59:59-14:00"}, "occurred_at"),
        ({"occurred_at": "1970-01-01T00:00:00Z"}, "occurred_at"),
        ({"items": [{"item_id": "i1", "amount_minor": 2**41}]}, "items[0].amount_minor"),
        ({"items": []}, "items"),
        ({"items": [{"item_id": "i1", "quantity": "two"}]}, "items[0].quantity"),
        ({"items": [{"item_id": "i1"}, {"quantity": 1}]}, "items[1].item_id"),
        ({"items": [{"item_id": "i1", "amount_minor": 3.99}]}, "items[0].amount_minor"),
        ({"items": [{"item_id": "i1", "quantity": -1}]}, "items[0].quantity"),
        ({"currency": "dollars"}, "currency"),
        ({"currency": None}, "currency"),
        ({"colour": "red"}, "colour"),
        ({"identifiers": {"e-mail": "ada@example.org"}}, "identifiers"),
        ({"name": "search"}, "query"),
        ({"name": "offer_redeem"}, "offer_id"),
    ],
)
def test_a_bad_event_names_its_field(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(RejectedEvent) as rejected:
        parse_event(changed(**fields), NOW)
    assert rejected.value.field.startswith(field)
    assert rejected.value.reason


@given(st.binary(max_size=200))
def test_no_bytes_whatever_do_more_than_be_rejected(raw: bytes) -> None:
    with contextlib.suppress(RejectedEvent):
        parse_event(raw, NOW)


@given(
    st.fixed_dictionaries(
        {
            "event_id": st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20),
            "quantity": st.integers(0, 1000),
            "cents": st.integers(0, 10**9),
        }
    )
)
def test_an_event_survives_its_own_json_and_keeps_its_digest(drawn: dict[str, Any]) -> None:
    parsed = parse_event(event(drawn["event_id"], "purchase", NOW, items=[("i", drawn["quantity"], drawn["cents"])]), NOW)
    again = msgspec.json.decode(msgspec.json.encode(parsed), type=Event)
    assert again == parsed
    assert VAULT.seal(again).content_hash == VAULT.seal(parsed).content_hash


def test_the_digest_tells_other_content_from_other_order() -> None:
    one, same, other = (
        VAULT.seal(parse_event(changed(traits=traits), NOW)).content_hash
        for traits in ({"a": "1", "b": "2"}, {"b": "2", "a": "1"}, {"a": "1", "b": "3"})
    )
    assert one == same != other


@pytest.mark.parametrize("field", ["event_id", "store_id", "offer_id", "campaign_id"])
def test_an_address_is_no_id(field: str) -> None:
    with pytest.raises(RejectedEvent, match="e-mail address"):
        parse_event(changed(**{field: "for ada@shop.org"}), NOW)


def test_what_is_of_a_person_is_taken_apart_wherever_it_is_said() -> None:
    traits = {
        "shipping_address.street": "12 St James's Square", "full_name": "Ada Lovelace", "customer.last_name": "Lovelace", "phone_number": "1",
        "path": "/u/ada%40shop.org/home", "note": "call +44 20 7946 0958 or ada@shop.org", "country": "UK", "size": "42",
    }  # fmt: skip
    parsed = parse_event(changed(traits=traits, query="ada@shop.org"), NOW)
    assert set(parsed.personal) == {"shipping_address.street", "full_name", "customer.last_name", "phone_number"}
    assert parsed.traits["country"] == "UK"
    said = str(parsed.traits) + str(parsed.query)
    for clear in ("ada", "7946", "Lovelace", "James"):
        assert clear not in said


@pytest.mark.parametrize(
    ("change", "field", "said"),
    [
        ({"name": "Purchase"}, "name", "did you mean 'purchase'?"),
        ({"name": "page_vew"}, "name", "did you mean 'page_view'?"),
        ({"channel": "Web"}, "channel", "did you mean 'web'?"),
        ({"identifiers": {"userId": "7"}}, "identifiers", "did you mean 'user_id'?"),
        ({"user_id": "7"}, "user_id", "did you mean 'identifiers.user_id'?"),
        ({"occuredAt": "2018-01-01T00:00:00Z"}, "occuredAt", "did you mean 'occurred_at'?"),
        ({"items": [{"item_id": "a", "amountMinor": 1}]}, "items[0].amountMinor", "did you mean 'amount_minor'?"),
    ],
)
def test_a_name_that_is_not_known_brings_the_one_that_is_meant(change: dict[str, Any], field: str, said: str) -> None:
    with pytest.raises(RejectedEvent) as error:
        parse_event(msgspec.json.encode(changed(**change)), NOW)
    assert error.value.field == field
    assert error.value.reason.endswith(said)


def test_what_resembles_nothing_brings_no_hint_and_nothing_of_a_person_is_said_again() -> None:
    with pytest.raises(RejectedEvent) as error:
        parse_event(changed(name="xylophone"), NOW)
    assert "did you mean" not in error.value.reason
    with pytest.raises(RejectedEvent) as error:
        parse_event(changed(identifiers={"ada.lovelace": "7"}), NOW)
    assert "ada" not in error.value.reason
