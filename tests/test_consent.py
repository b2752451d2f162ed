"""What a customer allows: every purpose in every use, before, during and after a withdrawal; permissions to contact; the policy."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scene import NEW_YEAR, TinyShop, command, customer

from features.catalogue.shop import Shop
from features.events.event import RejectedEvent, parse_event
from features.people import consent
from features.people.consent import CONTACT_CHANNELS, FEATURES, LEARNING, PURPOSES, STATISTICS, ConsentPolicy, Consents, Statement, standing
from features.people.contacts import Contacts
from features.people.identity import Identities
from features.state.home import Home
from features.state.seen import Seen
from features.store.feature_store import FeatureStore
from features.store.profile import profile
from features.store.timeline import open_timeline
from serving.decide.population import withdrawn
from training.dataset import Truth

DAYS = (40, 30, 20, 10)
"""When she bought: before, during and after the withdrawal, which lasts from day 35 to day 15."""
WITHDRAWN_FROM, WITHDRAWN_UNTIL = 35, 15


def ago(days: float) -> datetime:
    return NEW_YEAR - timedelta(days=days)


def bought(days: int, card: str = "1", **more: Any) -> dict[str, Any]:
    return {
        "event_id": f"{card}-{days}", "name": "purchase", "occurred_at": ago(days).isoformat(), "identifiers": {"loyalty_card": card},
        "items": [{"item_id": f"i{days // 10}", "amount_minor": 100}], "currency": "USD", "channel": "store", **more,
    }  # fmt: skip


def says(days: float, card: str = "1", **said: Any) -> dict[str, Any]:
    return {
        "event_id": f"says-{card}-{days}", "name": "consent_update", "occurred_at": ago(days).isoformat(),
        "identifiers": {"loyalty_card": card}, "consent": {**said, "policy_version": "v1", "source": "form"},
    }  # fmt: skip


def purchases(shop: TinyShop, purposes: Any) -> set[str]:
    events = open_timeline(shop.home, NEW_YEAR, purposes=purposes).before(NEW_YEAR).events
    mine = events.filter(events.customer_id == customer("1"), events.name == "purchase")
    return set(mine.select("event_id").to_pyarrow()["event_id"].to_pylist())


def features_of(shop: TinyShop) -> set[str]:
    """Her feature row, offline: which of her purchases it knows."""
    store = FeatureStore(shop.home)
    store.apply()
    store.backfill("customer_state", {NEW_YEAR: None})
    spine = pd.DataFrame({"customer_id": [customer("1")], "event_timestamp": pd.to_datetime([NEW_YEAR])})
    [row] = store.historical(spine, "state_v1").to_dict("records")
    items = row["bought_item_ids"]
    return set() if items is None or isinstance(items, float) else {f"1-{int(item[1:]) * 10}" for item in items}


def learnt_from(shop: TinyShop) -> set[str]:
    """The training set: the purchases behind her labels, if she is in it."""
    truth = Truth(shop.home, NEW_YEAR)
    spine = truth.churn_spine([ago(5)])
    if customer("1") not in set(spine["customer_id"]):
        return set()
    mine = truth.visits[truth.visits["customer_id"] == customer("1")]
    return {f"1-{(NEW_YEAR - at).days}" for at in mine["occurred_at"]}


def counted(shop: TinyShop) -> set[str]:
    """What is true of items: the purchases that count in it."""
    return purchases(shop, STATISTICS)


def shown(shop: TinyShop) -> set[str]:
    """The profile."""
    identities = Identities(shop.home)
    view = profile(shop.home, identities, Consents(shop.home, shop.shop.consent), Contacts(shop.home, identities.vault), customer("1"))
    return {f"1-{(NEW_YEAR - e['occurred_at']).days}" for e in view["events"] if e["name"] == "purchase"}


def answered(shop: TinyShop) -> set[str]:
    """Online answers, decisions and batch files read her row only if this stands."""
    identities, consents = Identities(shop.home), Consents(shop.home, shop.shop.consent)
    may = standing(consents, identities, customer("1")).personalization
    assert (customer("1") in withdrawn(identities, consents)) == (not may), "the batch says the same"
    return features_of(shop) if may else set()


USES: dict[str, Callable[[TinyShop], set[str]]] = {
    "features": features_of, "training sets": learnt_from, "item statistics": counted, "profile": shown, "answers": answered,
}  # fmt: skip
NEEDS = {
    "features": FEATURES, "training sets": LEARNING, "item statistics": STATISTICS, "profile": FEATURES, "answers": FEATURES,
}  # fmt: skip
ALL = {f"1-{days}" for days in DAYS}
OUTSIDE = {f"1-{days}" for days in DAYS if not WITHDRAWN_UNTIL < days < WITHDRAWN_FROM}


@pytest.mark.parametrize("moment", ["before", "during", "after"])
@pytest.mark.parametrize("use", list(USES))
@pytest.mark.parametrize("purpose", PURPOSES)
def test_every_purpose_in_every_use(tiny: TinyShop, purpose: str, use: str, moment: str) -> None:
    """Usable is what was allowed when it occurred and is not withdrawn now, whatever moment is looked back to."""
    tiny.add(*(bought(days) for days in DAYS), bought(12, card="2"))
    if moment in ("during", "after"):
        tiny.add(says(WITHDRAWN_FROM, purposes={purpose: False}))
    if moment == "after":
        tiny.add(says(WITHDRAWN_UNTIL, purposes={purpose: True}))
    seen = USES[use](tiny)
    if moment == "before" or purpose not in NEEDS[use]:
        assert seen == ALL
    elif moment == "during":
        assert seen == set()
    elif use == "training sets" and purpose == "analytics":
        assert seen == set(), "her feature rows know what may serve her and not be learnt from, so she is left out whole"
    else:
        assert seen == OUTSIDE


def test_what_others_allow_is_theirs(tiny: TinyShop) -> None:
    tiny.add(bought(10), bought(12, card="2"), says(5, card="2", purposes={"personalization": False, "analytics": False}))
    assert purchases(tiny, LEARNING) == {"1-10"}


def test_a_withdrawal_counts_for_all_that_is_hers_by_now(tiny: TinyShop) -> None:
    """Said under an address that was not known to be hers when she bought."""
    tiny.add(bought(30), {**says(20, purposes={"personalization": False}), "identifiers": {"email": "ada@shop.org"}})
    assert purchases(tiny, FEATURES) == {"1-30"}
    both = {"loyalty_card": "1", "email": "ada@shop.org"}
    tiny.add({"event_id": "link", "name": "login", "occurred_at": ago(3).isoformat(), "identifiers": both})
    assert purchases(tiny, FEATURES) == set()
    past = open_timeline(tiny.home, ago(25)).before(ago(25)).events
    assert past.filter(past.customer_id == customer("1")).count().execute() == 0, "nor where one looks back to before it was known"


def test_a_withdrawal_counts_where_the_events_own_address_has_since_proved_to_be_shared(tiny: TinyShop) -> None:
    """She is told by her phone today, as she was by the family's address then."""
    family, phone = {"email": "us@home.org"}, {"phone": "+442079460958"}
    tiny.add({"event_id": "first", "name": "login", "occurred_at": ago(40).isoformat(), "identifiers": {"loyalty_card": "7", **family}})
    tiny.add({**bought(30), "identifiers": {**family, **phone}})

    def usable() -> int:
        past = open_timeline(tiny.home, ago(20)).before(ago(20)).events
        return int(past.filter(past.name == "purchase").count().execute())

    assert usable() == 1
    tiny.add({"event_id": "other", "name": "login", "occurred_at": ago(10).isoformat(), "identifiers": {"loyalty_card": "8", **family}})
    tiny.add({**says(5, purposes={"personalization": False}), "identifiers": phone})
    assert usable() == 0


def test_opt_in_forbids_until_she_allows_and_what_an_import_declares_stands(tiny: TinyShop) -> None:
    shop = msgspec.structs.replace(tiny.shop, consent=ConsentPolicy(purposes={"analytics": "opt-in", "personalization": "opt-in"}))
    shop.save(tiny.home)
    strict = TinyShop(tiny.home, shop)
    strict.add(bought(30), bought(20))
    assert purchases(strict, FEATURES) == set()
    strict.add(says(25, purposes={"personalization": True}))
    assert purchases(strict, FEATURES) == {"1-20"}, "what was not allowed when it occurred stays unused"


def test_anonymous_events_are_nobodys_to_allow(tiny: TinyShop) -> None:
    shop = msgspec.structs.replace(tiny.shop, consent=ConsentPolicy(purposes={"analytics": "opt-in", "personalization": "opt-in"}))
    shop.save(tiny.home)
    TinyShop(tiny.home, shop).add({**bought(10), "identifiers": {}})
    assert open_timeline(tiny.home, NEW_YEAR, purposes=STATISTICS).events.count().execute() == 1


def test_a_withdrawal_stands_where_the_address_it_came_from_proves_to_be_shared(tiny: TinyShop) -> None:
    hers = {"email": "us@home.org", "cookie": "hers"}
    tiny.add({**bought(30), "identifiers": hers}, {**says(20, purposes={"personalization": False}), "identifiers": hers})
    for card in ("7", "8"):
        who = {"loyalty_card": card, "email": "us@home.org"}
        tiny.add({"event_id": card, "name": "login", "occurred_at": ago(2).isoformat(), "identifiers": who})
    identities = Identities(tiny.home)
    assert identities.resolve({"email": "us@home.org"}) is None
    her = identities.resolve({"cookie": "hers"})
    assert her is not None
    assert not standing(Consents(tiny.home, tiny.shop.consent), identities, her).personalization
    events = open_timeline(tiny.home, NEW_YEAR).events
    assert events.filter(events.customer_id == her, events.name == "purchase").count().execute() == 0


def test_what_was_said_is_not_forgotten_while_the_log_is_read_again(tiny: TinyShop, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.add(bought(10), says(9, permissions={"email": True}))
    consents, identities = Consents(tiny.home, tiny.shop.consent), Identities(tiny.home)
    keys = identities.members(customer("1"))
    late = identities.vault.seal(parse_event(says(1, purposes={"personalization": False}), NEW_YEAR)).event
    assert consents.note(late, NEW_YEAR)
    read, seen = consent._spoken, []

    def watched(paths: Any) -> Any:
        seen.append(consents.allows(keys, "personalization"))
        return read(paths)

    monkeypatch.setattr(consent, "_spoken", watched)
    consents._seen = Seen(tiny.home.tables["events"])
    consents.refresh()
    assert seen == [False], "nobody is silent meanwhile"
    assert not consents.allows(keys, "personalization"), "what is not in the log yet stays"
    assert consents.allows(keys, "email")


class TestPermissions:
    def consents(self, tiny: TinyShop, *events: dict[str, Any]) -> Consents:
        tiny.add(bought(40), *events)
        return Consents(tiny.home, tiny.shop.consent)

    def test_by_default_a_letter_may_be_sent_and_an_email_not(self, tiny: TinyShop) -> None:
        consents = self.consents(tiny)
        assert standing(consents, Identities(tiny.home), customer("1")).forbidden_channels == {"email", "sms", "push", "call_centre"}

    @pytest.mark.parametrize("channel", CONTACT_CHANNELS)
    def test_each_channel_is_allowed_and_forbidden_by_itself(self, tiny: TinyShop, channel: str) -> None:
        others = {c: c != channel for c in CONTACT_CHANNELS}
        consents = self.consents(tiny, says(9, permissions=others), says(5, permissions={channel: True}))
        assert standing(consents, Identities(tiny.home), customer("1")).forbidden_channels == frozenset()
        tiny.add(says(3, permissions={channel: False}))
        consents.refresh()
        assert standing(consents, Identities(tiny.home), customer("1")).forbidden_channels == {channel}

    def test_to_unsubscribe_is_to_forbid_that_channel(self, tiny: TinyShop) -> None:
        stop = {"event_id": "stop", "name": "message_unsubscribe", "occurred_at": ago(2).isoformat(), "identifiers": {"loyalty_card": "1"}}
        consents = self.consents(tiny, says(9, permissions={"sms": True, "email": True}), {**stop, "channel": "sms"})
        forbidden = standing(consents, Identities(tiny.home), customer("1")).forbidden_channels
        assert "sms" in forbidden
        assert "email" not in forbidden

    def test_the_statement_that_occurred_last_holds_however_late_it_became_known(self, tiny: TinyShop) -> None:
        consents = self.consents(tiny, says(2, permissions={"email": False}))
        tiny.add(says(9, permissions={"email": True}))
        consents.refresh()
        assert "email" in standing(consents, Identities(tiny.home), customer("1")).forbidden_channels

    def test_who_said_what_when_and_where_is_kept(self, tiny: TinyShop) -> None:
        consents = self.consents(tiny, says(9, permissions={"email": True}))
        [statement] = consents.of(Identities(tiny.home).members(customer("1")))
        assert (statement.occurred_at, statement.policy_version, statement.source) == (ago(9), "v1", "form")


class TestPolicyByCommand:
    def test_shown_and_set(self, tiny: TinyShop) -> None:
        home = tiny.home.root
        assert command("features", "people", "policy", home=home).stdout.count("forbidden (opt-in)") == 4
        done = command("features", "people", "policy", "--set", "personalization=opt-in", "--set", "email=opt-out", home=home)
        assert done.returncode == 0, done.stdout
        policy = Shop.load(tiny.home).consent
        assert (policy.default("personalization"), policy.default("email"), policy.default("analytics")) == (False, True, True)
        wrong = command("features", "people", "policy", "--set", "email=maybe", home=home)
        assert wrong.returncode == 1
        assert "opt-in or =opt-out" in wrong.stdout


def test_a_consent_update_without_content_or_for_an_unknown_purpose_is_rejected() -> None:
    with pytest.raises(RejectedEvent, match="consent"):
        parse_event({**says(1), "consent": None}, NEW_YEAR)
    with pytest.raises(RejectedEvent):
        parse_event(says(1, purposes={"surveillance": True}), NEW_YEAR)


@given(st.lists(st.tuples(st.integers(0, 50), st.booleans()), max_size=8), st.integers(0, 50))
def test_intervals_tell_what_the_statements_say(said: list[tuple[int, bool]], at: int) -> None:
    consents = Consents(Home(Path("/nowhere")), ConsentPolicy())
    order = sorted(said, key=lambda each: each[0])
    consents._by_key = {
        "k": {
            str(n): Statement(ago(50 - when), ago(0), f"{n:03}", {"analytics": allowed}, None, None)
            for n, (when, allowed) in enumerate(order)
        }
    }
    moment = ago(50 - at)
    inside = [
        i.allowed
        for i in consents.intervals(["k"], "analytics")
        if (i.starts is None or i.starts <= moment) and (i.ends is None or moment < i.ends)
    ]
    spoken = [allowed for when, allowed in order if when <= at]
    if order and not order[-1][1]:
        assert inside == [False]
    else:
        assert inside == spoken[-1:]
