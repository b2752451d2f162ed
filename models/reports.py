"""What the training jobs found, as data: one folder of JSON that whoever shows quality may read.

Under ``reports`` in the home lie, written by ``python -m training``:

- ``runs/MODEL/VERSION.json``: a ``ModelReport``, one for each registered version;
- ``runs/MODEL/history.jsonl``: a ``TrainedVersion`` a line, oldest first, to draw quality over time;
- ``drift/MODEL.json``: the latest ``DriftReport`` of the model's champion;
- ``experiments/NAME.json``: the latest ``ExperimentReport`` of each experiment, its name percent-encoded.

``read_reports`` reads them all. Times are ISO 8601 in UTC, shares lie in [0, 1], money is in minor units of the shop's currency. Fields
are only ever added: a reader ignores those that it does not know. No file names a customer. Which version serves now the registry
says, not these files: a promotion or a rollback by hand does not change what a run found.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Literal, TypeVar
from urllib.parse import quote

import msgspec

FORMAT = 1
FOLDER = "reports"
DriftVerdict = Literal["stable", "watch", "moved"]
S = TypeVar("S", bound=msgspec.Struct)


class Measured(msgspec.Struct, frozen=True):
    """A value and its 95% interval; the ends are None where nothing varies or no interval was made."""

    value: float
    low: float | None = None
    high: float | None = None


class Sheet(msgspec.Struct, frozen=True, kw_only=True):
    """A table of texts, to be shown in any form.

    Attributes:
        columns: the first names the rows.
        rows: one text a column.
        title: what it shows; may be empty.
        groups: for each column the group that it belongs to, empty for the first; no groups where columns need none.
        served: the row that is put to use, None where none is.
    """

    columns: list[str]
    rows: list[list[str]]
    title: str = ""
    groups: list[str] = []
    served: int | None = None


class Document(msgspec.Struct, frozen=True):
    """A title, and sentences and tables in their order."""

    title: str
    parts: list[str | Sheet]


class JudgedCut(msgspec.Struct, frozen=True, kw_only=True):
    """One moment (or campaign) that a model was judged on.

    Attributes:
        name: what the evaluation calls it.
        at: the moment; the model judged there knew nothing later.
        rows: how many questions were asked.
        base_rate: the share of them that came true, None where answers are no probabilities.
    """

    name: str
    at: datetime
    rows: int
    base_rate: float | None = None


class CalibrationPoint(msgspec.Struct, frozen=True, kw_only=True):
    """One of ten equally large bands of rows by predicted probability: the mean foretold beside the share observed.

    Attributes:
        observed: with the 95% interval of Wilson (1927).
    """

    predicted: float
    observed: Measured
    rows: int


class InputBins(msgspec.Struct, frozen=True, kw_only=True):
    """How one input was spread over the sample that later data is compared with.

    Attributes:
        edges: inner limits of the bands, at the deciles; a value on a limit belongs to the band above.
        shares: of the rows in each band (one more than edges), then of those in which the value is unknown.
    """

    name: str
    edges: list[float]
    shares: list[float]


class ModelReport(msgspec.Struct, frozen=True, kw_only=True):
    """What one training run found.

    Attributes:
        model: as mlflow.yaml names it.
        kind: of which kind it is.
        version: the registered version.
        run_id: the run in MLflow.
        trained_at: when the run ended.
        as_of: it learnt only from before.
        horizon_days: how far ahead it looks.
        log_version, commit, features: the version of the log, the commit of the code, the feature service.
        metric: what promotion goes by.
        served, baseline: the row of ``quality`` that is put to use, and the simple one that it must beat.
        quality: by row and measure; measures of a part end in ``/PART``.
        lead: of the served row over the baseline in ``metric``, paired; above 0 is better.
        rivals: its paired leads over every other row.
        cuts: what it was judged on.
        base_rate: over all cuts; None where answers are no probabilities.
        calibration: of the served row; empty where answers are no probabilities.
        segments: ``segment_metric`` within each segment of customers that is large enough to tell.
        inputs: how each input was spread over ``reference_rows`` rows.
        settings: what a tuning chose for the trees, by name; empty where nothing was tuned.
        promoted: whether the run made it the champion.
        verdict: why, or why not.
        limits: what must be known before it is used.
        document, data: the report and the checks of the data, as they are printed.
    """

    model: str
    kind: str
    version: int
    run_id: str
    trained_at: datetime
    as_of: datetime
    horizon_days: int
    log_version: str
    commit: str
    features: str
    metric: str
    served: str
    baseline: str
    quality: dict[str, dict[str, Measured]]
    lead: Measured
    rivals: dict[str, Measured]
    cuts: list[JudgedCut]
    base_rate: float | None
    calibration: list[CalibrationPoint]
    segment_metric: str
    segments: dict[str, tuple[int, Measured]]
    inputs: list[InputBins]
    reference_rows: int
    settings: dict[str, float]
    promoted: bool
    verdict: str
    limits: list[str]
    document: Document
    data: Document
    format: int = FORMAT


class TrainedVersion(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a model's history: a version as its own run found it.

    Attributes:
        value: of ``metric`` in the served row.
        baseline_value: of ``metric`` in the baseline's.
        lead: of one over the other, paired; above 0 is better.
    """

    model: str
    version: int
    run_id: str
    trained_at: datetime
    as_of: datetime
    metric: str
    value: Measured
    baseline_value: Measured
    lead: Measured
    base_rate: float | None
    promoted: bool
    verdict: str


class InputDrift(msgspec.Struct, frozen=True, kw_only=True):
    """How far one input has moved.

    Attributes:
        psi: the population stability index.
        chance: what it stays below in 19 of 20 pairs of samples of these sizes, had nothing moved.
        verdict: ``stable`` below 0.1, ``watch`` below 0.25, else ``moved``; ``stable`` too where ``psi`` is not above ``chance``.
        edges, before, now: the bands, and the shares of both samples in them; see ``InputBins``.
    """

    name: str
    psi: float
    chance: float
    verdict: DriftVerdict
    edges: list[float]
    before: list[float]
    now: list[float]


class DriftReport(msgspec.Struct, frozen=True, kw_only=True):
    """How far the inputs of a champion have moved since it learnt, the farthest first.

    Attributes:
        computed_at: when it was computed.
        as_of: the moment of the snapshot that is compared.
        rows: of the snapshot.
        reference_rows: of the sample that the champion's run kept.
    """

    model: str
    version: int
    computed_at: datetime
    as_of: datetime
    rows: int
    reference_rows: int
    inputs: list[InputDrift]
    format: int = FORMAT


class VariantEffect(msgspec.Struct, frozen=True, kw_only=True):
    """How far a variant's customers lie above the baseline's in one metric.

    Attributes:
        relative: the same as a share of the baseline's mean, None where that is not above 0.
        p_value: that there is no difference; None where nothing varies.
    """

    metric: str
    variant: str
    customers: int
    baseline_mean: float
    mean: float
    lift: Measured
    relative: Measured | None
    p_value: float | None


class ExperimentReport(msgspec.Struct, frozen=True, kw_only=True):
    """What the variants of an experiment caused, and how far that can be believed.

    Attributes:
        until: only what was decided and happened before counts.
        days: how long each customer was looked at.
        adjusted: whether what customers did before was taken into account (CUPED).
        decisions_of: the kind of decisions that counted; None is every kind.
        entered: by variant, how many customers came in.
        shares: by variant, what it should have had of them; None where nobody said.
        ratio_p_values: by variant, that its number beside the baseline's is chance; empty where shares are not known.
        mismatched: whether the numbers are not what they should be: then no effect is to be believed.
        remarks: what to know first, in sentences.
    """

    name: str
    computed_at: datetime
    until: datetime
    days: int
    adjusted: bool
    decisions_of: str | None
    baseline: str
    effects: list[VariantEffect]
    entered: dict[str, int]
    shares: dict[str, float] | None
    ratio_p_values: dict[str, float]
    mismatched: bool
    remarks: list[str]
    format: int = FORMAT


class Reports(msgspec.Struct, frozen=True):
    """All that lies in the folder.

    Attributes:
        models: by model, the newest version's report.
        history: by model, every version, oldest first.
        drifts: by model.
        experiments: by name.
        unreadable: by file, why it could not be read; it hides no other.
    """

    models: dict[str, ModelReport] = {}
    history: dict[str, list[TrainedVersion]] = {}
    drifts: dict[str, DriftReport] = {}
    experiments: dict[str, ExperimentReport] = {}
    unreadable: dict[str, str] = {}


def version_path(home: Path, model: str, version: int) -> Path:
    """Where the report of a version lies."""
    return home / FOLDER / "runs" / model / f"{version}.json"


def history_path(home: Path, model: str) -> Path:
    """Where the history of a model lies."""
    return home / FOLDER / "runs" / model / "history.jsonl"


def drift_path(home: Path, model: str) -> Path:
    """Where the latest drift of a model lies."""
    return home / FOLDER / "drift" / f"{model}.json"


def experiment_path(home: Path, name: str) -> Path:
    """Where the latest analysis of an experiment lies; its name may hold what no file name can."""
    return home / FOLDER / "experiments" / f"{quote(name, safe='')}.json"


def read_version(home: Path, model: str, version: int) -> ModelReport | None:
    """The report of one version, None where its run kept none.

    Raises:
        ValueError: the file is damaged; the message names it.
    """
    path = version_path(home, model, version)
    return _read(path, ModelReport) if path.exists() else None


def read_history(home: Path, model: str) -> list[TrainedVersion]:
    """Every trained version of a model, oldest first.

    Raises:
        ValueError: a line is damaged; the message names file and line.
    """
    path, found = history_path(home, model), []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else (), 1):
        try:
            found.append(msgspec.json.decode(line, type=TrainedVersion))
        except msgspec.MsgspecError as error:
            raise ValueError(f"{path}, line {number}: {error}: take the line out") from None
    return found


def read_reports(home: Path) -> Reports:
    """All reports of the home in the folder *home*; empty where nothing was trained yet."""
    found = Reports()
    for folder in sorted((home / FOLDER / "runs").glob("*/")):
        newest = max((int(path.stem) for path in folder.glob("*.json") if path.stem.isdigit()), default=None)
        if newest is not None:
            for report in _read_into(found, version_path(home, folder.name, newest), ModelReport):
                found.models[folder.name] = report
        try:
            found.history[folder.name] = read_history(home, folder.name)
        except (ValueError, OSError) as error:
            found.unreadable[str(history_path(home, folder.name))] = str(error)
    for path in sorted((home / FOLDER / "drift").glob("*.json")):
        for drift in _read_into(found, path, DriftReport):
            found.drifts[drift.model] = drift
    for path in sorted((home / FOLDER / "experiments").glob("*.json")):
        for experiment in _read_into(found, path, ExperimentReport):
            found.experiments[experiment.name] = experiment
    return found


def _read(path: Path, kind: type[S]) -> S:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except msgspec.MsgspecError as error:
        raise ValueError(f"{path}: {error}: delete it and run its command of python -m training again") from None


def _read_into(found: Reports, path: Path, kind: type[S]) -> Iterator[S]:
    try:
        yield _read(path, kind)
    except (ValueError, OSError) as error:
        found.unreadable[str(path)] = str(error)
