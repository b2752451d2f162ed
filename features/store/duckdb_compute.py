"""DuckDB in this process: what works a timeline out on one machine."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from datetime import datetime
from typing import Any

import ibis
import ibis.expr.types as ir
import pyarrow as pa

from features.definitions.compute import Literals, Make, Step
from features.state.file_lease import Scratch
from features.state.home import Home

SPILL = "spill"
"""Of the folder where what does not fit into memory lies while it is worked on."""
MOST_MEGABYTES = 800
"""How much memory the tables of one timeline take; what is more lies on the disk."""
ROWS_AT_ONCE = 300_000
"""How many rows are sorted at once: DuckDB cannot spill all that a sort of nested rows holds."""
BATCH_ROWS = 20_000


class DuckDBCompute(Literals):
    """A DuckDB connection of its own, which holds so much in memory and the rest in a folder of the home."""

    def __init__(self, home: Home) -> None:
        clear_spills(home)
        self.backend: Any = ibis.duckdb.connect()
        self._spill = Scratch(home.root, SPILL)
        for setting in (
            "TimeZone='UTC'",
            f"memory_limit='{MOST_MEGABYTES}MB'",
            f"temp_directory='{self._spill.folder / 'tables'}'",
            "preserve_insertion_order=false",
        ):
            self.backend.raw_sql(f"SET {setting}")

    def parquet(self, name: str, files: Sequence[str], schema: pa.Schema | None = None) -> ir.Table:
        """The rows of Parquet files."""
        more = {} if schema is None else {"union_by_name": True}
        return self.backend.read_parquet(list(files), table_name=name, **more)

    def given(self, name: str, rows: pa.Table) -> ir.Table:
        """Rows that are in this process's memory."""
        return self.backend.create_table(name, rows, temp=True)

    def kept(self, name: str, make: Make, variant: str = "") -> ir.Table:
        """What the expression gives, as a table."""
        return self.backend.create_table(name, make(), temp=True)

    def asked(self, name: str, make: Make, variant: str = "") -> pa.Table:
        """What the expression gives, in memory."""
        rows: pa.Table = make().to_pyarrow()
        return rows

    def let_go(self, *names: str) -> None:
        """Drop tables."""
        for name in names:
            self.backend.drop_table(name, force=True)

    def ordered(self, make: Callable[[datetime], ir.Table], as_of: datetime, key: str, of: Hashable) -> Iterator[pa.Table]:
        """The rows of the expression in the order of *key*, at once."""
        yield make(as_of).to_pyarrow().sort_by(key)

    def stepped(self, make: Make, groups: str, order: Sequence[str], step: Step) -> Iterator[pa.RecordBatch]:
        """What *step* makes of the rows, called once with all of them."""
        return step(self._sorted(make(), groups, order))

    def _sorted(self, expression: ir.Table, groups: str, order: Sequence[str]) -> Iterator[pa.RecordBatch]:
        for first, last in self._ranges(expression, groups):
            part = expression.filter(expression[groups].between(first, last)).order_by(*order)
            # streamed by DuckDB itself: ibis 12 asks DuckDB 2 for a method that it no longer has
            yield from self.backend.con.sql(str(ibis.to_sql(part, "duckdb"))).to_arrow_reader(BATCH_ROWS)

    @staticmethod
    def _ranges(rows: ir.Table, groups: str) -> Iterator[tuple[str, str]]:
        """The first and the last of so many groups, in their order, as have few enough rows to be sorted in memory."""
        counted = rows.group_by(groups).aggregate(rows=rows.count()).order_by(groups).to_pyarrow()
        first, last, held = None, "", 0
        for group, count in zip(counted[groups].to_pylist(), counted["rows"].to_pylist(), strict=True):
            if first is not None and held + count > ROWS_AT_ONCE:
                yield first, last
                first, held = None, 0
            first, last, held = first or group, group, held + count
        if first is not None:
            yield first, last

    def close(self) -> None:
        """Let go of the connection, of the tables that it holds in memory and of what it spilled."""
        self.backend.disconnect()
        self._spill.close()


def clear_spills(home: Home) -> None:
    """Delete what timelines that are closed, or whose process was killed, have left on the disk."""
    Scratch.clear(home.root, SPILL)
