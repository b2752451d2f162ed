"""What an experiment caused: effects that are known, none where there is none, and whose customers do not count."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scene import NEW_YEAR, SECRET, TinyShop, command, customer, event
from scipy.stats import binom

from features.people.identity_state import mint_customer_id
from features.people.vault import Vault
from features.state.ports import MissingStateError
from features.store.decision_log import DecisionLog
from models.reports import read_reports
from training.experiment import ExperimentResult, UnknownExperimentError, analyse, compare, sample_ratio
from training.shares import policy_shares, told_shares

AT = NEW_YEAR - timedelta(days=40)
DAY = timedelta(days=1)
EVEN = {"plain": 0.5, "discount": 0.5}


def simulated(seed: int, lift: float = 0.0, size: int = 400, alike: float = 0.8) -> pa.Table:
    """Customers whose revenue resembles that of before (correlation *alike*), and is higher by *lift* in variant b."""
    rng = np.random.default_rng(seed)
    before, noise = rng.normal(size=size), rng.normal(size=size)
    treated = rng.random(size) < 0.5
    revenue = 50 + 10 * (alike * before + np.sqrt(1 - alike**2) * noise) + lift * treated
    return pa.table({"variant": np.where(treated, "b", "a"), "revenue_minor": revenue, "revenue_minor_before": 50 + 10 * before})


def test_a_known_lift_lies_within_the_interval_and_far_from_none() -> None:
    [found] = compare(simulated(1, lift=4.0), "a", ["revenue_minor"])
    assert (found.metric, found.variant) == ("revenue_minor", "b")
    assert found.lift.low <= 4.0 <= found.lift.high
    assert found.lift.low > 0
    assert found.lift.value == pytest.approx(found.mean - found.baseline_mean)
    assert found.relative is not None
    assert found.relative.low <= 4.0 / 50 <= found.relative.high
    assert found.relative.value == pytest.approx(found.lift.value / found.baseline_mean)
    assert found.p_value < 0.001


def test_the_intervals_hold_a_known_lift_as_often_as_they_say_and_nothing_is_found_where_nothing_is() -> None:
    times = 200
    held = found = 0
    for seed in range(times):
        [effect] = compare(simulated(seed, lift=2.0), "a", ["revenue_minor"])
        held += effect.lift.low <= 2.0 <= effect.lift.high
        [nothing] = compare(simulated(seed + times), "a", ["revenue_minor"])
        found += nothing.p_value < 0.05
    # bounds that chance alone passes in one of a thousand tests
    assert held >= binom.ppf(0.001, times, 0.95)
    assert found <= binom.ppf(0.999, times, 0.05)


def test_what_customers_did_before_makes_the_interval_narrower_as_theory_says() -> None:
    table = simulated(3, lift=2.0, size=4_000, alike=0.8)
    [with_it], [without] = (compare(table, "a", ["revenue_minor"], cuped=cuped) for cuped in (True, False))
    # the variance shrinks by 1 - correlation squared (Deng et al. 2013)
    narrower = (with_it.lift.high - with_it.lift.low) / (without.lift.high - without.lift.low)
    assert narrower == pytest.approx(np.sqrt(1 - 0.8**2), rel=0.05)


def test_where_nothing_varies_there_is_no_ratio_and_no_p_value() -> None:
    nothing = pa.table({"variant": ["a", "a", "b", "b"], "orders": [0.0] * 4, "orders_before": [0.0] * 4})
    [found] = compare(nothing, "a", ["orders"])
    assert (found.lift.value, found.relative) == (0.0, None)
    assert np.isnan(found.p_value)


def test_a_sample_ratio_that_chance_does_not_explain_is_flagged() -> None:
    def flagged(entered: Mapping[str, int], shares: Mapping[str, float] = EVEN) -> bool:
        mismatch = sample_ratio(entered, "plain", shares)
        return ExperimentResult("plain", [], entered, entered, shares, mismatch, 0, 0, 0).mismatched

    assert flagged({"plain": 600, "discount": 400})
    assert flagged({"plain": 6_000, "discount": 4_000})
    assert not flagged({"plain": 600, "discount": 400}, {"plain": 0.6, "discount": 0.4})
    assert not flagged({"plain": 505, "discount": 495})
    assert flagged({"plain": 500, "discount": 1}, {"plain": 1.0, "discount": 0.0})
    assert not flagged({"plain": 500, "discount": 0}, {"plain": 1.0, "discount": 0.0})
    three = {"a": 100, "b": 100, "c": 200}
    assert sample_ratio(three, "a", {"a": 0.2, "b": 0.2, "c": 0.4}) == {"b": 1.0, "c": pytest.approx(1.0, abs=0.1)}


@pytest.mark.parametrize("text", ["", "a", "a=", "=1", "a=x", "a=0", "a=-1", "a=1,a=1", "a=nan", "a=1,", "a=inf"])
def test_a_ratio_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"write A=0\.5,B=0\.5"):
        told_shares(text)
    assert told_shares("a=0.5, b = 1,c=d=2") == {"a": 0.5, "b": 1.0, "c=d": 2.0}


def test_shares_are_read_from_the_policy_and_never_made_up(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    assert policy_shares(path, "subject") is None
    path.write_text(
        "control_group: {share: 0.05, salt: x}\nexperiments:\n  - {name: subject, salt: y, variants: [{name: a, share: 0.3}]}\n"
    )
    assert policy_shares(path, "subject") == {"a": 0.3}
    assert policy_shares(path, "control-group") == {"control": 0.05, "treated": 0.95}
    assert policy_shares(path, "other") is None
    path.write_text("contact: {}")
    assert policy_shares(path, "control-group") is None
    for text in (
        "experiments: [",
        "experiments: 3",
        "experiments: [{name: subject}]",
        "- a",
        "experiments: [{name: subject, variants: 1}]",
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"policy\.yaml: "):
            policy_shares(path, "subject")


class Trial:
    """A tiny home in which customers 1 to 8 come in, half in each variant, having bought for 1 dollar each the week before."""

    def __init__(self, shop: TinyShop) -> None:
        self.shop, self.told = shop, 0
        for card in range(1, 9):
            self.bought(card, AT - 3 * DAY, 100)
            self.decided(card, AT, {"subject": "plain" if card % 2 else "discount"})

    def bought(self, card: int, at: Any, cents: int, off: int = 0) -> None:
        self.told += 1
        line = {"item_id": "i1", "quantity": 1, "amount_minor": cents, "discount_minor": off}
        self.shop.add({**event(f"e{self.told}", "purchase", at, card=f"{card}"), "items": [line]})

    def decided(self, card: int, at: Any, variants: dict[str, str], **more: Any) -> None:
        self.told += 1
        choices = more.pop("choices", [{"item_id": "i1", "score": 1.0, "source": "x", "propensity": 1.0}])
        log = DecisionLog(self.shop.home)
        log.append(
            {"decision_id": f"d{self.told}", "kind": more.pop("kind", "recommendations"), "customer_id": more.pop("customer_id", customer(f"{card}")), "as_of": at,
             "model": "m/1", "feature_at": None, "fallback": None, "request": more.pop("request", {}), "features": {}, "choices": choices,
             "assignment": {"group": None, "variants": variants, "held_out": False, **more}}
        )  # fmt: skip
        log.close()

    def found(self, name: str = "subject", **options: Any) -> ExperimentResult:
        return analyse(self.shop.home, name, options.pop("until", NEW_YEAR), cuped=options.pop("cuped", False), **options)


@pytest.fixture
def trial(tiny: TinyShop) -> Trial:
    return Trial(tiny)


def means(found: ExperimentResult, variant: str = "discount") -> dict[str, tuple[float, float]]:
    return {each.metric: (each.baseline_mean, each.mean) for each in found.effects if each.variant == variant}


def test_what_a_customer_buys_within_the_days_counts_less_what_goes_back(trial: Trial) -> None:
    trial.bought(2, AT + DAY, 400, off=40)
    trial.bought(2, AT + 13 * DAY, 100)
    trial.bought(4, AT + 14 * DAY, 999)
    trial.bought(1, AT + 2 * DAY, 200)
    trial.shop.add(event("back", "refund", AT + 3 * DAY, card="2", items=[("i1", 1, 60)]))
    found = trial.found(shares=EVEN)
    assert found.baseline == "plain"
    assert means(found) == {"revenue_minor": (50.0, 110.0), "orders": (0.25, 0.5), "buyers": (0.25, 0.25), "discount_minor": (0.0, 10.0)}
    assert dict(found.customers) == {"plain": 4, "discount": 4}
    assert not found.mismatched
    turned = trial.found(shares=EVEN, baseline="discount")
    assert means(turned, "plain")["revenue_minor"] == (110.0, 50.0)


def test_customers_count_from_their_first_decision_and_scores_and_dry_runs_are_none(trial: Trial) -> None:
    trial.decided(1, AT - 10 * DAY, {"subject": "plain"}, choices=[{"score": 0.5, "unit": "probability", "propensity": 1.0}], kind="churn")
    trial.decided(1, AT - 10 * DAY, {"subject": "plain"}, request={"dry_run": True})
    trial.decided(2, AT - 5 * DAY, {"subject": "discount"}, choices=[])
    # customer 1 is looked at from AT on, customer 2 from five days before
    trial.bought(1, AT + 12 * DAY, 300)
    trial.bought(2, AT + 12 * DAY, 300)
    assert means(trial.found(baseline="plain"))["revenue_minor"] == (75.0, 25.0)
    trial.decided(2, AT - 20 * DAY, {"subject": "discount"}, kind="another")
    assert means(trial.found(baseline="plain", kind="recommendations"))["revenue_minor"] == (75.0, 25.0)
    assert means(trial.found(baseline="plain"))["revenue_minor"] == (75.0, 0.0)


def test_whose_days_have_not_passed_waits_and_whose_consent_is_gone_is_left_out(trial: Trial) -> None:
    for card in (9, 10, 11):
        trial.bought(card, AT, 100)
        trial.decided(card, NEW_YEAR - 5 * DAY, {"subject": "plain"})
    trial.shop.add(event("no", "consent_update", AT, card="11", consent={"purposes": {"analytics": False}}))
    found = trial.found(shares=EVEN)
    assert (found.waiting, found.unlearnable, found.customers["plain"], found.entered["plain"]) == (2, 1, 4, 6)
    assert "2 customers wait for their time to pass" in found.remarks
    assert trial.found(days=5).customers["plain"] == 6


def test_whoever_proves_to_be_in_both_variants_is_left_out_and_counted(trial: Trial) -> None:
    account = {"event_id": "seen", "name": "login", "occurred_at": (AT - DAY).isoformat(), "identifiers": {"user_id": "ada"}}
    trial.shop.add(account)
    trial.decided(0, AT, {"subject": "discount"}, customer_id=mint_customer_id(Vault(SECRET.encode()).key("user_id", "ada")))
    apart = trial.found()
    assert (apart.mixed, apart.customers["plain"], apart.customers["discount"]) == (0, 4, 5)
    # the account proves to be that of card 7
    both = {"loyalty_card": "7", "user_id": "ada"}
    trial.shop.add({**account, "event_id": "same", "occurred_at": (AT + DAY).isoformat(), "identifiers": both})
    found = trial.found()
    assert (found.mixed, found.customers["plain"], found.customers["discount"]) == (1, 3, 4)
    assert any("1 customers were seen in two variants" in line for line in found.remarks)


def test_the_control_group_is_compared_where_something_was_held_out(trial: Trial) -> None:
    for card in range(1, 9):
        group = "control" if card <= 2 else "treated"
        # both have the lists of a page: nothing began there
        trial.decided(card, AT - 20 * DAY, {}, group=group)
        trial.decided(card, AT + DAY, {}, group=group, held_out=group == "control", kind="next-best-offer", request={"channel": "email"})
        trial.bought(card, AT + 14 * DAY, 100 if group == "control" else 300)
    found = trial.found("control-group", shares={"control": 0.25, "treated": 0.75})
    assert (found.baseline, dict(found.customers)) == ("control", {"control": 2, "treated": 6})
    assert means(found, "treated")["revenue_minor"] == (100.0, 300.0)


def test_what_cannot_be_compared_is_refused(trial: Trial) -> None:
    with pytest.raises(UnknownExperimentError, match=r"there is no experiment 'sub' .* it knows subject$"):
        trial.found("sub")
    with pytest.raises(UnknownExperimentError, match="no decision of kind 'churn' of it"):
        trial.found(kind="churn")
    with pytest.raises(ValueError, match="variant 'third' has 0 customers to compare, and 2 are needed"):
        trial.found(shares={**EVEN, "third": 0.1})
    with pytest.raises(ValueError, match=r"variant 'discount' that --ratio gives no share"):
        trial.found(shares={"plain": 1.0})
    with pytest.raises(ValueError, match="no variant 'none': use discount, plain"):
        trial.found(baseline="none")
    with pytest.raises(ValueError, match=r"variant 'discount' has 0 customers to compare.*8 customers wait"):
        trial.found(until=AT + DAY)


def test_without_a_decision_it_is_said_what_to_do(tiny: TinyShop) -> None:
    with pytest.raises(MissingStateError, match="serve answers first"):
        analyse(tiny.home, "subject", NEW_YEAR)


def test_the_command_prints_the_effects_and_what_to_know_of_them(trial: Trial) -> None:
    trial.bought(2, AT + DAY, 400)

    def asked(*more: str) -> str:
        done = command("training", "experiment", *more, "--as-of", "2018-01-01", home=trial.shop.home.root, UBIQUO_SECRET=SECRET)
        assert done.returncode == (0 if more[0] == "subject" else 1), done.stdout + done.stderr
        return " ".join(done.stdout.split())

    assert "sample ratio: not checked, as policy.yaml names no shares" in asked("subject")
    # on the first day nobody buys
    assert "| orders | plain | 4 | 0 | 0 | +0 | - | - | - | - |" in asked("subject", "--days", "1", "--no-cuped")
    told = asked("subject", "--ratio", "discount=0.5,plain=0.5", "--no-cuped")
    assert "| revenue_minor | plain | 4 | 0 | 100 | -100 |" in told
    assert "sample ratio: as meant (came in: discount 4, plain 4; shares: discount 0.5, plain 0.5; plain p = 1)" in told
    (trial.shop.home.root / "policy.yaml").write_text(
        "experiments: [{name: subject, salt: s, variants: [{name: plain, share: 0.001}, {name: discount, share: 0.9}]}]"
    )
    assert "MISMATCH: believe no effect before it is explained" in asked("subject")
    assert "there is no experiment 'unheard'" in asked("unheard")
    # and it is kept for whoever shows it: what was found last, in numbers
    kept = read_reports(trial.shop.home.root).experiments["subject"]
    assert kept.mismatched
    assert (kept.entered, kept.baseline) == ({"plain": 4, "discount": 4}, "plain")
    [revenue] = [each for each in kept.effects if each.metric == "revenue_minor"]
    assert (revenue.variant, revenue.customers, revenue.baseline_mean) == ("discount", 4, 0.0)
    assert revenue.lift.low is not None
    assert revenue.lift.low < revenue.lift.value < (revenue.lift.high or 0.0)
