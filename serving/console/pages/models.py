"""The models: which version answers and since when, how good it is beside the simple ones, and whether its inputs have moved."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from models.registry import Crowning, VersionInfo
from models.reports import DriftReport, ModelReport, Reports, TrainedVersion, read_reports, read_version
from serving.console.port import RefusedError
from serving.console.quality import bars, calibration_plot, compared, gain_plot, history_plot, measure_name, spoken
from serving.console.visit import Page, Visit
from serving.decide.engine import Engine
from serving.runtime import Runtime

DRAWN = 12
"""So many inputs, those that moved farthest, are drawn."""
SHOWN_VERSIONS = 50


async def overview(visit: Visit) -> Response:
    """Every model in one line."""
    lines, unreadable = await visit.port.work(_lines, visit)
    broken = {name: why for name, why in visit.runtime.engine.broken.items() if name not in visit.runtime.engine.models}
    return visit.page("models.html", lines=lines, others=broken, unreadable=unreadable)


async def one(visit: Visit) -> Response:
    """Everything of one model."""
    name = visit.part("model")
    if name not in visit.runtime.engine.models:
        raise RefusedError(404, visit.words.say("There is no model of that name: mlflow.yaml names them."))
    told = await visit.port.work(lambda: _told(visit.runtime, name, read_reports(visit.runtime.home.root)))
    return visit.page("model.html", **_line_of(visit, name, told), **_plots(visit, told), **_moved(told), inputs=_inputs(visit, name))


def _lines(visit: Visit) -> tuple[list[dict[str, Any]], list[str]]:
    reports = read_reports(visit.runtime.home.root)
    told = {name: _told(visit.runtime, name, reports) for name in visit.runtime.engine.models}
    return [_line_of(visit, name, each) for name, each in told.items()], list(reports.unreadable.values())


def _told(runtime: Runtime, name: str, reports: Reports) -> dict[str, Any]:
    """What registry and reports hold of one model."""
    engine = runtime.engine
    served = _served(engine, name)
    told: dict[str, Any] = {
        "version": served,
        "versions": [],
        "crownings": [],
        "registry": "",
        "report": None,
        "history": reports.history.get(name, []),
        "drift": reports.drifts.get(name),
        "unreadable": [why for path, why in reports.unreadable.items() if f"/{name}/" in path or path.endswith(f"/{name}.json")],
    }
    try:
        told["versions"] = engine.registry.versions(name)
        told["crownings"] = engine.registry.crownings(name, told["versions"])
    except Exception as error:
        # a registry that cannot be asked must not take away what serves
        told["registry"] = f"{type(error).__name__}: {error}"[:300]
    newest = reports.models.get(name)
    if newest is not None and newest.version == served:
        told["report"] = newest
    elif served is not None:
        try:
            told["report"] = read_version(runtime.home.root, name, served)
        except (ValueError, OSError) as error:
            told["unreadable"].append(str(error))
    return told


def _served(engine: Engine, name: str) -> int | None:
    return None if name in engine.missing() else engine.champion(name).model.version


def _line_of(visit: Visit, name: str, told: dict[str, Any]) -> dict[str, Any]:
    engine, words = visit.runtime.engine, visit.words
    served: int | None = told["version"]
    versions: list[VersionInfo] = told["versions"]
    crowned: list[Crowning] = [each for each in told["crownings"] if each.version == served]
    aliases = {alias: each.version for each in versions for alias in each.aliases}
    settings = engine.registry.settings
    challenger = aliases.get(settings.challenger)
    report: ModelReport | None = told["report"]
    measure = None
    if report is not None:
        quality = report.quality
        measure = {
            "name": measure_name(report.metric, words),
            "value": spoken(quality[report.served][report.metric], words),
            "baseline": report.baseline,
            "baseline_value": spoken(quality[report.baseline][report.metric], words),
            "lead": spoken(report.lead, words),
            "leads": report.lead.low is not None and report.lead.low > 0,
        }
    history: list[TrainedVersion] = told["history"]
    return {
        "name": name,
        "kind": engine.models[name].kind,
        "version": served,
        "champion": aliases.get(settings.champion),
        "since": crowned[-1] if crowned else None,
        "challenger": challenger if challenger not in (served, aliases.get(settings.champion)) else None,
        "challenger_lead": next((spoken(each.lead, words) for each in history if each.version == challenger), ""),
        "broken": engine.broken.get(name, ""),
        "measure": measure,
        "report": report,
        "unreadable": told["unreadable"],
        "registry": told["registry"],
        "registered": len(versions),
    }


def _plots(visit: Visit, told: dict[str, Any]) -> dict[str, Any]:
    report: ModelReport | None = told["report"]
    history: list[TrainedVersion] = told["history"]
    words = visit.words
    metrics = visit.runtime.engine.models[visit.part("model")].kind.metrics
    found: dict[str, Any] = {
        "history": [
            {
                "line": each,
                "value": spoken(each.value, words),
                "baseline": spoken(each.baseline_value, words),
                "lead": spoken(each.lead, words),
            }
            for each in history[::-1][:SHOWN_VERSIONS]
        ],
        "history_plot": history_plot(history, words) if history else None,
        "compared": [] if report is None else compared(report, metrics, words),
        "calibration": None if report is None else calibration_plot(report.calibration, words),
        "gain": None if report is None else gain_plot(report.calibration, words),
        "segments": [],
    }
    if report is not None:
        found["segments"] = [(segment, rows, spoken(value, words)) for segment, (rows, value) in report.segments.items()]
        found["segment_measure"] = measure_name(report.segment_metric, words)
    return found


def _moved(told: dict[str, Any]) -> dict[str, Any]:
    drift: DriftReport | None = told["drift"]
    if drift is None:
        return {"drift": None, "drift_rows": [], "drift_rest": [], "drift_is_old": False, "unstable": 0}
    rows = [(each, bars(each)) for each in drift.inputs[:DRAWN]]
    return {
        "drift": drift,
        "drift_rows": rows,
        "drift_rest": drift.inputs[DRAWN:],
        "drift_is_old": told["version"] is not None and drift.version != told["version"],
        "unstable": sum(each.verdict != "stable" for each in drift.inputs),
    }


def _inputs(visit: Visit, name: str) -> list[tuple[str, str]]:
    """What the model that serves reads of a customer, as it was trained: the name, and what it says."""
    engine = visit.runtime.engine
    if name in engine.missing():
        return []
    model = engine.champion(name).model.model
    read = getattr(model, "customer", getattr(model, "inputs", ()))
    return [(each.name, each.phrase) for each in read]


PAGES = [
    Page("/models", overview, "decide", menu="Models", group="Models"),
    Page("/models/{model}", one, "decide"),
]
