"""What commands print, as documents: numbers become texts here, and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from models.reports import Document, DriftReport, ExperimentReport, Measured, Sheet, VariantEffect

if TYPE_CHECKING:
    # what they come with takes a second to import
    import pandas as pd

    from training.candidate_policy import Weighed
    from training.experiment import ExperimentResult
    from training.metrics import Estimate
    from training.off_policy import Judgement
    from training.sending import SendingReport
    from training.simulation import Standings

DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
SHOWN_STABLE = 5
"""How many inputs that stand still are shown, the least stable of them."""


def history_document(model: str, rows: pd.DataFrame) -> Document:
    """Every version, one a row."""
    return Document(f"Versions of {model}", [_sheet(rows)])


def decisions_document(table: pd.DataFrame, until: datetime, within_days: int, notes: Sequence[str]) -> Document:
    """What was decided and what came of it, by kind."""
    return Document(f"decisions before {until:%Y-%m-%d %H:%M}, and what came of them within {within_days} days", [_sheet(table), *notes])


def sending_document(found: SendingReport) -> Document:
    """By which channel, and at which hour, customers answer."""
    rows = []
    for channel, number in found.messages.items():
        hours, best = found.rates.hours[channel], int(found.rates.hours[channel].argmax())
        named = f"{DAYS[best // 24]} {best % 24:02}:00" if found.rates.uses_hours else "no hour is better"
        rate = found.rates.rates[channel]
        rows.append([channel, f"{number}", f"{found.answered[channel]}", f"{rate:.1%}", named, f"{hours[best]:.1%}"])
    told = "hours are not told apart: the last 28 days and what was before do not both hold enough messages"
    if found.gain is not None:
        gain, low, high = found.gain
        told = f"hours save {gain:.5f} [{low:.5f}, {high:.5f}] of log loss a message on the last 28 days, by which they were chosen or not"
    return Document(
        "messages and answers", [Sheet(columns=["channel", "messages", "answered", "rate", "best hour", "its rate"], rows=rows), told]
    )  # fmt: skip


def judged_document(policy: str, reward: str, until: datetime, weighed: Weighed, found: Judgement) -> Document:
    """What another policy would have brought."""
    rows = [["logged", "mean", *_ends(found.logged), "", "", ""]]
    for name, value in found.values.items():
        rows.append([policy, name, *_ends(value), *_ends(found.differences[name]), f"{found.ess[name]:.0f}"])
    columns = ["policy", "estimator", f"{reward} a decision", "95% interval", "above the logged", "95% interval of that", "ESS"]
    notes = [f"mean weight {found.mean_weight} (1 where everything that the policy does was possible)"]
    if found.tau is None:
        notes.append("DR and SwitchDR are left out: the file has no q_logged and q_target")
    else:
        notes.append(f"SwitchDR gives up weights above {found.tau:.3g}")
    notes += [f"left out: {count} decisions: {why}" for why, count in weighed.left_out.items()]
    notes += [f"doubt: {doubt}" for doubt in found.doubts]
    about = f"{found.decisions} decisions of {found.customers} customers ({', '.join(weighed.kinds)}) before {until:%Y-%m-%d %H:%M}"
    return Document(about, [Sheet(columns=columns, rows=rows), *notes])


def experiment_report(
    name: str, found: ExperimentResult, until: datetime, days: int, adjusted: bool, decisions_of: str | None, at: datetime
) -> ExperimentReport:
    """What an experiment caused, as data."""
    effects = [
        VariantEffect(
            metric=each.metric,
            variant=each.variant,
            customers=found.customers[each.variant],
            baseline_mean=each.baseline_mean,
            mean=each.mean,
            lift=_measured(each.lift),
            relative=None if each.relative is None else _measured(each.relative),
            p_value=None if math.isnan(each.p_value) else each.p_value,
        )
        for each in found.effects
    ]
    return ExperimentReport(
        name=name,
        computed_at=at,
        until=until,
        days=days,
        adjusted=adjusted,
        decisions_of=decisions_of,
        baseline=found.baseline,
        effects=effects,
        entered=dict(found.entered),
        shares=None if found.shares is None else dict(found.shares),
        ratio_p_values=dict(found.mismatch),
        mismatched=found.mismatched,
        remarks=found.remarks,
    )


def experiment_document(report: ExperimentReport) -> Document:
    """What an experiment caused, by metric and variant."""
    columns = ["metric", "variant", "customers", "mean", report.baseline, "lift", "95% interval", "relative", "95% interval of that", "p"]
    rows = []
    for each in report.effects:
        share, lift = each.relative, each.lift
        relative = ("-", "-") if share is None else (f"{share.value:+.1%}", _span(share, "+.1%"))
        # where nothing varies there is neither an interval nor a test
        interval, p = ("-", "-") if each.p_value is None else (_span(lift, "+.4g"), f"{each.p_value:.3g}")
        means = (f"{each.mean:.4g}", f"{each.baseline_mean:.4g}", f"{lift.value:+.4g}")
        rows.append([each.metric, each.variant, f"{each.customers}", *means, interval, *relative, p])
    how = "CUPED" if report.adjusted else "unadjusted"
    title = f"{report.name}: {report.days} days of each customer, {how}, before {report.until:%Y-%m-%d %H:%M}"
    return Document(title, [Sheet(columns=columns, rows=rows), *report.remarks])


def drift_document(report: DriftReport) -> Document:
    """The inputs that moved, then the least stable of the others."""
    stable = [each for each in report.inputs if each.verdict == "stable"]
    shown = [each for each in report.inputs if each.verdict != "stable"] + stable[:SHOWN_STABLE]
    rows = [[each.name, f"{each.psi:.3f}", f"{each.chance:.3f}", each.verdict] for each in shown]
    title = (
        f"Drift of {report.model}: {report.rows} customers as of {report.as_of:%Y-%m-%d %H:%M} beside the {report.reference_rows} rows "
        f"that champion {report.version} was compared on"
    )
    left = f"{len(stable) - SHOWN_STABLE} more inputs are stable." if len(stable) > SHOWN_STABLE else ""
    parts: list[str | Sheet] = [Sheet(columns=["input", "PSI", "by chance alone below", "verdict"], rows=rows)]
    return Document(title, [*parts, *filter(None, [left]), "watch from 0.1 on, moved from 0.25 on (Siddiqi 2006), where it is not chance"])


def simulated_documents(found: Sequence[Standings], likeliest: str) -> list[Document]:
    """Policies in simulated shops, one document a family."""
    columns = [
        "policy", "profit", "share of the oracle's", "95% interval", "governed above it", "95% interval of that", "sending",
        "messages a week", "answers", "left",
    ]  # fmt: skip
    documents = []
    for each in found:
        rows = []
        for row in each.rows.groupby("policy", sort=False).mean(numeric_only=True).itertuples():
            share, above = each.shares[row.Index], each.above[row.Index]
            told = [
                f"{share.value:.1%}",
                f"{share.low:.1%} to {share.high:.1%}",
                f"{above.value:+.0f}",
                f"{above.low:+.0f} to {above.high:+.0f}",
            ]
            counts = [f"{row.sending:.0f}", f"{row.messages:.2f}", f"{row.answers:.2f}", f"{row.left:.2f}"]
            rows.append([str(row.Index), f"{row.profit:.0f}", *told, *counts])
        note = f"simulated, {each.family} family: governed above {likeliest} by {each.above[likeliest]}"
        title = f"SIMULATED, {each.family} family: a customer, in minor units"
        documents.append(Document(title, [Sheet(columns=columns, rows=rows), note]))
    return documents


def _sheet(frame: pd.DataFrame) -> Sheet:
    return Sheet(columns=list(map(str, frame.columns)), rows=[list(map(str, row)) for row in frame.itertuples(index=False)])


def _ends(estimate: Estimate) -> tuple[str, str]:
    return f"{estimate.value:.4f}", f"{estimate.low:.4f} to {estimate.high:.4f}"


def _measured(estimate: Estimate) -> Measured:
    low, high = (None if math.isnan(end) else end for end in (estimate.low, estimate.high))
    return Measured(estimate.value, low, high)


def _span(told: Measured, form: str) -> str:
    """From one end of an interval to the other; where nothing varies there is none."""
    return "-" if told.low is None or told.high is None else f"{told.low:{form}} to {told.high:{form}}"
