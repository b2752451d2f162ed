"""A simulated shop: customers whose true response to offers is known, so that policies can be judged against an oracle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]
Mask = NDArray[np.bool_]
CHANNELS = ("email", "sms", "push", "mail", "call_centre")
SENDING_MINOR = np.array([1.0, 7.0, 1.0, 85.0, 400.0])
"""What a message costs by channel, in minor units."""
HOURS = np.arange(8, 22)
"""At which full hours of a day messages go out."""
CATEGORIES, TYPES = 6, 3
WINDOW = 7
"""Days after which a message tires nobody any more."""


@dataclass(frozen=True)
class Traits:
    """What customers are really like; of all policies only the oracle knows it. One row a customer.

    Attributes:
        warmth: how readily they answer at all.
        taste: for each category, ``(customers, categories)``.
        reach: for each channel, ``(customers, channels)``.
        thrift: how much a benefit counts for them.
        peak: the hour at which they answer most readily; later at weekends.
        tire: how much a message tires them, above 0.
        capacity: how many messages a week they put up with, 2 to 5.
    """

    warmth: Floats
    taste: Floats
    reach: Floats
    thrift: Floats
    peak: Floats
    tire: Floats
    capacity: Floats


@dataclass(frozen=True)
class Observed:
    """What a shop sees of its customers: noisy traces of their traits. One row a customer.

    Attributes:
        purchases: of a year, ``(customers, categories)``.
        opens: of the last 20 messages by each channel, ``(customers, channels)``.
        bargains: of the last 15 purchases, those at a discount.
        visits: by hour of the week, ``(customers, cells)``; see ``cell_of``.
        recency: days since the last purchase.
    """

    purchases: Floats
    opens: Floats
    bargains: Floats
    visits: Floats
    recency: Floats


@dataclass(frozen=True)
class Wares:
    """The offers. One row an offer.

    Attributes:
        margin, cost: what an answer brings, and what its benefit costs, in minor units.
        lever: the shop's own weight.
        category, type: codes.
        depth: the benefit's share of the margin.
        appeal: how much it draws everybody; what learns never reads it.
        channels: by which it may go, ``(offers, channels)``.
        first, last: the days on which it is in force, both included.
    """

    margin: Floats
    cost: Floats
    lever: Floats
    category: Ints
    type: Ints
    depth: Floats
    appeal: Floats
    channels: Mask
    first: Ints
    last: Ints

    @property
    def net(self) -> Floats:
        """What an answer brings after the benefit, in minor units."""
        return self.margin - self.cost

    def in_force(self, day: int) -> Ints:
        """Positions of those in force."""
        return np.flatnonzero((self.first <= day) & (day <= self.last))


class Family(Protocol):
    """A form of the true response: how traits, offer, channel, hour and fatigue make a probability."""

    name: str

    def at_rest(self, traits: Traits, wares: Wares) -> Floats:
        """The strength of the response before hour and fatigue, ``(customers, offers, channels)``."""
        ...

    def by_hour(self, traits: Traits, weekend: bool) -> Floats:
        """What each hour does to it, ``(customers, hours)``."""
        ...

    def load(self, sent: Mask) -> Floats:
        """How much the messages of the last ``WINDOW`` days weigh; the last axis is days, yesterday first."""
        ...

    def tired(self, traits: Traits, load: Floats) -> Floats:
        """The share of the response that is left, ``(customers, loads)``; exact up to the form of ``probability``."""
        ...

    def probability(self, strength: Floats, hour: Floats, tired: Floats) -> Floats:
        """The probability of an answer; the arguments broadcast."""
        ...

    def leaving(self, traits: Traits, load: Floats) -> Floats:
        """The chance that a message leads to unsubscribing from its channel, ``(customers, loads)``."""
        ...


class LogitFamily:
    """Log-odds that add up, with fatigue that fades exponentially. Every constant of a policy is chosen on this family alone."""

    name = "tuning"
    _kernel = np.exp(-np.arange(WINDOW) / 2.5)
    _channel = np.array([0.0, 0.35, -0.1, 0.5, 1.0])

    def at_rest(self, traits: Traits, wares: Wares) -> Floats:
        """Log-odds."""
        person = traits.warmth[:, None] + 0.8 * traits.taste[:, wares.category] + traits.thrift[:, None] * 1.5 * (wares.depth - 0.4)
        return (-4.8 + person + 0.5 * wares.appeal + 0.8 * wares.depth)[:, :, None] + (self._channel + 0.7 * traits.reach)[:, None, :]

    def by_hour(self, traits: Traits, weekend: bool) -> Floats:
        """Log-odds to add."""
        away = HOURS - (traits.peak + 1.5 * weekend)[:, None]
        return 0.9 * np.exp(-(away**2) / 18.0) - 0.5 + 0.1 * weekend

    def load(self, sent: Mask) -> Floats:
        """Messages, each weighing less by the day."""
        return np.asarray(sent @ self._kernel)

    def tired(self, traits: Traits, load: Floats) -> Floats:
        """The factor of the odds."""
        return np.asarray(np.exp(-0.35 * traits.tire[:, None] * load))

    def probability(self, strength: Floats, hour: Floats, tired: Floats) -> Floats:
        """Logistic."""
        return np.asarray(1.0 / (1.0 + np.exp(-(strength + hour)) / tired))

    def leaving(self, traits: Traits, load: Floats) -> Floats:
        """Logistic in the load."""
        return np.asarray(1.0 / (1.0 + np.exp(6.2 - 0.6 * traits.tire[:, None] * load)))


class ThresholdFamily:
    """An answer where a noisy wish passes a threshold; hours multiply, and patience ends at a weekly capacity. Nothing is tuned on it."""

    name = "unseen"
    _channel = np.array([0.0, 0.15, -0.05, 0.25, 0.45])

    def at_rest(self, traits: Traits, wares: Wares) -> Floats:
        """A probit with interactions: taste counts more by a channel that reaches the customer, price more for the thrifty."""
        taste = traits.taste[:, wares.category]
        price = 0.35 * np.log(wares.margin / 800.0) * (1.0 - wares.depth)
        wish = (
            -2.35 + 0.4 * traits.warmth[:, None] + 0.3 * taste + 0.2 * wares.appeal - np.maximum(0.6 + traits.thrift, 0.0)[:, None] * price
        )
        reach = self._channel + 0.25 * traits.reach
        both = 0.15 * np.maximum(taste, 0.0)[:, :, None] * traits.reach[:, None, :]
        return _normal_cdf(wish[:, :, None] + reach[:, None, :] + both)

    def by_hour(self, traits: Traits, weekend: bool) -> Floats:
        """A factor with a narrow peak."""
        away = HOURS - (traits.peak + 1.5 * weekend)[:, None]
        return 0.6 + 0.9 * np.exp(-(away**2) / 8.0)

    def load(self, sent: Mask) -> Floats:
        """The messages of seven days."""
        return np.asarray(sent.sum(axis=-1), np.float64)

    def tired(self, traits: Traits, load: Floats) -> Floats:
        """A step: from the capacity on little is left."""
        return np.where(load < traits.capacity[:, None], 1.0, 0.3)

    def probability(self, strength: Floats, hour: Floats, tired: Floats) -> Floats:
        """The product, below 0.95."""
        return np.asarray(np.minimum(strength * hour * tired, 0.95))

    def leaving(self, traits: Traits, load: Floats) -> Floats:
        """A step at the capacity."""
        return np.where(load < traits.capacity[:, None], 0.002, 0.025)


def _normal_cdf(values: Floats) -> Floats:
    from scipy.special import ndtr

    return np.asarray(ndtr(values))


@dataclass(frozen=True)
class World:
    """Customers and offers of one seed under one family of responses.

    Attributes:
        strength: the family's ``at_rest`` of all, ``(customers, offers, channels)``.
        hours: its ``by_hour``, ``(2, customers, hours)``: working days, weekends.
        permitted: by which channels each customer may be written to at first.
    """

    seed: int
    family: Family
    traits: Traits
    observed: Observed
    wares: Wares
    permitted: Mask
    strength: Floats
    hours: Floats

    @classmethod
    def drawn(cls, family: Family, seed: int, customers: int, days: int, offers: int = 30, traces: int = 1) -> World:
        """Draw customers and offers; the same seed gives the same, whatever the family; *traces* times as much is observed."""
        rng = np.random.default_rng([seed, 0])
        n = customers
        traits = Traits(
            rng.normal(0, 0.6, n), rng.normal(0, 1, (n, CATEGORIES)), rng.normal(0, 1, (n, len(CHANNELS))), rng.normal(0, 0.5, n),
            np.clip(np.where(rng.random(n) < 0.4, rng.normal(10, 1.5, n), rng.normal(18.5, 2, n)), 8, 21),
            rng.lognormal(0, 0.4, n), rng.choice([2.0, 3.0, 4.0, 5.0], n, p=[0.25, 0.35, 0.25, 0.15]),
        )  # fmt: skip
        wares, permitted = _wares(rng, offers, days), rng.random((n, len(CHANNELS))) < np.array([0.85, 0.55, 0.5, 0.75, 0.35])
        hours = np.stack([family.by_hour(traits, weekend) for weekend in (False, True)])
        return cls(seed, family, traits, _observed(rng, traits, traces), wares, permitted, family.at_rest(traits, wares), hours)

    def probability(self, customers: Ints, offers: Ints, channels: Ints, cells: Ints, sent: Mask) -> Floats:
        """The true probability of an answer, one for each row of the arguments; *sent* is the customers' last days, yesterday first."""
        family, traits = self.family, rows_of(self.traits, customers)
        tired = family.tired(traits, family.load(sent[:, :WINDOW])[:, None])[:, 0]
        hour = self.hours[cells // len(HOURS), customers, cells % len(HOURS)]
        return family.probability(self.strength[customers, offers, channels], hour, tired)

    def leaving(self, customers: Ints, sent: Mask) -> Floats:
        """The true chance that a message makes each of *customers* unsubscribe from its channel."""
        return self.family.leaving(rows_of(self.traits, customers), self.family.load(sent[:, :WINDOW])[:, None])[:, 0]


def rows_of(traits: Traits, customers: Ints) -> Traits:
    """The traits of some customers."""
    return Traits(**{name: values[customers] for name, values in vars(traits).items()})


def is_weekend(day: int) -> bool:
    """Day 0 is a Monday."""
    return day % 7 >= 5


def cell_of(day: int, hours: Ints) -> Ints:
    """The hour of the week: positions in ``HOURS`` of a working day, then those of a weekend."""
    return np.asarray(hours + len(HOURS) * is_weekend(day))


def _wares(rng: np.random.Generator, count: int, days: int) -> Wares:
    margin, depth = np.clip(rng.lognormal(np.log(800), 0.5, count), 250, 3_000), rng.uniform(0.05, 0.8, count)
    length = rng.integers(28, 57, count)
    # evenly spread, so that on no day nothing is in force
    first = np.linspace(-14, days - 14, count).astype(np.intp)[rng.permutation(count)]
    channels = rng.random((count, len(CHANNELS))) < 0.65
    channels[np.arange(count), rng.integers(0, 3, count)] = True
    kind = rng.integers(0, TYPES, count)
    appeal = rng.normal(0, 0.8, count) + np.array([-0.3, 0.0, 0.3])[kind]
    category = rng.integers(0, CATEGORIES, count)
    return Wares(margin, margin * depth, np.ones(count), category, kind, depth, appeal, channels, first, first + length)


def _observed(rng: np.random.Generator, traits: Traits, traces: int) -> Observed:
    n = len(traits.warmth)
    purchases = rng.poisson(traces * np.exp(1.0 + 0.4 * traits.warmth[:, None] + 0.6 * traits.taste))
    opens = rng.binomial(20 * traces, 1 / (1 + np.exp(1.2 - 0.4 * traits.warmth[:, None] - 0.8 * traits.reach)))
    bargains = rng.binomial(15 * traces, 1 / (1 + np.exp(0.5 - 1.2 * traits.thrift)))
    away = np.concatenate([HOURS - traits.peak[:, None], HOURS - traits.peak[:, None] - 1.5], axis=1)
    often = (0.25 + np.exp(-(away**2) / 14.0)) * np.repeat([5.0, 2.0], len(HOURS))
    visits = rng.multinomial(rng.poisson(35 * traces, n), often / often.sum(axis=1, keepdims=True))
    recency = rng.exponential(25 * np.exp(-0.6 * traits.warmth))
    return Observed(*(np.asarray(each, np.float64) for each in (purchases, opens, bargains, visits, recency)))
