"""What the shop pins, boosts and blocks: it holds in the next answer, from when until when it was said, and it is kept which rule acted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from scene import NEW_YEAR, Service, TinyShop, command, copy_home, eventually, loyalty_cards
from test_recommender import SIZE, checkerboard, fitted, row_of
from typer.testing import CliRunner

from features.catalogue.shop import Shop
from features.definitions.segments import SEGMENTS, Vocabulary
from features.state.home import Home
from features.store.decision_log import DecisionLog
from models.decision import Decision, Query
from models.recommender.recommender import Recommender
from serving.bootstrap import open_engine
from serving.decide import rule_commands
from serving.decide.engine import Engine
from serving.decide.governor import Governor
from serving.decide.merchandising import BLOCKED, LOWERED, PINNED, RAISED, Merchandiser
from serving.decide.population import Population
from serving.decide.questions import ItemsAnswer, RecommendationsRequest, SimilarItemsRequest
from serving.decide.rule_checks import RuleChecks
from serving.decide.rule_commands import rules_app
from serving.decide.rule_shelf import RuleShelf
from serving.decide.rules import EndedRuleError, NewRule, Rules, ShopRule, UnknownRuleError, WrongRuleError
from serving.decide.who import NOBODY

HOUR = timedelta(hours=1)
ITEMS = [str(i) for i in range(SIZE)]


def rule(action: str, *items: str, **more: Any) -> NewRule:
    return NewRule.of({"action": action, "item_ids": list(items), **more})


# --- what must hold of every list, whatever the rules


class Board:
    """A small shop whose lists are answered within whatever rules a test makes up."""

    def __init__(self, home: Home) -> None:
        Shop(name="board", timezone="America/New_York", currency="USD", data_end=NEW_YEAR).save(home)
        self.model: Recommender = fitted(checkerboard())
        shelf = self.model.shelf
        self.shelf = RuleShelf(shelf.ids, self.model.positions, self.model.attributes, shelf.popularity_share)
        self.rules = Rules(home)
        self.merchandiser = Merchandiser(self.rules, Governor(home))

    def ask(self, rules: Sequence[NewRule], *bought: str, at: datetime = NEW_YEAR, **wishes: Any) -> tuple[Decision, list[str]]:
        """The answer with these rules, the first the last made; and which acted."""
        made = [
            ShopRule(**{n: getattr(r, n) for n in NewRule.__struct_fields__ if n != "instead_of"}, rule_id=f"r{k}", made_by="t", made_at=at)
            for k, r in enumerate(rules)
        ]
        # what the database would give, without a disk between a thousand examples
        self.rules._live, self.rules._looked_at = tuple(made), float("inf")
        self.shelf.keep_only([])
        self.shelf._effects.clear()
        query, held = self.merchandiser.bound(Query.from_row("c", at, row_of(*bought), **wishes), self.shelf, at)
        return self.merchandiser.told(query, held, self.model.pipeline.decide(query, np.random.default_rng(0)))


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Board:
    return Board(Home(tmp_path_factory.mktemp("board") / "home"))


some = st.lists(st.sampled_from(ITEMS), min_size=1, max_size=4, unique=True)
drawn_rules = st.lists(
    st.one_of(
        st.builds(lambda item, place: rule("pin", item, place=place), st.sampled_from(ITEMS), st.integers(1, 12)),
        st.builds(lambda items, factor: rule("boost", *items, factor=factor), some, st.sampled_from([0.1, 0.5, 2.0, 10.0])),
        st.builds(lambda items: rule("block", *items), some),
        st.builds(lambda name: rule("block", where={"department": [name]}), st.sampled_from(["D0", "D1"])),
    ),
    max_size=6,
)


class TestEveryList:
    @given(
        rules=drawn_rules,
        bought=st.lists(st.sampled_from(ITEMS), max_size=5, unique=True),
        listing=st.sampled_from(["for_you", "email", "trending", "similar"]),
        departments=st.sets(st.sampled_from(["D0", "D1", "D2"]), min_size=1),
        banned=st.sets(st.sampled_from(ITEMS), max_size=5),
        limit=st.integers(1, 14),
        promoted=st.dictionaries(st.integers(1, 5), st.sampled_from(ITEMS), max_size=2),
        explore=st.booleans(),
    )
    def test_pins_stand_where_the_filters_let_them_and_no_blocked_item_is_shown(
        self,
        board: Board,
        rules: list[NewRule],
        bought: list[str],
        listing: str,
        departments: set[str],
        banned: set[str],
        limit: int,
        promoted: dict[int, str],
        explore: bool,
    ) -> None:
        decision, acted = board.ask(
            rules, *bought, listing=listing, item_ids=("4",), limit=limit, promoted=promoted, explore=explore,
            include={"department": frozenset(departments)}, exclude_ids=frozenset(banned),
        )  # fmt: skip
        shown = [choice.id for choice in decision.choices]
        blocked = {i for r in rules if r.action == "block" for i in (r.item_ids or items_of(r.where["department"]))}
        allowed = items_of(departments) - banned - blocked - ({"4"} if listing == "similar" else set())
        assert not set(shown) & blocked, "no blocked item is ever answered"
        assert set(shown) <= allowed, "no pin shows what a filter removes"
        assert len(shown) == len(set(shown)) == min(limit, len(allowed))
        claimed: dict[int, str] = {}
        seen: set[str] = set()
        for number, each in enumerate(rules):
            item, place = each.item_ids[0] if each.item_ids else "", each.place or 0
            if each.action == "pin" and item in allowed and place <= limit and item not in seen:
                seen.add(item)
                # of two that claim one place the last made has it; the other stands wherever nobody else does
                if claimed.setdefault(place, item) == item:
                    assert f"r{number}" in acted
        for place, item in claimed.items():
            if place <= len(shown):
                choice = decision.choices[place - 1]
                assert (choice.id, choice.source, choice.propensity) == (item, PINNED, 1.0)
        for number, each in enumerate(rules):
            assert each.action != "block" or f"r{number}" not in acted or decision.removed[BLOCKED] >= 1
        assert {choice.id for choice in decision.choices if choice.source == PINNED} <= {r.item_ids[0] for r in rules if r.action == "pin"}

    @given(
        raised=some, factor=st.sampled_from([0.1, 0.5, 3.0, 10.0]), bought=st.lists(st.sampled_from(ITEMS), max_size=5, unique=True),
        listing=st.sampled_from(["for_you", "also_like", "trending"]),
    )  # fmt: skip
    def test_a_boost_moves_items_and_keeps_the_order_among_those_it_moves_and_among_the_others(
        self, board: Board, raised: list[str], factor: float, bought: list[str], listing: str
    ) -> None:
        plain, _ = board.ask([], *bought, listing=listing, limit=SIZE)
        decision, _ = board.ask([rule("boost", *raised, factor=factor)], *bought, listing=listing, limit=SIZE)
        before, after = [choice.id for choice in plain.choices], [choice.id for choice in decision.choices]
        assert sorted(before) == sorted(after)
        score_of = {choice.id: choice.score for choice in plain.choices}
        for choice in decision.choices:
            is_moved = choice.id in raised
            assert choice.score == pytest.approx(score_of[choice.id] * (factor if is_moved else 1.0), rel=1e-9)
            assert (choice.source.endswith((RAISED, LOWERED)), "by the shop" in choice.reason) == (is_moved, is_moved)
        for group in (set(raised), set(ITEMS) - set(raised)):
            assert [i for i in after if i in group] == [i for i in before if i in group]
        for item in set(raised) & set(before):
            if factor > 1:
                assert after.index(item) <= before.index(item) + len(set(raised) & set(before[before.index(item) + 1 :]))

    @pytest.mark.parametrize("listing", ["for_you", "also_like", "buy_again", "basket", "email", "bought_together"])
    def test_without_rules_that_hold_an_answer_is_as_it_was(self, board: Board, listing: str) -> None:
        wishes: dict[str, Any] = {"listing": listing, "item_ids": ("4",), "promoted": {2: "7"}, "explain": True}
        query = Query.from_row("c", NEW_YEAR, row_of("1", "3", "5"), **wishes)
        before = board.model.pipeline.decide(query, np.random.default_rng(0))
        elsewhere = [rule("pin", "8", place=1, listings=["trending"]), rule("block", "9", until=NEW_YEAR.isoformat())]
        for rules in ([], elsewhere):
            assert board.ask(rules, "1", "3", "5", **wishes) == (before, [])


def items_of(departments: Any) -> set[str]:
    return {i for i in ITEMS if f"D{int(i) % 3}" in departments}


def test_a_pin_whose_item_a_filter_removed_leaves_its_place_to_the_next_that_claims_it(board: Board) -> None:
    rules = [rule("pin", "8", place=1), rule("pin", "11", place=1), rule("pin", "14", place=2)]
    shown, acted = board.ask(rules, limit=5)
    assert [choice.id for choice in shown.choices][:3] == ["8", "14", "11"], "the last made has the place; who lost it takes the next free"
    assert acted == ["r0", "r1", "r2"]
    shown, acted = board.ask(rules, limit=5, exclude_ids=frozenset({"8"}))
    assert [choice.id for choice in shown.choices][:2] == ["11", "14"]
    assert acted == ["r1", "r2"], "a pin that shows nothing has not acted"


def test_a_raised_item_is_shown_though_nothing_else_speaks_for_it(board: Board) -> None:
    plain, _ = board.ask([], "1", "3", limit=3)
    last = next(i for i in reversed(ITEMS) if i not in {choice.id for choice in plain.choices})
    rules = [rule("boost", last, factor=10), rule("block", *(i for i in ITEMS if i not in (last, "1")))]
    shown, acted = board.ask(rules, "1", "3", limit=3)
    assert {choice.id for choice in shown.choices} == {last, "1"}
    assert acted == ["r0", "r1"]


def test_a_rule_of_an_items_page_holds_there_alone(board: Board) -> None:
    rules = [rule("pin", "8", place=1, page_item_ids=["4", "6"])]
    for listing in ("similar", "up_sell"):
        assert board.ask(rules, listing=listing, item_ids=("4",), limit=4)[1] == (
            ["r0"] if listing == "similar" else board_up(board, rules)
        )
    assert board.ask(rules, listing="similar", item_ids=("5",), limit=4)[1] == []
    assert board.ask(rules, listing="for_you", item_ids=("4",), limit=4)[1] == []


def board_up(board: Board, rules: list[NewRule]) -> list[str]:
    """An up-sell must cost more than the item asked about, pinned or not."""
    decision, acted = board.ask(rules, listing="up_sell", item_ids=("4",), limit=4)
    assert acted == (["r0"] if "8" in {choice.id for choice in decision.choices} else [])
    return acted


def test_a_rule_holds_from_its_first_moment_until_just_before_its_last(board: Board) -> None:
    begins, until = NEW_YEAR + HOUR, NEW_YEAR + 3 * HOUR
    rules = [rule("pin", "8", place=1, **{"from": begins.isoformat(), "until": until.isoformat()})]

    def is_pinned(at: datetime) -> bool:
        return board.ask(rules, at=at, limit=3)[0].choices[0].source == PINNED

    tick = timedelta(microseconds=1)
    moments = [begins - tick, begins, begins + HOUR, until - tick, until, begins]
    assert [is_pinned(at) for at in moments] == [False, True, True, True, False, True]


# --- how rules are made, ended and kept


@pytest.fixture
def book(tiny: TinyShop) -> Rules:
    (tiny.home.root / SEGMENTS).write_text("context: {weather: text}\nsegments: {big: spend_minor_91 > 100.0}\n")
    return rules_of(tiny.home)


def rules_of(home: Home) -> Rules:
    return Rules(home, RuleChecks(home, lambda: Vocabulary.load(home, "grocery")))


def test_a_change_ends_one_rule_and_makes_another_so_that_each_moment_is_told(book: Rules) -> None:
    first = book.add(rule("pin", "i1", place=1, note="spring"), "key", NEW_YEAR)
    second = book.add(rule("pin", "i1", place=2, instead_of=first.rule_id), "other", NEW_YEAR + HOUR)
    assert [each.rule_id for each in book.in_force(NEW_YEAR + HOUR)] == [second.rule_id]
    assert [[r.place for r in book.then(NEW_YEAR + k * HOUR)] for k in (-1, 0, 1, 2)] == [[], [1], [2], [2]]
    book.end(second.rule_id, "key", NEW_YEAR + 2 * HOUR)
    assert book.in_force(NEW_YEAR + HOUR) == []
    assert [[r.place for r in book.then(NEW_YEAR + k * HOUR)] for k in (0, 1, 2)] == [[1], [2], []]
    assert book.listed() == []
    last, before = book.listed(with_ended=True)
    assert (before.made_by, before.ended_by, before.made_at, before.ended_at) == ("key", "other", NEW_YEAR, NEW_YEAR + HOUR)
    assert (last.made_by, last.ended_by, before.note, last.note) == ("other", "key", "spring", "")


def test_what_another_process_changes_counts_soon_and_what_this_one_changes_at_once(book: Rules, tiny: TinyShop) -> None:
    other = rules_of(Home(tiny.home.root))
    assert other.live() == ()
    made = book.add(rule("block", "i1"), "key", NEW_YEAR)
    assert [each.rule_id for each in book.live()] == [made.rule_id]
    assert book.live() is book.live(), "nothing is read again where nothing has changed"
    eventually(lambda: [each.rule_id for each in other.live()] == [made.rule_id])
    other.end(made.rule_id, "key", NEW_YEAR)
    assert other.live() == ()
    eventually(lambda: book.live() == ())


def test_rules_that_cannot_be_read_stay_as_they_were(book: Rules, tiny: TinyShop) -> None:
    made = book.add(rule("block", "i1"), "key", NEW_YEAR)
    (tiny.home.root / "rules.db").write_bytes(b"this is no database, " * 500)
    eventually(lambda: book.live() is not None and book.unread is not None)
    assert [each.rule_id for each in book.live()] == [made.rule_id]
    assert "rules.db" in str(book.unread)


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"action": "pin", "item_ids": ["i11"], "place": 1}, "item_ids[0]", "'i11' is not in the catalogue: did you mean 'i1'"),
    ({"action": "pin", "item_ids": ["i1"], "place": 0}, "place", "a pin needs a place from 1 to 100"),
    ({"action": "pin", "item_ids": ["i1"], "place": 101}, "place", "from 1 to 100"),
    ({"action": "pin", "item_ids": ["i1", "i2"], "place": 1}, "item_ids", "make a rule for each"),
    ({"action": "pin", "item_ids": ["i1"], "place": 1, "factor": 2}, "factor", "leave it out of a pin"),
    ({"action": "boost", "item_ids": ["i1"], "factor": 11}, "factor", "from 0.1 to 10"),
    ({"action": "boost", "item_ids": ["i1"]}, "factor", "from 0.1 to 10"),
    ({"action": "block", "item_ids": ["i1"], "place": 1}, "place", "leave it out of a block"),
    ({"action": "block"}, "item_ids", "name either items or"),
    ({"action": "block", "where": {"department": ["D7"]}}, "where.department[0]", "no item has 'D7': did you mean 'D"),
    ({"action": "block", "where": {"departement": ["D1"]}}, "where.departement", "did you mean 'department'?: use one of"),
    ({"action": "block", "where": {"department": []}}, "where.department", "names no value"),
    ({"action": "block", "where": {"department": {"min": 1}}}, "where.department", "it holds texts"),
    ({"action": "hide", "item_ids": ["i1"]}, "action", "use one of pin, boost, block"),
    ({"action": "block", "item_ids": ["i1"], "listings": ["for_me"]}, "listings[0]", "use one of for_you, also_like"),
    ({"action": "block", "item_ids": ["i1"], "listings": ["for_you"], "page_item_ids": ["i2"]}, "listings", "for_you is on no item's page"),
    ({"action": "block", "item_ids": ["i1"], "page_item_ids": ["x"]}, "page_item_ids[0]", "is not in the catalogue"),
    ({"action": "block", "item_ids": ["i1"], "from": "2018-02-01T00:00:00Z", "until": "2018-01-31T00:00:00Z"}, "until", "is not after from"),
    ({"action": "block", "item_ids": ["i1"], "until": "2017-01-31T00:00:00Z"}, "until", "has passed already"),
    ({"action": "block", "item_ids": ["i1"], "until": "2018-01-31T00:00:00"}, "until", "timezone"),
    ({"action": "block", "item_ids": ["i1"], "until": "9999-12-31T23:59:59Z"}, "until", "leave it out"),
    ({"action": "block", "item_ids": ["i1"], "from": "0001-01-01T00:00:00+14:00"}, "from", "leave it out"),
    ({"action": "block", "item_ids": ["i1"], "condition": "spend_minor_91 >"}, "condition", "is no CEL expression"),
    ({"action": "block", "item_ids": ["i1"], "condition": "spend_minor_92 > 1.0"}, "condition", "such as spend_minor_91"),
    ({"action": "block", "item_ids": ["i1"], "condition": "weather == 'rain'"}, "condition", "only questions for offers tell"),
    ({"action": "block", "item_ids": ["i1"], "note": "for ada@example.org"}, "note", "personal"),
    ({"action": "block", "item_ids": ["i1"], "colour": "red"}, "colour", "unknown field"),
]  # fmt: skip


@pytest.mark.parametrize(("said", "field", "reason"), WRONG)
def test_a_rule_that_cannot_be_is_refused_by_its_field_with_the_fix(book: Rules, said: Mapping[str, Any], field: str, reason: str) -> None:
    with pytest.raises(WrongRuleError) as told:
        book.add(NewRule.of(said), "key", NEW_YEAR)
    assert told.value.field == field
    assert reason in told.value.reason
    assert book.listed(with_ended=True) == []


def test_the_same_rule_twice_and_an_end_twice_are_told(book: Rules) -> None:
    made = book.add(rule("boost", where={"department": ["D1"]}, factor=2, condition="big"), "key", NEW_YEAR)
    with pytest.raises(WrongRuleError, match="r1 says the same"):
        book.add(rule("boost", where={"department": ["D1"]}, factor=2, condition="big"), "key", NEW_YEAR)
    with pytest.raises(UnknownRuleError, match=r"there is no such rule: the last made is r1"):
        book.end("r2", "key", NEW_YEAR)
    with pytest.raises(UnknownRuleError):
        book.add(rule("block", "i1", instead_of="r7"), "key", NEW_YEAR)
    assert len(book.listed()) == 1, "what comes in the place of nothing is not made"
    book.end(made.rule_id, "key", NEW_YEAR)
    with pytest.raises(EndedRuleError, match="r1 was ended before, by key, 2018-01-01 05:00 UTC"):
        book.end(made.rule_id, "key", NEW_YEAR)


def test_the_command_line_makes_shows_and_ends_rules_in_the_shops_own_times(
    book: Rules, tiny: TinyShop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UBIQUO_HOME", str(tiny.home.root))
    monkeypatch.setenv("UBIQUO_CLOCK", f"fixed:{NEW_YEAR.isoformat()}")
    monkeypatch.setattr(rule_commands, "console", Console(width=250))

    def run(*arguments: str, code: int = 0) -> str:
        done = CliRunner().invoke(rules_app, arguments)
        assert done.exit_code == code, done.output
        # what cannot be is told by whoever runs the command
        return done.output if done.exception is None else str(done.exception)

    assert "r1: boost brand Private times 2.5" in run(
        "add", "boost", "--where", "brand=Private", "--factor", "2.5", "--listing", "for_you", "--when", "big",
        "--from", "2018-01-02", "--until", "2018-01-03T12:00:00Z", "--note", "[sale]",
    )  # fmt: skip
    [made] = book.listed()
    assert (made.begins, made.until) == (datetime(2018, 1, 2, 5, tzinfo=UTC), datetime(2018, 1, 3, 12, tzinfo=UTC))
    shown = " ".join(run("list").split())
    for told in ("America/New_York", "2018-01-02 00:00", "2018-01-03 07:00", "waits", "[sale]", "command"):
        assert told in shown
    assert "item_ids[0]: 'i1x' is not in the catalogue: did you mean 'i1'?" in run("add", "pin", "i1x", "--place", "1", code=1)
    assert "--until 'soon' is neither a date" in run("add", "block", "i1", "--until", "soon", code=1)
    assert "r1: ended" in run("end", "r1")
    assert "r1 was ended before" in run("end", "r1", code=1)


# --- on a trained shop


@pytest.fixture(scope="module")
def engine(trained: Home, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return open_engine(copy_home(trained, tmp_path_factory.mktemp("rules") / "home"))


def test_each_answer_with_items_keeps_to_the_rules(engine: Engine) -> None:
    def asked(**more: Any) -> tuple[ItemsAnswer, dict[str, Any]]:
        return engine.recommendations("recommendations", RecommendationsRequest(**more), NOBODY, {}, NEW_YEAR)

    plain, record = asked(limit=10)
    assert "rules" not in record["assignment"]
    first, *_, last = [item.item_id for item in plain.items]
    alike, _ = engine.similar_items(SimilarItemsRequest(item_id=first), NEW_YEAR)
    pin = engine.rules.add(rule("pin", last, place=2), "key", NEW_YEAR)
    block = engine.rules.add(rule("block", first, alike.items[0].item_id), "key", NEW_YEAR)
    answer, record = asked(limit=10)
    assert (answer.items[1].item_id, answer.items[1].source, answer.items[1].rule_ids) == (last, PINNED, [pin.rule_id])
    assert first not in {item.item_id for item in answer.items}
    assert answer.removed[BLOCKED] >= 1
    assert set(record["assignment"]["rules"]) == {pin.rule_id, block.rule_id}
    near, record = engine.similar_items(SimilarItemsRequest(item_id=first), NEW_YEAR)
    assert [near.items[1].item_id, near.items[1].source] == [last, PINNED]
    assert alike.items[0].item_id not in {item.item_id for item in near.items}
    assert set(record["assignment"]["rules"]) == {pin.rule_id, block.rule_id}
    engine.rules.end(pin.rule_id, "key", NEW_YEAR)
    engine.rules.end(block.rule_id, "key", NEW_YEAR)
    again, record = asked(limit=10)
    assert (again.items, again.removed, "rules" in record["assignment"]) == (plain.items, plain.removed, False)


def test_a_rule_is_for_the_customers_of_its_condition_in_batch_too(engine: Engine) -> None:
    """``spend_minor_91`` is a windowed feature: the recommender itself does not read it."""
    some_item = engine.champion("recommendations").pipeline.ids[0]  # type: ignore[union-attr]
    made = engine.rules.add(rule("pin", some_item, place=1, condition="spend_minor_91 > 20000.0"), "key", NEW_YEAR)
    try:
        crowd = Population.open(engine._home, lambda home: engine, "recommendations", NEW_YEAR)
        rows = crowd.rows(crowd.customers[:40], None)
        is_pinned = [crowd.ask(row, 2, None, "for_you")[0].items[0].source == PINNED for row in rows]  # type: ignore[union-attr]
        assert is_pinned == [(row["spend_minor_91"] or 0) > 20_000 for row in rows]
        assert len(set(is_pinned)) == 2
    finally:
        engine.rules.end(made.rule_id, "key", NEW_YEAR)


def test_a_rule_that_no_longer_reaches_anything_is_told(tiny: TinyShop, board: Board) -> None:
    made = rules_of(tiny.home).add(rule("block", where={"category": ["C1"]}), "key", NEW_YEAR)
    merchandiser = Merchandiser(rules_of(tiny.home), Governor(tiny.home))
    assert f"{made.rule_id}: where.category: 'category' is not an attribute" in str(merchandiser.refresh([board.shelf]))


def test_a_change_over_http_counts_in_the_next_answer_and_is_kept_with_it(own_service: Service) -> None:
    service, card = own_service, loyalty_cards(own_service.home)[300]

    def ask() -> dict[str, Any]:
        return service.ask("recommendations", {"identifiers": {"loyalty_card": card}, "limit": 8})

    def post(**said: Any) -> tuple[int, dict[str, Any]]:
        return service.post("/v1/rules", said)

    plain = ask()
    first, second, *_, last = [item["item_id"] for item in plain["items"]]
    status, pin = post(action="pin", item_ids=[last], place=1, note="week 1")
    assert (status, pin["state"], pin["made_by"], pin["made_at"][-6:]) == (200, "in force", "local", "-05:00")
    answer = ask()
    assert [answer["items"][0][name] for name in ("item_id", "source", "propensity")] == [last, PINNED, 1.0]
    status, block = post(action="block", item_ids=[first])
    assert status == 200
    blocked = ask()
    assert first not in {item["item_id"] for item in blocked["items"]}
    assert blocked["removed"][BLOCKED] == 1
    assert blocked["items"][0]["item_id"] == last
    assert [each["rule_id"] for each in json.loads(service.get("/v1/rules")[1])["rules"]] == [block["rule_id"], pin["rule_id"]]
    assert post(action="pin", item_ids=[last], place=1, note="week 1")[0] == 400
    status, problem = post(action="pin", item_ids=[f"{last}0"], place=1)
    assert (status, problem["field"]) == (400, "item_ids[0]")
    assert "did you mean" in problem["detail"]
    for made in (pin, block):
        assert service.get(f"/v1/rules/{made['rule_id']}", "DELETE")[0] == 200
    assert service.get(f"/v1/rules/{pin['rule_id']}", "DELETE")[0] == 409
    assert service.get("/v1/rules/r999", "DELETE")[0] == 404
    assert [item["item_id"] for item in ask()["items"]] == [item["item_id"] for item in plain["items"]]
    told = json.loads(service.get("/v1/rules?with_ended=true")[1])["rules"]
    # other tests have made some of the same shop's
    assert [each["state"] for each in told if each["rule_id"] in (pin["rule_id"], block["rule_id"])] == ["ended", "ended"]
    eventually(lambda: kept(service.home, blocked["decision_id"]) is not None)
    assert set(kept(service.home, blocked["decision_id"]) or ()) == {pin["rule_id"], block["rule_id"]}
    assert kept(service.home, plain["decision_id"]) == []
    # another process
    done = command("serving", "rules", "add", "block", second, home=service.home.root)
    assert done.returncode == 0, done.stdout + done.stderr
    eventually(lambda: second not in {item["item_id"] for item in ask()["items"]}, 10)
    assert service.get(f"/v1/rules/{done.stdout.partition(':')[0]}", "DELETE")[0] == 200
    assert [item["item_id"] for item in ask()["items"]] == [item["item_id"] for item in plain["items"]]


def kept(home: Home, decision_id: str) -> list[str] | None:
    """The rules that acted in a decision, as the log has it."""
    table = DecisionLog(home).table.read(["decision_id", "assignment"])
    for line in table.to_pylist() if table is not None else []:
        if line["decision_id"] == decision_id:
            return list(json.loads(line["assignment"]).get("rules", []))
    return None
