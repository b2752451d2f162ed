"""What came of a decision: each choice beside the events that name it, with the chance that it was chosen with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scene import NEW_YEAR, SECRET, TinyShop, command, customer, event

from features.state.ports import DECISIONS, MissingStateError
from features.store.decision_log import SCHEMA, DecisionLog
from features.store.outputs import outputs
from training.decisions import OUTCOMES, joined, summary, write

AT = NEW_YEAR - timedelta(days=20)
DAY = timedelta(days=1)
UNTIL = NEW_YEAR


def decided(name: str, choices: Sequence[dict[str, Any]], card: str | None = "1", at: datetime = AT, **more: Any) -> dict[str, Any]:
    return {
        "decision_id": name, "kind": more.pop("kind", "recommendations"), "customer_id": card and customer(card), "as_of": at, "model": "m/1",
        "feature_at": None, "fallback": None, "request": more.pop("request", {}), "features": {},
        "choices": [{"score": 1.0, "source": "ranked", "propensity": 1.0, **choice} for choice in choices],
        "assignment": more,
    }  # fmt: skip


def rows(shop: TinyShop, *decisions: dict[str, Any], until: datetime = UNTIL, within_days: int = 14) -> list[dict[str, Any]]:
    log = DecisionLog(shop.home)
    for decision in decisions:
        log.append(decision)
    log.close()
    found: list[dict[str, Any]] = joined(shop.home, until, within_days).rows.to_pylist()
    return found


def outcomes(row: dict[str, Any]) -> set[str]:
    return {name for name in OUTCOMES if row[name]}


def test_what_is_answered_at_once_is_told(shop: TinyShop) -> None:
    shop.add(
        event("e1", "offer_accept", AT + DAY, offer_id="o1", decision_id="d1"), event("e2", "offer_decline", AT + DAY, decision_id="d2"),
        event("e3", "message_sent", AT, decision_id="d2", channel="email"),
    )  # fmt: skip
    both = [decided(name, [{"offer_id": "o1"}, {"offer_id": "o2"}], kind="next-best-offer") for name in ("d1", "d2")]
    found = {(row["decision_id"], row["id"]): row for row in rows(shop, *both)}
    assert outcomes(found["d1", "o1"]) == {"accepted"}
    assert outcomes(found["d1", "o2"]) == set()
    assert outcomes(found["d2", "o1"]) == outcomes(found["d2", "o2"]) == {"declined"}
    assert [found["d2", "o1"]["sent"], found["d1", "o1"]["sent"]] == [True, False]


def test_a_redemption_that_names_its_decision_counts_for_no_other(shop: TinyShop) -> None:
    # in the same whole second as the decision, as clients tell time
    at = AT.replace(microsecond=245_000)
    shop.add(event("r", "offer_redeem", at.replace(microsecond=0) + DAY, offer_id="o1", decision_id="d2"))
    shop.add(event("c", "message_click", at.replace(microsecond=0), decision_id="d1"))
    made = [decided(name, [{"offer_id": "o1"}], kind="next-best-offer", at=at) for name in ("d1", "d2", "d3")]
    found = {row["decision_id"]: outcomes(row) for row in rows(shop, *made)}
    assert found == {"d1": {"clicked"}, "d2": {"redeemed"}, "d3": set()}


@pytest.fixture
def shop(tiny: TinyShop) -> TinyShop:
    tiny.add(
        event("first", "purchase", AT - DAY, items=[("a", 1, 100)]), event("other", "purchase", AT - DAY, card="2", items=[("a", 1, 100)])
    )
    return tiny


def test_each_choice_gets_what_names_it_and_what_names_the_decision_alone(shop: TinyShop) -> None:
    shop.add(
        event("e1", "view_item_list", AT, items=["a", "b"], decision_id="d1"),
        event("e2", "select_item", AT + DAY, items=["b"], decision_id="d1"),
        event("e3", "purchase", AT + 2 * DAY, items=[("c", 1, 100)]),
        event("e4", "purchase", AT + 2 * DAY, card="2", items=[("a", 1, 100)]),
        event("e5", "message_open", AT + DAY, decision_id="d2", campaign_id="x", channel="email"),
        event("e6", "select_item", AT, items=["a"], decision_id="nobody-knows-it"),
    )
    both: list[dict[str, Any]] = [{"item_id": "a"}, {"item_id": "b"}, {"item_id": "c", "propensity": 0.25}]
    found = rows(shop, decided("d1", both), decided("d2", [{"item_id": "b"}]))
    assert [(row["decision_id"], row["place"], row["id"], row["propensity"]) for row in found] == [
        ("d1", 1, "a", 1.0), ("d1", 2, "b", 1.0), ("d1", 3, "c", 0.25), ("d2", 1, "b", 1.0),
    ]  # fmt: skip
    assert [outcomes(row) for row in found] == [{"shown"}, {"shown", "clicked"}, {"bought"}, {"shown"}]
    assert joined(shop.home, UNTIL).unknown == 1
    table = summary(joined(shop.home, UNTIL).rows)
    assert table.loc[0, ["decisions", "choices", "drawn", "bought"]].tolist() == [2, 4, "25.0%", "25.0%"]


def test_an_offer_counts_once_it_is_redeemed_whether_the_till_knows_of_the_decision_or_not(shop: TinyShop) -> None:
    shop.add(
        event("e1", "offer_redeem", AT + DAY, offer_id="o1", campaign_id="c"),
        event("e2", "offer_redeem", AT + DAY, card="2", offer_id="o2", campaign_id="c"),
        event("e3", "offer_redeem", AT + DAY, card=None, offer_id="o3", campaign_id="c", decision_id="d1"),
        event("e4", "offer_redeem", AT - DAY, offer_id="o4", campaign_id="c"),
    )
    offers = [{"offer_id": f"o{k}"} for k in range(1, 5)]
    found = rows(shop, decided("d1", offers, kind="next-best-offer"))
    assert [row["id"] for row in found if row["redeemed"]] == ["o1", "o3"]


def test_only_what_happened_in_time_and_before_the_moment_counts(shop: TinyShop) -> None:
    shop.add(
        event("e1", "purchase", AT + 3 * DAY, items=[("a", 1, 100)]),
        event("e2", "select_item", AT - DAY, items=["a"], decision_id="d1"),
        event("e3", "purchase", AT + 5 * DAY, items=[("b", 1, 100)]),
    )
    choices = [{"item_id": "a"}, {"item_id": "b"}]
    assert [outcomes(row) for row in rows(shop, decided("d1", choices), within_days=4)] == [{"bought"}, set()]
    early = joined(shop.home, AT + 3 * DAY, 14).rows.to_pylist()
    assert [outcomes(row) for row in early] == [set(), set()]
    assert not any(row["closed"] for row in early)
    assert all(row["closed"] for row in joined(shop.home, UNTIL, 4).rows.to_pylist())
    assert joined(shop.home, AT, 14).rows.num_rows == 0, "decided later"


def test_what_was_held_out_and_the_variants_are_told_and_dry_runs_and_empty_answers_are_not(shop: TinyShop) -> None:
    found = rows(
        shop,
        decided("d1", [{"item_id": "a"}], group="control", variants={"subject": "plain"}, held_out=True),
        decided("d2", [{"item_id": "a"}], request={"dry_run": True}),
        decided("d3", []),
        decided("d4", [{"unit": "probability"}], kind="churn"),
        decided("d5", [{"item_id": "a"}], card=None),
    )
    assert [(row["decision_id"], row["held_out"], row["group"], json.loads(row["variants"])) for row in found] == [
        ("d1", True, "control", {"subject": "plain"}), ("d5", False, None, {}),
    ]  # fmt: skip


def test_from_whom_nothing_may_be_learnt_is_left_out(shop: TinyShop) -> None:
    refused = {"purposes": {"analytics": False}}
    shop.add(event("e1", "consent_update", AT, card="2", consent=refused))
    found = rows(shop, decided("d1", [{"item_id": "a"}]), decided("d2", [{"item_id": "a"}], card="2"))
    assert [row["decision_id"] for row in found] == ["d1"]


def test_without_a_decision_the_command_says_what_to_do(shop: TinyShop, tmp_path: Path) -> None:
    with pytest.raises(MissingStateError, match="serve answers first"):
        joined(shop.home, UNTIL)
    rows(shop, decided("d1", [{"item_id": "a"}]))
    write(shop.home, joined(shop.home, UNTIL), tmp_path / "some" / "rows.parquet")
    assert pq.read_table(tmp_path / "some" / "rows.parquet").num_rows == 1
    assert outputs(shop.home) == [tmp_path / "some" / "rows.parquet"], "an erasure finds it"
    done = command(
        "training", "decisions", "--out", str(tmp_path / "d.parquet"), "--as-of", "2018-01-01", home=shop.home.root, UBIQUO_SECRET=SECRET
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 rows; 0 events name a decision that the log does not know" in " ".join(done.stdout.split())
    assert command("training", "decisions", "--out", "x.csv", home=shop.home.root).returncode == 1


def test_a_log_of_an_earlier_version_is_joined_too(shop: TinyShop) -> None:
    row = {
        "decision_id": "d1", "kind": "recommendations", "customer_id": customer("1"), "as_of": AT, "model": "m/1", "feature_at": None,
        "fallback": None, "request": "{}", "choices": '[{"item_id": "a", "score": 1.0, "source": "x", "propensity": 1.0}]', "features": "{}",
    }  # fmt: skip
    earlier = pa.schema([field for field in SCHEMA if field.name != "assignment"])
    shop.home.tables[DECISIONS].append(pa.Table.from_pylist([row], earlier))
    shop.add(event("e1", "purchase", AT + DAY, items=[("a", 1, 100)]))
    [found] = joined(shop.home, UNTIL).rows.to_pylist()
    assert (found["group"], found["held_out"], found["bought"]) == (None, False, True)
