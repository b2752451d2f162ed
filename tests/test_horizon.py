"""The horizon of churn: advice where too many stay away for it, and no comparison across two of them."""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scene import NEW_YEAR

from training.dataset import Cuts, Plan
from training.horizon import advice, gaps, returned
from training.metrics import Estimate
from training.run import TrackedRun

DAY = timedelta(days=1)


def shop(mean_gap: float, days: int = 700, customers: int = 600, horizon: int = 28) -> tuple[Any, pd.DataFrame, Cuts]:
    """What customers did who come at random, on average after *mean_gap* days, and all of them asked about every two weeks."""
    rng, start = np.random.default_rng(7), NEW_YEAR - days * DAY
    visits = []
    for customer in range(customers):
        at = rng.exponential(mean_gap)
        while at < days:
            visits.append({"customer_id": f"c{customer}", "occurred_at": pd.Timestamp(start + at * DAY)})
            at += rng.exponential(mean_gap)
    cuts = Cuts.before(NEW_YEAR, start, "America/New_York", horizon)
    frame = pd.DataFrame(
        [{"customer_id": f"c{c}", "event_timestamp": pd.Timestamp(cut)} for cut in cuts.training() for c in range(customers)]
    )
    return SimpleNamespace(visits=pd.DataFrame(visits)), frame, cuts


def test_a_base_rate_that_tells_something_needs_no_advice() -> None:
    truth, frame, cuts = shop(20)
    assert advice(truth, frame, cuts, 0.3) == []


def test_the_horizon_that_is_advised_has_the_base_rate_that_it_says() -> None:
    truth, frame, cuts = shop(50)
    [told] = advice(truth, frame, cuts, 0.57)
    found = re.search(r"(\d+) days would give (\d+)%: try `--horizon (\d+)`; to keep it write `churn_horizon_days: (\d+)`", told)
    assert found is not None, told
    horizon = int(found[1])
    assert {int(found[3]), int(found[4])} == {horizon}
    # of whom nothing is to be learnt but how often they come, exp(-horizon / 50) stay away
    assert np.exp(-horizon / 50) == pytest.approx(int(found[2]) / 100, abs=0.03)
    assert 0.2 <= int(found[2]) / 100 <= 0.3
    assert f"longer than {np.median(gaps(truth.visits)):.0f} days" in told


def test_a_horizon_that_the_data_is_too_short_for_is_not_advised() -> None:
    truth, frame, cuts = shop(80, days=300)
    [told] = advice(truth, frame, cuts, 0.7)
    assert "--horizon" not in told
    assert "days of data; with what there is 54 days can be asked" in told


def test_a_visit_at_the_cut_itself_belongs_to_what_follows_and_none_is_never() -> None:
    cuts = Cuts.before(NEW_YEAR, NEW_YEAR - 400 * DAY, "America/New_York")
    at = NEW_YEAR - 28 * DAY
    visits = pd.DataFrame([{"customer_id": "a", "occurred_at": at}, {"customer_id": "b", "occurred_at": at - DAY}])
    found = returned(visits, pd.DataFrame({"customer_id": ["a", "b"], "event_timestamp": [at, at]}), cuts)
    assert found.days.tolist() == [0.0, np.inf]
    assert found.seen.tolist() == [28.0, 28.0]


@pytest.mark.parametrize(("asked_on_the_way", "passed"), [(None, True), (84, False)])
def test_a_champion_of_another_horizon_is_no_rival_once_the_shop_asks_otherwise(asked_on_the_way: int | None, passed: bool) -> None:
    tags = {"horizon_days": "56", "as_of": datetime(2017, 12, 1).astimezone().isoformat()}
    run: Any = TrackedRun.__new__(TrackedRun)
    run.model, run.plan, run.cuts = "churn", Plan(horizon_days=asked_on_the_way), SimpleNamespace(horizon_days=84)
    run.settings = SimpleNamespace(promotion=SimpleNamespace(metric="average_precision", baseline="recency"))
    run.registry = SimpleNamespace(
        settings=SimpleNamespace(champion="champion"), version_of=lambda model, alias: 1, tags_of=lambda model, version: tags
    )
    outcome: Any = SimpleNamespace(report=SimpleNamespace(lead=Estimate(0.2, 0.1, 0.3)), evaluation=None)
    verdict = run._verdict(outcome, None)
    assert verdict.passed is passed
    said = "champion 1 looks 56 days ahead, and the shop asks for 84" if passed else "for another horizon"
    assert said in verdict.reason
