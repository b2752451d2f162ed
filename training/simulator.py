"""Lets a policy decide day by day in a simulated shop, and keeps what came of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from training.simulated_shop import HOURS, SENDING_MINOR, Floats, Ints, Mask, Observed, Wares, World, is_weekend

MEMORY = 28
"""For how many days back it is told who was sent a message."""


class Picks(NamedTuple):
    """Who is sent what: one row a message, no customer twice.

    ``cells`` are hours of the week, ``propensities`` the chances of the choices, given that a message goes out.
    """

    customers: Ints
    offers: Ints
    channels: Ints
    cells: Ints
    propensities: Floats


@dataclass
class ShopView:
    """What a policy is told on a day: nothing of traits, of the true response or of what will be.

    Attributes:
        open: by which channels each customer may be written to now.
        answered: which offers each has answered; these are over for them.
        sent: who was sent a message, ``(customers, MEMORY)``, yesterday first.
    """

    day: int
    observed: Observed
    wares: Wares
    open: Mask
    answered: Mask
    sent: Mask

    def may(self) -> tuple[Ints, Mask]:
        """The offers in force, and which may go by which channel to whom, ``(customers, those offers, channels)``."""
        now = self.wares.in_force(self.day)
        return now, ~self.answered[:, now, None] & self.wares.channels[now] & self.open[:, None, :]


COLUMNS = (
    "day", "customer", "offer", "channel", "cell", "propensity", "sent_7", "sent_28", "since", "probability", "answered", "left",
)  # fmt: skip
"""What is kept of a message; ``probability`` is the true one, and kept from policies."""
Record = dict[str, NDArray[Any]]


@dataclass
class SimulatedRun:
    """What became of one policy.

    Attributes:
        profit, sending: by customer, in minor units; the profit is after sending.
        record: one array a column of ``COLUMNS``, one row a message.
        view: as things stood at the end.
    """

    profit: Floats
    sending: Floats
    record: Record
    view: ShopView


class OfferPolicy(Protocol):
    """Decides every day who is sent what."""

    name: str

    def decide(self, view: ShopView, rng: np.random.Generator) -> Picks:
        """What goes out on the view's day."""
        ...


def first_view(world: World) -> ShopView:
    """How things stand before the first message."""
    n = len(world.permitted)
    return ShopView(
        0, world.observed, world.wares, world.permitted.copy(), np.zeros((n, len(world.wares.margin)), bool), np.zeros((n, MEMORY), bool)
    )


def run(
    world: World, policy: OfferPolicy, view: ShopView, days: int, told: Callable[[Record], None] | None = None, draws: int = 0
) -> SimulatedRun:
    """Let *policy* decide for so many days from *view* on, which is left as it was.

    Whether a customer answers, or leaves, on a day is drawn by one number of that customer and day, the same for every policy.

    Args:
        told: is given each week's messages, without what policies may not know.
        draws: another number gives other draws in the same world.

    Raises:
        ValueError: the policy sends what may not be sent.
    """
    view = replace(view, open=view.open.copy(), answered=view.answered.copy(), sent=view.sent.copy())
    profit, sending = np.zeros(len(view.open)), np.zeros(len(view.open))
    kept: list[Record] = []
    start = view.day
    for day in range(start, start + days):
        view.day = day
        chance = np.random.default_rng([world.seed, 1 + draws, day])
        of_answer, of_leaving = chance.random((2, len(profit)))
        picks = policy.decide(view, np.random.default_rng([world.seed, 1 + draws, day, 1]))
        who, what, how = picks.customers, picks.offers, picks.channels
        _refuse(view, picks)
        sent = view.sent[who]
        probability = world.probability(who, what, how, picks.cells, sent)
        answers, leaves = of_answer[who] < probability, of_leaving[who] < world.leaving(who, sent)
        kept.append({
            "day": np.full(len(who), day), "customer": who, "offer": what, "channel": how, "cell": picks.cells,
            "propensity": picks.propensities, **told_of(sent), "probability": probability, "answered": answers, "left": leaves,
        })  # fmt: skip
        sending[who] += SENDING_MINOR[how]
        profit[who] += answers * world.wares.net[what] - SENDING_MINOR[how]
        view.answered[who[answers], what[answers]] = True
        view.open[who[leaves], how[leaves]] = False
        view.sent[:, 1:] = view.sent[:, :-1].copy()
        view.sent[:, 0] = False
        view.sent[who, 0] = True
        if told is not None and (day + 1 - start) % 7 == 0:
            told({name: values for name, values in joined(kept[-7:]).items() if name != "probability"})
    view.day = start + days
    return SimulatedRun(profit, sending, joined(kept), view)


def told_of(sent: Mask) -> Record:
    """What the messages of the last days come to, in numbers that a log tells too."""
    since = np.where(sent.any(axis=1), sent.argmax(axis=1) + 1, MEMORY + 1)
    return {"sent_7": sent[:, :7].sum(axis=1), "sent_28": sent.sum(axis=1), "since": since}


def joined(records: Sequence[Record]) -> Record:
    """Records below each other."""
    return {name: np.concatenate([each[name] for each in records]) for name in COLUMNS if name in records[0]}


def _refuse(view: ShopView, picks: Picks) -> None:
    """Raise on what may not be sent."""
    if len(np.unique(picks.customers)) < len(picks.customers):
        raise ValueError("a customer is sent two messages on one day")
    now, may = view.may()
    place = np.full(len(view.wares.margin), -1)
    place[now] = np.arange(len(now))
    if (place[picks.offers] < 0).any() or not may[picks.customers, place[picks.offers], picks.channels].all():
        raise ValueError("an offer goes to a customer, by a channel or on a day on which it may not")
    if (picks.cells // len(HOURS) != is_weekend(view.day)).any():
        raise ValueError("a message goes out at an hour of another day")
