"""Lookalikes: who of all customers is most like those of a list, by their features; how well that can be told is measured first."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from features.catalogue.shop import Shop
from features.definitions.domain import domain_named
from features.definitions.feature import Feature
from features.people.consent import LEARNING
from features.people.identity import Identities
from features.people.listed import read_list
from features.state.disk import write_atomically
from features.state.home import Home
from features.store.outputs import owners_of, part_of, remember_output
from features.store.timeline import open_timeline
from training.bootstrap import open_store
from training.dataset import NothingToLearnError
from training.metrics import BinaryScores, Estimate, bootstrap, estimates

FOLDS = 5
LEAST_LISTED = 20
"""With fewer customers of the list nothing is learnt."""
DRAWS = 200
TOLD = 5
"""How many of the strongest features are told."""
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Lookalike:
    """What was learnt, and who is most like the list.

    Attributes:
        listed: how many customers of the list have features and were learnt from.
        unknown: how many rows of the list name nobody who is known.
        left_out: how many of the list have no features, or do not allow that anything is learnt from them.
        others: how many other customers they were compared with.
        auc: how well the list is told from the rest, by customers that the scorer had not seen; with its 95% interval.
        strongest: what tells them apart most, and which way: a feature and the change of the log-odds by one standard deviation.
        customers: the most alike that are not on the list, the first first, with the score of each.
    """

    listed: int
    unknown: int
    left_out: int
    others: int
    auc: Estimate
    strongest: Sequence[tuple[str, float]]
    customers: Sequence[tuple[str, float]]


def find_lookalikes(home: Home, path: Path, as_of: datetime, top: int, seed: int = 0) -> Lookalike:
    """Learn from the list in the file *path*, and find the *top* customers most like it by their features at *as_of*.

    Learnt is from those alone who allow personalization and analytics; found is among all whose features may be used.

    Raises:
        NothingToLearnError: the list names too few customers, or cannot be told from the rest.
        ListError: the list cannot be read.
    """
    shop, identities = Shop.load(home), Identities(home)
    listed = read_list(path, identities, shop.phone_region)
    store = open_store(home)
    store.backfill("customer_activity", {as_of: None})
    names = [f.name for f in domain_named(shop.domain).customer if _is_number(f)]
    table = pq.read_table(store.snapshot("customer_activity", as_of), columns=["customer_id", *names])
    customers: list[str] = table["customer_id"].to_pylist()
    rows = _matrix(table, names)
    on_list = frozenset(listed.customers)
    labels = np.array([identities.current(customer) in on_list for customer in customers], bool)
    learning = _may_be_learnt_from(home, as_of)
    learnt = np.array([customer in learning for customer in customers], bool)
    count = int(labels[learnt].sum())
    others = int((~labels[learnt]).sum())
    if min(count, others) < LEAST_LISTED:
        told = f"{len(listed.customers)} customers of {path} are known, and {count} of them have features that may be learnt from"
        raise NothingToLearnError(f"{told}, {others} others do: {LEAST_LISTED} of each are needed")
    scorer = _scorer(seed)
    auc = _auc(scorer, rows[learnt], labels[learnt], [c for c, k in zip(customers, learnt, strict=True) if k], seed)
    if auc.low <= 0.5:
        raise NothingToLearnError(f"the list cannot be told from the rest by the features: AUC {auc}, where 0.5 is a guess")
    scorer.fit(rows[learnt], labels[learnt])
    scores = np.asarray(scorer.decision_function(rows), np.float64)
    order = [int(k) for k in np.lexsort((np.arange(len(scores)), -scores)) if not labels[k]][:top]
    weights = np.asarray(scorer[-1].coef_[0], np.float64)
    strongest = [(names[int(k)], float(weights[k])) for k in np.argsort(-np.abs(weights[: len(names)]))[:TOLD]]
    found = [(customers[k], float(scores[k])) for k in order]
    return Lookalike(count, listed.unknown, len(on_list) - count, others, auc, strongest, found)


def write_lookalikes(home: Home, found: Lookalike, out: Path) -> None:
    """Write the customers into a CSV that an erasure finds, and that ``python -m serving audience export --among`` reads.

    Raises:
        ValueError: the file is no CSV.
    """
    if out.suffix != ".csv":
        raise ValueError(f"--out {out}: end the name in .csv")
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["customer_id", "rank", "score"])
    writer.writerows((customer, rank, f"{score:.6f}") for rank, (customer, score) in enumerate(found.customers, 1))
    owners = owners_of(out)
    remember_output(home, out, owners, part_of(out), part_of(owners))
    # rows and their owners of two lists must never stand side by side
    out.unlink(missing_ok=True)
    write_atomically(owners, msgspec.json.encode([customer for customer, _ in found.customers]), mode=0o600)
    write_atomically(out, text.getvalue().encode(), mode=0o600)
    remember_output(home, out, owners)


def _is_number(feature: Feature) -> bool:
    return feature.dtype in ("integer", "float", "truth")


def _matrix(table: pa.Table, names: Sequence[str]) -> Floats:
    columns = [table[name].cast(pa.float64()).to_numpy(zero_copy_only=False) for name in names]
    return np.column_stack(columns).astype(np.float64)


def _may_be_learnt_from(home: Home, as_of: datetime) -> frozenset[str]:
    opened = open_timeline(home, identified_by=as_of, purposes=LEARNING)
    try:
        events = opened.before(as_of).events
        found: list[str] = (
            events.filter(events.customer_id.notnull()).select("customer_id").distinct().to_pyarrow()["customer_id"].to_pylist()
        )
    finally:
        opened.close()
    return frozenset(found)


def _scorer(seed: int) -> Pipeline:
    """Counts and sums are long-tailed, so their logarithm is taken; a list is a small share of all, so both sides weigh the same."""
    return make_pipeline(
        FunctionTransformer(_shrunk),
        SimpleImputer(strategy="median", add_indicator=True, keep_empty_features=True),
        StandardScaler(),
        LogisticRegression(C=0.1, class_weight="balanced", max_iter=2_000, random_state=seed),
    )


def _shrunk(rows: Floats) -> Floats:
    return np.asarray(np.sign(rows) * np.log1p(np.abs(rows)), np.float64)


def _auc(scorer: Any, rows: Floats, labels: NDArray[np.bool_], customers: Sequence[str], seed: int) -> Estimate:
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    scores = np.asarray(cross_val_predict(scorer, rows, labels, cv=folds, method="decision_function"), np.float64)
    judged = BinaryScores(labels, scores, is_probability=False)
    values, drawn = bootstrap(customers, lambda weights: np.array([judged.measures(weights)["auc"]]), DRAWS, seed)
    return estimates(values, drawn, ["auc"])["auc"]
