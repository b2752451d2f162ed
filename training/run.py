"""The tracked run: one job's data, parameters, measures, plots and model in MLflow, the ledger of looks, and the verdict."""

from __future__ import annotations

import hashlib
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from features.catalogue.shop import Shop
from features.catalogue.tables import Catalogue
from features.state.clock import system_clock
from features.state.disk import sync_tree, write_atomically
from features.state.home import Home
from features.state.ports import EVENTS
from features.store.event_log import EventLog
from models.artifact import DamagedArtifactError
from models.recommender.listings import Learner
from models.reports import ModelReport
from training import promotion
from training.bootstrap import open_registry
from training.card import model_card
from training.dataset import Cuts, Plan, Truth
from training.evaluation import by_segment, form_of, same_rows
from training.gate import Gate, reference_rows
from training.kept import bins_of, calibration_points, encoded, judged_cuts, keep_report, measured
from training.metrics import Estimate
from training.page import page
from training.rendering import markdown
from training.report import Outcome

if TYPE_CHECKING:
    import pandas as pd

BEATEN = "beaten_by"
"""The tag that says which model of a version's own table lies above it; empty where none does."""
REPORT = "report.json"
"""The report of a run as data, among its artifacts; see ``models.reports``."""
ROOT = Path(__file__).resolve().parent.parent


class TrackedRun:
    """One training job under way in MLflow."""

    def __init__(self, home: Home, model: str, cuts: Cuts, plan: Plan) -> None:
        self.home, self.model, self.cuts, self.plan = home, model, cuts, plan
        self.as_of = cuts.final
        self.shop = Shop.load(home)
        self.registry = open_registry(home)
        self.settings = self.registry.settings.models[model]
        self.gate = Gate(model, self.registry.settings.gate)
        log = EventLog(home, self.shop.timezone)
        self.log_version = log.version()
        known = log.known_before(self.as_of)
        self.inputs = inputs_digest(self.registry.settings.source, home, known, cuts, plan, self.settings.learner)

    def standing_report(self) -> ModelReport | None:
        """The report of a registered version made from exactly these inputs and judged to the end, if there is one."""
        for version in self.registry.versions(self.model):
            if version.aliases and version.tags.get("inputs") == self.inputs and "verdict" in version.tags:
                text = artifact_text(version.run_id, REPORT)
                return None if text is None else msgspec.json.decode(text, type=ModelReport)
        return None

    @contextmanager
    def started(self, parameters: Mapping[str, Any]) -> Iterator[None]:
        """Run the body as an MLflow run that carries everything needed to make it again."""
        import mlflow

        if mlflow.get_experiment_by_name(self.settings.experiment) is None:
            mlflow.create_experiment(self.settings.experiment, artifact_location=self.registry.settings.artifact_location)
        mlflow.set_experiment(self.settings.experiment)
        with mlflow.start_run(run_name=f"{self.model} {self.cuts.day(self.as_of)}"):
            mlflow.set_tags(self.tags())
            mlflow.log_params(
                {
                    "seed": self.plan.seed,
                    "as_of": self.as_of.isoformat(),
                    "horizon_days": self.cuts.horizon_days,
                    "window_days": self.cuts.window_days or "all",
                    **parameters,
                }
            )
            yield

    def trained_on(self, frame: pd.DataFrame, name: str, target: str | None = None) -> None:
        """Note the rows to train on as an MLflow dataset, traced to the version of the log."""
        import mlflow

        plain = frame.loc[:, [c for c in frame.columns if not isinstance(frame[c].iloc[0], list | tuple | np.ndarray)]]
        source = f"{self.home.tables[EVENTS].place}?version={self.log_version}"
        dataset = mlflow.data.from_pandas(plain, source=source, name=f"{self.shop.name} {name}", targets=target)
        mlflow.log_input(dataset, context="training")

    def trial(self, name: str, parameters: Mapping[str, Any], metric: str, value: float) -> float:
        """Log one candidate of a tuning as a nested run; returns its value."""
        import mlflow

        with mlflow.start_run(run_name=name, nested=True):
            mlflow.log_params(dict(parameters))
            mlflow.log_metric(metric, value)
            mlflow.set_tag("tuning", "true")
        return value

    def check_log(self, truth: Truth) -> None:
        """Let the gate look at the log as of the run."""
        catalogue = Catalogue(self.home)
        catalogue.ensure()
        self.gate.look_at_log(truth.timeline, self.as_of, catalogue.read("stores")["store_id"].to_pylist())

    def check_data(self) -> None:
        """Print the gate's table into the run and the home, and stop if it is severe."""
        import mlflow

        table = self.gate.table()
        write_atomically(self.home.root / "reports" / "data" / f"{self.model}.md", markdown(self.gate.document()).encode())
        mlflow.log_text(page(f"Data quality: {self.model}", [table]), "data_quality.html")
        mlflow.log_table(table, "data_quality.json")
        self.gate.stop_if_severe()

    def champion_reference(self) -> tuple[pd.DataFrame | None, float | None]:
        """The champion's feature rows and base rate to measure drift against; None without a champion."""
        version = self.registry.version_of(self.model, self.registry.settings.champion)
        if version is None:
            return None, None
        tags = self.registry.tags_of(self.model, version)
        # how many stay away for another time is another question
        is_asked_alike = tags.get("horizon_days") == str(self.cuts.horizon_days)
        rate = float(tags["base_rate"]) if is_asked_alike and "base_rate" in tags else None
        return artifact_frame(self.registry.run_of(self.model, version), "reference.parquet"), rate

    def tags(self) -> dict[str, str]:
        """What a model version must be traceable to."""
        return {
            "log_version": str(self.log_version),
            "commit": commit(self.home.settings.commit),
            "feature_service": self.settings.feature_service,
            "as_of": self.as_of.isoformat(),
            "horizon_days": str(self.cuts.horizon_days),
            "shop": self.shop.name,
            "inputs": self.inputs,
        }

    def look(self, cuts: Sequence[str]) -> int:
        """Note in the ledger that the evaluation cuts were looked at once more; returns how often that was so far."""
        entry = {
            "kind": self.model,
            "at": system_clock().isoformat(),
            "cuts": list(cuts),
            "inputs": self.inputs,
            "commit": commit(self.home.settings.commit),
        }
        path = self.home.root / "ledger.jsonl"
        with self.home.lease.hold("ledger"), open(path, "ab") as handle:
            handle.write(msgspec.json.encode(entry) + b"\n")
        lines = [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]
        return sum(line["kind"] == self.model and bool(set(line["cuts"]) & set(cuts)) for line in lines)

    def finish(self, outcome: Outcome) -> ModelReport:
        """Log everything, register the model as challenger, and promote it if it may be; returns the report."""
        import mlflow

        report = outcome.report
        mlflow.log_metrics({k: v for k, v in report.metrics.items() if v == v})
        for name, figure in outcome.plots.items():
            mlflow.log_figure(figure, f"plots/{name}.png")
        log_frame(outcome.evaluation, "evaluation.parquet")
        log_frame(reference_rows(outcome.reference, self.plan.seed), "reference.parquet")
        version = self._register(outcome)
        beaten = promotion.beaten_by(report.rivals)
        verdict = self._verdict(outcome, beaten)
        report.notes.append(self._promote(version, verdict))
        metric = form_of(outcome.evaluation).by_segment
        segments = by_segment(outcome.evaluation, metric)
        card = model_card(report, outcome, self.tags(), self.gate, metric, segments)
        mlflow.log_text(card, "model_card.md")
        mlflow.log_text(page(report.title, [*report.document().parts, *outcome.plots.items(), self.gate.table()]), "report.html")
        write_atomically(self.home.root / "reports" / f"{self.model}.md", report.text().encode())
        mlflow.log_text(report.text(), "report.md")
        found = self._as_data(version, outcome, verdict, (metric, segments))
        keep_report(self.home, found)
        mlflow.log_text(encoded(found).decode(), REPORT)
        self.registry.describe(self.model, version, card)
        self.registry.tag(self.model, version, {BEATEN: beaten or ""})
        # last: a run that was killed before its verdict has none, and is made again
        self.registry.tag(self.model, version, {"verdict": verdict.reason})
        return found

    def _register(self, outcome: Outcome) -> int:
        """Save the model and register it as the challenger; returns its version."""
        from mlflow.models import infer_signature

        base_rate = {"base_rate": f"{outcome.evaluation['label'].mean():.6f}"} if "label" in outcome.evaluation else {}
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / self.model
            outcome.model.save(folder)
            signature = infer_signature(outcome.example, outcome.output)
            version = self.registry.save(self.model, folder, signature, outcome.example, {**self.tags(), **base_rate})
        if self.registry.settings.artifact_location is not None:
            # a champion's files must outlive a power cut before its alias is set
            sync_tree(Path(self.registry.settings.artifact_location))
        return version

    def _as_data(
        self, version: int, outcome: Outcome, verdict: promotion.Verdict, segments: tuple[str, Mapping[str, tuple[int, Estimate]]]
    ) -> ModelReport:
        """What the run found, in the form in which others read it."""
        report, tags, evaluation = outcome.report, self.tags(), outcome.evaluation
        answers = "label" in evaluation
        labels = evaluation["label"].to_numpy(dtype=bool) if answers else np.empty(0, bool)
        sample = outcome.asked if outcome.asked is not None else outcome.reference
        metric, by_name = segments
        return ModelReport(
            model=self.model,
            kind=self.settings.kind.name,
            version=version,
            run_id=self.registry.run_of(self.model, version),
            trained_at=system_clock(),
            as_of=self.as_of,
            horizon_days=self.cuts.horizon_days,
            log_version=tags["log_version"],
            commit=tags["commit"],
            features=tags["feature_service"],
            metric=self.settings.promotion.metric,
            served=report.served,
            baseline=report.baseline,
            quality={
                row: {name: measured(each) for name, each in of.items() if each.value == each.value} for row, of in report.quality.items()
            },
            lead=measured(report.lead),
            rivals={name: measured(lead) for name, lead in report.rivals.items()},
            cuts=judged_cuts(evaluation, outcome.units),
            base_rate=float(labels.mean()) if answers else None,
            calibration=calibration_points(labels, evaluation["score"].to_numpy(dtype=float)) if answers else [],
            segment_metric=metric,
            segments={name: (rows, measured(each)) for name, (rows, each) in by_name.items()},
            inputs=bins_of(sample),
            reference_rows=len(sample),
            settings=dict(outcome.settings),
            promoted=verdict.passed,
            verdict=verdict.reason,
            limits=list(report.limits),
            document=report.document(),
            data=self.gate.document(),
        )

    def _verdict(self, outcome: Outcome, beaten: str | None) -> promotion.Verdict:
        champion = self.registry.version_of(self.model, self.registry.settings.champion)
        if champion is None:
            return promotion.first(self.settings.promotion, outcome.report.lead, beaten)
        theirs = self.registry.tags_of(self.model, champion).get("horizon_days", "")
        if self.plan.horizon_days is None and theirs and theirs != str(self.cuts.horizon_days):
            # it answers what is no longer asked, so that it is no rival
            told = f"champion {champion} looks {theirs} days ahead, and the shop asks for {self.cuts.horizon_days}"
            verdict = promotion.first(self.settings.promotion, outcome.report.lead, beaten)
            return replace(verdict, reason=f"{verdict.reason}; {told}")
        try:
            found = self._champion_evaluation(champion, outcome)
        except DamagedArtifactError:
            # it cannot serve either, so that there is none to be better than
            return promotion.first(self.settings.promotion, outcome.report.lead, beaten)
        if found is not None:
            log_frame(found, f"beside_champion_{champion}.parquet")
        return promotion.rival(self.settings.promotion, champion, outcome.evaluation, found, beaten)

    def _champion_evaluation(self, champion: int, outcome: Outcome) -> pd.DataFrame | None:
        """The champion on the challenger's cuts: as it was judged itself, or as it stands on cuts it has not learnt from."""
        import pandas as pd

        tags = self.registry.tags_of(self.model, champion)
        if tags.get("horizon_days") != str(self.cuts.horizon_days):
            return None
        ours, stored = outcome.evaluation, artifact_frame(self.registry.run_of(self.model, champion), "evaluation.parquet")
        parts, learnt_until = [], datetime.fromisoformat(tags["as_of"])
        later: dict[str, datetime] = {}
        for unit, at in outcome.units.items():
            theirs = None if stored is None else stored[stored["unit"] == unit]
            if theirs is not None and same_rows(ours[ours["unit"] == unit], theirs) is not None:
                parts.append(theirs)
            elif at >= learnt_until:
                later[unit] = at
        if later:
            parts.append(outcome.rescore(self.registry.load(f"{self.model}@{self.registry.settings.champion}").model, later))
        return pd.concat(parts, ignore_index=True) if parts else None

    def _promote(self, version: int, verdict: promotion.Verdict) -> str:
        if verdict.passed:
            return promotion.promote(self.registry, self.model, version, verdict, None)
        champion = self.registry.version_of(self.model, self.registry.settings.champion)
        stays = f"champion {champion} stays" if champion is not None else "it is not promoted"
        return f"Version {version} is the challenger; {stays}: {verdict.reason}."


def log_frame(frame: pd.DataFrame, name: str) -> None:
    """Keep a frame with the active run as Parquet."""
    import mlflow

    with tempfile.TemporaryDirectory() as scratch:
        frame.to_parquet(Path(scratch) / name)
        mlflow.log_artifact(str(Path(scratch) / name))


def artifact_frame(run_id: str, name: str) -> pd.DataFrame | None:
    """A frame that a run kept, or None."""
    import mlflow
    import pandas as pd

    try:
        return pd.read_parquet(mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=name))
    except (mlflow.exceptions.MlflowException, OSError):
        return None


def artifact_text(run_id: str, name: str) -> str | None:
    """A text that a run kept, or None."""
    import mlflow

    try:
        return str(mlflow.artifacts.load_text(f"runs:/{run_id}/{name}"))
    except (mlflow.exceptions.MlflowException, OSError):
        return None


def inputs_digest(models: Path, home: Home, events: int, cuts: Cuts, plan: Plan, learner: Learner) -> str:
    """Names everything that a training run's result depends on: events known by then, catalogue, shop, plan, code, settings."""
    catalogue = Catalogue(home).digest("items", "offers", "item_context")
    asked = f"{cuts.horizon_days} {plan.window_days} {plan.seed} {plan.trials}"
    if learner == "ALS":
        # each engine has its own way to learn factors; all else that they make is the same
        asked += f" {home.settings.engine}"
    digest = hashlib.sha256(f"{events} {cuts.final.isoformat()} {asked} {catalogue}".encode())
    digest.update(home.shop.read_bytes() + models.read_bytes())
    for package in ("features", "models", "training"):
        for path in sorted((ROOT / package).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def commit(otherwise: str) -> str:
    """The commit of the code, with ``+changes`` if the tree differs from it; *otherwise* outside a checkout."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return otherwise
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")
