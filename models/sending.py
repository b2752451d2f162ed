"""By which channel, and at which hour, messages are answered: rates of all customers, and of one as far as they are known."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Rates = NDArray[np.float64]
SENDING = "sending.json"
"""The file of a home that holds the rates in force."""
HOURS = 168
"""The hours of a week; the first is Monday's first."""
BLOCK = 4
"""Hours of a day that one customer's answers are told apart by."""
LEAST_STRENGTH, MOST_STRENGTH = 0.5, 1e6


@dataclass(frozen=True)
class SendingRates:
    """What share of messages is answered, by channel and hour of the week.

    Attributes:
        hours: by channel a rate for each of the 168 hours.
        rates: by channel the rate of all its hours.
        strength: how many expected answers of one customer weigh as much as what holds for all (a of a gamma prior of mean 1).
        uses_hours: whether hours foretell more than the channel alone; where not, all hours of a channel are alike.
    """

    hours: Mapping[str, Rates]
    rates: Mapping[str, float]
    strength: float
    uses_hours: bool

    @classmethod
    def fit(
        cls, sent: Mapping[str, Rates], answered: Mapping[str, Rates], customers: Mapping[str, tuple[Rates, Rates]], uses_hours: bool
    ) -> SendingRates:
        """Fit from counts.

        Args:
            sent: by channel how many messages went out in each hour of the week.
            answered: likewise how many of them were answered.
            customers: by channel, of each customer, how many of their messages were answered, and how many were sent to them.
            uses_hours: whether to tell hours apart.
        """
        everything = sum(float(each.sum()) for each in sent.values())
        overall = sum(float(each.sum()) for each in answered.values()) / max(everything, 1.0)
        rates: dict[str, float] = {}
        hours: dict[str, Rates] = {}
        for channel, out in sent.items():
            # a channel that was hardly used is as good as all
            rates[channel] = float((answered[channel].sum() + 20.0 * overall) / (out.sum() + 20.0))
            hours[channel] = shrunk(answered[channel], out, rates[channel]) if uses_hours else np.full(HOURS, rates[channel])
        pairs = [(got, out * rates[channel]) for channel, (got, out) in customers.items()]
        got, expected = (np.concatenate([pair[k] for pair in pairs]) if pairs else np.zeros(0) for k in (0, 1))
        return cls(hours, rates, prior_strength(got, expected), uses_hours)

    def of(self, channel: str, own: Sequence[tuple[int, bool]] = ()) -> Rates:
        """The rate of each hour of the week for one customer, who was sent messages by that channel at these hours, answered or not."""
        pooled = self.hours.get(channel)
        if pooled is None:
            mean = float(np.mean(list(self.rates.values()))) if self.rates else 0.0
            pooled = np.full(HOURS, mean)
        if not own:
            return pooled
        at = np.array([hour for hour, _ in own])
        got = np.array([was for _, was in own], dtype=np.float64)
        expected = pooled[at]
        inclination = (got.sum() + self.strength) / (expected.sum() + self.strength)
        blocks = np.arange(HOURS) % 24 // BLOCK
        counted = np.bincount(blocks[at], weights=got, minlength=24 // BLOCK)
        foreseen = np.bincount(blocks[at], weights=expected * inclination, minlength=24 // BLOCK)
        told: Rates = pooled * inclination * ((counted + self.strength) / (foreseen + self.strength))[blocks]
        return np.clip(told, 0.0, 1.0)

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        said = {"hours": {name: list(rates) for name, rates in self.hours.items()}, "rates": dict(self.rates)}
        path.write_text(json.dumps({**said, "strength": self.strength, "uses_hours": self.uses_hours}))

    @classmethod
    def load(cls, path: Path) -> SendingRates:
        """Read what ``save`` wrote.

        Raises:
            ValueError: the file is damaged.
        """
        said: dict[str, Any] = json.loads(path.read_text())
        hours = {name: np.array(rates, dtype=np.float64) for name, rates in said["hours"].items()}
        if any(rates.shape != (HOURS,) or not np.isfinite(rates).all() for rates in hours.values()):
            raise ValueError(f"{path.name} does not tell {HOURS} rates a channel: fit it again (python -m training sending)")
        return cls(hours, said["rates"], float(said["strength"]), bool(said["uses_hours"]))


def shrunk(answered: Rates, sent: Rates, rate: float) -> Rates:
    """The rate of each hour, drawn to the channel's own as far as hours differ no more than chance makes them (beta-binomial moments)."""
    if sent.sum() == 0 or rate in (0.0, 1.0):
        return np.full(len(sent), rate)
    used = sent > 0
    observed = answered[used] / sent[used]
    spread = float(np.average((observed - rate) ** 2, weights=sent[used]))
    chance = float(np.average(rate * (1.0 - rate) / sent[used], weights=sent[used]))
    between = spread - chance
    # so many messages weigh as much as what holds for all hours
    worth = MOST_STRENGTH if between <= 0 else min(MOST_STRENGTH, rate * (1.0 - rate) / between)
    told: Rates = (answered + worth * rate) / (sent + worth)
    return told


def prior_strength(answered: Rates, expected: Rates) -> float:
    """The a of a gamma prior of mean 1 over customers' inclinations, by moments: Var(answered) = expected + expected^2 / a."""
    weight = float((expected**2).sum())
    excess = float(((answered - expected) ** 2 - expected).sum())
    if weight <= 0 or excess <= 0:
        return MOST_STRENGTH
    return float(np.clip(weight / excess, LEAST_STRENGTH, MOST_STRENGTH))


def log_loss(rates: Rates, answered: NDArray[np.bool_]) -> Rates:
    """The loss of each message: minus the logarithm of the chance that was given to what came."""
    held = np.clip(rates, 1e-6, 1 - 1e-6)
    loss: Rates = -np.where(answered, np.log(held), np.log1p(-held))
    return loss
