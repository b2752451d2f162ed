"""DuckDB for a few customers again and again: what is asked of them is put into SQL once, and not anew with each moment.

To make an expression and put it into SQL takes longer than to work it out for a few customers, and holds the interpreter meanwhile.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from functools import lru_cache
from zoneinfo import ZoneInfo

import duckdb
import ibis
import ibis.expr.datatypes as dt
import ibis.expr.schema as sch
import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.parquet as pq

from features.catalogue.shop import Shop
from features.catalogue.tables import Catalogue
from features.definitions.compute import Make, Step
from features.state.home import Home
from features.store.duckdb_compute import BATCH_ROWS, DuckDBCompute

MOMENT, DAY = "as_of", "today"
"""The variables of the connection that a statement names instead of the moment and the shop's day."""
OTHERWISE = timedelta(days=400, hours=5)
"""How far away another moment is, of which the same statement must come."""
_ROWS = "rows_given"
_CATALOGUE = ("items", "offers", "item_context")


def getvariable(variable: str) -> ir.Value:
    """What a variable of the connection holds: a function of DuckDB's."""
    raise NotImplementedError


_moment_in = ibis.udf.scalar.builtin(getvariable, signature=((dt.string,), dt.Timestamp("UTC")))
_day_in = ibis.udf.scalar.builtin(getvariable, signature=((dt.string,), dt.date))


@dataclass
class Statements:
    """What was put into SQL, for one description of a shop and one form of its catalogue."""

    of: dict[Hashable, str] = field(default_factory=dict)
    """By what says which it is: of a table its name and variant."""
    tables: dict[str, sch.Schema] = field(default_factory=dict)
    results: dict[Hashable, pa.Schema] = field(default_factory=dict)


@lru_cache(maxsize=16)
def _statements(source: Hashable) -> Statements:
    return Statements()


class PreparedCompute(DuckDBCompute):
    """One connection that is kept, for statements that are known or will be.

    Args:
        home: the installation.
        known: the statements.
        ended: is told when a turn has ended, by ``close``: the tables go, the connection stays.
    """

    def __init__(self, home: Home, known: Statements, ended: Callable[[], object]) -> None:
        super().__init__(home)
        self._known, self._ended = known, ended
        self._views: dict[str, ir.Table] = {}
        self._held: dict[str, None] = {}
        """The tables of this turn."""

    def begin(self, as_of: datetime, today: date) -> None:
        """All that is asked until ``close`` is asked of this moment."""
        for name, value in ((MOMENT, f"TIMESTAMPTZ '{as_of.isoformat()}'"), (DAY, f"DATE '{today.isoformat()}'")):
            self.backend.con.execute(f"SET VARIABLE {name} = {value}")

    def moment(self, as_of: datetime, days: int = 0) -> ir.TimestampValue:
        """So many *days* before the moment of the turn, whichever that will be."""
        at = _moment_in(MOMENT)
        return at - ibis.interval(days=days) if days else at

    def day(self, today: date) -> ir.DateValue:
        """The shop's day at the moment of the turn, whichever that will be."""
        return _day_in(DAY)

    def parquet(self, name: str, files: Sequence[str], schema: pa.Schema | None = None) -> ir.Table:
        """The rows of Parquet files, which each statement reads anew."""
        if name not in self._views:
            super().parquet(name, files, schema)
            self._views[name] = self._table(name)
        return self._views[name]

    def given(self, name: str, rows: pa.Table) -> ir.Table:
        """Rows that are in this process's memory."""
        self.backend.con.register(_ROWS, rows)
        try:
            return self._made(name, f"SELECT * FROM {_ROWS}")
        finally:
            self.backend.con.unregister(_ROWS)

    def kept(self, name: str, make: Make, variant: str = "") -> ir.Table:
        """What the expression gives, as a table."""
        return self._made(name, self._statement(name, variant, make))

    def asked(self, name: str, make: Make, variant: str = "") -> pa.Table:
        """What the expression gives, in memory."""
        rows: pa.Table = self.backend.con.execute(self._statement(name, variant, make)).to_arrow_table()
        return rows

    def let_go(self, *names: str) -> None:
        """Drop tables."""
        for name in names:
            if name in self._held:
                del self._held[name]
                self.backend.con.execute(f'DROP TABLE temp.main."{name}"')

    def ordered(self, make: Callable[[datetime], ir.Table], as_of: datetime, key: str, of: Hashable) -> Iterator[pa.Table]:
        """The rows of the expression in the order of *key*, at once.

        Where the expression tells one moment from another by more than the variables, it is made anew each time.
        """
        if (statement := self._known.of.get(of)) is None:
            expression = make(as_of)
            statement, self._known.results[of] = _sql(expression), expression.schema().to_pyarrow()
            if statement == _sql(make(as_of + OTHERWISE)):
                self._known.of[of] = statement
        rows: pa.Table = self.backend.con.execute(statement).to_arrow_table()
        yield rows.cast(self._known.results[of]).sort_by(key)

    def stepped(self, make: Make, groups: str, order: Sequence[str], step: Step) -> Iterator[pa.RecordBatch]:
        """What *step* makes of the rows, called once with all of them."""
        self.kept("stepped", make)
        columns = ", ".join(f'"{column}"' for column in order)
        # streamed: of a result that is there as a whole DuckDB 2 gives Arrow its parts in any order, whatever the statement says,
        # once there are some ten thousand rows and the order of insertion is not kept
        return step(self.backend.con.sql(f"SELECT * FROM temp.main.stepped ORDER BY {columns}").to_arrow_reader(BATCH_ROWS))

    def close(self) -> None:
        """End the turn."""
        try:
            self.let_go(*list(self._held))
        finally:
            self._held.clear()
            self._ended()

    def dispose(self) -> None:
        """Let go of the connection."""
        super().close()

    @property
    def is_whole(self) -> bool:
        """Whether the connection can be used still."""
        try:
            return bool(self.backend.con.execute("SELECT 1").fetchall())
        except duckdb.Error:
            return False

    def _statement(self, name: str, variant: str, make: Make) -> str:
        if (name, variant) not in self._known.of:
            self._known.of[name, variant] = _sql(make())
        return self._known.of[name, variant]

    def _made(self, name: str, statement: str) -> ir.Table:
        self.backend.con.execute(f'CREATE OR REPLACE TEMP TABLE "{name}" AS {statement}')
        self._held[name] = None
        return self._table(name)

    def _table(self, name: str) -> ir.Table:
        """It stands for the table of that name of any connection."""
        if name not in self._known.tables:
            self._known.tables[name] = self.backend.table(name).schema()
        return ibis.table(self._known.tables[name], name=name)


class Prepared:
    """Hands the prepared compute of a home out, to one at a time; whoever comes meanwhile gets one of their own."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._turn = threading.Lock()
        self._compute: PreparedCompute | None = None
        self._made_of: Hashable = None

    def begin(self, as_of: datetime) -> DuckDBCompute:
        """What works out a timeline that is identified by, and asked for, the moment *as_of* alone; close it to give it back."""
        if not self._turn.acquire(blocking=False):
            return DuckDBCompute(self._home)
        try:
            shop, catalogue = self._home.shop.read_bytes(), [Catalogue(self._home).path(name) for name in _CATALOGUE]
            made_of = shop, *((each.st_ino, each.st_size, each.st_mtime_ns) for each in (path.stat() for path in catalogue))
            if self._compute is None or self._made_of != made_of or not self._compute.is_whole:
                self.close()
                known = _statements((shop, *(str(pq.read_schema(path)) for path in catalogue)))
                self._compute, self._made_of = PreparedCompute(self._home, known, self._turn.release), made_of
                weakref.finalize(self, self._compute.dispose)
            self._compute.begin(as_of, as_of.astimezone(ZoneInfo(Shop.load(self._home).timezone)).date())
        except BaseException:
            self._turn.release()
            raise
        return self._compute

    def close(self) -> None:
        """Let go of the connection; there will be another where it is asked for."""
        compute, self._compute = self._compute, None
        if compute is not None:
            compute.dispose()


def _sql(expression: ir.Table) -> str:
    return str(ibis.to_sql(expression, "duckdb"))
