"""Experiments: what each variant caused, with the interval in which it lies, and whether the variants' numbers can be believed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from starlette.responses import Response

from models.reports import ExperimentReport, Measured, Reports, VariantEffect, read_reports
from serving.console.visit import Page, Visit
from serving.console.words import Words
from serving.decide.policy import Policy

WIDTH = 240
"""Of a drawing of intervals, in its own units."""
MONEY = ("revenue_minor", "discount_minor")
CONTROL_GROUP = "control-group"
"""As the analysis calls the customers to whom nothing is offered."""


@dataclass(frozen=True)
class EffectLine:
    """One variant's effect on one metric, as it is drawn and told.

    Attributes:
        low, at, high, zero: where they stand in a drawing ``WIDTH`` wide; the ends are None where there is no interval.
        verdict: ``good`` or ``bad`` where the interval leaves out that there is no effect, else empty.
    """

    variant: str
    customers: int
    baseline_mean: str
    mean: str
    lift: str
    interval: str
    relative: str
    p_value: float | None
    low: float | None
    at: float
    high: float | None
    zero: float
    verdict: str


@dataclass(frozen=True)
class MetricLines:
    """One metric with the effect of each variant, drawn on one scale."""

    name: str
    lines: Sequence[EffectLine]


@dataclass(frozen=True)
class RatioLine:
    """How many customers came into a variant, and how many should have; the share and the p-value are None where nobody said."""

    variant: str
    entered: int
    share: float
    meant: float | None
    p_value: float | None


@dataclass(frozen=True)
class ExperimentView:
    """One experiment as the page shows it."""

    report: ExperimentReport
    metrics: Sequence[MetricLines]
    ratio: Sequence[RatioLine]


def view_of(report: ExperimentReport, words: Words) -> ExperimentView:
    """What a report tells, metric by metric."""
    names = list(dict.fromkeys(effect.metric for effect in report.effects))
    metrics = [_metric(name, [effect for effect in report.effects if effect.metric == name], words) for name in names]
    return ExperimentView(report, metrics, list(_ratio(report)))


def _ratio(report: ExperimentReport) -> Iterator[RatioLine]:
    everybody, shares = max(sum(report.entered.values()), 1), report.shares
    among = sum(shares.values()) if shares else 1.0
    for variant, entered in report.entered.items():
        meant = None if shares is None else shares.get(variant, 0.0) / among
        yield RatioLine(variant, entered, entered / everybody, meant, report.ratio_p_values.get(variant))


def _metric(name: str, effects: Sequence[VariantEffect], words: Words) -> MetricLines:
    ends = [end for effect in effects for end in (effect.lift.value, effect.lift.low, effect.lift.high) if end is not None]
    low, high = min(0.0, *ends), max(0.0, *ends)
    room = (high - low) * 0.06 or 1.0
    low, high = low - room, high + room

    def place(value: float) -> float:
        return round((value - low) / (high - low) * WIDTH, 1)

    return MetricLines(name, [_line(effect, place, words) for effect in effects])


def _line(effect: VariantEffect, place: Callable[[float], float], words: Words) -> EffectLine:
    lift, metric = effect.lift, effect.metric
    return EffectLine(
        variant=effect.variant,
        customers=effect.customers,
        baseline_mean=_told(metric, effect.baseline_mean, words),
        mean=_told(metric, effect.mean, words),
        lift=_signed(metric, lift.value, words),
        interval=_span(metric, lift, words),
        relative="–" if effect.relative is None else _percent(effect.relative.value, words),
        p_value=effect.p_value,
        low=None if lift.low is None else place(lift.low),
        at=place(lift.value),
        high=None if lift.high is None else place(lift.high),
        zero=place(0.0),
        verdict=_verdict(metric, lift),
    )


def _verdict(metric: str, lift: Measured) -> str:
    if lift.low is None or lift.high is None or lift.low <= 0 <= lift.high:
        return ""
    # what was taken off prices is better the less it is
    return "good" if (lift.low > 0) != (metric == "discount_minor") else "bad"


def _told(metric: str, value: float, words: Words) -> str:
    if metric in MONEY:
        return words.money(value)
    return words.percent(value, 1) if metric == "buyers" else words.number(value, 3)


def _signed(metric: str, value: float, words: Words) -> str:
    return f"{'+' if value > 0 else '−' if value < 0 else ''}{_told(metric, abs(value), words)}"


def _span(metric: str, lift: Measured, words: Words) -> str:
    if lift.low is None or lift.high is None:
        return "–"
    return words.say("%(low)s to %(high)s") % {"low": _signed(metric, lift.low, words), "high": _signed(metric, lift.high, words)}


def _percent(value: float, words: Words) -> str:
    return f"{'+' if value > 0 else ''}{words.percent(value, 1)}"


def _declared(policy: Policy) -> dict[str, str]:
    """The experiments that the policy runs, and the control group, with their variants and shares."""
    found = {}
    if policy.control_group is not None:
        found[CONTROL_GROUP] = f"control {policy.control_group.share:g}"
    for experiment in policy.experiments:
        found[experiment.name] = ", ".join(f"{variant.name} {variant.share:g}" for variant in experiment.variants)
    return found


async def experiments_page(visit: Visit) -> Response:
    """Every experiment that was analysed, and those that were not yet."""
    reports: Reports = await visit.port.work(read_reports, visit.runtime.home.root)
    declared = _declared(visit.runtime.engine.governor.policy)
    views = [view_of(report, visit.words) for report in sorted(reports.experiments.values(), key=lambda r: r.computed_at, reverse=True)]
    waiting = {name: told for name, told in declared.items() if name not in reports.experiments}
    broken = [f"{path}: {why}" for path, why in reports.unreadable.items() if "experiments" in path]
    return visit.page("experiments.html", views=views, waiting=waiting, broken=broken, declared=declared, width=WIDTH)


PAGES: Sequence[Page] = [Page("/experiments", experiments_page, "decide", menu="Experiments", group="Marketing")]
