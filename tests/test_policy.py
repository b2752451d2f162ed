"""Who is offered nothing so that it can be seen what offering brings, and who sees which variant: sticky, exact, and kept in the log."""

from __future__ import annotations

import json
import math
from pathlib import Path

import msgspec
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scene import NEW_YEAR, ROOT, TinyShop, command, copy_home, eventually, loyalty_cards, start_service, stop_service

from features.catalogue.yaml_file import WrittenError
from features.state.home import Home
from features.state.ports import DECISIONS
from features.store.decision_log import SCHEMA, DecisionLog, flushed
from serving.bootstrap import open_engine
from serving.decide.batch import score
from serving.decide.coverage import NOTHING_THERE, Coverage, coverage
from serving.decide.governor import POLICY
from serving.decide.policy import HELD_OUT, Policy, drawn
from serving.decide.questions import NextBestOfferRequest, OffersAnswer
from serving.decide.who import NOBODY

CONTROL = b"control_group: {share: %s, salt: spring, covers: [offers, contacts]}\n"
EXPERIMENT = b"""
experiments:
  - name: subject
    salt: s1
    variants:
      - {name: plain, share: 0.5}
      - {name: discount, share: 0.3}
"""
MANY = [f"c{number}" for number in range(20_000)]


def policy(share: float = 0.1, more: bytes = EXPERIMENT) -> Policy:
    return Policy.parse(CONTROL % str(share).encode() + more, "policy.yaml")


class TestAssignment:
    def test_each_group_and_variant_gets_its_share(self) -> None:
        assigned = [policy().assigned(customer) for customer in MANY]
        found = {
            "control": sum(a.group == "control" for a in assigned),
            "plain": sum(a.variants.get("subject") == "plain" for a in assigned),
            "discount": sum(a.variants.get("subject") == "discount" for a in assigned),
            "control and plain": sum(a == ("control", {"subject": "plain"}) for a in assigned),
        }
        for name, share in {"control": 0.1, "plain": 0.5, "discount": 0.3, "control and plain": 0.05}.items():
            # five standard deviations of a binomial: salts are independent of each other
            assert abs(found[name] / len(MANY) - share) < 5 * math.sqrt(share * (1 - share) / len(MANY)), name

    def test_whoever_is_held_out_stays_so_when_the_share_grows(self) -> None:
        small, large = policy(0.05), policy(0.2)
        assert all(large.assigned(c).group == "control" for c in MANY if small.assigned(c).group == "control")

    def test_another_salt_is_another_draw(self) -> None:
        other = Policy.parse(b"control_group: {share: 0.1, salt: autumn}", "p")
        both = sum(policy().assigned(c).group == other.assigned(c).group == "control" for c in MANY)
        assert abs(both / len(MANY) - 0.01) < 5 * math.sqrt(0.01 * 0.99 / len(MANY))

    @given(salt=st.text(max_size=20), customer=st.text(min_size=1, max_size=40))
    def test_the_draw_is_a_number_below_one_and_always_the_same(self, salt: str, customer: str) -> None:
        assert 0.0 <= drawn(salt, customer) == drawn(salt, customer) < 1.0

    def test_nobody_and_a_shop_without_a_policy_are_in_nothing(self, tmp_path: Path) -> None:
        assert policy(0.99).assigned(None) == (None, {})
        none = Policy.read(tmp_path / "policy.yaml")
        assert none.assigned("c1") == (None, {})
        assert not none.holds_out(none.assigned("c1"), "offers", "email")

    def test_the_control_group_covers_what_it_says(self) -> None:
        held = policy(0.99)
        assigned = held.assigned(next(c for c in MANY if held.assigned(c).group == "control"))
        assert held.holds_out(assigned, "offers", None)
        assert held.holds_out(assigned, "items", "email")
        assert not held.holds_out(assigned, "items", "web")
        assert not held.holds_out(assigned, "items", None)
        assert not held.holds_out(assigned, "score", "email")
        everything = Policy.parse(b"control_group: {share: 0.99, salt: spring, covers: [recommendations]}", "p")
        assert everything.holds_out(assigned, "items", None)
        assert not everything.holds_out(assigned, "offers", None)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"control_group:\n  share: 1.5\n  salt: x\n", "policy.yaml, line 2: control_group.share"),
        (b"control_group: {share: 1.0, salt: x}", "give less than 1"),
        (b"control_group:\n  share: 0.1\n", "missing required field `salt`"),
        (b"# nothing\ncontrols: 1\n", "policy.yaml, line 2: controls"),
        (b"control_group: {share: 0.1, salt: x, covers: [mails]}", "control_group.covers[0]"),
        (b"control_group: [", "not valid YAML"),
        (b"\xff\xfe\xff", "not valid YAML"),
        (EXPERIMENT.replace(b"0.3", b"0.6"), "line 3: experiments[0]: the shares of its variants add up to 1.1"),
        (EXPERIMENT.replace(b"0.3", b"-0.3"), "line 7: experiments[0].variants[1].share"),
        (EXPERIMENT.replace(b"discount", b"plain"), "two variants are called 'plain'"),
        (EXPERIMENT + EXPERIMENT.replace(b"\nexperiments:\n", b""), "two experiments are called 'subject'"),
    ],
)
def test_a_mistake_is_refused_with_line_field_and_fix(text: bytes, told: str) -> None:
    with pytest.raises(WrittenError) as error:
        Policy.parse(text, "policy.yaml")
    assert told in str(error.value)


def test_the_guide_shows_a_policy_that_is_taken() -> None:
    guide = (ROOT / "docs" / "policy.md").read_text()
    found = Policy.parse(guide.partition("```yaml")[2].partition("```")[0].encode(), "docs/policy.md")
    assert found.control_group is not None
    assert len(found.contact.caps) == 4
    assert found.contact.quiet_hours is not None
    assert found.experiments


def test_the_last_good_policy_stays_in_force(trained: Home, tmp_path: Path) -> None:
    home = copy_home(trained, tmp_path / "home")
    (home.root / POLICY).write_bytes(CONTROL % b"0.5")
    engine = open_engine(home)
    assert engine.governor.policy == policy(0.5, b"")
    (home.root / POLICY).write_bytes(b"control_group: {share: 5, salt: x}")
    engine.refresh()
    assert engine.governor.policy == policy(0.5, b"")
    assert "control_group.share" in engine.broken[POLICY]
    with pytest.raises(WrittenError):
        open_engine(home)
    (home.root / POLICY).write_bytes(CONTROL % b"0.25")
    assert POLICY in engine.refresh()
    assert engine.governor.policy == policy(0.25, b"")
    assert POLICY not in engine.broken
    (home.root / POLICY).unlink()
    engine.refresh()
    assert engine.governor.policy == Policy()


def test_decisions_of_an_earlier_version_stand_beside_those_that_tell_more(tiny: TinyShop) -> None:
    row = {
        "decision_id": "d1", "kind": "churn", "customer_id": "c", "as_of": NEW_YEAR, "model": "churn/1", "feature_at": 1,
        "fallback": None, "request": "{}", "choices": "[]", "features": "{}",
    }  # fmt: skip
    earlier = pa.schema([field for field in SCHEMA if field.name != "assignment"])
    tiny.home.tables[DECISIONS].append(pa.Table.from_pylist([row], earlier))
    log = DecisionLog(tiny.home)
    of_earlier_spool = {**row, "decision_id": "d2", "request": {}, "choices": [], "features": {}}
    log.append(of_earlier_spool)
    log.append({**of_earlier_spool, "decision_id": "d3", "assignment": {"group": "control", "variants": {}}})
    assert log.flush() == 2
    told = {found["decision_id"]: found["assignment"] for found in log.read()}
    assert told == {"d1": {}, "d2": {}, "d3": {"group": "control", "variants": {}}}
    assert log.erase(["c"]) == 3
    log.close()


def test_a_held_out_customer_gets_nothing_and_the_log_says_what_would_have_been(trained: Home, tmp_path: Path) -> None:
    home = copy_home(trained, tmp_path / "home")
    (home.root / POLICY).write_bytes(CONTROL % b"0.5" + EXPERIMENT)
    cards = loyalty_cards(home)[:20]
    service = start_service(home, UBIQUO_CLOCK=f"fixed:{NEW_YEAR.isoformat()}")
    try:
        groups: dict[str, str] = {}
        asked: dict[str, bool] = {}
        for card in cards:
            about = {"identifiers": {"loyalty_card": card}}
            offers = service.ask("next-best-offer", about)
            by_mail = service.ask("recommendations", {**about, "channel": "mail"})
            on_page = service.ask("recommendations", about)
            score = service.ask("churn", about)
            assert (
                offers["group"]
                == by_mail["group"]
                == on_page["group"]
                == score["group"]
                == policy(0.5).assigned(offers["customer_id"]).group
            )
            assert offers["variants"] == score["variants"] == policy(0.5).assigned(offers["customer_id"]).variants
            held = offers["group"] == "control"
            groups[offers["customer_id"]] = offers["group"]
            assert (offers["fallback"] == HELD_OUT) == (by_mail["fallback"] == HELD_OUT) == held
            assert (not offers["offers"]) == (not by_mail["items"]) == held
            assert on_page["items"]
            asked |= {offers["decision_id"]: held, by_mail["decision_id"]: held}
        assert set(groups.values()) == {"control", "treated"}
        table = home.tables[DECISIONS]
        eventually(lambda: set(asked) <= {d["decision_id"] for d in flushed(table)}, 40)
        for decision in flushed(table):
            if decision["decision_id"] in asked:
                assert decision["choices"], "what would have been is kept"
                assert (decision["assignment"]["group"] == "control") == asked[decision["decision_id"]]
    finally:
        stop_service(service)
    out = tmp_path / "offers.jsonl"
    done = command("serving", "score", "next-best-offer", "--as-of", "2018-01-01", "--out", str(out), home=home.root)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    of_control = [line for line in lines if line["group"] == "control"]
    assert {line["customer_id"]: line["group"] for line in lines if line["customer_id"] in groups} == groups
    assert all(line["id"] is None and line["fallback"] == HELD_OUT for line in of_control)
    assert any(line["id"] for line in lines if line["group"] == "treated")
    counted = command("serving", "coverage", "next-best-offer", "--as-of", "2018-01-01", home=home.root)
    assert counted.returncode == 0, counted.stdout + counted.stderr
    assert f"nothing: {HELD_OUT}"[:30] in counted.stdout


class TestCoverage:
    """Who ends with nothing and why: what the file of a batch says, counted."""

    def test_it_counts_what_a_batch_would_write(self, trained: Home, tmp_path: Path) -> None:
        home = copy_home(trained, tmp_path / "home")
        (home.root / POLICY).write_bytes(CONTROL % b"0.3")
        out = tmp_path / "offers.jsonl"
        score(home, open_engine, "next-best-offer", NEW_YEAR, out, 3)
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        found = coverage(home, open_engine, "next-best-offer", NEW_YEAR, 3)
        assert found.customers == len({line["customer_id"] for line in lines}) == found.own + found.general.total() + found.nothing.total()
        assert found.nothing[HELD_OUT] == sum(line["group"] == "control" for line in lines) > 0
        assert found.own + found.general.total() == len({line["customer_id"] for line in lines if line["id"]})

    def test_nobody_is_reached_by_a_channel_that_nobody_permitted(self, trained: Home) -> None:
        found = coverage(trained, open_engine, "recommendations", NEW_YEAR, 3, "email", "email")
        assert not found.own
        assert found.nothing == {"the customer has not permitted contact by email": found.customers}

    def test_the_stage_that_took_the_last_is_the_reason(self) -> None:
        told = OffersAnswer(
            decision_id="d", as_of=NEW_YEAR, customer_id="c", model="m", feature_at=None, feature_age_seconds=None, fallback=None, offers=[],
            removed={"attribute": 3, "excluded": 1},
        )  # fmt: skip
        found = Coverage()
        found.add(told)
        found.add(msgspec.structs.replace(told, removed={}))
        found.add(msgspec.structs.replace(told, fallback="because"))
        assert found.nothing == {"excluded": 1, NOTHING_THERE: 1, "because": 1}
        assert (found.customers, found.own) == (3, 0)


def test_what_was_removed_is_named_where_one_asks_to_explain(trained: Home) -> None:
    engine = open_engine(trained)
    plain, _ = engine.next_best_offer("next-best-offer", NextBestOfferRequest(), NOBODY, {}, NEW_YEAR)
    assert plain.left_out is None
    told, _ = engine.next_best_offer("next-best-offer", NextBestOfferRequest(explain=True), NOBODY, {}, NEW_YEAR)
    assert told.left_out is not None
    assert {reason: min(count, 200) for reason, count in told.removed.items()} == {r: len(ids) for r, ids in told.left_out.items()}
    assert not {offer.offer_id for offer in told.offers} & {name for ids in told.left_out.values() for name in ids}
    without = NextBestOfferRequest(explain=True, exclude_offer_ids=[told.offers[0].offer_id])
    again, _ = engine.next_best_offer("next-best-offer", without, NOBODY, {}, NEW_YEAR)
    assert again.left_out is not None
    assert again.left_out["excluded"] == [told.offers[0].offer_id]
