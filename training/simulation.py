"""Policies of offers compared in simulated shops: constants chosen on one family of responses, shares of an oracle's profit on both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits

from training.metrics import DRAWS, Estimate, Floats, estimates
from training.policies import AtRandom, Exploring, GovernedOffers, HighestProbability, LikeliestCheaply, MarginRule, Pacing
from training.simulated_learner import Learner
from training.simulated_oracle import Oracle, TrueKnowledge
from training.simulated_shop import Family, LogitFamily, ThresholdFamily, World
from training.simulator import OfferPolicy, Record, ShopView, SimulatedRun, first_view, run

SIMULATED = "SIMULATED customers, offers and answers: nothing here was measured on a real shop"
EXPLORED_WEEKS = 8
"""What was sent before the comparison begins, the same for every policy; its profit does not count."""
TUNING_SEEDS = (90_001, 90_002)
"""Worlds on which constants are chosen; none is ever judged on."""
ORACLE, GOVERNED, LIKELIEST = Oracle.name, GovernedOffers.name, HighestProbability.name
INFORMED = "governed, told the truth"
POLICIES = (ORACLE, INFORMED, GOVERNED, LIKELIEST, LikeliestCheaply.name, MarginRule.name, AtRandom.name)
PACINGS = (
    Pacing(3), Pacing(7, 0.4), Pacing(7, 0.5), Pacing(7, 0.6), Pacing(5, 0.4, 5.0), Pacing(5, 0.5, 5.0), Pacing(5, 0.5, 15.0),
    Pacing(4, 0.4, 5.0), Pacing(4, 0.5, 5.0), Pacing(4, 0.5, 15.0), Pacing(4, 0.3, 30.0), Pacing(3, 0.4, 15.0),
)  # fmt: skip
"""What is tried on the tuning family."""
NEARLY = 0.98
"""From which share of the best profit on pacings count as equal: of them the one that sends least is taken."""
Told = Callable[[str], None]


@dataclass(frozen=True)
class Past:
    """A world, the log of its exploration, what was learnt from that and from nothing else, and how things stand after it."""

    world: World
    log: Record
    view: ShopView
    learnt: Learner

    @classmethod
    def of(cls, family: Family, seed: int, customers: int, weeks: int, traces: int = 1) -> Past:
        """Draw a world, explore it, and learn."""
        world = World.drawn(family, seed, customers, 7 * (EXPLORED_WEEKS + weeks), traces=traces)
        explored = run(world, Exploring(), first_view(world), 7 * EXPLORED_WEEKS)
        log = {name: each for name, each in explored.record.items() if name != "probability"}
        learnt = Learner(explored.view.observed, explored.view.wares)
        learnt.fit(log)
        return cls(world, log, explored.view, learnt)

    def learner(self) -> Learner:
        """One to learn on with; what it learns replaces what it has, and changes no other."""
        return copy(self.learnt)

    def run(self, name: str, pacing: Pacing, weeks: int) -> SimulatedRun:
        """What becomes of the policy of that name in *weeks* weeks, in the draws that every policy meets."""
        policy: OfferPolicy
        if name == ORACLE:
            policy = Oracle(self.world, self.view, 7 * weeks)
        elif name == INFORMED:
            policy = GovernedOffers(TrueKnowledge(self.world), self.log, pacing)
        elif name == AtRandom.name:
            policy = AtRandom()
        else:
            kind = next(each for each in (GovernedOffers, HighestProbability, LikeliestCheaply, MarginRule) if each.name == name)
            policy = learning = kind(self.learner(), self.log, pacing)
            return run(self.world, policy, self.view, 7 * weeks, learning.told)
        return run(self.world, policy, self.view, 7 * weeks)


def tuned(customers: int, weeks: int, pacings: Sequence[Pacing] = PACINGS, traces: int = 1, told: Told = lambda step: None) -> Pacing:
    """The pacing of fewest messages of those that bring the governed policy nearly the most on the tuning family's own seeds.

    No other family can be given. Of what is nearly equal there, more messages would only strain what another family might not bear.
    """
    pasts = [Past.of(LogitFamily(), seed, customers, weeks, traces) for seed in TUNING_SEEDS]
    profits, messages = np.zeros(len(pacings)), np.zeros(len(pacings))
    for number, pacing in enumerate(pacings):
        told(f"simulated: pacing {number + 1} of {len(pacings)} on the tuning family")
        runs = [past.run(GOVERNED, pacing, weeks) for past in pasts]
        profits[number] = np.mean([each.profit.mean() for each in runs])
        messages[number] = sum(len(each.record["day"]) for each in runs)
    good = profits >= profits.max() - (1.0 - NEARLY) * abs(profits.max())
    return pacings[int(np.argmin(np.where(good, messages, np.inf)))]


@dataclass(frozen=True)
class Standings:
    """What the policies brought under one family, in all its worlds.

    Attributes:
        rows: one a world and policy: means a customer, in minor units, over all weeks; ``messages`` are by customer and week.
        shares: by policy, of the oracle's profit.
        above: by policy, how much more the governed policy brought a customer, in minor units; paired.
    """

    family: str
    rows: pd.DataFrame
    shares: Mapping[str, Estimate]
    above: Mapping[str, Estimate]


def stand(
    family: Family, pacing: Pacing, seeds: Sequence[int], customers: int, weeks: int, traces: int = 1, told: Told = lambda step: None
) -> Standings:
    """Run every policy in the worlds of *seeds*.

    Raises:
        ValueError: constants were chosen on one of *seeds*.
    """
    if spoilt := set(seeds) & set(TUNING_SEEDS):
        raise ValueError(f"seeds {sorted(spoilt)}: constants were chosen on them; judge on others")
    rows, profits = [], []
    for seed in seeds:
        past = Past.of(family, seed, customers, weeks, traces)
        found: list[Floats] = []
        for name in POLICIES:
            told(f"simulated: {family.name} family, seed {seed}, {name}")
            done = past.run(name, pacing, weeks)
            found.append(done.profit)
            rows.append({
                "simulated": True, "family": family.name, "seed": seed, "policy": name, "profit": done.profit.mean(),
                "sending": done.sending.mean(), "answers": done.record["answered"].sum() / customers,
                "messages": len(done.record["day"]) / customers / weeks, "left": done.record["left"].sum() / customers,
            })  # fmt: skip
        profits.append(np.stack(found))
    mean, drawn = _bootstrap(profits)
    oracle, governed = POLICIES.index(ORACLE), POLICIES.index(GOVERNED)
    shares = estimates(mean / mean[oracle], drawn / drawn[:, [oracle]], POLICIES)
    above = estimates(mean[governed] - mean, drawn[:, [governed]] - drawn, POLICIES)
    return Standings(family.name, pd.DataFrame(rows), shares, above)


def _bootstrap(profits: Sequence[Floats], seed: int = 0) -> tuple[Floats, Floats]:
    """Mean profit a customer by policy, and in ``DRAWS`` draws of worlds, and of customers within each; policies stay paired.

    Args:
        profits: for each world ``(policies, customers)``.
    """
    rng = np.random.default_rng(seed)
    drawn = np.zeros((DRAWS, len(profits[0])))
    for draw in range(DRAWS):
        for world in rng.integers(len(profits), size=len(profits)):
            size = profits[world].shape[1]
            drawn[draw] += profits[world] @ np.bincount(rng.integers(size, size=size), minlength=size) / size / len(profits)
    return np.mean([each.mean(axis=1) for each in profits], axis=0), drawn


def simulate(
    seeds: Sequence[int], customers: int, weeks: int, traces: int = 1, told: Told = lambda step: None
) -> tuple[Pacing, list[Standings]]:
    """Choose the pacing on the tuning family, then judge on both."""
    families: tuple[Family, ...] = (LogitFamily(), ThresholdFamily())
    # so many threads for so little would wait for each other
    with threadpool_limits(1):
        pacing = tuned(customers, weeks, traces=traces, told=told)
        return pacing, [stand(family, pacing, seeds, customers, weeks, traces, told) for family in families]


def write(standings: Sequence[Standings], path: Path) -> None:
    """Write the rows of all families as CSV; the column ``simulated`` says that they are."""
    pd.concat([each.rows for each in standings]).to_csv(path, index=False)
