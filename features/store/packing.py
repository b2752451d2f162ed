"""How rows come back from where they were worked out: batches of them, each as one value.

Spark's workers import this in each of their processes, so it imports little.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pyarrow as pa

PACKED = "part binary"
"""The one column of what comes back, as Spark spells it."""


def packed(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Each batch as one row that holds it as Arrow's stream."""
    for batch in batches:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as stream:
            stream.write_batch(batch)
        yield pa.record_batch([pa.array([sink.getvalue().to_pybytes()], pa.binary())], names=["part"])


def unpacked(part: bytes) -> Iterator[pa.RecordBatch]:
    """The batches of one row."""
    with pa.ipc.open_stream(pa.py_buffer(part)) as stream:
        yield from stream
