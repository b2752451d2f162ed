"""Challenger against champion on the same customers and cuts: the table, the pictures and the page that says who should serve."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from features.state.disk import write_atomically
from features.state.home import Home
from models.registry import NoChampionError, Registry, VersionInfo
from models.reports import Document, Sheet
from training import promotion
from training.evaluation import BINARY, RANKING, Lead, form_of, leads, leads_by_segment, same_rows
from training.page import page
from training.plots import calibration_plot, change_plot, gain_plot, lead_plot
from training.report import sheet_of
from training.run import BEATEN, artifact_frame


@dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    Attributes:
        both: the rows of both, side by side.
        leads: by metric.
        segments: by segment, its rows and the lead in the metric that does not move with the base rate.
    """

    model: str
    challenger: int
    champion: int
    both: pd.DataFrame
    leads: dict[str, Lead]
    segments: dict[str, tuple[int, Lead]]
    verdict: promotion.Verdict

    def table(self) -> pd.DataFrame:
        """One row a metric."""
        rows = [(name, f"{x.theirs:.4f}", f"{x.ours:.4f}", str(x.lead)) for name, x in self.leads.items()]
        return pd.DataFrame(
            rows, columns=["metric", f"champion {self.champion}", f"challenger {self.challenger}", "paired lead (positive is better)"]
        )

    def segment_table(self) -> pd.DataFrame:
        """One row a segment."""
        metric = form_of(self.both).by_segment
        rows = [(name, count, f"{x.theirs:.4f}", f"{x.ours:.4f}", str(x.lead)) for name, (count, x) in self.segments.items()]
        return pd.DataFrame(rows, columns=[f"segment ({metric})", "rows", "champion", "challenger", "paired lead"])

    def document(self) -> Document:
        """The comparison as it is printed."""
        title = f"{self.model}: challenger {self.challenger} against champion {self.champion}, {len(self.both)} rows of "
        parts: list[str | Sheet] = [sheet_of(self.table()), sheet_of(self.segment_table()), self.conclusion()]
        return Document(f"{title}{self.both['customer_id'].nunique()} customers", parts)

    def conclusion(self) -> str:
        """What the rule says."""
        return f"The rule {'promotes' if self.verdict.passed else 'does not promote'} version {self.challenger}: {self.verdict.reason}."

    def plots(self) -> list[tuple[str, Figure]]:
        """What changes and where."""
        found = [("lead", lead_plot(self.leads)), ("lead by segment", lead_plot({name: lead for name, (_, lead) in self.segments.items()}))]
        form = form_of(self.both)
        if form is RANKING:
            change = change_plot(self.both["ndcg_at_10_champion"], self.both["ndcg_at_10"], "NDCG@10 of each customer's list")
            return [*found, ("change", change)]
        if form is not BINARY:
            return [*found, ("change", change_plot(self.both["score_champion"], self.both["score"], "days foretold"))]
        labels = self.both["label"].to_numpy(dtype=bool)
        ours, theirs = self.both["score"].to_numpy(dtype=float), self.both["score_champion"].to_numpy(dtype=float)
        return [
            *found,
            ("change", change_plot(self.both["score_champion"], self.both["score"], "probability")),
            ("gain", gain_plot(labels, {f"challenger {self.challenger}": ours, f"champion {self.champion}": theirs})),
            ("calibration of the challenger", calibration_plot(labels, ours, title=f"Calibration of challenger {self.challenger}")),
            ("calibration of the champion", calibration_plot(labels, theirs, title=f"Calibration of champion {self.champion}")),
        ]


def compare(registry: Registry, model: str, version: int | None = None) -> Comparison:
    """The challenger (or *version*) against the champion.

    Raises:
        NoChampionError: one of the two is missing.
        NotPromotedError: both are the same version and it replaced none, or they were never judged on the same rows.
    """
    settings = registry.settings
    champion = registry.version_of(model, settings.champion)
    challenger = version or registry.version_of(model, settings.challenger)
    if champion is None or challenger is None:
        missing = settings.champion if champion is None else settings.challenger
        raise NoChampionError(f"no version of {model} has the alias {missing!r}: train one (python -m training {model})")
    if champion == challenger:
        # it has been promoted: beside the one that it replaced
        before = promotion.standing(registry.crownings(model))[:-1]
        if not before:
            raise promotion.NotPromotedError(f"{model} version {champion} is champion and challenger at once: train a challenger first")
        champion = before[-1]
    ours, theirs = evaluation_of(registry, model, challenger), _champion_rows(registry, model, challenger, champion)
    verdict = promotion.rival(settings.models[model].promotion, champion, ours, theirs)
    both = None if theirs is None else same_rows(ours, theirs)
    if both is None:
        raise promotion.NotPromotedError(f"{model} {challenger} cannot be compared: {verdict.reason}; train the challenger again beside it")
    rule = settings.models[model].promotion
    form = form_of(both)
    return Comparison(
        model, challenger, champion, both, leads(both, form.metrics, rule.draws, rule.level),
        leads_by_segment(both, form.by_segment, rule.draws, rule.level), verdict,
    )  # fmt: skip


def publish(home: Home, registry: Registry, comparison: Comparison) -> str:
    """Write the page into the home and the challenger's run; returns where it lies."""
    import mlflow

    title = f"{comparison.model}: challenger {comparison.challenger} against champion {comparison.champion}"
    both, cuts = comparison.both, ", ".join(sorted(set(comparison.both["unit"])))
    about = f"{len(both)} rows of {both['customer_id'].nunique()} customers; judged on {cuts}."
    parts = [comparison.conclusion(), about, comparison.table(), comparison.segment_table(), *comparison.plots()]
    text = page(title, parts)
    name = f"comparison-{comparison.model}-{comparison.challenger}-{comparison.champion}.html"
    path = home.root / "reports" / name
    write_atomically(path, text.encode())
    mlflow.MlflowClient().log_text(registry.run_of(comparison.model, comparison.challenger), text, name)
    return str(path)


def verdict_on(registry: Registry, model: str, version: int | None) -> tuple[int, promotion.Verdict]:
    """The version to promote (by default the challenger) and what the rule says of it.

    Raises:
        NoChampionError: there is no such version.
    """
    chosen = version or registry.version_of(model, registry.settings.challenger)
    if chosen is None or chosen not in {v.version for v in registry.versions(model)}:
        raise NoChampionError(
            f"there is no {model} version {chosen or 'with the alias challenger'}: python -m training history {model} lists them"
        )
    champion = registry.version_of(model, registry.settings.champion)
    if champion == chosen:
        raise promotion.NotPromotedError(f"{model} version {chosen} is the champion already")
    if champion is None:
        tags = registry.tags_of(model, chosen)
        return chosen, promotion.Verdict(False, tags.get("verdict", "it was never judged"))
    ours, theirs = evaluation_of(registry, model, chosen), _champion_rows(registry, model, chosen, champion)
    beaten = registry.tags_of(model, chosen).get(BEATEN)
    return chosen, promotion.rival(registry.settings.models[model].promotion, champion, ours, theirs, beaten)


def history(registry: Registry, model: str) -> pd.DataFrame:
    """One row a version: what it learnt from, how it was judged, and when and why it served."""
    crowned: dict[int, list[str]] = {}
    for crowning in registry.crownings(model):
        crowned.setdefault(crowning.version, []).append(f"{crowning.at:%Y-%m-%d %H:%M} {crowning.how}: {crowning.reason}")
    return pd.DataFrame([_history_row(v, crowned.get(v.version, [])) for v in registry.versions(model)])


def _history_row(version: VersionInfo, crowned: list[str]) -> dict[str, str]:
    return {
        "version": f"{version.version}",
        "alias": ", ".join(sorted(version.aliases)),
        "learnt until": version.tags.get("as_of", "")[:10],
        "log": version.tags.get("log_version", ""),
        "commit": version.tags.get("commit", "")[:8],
        "judged": version.tags.get("verdict", "not to the end: the run was cut off"),
        "became champion": "\n".join(crowned),
    }


def evaluation_of(registry: Registry, model: str, version: int) -> pd.DataFrame:
    """The evaluation that a version's run kept.

    Raises:
        NoChampionError: it kept none.
    """
    found = artifact_frame(registry.run_of(model, version), "evaluation.parquet")
    if found is None:
        raise NoChampionError(f"the run of {model} version {version} kept no evaluation: train it again")
    return found


def _champion_rows(registry: Registry, model: str, challenger: int, champion: int) -> pd.DataFrame | None:
    """The champion beside the challenger: as the challenger's run judged it, else as its own run did."""
    beside = artifact_frame(registry.run_of(model, challenger), f"beside_champion_{champion}.parquet")
    return beside if beside is not None else artifact_frame(registry.run_of(model, champion), "evaluation.parquet")
