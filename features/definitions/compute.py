"""What works expressions out: the port behind which one machine's DuckDB or many machines' Spark stands."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from datetime import date, datetime, timedelta
from typing import Protocol

import ibis
import ibis.expr.types as ir
import pyarrow as pa

Make = Callable[[], ir.Table]
"""Makes an expression; it is not called where its statement is known already."""

Step = Callable[[Iterable[pa.RecordBatch]], Iterator[pa.RecordBatch]]
"""What is done with rows that come in order. It may run on another machine, so it carries all that it needs."""


class MomentTerms(Protocol):
    """How the moment that features are of stands in an expression."""

    def moment(self, as_of: datetime, days: int = 0) -> ir.TimestampValue:
        """So many *days* before the moment *as_of*."""

    def day(self, today: date) -> ir.DateValue:
        """The shop's own day at the moment."""


class Literals:
    """Each moment as itself."""

    def moment(self, as_of: datetime, days: int = 0) -> ir.TimestampValue:
        """As ``MomentTerms`` says."""
        return ibis.timestamp(as_of - timedelta(days=days))

    def day(self, today: date) -> ir.DateValue:
        """As ``MomentTerms`` says."""
        return ibis.literal(today)


class Compute(MomentTerms, Protocol):
    """Tables of one timeline, and what is made of them. Each expression means the same on every engine; what is made may be large.

    Whatever a *make* makes follows from the name, and the *variant*, under which it is asked for: a compute that works for a few customers
    again and again calls it once.
    """

    def parquet(self, name: str, files: Sequence[str], schema: pa.Schema | None = None) -> ir.Table:
        """The rows of Parquet files; a column of *schema* that a file lacks is null."""

    def given(self, name: str, rows: pa.Table) -> ir.Table:
        """Rows that are in this process's memory: few."""

    def kept(self, name: str, make: Make, variant: str = "") -> ir.Table:
        """What the expression gives, worked out once however often it is read."""

    def asked(self, name: str, make: Make, variant: str = "") -> pa.Table:
        """What the expression gives, in this process's memory: few rows."""

    def let_go(self, *names: str) -> None:
        """Let go of tables that nothing reads any more."""

    def ordered(self, make: Callable[[datetime], ir.Table], as_of: datetime, key: str, of: Hashable) -> Iterator[pa.Table]:
        """The rows of the expression at the moment *as_of* in the order of *key*, part by part; *of* says which expression it is."""

    def stepped(self, make: Make, groups: str, order: Sequence[str], step: Step) -> Iterator[pa.RecordBatch]:
        """What *step* makes of the rows of the expression in that *order*, which begins with the column *groups*.

        It may be called for several parts of the rows, no two of which share a group; what it gives comes in the order of the groups.
        """

    def close(self) -> None:
        """Let go of all tables; nothing of them can be read any more."""
