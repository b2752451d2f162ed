"""What works expressions out: the port behind which one machine's DuckDB or many machines' Spark stands."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import ibis.expr.types as ir
import pyarrow as pa

Step = Callable[[Iterable[pa.RecordBatch]], Iterator[pa.RecordBatch]]
"""What is done with rows that come in order. It may run on another machine, so it carries all that it needs."""


class Compute(Protocol):
    """Tables of one timeline, and what is made of them. Each expression means the same on every engine; what is made may be large."""

    def parquet(self, name: str, files: Sequence[str], schema: pa.Schema | None = None) -> ir.Table:
        """The rows of Parquet files; a column of *schema* that a file lacks is null."""

    def given(self, name: str, rows: pa.Table) -> ir.Table:
        """Rows that are in this process's memory: few."""

    def kept(self, name: str, expression: ir.Table) -> ir.Table:
        """What *expression* gives, worked out once however often it is read."""

    def let_go(self, *names: str) -> None:
        """Let go of tables that nothing reads any more."""

    def ordered(self, expression: ir.Table, key: str) -> Iterator[pa.Table]:
        """The rows of *expression* in the order of *key*, part by part."""

    def stepped(self, expression: ir.Table, groups: str, order: Sequence[str], step: Step) -> Iterator[pa.RecordBatch]:
        """What *step* makes of the rows of *expression* in that *order*, which begins with the column *groups*.

        It may be called for several parts of the rows, no two of which share a group; what it gives comes in the order of the groups.
        """

    def close(self) -> None:
        """Let go of all tables; nothing of them can be read any more."""
