"""Models: what each must do after saving, on edges and with filters; oracles with one right answer."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scene import NEW_YEAR, ROOT, histories

from models.artifact import DamagedArtifactError, seal
from models.attributes import Attributes, Range, WrongWishError
from models.churn import Churn
from models.days_to_next_order import DaysToNextOrder
from models.decision import BrokenStageError, LastSlotExplorer, Pipeline, Query, top
from models.eligibility import Eligibility
from models.inputs import Input, matrix
from models.kind import UnknownKindError, kind_named, kind_names
from models.next_best_offer import PAIR_INPUTS, NextBestOffer, pair_rows
from models.offers import Offer, OfferBook, Worth
from models.probability import Boosted, Logistic, log_odds

RNG = np.random.default_rng(0)


class ProbabilityModelContract:
    """What churn and next best offer rely on."""

    kind = ""
    features = 6

    def fit(self) -> tuple[Any, np.ndarray, np.ndarray]:
        rows = np.random.default_rng(1).normal(size=(800, self.features))
        rows[::7, 1] = np.nan
        labels = np.random.default_rng(2).random(800) < 1 / (1 + np.exp(-3 * rows[:, 0]))
        return (
            (Logistic.fit(rows, labels) if self.kind == "logistic" else Boosted.fit(rows, labels, seeds=2, settings={"trees": 40})),
            rows,
            labels,
        )

    def test_it_learns_and_stays_within_zero_and_one(self) -> None:
        model, rows, labels = self.fit()
        p = model.predict(rows)
        assert ((p > 0) & (p < 1)).all()
        assert p[labels].mean() > p[~labels].mean() + 0.2

    def test_the_same_seed_gives_the_same_model(self) -> None:
        (one, rows, _), (two, _, _) = self.fit(), self.fit()
        assert (one.predict(rows) == two.predict(rows)).all()

    def test_contributions_name_the_feature_that_moved_the_answer(self) -> None:
        model, rows, _ = self.fit()
        parts = model.contributions(rows)
        assert parts.shape == rows.shape
        assert np.abs(parts).mean(axis=0).argmax() == 0
        logit = np.log(model.predict(rows) / (1 - model.predict(rows)))
        assert np.corrcoef(parts.sum(axis=1), logit)[0, 1] > 0.98

    def test_it_answers_the_same_after_saving(self, tmp_path: Path) -> None:
        model, rows, _ = self.fit()
        model.save(tmp_path)
        assert np.allclose(type(model).load(tmp_path).predict(rows), model.predict(rows), rtol=1e-12)


class TestLogistic(ProbabilityModelContract):
    kind = "logistic"

    def test_contributions_and_intercept_are_the_logit_exactly(self) -> None:
        model, rows, _ = self.fit()
        logit = model.contributions(rows).sum(axis=1) + model.intercept
        assert np.allclose(1 / (1 + np.exp(-logit)), model.predict(rows))

    def test_a_feature_that_nobody_has_does_no_harm(self) -> None:
        rows = np.column_stack([RNG.normal(size=100), np.full(100, np.nan)])
        model = Logistic.fit(rows, rows[:, 0] > 0)
        assert np.isfinite(model.predict(rows)).all()


class TestBoosted(ProbabilityModelContract):
    kind = "lightgbm"


INPUTS = (Input("recency_days", "last visit {:.0f} days ago", direction=1), Input("spend_minor_91", "spent {:m}"), Input("gap_mean_days"))


def churn_model(inputs: tuple[Input, ...] = INPUTS) -> Churn:
    rows = np.abs(np.random.default_rng(3).normal(size=(300, len(inputs)))) * 10
    return Churn.fit("logistic", rows, rows[:, 0] > 8, inputs, 28, "USD")


def test_an_altered_artifact_is_refused(tmp_path: Path) -> None:
    churn_model().save(tmp_path)
    path = tmp_path / "logistic.json"
    path.write_bytes(path.read_bytes().replace(b"0", b"1", 1))
    with pytest.raises(DamagedArtifactError, match=r"logistic\.json"):
        Churn.load(tmp_path)


def test_churn_tells_who_it_cannot_answer_for() -> None:
    row = {"recency_days": 5.0, "visit_days_total": 5}
    asked = Eligibility(min_visit_days=3, max_recency_days=91)
    assert asked.why_not(row) is None
    assert "too new" in str(asked.why_not({**row, "visit_days_total": 2}))
    assert "already gone" in str(asked.why_not({**row, "recency_days": 92}))
    assert "no purchase" in str(asked.why_not({}))


def test_churn_gives_reasons_that_a_marketer_can_read(tmp_path: Path) -> None:
    churn_model().save(tmp_path)
    probability, reasons = Churn.load(tmp_path).answer({"recency_days": 40.0, "spend_minor_91": 5, "gap_mean_days": None})
    assert probability > 0.5
    assert reasons[0]["text"] == "last visit 40 days ago"
    assert reasons[0]["effect"] == "raises"
    assert np.isnan(matrix([dict.fromkeys(each.name for each in INPUTS)], INPUTS)).all()


def test_a_champion_serves_on_after_a_feature_is_added_and_reordered(tmp_path: Path) -> None:
    old = churn_model()
    old.save(tmp_path)
    row = {"recency_days": 40.0, "spend_minor_91": 5, "gap_mean_days": 3.0}
    more = {"a_new_feature": 7, **dict(reversed(row.items()))}
    assert Churn.load(tmp_path).answer(more) == old.answer(row)


def test_a_champion_of_the_time_before_models_carried_their_phrases_serves_on(tmp_path: Path) -> None:
    churn_model().save(tmp_path)
    about = json.loads((tmp_path / "churn.json").read_text())
    for name in ("inputs", "eligibility"):
        del about[name]
    (tmp_path / "churn.json").write_text(json.dumps(about))
    seal(tmp_path, "churn")
    row = {"recency_days": 40.0, "spend_minor_91": 5, "gap_mean_days": None}
    old, new = Churn.load(tmp_path), churn_model()
    assert old.answer(row).value == new.answer(row).value
    assert old.answer(row).reasons[0]["text"] == "recency days: 40"
    assert old.why_not({"recency_days": 92, "visit_days_total": 9})


@given(st.lists(st.floats(-5, 5).map(lambda x: round(x, 1)), min_size=1, max_size=60), st.integers(0, 70))
def test_top_is_a_stable_sort_cut_short(scores: list[float], limit: int) -> None:
    array = np.array(scores)
    expected = sorted(range(len(scores)), key=lambda k: (-array[k], k))[:limit]
    assert top(array, limit).tolist() == expected


def test_the_logged_propensity_is_the_frequency_with_which_a_choice_is_made() -> None:
    explorer, scores = LastSlotExplorer(epsilon=0.5, pool=3), np.array([5.0, 4.0, 3.0, 2.0, 1.0, 0.5])
    query, rng = Query(None, NEW_YEAR, {}, limit=2, explore=True), np.random.default_rng(7)
    seen: dict[int, list[float]] = {}
    for _ in range(20_000):
        picks, chances = explorer(None, query, np.arange(6), scores, rng)
        assert picks[0] == 0
        seen.setdefault(int(picks[1]), []).append(float(chances[1]))
    assert sorted(seen) == [1, 2, 3, 4]
    for chances_seen in seen.values():
        assert len(set(chances_seen)) == 1
        assert len(chances_seen) / 20_000 == pytest.approx(chances_seen[0], abs=0.015)
    greedy = explorer(None, replace(query, explore=False), np.arange(6), scores, rng)
    assert (greedy[0].tolist(), greedy[1].tolist()) == ([0, 1], [1.0, 1.0])


@pytest.mark.parametrize(("values", "said"), [(np.array([1.0]), "shape"), (np.array([1.0, np.nan]), "not finite")])
def test_a_broken_scorer_raises_and_is_named(values: np.ndarray, said: str) -> None:
    pipeline: Pipeline[Query] = Pipeline(
        ids=["a", "b"], prepare=lambda q: q, source=lambda c: np.arange(2), filters=[], scorers=[("crooked", lambda c, p: values)],
        selector=LastSlotExplorer(), explain=lambda c, p, s: [("crooked", "", {})] * len(p),
    )  # fmt: skip
    with pytest.raises(BrokenStageError, match=f"crooked.*{said}"):
        pipeline.decide(Query(None, NEW_YEAR, {}), RNG)


def offer_model() -> tuple[NextBestOffer, OfferBook]:
    customer = (Input("recency_days"), Input("tenure_days"))
    inputs = [each.name for each in (*customer, *PAIR_INPUTS)]
    rows = np.abs(np.random.default_rng(5).normal(size=(400, len(inputs))))
    worth = Worth(["1", "2", "3", "4"], np.array([100.0, 1000.0, 400.0, 50.0]), np.ones(4), 0.25)
    model = NextBestOffer.fit("logistic", rows, rows[:, inputs.index("affinity")] > 0.8, customer, worth, "USD")
    start = datetime(2017, 12, 1, tzinfo=UTC)
    offers = [
        Offer("a-1", "a", "A", start, NEW_YEAR + timedelta(days=9), ("1",), channels=("mail",)),
        Offer("a-2", "a", "A", start, NEW_YEAR + timedelta(days=9), ("2",), channels=("mail",)),
        Offer("b-3", "b", "B", start, NEW_YEAR + timedelta(days=9), ("3",), channels=("email",)),
        Offer("old-4", "old", "C", start, NEW_YEAR, ("4",)),
    ]
    return model, OfferBook(offers, worth)


def test_the_best_coupon_of_each_campaign_in_force_is_offered_by_priority(tmp_path: Path) -> None:
    model, book = offer_model()
    model.save(tmp_path)
    [row] = histories({"c": ["1", "3"]})
    for each in (model, NextBestOffer.load(tmp_path)):
        decision = each.pipeline(book).decide(Query.from_row("c", NEW_YEAR, {**row, "tenure_days": 100.0}, limit=5), RNG)
        found = {c.id: c for c in decision.choices}
        assert set(found) == {"a-1", "b-3"}
        for choice in decision.choices:
            assert choice.score == pytest.approx(choice.details["probability"] * book.margin_minor[book.offer_ids.index(choice.id)])
        assert [c.score for c in decision.choices] == sorted((c.score for c in decision.choices), reverse=True)
        assert decision.removed == {"another coupon of its campaign fits better": 1}
        assert decision.fallback is None


def test_the_weight_of_what_was_bought_with_coupons_is_a_part_of_that_of_what_was_bought() -> None:
    _, book = offer_model()
    [row] = histories({"c": ["1", "3"]})
    row |= {"tenure_days": 9, "bought_counts": [4, 1], "bought_weights": [3.0, 1.0], "coupon_item_ids": ["1", "9"], "coupon_counts": [1, 2]}
    [(_, *pair)] = pair_rows(book, (Input("tenure_days"),), PAIR_INPUTS, row, NEW_YEAR, [book.campaign_position("a")])
    told = {each.name: value for each, value in zip(PAIR_INPUTS, pair, strict=True)}
    assert told["affinity"] == pytest.approx(3.0, rel=0.01)
    assert told["affinity_with_coupons"] == pytest.approx(told["affinity"] / 4)


def test_a_model_that_takes_less_of_the_pair_still_answers(tmp_path: Path) -> None:
    model, book = offer_model()
    fewer = [each for each in PAIR_INPUTS if each.name != "affinity_with_coupons"]
    inputs = (*model.customer, *fewer)
    rows = np.abs(np.random.default_rng(7).normal(size=(200, len(inputs))))
    older = NextBestOffer(Logistic.fit(rows, rows[:, 0] > 0.7), model.customer, model.worth, "USD", pair=fewer)
    older.save(tmp_path)
    read = NextBestOffer.load(tmp_path)
    assert [each.name for each in read.inputs] == [each.name for each in inputs]
    [row] = histories({"c": ["1", "3"]})
    decision = read.pipeline(book).decide(Query.from_row("c", NEW_YEAR, {**row, "tenure_days": 100.0}, limit=5), RNG)
    assert {c.id for c in decision.choices} == {"a-1", "b-3"}


def test_what_models_have_missed_by_moves_the_campaigns_of_that_kind_alone(tmp_path: Path) -> None:
    model, _ = offer_model()
    rows = np.abs(np.random.default_rng(6).normal(size=(20, len(model.inputs))))
    rows[:, [each.name for each in model.inputs].index("broad")] = np.arange(20) % 2
    honest = model.predict(rows)
    model.shifts = (-0.5, 0.25)
    model.save(tmp_path)
    moved = NextBestOffer.load(tmp_path).predict(rows)
    np.testing.assert_allclose(log_odds(moved) - log_odds(honest), np.where(np.arange(20) % 2, 0.25, -0.5), rtol=1e-9)
    np.testing.assert_array_equal(moved, model.predict(rows))


def test_offers_are_filtered_by_channel_and_an_unknown_customer_is_told() -> None:
    model, book = offer_model()
    query = Query.from_row(None, NEW_YEAR, {}, limit=5, include={"channel": frozenset(["email"])})
    decision = model.pipeline(book).decide(query, RNG)
    assert [c.id for c in decision.choices] == ["b-3"]
    assert "nothing is known" in str(decision.fallback)
    nothing = model.pipeline(book).decide(Query.from_row(None, NEW_YEAR + timedelta(days=400), {}), RNG)
    assert nothing.choices == []


class TestAttributes:
    """A shop's own attributes: any number, typed, and filters on them that hold."""

    @pytest.fixture
    def known(self) -> Attributes:
        return Attributes.of(
            {
                "colour": ["red", "blue", None, "red"],
                "weight_g": [100.0, 250.0, None, 900.0],
                "tags": [["vegan", "new"], [], None, ["new"]],
                "empty": [None] * 4,
            }
        )

    @pytest.mark.parametrize(
        ("name", "wish", "kept"),
        [
            ("colour", frozenset(["red"]), [0, 3]),
            ("colour", frozenset(["green"]), []),
            ("weight_g", Range(100, 250), [0, 1]),
            ("weight_g", Range(low=101), [1, 3]),
            ("weight_g", frozenset(["900", "1"]), [3]),
            ("tags", frozenset(["new"]), [0, 3]),
            ("tags", frozenset(["vegan", "old"]), [0]),
            ("empty", frozenset(["x"]), []),
            ("empty", Range(1, 2), []),
        ],
    )
    def test_what_is_wished_for_is_kept_or_left_out(self, known: Attributes, name: str, wish: Any, kept: list[int]) -> None:
        for again in (known, Attributes.read(known.about(), known.arrays())):
            where = np.arange(4)
            assert np.flatnonzero(again.keep({name: wish}, {}, where)).tolist() == kept
            assert np.flatnonzero(again.keep({}, {name: wish}, where)).tolist() == [k for k in range(4) if k not in kept]
            assert np.flatnonzero(again.keep({name: wish}, {}, where[::-1])).tolist() == sorted(3 - k for k in kept)

    @pytest.mark.parametrize(
        ("name", "wish", "said"),
        [
            ("color", frozenset(["red"]), "colour, weight_g, tags"),
            ("colour", Range(1, 2), "holds texts"),
            ("tags", Range(1, 2), "lists of texts"),
            ("weight_g", frozenset(["heavy"]), "give numbers"),
        ],
    )
    def test_a_wish_that_does_not_fit_is_told_what_does(self, known: Attributes, name: str, wish: Any, said: str) -> None:
        with pytest.raises(WrongWishError, match=said):
            known.check(name, wish)


class TestDaysToNextOrder:
    INPUTS = (Input("gap_mean_days", "usually comes every {:.1f} days"), Input("recency_days"))

    def fitted(self, horizon_days: int = 28) -> tuple[DaysToNextOrder, np.ndarray, np.ndarray]:
        rng = np.random.default_rng(0)
        gaps = rng.uniform(1, 20, 3000)
        rows = np.column_stack([gaps, rng.uniform(0, 3, 3000)])
        days = np.minimum(np.floor(rng.exponential(gaps)), horizon_days)
        return DaysToNextOrder.fit(rows, days, self.INPUTS, horizon_days, "USD", Eligibility()), rows, days

    def test_whoever_comes_often_is_expected_sooner(self) -> None:
        model, _, _ = self.fitted()
        often, seldom = model.predict(np.array([[2.0, 1.0], [18.0, 1.0]]))
        # the median of an exponential is ln 2 of its mean
        assert 0.5 < often < 3.0
        assert 9.0 < seldom < 17.0

    def test_as_many_come_earlier_as_later(self) -> None:
        model, rows, days = self.fitted()
        assert np.mean(days < model.predict(rows)) == pytest.approx(0.5, abs=0.04)

    @pytest.mark.parametrize("horizon", [3, 28, 40])
    def test_the_curve_never_falls_and_no_answer_lies_beyond_the_horizon(self, horizon: int, tmp_path: Path) -> None:
        model, rows, _ = self.fitted(horizon)
        assert (np.diff(model.curve(rows), axis=1) >= 0).all()
        told = model.predict(rows)
        assert ((told >= 0) & (told <= horizon)).all()
        model.save(tmp_path)
        again = DaysToNextOrder.load(tmp_path)
        assert (again.predict(rows) == told).all()
        assert again.horizon_days == horizon

    def test_it_says_why(self) -> None:
        model, _, _ = self.fitted()
        value, reasons = model.answer({"gap_mean_days": 18.0, "recency_days": 1.0})
        assert reasons[0]["text"] == "usually comes every 18.0 days"
        assert reasons[0]["effect"] == "raises"
        assert value > 7

    def test_where_all_or_none_come_again_it_says_so(self) -> None:
        with pytest.raises(ValueError, match="another horizon"):
            DaysToNextOrder.fit(np.ones((50, 2)), np.full(50, 28.0), self.INPUTS, 28, "USD", Eligibility())


def test_every_kind_of_model_is_found_by_its_file_and_has_a_job() -> None:
    assert kind_names() == ["churn", "days-to-next-order", "next-best-offer", "recommendations"]
    for name in kind_names():
        kind = kind_named(name)
        assert kind.name == name
        assert (ROOT / "training" / f"{kind.module}.py").exists()
    with pytest.raises(UnknownKindError, match="churn, days-to-next-order"):
        kind_named("horoscope")
