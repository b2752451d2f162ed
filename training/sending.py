"""The sending job: by which channel and at which hour customers answer, learnt from what was sent and answered."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import NamedTuple

import numpy as np
import pandas as pd

from features.catalogue.shop import Shop
from features.people.consent import LEARNING
from features.state.disk import make_folder, move_into_place
from features.state.home import Home
from features.store.timeline import open_timeline
from models.sending import HOURS, SENDING, Rates, SendingRates, log_loss
from training.dataset import NothingToLearnError
from training.metrics import bootstrap

ANSWERS = ("message_click", "offer_accept", "offer_redeem", "select_promotion")
WITHIN_DAYS = 7
"""Within how many days an answer counts."""
TEST_DAYS = 28
"""The last days of messages, on which hours are compared with the channel alone."""
LEAST_MESSAGES = 200
LEAST_GAIN = 1e-6
"""Log loss that a message must save: less is rounding."""
NO_MESSAGES = (
    "{number} messages were sent of which it is known whether they were answered, and {least} are needed: import message_sent, and "
    "message_click or offer_redeem with the same campaign_id or decision_id"
)


class SendingReport(NamedTuple):
    """What was fitted, and how it was judged.

    Attributes:
        rates: in force now.
        messages, answered: how many by channel.
        gain: how much less was lost a message with hours than with channels alone, on the last days; with its 95% interval.
    """

    rates: SendingRates
    messages: dict[str, int]
    answered: dict[str, int]
    gain: tuple[float, float, float] | None


@dataclass(frozen=True)
class Sent:
    """Messages whose time to be answered has passed.

    Attributes:
        frame: ``customer_id, channel, hour`` (of the week), ``answered``, ``at``.
    """

    frame: pd.DataFrame

    @classmethod
    def read(cls, home: Home, until: datetime) -> Sent:
        """Those before *until* of customers from whom may be learnt."""
        zone = Shop.load(home).timezone
        opened = open_timeline(home, identified_by=until, purposes=LEARNING)
        con = opened.events.get_backend().con
        told = {"until": until - timedelta(days=WITHIN_DAYS), "zone": zone, "answers": list(ANSWERS), "within": timedelta(days=WITHIN_DAYS)}
        return cls(con.execute(_SENT, told).df())

    def counts(self) -> tuple[dict[str, Rates], dict[str, Rates], dict[str, tuple[Rates, Rates]]]:
        """By channel: messages and answers by hour of the week; answers and messages of each customer."""
        sent: dict[str, Rates] = {}
        answered: dict[str, Rates] = {}
        customers: dict[str, tuple[Rates, Rates]] = {}
        for channel, part in self.frame.groupby("channel"):
            hours, got = part["hour"].to_numpy(int), part["answered"].to_numpy(float)
            sent[str(channel)] = np.bincount(hours, minlength=HOURS).astype(np.float64)
            answered[str(channel)] = np.bincount(hours, weights=got, minlength=HOURS).astype(np.float64)
            each = part.groupby("customer_id")["answered"].agg(["sum", "count"])
            customers[str(channel)] = each["sum"].to_numpy(float), each["count"].to_numpy(float)
        return sent, answered, customers

    def fit(self, uses_hours: bool) -> SendingRates:
        """The rates of these messages."""
        return SendingRates.fit(*self.counts(), uses_hours)


def fit_rates(home: Home, until: datetime, seed: int = 0) -> SendingReport:
    """Fit the rates and put them in force; hours are told apart only where that foretells the last messages better.

    Raises:
        NothingToLearnError: there are too few messages.
    """
    sent = Sent.read(home, until)
    if len(sent.frame) < LEAST_MESSAGES:
        raise NothingToLearnError(NO_MESSAGES.format(number=len(sent.frame), least=LEAST_MESSAGES))
    gain = _gain(sent, seed)
    rates = sent.fit(uses_hours=gain is not None and gain[1] > LEAST_GAIN)
    make_folder(home.root)
    part = home.root / f".{SENDING}.{os.getpid()}.part"
    rates.save(part)
    move_into_place(part, home.root / SENDING)
    by_channel = sent.frame.groupby("channel")["answered"]
    messages = {str(k): int(v) for k, v in by_channel.count().items()}
    return SendingReport(rates, messages, {str(k): int(v) for k, v in by_channel.sum().items()}, gain)


def _gain(sent: Sent, seed: int) -> tuple[float, float, float] | None:
    """How much less is lost on the last days with hours: the mean and its interval over customers; None where they hold nothing."""
    frame = sent.frame
    cut = frame["at"].max() - pd.Timedelta(days=TEST_DAYS)
    # an answer to what was sent just before may come after: those days are left out
    before, after = frame[frame["at"] < cut - pd.Timedelta(days=WITHIN_DAYS)], frame[frame["at"] >= cut]
    if len(before) < LEAST_MESSAGES or after.empty:
        return None
    losses = []
    for uses_hours in (False, True):
        fitted = Sent(before).fit(uses_hours)
        rates = np.array([fitted.of(c)[h] for c, h in zip(after["channel"], after["hour"], strict=True)])
        losses.append(log_loss(rates, after["answered"].to_numpy(bool)))
    saved = losses[0] - losses[1]
    value, drawn = bootstrap(after["customer_id"].tolist(), lambda w: np.array([np.average(saved, weights=w)]), seed=seed)
    low, high = np.quantile(drawn[:, 0], [0.025, 0.975])
    return float(value[0]), float(low), float(high)


_SENT = """
WITH sent AS (
  SELECT customer_id, channel, campaign_id, decision_id, occurred_at,
         (isodow(timezone($zone, occurred_at)) - 1) * 24 + hour(timezone($zone, occurred_at)) AS hour
  FROM events WHERE name = 'message_sent' AND channel IS NOT NULL AND customer_id IS NOT NULL AND occurred_at < $until
), answers AS (
  SELECT customer_id, campaign_id, decision_id, occurred_at FROM events
  WHERE name IN (SELECT unnest($answers)) AND (campaign_id IS NOT NULL OR decision_id IS NOT NULL)
)
SELECT s.customer_id, s.channel, s.hour, s.occurred_at AS at,
       EXISTS (SELECT 1 FROM answers AS a WHERE a.customer_id = s.customer_id AND a.occurred_at >= s.occurred_at
               AND a.occurred_at < s.occurred_at + $within
               AND CASE WHEN a.decision_id IS NOT NULL AND s.decision_id IS NOT NULL THEN a.decision_id = s.decision_id
                        ELSE a.campaign_id = s.campaign_id END) AS answered
FROM sent AS s ORDER BY s.occurred_at, s.customer_id
"""
