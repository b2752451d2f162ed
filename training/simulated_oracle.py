"""The oracle of a simulated shop: knows every true probability, and plans ahead for each customer."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.simulated_shop import CHANNELS, HOURS, SENDING_MINOR, WINDOW, Floats, Ints, Mask, World, is_weekend, rows_of
from training.simulator import Picks, Record, ShopView

_Singles = NDArray[np.float32]
STATES = 1 << WINDOW
"""On which of the last days a message was sent: bit 0 is yesterday."""
_NEVER = -1e9


class Oracle:
    """For each customer a dynamic programme over the true fatigue and the days that are left, with every offer to come known.

    The state is on which of the last ``WINDOW`` days a message was sent, which is all that fatigue depends on. Not exact in three things:
    while it plans, fatigue multiplies the probability (under the logit family it multiplies the odds); losing a channel is priced by what
    the plan is worth without it, for a rested customer, and only one channel is lost at a time; an offer leaves the plan once it is
    answered, not for the chance that it will be. What is sent on a day is chosen by exact probabilities; no draw is known.
    """

    name = "oracle"

    def __init__(self, world: World, view: ShopView, days: int) -> None:
        self._world, self._start, self._end = world, view.day, view.day + days
        self._hours = world.hours.argmax(axis=2)
        best = world.hours.max(axis=2)[:, :, None, None]
        # by working day and weekend: net of the benefit, at the best hour, of a rested customer
        self._bring = world.family.probability(world.strength[None], best, np.ones(1)) * world.wares.net[:, None]
        n = len(view.open)
        self._value: _Singles = np.zeros((days + 1, n, STATES), np.float32)
        self._loss: _Singles = np.zeros((days + 1, n, len(CHANNELS)), np.float32)
        self._known = view.open.copy(), view.answered.copy()
        self._plan(np.arange(n), view)

    def decide(self, view: ShopView, rng: np.random.Generator) -> Picks:
        """The best message to each customer for whom it brings more than it takes from the days to come."""
        changed = (view.open != self._known[0]).any(axis=1) | (view.answered != self._known[1]).any(axis=1)
        self._plan(np.flatnonzero(changed), view)
        self._known = view.open.copy(), view.answered.copy()
        world, everyone, later = self._world, np.arange(len(view.open)), view.day + 1 - self._start
        now, may = view.may()
        load = world.family.load(view.sent[:, :WINDOW])[:, None]
        hours = self._hours[int(is_weekend(view.day))]
        hour = world.hours[int(is_weekend(view.day)), everyone, hours]
        tired = world.family.tired(world.traits, load)
        probability = world.family.probability(world.strength[:, now], hour[:, None, None], tired[:, :, None])
        score = probability * world.wares.net[now, None] - SENDING_MINOR
        score -= world.family.leaving(world.traits, load)[:, :, None] * self._loss[later][:, None, :]
        score = np.where(may, score, _NEVER).reshape(len(everyone), -1)
        best = score.argmax(axis=1)
        state = (view.sent[:, :WINDOW] @ (1 << np.arange(WINDOW))).astype(np.intp)
        rests, goes = (state << 1) % STATES, ((state << 1) | 1) % STATES
        value = self._value[later]
        sends = score[everyone, best] + value[everyone, goes] > value[everyone, rests]
        who = np.flatnonzero(sends & (score[everyone, best] > _NEVER))
        what, how = np.divmod(best[who], len(CHANNELS))
        cells = hours[who] + world.hours.shape[2] * is_weekend(view.day)
        return Picks(who, now[what], how, cells, np.ones(len(who)))

    def _plan(self, rows: Ints, view: ShopView) -> None:
        """Solve for some customers, from the last day back to the view's."""
        if not len(rows):
            return
        family, traits = self._world.family, rows_of(self._world.traits, rows)
        states = np.arange(STATES)
        loads, level = np.unique(family.load((states[:, None] >> np.arange(WINDOW)) % 2 == 1).round(1), return_inverse=True)
        left = family.tired(traits, loads[None, :]).astype(np.float32)
        leaving = family.leaving(traits, loads[None, :]).astype(np.float32)
        # the first with every channel, then without each in turn
        values = np.zeros((1 + len(CHANNELS), len(rows), STATES), np.float32)
        self._value[-1, rows] = 0.0
        for day in range(self._end - 1, view.day - 1, -1):
            loss = np.maximum(values[0, :, 0] - values[1:, :, 0], 0.0)
            bring = self._reach(day, rows, view)
            gains = bring.T[:, :, None] * left - SENDING_MINOR[:, None, None].astype(np.float32) - leaving * loss[:, :, None]
            values = np.maximum(
                values[:, :, (states << 1) % STATES], _without(gains)[:, :, level] + values[:, :, ((states << 1) | 1) % STATES]
            )
            self._value[day - self._start, rows] = values[0]
            self._loss[day - self._start, rows] = np.maximum(values[0, :, 0] - values[1:, :, 0], 0.0).T

    def _reach(self, day: int, rows: Ints, view: ShopView) -> _Singles:
        """What the best offer of a day brings by each channel to a rested customer, ``(rows, channels)``."""
        now = self._world.wares.in_force(day)
        may: Mask = ~view.answered[np.ix_(rows, now)][:, :, None] & self._world.wares.channels[now] & view.open[rows][:, None, :]
        bring: Floats = self._bring[int(is_weekend(day))][np.ix_(rows, now)]
        return np.asarray(np.where(may, bring, _NEVER).max(axis=1, initial=_NEVER), np.float32)


class TrueKnowledge:
    """The true probabilities, for a policy that would otherwise have to learn them: what is lost beyond them is lost in deciding."""

    def __init__(self, world: World) -> None:
        self._world = world

    def fit(self, log: Record) -> None:
        """There is nothing to learn."""

    def recount(self, log: Record) -> None:
        """There is nothing to learn."""

    def best_cells(self, weekend: bool) -> Ints:
        """Each customer's hour of the week."""
        return np.asarray(self._world.hours[int(weekend)].argmax(axis=1) + len(HOURS) * weekend)

    def probability(self, offers: Ints, cells: Ints, sent: Mask) -> Floats:
        """The true one, ``(customers, offers, channels)``."""
        world = self._world
        tired = world.family.tired(world.traits, world.family.load(sent[:, :WINDOW])[:, None])
        hour = world.hours[cells // len(HOURS), np.arange(len(cells)), cells % len(HOURS)]
        return world.family.probability(world.strength[:, offers], hour[:, None, None], tired[:, :, None])

    def leaving(self, sent: Mask) -> Floats:
        """The true one."""
        return self._world.leaving(np.arange(len(sent)), sent)


def _without(gains: _Singles) -> NDArray[Any]:
    """The best over channels (the first axis), then the best without each of them."""
    best = gains.argmax(axis=0)
    top = gains.max(axis=0)
    rest = gains.copy()
    np.put_along_axis(rest, best[None], np.float32(_NEVER), axis=0)
    second = rest.max(axis=0)
    return np.stack([top, *(np.where(best == channel, second, top) for channel in range(len(gains)))])
