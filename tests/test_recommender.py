"""The recommender: what every source, list and ranker must do; oracles with one right answer; filters that hold."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from scene import NEW_YEAR, histories

from models.attributes import Range
from models.decision import Decision, Query
from models.recommender.arrange import apart
from models.recommender.config import RANKED, SINGLES, RecommenderConfig
from models.recommender.content import Contents, words_of
from models.recommender.ease import columns_dual, columns_primal, dense_weights, fit_ease, form_of
from models.recommender.kernels import Bench, strongest
from models.recommender.listings import Listing
from models.recommender.neighbours import Neighbours, bought_together
from models.recommender.owned import Histories, owned_of
from models.recommender.ranker import Objective, Ranker, thinned
from models.recommender.recipes import RECIPES
from models.recommender.recommender import Recommender
from models.recommender.sources import SOURCES, retrieved
from models.recommender.stock import Baskets, Stock

RNG = np.random.default_rng(0)
LISTINGS = get_args(Listing)
NEED_ITEMS = {"similar", "bought_together", "up_sell"}
SIZE = 30


def stock_of(ids: Sequence[str], bought: Mapping[str, list[str]], **attributes: Sequence[Any]) -> Stock:
    count = np.array([sum(item in items for items in bought.values()) for item in ids], float)
    price = np.array([100.0 + 7 * k for k in range(len(ids))])
    statistics = {
        "popularity": count, "buyers": count, "purchases": count, "purchases_28": count, "price_minor": price,
        "on_sale_days": np.arange(len(ids), dtype=float),
    }  # fmt: skip
    told = {
        "department": [f"D{k % 3}" for k in range(len(ids))],
        "type": [f"TYPE {k % 2}" for k in range(len(ids))],
        "brand": ["N"] * len(ids),
        **attributes,
    }
    return Stock(list(ids), statistics, told)


def fitted(bought: Mapping[str, list[str]], ids: Sequence[str] | None = None, **config: Any) -> Recommender:
    ids = ids or sorted({item for items in bought.values() for item in items}, key=int)
    settings = RecommenderConfig(**{"min_buyers": 1, "ease_penalty": 1.0, **config})
    stock = stock_of(ids, bought).known_by(settings.min_buyers)
    known = {item: k for k, item in enumerate(stock.ids)}
    rows = Histories.of(histories(dict(bought)), known)
    places = [[known[item] for item in items if item in known] for items in bought.values()]
    baskets = sp.csr_matrix(
        (np.ones(sum(map(len, places)), np.float32), np.concatenate(places), np.cumsum([0, *map(len, places)])),
        shape=(len(bought), len(stock.ids)),
    )
    local = {"s1": (np.array([3, 5], np.int32), np.array([1.0, 0.5], np.float32))}
    return Recommender.fit(rows, stock, settings, Baskets(baskets, local))


def with_rankers(model: Recommender, bought: Mapping[str, list[str]]) -> Recommender:
    """Rankers that learnt to show the item of the customer's own number."""
    rankers: dict[Objective, Ranker] = {}
    for objective, listing in (("any", "for_you"), ("new", "also_like")):
        rows, labels, groups = [], [], []
        for customer, row in zip(bought, histories(dict(bought)), strict=True):
            profile = model.profile(Query.from_row(customer, NEW_YEAR, row, listing=listing))
            places = retrieved(profile).astype(np.int32)
            rows.append(model.rows(profile, places))
            labels.append(np.array([model.item_ids[place] == customer[1:] for place in places]))
            groups.append(len(places))
        rankers[objective] = Ranker.fit(  # type: ignore[index]
            np.concatenate(rows), np.concatenate(labels), np.array(groups), model.ranker_inputs, objective, 1  # type: ignore[arg-type]
        )  # fmt: skip
    return model.ranked_by(rankers, {"any": RANKED, "new": RANKED})


def checkerboard(size: int = SIZE) -> dict[str, list[str]]:
    """Even customers buy even items and odd ones odd items; each leaves out their own."""
    return {f"c{u}": [str(i) for i in range(size) if i % 2 == u % 2 and i != u] for u in range(size)}


@pytest.fixture(scope="module")
def board() -> Recommender:
    return fitted(checkerboard())


@pytest.fixture(scope="module")
def ranked_board(board: Recommender) -> Recommender:
    return with_rankers(board, checkerboard())


MODES = ("joined", "ranked", *SINGLES)
# what is popular is the same for everybody, and what is new to a customer has no frequency
KNOW_NO_CHECKERBOARD = ("popularity", "personal frequency")


@pytest.fixture(scope="module", params=MODES)
def any_board(request: pytest.FixtureRequest, board: Recommender, ranked_board: Recommender) -> Recommender:
    return ranked_board.ranked_by(ranked_board.rankers, {"any": request.param, "new": request.param})


def decide(model: Recommender, row: Mapping[str, Any], **wishes: Any) -> Decision:
    if wishes.get("listing") in NEED_ITEMS:
        wishes.setdefault("item_ids", ("4",))
    query = Query.from_row(row.get("customer_id"), wishes.pop("at", NEW_YEAR), row, **wishes)
    return model.pipeline.decide(query, np.random.default_rng(0))


def ask(model: Recommender, row: Mapping[str, Any], **wishes: Any) -> list[str]:
    return [choice.id for choice in decide(model, row, **wishes).choices]


def row_of(*items: str, **more: Any) -> dict[str, Any]:
    [row] = histories({"c": list(items)})
    return {**row, **more}


def looked_at(*items: str) -> dict[str, Any]:
    return {"recent_item_ids": list(items), "recent_at": [int(NEW_YEAR.timestamp())] * len(items), "recent_weights": [1.0] * len(items)}


class TestEase:
    def test_both_exact_forms_are_one_model(self) -> None:
        dense = RNG.random((40, 30)) * (RNG.random((40, 30)) < 0.3)
        for m in (sp.csr_matrix(dense), sp.csr_matrix(dense.T)):
            primal, dual = (dense_weights(m, 5.0, form) for form in (columns_primal, columns_dual))
            assert np.allclose(primal, dual, atol=1e-4)
            assert (np.diag(primal) == 0).all()
            gram = (m.T @ m).toarray() + 5.0 * np.eye(m.shape[1])
            inverse = np.linalg.inv(gram)
            assert np.allclose(primal, np.eye(m.shape[1]) - inverse / np.diag(inverse), atol=1e-4)

    def test_with_all_neighbours_kept_the_sparse_scores_are_the_dense_ones(self) -> None:
        m = sp.csr_matrix((RNG.random((20, 12)) * (RNG.random((20, 12)) < 0.5)).astype(np.float32))
        kept, liked = fit_ease(m, 2.0, 11), m[3]
        bench = Bench(12)
        places, sums = kept.spread(bench, liked.indices.astype(np.int32), liked.data[None, :])
        scores = bench.look_up(places, sums, np.arange(12, dtype=np.int32))[0]
        assert np.allclose(scores, liked.toarray()[0] @ dense_weights(m, 2.0, columns_primal), atol=1e-5)

    def test_the_form_is_chosen_by_what_fits_in_memory(self) -> None:
        assert form_of(100_000, 5_000) == "primal"
        assert form_of(2_500, 22_000) == "dual"
        assert form_of(100_000, 100_000) == "block"
        assert form_of(3_000, 60_000, memory_bytes=3 * 2**30) == "dual"

    def test_above_the_memory_the_popular_are_exact_and_the_rare_still_have_neighbours(self) -> None:
        m = sp.csr_matrix((RNG.random((200, 40)) < np.linspace(0.5, 0.05, 40)).astype(np.float32))
        whole = dense_weights(m[:, :20], 5.0, columns_primal)
        found = fit_ease(m, 5.0, 39, memory_bytes=20 * 20 * 24)
        table = sp.csr_matrix((found.weights, found.targets, found.offsets), shape=(40, 40)).toarray()
        popular = np.sort(np.argsort(-np.asarray(m.sum(axis=0)).ravel(), kind="stable")[:20])
        exact = dense_weights(m[:, popular], 5.0, columns_primal)
        assert np.allclose(table[np.ix_(popular, popular)], exact, atol=1e-4)
        assert whole.shape == exact.shape
        rare = np.setdiff1d(np.arange(40), popular)
        assert (table[:, rare] > 0).any(axis=0).all()


class TestKernels:
    """What is compiled must say what NumPy says."""

    @settings(max_examples=40)
    @given(st.integers(0, 2**32 - 1))
    def test_spreading_is_a_product_of_matrices(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        size = int(rng.integers(2, 40))
        table = sp.csr_matrix((rng.normal(size=(size, size)) * (rng.random((size, size)) < 0.3)).astype(np.float32))
        sources = rng.permutation(size)[: int(rng.integers(0, size))].astype(np.int32)
        strengths = rng.normal(size=(2, len(sources))).astype(np.float32)
        bench, neighbours = Bench(size), Neighbours(table)
        expected = strengths @ table.toarray()[sources] if len(sources) else np.zeros((2, size))
        for _ in range(2):
            places, sums = neighbours.spread(bench, sources, strengths)
            assert len(places) == len(set(places.tolist()))
            dense = bench.look_up(places, sums, np.arange(size, dtype=np.int32))
            assert np.allclose(dense, expected, atol=1e-4)
        gone = rng.permutation(size)[: size // 2].astype(np.int32)
        left = bench.look_up(places, bench.without(places, sums, gone), np.arange(size, dtype=np.int32))
        expected[:, gone] = 0.0
        assert np.allclose(left, expected, atol=1e-4)

    @given(st.lists(st.integers(-3, 6), max_size=50), st.integers(0, 60))
    def test_the_strongest_are_a_sort_cut_short(self, values: list[int], limit: int) -> None:
        places = np.random.default_rng(3).permutation(len(values)).astype(np.int32)
        picks = strongest(np.array(values, np.float32), places, limit)
        expected = sorted((k for k in range(len(values)) if values[k] > 0), key=lambda k: (-values[k], places[k]))[:limit]
        assert picks.tolist() == expected

    def test_the_loudest_is_the_greatest_term_of_the_sum(self) -> None:
        table = sp.csr_matrix(np.array([[0, 2.0, 0], [1.0, 0, 3.0], [0, 5.0, 0]], np.float32))
        mine, strengths = np.array([0, 2], np.int32), np.array([1.0, 0.1], np.float32)
        found = Neighbours(table).loudest(Bench(3), mine, strengths, np.array([1, 0, 2], np.int32))
        assert found.tolist() == [0, -1, -1]


def test_items_of_the_same_baskets_go_together_and_one_meeting_is_not_enough() -> None:
    baskets = np.zeros((60, 4), np.float32)
    baskets[:40, 0] = baskets[:40, 1] = 1.0
    baskets[40:, 0] = 1.0
    baskets[59, 2] = baskets[59, 3] = 1.0
    together = bought_together(sp.csr_matrix(baskets), 2).toarray()
    assert together[0].argmax() == 1
    assert together[0, 1] > together[2, 3] > 0


class TestSources:
    """Every source, in every list that uses it."""

    @pytest.mark.parametrize("name", list(SOURCES))
    @pytest.mark.parametrize("bought", [[], ["1"], ["1", "3", "5"], [str(i) for i in range(SIZE)]])
    def test_it_gives_places_of_the_shelf_each_once_and_the_same_again(self, board: Recommender, name: str, bought: list[str]) -> None:
        users = [listing for listing, recipe in RECIPES.items() if name in recipe.sources]
        assert users, f"no list uses {name}"
        for listing in users:
            query = Query.from_row("c", NEW_YEAR, row_of(*bought, **looked_at("8")), listing=listing, item_ids=("4",), store_id="s1")
            places = SOURCES[name](board.profile(query))  # type: ignore[index]
            assert len(places) == len(set(places.tolist()))
            assert ((places >= 0) & (places < len(board.shelf.ids))).all()
            assert SOURCES[name](board.profile(query)).tolist() == places.tolist()  # type: ignore[index]

    def test_what_is_not_bought_yet_is_retrieved_by_what_is(self, board: Recommender) -> None:
        profile = board.profile(Query.from_row("c", NEW_YEAR, row_of("0", "2", "4"), listing="also_like"))
        found = {int(board.shelf.ids[place]) for place in SOURCES["liked"](profile)}
        assert found
        assert all(item % 2 == 0 and item not in (0, 2, 4) for item in found)


class TestLists:
    """Every list, by every way of ordering."""

    @pytest.mark.parametrize("listing", LISTINGS)
    @pytest.mark.parametrize("bought", [[], ["1"], ["1", "3", "5"], [str(i) for i in range(SIZE)]])
    def test_it_holds_each_item_once_with_a_source_a_reason_and_a_chance(
        self, any_board: Recommender, listing: str, bought: list[str]
    ) -> None:
        decision = decide(any_board, row_of(*bought), listing=listing)
        ids = [choice.id for choice in decision.choices]
        assert len(ids) == len(set(ids)) <= 10
        assert all(choice.source and choice.reason and choice.propensity == 1.0 for choice in decision.choices)
        scores = [choice.score for choice in decision.choices]
        assert listing == "email" or scores == sorted(scores, reverse=True)
        assert np.isfinite(scores).all()

    @pytest.mark.parametrize("listing", LISTINGS)
    def test_it_is_the_same_after_saving(self, ranked_board: Recommender, listing: str, tmp_path: Path) -> None:
        ranked_board.save(tmp_path)
        again = Recommender.load(tmp_path)
        for row in histories(checkerboard())[:5]:
            assert decide(again, row, listing=listing, store_id="s1") == decide(ranked_board, row, listing=listing, store_id="s1")

    @pytest.mark.parametrize("listing", LISTINGS)
    def test_a_customer_alone_gets_what_they_get_among_others(self, ranked_board: Recommender, listing: str) -> None:
        rows = histories(checkerboard())[:8]
        alone = [ask(ranked_board, row, listing=listing) for row in rows]
        assert [ask(ranked_board, row, listing=listing) for row in rows[::-1]][::-1] == alone

    @pytest.mark.parametrize("listing", [each for each in LISTINGS if each != "email"])
    def test_other_names_of_the_items_change_nothing(self, listing: str) -> None:
        plain = checkerboard(12)
        other = {customer: [str(1000 + int(item)) for item in items] for customer, items in plain.items()}
        one, two = fitted(plain), fitted(other)
        for a, b in zip(histories(plain), histories(other), strict=True):
            there = ask(two, b, listing=listing, item_ids=("1004",))
            assert [str(1000 + int(item)) for item in ask(one, a, listing=listing, item_ids=("4",))] == there

    @settings(max_examples=80)
    @given(
        bought=st.lists(st.sampled_from([str(i) for i in range(SIZE)]), unique=True, max_size=12),
        departments=st.sets(st.sampled_from(["D0", "D1", "D2", "nowhere"])),
        banned=st.sets(st.sampled_from([str(i) for i in range(SIZE)])),
        include=st.booleans(),
        listing=st.sampled_from([each for each in LISTINGS if RECIPES[each].widens]),
        limit=st.integers(1, 40),
        lately=st.sampled_from([None, 0, 1, 5]),
        promoted=st.dictionaries(st.integers(1, 40), st.sampled_from([str(i) for i in range(SIZE)]), max_size=3),
        diversity=st.sampled_from([0.0, 0.5, 1.0]),
    )
    def test_filters_hold_and_as_many_come_as_are_allowed(
        self,
        board: Recommender,
        bought: list[str],
        departments: set[str],
        banned: set[str],
        include: bool,
        listing: str,
        limit: int,
        lately: int | None,
        promoted: dict[int, str],
        diversity: float,
    ) -> None:
        wish = {"department": frozenset(departments)}
        shown = ask(
            board, row_of(*bought), limit=limit, listing=listing, exclude_ids=frozenset(banned), bought_within_days=lately,
            promoted=promoted, diversity=diversity, **({"include": wish} if include else {"exclude": wish}),
        )  # fmt: skip
        gone = set(banned)
        if RECIPES[listing].hides_held or (lately or 0) > 1:  # type: ignore[index]
            gone |= set(bought)
        if listing in NEED_ITEMS:
            gone.add("4")
        allowed = [i for i in board.item_ids if (f"D{int(i) % 3}" in departments) == include and i not in gone]
        assert len(shown) == len(set(shown)) == min(limit, len(allowed))
        assert set(shown) <= set(allowed)
        for place, item in promoted.items():
            if item in allowed and place <= len(shown) and list(promoted.values()).count(item) == 1:
                assert shown[place - 1] == item

    @pytest.mark.parametrize("any_board", [mode for mode in MODES if mode not in KNOW_NO_CHECKERBOARD], indirect=True)
    def test_the_withheld_square_of_a_checkerboard_is_the_only_right_answer(self, any_board: Recommender) -> None:
        for u, row in enumerate(histories(checkerboard())):
            assert ask(any_board, row, limit=1, listing="also_like") == [str(u)]

    def test_the_ranker_learns_what_its_sources_do_not_know(self, board: Recommender) -> None:
        """Only what has been sold for long is bought next: the sources cannot see that, the ranker does."""
        bought = {f"c{u}": [str(i) for i in range(SIZE) if (i + u) % 3] for u in range(SIZE)}
        model = fitted(bought)
        rows, labels, groups = [], [], []
        for row in histories(bought):
            profile = model.profile(Query.from_row("c", NEW_YEAR, row, listing="also_like"))
            places = retrieved(profile).astype(np.int32)
            rows.append(model.rows(profile, places))
            labels.append(places >= SIZE // 2)
            groups.append(len(places))
        ranker = Ranker.fit(np.concatenate(rows), np.concatenate(labels), np.array(groups), model.ranker_inputs, "new", 1)
        model = model.ranked_by({"new": ranker}, {"any": "joined", "new": RANKED})
        shown = [int(item) for row in histories(bought) for item in ask(model, row, limit=3, listing="also_like")]
        assert np.mean([item >= SIZE // 2 for item in shown]) > 0.9

    @pytest.mark.parametrize("listing", LISTINGS)
    def test_nothing_is_shown_through_a_channel_that_is_not_permitted(self, board: Recommender, listing: str) -> None:
        decision = decide(board, row_of("1", "3"), listing=listing, channel="email", forbidden_channels=frozenset(["email"]))
        assert not decision.choices
        assert decision.candidates <= 250
        assert decide(board, row_of("1", "3"), listing="for_you", channel="web", forbidden_channels=frozenset(["email"])).choices

    def test_an_unknown_customer_gets_what_is_popular_and_is_told_so(self, any_board: Recommender) -> None:
        decision = decide(any_board, {})
        assert "nothing is known" in str(decision.fallback)
        assert len(decision.choices) == 10
        assert {choice.source for choice in decision.choices} == {"popularity"}


class TestRecipes:
    """What each list is for."""

    def test_similar_items_of_a_checkerboard_have_its_colour(self, board: Recommender) -> None:
        decision = decide(board, {}, listing="similar", item_ids=("4",))
        assert all(int(choice.id) % 2 == 0 and choice.id != "4" for choice in decision.choices)
        assert all(choice.details["because_of"] == "4" for choice in decision.choices)
        unknown = decide(board, {}, listing="similar", item_ids=("?",))
        assert "'?' is not in the catalogue" in str(unknown.fallback)

    def test_what_is_bought_together_lay_in_the_same_baskets(self, board: Recommender) -> None:
        assert all(int(item) % 2 == 1 for item in ask(board, {}, listing="bought_together", item_ids=("1", "3")))

    def test_an_up_sell_is_like_the_item_and_dearer_but_not_by_much(self, board: Recommender) -> None:
        shown = ask(board, {}, listing="up_sell", item_ids=("10",), limit=30)
        asked = 100.0 + 7 * 10
        assert shown
        assert all(1.05 * asked <= 100.0 + 7 * int(item) <= 2 * asked for item in shown)
        assert set(shown) <= set(ask(board, {}, listing="similar", item_ids=("10",), limit=40))

    def test_buy_again_holds_what_was_bought_with_the_day_it_is_expected(self, ranked_board: Recommender) -> None:
        now = int(NEW_YEAR.timestamp())
        row = row_of("1", "3") | {
            "bought_counts": [5, 1], "bought_first_at": [now - 42 * 86_400, now - 86_400], "bought_last_at": [now - 2 * 86_400, now - 86_400],
        }  # fmt: skip
        found = {choice.id: choice for choice in decide(ranked_board, row, listing="buy_again").choices}
        assert set(found) == {"1", "3"}
        assert found["1"].details["expected_at"] == NEW_YEAR + timedelta(days=8)
        assert found["1"].reason == "bought 5 times, every 10 days, last 2 days ago"
        assert "expected_at" not in found["3"].details
        empty = decide(ranked_board, {}, listing="buy_again", promoted={1: "7"})
        assert [choice.id for choice in empty.choices] == ["7"]
        assert decide(ranked_board, {}, listing="buy_again").choices == []
        assert decide(ranked_board, {}, listing="buy_again").fallback == "nothing is known of this customer yet"

    def test_what_trends_in_a_store_comes_first_there(self, board: Recommender) -> None:
        assert ask(board, {}, listing="trending", store_id="s1")[:2] == ["3", "5"]
        assert len(ask(board, {}, listing="trending", store_id="nowhere")) == 10

    def test_a_basket_is_completed_by_what_goes_with_it(self, board: Recommender) -> None:
        shown = ask(board, row_of("0"), listing="basket", item_ids=("1", "3"), limit=5)
        assert all(int(item) % 2 == 1 and item not in ("1", "3") for item in shown)
        own = ask(board, {**row_of("0"), "cart_item_ids": ["1", "3"]}, listing="basket", limit=5)
        assert own == shown
        assert "no item to go by" in str(decide(board, row_of("0"), listing="basket").fallback)

    def test_a_session_of_an_anonymous_visitor_is_answered_from_the_first_view(self, board: Recommender) -> None:
        named = decide(board, {}, listing="session", item_ids=("8",), limit=5)
        assert all(int(choice.id) % 2 == 0 for choice in named.choices)
        assert named.fallback is None
        own = decide(board, looked_at("8"), listing="session", limit=5)
        assert [c.id for c in own.choices] == [c.id for c in named.choices]
        assert "no item to go by" in str(decide(board, {}, listing="session").fallback)

    def test_an_email_is_the_same_all_week_and_another_the_next(self, board: Recommender) -> None:
        row = row_of("1", "3", "5")
        monday = NEW_YEAR + timedelta(days=(7 - NEW_YEAR.weekday()) % 7)
        weeks = [ask(board, row, listing="email", limit=5, at=monday + timedelta(days=7 * k)) for k in range(6)]
        assert ask(board, row, listing="email", limit=5, at=monday + timedelta(days=3)) == weeks[0]
        repeated = [len(set(a) & set(b)) for a, b in itertools.pairwise(weeks)]
        assert np.mean(repeated) < 4.5
        assert len({tuple(week) for week in weeks}) == 6


class TestInterest:
    def test_looking_at_an_item_raises_its_like_and_nothing_else_does(self, any_board: Recommender) -> None:
        row = row_of("1", "3", "5")
        calm, after = (decide(any_board, each, listing="also_like", limit=30) for each in (row, {**row, **looked_at("8")}))
        before = {choice.id: choice.score for choice in calm.choices}
        gains = {choice.id: choice.score - before[choice.id] for choice in after.choices}
        assert "8" not in gains
        assert np.mean([g for i, g in gains.items() if int(i) % 2 == 0]) > np.mean([g for i, g in gains.items() if int(i) % 2 == 1]) + 0.1

    def test_what_was_just_bought_steps_back_and_what_goes_with_it_comes_forward(self, ranked_board: Recommender) -> None:
        now = int(NEW_YEAR.timestamp())
        row = row_of("2", "4", "6")
        first = ask(ranked_board, row, limit=1)[0]
        place = row["bought_item_ids"].index(first) if first in row["bought_item_ids"] else 0
        bought = row["bought_item_ids"][place]
        fresh = row | {"bought_last_at": [now if k == place else at for k, at in enumerate(row["bought_last_at"])]}
        before, after = ({choice.id: choice.score for choice in decide(ranked_board, each, limit=30).choices} for each in (row, fresh))
        assert after[bought] < 0.01 < before[bought]
        gains = {item: after[item] - before[item] for item in after if item not in row["bought_item_ids"]}
        assert np.mean([g for i, g in gains.items() if int(i) % 2 == 0]) > np.mean([g for i, g in gains.items() if int(i) % 2 == 1]) + 0.1

    def test_several_looks_at_one_kind_do_not_fill_the_list_with_it(self) -> None:
        bought = {f"c{u}": [str(k % 10 + 10 * (u % 2)) for k in range(u, u + 3)] for u in range(40)}
        kinds = [f"KIND {k // 10}" for k in range(20)]
        ids = [str(k) for k in range(20)]
        stock = stock_of(ids, bought, type=kinds)
        model = Recommender.fit(
            Histories.of(histories(bought), {item: k for k, item in enumerate(ids)}),
            stock,
            RecommenderConfig(min_buyers=1, ease_penalty=1.0),
        )
        looks = [(np.array([k for k in range(10) if k != place], np.int32), np.full(9, 0.9, np.float32)) for place in range(3)]
        model.alike = lambda place: looks[place]  # type: ignore[method-assign, assignment]
        row = row_of("12", "13", "14", **looked_at("0", "1", "2"))
        shown = ask(model, row, limit=6)
        assert 1 <= sum(int(item) < 10 for item in shown) <= 3

    def test_diversity_sets_further_items_of_a_kind_back(self) -> None:
        scores, kinds = np.array([1.0, 0.9, 0.8, 0.3, 0.2]), np.array([0, 0, 0, 1, -1], np.int32)
        assert apart(scores, kinds, 5, 0.0).tolist() == [0, 1, 2, 3, 4]
        assert apart(scores, kinds, 3, 1.0).tolist() == [0, 3, 4]
        assert apart(scores, kinds, 5, 0.5).tolist() == [0, 1, 3, 2, 4]

    @pytest.mark.parametrize("listing", LISTINGS)
    @pytest.mark.parametrize("novelty", [None, 0.3, 1.0])
    def test_with_novelty_a_list_stays_in_the_order_of_its_scores_and_none_is_below_zero(
        self, ranked_board: Recommender, listing: str, novelty: float | None
    ) -> None:
        row = {**row_of("1", "3"), **looked_at("5")}
        shown = decide(ranked_board, row, listing=listing, limit=SIZE, novelty=novelty).choices
        scores = [choice.score for choice in shown]
        if not RECIPES[listing].rotates:
            # what changes from week to week is drawn
            assert scores == sorted(scores, reverse=True)
        assert min(scores, default=0.0) >= 0.0

    def test_novelty_takes_from_a_score_as_much_as_the_item_is_popular(self, ranked_board: Recommender) -> None:
        row = row_of("1", "3")
        plain, novel = (
            {c.id: c.score for c in decide(ranked_board, row, limit=SIZE, listing="also_like", novelty=share).choices}
            for share in (0.0, 0.4)
        )
        for item, score in plain.items():
            kept = 1.0 - 0.4 * float(ranked_board.shelf.popularity_share[ranked_board.positions[item]])
            assert novel[item] == pytest.approx(score * kept)
        assert list(novel.values()) != list(plain.values())


class TestShelf:
    """The catalogue as it stands now, without a training."""

    def items(self, board: Recommender, **changed: Any) -> dict[str, list[Any]]:
        ids = [*board.item_ids, "new", "strange"]
        count = len(board.item_ids)
        table = {
            "item_id": ids,
            "department": [*(f"D{k % 3}" for k in range(count)), "D0", "D9"],
            "type": [*(f"TYPE {k % 2}" for k in range(count)), "TYPE 0", "TYPE 9"],
            "brand": ["N"] * (count + 1) + ["X"],
            "recommendable": [True] * (count + 2),
        }
        return {**table, **changed}

    def test_an_item_that_came_a_minute_ago_is_recommended_by_its_likeness(self) -> None:
        bought = checkerboard()
        stock = stock_of([str(i) for i in range(SIZE)], bought)
        words = Contents.of([words_of({name: values[k] for name, values in stock.attributes.items()}) for k in range(SIZE)])
        assert words.nearest(words_of({"department": "D0", "type": "TYPE 0"}), 3)[0].tolist() == [0, 6, 12]
        board = fitted(bought)
        model = board.stocked(self.items(board))
        decision = decide(model, row_of("2", "4", "6", "8"), listing="also_like", limit=30)
        found = {choice.id: choice for choice in decision.choices}
        assert found["new"].source == "newcomer"
        assert found["new"].reason.startswith("new here, and like ")
        assert "new" in ask(model, {}, listing="similar", item_ids=("0",), limit=40)
        assert all(int(item) % 2 == 0 for item in ask(model, {}, listing="similar", item_ids=("new",), limit=5))

    def test_items_of_one_kind_are_told_apart_by_brand_size_or_number_unless_they_have_names(self, board: Recommender) -> None:
        count = len(board.item_ids)
        sizes = ["1 L", "2 L", *("5 L" for _ in range(count))]
        told = {"category": ["MILK"] * (count + 2), "type": ["MILK"] * (count + 2), "size": sizes}
        model = board.stocked(self.items(board, **told))
        assert [model.label(item) for item in ("0", "1", "2", "strange")] == [
            "Milk (N, 1 L)", "Milk (N, 2 L)", "Milk (N, 5 L, no. 2)", "Milk (X, 5 L)",
        ]  # fmt: skip
        named = board.stocked(self.items(board, **told, name=["Fresh milk", *[None] * (count + 1)]))
        assert [named.label(item) for item in ("0", "1")] == ["Fresh milk", "Milk (N, 2 L)"]
        assert board.stocked({"item_id": ["0"], "recommendable": [True]}).label("0") == "0"

    def test_what_answers_show_of_an_item_is_the_catalogues_and_the_price_else_what_was_paid(self, board: Recommender) -> None:
        count = len(board.item_ids)
        price, link = [250.0, *[None] * (count + 1)], ["https://shop.example/0.jpg", *[None] * (count + 1)]
        model = board.stocked(self.items(board, price_minor=price, image_url=link))
        paid = int(board.shelf.price[1])
        assert model.shown("0") == {"price_minor": 250, "image_url": "https://shop.example/0.jpg"}
        assert model.shown("1") == {"price_minor": paid}
        assert model.shown("new") == model.shown("unheard of") == {}
        assert "image_url" not in model.attributes.columns, "a link is nothing to filter by"
        cheap = ask(model, {}, limit=40, include={"price_minor": Range(None, 300.0)})
        assert cheap == ["0"]

    def test_an_item_that_is_sold_no_more_is_gone_at_once(self, board: Recommender) -> None:
        items = self.items(board)
        items["recommendable"] = [item != "2" for item in items["item_id"]]
        for listing in LISTINGS:
            assert "2" not in ask(board.stocked(items), row_of("2", "4", "6"), listing=listing, limit=40, item_ids=("6",))
        shorter = {name: [v for v, item in zip(values, items["item_id"], strict=True) if item != "3"] for name, values in items.items()}
        assert "3" not in ask(board.stocked(shorter), row_of("1", "5"), limit=40)

    def test_filters_see_attributes_as_they_are_now(self, board: Recommender) -> None:
        items = self.items(board, in_stock=[float(k % 5 == 0) for k in range(len(board.item_ids) + 2)])
        shown = ask(board.stocked(items), row_of("1", "3"), limit=40, include={"in_stock": frozenset(["1"])})
        narrow = decide(
            board.stocked(items), row_of("1", "3"), limit=40, include={"department": frozenset(["D9"]), "brand": frozenset(["X"])}
        )
        assert [choice.id for choice in narrow.choices] == ["strange"]
        assert narrow.candidates < 30, "what is asked for is looked up, the rest of the catalogue is not walked"
        expected = {item for k, item in enumerate(items["item_id"]) if k % 5 == 0}
        assert set(shown) == expected

    def test_an_item_like_no_other_borrows_nobodys_reason(self, ranked_board: Recommender) -> None:
        [only] = decide(
            ranked_board.stocked(self.items(ranked_board)), row_of("2", "4"), include={"department": frozenset(["D9"])}, explain=True
        ).choices
        assert (only.id, only.source, only.reason, dict(only.details)) == ("strange", "popularity", "popular now", {})

    @pytest.mark.parametrize("department", [[None] * (SIZE + 2), [["a", "b"]] * (SIZE + 2), [1.0] * (SIZE + 2)])
    def test_an_attribute_that_turned_into_something_else_does_no_harm(self, ranked_board: Recommender, department: list[Any]) -> None:
        model = ranked_board.stocked(self.items(ranked_board, department=department))
        for listing in LISTINGS:
            decide(model, row_of("2", "4"), listing=listing, limit=40)
        nothing = {name: [] for name in self.items(ranked_board)}
        assert ask(ranked_board.stocked(nothing), row_of("2", "4")) == []

    def test_words_of_a_list_are_words_whatever_holds_them(self) -> None:
        for tags in (["a b"], ("a b",), np.array(["a b"], object)):
            assert words_of({"tags": tags}) == ["tags=a b", "a", "b"]

    def test_stocking_again_what_was_there_changes_nothing(self, ranked_board: Recommender) -> None:
        items = {name: values[:-2] for name, values in self.items(ranked_board).items()}
        again = ranked_board.stocked(items)
        for row in histories(checkerboard())[:5]:
            for listing in LISTINGS:
                assert ask(again, row, listing=listing) == ask(ranked_board, row, listing=listing)


class TestReasons:
    def test_they_name_what_speaks_for_the_item_and_how_the_customer_buys_it(self, board: Recommender) -> None:
        now = int(NEW_YEAR.timestamp())
        row = row_of("2", "4") | {
            "bought_counts": [4, 1], "bought_first_at": [now - 30 * 86_400, now - 86_400], "bought_last_at": [now - 3 * 86_400, now - 86_400],
            "bought_weights": [4.0, 1.0],
        }  # fmt: skip
        for choice in decide(board, row, listing="also_like", limit=3).choices:
            assert choice.source == "ease"
            because = choice.details["because_of"]
            said = "which you buy every 9 days" if because == "2" else "which you bought yesterday"
            assert choice.reason.endswith(said)
            assert because in ("2", "4")

    def test_what_is_not_known_any_more_gives_no_reason(self, board: Recommender) -> None:
        for choice in decide(board, row_of("2"), listing="also_like").choices:
            assert choice.details.get("because_of") in (None, "2")

    def test_the_contributions_of_the_ranker_are_told_on_demand(self, ranked_board: Recommender) -> None:
        for listing in ("for_you", "also_like"):
            [one, *_] = decide(ranked_board, row_of("2", "4"), listing=listing, explain=True).choices
            names = {each.name for each in ranked_board.ranker_inputs}
            assert one.details["contributions"]
            assert set(one.details["contributions"]) <= names
            [plain, *_] = decide(ranked_board, row_of("2", "4"), listing=listing).choices
            assert "contributions" not in plain.details


class TestRanker:
    def rows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng = np.random.default_rng(1)
        rows = rng.normal(size=(2000, 3)).astype(np.float32)
        return rows, rows[:, 1] + rng.normal(size=2000) > 1, np.full(100, 20)

    @pytest.mark.parametrize("objective", ["any", "new"])
    def test_it_orders_by_what_it_learnt_and_the_best_is_one(self, objective: Objective, tmp_path: Path) -> None:
        rows, labels, groups = self.rows()
        from models.inputs import Input

        inputs = tuple(Input(name) for name in "abc")
        ranker = Ranker.fit(rows, labels, groups, inputs, objective, 1)
        scores = ranker.predict(rows)
        assert scores.max() == 1.0
        assert (scores > 0).all()
        assert scores[labels].mean() > 3 * scores[~labels].mean()
        assert np.abs(ranker.contributions(rows)).mean(axis=0).argmax() == 1
        assert (Ranker.fit(rows, labels, groups, inputs, objective, 1).predict(rows) == scores).all()
        ranker.save(tmp_path)
        again = Ranker.load(tmp_path, inputs, objective)
        assert again is not None
        assert (again.predict(rows) == scores).all()
        assert len(ranker.predict(rows[:0])) == 0

    def test_thinning_keeps_everything_that_was_bought(self) -> None:
        _, labels, groups = self.rows()
        kept, sizes = thinned(labels, groups, 0.3, np.random.default_rng(0))
        assert kept[labels].all()
        assert sizes.sum() == kept.sum()
        assert 0.2 < kept[~labels].mean() < 0.4


def test_a_shop_of_one_item_and_one_without_prices_are_answered() -> None:
    one = fitted({"a": ["1"], "b": ["1"]})
    assert ask(one, row_of("1")) == ["1"]
    model = fitted(checkerboard(10))
    model.shelf.price[:] = np.nan
    for listing in LISTINGS:
        decide(with_rankers(model, checkerboard(10)), row_of("2", "4"), listing=listing)


def test_a_ranker_that_was_learnt_from_other_inputs_is_refused(ranked_board: Recommender) -> None:
    other = fitted(checkerboard(), groups=("type",))
    with pytest.raises(ValueError, match="other inputs"):
        other.ranked_by(ranked_board.rankers, {"any": RANKED, "new": RANKED})


def test_two_purchases_of_one_day_are_told_once(board: Recommender) -> None:
    now = int(NEW_YEAR.timestamp()) - 3 * 86_400
    row = row_of("2") | {"bought_counts": [2], "bought_first_at": [now - 60], "bought_last_at": [now]}
    [choice] = [choice for choice in decide(board, row).choices if choice.id == "2"]
    assert choice.reason == "bought twice, last 3 days ago"


def test_fitting_twice_on_the_same_gives_the_same_files(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        with_rankers(fitted(checkerboard(40)), checkerboard(40)).save(folder)
    names = sorted(p.name for p in first.iterdir())
    assert len(names) > 5
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_histories_together_are_the_rows_they_were_made_of() -> None:
    rows = histories({"a": ["1", "9"], "b": [], "c": ["2", "?"]})
    known = {str(k): k for k in range(10)}
    parts = [Histories.of(rows[:1], known), Histories.of(rows[1:], known)]
    whole = Histories.joined(parts)
    assert whole.customers == ["a", "b", "c"]
    now = NEW_YEAR.timestamp()
    for number, row in enumerate(rows):
        again = whole.row(number, [str(k) for k in range(10)])
        one, two = owned_of(row, known, now), owned_of(again, known, now)
        assert sorted(one.places.tolist()) == sorted(two.places.tolist())
        assert np.allclose(np.sort(one.weights), np.sort(two.weights))
    assert whole.owned(10).toarray().sum(axis=1).tolist() == [2, 0, 1]


def test_of_whom_little_is_known_is_shown_what_sells_too(ranked_board: Recommender) -> None:
    """One purchase says little: the first of what sells stands high, and less so with every further item that is known."""
    best = ranked_board.shelf.ids[ranked_board.shelf.by_popularity[0]]
    held = [str(k) for k in range(1, 20, 2) if str(k) != best]

    def score(count: int) -> float:
        return {choice.id: choice.score for choice in decide(ranked_board, row_of(*held[:count]), limit=40).choices}[best]

    assert score(1) > 0.8
    assert score(9) < score(1)
