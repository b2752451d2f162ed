"""What a simulated shop can learn of its customers' answers, from what it sees and what it sent."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from models.probability import Logistic
from training.simulated_shop import CATEGORIES, CHANNELS, HOURS, SENDING_MINOR, TYPES, Floats, Ints, Mask, Observed, Wares
from training.simulator import Record, told_of

PAIR_COLUMNS = (
    "purchases", "opens", "bargains", "recency", "margin", "depth", "bought_in_category", "share_of_category", "bargain_for_the_thrifty",
    "opens_by_channel", "open_share", "reached_and_liked", "sending", *(f"type_{k}" for k in range(TYPES)),
    *CHANNELS,
)  # fmt: skip
"""The inputs of the first model: all from ``Observed``, the offers' terms and the log."""
MOST_SENT = 6
"""Messages of a week from which on one more is told no longer apart."""


def pair_rows(observed: Observed, wares: Wares, customers: Ints, offers: Ints, channels: Ints) -> Floats:
    """The inputs ``PAIR_COLUMNS``, one row for each of the index arrays."""
    bought, total = observed.purchases[customers, wares.category[offers]], observed.purchases.sum(axis=1)[customers]
    opened, opens = observed.opens[customers, channels], observed.opens.sum(axis=1)[customers]
    share, reached = (bought + 1.0) / (total + CATEGORIES), (opened + 1.0) / (opens + len(CHANNELS))
    bargains, depth = observed.bargains[customers], wares.depth[offers]
    parts = [
        total, opens, bargains, observed.recency[customers], wares.margin[offers], depth, bought, share, bargains * depth,
        opened, reached, bought * opened, SENDING_MINOR[channels],
    ]  # fmt: skip
    codes = [np.eye(TYPES)[wares.type[offers]], np.eye(len(CHANNELS))[channels]]
    return np.hstack([np.column_stack(parts), *codes])


class Learner:
    """Fits, in three steps, the chance of an answer to what a log holds.

    A logistic model of customer, offer and channel; upon it one of the hour and of what was sent lately; upon both, how many answers there
    were per answer foretold, shrunk to 1 (gamma-Poisson, empirical Bayes): for each count of a week's messages, each offer, each customer,
    and each customer with a channel and with a category. A few answers tell nobody's hour: inputs are the pooled rates of the hours of the
    week, and the customer's own visits by hour, shrunk to everyone's.
    """

    def __init__(self, observed: Observed, wares: Wares) -> None:
        self._observed, self._wares = observed, wares

    def fit(self, log: Record) -> None:
        """Learn all from *log*."""
        who, what, how, answered = log["customer"], log["offer"], log["channel"], log["answered"]
        # what policies choose again and again would outweigh what was drawn
        weights = np.clip(np.median(log["propensity"]) / log["propensity"], 0.5, 2.0)
        rows = pair_rows(self._observed, self._wares, who, what, how)
        model = Logistic.fit(rows, answered)
        n, k, c = len(self._observed.recency), len(self._wares.margin), len(CHANNELS)
        self._table = np.empty((n, k, c))
        for channel in range(c):
            people, offers = (each.ravel() for each in np.indices((n, k)))
            told = pair_rows(self._observed, self._wares, people, offers, np.full(n * k, channel))
            self._table[:, :, channel] = _logit(model.predict(told)).reshape(n, k)
        self._hours = self._hour_inputs(log)
        moment = self._moment_rows(self._table[who, what, how], self._hours[who, log["cell"]], log)
        self._moment = LogisticRegression(C=1.0, max_iter=1000).fit(moment, answered, sample_weight=weights)
        self._by_hour = self._hours @ self._moment.coef_[0, 1:3]
        self._leaving = _leaving_rates(log)
        self.recount(log)

    def recount(self, log: Record) -> None:
        """Count anew how many answers there were per answer foretold; the models stay."""
        who, what, how, answered = log["customer"], log["offer"], log["channel"], log["answered"]
        n, k, c = self._table.shape
        expected = self._moment.predict_proba(self._moment_rows(self._table[who, what, how], self._hours[who, log["cell"]], log))[:, 1]
        # nothing says that fatigue grows evenly
        self._of_sent = _factors(counts := np.minimum(log["sent_7"], MOST_SENT), answered, expected, MOST_SENT + 1)
        expected = expected * self._of_sent[counts]
        self._of_offer = _factors(what, answered, expected, k)
        expected = expected * self._of_offer[what]
        self._of_customer = _factors(who, answered, expected, n)
        expected = expected * self._of_customer[who]
        self._of_channel = _factors(who * c + how, answered, expected, n * c).reshape(n, c)
        expected = expected * self._of_channel[who, how]
        self._of_category = _factors(who * CATEGORIES + self._wares.category[what], answered, expected, n * CATEGORIES).reshape(
            n, CATEGORIES
        )

    def best_cells(self, weekend: bool) -> Ints:
        """Each customer's best hour of the week on such a day."""
        first = len(HOURS) * weekend
        return np.asarray(first + self._by_hour[:, first : first + len(HOURS)].argmax(axis=1))

    def leaving(self, sent: Mask) -> Floats:
        """The chance that one message more makes each customer unsubscribe."""
        return np.asarray(self._leaving[np.minimum(told_of(sent)["sent_7"], MOST_SENT)])

    def probability(self, offers: Ints, cells: Ints, sent: Mask) -> Floats:
        """The chance of an answer at *cells*, one a customer, after the messages *sent*: ``(customers, offers, channels)``."""
        hours = self._hours[np.arange(len(cells)), cells]
        rest = self._moment_rows(np.zeros(len(cells)), hours, told_of(sent)) @ self._moment.coef_[0] + self._moment.intercept_[0]
        rest = rest + np.log(self._of_sent[np.minimum(told_of(sent)["sent_7"], MOST_SENT)])
        odds = self._table[:, offers] * self._moment.coef_[0, 0] + rest[:, None, None]
        factor = self._of_offer[offers][:, None] * self._of_customer[:, None, None] * self._of_channel[:, None, :]
        factor = factor * self._of_category[:, self._wares.category[offers], None]
        return np.asarray(np.minimum(factor / (1.0 + np.exp(-odds)), 0.95))

    def _hour_inputs(self, log: Record) -> Floats:
        """Pooled log rate of each hour of the week, and the log lift of the customer's own visits, ``(customers, cells, 2)``."""
        cells = 2 * len(HOURS)
        pooled = np.log(_shrunk_rates(log["cell"], log["answered"], cells, np.zeros(cells, np.intp)))
        visits = self._observed.visits
        share = (visits.sum(axis=0) + 1.0) / (visits.sum() + cells)
        strength = _dirichlet_strength(visits, share)
        own = np.log((visits + strength * share) / ((visits.sum(axis=1, keepdims=True) + strength) * share))
        return np.stack([np.broadcast_to(pooled, own.shape), own], axis=2)

    @staticmethod
    def _moment_rows(table: Floats, hours: Floats, told: Record) -> Floats:
        """The second model's inputs: the first's log-odds, the hour, and what was sent lately."""
        return np.column_stack([table, hours, told["sent_7"] / 7.0, 1.0 / told["since"]])


def _logit(probability: Floats) -> Floats:
    clipped = np.clip(probability, 1e-5, 1 - 1e-5)
    return np.asarray(np.log(clipped / (1 - clipped)))


def _shrunk_rates(codes: Ints, answered: NDArray[Any], count: int, groups: Ints) -> Floats:
    """Rate of answers of each code, shrunk to that of its group."""
    total = float(answered.mean())
    expected = np.full(len(codes), total)
    of_group = _factors(groups[codes], answered, expected, int(groups.max()) + 1)
    return total * of_group[groups] * _factors(codes, answered, expected * of_group[groups[codes]], count)


def _factors(codes: Ints, answered: NDArray[Any], expected: Floats, count: int) -> Floats:
    """Answers per answer expected by code, shrunk to 1 as far as they vary no more than chance does.

    With a gamma prior of mean 1 and variance v, and answers Poisson: ``(answers + 1/v) / (expected + 1/v)``; v by moments,
    ``sum((answers - expected)^2 - expected) / sum(expected^2)``, at least 1/1000.
    """
    seen, hoped = np.bincount(codes, answered, count), np.bincount(codes, expected, count)
    variance = max(float(((seen - hoped) ** 2 - hoped).sum() / max((hoped**2).sum(), 1e-12)), 1e-3)
    return np.asarray((seen + 1.0 / variance) / (hoped + 1.0 / variance))


def _dirichlet_strength(counts: Floats, share: Floats) -> float:
    """How many visits everyone's shares weigh against a customer's own: by moments of a Dirichlet-multinomial."""
    totals = counts.sum(axis=1, keepdims=True)
    chance = totals * share * (1 - share)
    pairs = totals * (totals - 1) * share * (1 - share)
    correlation = float((((counts - totals * share) ** 2) - chance).sum() / max(pairs.sum(), 1e-12))
    return float(1.0 / np.clip(correlation, 1e-3, 0.999) - 1.0)


def _leaving_rates(log: Record) -> Floats:
    """The chance to unsubscribe over a message, by the messages of the week before, 0 to ``MOST_SENT``."""
    counts = np.minimum(log["sent_7"], MOST_SENT)
    rate = max(float(log["left"].mean()), 1e-5)
    return rate * _factors(counts, log["left"], np.full(len(counts), rate), MOST_SENT + 1)
