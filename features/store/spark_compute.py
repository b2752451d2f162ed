"""Spark: what works a timeline out on many machines, from the log's files to rows that come back part by part."""

from __future__ import annotations

import contextlib
import math
import shutil
import uuid
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import ibis
import ibis.expr.types as ir
import pyarrow as pa

from features.definitions.compute import Literals, Make, Step
from features.state.file_lease import Scratch
from features.state.home import Home
from features.store.duckdb_compute import SPILL, clear_spills
from features.store.packing import PACKED, packed, unpacked
from features.store.spark_session import open_session

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession


TIME = "timestamp('UTC', 6)"
PART_ROWS = 20_000
"""How many rows a part has that is worked out at once and comes back whole, more or less: Spark divides them by a sample."""


class SparkCompute(Literals):
    """Tables of one timeline in the process's Spark session, under names that no other timeline has.

    The driver holds what it is *given*, and two parts at a time of what comes back (see ``brought_back``).
    """

    def __init__(self, home: Home) -> None:
        self.session = open_session(home)
        self.backend: Any = ibis.pyspark.connect(self.session)
        clear_spills(home)
        self._spill = Scratch(home.root, SPILL)
        self._mark = uuid.uuid4().hex[:8]
        self._views: list[str] = []

    def parquet(self, name: str, files: Sequence[str], schema: pa.Schema | None = None) -> ir.Table:
        """The rows of Parquet files, read by the executors."""
        return self._named(name, read_parquet(self.session, files, schema))

    def given(self, name: str, rows: pa.Table) -> ir.Table:
        """Rows that are in the driver's memory, sent to the executors where they are joined."""
        return self._named(name, self.session.createDataFrame(rows))

    def kept(self, name: str, make: Make, variant: str = "") -> ir.Table:
        """What the expression gives, as Parquet in a folder of the home.

        It is not left to Spark's cache: whatever reads from that carries the whole way to it in its plan, which soon takes longer to
        plan than to work out, and loses it with an executor.
        """
        return self._named(name, self._stored(name, self.frame(make())))

    def asked(self, name: str, make: Make, variant: str = "") -> pa.Table:
        """What the expression gives, in the driver's memory."""
        rows: pa.Table = make().to_pyarrow()
        return rows

    def let_go(self, *names: str) -> None:
        """Delete tables."""
        for name in names:
            shutil.rmtree(self._place(name), ignore_errors=True)

    def ordered(self, make: Callable[[datetime], ir.Table], as_of: datetime, key: str, of: Hashable) -> Iterator[pa.Table]:
        """The rows of the expression in the order of *key*, partition by partition."""
        # they are looked at three times: to count them, by a sample to divide them, and to sort them
        rows = self._stored("ordered", self.frame(make(as_of)))
        for batch in brought_back(in_parts(rows, key, rows.count()).sortWithinPartitions(key), packed):
            yield pa.Table.from_batches([batch])
        self.let_go("ordered")

    def stepped(self, make: Make, groups: str, order: Sequence[str], step: Step) -> Iterator[pa.RecordBatch]:
        """What *step* makes of each partition: its rows come in order, so that no group need fit into memory."""
        rows = self.frame(make())
        # what is read here is kept as Parquet, so that to count it is to look at one column
        frame = in_parts(rows, groups, rows.count()).sortWithinPartitions(*order)

        def stepped(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            return packed(step(batches))

        return brought_back(frame, stepped)

    def frame(self, expression: ir.Table) -> DataFrame:
        """An expression of this timeline's tables as Spark's own."""
        frame: DataFrame = self.session.sql(self.backend.compile(expression))
        return frame

    def close(self) -> None:
        """Let go of all tables; the session goes on."""
        for name in self._views:
            self.session.catalog.dropTempView(name)
        self._spill.close()

    def _named(self, name: str, frame: DataFrame) -> ir.Table:
        view = f"{name}_{self._mark}"
        frame.createOrReplaceTempView(view)
        self._views.append(view)
        table = self.backend.table(view)
        # Spark's times are moments, which ibis takes for times of no zone
        return table.cast({column: TIME for column, kind in table.schema().items() if kind.is_timestamp()})

    def _stored(self, name: str, frame: DataFrame) -> DataFrame:
        frame.write.mode("overwrite").parquet(self._place(name))
        return self.session.read.schema(frame.schema).parquet(self._place(name))

    def _place(self, name: str) -> str:
        return str(self._spill.folder / name)


def in_parts(frame: DataFrame, key: str, rows: int, most: int = PART_ROWS) -> DataFrame:
    """The *rows* of a frame divided by ranges of *key* into parts of *most* rows or fewer, as far as no key has more.

    Spark's own number of parts does not grow with the rows, nor are parts of a number that was given made fewer as it runs.
    """
    usual = int(frame.sparkSession.conf.get("spark.sql.shuffle.partitions") or 1)
    return frame.repartitionByRange(max(usual, math.ceil(rows / most)), key)


def brought_back(frame: DataFrame, step: Step) -> Iterator[pa.RecordBatch]:
    """What *step*, whose batches are ``packed``, makes of a frame: worked out by all executors, then brought partition by partition.

    The driver holds what was made of two partitions: the one that is used, and the one that comes next. ``in_parts`` keeps them small.
    """
    from pyspark import StorageLevel

    parts = frame.mapInArrow(step, PACKED).persist(StorageLevel.DISK_ONLY)
    with contextlib.closing(_Persisted(parts)):
        # an iterator alone would work out one partition after the other
        parts.count()
        for row in parts.toLocalIterator(prefetchPartitions=True):
            yield from unpacked(row[0])


class _Persisted:
    """Lets go of a frame."""

    def __init__(self, frame: DataFrame) -> None:
        self._frame = frame

    def close(self) -> None:
        self._frame.unpersist()


def read_parquet(session: SparkSession, files: Sequence[str], schema: pa.Schema | None = None) -> DataFrame:
    """The rows of Parquet files, read by the executors; a column of *schema* that a file lacks is null."""
    reader = session.read
    if schema is not None:
        from pyspark.sql.pandas.types import from_arrow_schema

        reader = reader.schema(from_arrow_schema(schema))
    return reader.parquet(*files)
