"""Alternating least squares by Spark's MLlib: purchases stay on the executors, the driver gets the factors of items alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from features.definitions.feature import Moment
from features.definitions.folds.history import HistoryFold
from features.state.file_lease import Scratch
from features.state.home import Home
from features.store.duckdb_compute import SPILL
from features.store.spark_compute import read_parquet
from features.store.spark_session import open_session
from models.decay import HISTORY_HALF_LIFE_DAYS, decayed
from models.recommender.ease import Floats
from models.recommender.factors import FactorSettings

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

LOCAL_BITS = 33
"""In how many bits Spark counts the rows of one partition where it numbers all."""
CHECKPOINT_EVERY = 2
"""After so many iterations files of the home are begun from: each iteration remembers all before it, soon more than Java's stack holds."""
PURCHASES = "customer int, item int, strength float"
_COLUMNS = pa.schema([("customer", pa.int32()), ("item", pa.int32()), ("strength", pa.float32())])


def purchases_of(home: Home, states: Path, positions: Mapping[str, int], cut: datetime, oldest: datetime | None) -> DataFrame:
    """How much each customer of a snapshot of states bought of each item: ``PURCHASES``, customers by numbers without gaps."""
    from pyspark.sql.functions import monotonically_increasing_id, shiftright

    session = open_session(home)
    rows = read_parquet(session, [str(states)]).select("history", monotonically_increasing_id().alias("number"))
    sizes = rows.select(shiftright("number", LOCAL_BITS).alias("part")).groupBy("part").count().collect()
    starts, reached = dict[int, int](), 0
    for part, count in sorted((row["part"], row["count"]) for row in sizes):
        starts[part], reached = reached, reached + count
    since = None if oldest is None else oldest.timestamp()

    def step(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        return purchases(batches, positions, starts, cut, since)

    return rows.mapInArrow(step, PURCHASES)


def purchases(
    batches: Iterable[pa.RecordBatch], positions: Mapping[str, int], starts: Mapping[int, int], cut: datetime, since: float | None
) -> Iterator[pa.RecordBatch]:
    """What the histories of some customers hold, on an executor: the root of the purchases of each item, halved every 90 days."""
    fold, moment = HistoryFold(), Moment(cut, "UTC")
    for batch in batches:
        found: list[tuple[int, int, float]] = []
        for text, number in zip(batch["history"].to_pylist(), batch["number"].to_pylist(), strict=True):
            customer = starts[number >> LOCAL_BITS] + (number & ((1 << LOCAL_BITS) - 1))
            told = fold.features(fold.decode(text), moment)
            if since is not None and max(told["bought_last_at"], default=0) < since:
                continue
            weights = np.sqrt(decayed(told["bought_weights"], told["bought_last_at"], cut.timestamp(), HISTORY_HALF_LIFE_DAYS))
            places = (positions.get(item, -1) for item in told["bought_item_ids"])
            found += [(customer, place, weight) for place, weight in zip(places, weights.tolist(), strict=True) if place >= 0]
        columns = zip(*found, strict=True) if found else ([], [], [])
        yield pa.record_batch([pa.array(c, f.type) for c, f in zip(columns, _COLUMNS, strict=True)], schema=_COLUMNS)


def learn_spread(home: Home, held: DataFrame, items: int, settings: FactorSettings, seed: int) -> Floats:
    """The factors of items, ``(items, factors)``, learnt by MLlib; zeros where nobody has bought an item.

    The driver holds these, ``4 * items * factors`` bytes, and twice that while they come.
    """
    from pyspark import StorageLevel
    from pyspark.ml.recommendation import ALS

    als = ALS(
        rank=settings.factors, maxIter=settings.iterations, regParam=settings.mllib_regularization, alpha=settings.alpha,
        implicitPrefs=True, userCol="customer", itemCol="item", ratingCol="strength", seed=seed,
        checkpointInterval=CHECKPOINT_EVERY,
    )  # fmt: skip
    kept, scratch = held.persist(StorageLevel.DISK_ONLY), Scratch(home.root, SPILL)
    held.sparkSession.sparkContext.setCheckpointDir(str(scratch.folder))
    try:
        model = als.fit(kept)
        rows = model.itemFactors.toArrow()
        factors = np.zeros((items, settings.factors), np.float32)
        flat = rows["features"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        factors[rows["id"].to_numpy()] = flat.reshape(len(rows), settings.factors)
        return factors
    finally:
        kept.unpersist()
        scratch.close()
