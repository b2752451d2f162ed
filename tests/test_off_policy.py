"""Off-policy estimates against a bandit whose answer is known, and what they refuse."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from training.off_policy import (
    DR,
    IPS,
    LEAST_ESS,
    SNIPS,
    SWITCH_DR,
    Evidence,
    NotJudgeableError,
    chosen_tau,
    dr,
    effective_sample_size,
    ips,
    judge,
    snips,
    switch_dr,
)

Floats = NDArray[np.float64]
CONTEXTS, ACTIONS = 4, 5


class Bandit:
    """Contexts, actions, the chance of a reward for each pair, and two policies: the values follow by summing."""

    def __init__(self, seed: int = 7, apart: float = 1.0) -> None:
        rng = np.random.default_rng(seed)
        self.chance = rng.uniform(0.05, 0.6, (CONTEXTS, ACTIONS))
        self.logged = rng.dirichlet(np.full(ACTIONS, 3.0), CONTEXTS)
        liking = self.logged * np.exp(apart * rng.normal(size=(CONTEXTS, ACTIONS)))
        self.target = liking / liking.sum(axis=1, keepdims=True)

    def value(self, policy: Floats) -> float:
        return float((policy * self.chance).sum(axis=1).mean())

    def evidence(self, size: int, rng: np.random.Generator, model: Floats | None = None, customers: int | None = None) -> Evidence:
        x = rng.integers(CONTEXTS, size=size)
        a = (rng.random((size, 1)) > self.logged[x].cumsum(axis=1)).sum(axis=1).clip(max=ACTIONS - 1)
        rewards = (rng.random(size) < self.chance[x, a]).astype(float)
        whose = [f"c{k % (customers or size)}" for k in range(size)]
        told = (None, None) if model is None else (model[x, a], (self.target * model).sum(axis=1)[x])
        return Evidence(whose, self.logged[x, a], self.target[x, a], rewards, *told)


@st.composite
def logs(draw: st.DrawFn) -> Evidence:
    size = draw(st.integers(2, 30))
    numbers = st.floats(0.01, 0.99)
    rewards = st.floats(-10, 10)

    def column(of: st.SearchStrategy[float]) -> Floats:
        return np.array(draw(st.lists(of, min_size=size, max_size=size)))

    return Evidence([f"c{k}" for k in range(size)], column(numbers), column(numbers), *(column(rewards) for _ in range(3)))


def test_every_estimator_finds_the_known_value_within_its_interval() -> None:
    bandit = Bandit()
    evidence = bandit.evidence(20_000, np.random.default_rng(1), bandit.chance * 0.8 + 0.05, customers=4_000)
    found, truth = judge(evidence), bandit.value(bandit.target)
    assert found.tau is not None
    by_hand = {IPS: ips(evidence), SNIPS: snips(evidence), DR: dr(evidence), SWITCH_DR: switch_dr(evidence, found.tau)}
    assert {name: each.value for name, each in found.values.items()} == pytest.approx(by_hand)
    assert set(found.values) == {IPS, SNIPS, DR, SWITCH_DR}
    for name, estimate in found.values.items():
        assert estimate.low <= truth <= estimate.high, name
        assert estimate.high - estimate.low < 0.05, name
        lead = found.differences[name]
        assert lead.low <= truth - bandit.value(bandit.logged) <= lead.high, name
    assert found.logged.low <= bandit.value(bandit.logged) <= found.logged.high
    assert found.mean_weight.low <= 1.0 <= found.mean_weight.high
    assert found.doubts == []
    assert (found.decisions, found.customers) == (20_000, 4_000)


def test_the_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    bandit, rng = Bandit(), np.random.default_rng(2)
    truth, times = bandit.value(bandit.target), 120
    held = dict.fromkeys((IPS, SNIPS, DR, SWITCH_DR), 0)
    for _ in range(times):
        for name, estimate in judge(bandit.evidence(1_500, rng, bandit.chance), draws=200).values.items():
            held[name] += estimate.low <= truth <= estimate.high
    # of 120 draws with a chance of .95 fewer than 104 come up in less than one case of a thousand
    assert min(held.values()) >= 104, held


def test_ips_and_dr_are_without_bias_and_a_right_model_makes_dr_the_surer() -> None:
    bandit, rng = Bandit(), np.random.default_rng(3)
    wrong = 1.0 - bandit.chance
    found = np.array([(ips(e), dr(e)) for e in (bandit.evidence(300, rng, bandit.chance) for _ in range(1_500))])
    misled = np.array([dr(bandit.evidence(300, rng, wrong)) for _ in range(1_500)])
    for each in (*found.T, misled):
        assert abs(each.mean() - bandit.value(bandit.target)) < 4 * each.std() / np.sqrt(len(each))
    assert found[:, 1].var() < 0.8 * found[:, 0].var()


def test_without_propensities_the_answer_would_be_another() -> None:
    bandit = Bandit()
    evidence = bandit.evidence(20_000, np.random.default_rng(4))
    as_if_even = replace(evidence, propensities=np.full(20_000, 1 / ACTIONS))
    found = judge(as_if_even)
    assert "far from 1" in found.doubts[0]
    assert abs(ips(as_if_even) - bandit.value(bandit.target)) > abs(ips(evidence) - bandit.value(bandit.target))


def test_a_policy_that_does_what_was_never_possible_is_doubted() -> None:
    bandit = Bandit()
    evidence = bandit.evidence(5_000, np.random.default_rng(5))
    # half of what it does lies outside the log
    found = judge(replace(evidence, probabilities=evidence.probabilities / 2))
    assert found.mean_weight.high < 1
    assert found.doubts


def test_a_reward_that_never_came_is_no_certainty() -> None:
    evidence = Bandit().evidence(2_000, np.random.default_rng(10))
    assert "no certainty" in judge(replace(evidence, rewards=np.zeros(2_000))).doubts[0]


def test_rows_of_one_customer_are_no_independent_witnesses() -> None:
    rng = np.random.default_rng(6)
    bandit = Bandit(apart=0.0)
    once = bandit.evidence(400, rng)
    columns = (np.tile(each, 20) for each in (once.propensities, once.probabilities, once.rewards))
    twenty = Evidence([*once.customers] * 20, *columns)
    alone, repeated = judge(once).values[IPS], judge(twenty).values[IPS]
    assert repeated.high - repeated.low == pytest.approx(alone.high - alone.low, rel=0.05)


@given(logs())
def test_the_logged_policy_is_worth_its_mean_reward(evidence: Evidence) -> None:
    same = replace(evidence, probabilities=evidence.propensities)
    assert ips(same) == float(np.mean(same.rewards))
    assert snips(same) == pytest.approx(float(np.mean(same.rewards)))
    assert effective_sample_size(same.weights) == pytest.approx(len(same.rewards))


@given(logs(), st.floats(-5, 5))
def test_snips_lies_among_the_rewards_and_moves_with_them(evidence: Evidence, more: float) -> None:
    found = snips(evidence)
    assert evidence.rewards.min() - 1e-9 <= found <= evidence.rewards.max() + 1e-9
    assert snips(replace(evidence, rewards=evidence.rewards + more)) == pytest.approx(found + more, abs=1e-6)


@given(logs())
def test_switch_dr_is_dr_at_one_end_and_the_model_alone_at_the_other(evidence: Evidence) -> None:
    assert evidence.q_target is not None
    assert switch_dr(evidence, float("inf")) == dr(evidence)
    assert switch_dr(evidence, 0.0) == float(np.mean(evidence.q_target))
    nothing = replace(evidence, q_logged=np.zeros(len(evidence.rewards)), q_target=np.zeros(len(evidence.rewards)))
    assert dr(nothing) == ips(evidence)


@given(logs())
def test_the_effective_sample_size_is_between_one_and_the_rows(evidence: Evidence) -> None:
    assert 1 - 1e-9 <= effective_sample_size(evidence.weights) <= len(evidence.rewards) + 1e-9


def test_the_threshold_is_the_one_of_least_risk_and_gives_up_nothing_to_a_wrong_model() -> None:
    bandit, rng = Bandit(apart=2.5), np.random.default_rng(8)
    truth = bandit.value(bandit.target)
    logged = [bandit.evidence(1_000, rng, bandit.chance) for _ in range(200)]
    switched = np.array([switch_dr(e, chosen_tau(e)) for e in logged])
    unswitched = np.array([dr(e) for e in logged])
    assert ((switched - truth) ** 2).mean() < 0.9 * ((unswitched - truth) ** 2).mean()
    for evidence in logged[:20]:

        def risk(tau: float, evidence: Evidence = evidence) -> float:
            lost = dr(evidence) - switch_dr(evidence, tau)
            assert evidence.q_logged is not None
            assert evidence.q_target is not None
            rows = evidence.q_target + np.where(evidence.weights <= tau, evidence.weights, 0) * (evidence.rewards - evidence.q_logged)
            return float(rows.var() / len(rows) + lost**2)

        best = risk(chosen_tau(evidence))
        assert best <= risk(float("inf"))
        assert all(best <= risk(float(np.quantile(evidence.weights, q))) + 1e-15 for q in (0.0, 0.3, 0.6, 0.9))
    wrong = bandit.evidence(20_000, rng, 1 - bandit.chance)
    assert chosen_tau(wrong) == float("inf")


def test_effective_sample_size_by_hand() -> None:
    assert effective_sample_size(np.array([1.0, 1.0, 2.0])) == pytest.approx(16 / 6)
    assert effective_sample_size(np.zeros(3)) == 0.0


def test_too_little_overlap_is_refused_with_both_numbers() -> None:
    size = int(LEAST_ESS)
    whose = [f"c{k}" for k in range(size)]
    rewards, half = np.zeros(size), np.full(size, 0.5)
    judge(Evidence(whose, half, half, rewards), draws=10)
    with pytest.raises(NotJudgeableError, match=r"effective sample size of 199 decisions is 199\.0, and 200 are needed"):
        judge(Evidence(whose[1:], half[1:], half[1:], rewards[1:]))
    with pytest.raises(NotJudgeableError, match=r"effective sample size of 200 decisions is 0\.0"):
        judge(Evidence(whose, half, rewards, rewards))
    # rows in which nothing was drawn agree with everything and bear witness to nothing
    mixed = np.where(np.arange(size) < 100, 1.0, 0.5)
    with pytest.raises(NotJudgeableError, match=r"effective sample size of 100 decisions is 100\.0"):
        judge(Evidence(whose, mixed, mixed, rewards))


def test_what_was_not_left_to_chance_is_refused_and_it_is_said_what_would_help() -> None:
    whose, ones = [f"c{k}" for k in range(300)], np.ones(300)
    with pytest.raises(NotJudgeableError, match="explore: true"):
        judge(Evidence(whose, ones, ones, ones))
    other = ones.copy()
    other[17] = 0.25
    with pytest.raises(NotJudgeableError, match=r"row 17: .* probability 0\.25 only"):
        Evidence(whose, ones, other, ones)
    with pytest.raises(NotJudgeableError, match="no decision"):
        Evidence([], ones[:0], ones[:0], ones[:0])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("propensities", 0.0, r"propensities, row 2: 0 is not in \(0, 1\]"),
        ("propensities", 1.5, r"propensities, row 2: 1\.5 is not in \(0, 1\]"),
        ("propensities", 5e-324, "propensities, row 2: .* is too small"),
        ("propensities", np.nan, "propensities, row 2: nan is not finite"),
        ("probabilities", -0.1, r"probabilities, row 2: -0\.1 is not in \[0, 1\]"),
        ("probabilities", 1.1, r"probabilities, row 2: 1\.1 is not in \[0, 1\]"),
        ("rewards", np.inf, "rewards, row 2: inf is not finite"),
        ("q_logged", np.nan, "q_logged, row 2: nan is not finite"),
        ("q_target", np.nan, "q_target, row 2: nan is not finite"),
    ],
)
def test_a_wrong_number_is_named_with_its_row(field: str, value: float, message: str) -> None:
    columns = {name: np.full(4, 0.5) for name in ("propensities", "probabilities", "rewards", "q_logged", "q_target")}
    columns[field][2] = value
    with pytest.raises(ValueError, match=message):
        Evidence(["a", "b", "c", "d"], **columns)


def test_columns_of_other_lengths_and_half_a_model_are_refused() -> None:
    half = np.full(3, 0.5)
    with pytest.raises(ValueError, match=r"rewards: the shape is \(2,\), but there are 3 customers"):
        Evidence(["a", "b", "c"], half, half, half[:2])
    with pytest.raises(ValueError, match="q_logged and q_target go together"):
        Evidence(["a", "b", "c"], half, half, half, half)


def test_the_same_seed_gives_the_same_intervals() -> None:
    evidence = Bandit().evidence(2_000, np.random.default_rng(9))
    assert judge(evidence, seed=3) == judge(evidence, seed=3)
    assert judge(evidence, seed=3) != judge(evidence, seed=4)
