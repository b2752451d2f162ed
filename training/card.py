"""The model card: what a version learnt from, how good it is and for whom, and what it is not to be used for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training.gate import Gate
    from training.metrics import Estimate
    from training.report import Outcome, Report


def model_card(
    report: Report, outcome: Outcome, tags: Mapping[str, str], gate: Gate, metric: str, segments: Mapping[str, tuple[int, Estimate]]
) -> str:
    """The card as Markdown.

    Args:
        report: what the job found, its limits with it.
        outcome: the evaluation, with the segment of each row.
        tags: what the version is traced to.
        gate: the checks of the data.
        metric, segments: a measure within each segment, with its number of rows.
    """
    lines = [f"| {name} | {rows} | {found} |" for name, (rows, found) in segments.items()]
    alerts = [f"- {c.name}: {c.found} (allowed: {c.allowed})" for c in gate.checks if c.severity == "warning"] or ["- none"]
    return "\n".join(
        [
            f"# {report.kind}",
            "",
            f"Made by `{tags['commit']}` for the shop {tags['shop']}; features `{tags['feature_service']}`.",
            "",
            "## Data and window",
            f"- events known before {tags['as_of']}, version {tags['log_version']} of the log",
            f"- labels look {tags['horizon_days']} days ahead; judged on {', '.join(sorted(set(outcome.evaluation['unit'])))}, "
            "each time by a model that knew only what was before",
            "",
            "## How good it is",
            report.text(),
            "",
            f"## By segment ({metric})",
            f"| segment | rows | {metric} |",
            "|---|---|---|",
            *lines,
            "",
            "## Alerts of the data checks",
            *alerts,
            "",
            "## Limits",
            *(f"- {limit}" for limit in report.limits),
        ]
    )
