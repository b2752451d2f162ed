"""Advice on the horizon of churn: where too many stay away for it, which one would tell the leaving from the slow."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from training.dataset import MIN_HISTORY_DAYS, Cuts, Truth

TOO_MANY = 0.4
"""A base rate above this says more of how seldom customers come than of who leaves."""
AIM, NEAR = 0.25, 0.05
"""The base rate to aim at, and how far from it a horizon may end."""
STEP_DAYS, LONGEST_DAYS = 7, 365
FEWEST_ROWS = 100
"""From fewer customers no share is told."""


@dataclass(frozen=True)
class Returns:
    """Of customers at a cut: after how many days each came again (infinity: not so far), and for how many days one could see."""

    days: NDArray[np.float64]
    seen: NDArray[np.float64]

    def stayed_away(self, horizon_days: int) -> float:
        """The share of those seen for long enough who did not come within the horizon; NaN of too few."""
        asked = self.seen >= horizon_days
        return float((self.days[asked] >= horizon_days).mean()) if asked.sum() >= FEWEST_ROWS else float("nan")

    def horizon(self) -> tuple[int, float] | None:
        """The horizon in whole weeks whose share is nearest to the aim, with the share; None where none comes near."""
        rates = {days: self.stayed_away(days) for days in range(STEP_DAYS, LONGEST_DAYS + 1, STEP_DAYS)}
        near = {days: rate for days, rate in rates.items() if abs(rate - AIM) <= NEAR}
        return min(near.items(), key=lambda each: abs(each[1] - AIM)) if near else None


def advice(truth: Truth, frame: pd.DataFrame, cuts: Cuts, base_rate: float) -> list[str]:
    """What to say of the horizon under a report of churn: nothing where the base rate is not above ``TOO_MANY``.

    Args:
        truth: what customers did.
        frame: the customers asked about, by ``customer_id`` and ``event_timestamp``.
        cuts: the moments of the experiment.
        base_rate: of the cuts that are reported.
    """
    if base_rate <= TOO_MANY:
        return []
    median, most = np.quantile(gaps(truth.visits), [0.5, 0.9])
    told = (
        f"The base rate of {base_rate:.0%} is high: {cuts.horizon_days} days without a visit are usual in this shop "
        f"(half of the gaps between two visits are longer than {median:.0f} days, one in ten longer than {most:.0f})."
    )
    returns = returned(truth.visits, frame, cuts)
    possible = ((cuts.final - cuts.start).days - MIN_HISTORY_DAYS) // 4
    if (found := returns.horizon()) is None:
        # the longest that the data can train on, in whole weeks
        longest = possible // STEP_DAYS * STEP_DAYS
        rate = returns.stayed_away(longest) if longest > cuts.horizon_days else float("nan")
        best = f"; the longest that can be trained, {longest} days, gives {rate:.0%}" if rate == rate else ""
        return [f"{told} No horizon that the data shows comes to {AIM - NEAR:.0%} to {AIM + NEAR:.0%}{best}: import a longer past."]
    days, rate = found
    if days > possible:
        need = days * 4 + MIN_HISTORY_DAYS
        return [
            f"{told} {days} days would give {rate:.0%}, which takes {need} days of data; with what there is {possible} days can be asked."
        ]
    return [
        f"{told} {days} days would give {rate:.0%}: try `--horizon {days}`; to keep it write `churn_horizon_days: {days}` under `shop:` "
        "in the mapping and import again."
    ]


def returned(visits: pd.DataFrame, frame: pd.DataFrame, cuts: Cuts) -> Returns:
    """When the customers of *frame* came again after each cut."""
    asked = frame[["customer_id", "event_timestamp"]].sort_values("event_timestamp")
    came = visits[["customer_id", "occurred_at"]].sort_values("occurred_at")
    asked["event_timestamp"], came["occurred_at"] = (
        pd.to_datetime(moments, utc=True).astype("datetime64[us, UTC]") for moments in (asked["event_timestamp"], came["occurred_at"])
    )
    # a visit exactly at the cut belongs to what follows it
    both = pd.merge_asof(asked, came, left_on="event_timestamp", right_on="occurred_at", by="customer_id", direction="forward")
    day = pd.Timedelta(days=1)
    days = ((both["occurred_at"] - both["event_timestamp"]) / day).fillna(np.inf)
    return Returns(days.to_numpy(dtype=float), ((pd.Timestamp(cuts.final) - both["event_timestamp"]) / day).to_numpy(dtype=float))


def gaps(visits: pd.DataFrame) -> NDArray[np.float64]:
    """The days between two purchases of one customer, those of one day aside."""
    days = visits.groupby("customer_id", sort=False)["occurred_at"].diff() / pd.Timedelta(days=1)
    found: NDArray[np.float64] = days[days >= 1].to_numpy(dtype=float)
    return found
