"""How far the inputs of a champion have moved since it learnt: the population stability index of each, against the bands of its report."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pandas as pd

from features.catalogue.shop import Shop
from features.definitions.timeline import Timeline
from features.people.consent import LEARNING
from features.state.clock import Clock, system_clock
from features.state.home import Home
from features.store.timeline import open_timeline
from models.registry import NoChampionError, Registry
from models.reports import DriftReport, DriftVerdict, InputBins, InputDrift, read_version
from training.bootstrap import open_store
from training.dataset import customers_in_order
from training.gate import shares_of, stability_index
from training.kept import bins_of
from training.lessons import CHUNK, measured_histories
from training.run import artifact_frame

WATCH, MOVED = 0.1, 0.25
"""Below the first an input is stable, from the second on it has moved (Siddiqi, Credit Risk Scorecards, 2006)."""
CHANCE_LEVEL = 0.95
DRAWS = 400


def drift(home: Home, registry: Registry, model: str, as_of: datetime | None = None, clock: Clock = system_clock) -> DriftReport:
    """The inputs of the champion of *model*, by the customers that it would be asked about at *as_of*, the farthest moved first.

    Inputs that grow with the calendar are left out: they always move.

    Args:
        as_of: the moment of the snapshot, made if it is missing; default: where the data ends.

    Raises:
        NoChampionError: the model has no champion, or nothing was kept to compare with.
    """
    version = registry.version_of(model, registry.settings.champion)
    if version is None:
        raise NoChampionError(f"no version of {model} is the champion: train one (python -m training {model})")
    moment = as_of or Shop.load(home).data_end.astimezone(UTC)
    bins, reference_rows = _reference(home, registry, model, version)
    settings, champion = registry.settings.models[model], registry.load(f"{model}@{registry.settings.champion}").model
    past = open_timeline(home, identified_by=moment, purposes=LEARNING).before(moment)
    if settings.kind.answers == "items":
        now = breadth_at(home, past, settings.feature_service, moment)
    else:
        now = asked_at(home, past, moment)
        if hasattr(champion, "why_not"):
            now = now[[champion.why_not(row) is None for row in now.to_dict("records")]]
    if now.empty:
        raise ValueError(f"{model} would be asked about nobody as of {moment:%Y-%m-%d %H:%M}: choose another --as-of")
    ages = {each.name for each in getattr(champion, "inputs", ()) if each.is_age}
    # what is computed of a customer and a campaign is in no snapshot
    known = [each for each in bins if each.name in now and each.name not in ages]
    found = [moved(each, now[each.name].to_numpy(dtype=float), reference_rows) for each in known]
    found.sort(key=lambda each: (-each.psi, each.name))
    return DriftReport(
        model=model, version=version, computed_at=clock(), as_of=moment, rows=len(now), reference_rows=reference_rows, inputs=found
    )  # fmt: skip


def moved(bins: InputBins, now: np.ndarray, reference_rows: int) -> InputDrift:
    """How far one input lies from its bands.

    What chance alone brings is simulated: two samples of these sizes are drawn from the bands as they were. An index within that is
    called stable, whatever the thresholds say.
    """
    before, shares = np.array(bins.shares), shares_of(now, np.array(bins.edges))
    index = stability_index(before, shares)
    rng = np.random.default_rng(0)
    drawn = zip(*(rng.multinomial(rows, before, DRAWS) / rows for rows in (reference_rows, len(now))), strict=True)
    chance = float(np.quantile([stability_index(one, other) for one, other in drawn], CHANCE_LEVEL))
    verdict: DriftVerdict = "stable"
    if index > chance:
        verdict = "moved" if index >= MOVED else "watch" if index >= WATCH else "stable"
    return InputDrift(
        name=bins.name, psi=index, chance=chance, verdict=verdict, edges=bins.edges, before=bins.shares, now=shares.tolist()
    )  # fmt: skip


def asked_at(home: Home, past: Timeline, moment: datetime) -> pd.DataFrame:
    """The windowed features of every customer known in *past*, as they stood at *moment*."""
    store = open_store(home)
    store.backfill("customer_activity", {moment: None})
    return store.historical(pd.DataFrame({"customer_id": customers_in_order(past), "event_timestamp": moment}), "activity_v1")


def breadth_at(home: Home, past: Timeline, service: str, moment: datetime) -> pd.DataFrame:
    """What can drift of the histories of all who had bought anything by *moment*."""
    store = open_store(home)
    store.backfill("customer_state", {moment: None})
    baskets = past.baskets
    buyers = set(baskets.filter(baskets.customer_id.notnull()).select("customer_id").distinct().to_pyarrow()["customer_id"].to_pylist())
    asked = [customer for customer in customers_in_order(past) if customer in buyers]
    spine = pd.DataFrame({"customer_id": asked, "event_timestamp": moment})
    parts = [
        measured_histories(store.historical(spine.iloc[start : start + CHUNK], service, ("history",)), moment)
        for start in range(0, len(spine), CHUNK)
    ]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def _reference(home: Home, registry: Registry, model: str, version: int) -> tuple[list[InputBins], int]:
    """The bands that the version's report holds; else those of the rows that its run kept."""
    report = read_version(home.root, model, version)
    if report is not None:
        return report.inputs, report.reference_rows
    frame = artifact_frame(registry.run_of(model, version), "reference.parquet")
    if frame is None:
        raise NoChampionError(f"the run of {model} version {version} kept no rows to compare with: train it again")
    return bins_of(frame), len(frame)
