"""Offers: what they say of themselves, whom they are for, what they are worth, how many there are, and what is refused of them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import textwrap
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scene import NEW_YEAR, ROOT, TinyShop, copy_home

from features.catalogue.offers import offers_in_force
from features.catalogue.tables import Catalogue
from features.catalogue.yaml_file import WrittenError
from features.definitions.conditions import CelCondition, ConditionError
from features.definitions.segments import SEGMENTS, Vocabulary
from features.sources.catalogue_file import CatalogueError, load
from features.sources.tabular import UnreadableFileError
from features.state.home import Home
from features.state.ports import MissingStateError
from models.decision import Query
from models.slate import SlateSelector, chances_of
from serving.bootstrap import open_engine
from serving.decide.engine import Engine
from serving.decide.governor import ITEM_RESTS, POLICY, STAND_IN, USED_UP
from serving.decide.ledger import Ledger, Promise
from serving.decide.questions import NextBestOfferRequest, OffersAnswer, Position, UnknownAttributeError
from serving.decide.terms import NOT_ELIGIBLE, NOT_HERE
from serving.decide.who import Who

HELD = timedelta(hours=24)
NOTHING_SENT: dict[str, Any] = {
    "contacted_at": None, "contacted_by": None, "contacted_offers": None, "contacted_decisions": None, "tenure_days": 100.0,
}  # fmt: skip
YAML = """
- offer_id: winback
  kind: coupon
  stage: win-back
  title: Ten percent off
  valid_from: 2017-12-01
  valid_until: 2018-02-01
  item_ids: [i1]
  where: {brand: [Acme]}
  channels: [email, push]
  benefit_percent: 10
  cost_minor: 50
  eligible: recency_days > 30 && lapsing && weather == 'rain'
- offer_id: receipt
  kind: message
  valid_from: 2017-12-01
  valid_until: 2018-02-01
  transactional: true
"""


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def vocabulary(text: str = "context: {weather: text, stock_left: number}\nsegments: {lapsing: recency_days > 30}\n") -> Vocabulary:
    return Vocabulary.parse(text.encode(), SEGMENTS, "")


class TestConditions:
    def test_a_condition_holds_of_features_segments_and_what_the_question_tells(self) -> None:
        condition = vocabulary().parse_condition("lapsing && weather == 'rain' && recency_days < 100")
        told = vocabulary().told({"recency_days": 40.0}, {"weather": "rain"})
        assert condition.holds(told)
        assert not condition.holds(vocabulary().told({"recency_days": 20.0}, {"weather": "rain"}))
        assert not condition.holds(vocabulary().told({"recency_days": 40.0}, {"weather": "sun"}))

    @pytest.mark.parametrize("unknown", [None, float("nan")])
    def test_what_is_not_known_makes_nobody_eligible_unless_the_condition_says_so(self, unknown: Any) -> None:
        told = vocabulary().told({"recency_days": unknown}, {})
        assert not vocabulary().parse_condition("recency_days > 30").holds(told)
        assert not vocabulary().parse_condition("recency_days < 30").holds(told)
        assert vocabulary().parse_condition("recency_days == null || recency_days > 30").holds(told)

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("recency_days >", "no CEL expression"),
            ("recency_dayz > 1", "names 'recency_dayz'.*use one such as recency_days"),
            ("recency_days", "gives float, neither true nor false"),
            ("recency_days + 'x' == 2.0", "cannot be computed"),
            ("exit(1)", "cannot be computed"),
            ("1 < 2 && " * 400 + "true", "longer than 2000"),
        ],
    )
    def test_what_is_wrong_with_a_condition_is_told(self, text: str, said: str) -> None:
        with pytest.raises(ConditionError, match=said):
            vocabulary().parse_condition(text)

    def test_a_condition_goes_through_lists_but_not_too_often(self) -> None:
        names: dict[str, Any] = {"cart_item_ids": "list", "recent_at": "list"}
        condition = CelCondition.parse("cart_item_ids.exists(i, i == 'i1') && recent_at.all(at, at > 5.0)", names)
        assert condition.holds({"cart_item_ids": ["i2", "i1"], "recent_at": [6, 7]})
        assert not condition.holds({"cart_item_ids": ["i2"], "recent_at": [6, 7]})
        assert not condition.holds({"cart_item_ids": np.array(["i1"], dtype=object), "recent_at": object()})
        with pytest.raises(ConditionError, match="goes through lists more than 2 times"):
            CelCondition.parse("cart_item_ids.map(i, i).map(j, j).exists(k, k == 'x')", names)

    @given(st.floats(allow_nan=False, allow_infinity=False, width=32), st.floats(allow_nan=False, allow_infinity=False, width=32))
    def test_numbers_compare_as_numbers_do(self, left: float, right: float) -> None:
        condition = CelCondition.parse("recency_days < basket_size", {"recency_days": "number", "basket_size": "number"})
        assert condition.holds({"recency_days": left, "basket_size": right}) == (left < right)

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("segments:\n  lapsing: recency_dayz > 3\n", "segments.yaml, line 2: segments.lapsing: names 'recency_dayz'"),
            ("segments:\n  recency_days: hour > 3\n", "line 2: segments.recency_days: is the name of something else"),
            ("context:\n  weather: colour\n", "line 2: context.weather"),
            ("segment: {}\n", "line 1: segment"),
            ("segments: [", "not valid YAML"),
        ],
    )
    def test_a_segments_file_with_a_mistake_is_refused_with_its_line(self, text: str, said: str) -> None:
        with pytest.raises(WrittenError) as error:
            Vocabulary.parse(text.encode(), SEGMENTS, "")
        assert said in str(error.value)


class TestCatalogue:
    @pytest.fixture
    def shop(self, tiny: TinyShop, tmp_path: Path) -> Home:
        load(tiny.home, "items", written(tmp_path / "i.csv", "item_id,brand\ni1,Other\ni2,Acme\ni3,Acme\n")).save()
        (tiny.home.root / SEGMENTS).write_text("context: {weather: text}\nsegments: {lapsing: recency_days > 30}\n")
        return tiny.home

    def test_a_yaml_file_says_everything(self, shop: Home, tmp_path: Path) -> None:
        load(shop, "offers", written(tmp_path / "o.yaml", YAML)).save()
        winback, receipt = sorted(offers_in_force(shop), key=lambda row: str(row["offer_id"]), reverse=True)
        assert winback["item_ids"] == ["i1", "i2", "i3"], "its own and those of the brand"
        assert (winback["stage"], winback["benefit_percent"], winback["cost_minor"]) == ("win-back", 10.0, 50)
        assert winback["channels"] == ["email", "push"]
        assert (receipt["transactional"], receipt["campaign_id"], receipt["campaign_type"]) == (True, "receipt", "message")
        # what the items are is looked up when it is needed: a new item of the brand is on offer at once
        load(shop, "items", written(tmp_path / "i.csv", "item_id,brand\ni1,Other\ni9,Acme\n")).save()
        assert next(row for row in offers_in_force(shop) if row["offer_id"] == "winback")["item_ids"] == ["i1", "i9"]

    def test_the_same_offers_come_from_csv_and_json_lines(self, shop: Home, tmp_path: Path) -> None:
        load(shop, "offers", written(tmp_path / "o.yaml", YAML)).save()
        of_yaml = offers_in_force(shop)
        raw: dict[str, Any] = {
            "offer_id": "winback", "kind": "coupon", "stage": "win-back", "title": "Ten percent off", "valid_from": "2017-12-01",
            "valid_until": "2018-02-01", "item_ids": ["i1"], "where": {"brand": ["Acme"]}, "channels": ["email", "push"],
            "benefit_percent": 10, "cost_minor": 50, "eligible": "recency_days > 30 && lapsing && weather == 'rain'",
        }  # fmt: skip
        receipt = {"offer_id": "receipt", "kind": "message", "valid_from": "2017-12-01", "valid_until": "2018-02-01", "transactional": True}
        load(shop, "offers", written(tmp_path / "o.jsonl", json.dumps(raw) + "\n" + json.dumps(receipt) + "\n")).save()
        assert offers_in_force(shop) == of_yaml
        header = ["offer_id", "kind", "stage", "title", "valid_from", "valid_until", "item_ids", "where", "channels", "benefit_percent",
                  "cost_minor", "eligible", "transactional"]  # fmt: skip
        cells = {**raw, "item_ids": "i1", "where": '"{""brand"": [""Acme""]}"', "channels": "email|push", "transactional": ""}
        lines = [",".join(header), ",".join(str(cells[name]) for name in header)]
        lines.append(",".join(str(receipt.get(name, "")).lower() for name in header))
        load(shop, "offers", written(tmp_path / "o.csv", "\n".join(lines) + "\n")).save()
        assert offers_in_force(shop) == of_yaml

    @pytest.mark.parametrize(
        ("field", "value", "said"),
        [
            ("eligible", "recency_dayz > 3", "line 2: eligible: names 'recency_dayz'"),
            ("kind", "gift", "line 2: kind:"),
            ("stage", "convince", "line 2: stage:"),
            ("lever", -1, "line 2: lever:"),
            ("budget", -1, "line 2: budget:"),
            ("budget", 1.5, "line 2: budget:"),
            ("benefit_percent", 120, "line 2: benefit_percent:"),
            ("benefit_minor", 5, "line 2: benefit_minor: an offer takes a share off the price or an amount, not both"),
            ("where", {"colour": ["red"]}, "line 2: where: 'colour' is no attribute"),
            ("channels", ["pigeon"], "line 2: channels[0]: 'pigeon' is not one of store"),
            ("transactional", "perhaps", "line 2: transactional:"),
            ("elligible", "true", "line 2: 'elligible' is nothing that an offer has"),
        ],
    )
    def test_a_mistake_is_told_by_line_and_field_and_nothing_changes(
        self, shop: Home, tmp_path: Path, field: str, value: Any, said: str
    ) -> None:
        before = Catalogue(shop).digest("offers")
        row = {
            "offer_id": "o",
            "valid_from": "2017-12-01",
            "valid_until": "2018-02-01",
            "item_ids": ["i1"],
            "benefit_percent": 5,
            field: value,
        }
        with pytest.raises((CatalogueError, UnreadableFileError)) as error:
            load(shop, "offers", written(tmp_path / "o.yaml", "# offers\n" + json.dumps([row]).replace("[{", "- {", 1)[:-1]))
        assert said in str(error.value)
        assert Catalogue(shop).digest("offers") == before

    def test_one_goes_back_to_the_offers_before(self, shop: Home, tmp_path: Path) -> None:
        catalogue = Catalogue(shop)
        with pytest.raises(MissingStateError, match="no earlier offers"):
            catalogue.roll_back_offers()
        versions = []
        for number in range(3):
            load(shop, "offers", written(tmp_path / "o.yaml", YAML.replace("winback", f"winback-{number}"))).save()
            versions.append(catalogue.digest("offers"))
        # the same file again is no new version
        load(shop, "offers", written(tmp_path / "o.yaml", YAML.replace("winback", "winback-2"))).save()
        for expected in versions[-2::-1]:
            assert catalogue.roll_back_offers() == 2
            assert catalogue.digest("offers") == expected


class TestSlates:
    def test_the_chances_of_choices_and_of_lists_are_those_that_are_logged(self) -> None:
        """Over 100,000 draws each list comes as often as its propensity says, within the multinomial bound."""
        scores, groups = np.array([5.0, 4.0, 3.5, 1.0, -2.0]), np.array([0, 0, 1, 2, -1])
        select, rng = SlateSelector(lambda candidates: groups[candidates]), np.random.default_rng(7)
        query = Query("c", NEW_YEAR, {}, limit=2, explore=True, temperature=0.4, uniform=0.1)
        counts: Counter[tuple[int, ...]] = Counter()
        said: dict[tuple[int, ...], float] = {}
        draws = 100_000
        for _ in range(draws):
            picks, chances = select(None, query, np.arange(5), scores, rng)
            slate = tuple(picks.tolist())
            counts[slate] += 1
            assert said.setdefault(slate, float(chances.prod())) == pytest.approx(float(chances.prod()), abs=1e-12)
        assert sum(said.values()) == pytest.approx(1.0), "every list that may be was drawn, and their chances add up"
        assert not any({0, 1} <= set(slate) for slate in said), "two of one category stand in no list"
        statistic = sum((counts[s] - draws * p) ** 2 / (draws * p) for s, p in said.items())
        # chi-squared with len - 1 degrees of freedom: mean len - 1, variance 2 (len - 1); five standard deviations
        free = len(said) - 1
        assert statistic < free + 5 * np.sqrt(2 * free)

    def test_without_exploring_the_best_of_each_category_stand_in_order(self) -> None:
        groups = np.array([0, 0, 1, -1, -2])
        picks, chances = SlateSelector(lambda candidates: groups[candidates])(
            None, Query("c", NEW_YEAR, {}, limit=4), np.arange(5), np.array([5.0, 6.0, 3.0, 4.0, 4.0]), np.random.default_rng(0)
        )
        assert picks.tolist() == [1, 3, 4, 2]
        assert chances.tolist() == [1.0] * 4

    @given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=40), st.floats(0.001, 100), st.floats(0.0, 1.0))
    def test_chances_add_up_favour_the_better_and_have_a_floor(self, scores: list[float], temperature: float, uniform: float) -> None:
        chances = chances_of(np.array(scores), temperature, uniform)
        assert chances.sum() == pytest.approx(1.0)
        assert (chances >= uniform / len(scores) * (1 - 1e-9)).all()
        order = np.argsort(scores)
        assert (np.diff(chances[order]) >= -1e-12).all()


class TestBudgets:
    def promise(self, decision: str, at: Any = NEW_YEAR, most: int = 10) -> Promise:
        return Promise([], decision, None, ["o"], at, HELD, {"o": most}, HELD)

    def test_ten_are_given_out_ten_times_whoever_asks_at_once(self, tmp_path: Path) -> None:
        with ThreadPoolExecutor(50) as pool:
            ledger = Ledger(Home(tmp_path))
            got = list(pool.map(lambda k: ledger.reserve(self.promise(f"d{k}")), range(50)))
        assert sum(got) == 10
        assert ledger.used_up({"o": 10}, {}, NEW_YEAR) == {"o"}
        assert not ledger.used_up({"o": 11}, {}, NEW_YEAR)

    def test_nor_does_a_process_that_is_killed_give_out_more(self, tmp_path: Path) -> None:
        script = textwrap.dedent("""
            import os, sys
            from datetime import *
            from pathlib import Path
            from features.state.home import Home
            from serving.decide.ledger import Ledger, Promise
            now, ledger, held = datetime.fromisoformat(sys.argv[2]), Ledger(Home(Path(sys.argv[1]))), timedelta(days=1)
            for k in range(30):
                if ledger.reserve(Promise([], f'{os.getpid()} {k}', None, ['o'], now, held, {'o': 20}, held)):
                    print(k, flush=True)
                if k == int(sys.argv[3]): os.kill(os.getpid(), 9)
        """)
        run = [sys.executable, "-c", script, str(tmp_path), NEW_YEAR.isoformat()]
        processes = [subprocess.Popen([*run, str(last)], cwd=ROOT, stdout=subprocess.PIPE, text=True) for last in (3, 99, 99)]
        told = sum(len(process.communicate(timeout=60)[0].split()) for process in processes)
        assert told in (19, 20), "one may be held by whoever was killed before they could tell"
        assert not Ledger(Home(tmp_path)).reserve(self.promise("late", most=20))

    def test_what_reached_nobody_comes_back_and_what_did_never_does(self, tmp_path: Path) -> None:
        ledger, later = Ledger(Home(tmp_path)), NEW_YEAR + HELD
        assert all(ledger.reserve(self.promise(f"d{k}")) for k in range(10))
        ledger.reached(["d1", "d2", "d2", "nobody"])
        ledger.reached(["d1"])
        assert not ledger.used_up({"o": 3}, {}, later)
        assert ledger.used_up({"o": 2}, {}, later) == {"o"}
        assert [ledger.reserve(self.promise(f"e{k}", later)) for k in range(9)] == [True] * 8 + [False]

    def test_the_same_decision_made_again_takes_its_own_place(self, tmp_path: Path) -> None:
        ledger = Ledger(Home(tmp_path))
        assert ledger.reserve(self.promise("d", most=1))
        assert ledger.reserve(self.promise("d", most=1))
        ledger.reached(["d"])
        assert ledger.reserve(self.promise("d", most=1))
        assert not ledger.reserve(self.promise("other", most=1))
        # a decision that offers something else now gives back what it held
        other = Promise([], "f", None, ["p"], NEW_YEAR, HELD, {"p": 1}, HELD)
        assert ledger.reserve(other)
        assert ledger.reserve(Promise([], "f", None, ["q"], NEW_YEAR, HELD, {"q": 1}, HELD))
        assert ledger.reserve(Promise([], "g", None, ["p"], NEW_YEAR, HELD, {"p": 1}, HELD))

    def test_a_decision_made_again_after_its_promise_expired_is_promised_anew(self, tmp_path: Path) -> None:
        """A batch that is run again a day later, or a step of a journey."""
        ledger, later = Ledger(Home(tmp_path)), NEW_YEAR + HELD + HELD
        for at in (NEW_YEAR, later):
            for k in range(300):
                promise = Promise([f"c{k}"], f"d{k}", "email", ["o"], at, HELD, {}, HELD)
                assert ledger.reserve(promise, lambda standing: not standing)
        assert len(ledger.promised(["c7"], later)) == 1

    def test_a_decision_that_offers_something_else_now_gives_back_what_it_held(self, tmp_path: Path) -> None:
        ledger = Ledger(Home(tmp_path))
        assert ledger.reserve(Promise(["c"], "d", "email", ["o"], NEW_YEAR, HELD, {"o": 1}, HELD, True))
        assert ledger.used_up({"o": 1}, {}, NEW_YEAR) == {"o"}
        # without a budget of its own
        assert ledger.reserve(Promise(["c"], "d", "email", ["free"], NEW_YEAR, HELD, {}, HELD, True))
        ledger.reached(["d"])
        assert not ledger.used_up({"o": 1}, {}, NEW_YEAR)

    def test_a_decision_of_which_nothing_comes_is_let_go_and_what_reached_somebody_is_not(self, tmp_path: Path) -> None:
        ledger = Ledger(Home(tmp_path))
        for decision in ("gone", "reached"):
            assert ledger.reserve(Promise([decision], decision, "email", ["o"], NEW_YEAR, HELD, {"o": 9}, HELD))
        ledger.reached(["reached"])
        for decision in ("gone", "reached", "nobody"):
            ledger.release(decision)
        assert ledger.promised(["gone"], NEW_YEAR) == []
        assert not ledger.used_up({"o": 2}, {}, NEW_YEAR)
        assert ledger.used_up({"o": 1}, {}, NEW_YEAR) == {"o"}

    def test_stock_counts_each_redemption_once(self, tmp_path: Path) -> None:
        ledger = Ledger(Home(tmp_path))
        for event in ("e1", "e1", "e2"):
            ledger.reached([], [(event, "o")])
        assert not ledger.used_up({}, {"o": 3}, NEW_YEAR)
        assert ledger.used_up({}, {"o": 2, "p": 0}, NEW_YEAR) == {"o", "p"}

    @given(
        st.lists(
            st.one_of(
                st.tuples(st.just("give"), st.integers(0, 6), st.sampled_from("op")),
                st.tuples(st.just("reach"), st.integers(0, 6), st.just("")),
                st.tuples(st.just("wait"), st.integers(1, 30), st.just("")),
            ),
            max_size=30,
        )
    )
    def test_it_counts_as_a_plain_list_does(self, tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, str]]) -> None:
        ledger = Ledger(Home(tmp_path_factory.mktemp("budget")))
        # what has expired is let go of at some time: here never, so that one that reaches somebody late is known
        ledger._tidied_at = math.inf
        now, most = NEW_YEAR, 2
        held: dict[tuple[str, str], Any] = {}
        for what, number, offer in steps:
            name = f"d{number}"
            if what == "wait":
                now += timedelta(hours=number)
            elif what == "reach":
                ledger.reached([name])
                held = {key: None if key[0] == name else until for key, until in held.items()}
            else:
                standing = [key for key, until in held.items() if key[1] == offer and key[0] != name and (until is None or until > now)]
                allowed = ledger.reserve(Promise([], name, None, [offer], now, HELD, {offer: most}, HELD))
                assert allowed == (len(standing) < most)
                if allowed:
                    # what it held of another offer goes back, unless that has reached somebody
                    held = {key: until for key, until in held.items() if key[0] != name or key[1] == offer or until is None}
                    if held.get((name, offer), now) is not None:
                        held[name, offer] = now + HELD


class TestDecisions:
    """A catalogue of every kind of offer, a policy, and what comes of them."""

    OFFERS = """
- {offer_id: plain, kind: service, margin_minor: 1000}
- {offer_id: costly, kind: service, margin_minor: 4000, cost_minor: 3900}
- {offer_id: lifted, kind: service, margin_minor: 900, lever: 3}
- {offer_id: near, kind: service, margin_minor: 5000, store_ids: ["17"]}
- {offer_id: rainy, kind: service, margin_minor: 6000, eligible: "weather == 'rain' || lapsing"}
- {offer_id: by-push, kind: message, margin_minor: 7000, channels: [push]}
- {offer_id: three, kind: service, margin_minor: 500, budget: 3}
- {offer_id: receipt, kind: message, margin_minor: 1, transactional: true, lever: 0.001}
- {offer_id: stopgap, kind: message, margin_minor: 0, fallback: true}
"""
    WHO = Who("somebody")

    @pytest.fixture
    def home(self, trained: Home, tmp_path: Path) -> Home:
        home = copy_home(trained, tmp_path / "home")
        (home.root / SEGMENTS).write_text("context: {weather: text}\nsegments: {lapsing: recency_days > 30}\n")
        self.offer(home, self.OFFERS)
        return home

    @staticmethod
    def offer(home: Home, text: str) -> None:
        valid = "valid_from: 2017-12-01, valid_until: 2018-02-01, "
        load(home, "offers", written(home.root / "o.yaml", text.replace("{offer_id", "{" + valid + "offer_id"))).save()

    @staticmethod
    def policy(home: Home, **said: Any) -> Engine:
        (home.root / POLICY).write_text(json.dumps(said))
        return open_engine(home)

    def ask(self, engine: Engine, row: dict[str, Any] | None = None, who: Who = WHO, now: Any = NEW_YEAR, **said: Any) -> OffersAnswer:
        request = NextBestOfferRequest(**{"limit": 20, "dry_run": True, "explain": True, **said})
        return engine.next_best_offer("next-best-offer", request, who, NOTHING_SENT | (row or {}), NEW_YEAR, now=now)[0]

    @staticmethod
    def ids(answer: OffersAnswer) -> list[str]:
        return [offer.offer_id for offer in answer.offers]

    def test_priority_is_probability_times_what_is_left_times_lever_and_every_part_is_told(self, home: Home) -> None:
        rule = {"when": "weather == 'rain'", "factor": 2.0, "kinds": ["message"]}
        engine = self.policy(home, arbitration={"sending_minor": {"push": 7.5}, "context": [rule]})
        answer = self.ask(engine, channel="push", context={"weather": "rain"}, store_id="17")
        assert set(self.ids(answer)) == {"plain", "costly", "lifted", "near", "rainy", "by-push", "three", "receipt"}
        for offer in answer.offers:
            assert offer.factors == {"context": 2.0 if offer.kind == "message" else 1.0}
            expected = offer.probability * (offer.margin_minor - offer.cost_minor) * offer.lever * offer.factors["context"] - 7.5
            assert offer.score == pytest.approx(expected)
            assert offer.sending_minor == 7.5
        assert [offer.score for offer in answer.offers] == sorted((offer.score for offer in answer.offers), reverse=True)
        assert answer.channel == "push"

    @pytest.mark.parametrize("where", ["question", "policy"])
    def test_each_part_of_a_priority_can_be_left_out(self, home: Home, where: str) -> None:
        def score(*parts: str) -> dict[str, float]:
            asked = {"without": list(parts)} if where == "question" else {}
            engine = self.policy(home, arbitration={"leave_out": list(parts)} if where == "policy" else {})
            return {offer.offer_id: offer.score for offer in self.ask(engine, **asked).offers}

        whole, told = score(), {o.offer_id: o for o in self.ask(open_engine(home)).offers}
        assert whole["costly"] == pytest.approx(told["costly"].probability * 100)
        assert score("cost")["costly"] == pytest.approx(told["costly"].probability * 4000)
        assert score("probability")["plain"] == pytest.approx(1000)
        assert score("lever")["lifted"] == pytest.approx(told["lifted"].probability * 900)
        assert score("value", "lever")["costly"] == pytest.approx(told["costly"].probability)

    def test_who_is_not_eligible_gets_another_and_it_is_told_why(self, home: Home) -> None:
        engine = self.policy(home)
        dry = self.ask(engine, {"recency_days": 3.0}, context={"weather": "sun"}, store_id="4", channel="web")
        assert dry.left_out is not None
        assert dry.left_out[NOT_ELIGIBLE] == ["rainy"]
        assert dry.left_out[NOT_HERE] == ["near"]
        assert dry.left_out["not offered by web"] == ["by-push"]
        assert not {"rainy", "near", "by-push"} & set(self.ids(dry))
        assert "rainy" in self.ids(self.ask(engine, {"recency_days": 31.0}))
        assert "rainy" not in self.ids(self.ask(engine, {"recency_days": None})), "nobody knows whether they are lapsing"
        with pytest.raises(UnknownAttributeError, match=r"context\.wether: is not declared: use one of weather"):
            self.ask(engine, context={"wether": "rain"})
        with pytest.raises(UnknownAttributeError, match=r"context\.weather: is to be a text"):
            self.ask(engine, context={"weather": 3.0})

    def test_a_place_stands_for_the_nearest_store_and_is_not_kept(self, home: Home) -> None:
        rows = "store_id,latitude,longitude\n17,40.7,-74.0\n4,34.05,-118.2\n"
        load(home, "stores", written(home.root / "s.csv", rows)).save()
        engine = self.policy(home)
        for lat, lon, store in ((40.8, -74.1, "17"), (34.0, -118.0, "4")):
            request = NextBestOfferRequest(limit=20, dry_run=True, position=Position(lat, lon))
            answer, record = engine.next_best_offer("next-best-offer", request, self.WHO, NOTHING_SENT, NEW_YEAR)
            assert (answer.store_id, ("near" in self.ids(answer))) == (store, store == "17")
            assert answer.store_km is not None
            assert 5 < answer.store_km < 25
            assert record["request"].position is None
        assert self.ask(engine).store_id is None

    def test_what_would_bring_less_than_it_costs_is_not_offered(self, home: Home) -> None:
        engine = self.policy(home, arbitration={"sending_minor": {"mail": 1e6}, "least": 0})
        assert self.ids(self.ask(engine, channel="mail")) == ["receipt"], "what is owed goes out whatever it costs"
        assert self.ids(self.ask(engine, channel="mail", exclude_offer_ids=["receipt"])) == ["stopgap"]
        assert self.ids(self.ask(engine, channel="web"))[0] != "stopgap"

    def test_where_nothing_else_is_left_something_stands_in_and_says_so(self, home: Home) -> None:
        engine = self.policy(home)
        everything = self.ask(engine)
        assert "stopgap" not in self.ids(everything)
        assert everything.fallback != STAND_IN
        left = self.ask(engine, exclude_offer_ids=self.ids(everything))
        assert self.ids(left) == ["stopgap"]
        assert left.fallback == STAND_IN
        nobody = self.ask(engine, exclude_offer_ids=[*self.ids(everything), "stopgap"])
        assert self.ids(nobody) == []

    def test_a_cap_holds_everything_but_what_is_owed(self, home: Home) -> None:
        engine = self.policy(home, contact={"caps": [{"most": 1, "per": "day"}], "quiet_hours": {"from": "00:00", "to": "00:01"}})
        now = NEW_YEAR + timedelta(hours=9)
        sent = {
            "contacted_at": [int(now.timestamp()) - 60],
            "contacted_by": ["email"],
            "contacted_offers": ["plain"],
            "contacted_decisions": [""],
        }
        told = self.ask(engine, sent, channel="email", now=now)
        assert self.ids(told) == ["receipt"]
        assert "the customer has had the 1 messages that a day may bring" in told.removed
        # what is owed counts for no cap
        owed = {**sent, "contacted_offers": ["receipt"]}
        assert len(self.ids(self.ask(engine, owed, channel="email", now=now))) > 1

    def test_what_was_sent_rests_and_so_does_whatever_is_on_its_items(self, home: Home) -> None:
        items = Catalogue(home).read("items")["item_id"].to_pylist()
        on = ["- {offer_id: a, item_ids: [%r, %r]}", "- {offer_id: b, item_ids: [%r]}", "- {offer_id: c, item_ids: [%r]}"]
        self.offer(home, "\n".join(on) % (items[0], items[1], items[1], items[2]))
        engine = self.policy(home, contact={"offer_rest_days": 20, "item_rest_days": 10})

        def after(days: float) -> set[str]:
            at = int((NEW_YEAR - timedelta(days=days)).timestamp())
            sent = {"contacted_at": [at], "contacted_by": ["sms"], "contacted_offers": ["a"], "contacted_decisions": [""]}
            answer = self.ask(engine, sent, channel="email")
            assert answer.left_out is not None
            # the offer itself rests for being sent, whatever rests for its items
            assert answer.left_out.get(ITEM_RESTS, []) == (["b"] if days < 10 else [])
            return set(self.ids(answer))

        assert after(9.9) == {"c"}
        assert after(10.1) == {"b", "c"}
        assert after(20.1) == {"a", "b", "c"}

    def test_what_was_answered_on_one_channel_is_not_repeated_on_another(self, home: Home) -> None:
        engine = self.policy(home, contact={"answered_rest_days": 7})
        at = int((NEW_YEAR - timedelta(days=2)).timestamp())
        sent = {"contacted_at": [at], "contacted_by": ["push"], "contacted_offers": ["plain"], "contacted_decisions": ["d"]}
        clicked = {"answered_at": [at + 60], "answered_offers": [""], "answered_decisions": ["d"]}
        assert "plain" in self.ids(self.ask(engine, sent, channel="email"))
        assert "plain" not in self.ids(self.ask(engine, sent | clicked, channel="email"))
        old = {"answered_at": [at - 6 * 86_400], "answered_offers": ["plain"], "answered_decisions": [""]}
        assert "plain" in self.ids(self.ask(engine, sent | old, channel="email"))

    @pytest.mark.parametrize("channel", ["email", "web", None])
    def test_nothing_is_sold_to_whoever_complained(self, home: Home, channel: str | None) -> None:
        engine = self.policy(home, contact={"complaint_days": 14})

        def after(days: int) -> list[str]:
            return self.ids(self.ask(engine, {"complained_at": int((NEW_YEAR - timedelta(days=days)).timestamp())}, channel=channel))

        assert after(13) == ["receipt"]
        assert len(after(15)) > 1
        assert set(engine.reads("next-best-offer", [channel])) == {"messages", "last_touch"}

    def test_quiet_hours_are_those_of_where_the_customer_is(self, home: Home) -> None:
        engine = self.policy(home, contact={"quiet_hours": {"from": "22:00", "to": "08:00"}})
        noon = NEW_YEAR + timedelta(hours=12)
        assert len(self.ids(self.ask(engine, channel="sms", now=noon))) > 1
        for zone, is_quiet in (("Asia/Tokyo", True), ("America/Chicago", False), ("Mars/Olympus", False), ("../../etc/passwd", False)):
            assert (self.ids(self.ask(engine, {"timezone": zone}, channel="sms", now=noon)) == ["receipt"]) == is_quiet
        at_the_shops = self.policy(home, contact={"timezone": "shop", "quiet_hours": {"from": "22:00", "to": "08:00"}})
        assert len(self.ids(self.ask(at_the_shops, {"timezone": "Asia/Tokyo"}, channel="sms", now=noon))) > 1

    def test_a_budget_is_given_out_as_often_as_it_says_and_then_the_next_best_is(self, home: Home) -> None:
        self.offer(home, self.OFFERS.replace("margin_minor: 500, budget: 3", "margin_minor: 90000, budget: 3"))
        engine = self.policy(home)
        with ThreadPoolExecutor(16) as pool:
            told = list(pool.map(lambda k: self.ask(engine, who=Who(f"c{k}"), limit=1, dry_run=False), range(24)))
        first = Counter(self.ids(answer)[0] for answer in told)
        assert first["three"] == 3
        assert sum(first.values()) == 24
        assert self.ask(engine).removed[USED_UP] == 1

    def test_the_best_open_channel_is_chosen_and_now_and_then_another(self, home: Home) -> None:
        engine = self.policy(home, arbitration={"sending_minor": {"mail": 80.0, "email": 0.1}})
        told = [
            self.ask(engine, channels=["mail", "email", "sms"], who=Who("c", forbidden_channels=frozenset(["sms"]))) for _ in range(400)
        ]
        chosen = Counter((answer.channel, answer.channel_propensity) for answer in told)
        assert set(chosen) == {("email", 0.975), ("mail", 0.025)}
        assert 1 <= chosen["mail", 0.025] <= 30
        shut = self.ask(engine, channels=["sms"], who=Who("c", forbidden_channels=frozenset(["sms"])))
        assert self.ids(shut) == []
        assert shut.fallback == "the customer has not permitted contact by sms"

    def test_chances_of_draw_and_channel_multiply(self, home: Home) -> None:
        """Whatever the channel, each offer comes as often as the log says: weights of 1 on average for whoever would always choose it."""
        self.offer(home, "- {offer_id: a, kind: service, margin_minor: 1000}\n- {offer_id: b, kind: service, margin_minor: 700}\n")
        engine = self.policy(home, exploration={"temperature": 0.5, "uniform": 0.2})
        weights: dict[str, list[float]] = {"a": [], "b": []}
        for _ in range(1_500):
            [offer] = self.ask(engine, limit=1, channels=["web", "app"], explore=True).offers
            for name, each in weights.items():
                each.append(float(offer.offer_id == name) / offer.propensity)
        for each in weights.values():
            spread = np.std(each) / np.sqrt(len(each))
            assert abs(np.mean(each) - 1.0) < 5 * spread
        _, record = engine.next_best_offer(
            "next-best-offer", NextBestOfferRequest(channels=["web", "app"], best_time=True), self.WHO, NOTHING_SENT, NEW_YEAR
        )
        assert record["assignment"]["channel"] in ("web", "app")
        assert {"channel_propensity", "send_at", "send_at_propensity"} <= set(record["assignment"])

    def test_offers_that_could_not_be_taken_are_tried_again(self, home: Home) -> None:
        engine = self.policy(home)
        before = self.ask(engine)
        whole = (home.root / SEGMENTS).read_text()
        (home.root / SEGMENTS).write_text(whole.replace("lapsing:", "lapsing: recency_days > 30.0, fresh:"))
        self.offer(home, "- {offer_id: new, kind: service, margin_minor: 10, eligible: fresh || true}\n")
        (home.root / SEGMENTS).write_text(whole)
        engine.refresh()
        assert "fresh" in engine.broken["next-best-offer"]
        after = self.ask(engine)
        assert (self.ids(after), after.offers_version) == (self.ids(before), before.offers_version), "those before, under their own name"
        (home.root / SEGMENTS).write_text(whole.replace("lapsing:", "fresh:"))
        engine.refresh()
        engine.refresh()
        assert self.ids(self.ask(engine)) == ["new"]
        assert "next-best-offer" not in engine.broken

    def test_policy_and_segments_that_do_not_fit_the_offers_stay_out_of_force(self, home: Home) -> None:
        engine = self.policy(home)
        (home.root / SEGMENTS).write_text("context: {weather: text}\n")
        assert engine.refresh() == []
        assert "offer 'rainy', eligible: names 'lapsing'" in engine.broken[POLICY]
        assert "rainy" in self.ids(self.ask(engine, {"recency_days": 31.0}))
        (home.root / SEGMENTS).write_text("context: {weather: text}\nsegments: {lapsing: recency_days > 60}\n")
        assert engine.refresh() == [POLICY]
        assert POLICY not in engine.broken
        assert "rainy" not in self.ids(self.ask(engine, {"recency_days": 31.0}))
        (home.root / POLICY).write_text("arbitration:\n  context:\n    - {when: wether == 'rain', factor: 2}\n")
        assert engine.refresh() == []
        assert "policy.yaml, line 3: arbitration.context[0].when: names 'wether'" in engine.broken[POLICY]

    def test_new_offers_are_in_force_at_once_and_the_answer_names_them(self, home: Home) -> None:
        engine = self.policy(home)
        before = self.ask(engine)
        self.offer(home, "- {offer_id: fresh, kind: service, margin_minor: 10}\n")
        engine.refresh()
        after = self.ask(engine)
        assert self.ids(after) == ["fresh"]
        assert before.offers_version != after.offers_version
        Catalogue(home).roll_back_offers()
        engine.refresh()
        assert self.ask(engine).offers_version == before.offers_version
