"""Policies of offers that are judged in a simulated shop: what ubiquo does, and simpler rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from models.slate import chances_of
from training.simulated_shop import CHANNELS, HOURS, SENDING_MINOR, Floats, Ints, Mask, is_weekend
from training.simulator import Picks, Record, ShopView, joined

ELSEWHERE = 0.05
"""The share of messages that go by a channel drawn from those that are open, as a service does."""
_NEVER = -1e18


@dataclass(frozen=True)
class Pacing:
    """What is chosen on the tuning family.

    Attributes:
        week: the most messages of a calendar week.
        patience: below which share of what a message would bring to the rested customer it waits.
        price: for how many messages more a channel is taken to be worth, should the customer unsubscribe.
    """

    week: int = 7
    patience: float = 0.0
    price: float = 0.0


class Exploring:
    """Messages on days drawn at random, offers by a softmax of what an answer brings, channel and hour evenly; every chance is kept."""

    name = "exploration"

    def decide(self, view: ShopView, rng: np.random.Generator) -> Picks:
        """One offer to those whose day it is."""
        now, may = view.may()
        # some are sent more than others, and each more in some weeks than in others: so it shows what messages do to the next
        often = np.random.default_rng([view.day // 7, len(view.open)]).uniform(0.1, 0.8, len(view.open))
        picks: list[tuple[int, int, int, int, float]] = []
        for who in np.flatnonzero(rng.random(len(view.open)) < often):
            offers = np.flatnonzero(may[who].any(axis=1))
            if not len(offers):
                continue
            chances = chances_of(view.wares.net[now[offers]], 1.0, 0.3)
            k = int(rng.choice(len(offers), p=chances))
            channels = np.flatnonzero(may[who, offers[k]])
            hour = int(rng.integers(len(HOURS)))
            chance = float(chances[k]) / len(channels) / len(HOURS)
            picks.append((int(who), int(now[offers[k]]), int(rng.choice(channels)), hour, chance))
        return _picks(picks, view)


class AtRandom:
    """An offer, a channel and an hour drawn evenly, one a day to everybody who may be written to."""

    name = "random"

    def decide(self, view: ShopView, rng: np.random.Generator) -> Picks:
        """One to each."""
        now, may = view.may()
        flat = may.reshape(len(may), -1)
        best = np.where(flat, rng.random(flat.shape), -1.0).argmax(axis=1)
        who = np.flatnonzero(flat.any(axis=1))
        what, how = np.divmod(best[who], len(CHANNELS))
        hours = rng.integers(len(HOURS), size=len(who)) + len(HOURS) * is_weekend(view.day)
        return Picks(who, now[what], how, hours, 1.0 / flat[who].sum(axis=1) / len(HOURS))


class Knowledge(Protocol):
    """What a policy goes by: what was learnt, or the truth."""

    def fit(self, log: Record) -> None:
        """Learn all anew."""
        ...

    def recount(self, log: Record) -> None:
        """Learn what is quickly learnt."""
        ...

    def best_cells(self, weekend: bool) -> Ints:
        """Each customer's hour of the week."""
        ...

    def probability(self, offers: Ints, cells: Ints, sent: Mask) -> Floats:
        """The chance of an answer, ``(customers, offers, channels)``."""
        ...

    def leaving(self, sent: Mask) -> Floats:
        """The chance to unsubscribe over a message, one a customer."""
        ...


class GovernedOffers:
    """What ubiquo does: probability x (margin - cost) x lever - sending, the best open channel but for a share left to chance, caps.

    The chance is that of the offer by that channel, so that the channel's response is in it. A message waits where the customer is tired,
    as far as the log tells what messages do to the next, and where unsubscribing would cost more than it brings. It learns every week.
    """

    name = "governed"
    capped = True

    def __init__(self, learner: Knowledge, log: Record, pacing: Pacing) -> None:
        self._learner, self._logs, self._pacing, self._weeks = learner, [log], pacing, 0

    def told(self, week: Record) -> None:
        """Learn from a week's messages: counts every week, models every fourth."""
        self._logs.append(week)
        self._weeks += 1
        log = joined(self._logs)
        if self._weeks % 4 == 0:
            self._learner.fit(log)
        else:
            self._learner.recount(log)

    def worth(self, probability: Floats, offers: Ints, view: ShopView) -> Floats:
        """What ranks, ``(customers, offers, channels)``."""
        return np.asarray(probability * (view.wares.net * view.wares.lever)[offers, None] - SENDING_MINOR)

    def decide(self, view: ShopView, rng: np.random.Generator) -> Picks:
        """The best offer by the best channel at the customer's hour, to those who may be sent one more and are not too tired."""
        now, may = view.may()
        cells = self._learner.best_cells(is_weekend(view.day))
        probability = self._learner.probability(now, cells, view.sent)
        score = np.where(may, self.worth(probability, now, view), _NEVER)
        by_channel = score.max(axis=1)
        offers = score.argmax(axis=1)
        sends = by_channel.max(axis=1) > _NEVER
        if self.capped:
            sends &= (by_channel.max(axis=1) > 0) & self._may_go(view, now, cells, may, by_channel)
        who = np.flatnonzero(sends)
        channels, chances = _by_channel(by_channel[who], rng, ELSEWHERE if self.capped else 0.0)
        return Picks(who, now[offers[who, channels]], channels, cells[who], chances)

    def _may_go(self, view: ShopView, now: Ints, cells: Ints, may: Mask, by_channel: Floats) -> Mask:
        """Whom the caps and the pacing let have a message today."""
        rested = self._learner.probability(now, cells, np.zeros_like(view.sent))
        fresh = np.where(may, self.worth(rested, now, view), _NEVER).max(axis=1)
        ordered = np.sort(fresh, axis=1)
        lost = np.where(ordered[:, -2] > 0, ordered[:, -1] - ordered[:, -2], ordered[:, -1])
        price = self._learner.leaving(view.sent) * self._pacing.price * np.maximum(lost, 0.0)
        this_week = view.sent[:, : view.day % 7].sum(axis=1)
        enough = by_channel.max(axis=1) - price >= self._pacing.patience * np.maximum(ordered[:, -1], 0.0)
        return np.asarray((this_week < self._pacing.week) & enough)


class HighestProbability(GovernedOffers):
    """The likeliest answer first, whatever it brings and costs; caps, pacing and the model are those of ``GovernedOffers``."""

    name = "highest-probability-first"

    def worth(self, probability: Floats, offers: Ints, view: ShopView) -> Floats:
        """The probability."""
        return probability


class LikeliestCheaply(HighestProbability):
    """The likeliest answer first, by channels that cost next to nothing: a rival whose loss is not in what it sends by."""

    name = "the same, cheap channels"
    _cheap = SENDING_MINOR < 10.0

    def worth(self, probability: Floats, offers: Ints, view: ShopView) -> Floats:
        """The probability, 0 by a channel that is not cheap."""
        return np.where(self._cheap, probability, 0.0)


class MarginRule(GovernedOffers):
    """Probability x margin, one a day: no cost, no cap."""

    name = "probability x margin"
    capped = False

    def worth(self, probability: Floats, offers: Ints, view: ShopView) -> Floats:
        """In minor units."""
        return np.asarray(probability * view.wares.margin[offers, None])


def _picks(rows: list[tuple[int, int, int, int, float]], view: ShopView) -> Picks:
    who, what, how, hours, chances = np.array(rows, np.float64).reshape(-1, 5).T
    cells = hours.astype(np.intp) + len(HOURS) * is_weekend(view.day)
    return Picks(who.astype(np.intp), what.astype(np.intp), how.astype(np.intp), cells, chances)


def _by_channel(by_channel: Floats, rng: np.random.Generator, elsewhere: float) -> tuple[Ints, Floats]:
    """The best channel, now and then one of those that are open and bring something, and the chance of it."""
    best = by_channel.argmax(axis=1)
    opened = by_channel > 0
    opened[np.arange(len(best)), best] = True
    order = np.where(opened, rng.random(opened.shape), -1.0).argmax(axis=1)
    drawn = np.where(rng.random(len(best)) < elsewhere, order, best)
    count = opened.sum(axis=1)
    return drawn, elsewhere / count + (1.0 - elsewhere) * (drawn == best)
