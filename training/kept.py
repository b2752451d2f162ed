"""What jobs found, kept in the home as data; ``models.reports`` says in which form and reads it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from features.state.disk import write_atomically
from features.state.home import Home
from models.reports import (
    CalibrationPoint,
    DriftReport,
    ExperimentReport,
    InputBins,
    JudgedCut,
    Measured,
    ModelReport,
    TrainedVersion,
    drift_path,
    experiment_path,
    history_path,
    read_history,
    version_path,
)
from training.gate import edges_of, shares_of
from training.metrics import LEVEL, Estimate, Floats

if TYPE_CHECKING:
    import pandas as pd

BANDS = 10


def measured(estimate: Estimate) -> Measured:
    """An estimate as data; an end that is no number is None."""
    low, high = (None if end != end else float(end) for end in (estimate.low, estimate.high))
    return Measured(float(estimate.value), low, high)


def calibration_points(labels: NDArray[np.bool_], probabilities: Floats, bands: int = BANDS) -> list[CalibrationPoint]:
    """Foretold and observed shares in equally large bands, lowest first; fewer bands where there are fewer rows."""
    found = []
    for part in np.array_split(np.argsort(probabilities, kind="stable"), bands):
        if len(part):
            positives = int(labels[part].sum())
            # Wilson's interval stays in [0, 1], and is not empty where nothing or everything came true
            interval = binomtest(positives, len(part)).proportion_ci(LEVEL, method="wilson")
            observed = Measured(positives / len(part), float(interval.low), float(interval.high))
            found.append(CalibrationPoint(predicted=float(probabilities[part].mean()), observed=observed, rows=len(part)))
    return found


def bins_of(reference: pd.DataFrame) -> list[InputBins]:
    """How each column is spread: bands at its deciles, and the unknown."""
    found = []
    for name in reference.columns:
        values = reference[name].to_numpy(dtype=float)
        edges = edges_of(values)
        found.append(InputBins(name=str(name), edges=edges.tolist(), shares=shares_of(values, edges).tolist()))
    return found


def judged_cuts(evaluation: pd.DataFrame, units: Mapping[str, datetime]) -> list[JudgedCut]:
    """What was judged on, oldest first."""
    found = []
    for unit, rows in evaluation.groupby("unit"):
        rate = float(rows["label"].mean()) if "label" in rows else None
        found.append(JudgedCut(name=str(unit), at=units[str(unit)], rows=len(rows), base_rate=rate))
    return sorted(found, key=lambda cut: (cut.at, cut.name))


def encoded(report: msgspec.Struct) -> bytes:
    """A report as JSON; a number or text of numpy's or tea-tasting's own kind is written as a plain one."""
    return msgspec.json.encode(report, enc_hook=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    # numbers of tea-tasting are floats that know how to divide by 0
    for plain in (float, int, str):
        if isinstance(value, plain):
            return plain(value)
    raise TypeError(f"{type(value).__name__} has no form in a report")


def keep_report(home: Home, report: ModelReport) -> None:
    """Write a version's report and its line of the history; a second time changes nothing."""
    path = version_path(home.root, report.model, report.version)
    write_atomically(path, msgspec.json.format(encoded(report), indent=1))
    line = TrainedVersion(
        model=report.model,
        version=report.version,
        run_id=report.run_id,
        trained_at=report.trained_at,
        as_of=report.as_of,
        metric=report.metric,
        value=report.quality[report.served][report.metric],
        baseline_value=report.quality[report.baseline][report.metric],
        lead=report.lead,
        base_rate=report.base_rate,
        promoted=report.promoted,
        verdict=report.verdict,
    )
    lines = [each for each in read_history(home.root, report.model) if each.version != report.version]
    text = b"".join(encoded(each) + b"\n" for each in [*lines, line])
    write_atomically(history_path(home.root, report.model), text)


def keep_drift(home: Home, report: DriftReport) -> None:
    """Write a model's drift in place of the one before."""
    write_atomically(drift_path(home.root, report.model), msgspec.json.format(encoded(report), indent=1))


def keep_experiment(home: Home, report: ExperimentReport) -> None:
    """Write what an experiment caused in place of what was known before."""
    write_atomically(experiment_path(home.root, report.name), msgspec.json.format(encoded(report), indent=1))
