"""The tracked run: one job's parameters, measures, plots and model in MLflow, the ledger of looks, and promotion."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from features.catalogue import Catalogue
from features.clock import system_clock
from features.event_log import EventLog
from features.home import Home, write_atomically
from features.shop import Shop
from models.registry import Kind, Registry, settings_path
from training.metrics import Estimate, bootstrap, compare_binary, difference, estimates

if TYPE_CHECKING:
    import pandas as pd

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Report:
    """What a job found, for people and for the promotion rule.

    Attributes:
        table: one row a model: name, and by column the estimate or text to print.
        lead: the served model's paired lead over its simple baseline on the promotion metric.
        notes: sentences that belong under the table.
    """

    kind: str
    title: str
    served: str
    baseline: str
    columns: Sequence[str]
    table: Mapping[str, Mapping[str, str]]
    lead: Estimate
    notes: list[str] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)

    def text(self) -> str:
        """The report as Markdown."""
        head = f"**{self.title}**\n\n| model | " + " | ".join(self.columns) + " |\n|---|" + "---|" * len(self.columns)
        rows = [
            f"| {'**' + name + '** (served)' if name == self.served else name} | "
            + " | ".join(row.get(column, "") for column in self.columns)
            + " |"
            for name, row in self.table.items()
        ]
        lead = f"Lead of {self.served} over {self.baseline}, paired: {self.lead}."
        return "\n".join([head, *rows, "", *(f"{note}" for note in [lead, *self.notes])])


class TrackedRun:
    """One training job under way in MLflow."""

    def __init__(self, home: Home, kind: Kind, as_of: datetime, seed: int) -> None:
        self.home, self.kind, self.as_of, self.seed = home, kind, as_of, seed
        self.shop = Shop.load(home)
        self.registry = Registry()
        self.settings = self.registry.settings.models[kind]
        log = EventLog(home, self.shop.timezone)
        self.log_version = log.version()
        self.inputs = inputs_digest(home, log.known_before(as_of), as_of, seed)

    def standing_report(self) -> str | None:
        """The report of a registered version made from exactly these inputs and judged to the end, if there is one."""
        import mlflow
        from mlflow.exceptions import MlflowException

        for alias in (self.registry.settings.champion, self.registry.settings.challenger):
            version = self.registry.version_of(self.kind, alias)
            if version is None or self.registry.tags_of(self.kind, version).get("inputs") != self.inputs:
                continue
            try:
                # logged last: a run that was killed before its verdict has none, and is made again
                return str(mlflow.artifacts.load_text(f"runs:/{self.registry.run_of(self.kind, version)}/report.md"))
            except (MlflowException, OSError):
                continue
        return None

    @contextmanager
    def started(self, parameters: Mapping[str, Any]) -> Iterator[None]:
        """Run the body as an MLflow run that carries everything needed to make it again."""
        import mlflow

        if mlflow.get_experiment_by_name(self.settings.experiment) is None:
            mlflow.create_experiment(self.settings.experiment, artifact_location=self.registry.settings.artifact_location)
        mlflow.set_experiment(self.settings.experiment)
        with mlflow.start_run(run_name=f"{self.kind} {self.as_of:%Y-%m-%d}"):
            mlflow.set_tags(self.tags())
            mlflow.log_params({"seed": self.seed, "as_of": self.as_of.isoformat(), **parameters})
            yield

    def tags(self) -> dict[str, str]:
        """What a model version must be traceable to."""
        return {
            "log_version": str(self.log_version),
            "commit": commit(),
            "feature_service": self.settings.feature_service,
            "as_of": self.as_of.isoformat(),
            "shop": self.shop.name,
            "inputs": self.inputs,
        }

    def look(self, cuts: Sequence[str]) -> int:
        """Note in the ledger that the evaluation cuts were looked at once more; returns how often that was so far."""
        entry = {"kind": self.kind, "at": system_clock().isoformat(), "cuts": list(cuts), "inputs": self.inputs, "commit": commit()}
        path = self.home.root / "ledger.jsonl"
        with self.home.locked("ledger"), open(path, "ab") as handle:
            handle.write(msgspec.json.encode(entry) + b"\n")
        lines = [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]
        return sum(line["kind"] == self.kind for line in lines)

    def finish(
        self, model: Any, report: Report, evaluation: pd.DataFrame, example: pd.DataFrame, output: Any, plots: Mapping[str, Any]
    ) -> int:
        """Log report, plots and per-customer evaluation, register the model as challenger, and promote it if it may be."""
        import mlflow
        from mlflow.models import infer_signature

        mlflow.log_metrics({k: v for k, v in report.metrics.items() if v == v})
        for name, figure in plots.items():
            mlflow.log_figure(figure, f"plots/{name}.png")
        with tempfile.TemporaryDirectory() as scratch:
            evaluation.to_parquet(Path(scratch) / "evaluation.parquet")
            mlflow.log_artifact(str(Path(scratch) / "evaluation.parquet"))
            folder = Path(scratch) / self.kind
            model.save(folder)
            version = self.registry.save(self.kind, folder, infer_signature(example, output), example, self.tags())
        verdict = self._promote(version, report, evaluation)
        report.notes.append(verdict)
        write_atomically(self.home.root / "reports" / f"{self.kind}.md", report.text().encode())
        mlflow.log_text(report.text(), "report.md")
        return version

    def _promote(self, version: int, report: Report, evaluation: pd.DataFrame) -> str:
        """The first champion must beat its simple baseline; a standing one is replaced only by a clearly better one."""
        promotion, lead = self.settings.promotion, report.lead
        champion = self.registry.version_of(self.kind, self.registry.settings.champion)
        if champion is not None:
            rival = self._champion_lead(champion, evaluation)
            if rival is None or not rival.low > 0:
                told = "it was judged on other customers or cuts" if rival is None else f"the lead over it is {rival}"
                return f"Version {version} is the challenger; champion {champion} stays: {told}."
            lead = rival
        if not lead.low > 0:
            return (
                f"Version {version} is not promoted: its lead over {report.baseline} in {promotion.metric} ({lead}) "
                "may be noise. There is no champion to serve."
            )
        over = f"champion {champion}" if champion is not None else report.baseline
        reason = f"{promotion.metric}: lead over {over} {lead}, rule {promotion.rule}"
        self.registry.promote(self.kind, version, reason)
        return f"Version {version} is the champion ({reason})."

    def _champion_lead(self, champion: int, evaluation: pd.DataFrame) -> Estimate | None:
        """The challenger's paired lead over the champion on the same customers and cuts, or None if these differ."""
        import mlflow
        import pandas as pd

        run_id = self.registry.run_of(self.kind, champion)
        path = mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path="evaluation.parquet")
        theirs = pd.read_parquet(path)
        both = evaluation.merge(theirs, on=["customer_id", "unit"], suffixes=("", "_champion"))
        if not len(evaluation) == len(theirs) == len(both):
            return None
        return paired_lead(both, self.settings.promotion.metric)


def paired_lead(both: pd.DataFrame, metric: str) -> Estimate:
    """How far ``score`` lies above ``score_champion`` in *metric*, resampling customers.

    With a ``label`` the scores are answers to be ranked, by ``group``; without, they are the customer's own measure.
    """
    if "label" in both:
        groups, labels = both["group"].to_numpy(dtype=str), both["label"].to_numpy(dtype=bool)
        scores = {name: (both[name].to_numpy(dtype=float), False) for name in ("score", "score_champion")}
        names, values, drawn = compare_binary(both["customer_id"].tolist(), groups, labels, scores)
        return difference(values, drawn, names, f"score/{metric}", f"score_champion/{metric}")
    units = both["unit"].to_numpy(dtype=str)
    gap = (both["score"] - both["score_champion"]).to_numpy(dtype=float)
    values, drawn = bootstrap(both["customer_id"].tolist(), lambda weights: np.array([mean_over_units(units, gap, weights)]))
    return estimates(values, drawn, ["lead"])["lead"]


def mean_over_units(units: NDArray[np.str_], values: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    """The mean over cuts of the weighted mean of *values* within each cut."""
    kinds = np.unique(units)
    return float(np.mean([np.average(values[units == u], weights=weights[units == u]) for u in kinds]))


def inputs_digest(home: Home, events: int, as_of: datetime, seed: int) -> str:
    """Names everything that a training run's result depends on: events known by then, catalogue, shop, code and settings."""
    catalogue = Catalogue(home).digest("items", "offers", "item_context")
    digest = hashlib.sha256(f"{events} {as_of.isoformat()} {seed} {catalogue}".encode())
    digest.update(home.shop.read_bytes() + settings_path().read_bytes())
    for package in ("features", "models", "training"):
        for path in sorted((ROOT / package).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def commit() -> str:
    """The commit of the code, with ``+changes`` if the tree differs from it; ``unknown`` outside a checkout."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("UBIQUO_COMMIT", "unknown")
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")
