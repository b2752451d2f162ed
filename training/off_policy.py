"""What another policy would have brought, estimated from decisions that were drawn with known chances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import pandas as pd

from training.metrics import DRAWS, Estimate, Floats, bootstrap, difference, estimates

LEAST_ESS = 200.0
"""The effective sample size below which nothing is estimated."""
LOGGED, WEIGHT = "logged", "mean weight"
IPS, SNIPS, DR, SWITCH_DR = "IPS", "SNIPS", "DR", "SwitchDR"
_QUANTILES = np.linspace(0.0, 0.9, 10)
"""Of the weights above 0: from where on SwitchDR may give them up."""


class NotJudgeableError(ValueError):
    """The log cannot tell what a policy would have brought; the message says why, and what would make it able to."""


@dataclass(frozen=True)
class Evidence:
    """Decisions that were drawn, one a row, and what another policy thinks of each.

    Attributes:
        customers: whose each decision is; decisions of one customer are drawn together by the bootstrap.
        propensities: the chance, in (0, 1], with which the logged policy chose what it chose.
        probabilities: the chance, in [0, 1], with which the other policy chooses the same.
        rewards: what came of it; any finite number.
        q_logged: what a reward model foretold of what was chosen, or None.
        q_target: what the same model foretells of the other policy's choice, in expectation over that policy; None without ``q_logged``.
    """

    customers: Sequence[str]
    propensities: Floats
    probabilities: Floats
    rewards: Floats
    q_logged: Floats | None = None
    q_target: Floats | None = None

    def __post_init__(self) -> None:
        """Check every number.

        Raises:
            ValueError: lengths differ or a number may not be; the message names the field and, from 0, the row.
            NotJudgeableError: there is no row, or the other policy does otherwise where the logged one had no choice.
        """
        if (self.q_logged is None) != (self.q_target is None):
            raise ValueError("q_logged and q_target go together: give both or neither")
        size = len(self.customers)
        if not size:
            raise NotJudgeableError("there is no decision to judge by")
        for field in fields(self)[1:]:
            values = getattr(self, field.name)
            if values is None:
                continue
            if np.shape(values) != (size,):
                raise ValueError(f"{field.name}: the shape is {np.shape(values)}, but there are {size} customers: give one number a row")
            _refuse(field.name, values, ~np.isfinite(values), "is not finite")
        _refuse("propensities", self.propensities, (self.propensities <= 0) | (self.propensities > 1), "is not in (0, 1]")
        _refuse("probabilities", self.probabilities, (self.probabilities < 0) | (self.probabilities > 1), "is not in [0, 1]")
        _refuse("propensities", self.propensities, ~np.isfinite(self.weights), "is too small to divide by")
        certain = ~self.drawn & ~np.isclose(self.probabilities, 1.0)
        if certain.any():
            row = int(np.flatnonzero(certain)[0])
            raise NotJudgeableError(
                f"probabilities, row {row}: the log had no other choice (propensity 1), and the policy to be judged takes this one with "
                f"probability {self.probabilities[row]:g} only: the log holds nothing of what else it does ({int(certain.sum())} rows)"
            )

    @property
    def weights(self) -> Floats:
        """How much likelier the other policy makes each choice."""
        with np.errstate(over="ignore"):
            return self.probabilities / self.propensities

    @property
    def drawn(self) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Where the logged policy could have chosen otherwise."""
        return self.propensities < 1

    @property
    def residuals(self) -> tuple[Floats, Floats]:
        """What the model foretells of the other policy's choices, and by how much it was wrong of those made; 0 and rewards without one."""
        if self.q_logged is None or self.q_target is None:
            return np.zeros(len(self.rewards)), self.rewards
        return self.q_target, self.rewards - self.q_logged


def effective_sample_size(weights: Floats) -> float:
    """How many rows of equal weight would tell as much: ``(sum w)^2 / sum w^2``, 0 where all weights are 0 (Kish 1965)."""
    squares = float(weights @ weights)
    return float(weights.sum()) ** 2 / squares if squares > 0 else 0.0


def ips(evidence: Evidence) -> float:
    """Inverse propensity scoring: ``mean(w r)``; without bias where propensities are right and everything was possible."""
    return float(np.mean(evidence.weights * evidence.rewards))


def snips(evidence: Evidence) -> float:
    """Self-normalised IPS: ``sum(w r) / sum(w)`` (Swaminathan & Joachims 2015), NaN if no w is above 0; some bias for less variance."""
    total = float(evidence.weights.sum())
    return float(evidence.weights @ evidence.rewards) / total if total > 0 else float("nan")


def dr(evidence: Evidence) -> float:
    """Doubly robust: ``mean(q_target + w (r - q_logged))`` (Dudík et al. 2014); IPS without a reward model."""
    return switch_dr(evidence, float("inf"))


def switch_dr(evidence: Evidence, tau: float) -> float:
    """Doubly robust where a weight is at most *tau*, the reward model alone above (Wang, Agarwal & Dudík 2017)."""
    return float(np.mean(_switched(evidence, tau)))


def chosen_tau(evidence: Evidence) -> float:
    """The threshold whose estimated variance and squared bias are least together; among equals the largest.

    The bias of giving up the weights above tau is estimated by ``mean(w 1(w > tau) (r - q_logged))``, as Su et al. (2020) do for shrunken
    weights. The bound of Wang et al. (2017), ``R mean(w 1(w > tau))`` with rewards within R, needs the weights of choices that were not
    logged; of those that were it is hardly ever below the variance that it saves, so that nothing would be given up. Infinity and the
    tenths of the weights above 0 are tried.
    """
    taus = _tried(evidence.weights)
    return float(taus[_least_risk(_parts(evidence, taus).sum(axis=0), len(evidence.rewards))])


@dataclass(frozen=True)
class Judgement:
    """What a policy would have brought beside what the logged one did.

    Attributes:
        logged: the mean reward of what was logged.
        values: the policy's by estimator, with 95% bootstrap intervals over customers.
        differences: by how much each lies above ``logged``, paired draw by draw.
        ess: by estimator, the effective sample size of the weights that it uses, of drawn rows.
        mean_weight: 1 in expectation where propensities are right and everything the policy does was possible.
        tau: SwitchDR's threshold, None without a reward model. Each draw chooses its own: with one that is kept, intervals are too narrow.
        decisions, customers: how many were judged by.
    """

    logged: Estimate
    values: Mapping[str, Estimate]
    differences: Mapping[str, Estimate]
    ess: Mapping[str, float]
    mean_weight: Estimate
    tau: float | None
    decisions: int
    customers: int

    @property
    def doubts(self) -> list[str]:
        """What speaks against believing the numbers, in sentences."""
        said = []
        # half the 95% interval is two standard errors; by chance alone three are passed once in some hundreds of logs
        if abs(self.mean_weight.value - 1.0) > 1.5 * (self.mean_weight.high - self.mean_weight.low) / 2:
            said.append(
                f"the mean weight is {self.mean_weight}, far from 1: the policy does what the log never could do, or a propensity or a "
                "probability is wrong"
            )
        if self.logged.low == self.logged.high:
            said.append("the same came of nearly every decision: intervals without width tell of no certainty")
        if self.customers < LEAST_ESS:
            said.append(f"the decisions are those of {self.customers} customers only: intervals over so few can be too narrow")
        return said


def judge(evidence: Evidence, draws: int = DRAWS, seed: int = 0) -> Judgement:
    """Estimate a policy's mean reward; DR and SwitchDR where there is a reward model.

    Raises:
        NotJudgeableError: nothing was drawn, or the effective sample size of what was drawn is below ``LEAST_ESS``.
    """
    weights, drawn = evidence.weights, evidence.drawn
    if not drawn.any():
        raise NotJudgeableError(
            "every propensity is 1: nothing was left to chance, so the log cannot tell what another policy would have brought; ask with "
            "explore: true, and what is drawn can be judged by"
        )
    ess = effective_sample_size(weights[drawn])
    if ess < LEAST_ESS:
        raise NotJudgeableError(
            f"the effective sample size of {int(drawn.sum())} decisions is {ess:.1f}, and {LEAST_ESS:g} are needed: the policy to be "
            "judged seldom does what was logged, or little is logged; log more with explore: true, or judge a policy that is nearer to "
            "the logged one"
        )
    terms = {LOGGED: evidence.rewards, WEIGHT: weights, IPS: weights * evidence.rewards}
    names, sizes, tau = [*terms, SNIPS], {IPS: ess, SNIPS: ess}, None
    columns = [np.ones(len(weights)), *terms.values()]
    if evidence.q_logged is not None:
        tau, parts = chosen_tau(evidence), _parts(evidence, _tried(weights))
        names, columns = [*names, DR, SWITCH_DR], [*columns, *parts.reshape(len(weights), -1).T]
        sizes |= {DR: ess, SWITCH_DR: effective_sample_size((weights * (weights <= tau))[drawn])}
    codes, known = pd.factorize(np.asarray(evidence.customers, dtype=object))
    # the sums of each customer are all that a draw of customers needs
    sums = np.column_stack([np.bincount(codes, each, len(known)) for each in columns])

    def statistic(times: Floats) -> Floats:
        total = times @ sums
        count, mean = total[0], dict(zip(terms, total[1:] / total[0], strict=False))
        mean[SNIPS] = mean[IPS] / mean[WEIGHT] if mean[WEIGHT] > 0 else np.nan
        if tau is not None:
            switched = total[1 + len(terms) :].reshape(3, -1)
            mean[DR], mean[SWITCH_DR] = switched[0, -1] / count, switched[0, _least_risk(switched, count)] / count
        return np.array([mean[name] for name in names])

    values, resampled = bootstrap([str(each) for each in range(len(known))], statistic, draws, seed)
    found = estimates(values, resampled, names)
    return Judgement(
        logged=found[LOGGED],
        values={name: found[name] for name in sizes},
        differences={name: difference(values, resampled, names, name, LOGGED) for name in sizes},
        ess=sizes,
        mean_weight=found[WEIGHT],
        tau=tau,
        decisions=len(weights),
        customers=len(known),
    )


def _switched(evidence: Evidence, tau: float) -> Floats:
    """What each row adds to the mean that ``switch_dr`` is."""
    foretold, residuals = evidence.residuals
    weights = evidence.weights
    return foretold + np.where(weights <= tau, weights, 0.0) * residuals


def _tried(weights: Floats) -> Floats:
    """The thresholds to choose from, the largest last."""
    return np.append(np.unique(np.quantile(weights[weights > 0], _QUANTILES)) if (weights > 0).any() else [], np.inf)


def _parts(evidence: Evidence, taus: Floats) -> Floats:
    """What is averaged, its square, and what was given up, by row and threshold: ``(rows, 3, thresholds)``."""
    kept = np.column_stack([_switched(evidence, tau) for tau in taus])
    return np.stack([kept, kept**2, kept[:, -1:] - kept], axis=1)


def _least_risk(sums: Floats, count: float) -> int:
    """Which threshold's variance and squared bias are least together, by the sums of ``_parts`` over rows; of equals the last."""
    kept, squares, given_up = sums
    variance = (squares / count - (kept / count) ** 2).clip(min=0.0) / count
    return len(kept) - 1 - int(np.argmin((variance + (given_up / count) ** 2)[::-1]))


def _refuse(field: str, values: Floats, wrong: np.ndarray[tuple[int], np.dtype[np.bool_]], why: str) -> None:
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise ValueError(f"{field}, row {row}: {values[row]:g} {why} ({int(wrong.sum())} such rows)")
