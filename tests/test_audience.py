"""Audiences and sending files of a trained shop: who is counted, who is in the file, who is left out and why, and that it is logged."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from scene import NEW_YEAR, TinyShop, command, copy_home, customer, event, loyalty_cards

from features.catalogue.shop import Shop
from features.definitions.conditions import ConditionError
from features.definitions.standing import BORDERS, BUILT_IN
from features.people.identity import Identities
from features.people.listed import read_list
from features.people.vault import Vault
from features.state.home import Home
from features.state.ports import DECISIONS
from features.store.borders import measure_borders
from features.store.decision_log import flushed
from features.store.feature_store import FeatureStore
from serving.bootstrap import open_engine
from serving.decide.audience import Audiences
from serving.decide.batch import Delivery, score
from serving.decide.engine import Engine
from serving.decide.policy import HELD_OUT
from serving.privacy.held_files import BatchFiles
from serving.privacy.holdings import Subject
from serving.privacy.keys import Audit
from training.dataset import NothingToLearnError
from training.lookalike import find_lookalikes, write_lookalikes

POLICY = "control_group: {share: 0.5, salt: audience}\n"
REACHABLE = 40
"""How many customers have an address and allow e-mail."""


@pytest.fixture(scope="module")
def shop(trained: Home, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """A trained shop that holds out half of its customers; some have addresses, some of these allow e-mail, one allows nothing."""
    home = copy_home(trained, tmp_path_factory.mktemp("audience") / "home")
    (home.root / "policy.yaml").write_text(POLICY)
    cards = loyalty_cards(home)
    at = NEW_YEAR - timedelta(hours=3)
    said = [
        event(f"a{card}", "identify", at, card=card, items=(), identifiers={"loyalty_card": card, "email": f"c{card}@example.org"})
        for card in cards[: REACHABLE + 10]
    ]
    said += [event(f"p{card}", "consent_update", at, card=card, consent={"permissions": {"email": True}}) for card in cards[:REACHABLE]]
    said.append(event("no", "consent_update", at, card=cards[0], consent={"purposes": {"personalization": False}}))
    TinyShop(home, Shop.load(home)).add(*said)
    store = FeatureStore(home)
    store.apply()
    for view in store.customer_views():
        store.backfill(view, {NEW_YEAR: None})
        store.materialize(view, NEW_YEAR)
    store.delete_all([customer(cards[0])])
    measure_borders(home, store, NEW_YEAR)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UBIQUO_CLOCK", f"fixed:{(NEW_YEAR + timedelta(hours=9)).isoformat()}")
        yield Home(home.root)


@pytest.fixture(scope="module")
def engine(shop: Home) -> Engine:
    return open_engine(shop)


@pytest.fixture(scope="module")
def audiences(shop: Home, engine: Engine) -> Audiences:
    return Audiences(shop, engine)


def read(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines()))


class TestSegments:
    def test_every_customer_is_in_one_segment_and_one_stage_of_life(self, audiences: Audiences) -> None:
        sizes, everybody = audiences.sizes(), audiences.size("true").customers
        assert everybody > 1_000
        for prefix in ("rfm_segment", "lifecycle"):
            names = [name for name, text in BUILT_IN.items() if text.startswith(prefix)]
            others = {"rfm_segment": ("new", "prospects"), "lifecycle": ()}[prefix]
            assert sum(sizes[name] for name in (*names, *others)) == everybody

    def test_fifths_are_fifths_of_those_who_bought(self, shop: Home, audiences: Audiences) -> None:
        borders = json.loads((shop.root / BORDERS).read_text())
        path = FeatureStore(shop).snapshot("customer_activity", NEW_YEAR)
        spent = pq.read_table(path, columns=["spend_minor_182"])["spend_minor_182"].to_numpy()
        assert borders["money"][3] == np.quantile(spent, 0.8, method="inverted_cdf")
        assert audiences.size("high_value").members == int((spent > borders["money"][3]).sum())
        assert 0.15 < audiences.size("high_value").members / audiences.size("true").members < 0.25

    def test_the_risk_of_leaving_is_the_champions(self, audiences: Audiences, engine: Engine) -> None:
        found = list(audiences.members("high_churn_risk"))
        [row] = audiences._rows([found[0].customer_id], (), NEW_YEAR, None)
        assert engine.champion("churn").model.model.answer(row).value == pytest.approx(engine.risk.probability(row))
        base = float(engine.champion("churn").model.tags["base_rate"])
        assert 0 < len(found) < audiences.size("churn_probability >= 0.0").members
        odds = 2 * base / (1 - base)
        assert audiences.size(f"churn_probability >= {odds / (1 + odds)}").members == pytest.approx(len(found), abs=1)

    def test_a_condition_may_name_everything_that_is_known(self, audiences: Audiences) -> None:
        [first, *_] = [m.told["favourite_category"] for m in audiences.members("champions")]
        some = audiences.size(f"champions && favourite_category == '{first}' && size(bought_item_ids) > 0")
        assert 0 < some.members < audiences.size("champions").members

    def test_a_name_that_is_none_is_told_with_the_nearest(self, audiences: Audiences) -> None:
        with pytest.raises(ConditionError, match=r"'champion' names 'champion'.*such as champions"):
            audiences.size("champion")


class TestWhoIsReached:
    def test_the_counts_add_up_and_each_reason_is_told(self, audiences: Audiences) -> None:
        found = audiences.size("true", "email")
        assert found.members == found.customers == found.reached + found.left_out.total()
        held_out = found.left_out[HELD_OUT]
        assert found.reached + held_out == REACHABLE - 1, "one allows nothing, and is no member"
        assert 5 < held_out < REACHABLE - 5, "about half"
        assert found.left_out["the customer has not permitted contact by email"] == found.members - REACHABLE + 1
        assert found.feature_at == NEW_YEAR

    def test_a_file_for_klaviyo_holds_them_alone_and_an_erasure_finds_them(self, shop: Home, audiences: Audiences, tmp_path: Path) -> None:
        out, noted = tmp_path / "k.csv", list[str]()

        def note(customers: Sequence[str]) -> None:
            noted.extend(customers)
            Audit(shop, Vault.open(shop)).note_all(NEW_YEAR, "command line", "contact data into a file", customers, "done")

        found = audiences.export("true", out, "email", Delivery("klaviyo", with_contact=True, note=note))
        rows = read(out)
        assert len(rows) == found.reached == len(noted) == len(set(noted))
        assert all(row["Email"].endswith("@example.org") and row["ubiquo_lifecycle"] for row in rows)
        assert len(Audit(shop, Vault.open(shop)).lines(noted[0])) == 1
        place, subject = BatchFiles(shop), Subject([noted[0]], [], [])
        assert place.erase(subject) == 1
        assert len(read(out)) == found.reached - 1
        assert out.stat().st_mode & 0o077 == 0

    def test_a_list_narrows_it_and_without_a_channel_all_members_are_in_the_file(self, audiences: Audiences, tmp_path: Path) -> None:
        some = [m.customer_id for m in audiences.members("true")][:7]
        for suffix in ("csv", "jsonl", "parquet"):
            assert audiences.export("true", tmp_path / f"x.{suffix}", among=some).members == 7
        assert [row["customer_id"] for row in read(tmp_path / "x.csv")] == some
        assert "email" not in read(tmp_path / "x.csv")[0]
        assert pq.read_table(tmp_path / "x.parquet")["customer_id"].to_pylist() == some


class TestBatch:
    def test_a_batch_is_logged_once_with_each_rows_decision(self, shop: Home, engine: Engine, tmp_path: Path) -> None:
        out = tmp_path / "churn.csv"
        # a service on the home that this one was copied from has answered others
        before = {row["decision_id"] for row in flushed(shop.tables[DECISIONS])}
        first = score(shop, lambda home: engine, "churn", NEW_YEAR, out, 1)
        rows = read(out)
        again = score(shop, lambda home: engine, "churn", NEW_YEAR, out, 1)
        assert (first.rows, first.logged, again.logged, again.known) == (len(rows), len(rows), 0, len(rows))
        assert read(out) == rows
        log = {
            row["decision_id"]: row
            for row in flushed(shop.tables[DECISIONS])
            if row["kind"] == "churn" and row["decision_id"] not in before
        }
        assert set(log) == {row["decision_id"] for row in rows}
        said = {row["decision_id"]: row for row in rows}
        silent = [row for row in log.values() if row["customer_id"] is None]
        assert [said[row["decision_id"]]["customer_id"] for row in silent] == [customer(loyalty_cards(shop)[0])]
        assert silent[0]["features"] == {}
        for row in list(log.values())[:50]:
            if row["customer_id"] is not None:
                assert row["choices"][0]["score"] == (float(told) if (told := said[row["decision_id"]]["score"]) else None)
                assert row["features"]["recency_days"] is not None

    def test_a_sending_file_leaves_out_whom_it_may_not_reach(self, shop: Home, engine: Engine, tmp_path: Path) -> None:
        out = tmp_path / "offers.csv"
        delivery = Delivery("braze", with_contact=True)
        found = score(shop, lambda home: engine, "recommendations", NEW_YEAR, out, 3, channel="email", delivery=delivery)
        rows = read(out)
        assert found.rows == found.customers == len(rows) == REACHABLE - 1 - found.left_out[HELD_OUT]
        assert found.customers + found.left_out.total() == len(loyalty_cards(shop))
        assert all(row["email"] and row["ubiquo_recommendations_3_id"] and row["ubiquo_recommendations_1_name"] for row in rows)
        assert all(int(row["ubiquo_recommendations_1_price_minor"]) > 0 for row in rows), "as was paid, where the catalogue has no price"
        log = {row["decision_id"]: row for row in flushed(shop.tables[DECISIONS]) if row["kind"] == "recommendations"}
        assert {row["ubiquo_recommendations_decision_id"] for row in rows} < set(log)
        held_out = [row for row in log.values() if row["assignment"]["held_out"]]
        assert len(held_out) == found.left_out[HELD_OUT] > 0
        assert all(row["choices"] for row in held_out), "what would have been is logged"


class TestLookalikes:
    def test_the_most_alike_are_found_and_how_well_that_can_be_told(self, shop: Home, audiences: Audiences, tmp_path: Path) -> None:
        path, out = tmp_path / "vips.csv", tmp_path / "like.csv"
        best = [m.customer_id for m in audiences.members("high_value")]
        listed = best[::2]
        path.write_text("\n".join(["customer_id", *listed, "nobody"]) + "\n")
        found = find_lookalikes(shop, path, NEW_YEAR, top=50)
        assert (found.unknown, found.auc.low > 0.85, len(found.strongest)) == (1, True, 5)
        assert find_lookalikes(shop, path, NEW_YEAR, top=50) == found
        write_lookalikes(shop, found, out)
        alike = read_list(out, Identities(shop), None).customers
        assert alike == [who for who, _ in found.customers]
        assert len(set(alike)) == 50
        assert not set(alike) & set(listed)
        assert len(set(alike) & set(best)) > 25, "the other half of the best is like the first"
        assert audiences.size("true", "mail", alike).members == 50
        assert list(BatchFiles(shop).find(Subject([alike[0]], [], [])))

    @pytest.mark.parametrize(("step", "most", "said"), [(1, 10, "20 of each are needed"), (17, 60, "cannot be told from the rest")])
    def test_a_list_that_teaches_nothing_is_refused(
        self, shop: Home, audiences: Audiences, tmp_path: Path, step: int, most: int, said: str
    ) -> None:
        path = tmp_path / "any.csv"
        # ids are digests, so every so manieth customer is like any other
        ids = [m.customer_id for m in audiences.members("true")][::step][:most]
        path.write_text("\n".join(["customer_id", *ids]) + "\n")
        with pytest.raises(NothingToLearnError, match=said):
            find_lookalikes(shop, path, NEW_YEAR, top=5)


def test_the_command_says_whom_it_left_out_and_why(shop: Home, tmp_path: Path) -> None:
    out = tmp_path / "send.csv"
    asked = ("serving", "audience", "export", "lifecycle != 'prospect'", "--channel", "email", "--for", "excel", "--with-contact")
    done = command(*asked, "--out", str(out), home=shop.root)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{out}: {len(read(out))} rows" in done.stdout.replace("\n", " ")
    assert "not reached: " in done.stdout
    assert "the customer has not permitted contact by email" in done.stdout
    lines = Audit(shop, Vault.open(shop)).lines(read(out)[0]["customer_id"])
    assert lines[-1]["action"] == "contact data into a file"
