"""A simulated shop: its draws follow its probabilities, its oracle leads, and what governs keeps the caps and sees no trait."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scene import ROOT

from training.policies import AtRandom, Exploring, GovernedOffers, HighestProbability, MarginRule, Pacing
from training.simulated_learner import PAIR_COLUMNS, Learner, pair_rows
from training.simulated_oracle import STATES, Oracle
from training.simulated_shop import (
    CHANNELS,
    HOURS,
    SENDING_MINOR,
    WINDOW,
    Family,
    LogitFamily,
    Observed,
    ThresholdFamily,
    Traits,
    World,
)  # fmt: skip
from training.simulation import GOVERNED, INFORMED, ORACLE, POLICIES, TUNING_SEEDS, Past, Standings, stand, tuned
from training.simulator import Picks, ShopView, first_view, run

FAMILIES = (LogitFamily(), ThresholdFamily())
NAMES = [family.name for family in FAMILIES]
PACING = Pacing(week=3, patience=0.4, price=5.0)


@cache
def standings(name: str) -> Standings:
    return stand(FAMILIES[NAMES.index(name)], PACING, (11, 12), customers=250, weeks=4)


@cache
def past(name: str, seed: int = 21) -> Past:
    return Past.of(FAMILIES[NAMES.index(name)], seed, customers=250, weeks=4)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_and_another_seed_another(name: str) -> None:
    once, again = past(name).run(GOVERNED, PACING, 2), past.__wrapped__(name).run(GOVERNED, PACING, 2)
    assert np.array_equal(once.profit, again.profit)
    assert all(np.array_equal(once.record[column], again.record[column]) for column in once.record)
    other = past(name, 22).run(GOVERNED, PACING, 2)
    assert not np.array_equal(once.profit, other.profit)


def test_both_families_have_the_same_customers_and_offers() -> None:
    tuning, unseen = (World.drawn(family, 5, 60, 40) for family in FAMILIES)
    for one, other in ((tuning.traits, unseen.traits), (tuning.observed, unseen.observed), (tuning.wares, unseen.wares)):
        assert all(np.array_equal(getattr(one, field.name), getattr(other, field.name)) for field in fields(one))
    assert not np.allclose(tuning.strength, unseen.strength)


@pytest.mark.parametrize("family", FAMILIES, ids=NAMES)
def test_answers_come_as_often_as_the_true_probability_says(family: Family) -> None:
    world = World.drawn(family, 3, 2_000, 28)
    record = run(world, AtRandom(), first_view(world), 28).record
    # five standard deviations, of all and of each tenth by probability
    tenth = np.searchsorted(np.quantile(record["probability"], np.linspace(0.1, 0.9, 9)), record["probability"])
    for rows in (np.ones(len(tenth), bool), *(tenth == k for k in range(10))):
        p = record["probability"][rows]
        assert abs(record["answered"][rows].sum() - p.sum()) < 5 * np.sqrt((p * (1 - p)).sum())


@pytest.mark.parametrize("family", FAMILIES, ids=NAMES)
def test_fatigue_lowers_the_response_and_passes(family: Family) -> None:
    world = World.drawn(family, 4, 300, 28)
    who, offer, zero = np.arange(300), np.zeros(300, np.intp), np.zeros(300, np.intp)

    def after(days: list[int]) -> np.ndarray:
        sent = np.zeros((300, 28), bool)
        sent[:, days] = True
        return world.probability(who, offer, zero, zero, sent)

    rested, tired = after([]), after([0, 1, 2, 3, 4])
    assert (tired < rested).all()
    assert (after([2, 3, 4, 5, 6]) >= tired).all()
    assert np.array_equal(after(list(range(WINDOW, 28))), rested)
    assert (world.leaving(who, np.ones((300, 28), bool)) > world.leaving(who, np.zeros((300, 28), bool))).all()


@pytest.mark.parametrize("name", NAMES)
def test_no_policy_brings_more_than_the_oracle(name: str) -> None:
    found = standings(name)
    assert set(found.shares) == set(POLICIES)
    profit = found.rows.groupby("policy")["profit"].mean()
    for policy in set(POLICIES) - {ORACLE}:
        # one that knows as much may be level with it, by chance
        assert found.shares[policy].low <= 1.0
        assert policy == INFORMED or profit[policy] < profit[ORACLE]
    assert found.above[ORACLE].high < 0


@pytest.mark.parametrize("name", NAMES)
def test_what_governs_is_above_the_highest_probability_first(name: str) -> None:
    assert standings(name).above[HighestProbability.name].low > 0


def test_the_plan_of_one_day_is_the_best_message_of_that_day() -> None:
    world = World.drawn(LogitFamily(), 8, 120, 10)
    view = first_view(world)
    picks = Oracle(world, view, 1).decide(view, np.random.default_rng(0))
    now, may = view.may()
    best = world.hours[0].max(axis=1)
    chance = world.family.probability(world.strength[:, now], best[:, None, None], np.ones((120, 1, 1)))
    brings = np.where(may, chance * world.wares.net[now, None] - SENDING_MINOR, -np.inf).max(axis=(1, 2))
    assert np.array_equal(picks.customers, np.flatnonzero(brings > 0))
    sent = world.probability(picks.customers, picks.offers, picks.channels, picks.cells, view.sent[picks.customers])
    assert np.allclose(sent * world.wares.net[picks.offers] - SENDING_MINOR[picks.channels], brings[picks.customers])


def test_the_oracles_plan_is_worth_what_every_way_of_sending_allows_at_best() -> None:
    """Against all 2^6 ways to send, or not, on six days: with nobody leaving and no answer ending an offer."""

    class Staying(ThresholdFamily):
        def leaving(self, traits: Traits, load: np.ndarray) -> np.ndarray:
            return np.zeros(np.broadcast_shapes(load.shape, (len(traits.capacity), 1)))

    world = World.drawn(Staying(), 9, 40, 6)
    view = first_view(world)
    plan = Oracle(world, view, 6)
    brought = np.zeros((6, 40, len(CHANNELS)))
    for day in range(6):
        offers, may = replace(view, day=day).may()
        chance = np.minimum(world.strength[:, offers] * world.hours[int(day >= 5)].max(axis=1)[:, None, None], 0.95)
        brought[day] = np.where(may, chance * world.wares.net[offers, None], -np.inf).max(axis=1)
    best = np.full(40, -np.inf)
    for way in range(2**6):
        sends = [bool(way >> day & 1) for day in range(6)]
        total = np.zeros(40)
        for day in range(6):
            if sends[day]:
                left = np.where(sum(sends[:day]) < world.traits.capacity, 1.0, 0.3)
                total += (brought[day] * left[:, None] - SENDING_MINOR).max(axis=1)
        best = np.maximum(best, total)
    assert plan._value.shape == (7, 40, STATES)
    reachable = world.permitted.any(axis=1)
    assert np.allclose(plan._value[0, reachable, 0], best[reachable], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("week", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_no_cap_is_ever_broken(name: str, week: int) -> None:
    record = past(name).run(GOVERNED, Pacing(week=week), 4).record
    sent = pd.DataFrame({"customer": record["customer"], "day": record["day"], "week": record["day"] // 7})
    assert len(sent)
    assert sent.groupby(["customer", "day"]).size().max() == 1
    # the cap binds, so that it is seen to be kept
    assert sent.groupby(["customer", "week"]).size().max() == week


@pytest.mark.parametrize("policy", [MarginRule.name, GOVERNED, AtRandom.name, ORACLE])
def test_who_unsubscribed_from_a_channel_never_gets_a_message_by_it_again(policy: str) -> None:
    record = past("tuning").run(policy, Pacing(), 4).record
    sent = pd.DataFrame({name: record[name] for name in ("customer", "channel", "day", "left")})
    left = sent[sent["left"]].set_index(["customer", "channel"])["day"]
    assert len(left)
    assert left.index.is_unique
    later = sent.join(left.rename("gone"), on=["customer", "channel"])
    assert not (later["day"] > later["gone"]).any()


def test_what_may_not_be_sent_is_refused() -> None:
    world = World.drawn(LogitFamily(), 6, 50, 14)
    view = first_view(world)
    now, may = view.may()
    who, place, channel = (each[0] for each in np.nonzero(~may))

    class Stubborn:
        name = "stubborn"

        def decide(self, view: ShopView, rng: np.random.Generator) -> Picks:
            one = np.array([who])
            return Picks(one, np.array([now[place]]), np.array([channel]), np.zeros(1, np.intp), np.ones(1))

    with pytest.raises(ValueError, match="may not"):
        run(world, Stubborn(), view, 1)


def test_what_learns_is_given_nothing_but_what_is_observed() -> None:
    """Whatever the traits, the same log and the same observations teach the same; a view has no way to a trait."""
    one = past("tuning")
    assert not {field.name for field in fields(Traits)} & ({field.name for field in fields(Observed)} | set(PAIR_COLUMNS))
    assert {field.name for field in fields(ShopView)} == {"day", "observed", "wares", "open", "answered", "sent"}
    assert not {"probability", "strength"} & set(one.log)
    drawn = run(one.world, GovernedOffers(learner := one.learner(), one.log, PACING), one.view, 1)
    # what draws everybody to an offer is a trait of the offer: without it nothing changes
    blind = replace(one.view, wares=replace(one.view.wares, appeal=np.full_like(one.view.wares.appeal, np.nan)))
    other = Learner(blind.observed, blind.wares)
    other.fit(one.log)
    now, cells = blind.wares.in_force(blind.day), learner.best_cells(False)
    assert np.array_equal(learner.probability(now, cells, blind.sent), other.probability(now, other.best_cells(False), blind.sent))
    assert len(drawn.record["day"])
    assert pair_rows(one.view.observed, one.view.wares, *np.zeros((3, 1), np.intp)).shape == (1, len(PAIR_COLUMNS))


def test_a_policy_is_told_no_true_probability() -> None:
    told: list[set[str]] = []
    one = past("tuning")
    run(one.world, AtRandom(), one.view, 14, lambda week: told.append(set(week)))
    assert len(told) == 2
    assert all("probability" not in names and "answered" in names for names in told)


def test_the_chances_of_exploration_are_those_of_the_draws() -> None:
    """The sum of 1 / chance over what was drawn estimates, for each message, how many choices there were."""
    world = World.drawn(LogitFamily(), 7, 1_500, 7)
    view = first_view(world)
    _, may = view.may()
    picks = Exploring().decide(view, np.random.default_rng(1))
    choices = may[picks.customers].sum(axis=(1, 2)) * len(HOURS)
    drawn = 1.0 / picks.propensities
    assert abs((drawn - choices).mean()) < 5 * drawn.std() / np.sqrt(len(drawn))


def test_constants_are_chosen_where_nothing_is_judged() -> None:
    with pytest.raises(ValueError, match="judge on others"):
        stand(ThresholdFamily(), PACING, [TUNING_SEEDS[0]], customers=60, weeks=1)
    poor, good = Pacing(week=0), Pacing(week=3)
    assert tuned(80, 1, (poor, good)) == good


def test_the_command_says_that_all_is_simulated(tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "training",
        "simulate",
        "--customers",
        "60",
        "--weeks",
        "1",
        "--worlds",
        "1",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200", "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert "SIMULATED customers, offers and answers" in done.stdout
    assert done.stdout.count("SIMULATED, ") == len(FAMILIES)
    rows = pd.read_csv(out)
    assert rows["simulated"].all()
    assert set(rows["policy"]) == set(POLICIES)
    assert set(rows["family"]) == set(NAMES)
