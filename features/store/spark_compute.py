"""Spark: what works a timeline out on many machines, from the log's files to rows that come back part by part."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import ibis
import ibis.expr.types as ir
import pyarrow as pa

from features.definitions.compute import Step
from features.state.home import Home
from features.store.spark_session import open_session

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

PACKED = "part binary"
"""A row of what comes back: a batch of rows as Arrow's stream, as Spark hands rows over one by one."""


class SparkCompute:
    """Tables of one timeline in the process's Spark session, under names that no other timeline has.

    The driver holds what it is *given*, and one part at a time of what comes back; the rest lies on the executors' disks.
    """

    def __init__(self, home: Home) -> None:
        self.session = open_session(home)
        self.backend: Any = ibis.pyspark.connect(self.session)
        self._mark = uuid.uuid4().hex[:8]
        self._held: dict[str, DataFrame] = {}

    def parquet(self, name: str, files: Sequence[str], schema: pa.Schema | None = None) -> ir.Table:
        """The rows of Parquet files, read by the executors."""
        reader = self.session.read
        if schema is not None:
            from pyspark.sql.pandas.types import from_arrow_schema

            reader = reader.schema(from_arrow_schema(schema))
        return self._named(name, reader.parquet(*map(_address, files)))

    def given(self, name: str, rows: pa.Table) -> ir.Table:
        """Rows that are in the driver's memory, sent to the executors where they are joined."""
        return self._named(name, self.session.createDataFrame(rows))

    def kept(self, name: str, expression: ir.Table) -> ir.Table:
        """What *expression* gives, on the executors' disks from the first use on."""
        from pyspark import StorageLevel

        frame = self.frame(expression).persist(StorageLevel.DISK_ONLY)
        self._held[name] = frame
        return self._named(name, frame)

    def let_go(self, *names: str) -> None:
        """Nothing is let go before the end: what is kept is worked out when it is read, from these."""

    def ordered(self, expression: ir.Table, key: str) -> Iterator[pa.Table]:
        """The rows of *expression* in the order of *key*, partition by partition."""
        for batch in self._back(self.frame(expression).orderBy(key), packed):
            yield pa.Table.from_batches([batch])

    def stepped(self, expression: ir.Table, groups: str, order: Sequence[str], step: Step) -> Iterator[pa.RecordBatch]:
        """What *step* makes of each partition: its rows come in order, so that no group need fit into memory."""
        frame = self.frame(expression).repartitionByRange(groups).sortWithinPartitions(*order)

        def stepped(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            return packed(step(batches))

        return self._back(frame, stepped)

    def frame(self, expression: ir.Table) -> DataFrame:
        """An expression of this timeline's tables as Spark's own."""
        frame: DataFrame = self.session.sql(self.backend.compile(expression))
        return frame

    def close(self) -> None:
        """Let go of what the executors hold; the session goes on."""
        for frame in self._held.values():
            frame.unpersist()
        for name in self._views:
            self.session.catalog.dropTempView(name)
        self._held.clear()

    def _named(self, name: str, frame: DataFrame) -> ir.Table:
        view = f"{name}_{self._mark}"
        frame.createOrReplaceTempView(view)
        return self.backend.table(view)

    @property
    def _views(self) -> list[str]:
        return [name for name in self.backend.list_tables() if name.endswith(self._mark)]

    def _back(self, frame: DataFrame, step: Any) -> Iterator[pa.RecordBatch]:
        return brought_back(frame, step)


def brought_back(frame: DataFrame, step: Step) -> Iterator[pa.RecordBatch]:
    """What *step*, whose batches are ``packed``, makes of a frame: worked out by all executors, then brought partition by partition."""
    from pyspark import StorageLevel

    parts = frame.mapInArrow(step, PACKED).persist(StorageLevel.DISK_ONLY)
    with contextlib.closing(_Persisted(parts)):
        # an iterator alone would work out one partition after the other
        parts.count()
        for row in parts.toLocalIterator(prefetchPartitions=True):
            with pa.ipc.open_stream(pa.py_buffer(row[0])) as stream:
                yield from stream


class _Persisted:
    """Lets go of a frame."""

    def __init__(self, frame: DataFrame) -> None:
        self._frame = frame

    def close(self) -> None:
        self._frame.unpersist()


def packed(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Each batch as one row that holds it as Arrow's stream."""
    for batch in batches:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as stream:
            stream.write_batch(batch)
        yield pa.record_batch([pa.array([sink.getvalue().to_pybytes()], pa.binary())], names=["part"])


def _address(file: str) -> str:
    """A file as Hadoop's file systems call it."""
    return f"s3a://{file.removeprefix('s3://')}" if file.startswith("s3://") else file
