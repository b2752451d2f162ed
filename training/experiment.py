"""What a variant caused: its customers beside those of another, from their first decision in the experiment on."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from features.state.home import Home
from features.state.ports import MissingStateError
from training.decisions import open_decisions
from training.metrics import LEVEL, Estimate
from training.shares import CONTROL, CONTROL_GROUP, POLICY_FILE, policy_shares

METRICS = ("revenue_minor", "orders", "buyers", "discount_minor")
"""By customer: what was paid less what was given back, purchases, whether there was any, and what the shop took off its prices."""
MISMATCH_LEVEL = 0.001
"""A sample ratio less likely than this is no chance: low, as a check that is made at every look must seldom cry wolf."""
LEAST_CUSTOMERS = 2


class UnknownExperimentError(ValueError):
    """No decision of that experiment is logged; the message names those that are."""


class Effect(NamedTuple):
    """How far a variant's customers lie above the baseline's in one metric.

    Attributes:
        metric: one of ``METRICS``.
        variant: which variant; the other is the baseline.
        baseline_mean, mean: a customer's, adjusted where CUPED is.
        lift: the difference, with its 95% interval.
        relative: the same as a share of the baseline's mean, None where that is not above 0.
        p_value: of Welch's test that there is no difference; NaN where nothing varies.
    """

    metric: str
    variant: str
    baseline_mean: float
    mean: float
    lift: Estimate
    relative: Estimate | None
    p_value: float


@dataclass(frozen=True)
class ExperimentResult:
    """What an experiment caused, and how far that can be believed.

    Attributes:
        baseline: the variant that others are compared to.
        effects: by variant and metric.
        customers: by variant, how many were compared.
        entered: by variant, how many came in, those too whose time is not over; the sample ratio is theirs.
        shares: what the variants should have had of them, None where nobody said.
        mismatch: by variant, the p-value of its number beside the baseline's; empty where shares are not known.
        mixed: how many customers were left out as they were seen in two variants.
        waiting: how many are not compared yet, as their time is not over.
        unlearnable: how many were left out as their data may not be used, or are gone.
    """

    baseline: str
    effects: list[Effect]
    customers: Mapping[str, int]
    entered: Mapping[str, int]
    shares: Mapping[str, float] | None
    mismatch: Mapping[str, float]
    mixed: int
    waiting: int
    unlearnable: int

    @property
    def mismatched(self) -> bool:
        """Whether the variants' numbers are not what they should be: then no effect is to be believed."""
        return any(p < MISMATCH_LEVEL for p in self.mismatch.values())

    @property
    def remarks(self) -> list[str]:
        """What to know before an effect is believed, in sentences."""
        came = ", ".join(f"{variant} {count}" for variant, count in self.entered.items())
        if self.shares is None:
            said = [f"sample ratio: not checked, as {POLICY_FILE} names no shares: give --ratio A=0.5,B=0.5 (came in: {came})"]
        else:
            meant = ", ".join(f"{variant} {share:g}" for variant, share in self.shares.items())
            odds = ", ".join(f"{variant} p = {p:.3g}" for variant, p in self.mismatch.items())
            verdict = "MISMATCH: believe no effect before it is explained" if self.mismatched else "as meant"
            said = [f"sample ratio: {verdict} (came in: {came}; shares: {meant}; {odds})"]
        left = {
            "wait for their time to pass": self.waiting,
            "were seen in two variants, as they were merged or the draw was changed, and are left out": self.mixed,
            "are left out as nothing may be learnt from them": self.unlearnable,
        }
        return said + [f"{count} customers {why}" for why, count in left.items() if count]


def analyse(
    home: Home,
    name: str,
    until: datetime,
    days: int = 14,
    *,
    baseline: str | None = None,
    shares: Mapping[str, float] | None = None,
    kind: str | None = None,
    cuped: bool = True,
) -> ExperimentResult:
    """Compare the variants of experiment *name*, or the control group (``control-group``), by intention to treat.

    A customer counts from the first decision in the experiment, scores apart, whatever was shown; in the control group's case from the
    first decision of a kind and channel of which any was held out. What is counted are the *days* from then on; the same number of days
    before are CUPED's covariate. Customers who were seen in two variants, as they were merged, are left out.

    Args:
        home: the installation.
        name: as the policy names it.
        until: only what was decided and happened before.
        days: how long a customer is looked at.
        baseline: the variant that the others are compared to; default: ``control``, or the first of the shares, or the first by name.
        shares: what each variant should have of the customers; default: as the home's policy says, if it does.
        kind: only decisions of this kind count.
        cuped: whether what customers did before is taken into account.

    Raises:
        MissingStateError: no decision is logged yet, or tea-tasting is not installed.
        UnknownExperimentError: no decision of it is logged.
        ValueError: the shares or the baseline name other variants than the log, or a variant has fewer than two customers.
    """
    expected = dict(shares) if shares is not None else policy_shares(home.root / POLICY_FILE, name)
    with open_decisions(home) as opened:
        con = opened.connection
        con.execute(_ASSIGNED, {"files": opened.files, "until": until})
        told = {"name": name, "control_group": CONTROL_GROUP, "kind": kind}
        con.execute(_SEEN, told)
        con.execute(_COUNTED if name == CONTROL_GROUP else _ALL_COUNTED)
        con.execute(_ENTERED, {"until": until, "within": timedelta(days=days)})
        entered = dict(con.execute("SELECT variant, count(*) FROM entered WHERE clean GROUP BY ALL ORDER BY variant").fetchall())
        if not entered:
            raise UnknownExperimentError(_unknown(con, name, kind))
        mixed, waiting, unlearnable = con.execute(_LEFT_OUT).fetchall()[0]
        _same_variants(entered, expected, told=shares is not None)
        everyone = {**dict.fromkeys(expected or {}, 0), **entered}
        against = baseline or (CONTROL if name == CONTROL_GROUP else next(iter(everyone)))
        if against not in everyone:
            raise ValueError(f"{name} has no variant {against!r}: use {', '.join(everyone)}")
        counted = dict(con.execute("SELECT variant, count(*) FROM entered WHERE clean AND closed GROUP BY ALL").fetchall())
        customers = {variant: int(counted.get(variant, 0)) for variant in everyone}
        if few := [variant for variant, count in customers.items() if count < LEAST_CUSTOMERS]:
            raise ValueError(
                f"{name}: variant {few[0]!r} has {customers[few[0]]} customers to compare, and {LEAST_CUSTOMERS} are needed at least "
                f"({waiting} customers wait for their {days} days to pass)"
            )
        con.execute(_CUSTOMERS, {"within": timedelta(days=days)})
        known_cost = con.execute("SELECT coalesce(max(discount_minor), 0) > 0 FROM per_customer").fetchall()[0][0]
        metrics = [metric for metric in METRICS if metric != "discount_minor" or known_cost]
        effects = compare(opened.backend.table("per_customer"), against, metrics, cuped=cuped)
    mismatch = {} if expected is None else sample_ratio(everyone, against, expected)
    return ExperimentResult(against, effects, customers, everyone, expected, mismatch, int(mixed), int(waiting), int(unlearnable))


def compare(customers: Any, baseline: str, metrics: Sequence[str] = METRICS, *, cuped: bool = True) -> list[Effect]:
    """Each variant's mean beside the baseline's, by Welch's t-test; with CUPED (Deng et al. 2013) on ``METRIC_before``.

    Relative intervals are those of the logarithm of the ratio of means, by the delta method (Deng et al. 2018).

    Args:
        customers: an Ibis or Arrow table, one row a customer: ``variant``, and for each metric a number ``METRIC`` and ``METRIC_before``.
        baseline: the variant that the others are compared to.
        metrics: which metrics.
        cuped: whether ``METRIC_before`` is taken into account.
    """
    tt = _tea_tasting()
    asked = {
        metric: tt.Mean(metric, f"{metric}_before" if cuped else None, confidence_level=LEVEL, equal_var=False, use_t=True)
        for metric in metrics
    }
    with warnings.catch_warnings():
        # where nothing varies scipy divides by 0: the result is NaN, as it is told
        warnings.simplefilter("ignore", RuntimeWarning)
        found = tt.Experiment(asked).analyze(customers, control=baseline, all_variants=True)
    effects = []
    for (_, variant), by_metric in sorted(found.items(), key=lambda each: str(each[0][1])):
        for metric, result in by_metric.items():
            lift = Estimate(result.effect_size, result.effect_size_ci_lower, result.effect_size_ci_upper)
            relative = Estimate(result.rel_effect_size, result.rel_effect_size_ci_lower, result.rel_effect_size_ci_upper)
            is_ratio = result.control > 0 and math.isfinite(relative.value)
            effects.append(
                Effect(metric, str(variant), result.control, result.treatment, lift, relative if is_ratio else None, result.pvalue)
            )
    return effects


def sample_ratio(entered: Mapping[str, int], baseline: str, shares: Mapping[str, float]) -> dict[str, float]:
    """For each variant the p-value of its number of customers beside the baseline's, given the shares that both should have.

    Exact below 1000 customers, then by the normal approximation. A share of 0 has the p-value 0 if anybody is in it, else 1.
    """
    tt = _tea_tasting()
    from tea_tasting.aggr import Aggregates

    found = {}
    for variant in entered:
        if variant == baseline:
            continue
        if not shares[variant] or not shares[baseline]:
            found[variant] = float(not any(entered[each] for each in (variant, baseline) if not shares[each]))
            continue
        counts = {each: Aggregates(count_=entered[each]) for each in (baseline, variant)}
        found[variant] = float(tt.SampleRatio(shares[variant] / shares[baseline]).analyze(counts, baseline, variant).pvalue)
    return found


def _tea_tasting() -> Any:
    if importlib.util.find_spec("tea_tasting") is None:
        raise MissingStateError("tea-tasting is not installed: pip install 'ubiquo[experiments]'")
    import tea_tasting

    return tea_tasting


def _same_variants(entered: Mapping[str, int], shares: Mapping[str, float] | None, told: bool) -> None:
    """Refuse shares that leave out a variant of the log."""
    if shares is None or not (strange := sorted(set(entered) - set(shares))):
        return
    where = "--ratio" if told else POLICY_FILE
    raise ValueError(f"the log has a variant {strange[0]!r} that {where} gives no share: give the share of each as --ratio A=0.5,B=0.5")


def _unknown(con: Any, name: str, kind: str | None) -> str:
    known = [row[0] for row in con.execute(_KNOWN, {"control_group": CONTROL_GROUP}).fetchall()]
    if name in known:
        of_kind = f" of kind {kind!r}" if kind else ""
        held = ", or none was ever held out" if name == CONTROL_GROUP else ""
        return f"{name} has no customer to count: the log has no decision{of_kind} of it that is no score{held}, or no data may be used"
    return f"there is no experiment {name!r} in the log of decisions: it knows {', '.join(known) or 'none'}"


_ASSIGNED = """
CREATE TEMP TABLE assigned AS
SELECT n.current AS customer_id, as_of, kind, request ->> '$.channel' AS channel, assignment ->> '$.group' AS "group",
       from_json(coalesce(assignment -> '$.variants', '{}'), '"MAP(VARCHAR, VARCHAR)"') AS variants,
       coalesce(assignment ->> '$.held_out', 'false') = 'true' AS held_out,
       coalesce(json_array_length(choices), 0) > 0 AND coalesce(choices ->> '$[0].item_id', choices ->> '$[0].offer_id') IS NULL AS is_score
FROM (SELECT NULL::VARCHAR AS assignment WHERE false UNION ALL BY NAME SELECT * FROM read_parquet($files, union_by_name = true)) AS d
     JOIN current_names AS n ON n.logged = d.customer_id
WHERE as_of < $until AND coalesce(request ->> '$.dry_run', 'false') <> 'true'
"""
_KNOWN = """
SELECT DISTINCT unnest(map_keys(variants)) AS name FROM assigned UNION
SELECT $control_group FROM assigned WHERE "group" IS NOT NULL ORDER BY name
"""
_SEEN = """
CREATE TEMP TABLE seen AS
SELECT customer_id, as_of, kind, channel, held_out, CASE WHEN $name = $control_group THEN "group" ELSE variants[$name] END AS variant
FROM assigned WHERE NOT is_score AND ($kind IS NULL OR kind = $kind)
"""
# what the control group is not kept from, both have alike
_COUNTED = """
CREATE TEMP TABLE counted AS SELECT * FROM seen WHERE (kind, coalesce(channel, '')) IN (
  SELECT (kind, coalesce(channel, '')) FROM seen WHERE held_out
)
"""
_ALL_COUNTED = "CREATE TEMP TABLE counted AS SELECT * FROM seen"
_ENTERED = """
CREATE TEMP TABLE entered AS
WITH each AS (
  SELECT customer_id, min(as_of) AS first_at, min(variant) AS variant, count(DISTINCT variant) > 1 AS mixed
  FROM counted WHERE variant IS NOT NULL GROUP BY ALL
)
SELECT *, known AND NOT mixed AS clean, first_at + $within <= $until AS closed
FROM (SELECT *, customer_id IN (SELECT customer_id FROM events WHERE customer_id IS NOT NULL) AS known FROM each)
"""
_LEFT_OUT = """
SELECT count(*) FILTER (known AND mixed), count(*) FILTER (clean AND NOT closed), count(*) FILTER (NOT known) FROM entered
"""
_CUSTOMERS = """
CREATE TEMP TABLE per_customer AS
WITH moved AS (
  SELECT customer_id, occurred_at, amount_minor, 1 AS orders, discount_minor FROM baskets
  UNION ALL SELECT customer_id, occurred_at, -amount_minor, 0, 0 FROM refunds
), summed AS (
  SELECT c.customer_id, m.occurred_at >= c.first_at AS since, sum(m.amount_minor) AS revenue_minor, sum(m.orders) AS orders,
         sum(m.discount_minor) AS discount_minor
  FROM entered AS c JOIN moved AS m USING (customer_id)
  WHERE m.occurred_at >= c.first_at - $within AND m.occurred_at < c.first_at + $within GROUP BY ALL
)
SELECT c.customer_id, c.variant,
       coalesce(a.revenue_minor, 0)::DOUBLE AS revenue_minor, coalesce(b.revenue_minor, 0)::DOUBLE AS revenue_minor_before,
       coalesce(a.orders, 0)::DOUBLE AS orders, coalesce(b.orders, 0)::DOUBLE AS orders_before,
       (coalesce(a.orders, 0) > 0)::DOUBLE AS buyers, (coalesce(b.orders, 0) > 0)::DOUBLE AS buyers_before,
       coalesce(a.discount_minor, 0)::DOUBLE AS discount_minor, coalesce(b.discount_minor, 0)::DOUBLE AS discount_minor_before
FROM entered AS c LEFT JOIN (FROM summed WHERE since) AS a USING (customer_id)
LEFT JOIN (FROM summed WHERE NOT since) AS b USING (customer_id)
WHERE c.clean AND c.closed
"""
