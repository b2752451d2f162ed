"""Where ubiquo keeps its state on one machine, and the process settings that every command shares."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Table as SqlTable

from features.state import lake_tables
from features.state.disk import check_room, free_bytes
from features.state.file_lease import FileLease, FileSecrets
from features.state.lake_tables import LakeTable
from features.state.moving import check_moved, check_not_moved
from features.state.ports import DEAD_LETTERS, DECISIONS, EVENTS, IDENTIFIERS, Database, Lease, MissingStateError, Table
from features.state.settings import SettingError, Settings
from features.state.sqlite_file import DERIVED, ROLLED_BACK, SHARED, WRITTEN_AHEAD, WRITTEN_SOON, Keeping, SQLiteFile
from features.state.tables import DeltaFolder

if TYPE_CHECKING:
    from features.state.postgres_state import PostgresState

_DATABASES: dict[str, tuple[str, Keeping]] = {
    "inbox": ("inbox.db", WRITTEN_AHEAD),
    "contacts": ("contacts.db", WRITTEN_AHEAD),
    "tombstones": ("tombstones.db", ROLLED_BACK),
    "hidden": ("hidden.db", ROLLED_BACK),
    "access": ("access.db", ROLLED_BACK),
    "reservations": ("reservations.db", WRITTEN_SOON),
    "journeys": ("journeys.db", WRITTEN_AHEAD),
    "rules": ("rules.db", ROLLED_BACK),
    "event_index": ("log/events.index", DERIVED),
    "step_index": ("log/identifiers.index", DERIVED),
    "letter_index": ("log/dead_letters.index", DERIVED),
    "online": ("feast/online.db", SHARED),
}
"""Each database with its file and how the file keeps what is written to it."""
LASTING = tuple(name for name, (_, keeping) in _DATABASES.items() if keeping not in (DERIVED, SHARED))
"""The databases that follow from nothing else."""
DERIVED_ONES = tuple(name for name, (_, keeping) in _DATABASES.items() if keeping is DERIVED)
"""Those that are made anew from the log."""
_ON_A_SERVER = {
    ROLLED_BACK: {"is_durable": True, "counts": True},
    WRITTEN_AHEAD: {"is_durable": True, "counts": False},
    WRITTEN_SOON: {"is_durable": False, "counts": False},
    DERIVED: {"is_durable": False, "counts": False},
}
"""The same on a database server: whether a commit waits for its disk, and whether it is asked for what has changed."""
_TABLES = {EVENTS: "log/events", IDENTIFIERS: "log/identifiers", DEAD_LETTERS: "log/dead_letters", DECISIONS: "decisions/table"}


@dataclass(frozen=True)
class Home:
    """The folder that holds all data, stores and models of one installation on one machine: the engine behind the ports of ``State``.

    Where something lies in the folder concerns what is read and written as whole files: the catalogue, snapshots, models.
    """

    root: Path
    settings: Settings = field(default_factory=Settings.from_environment, compare=False, repr=False)

    @classmethod
    def from_environment(cls) -> Home:
        """The home named by ``UBIQUO_HOME``, or ``var`` under the working directory."""
        settings = Settings.from_environment()
        return cls(settings.root, settings)

    @property
    def place(self) -> str:
        """The folder."""
        return str(self.root)

    @cached_property
    def lease(self) -> Lease:
        """Who may do what only one may do: locked files, or locks of the database server that many machines share."""
        return postgres_of(self.settings).lease() if self.settings.database else FileLease(self.root)

    @cached_property
    def secrets(self) -> FileSecrets:
        """The secret under which identifiers are hashed and contacts encrypted."""
        return FileSecrets(self.root, self.settings.secret, self.lease)

    @cached_property
    def tables(self) -> Mapping[str, Table]:
        """The Delta tables of the log, by name: in the home, or in the lake that the settings name.

        Raises:
            SettingError: this home's tables lie elsewhere than the settings say.
        """
        told = lake_tables.kept_in(self.root)
        if told != self.settings.lake and (told or any(table.exists for table in self.table_folders.values())):
            raise SettingError(
                f"UBIQUO_LAKE={self.settings.lake!r}, but the tables of {self.root} lie in {told or 'its own folder'}: "
                + (f"set UBIQUO_LAKE={told}" if told else f"unset it, or move them: python -m features lake --to {self.settings.lake}")
            )
        return self.tables_in(self.settings.lake) if self.settings.lake else self.table_folders

    @cached_property
    def table_folders(self) -> Mapping[str, DeltaFolder]:
        """The Delta tables in this home's own folder, whether they are used or were moved to a lake."""
        return {name: DeltaFolder(self.root / place) for name, place in _TABLES.items()}

    def tables_in(self, lake: str) -> Mapping[str, LakeTable]:
        """The Delta tables of this home as they lie, or would lie, in *lake*."""
        cache = (Path(self.settings.cache).resolve() if self.settings.cache else self.root / "cache") / lake.removeprefix("s3://")
        return {
            name: LakeTable(f"{lake}/{place}", cache / place, lambda: lake_tables.keep_in(self.root, lake))
            for name, place in _TABLES.items()
        }

    def database(self, name: str, *tables: SqlTable) -> Database:
        """The database *name*, which holds *tables*: a file, or a schema on the server that many machines share.

        Raises:
            MovedStateError: what is asked for lies in the other of the two.
        """
        if name not in self._databases:
            self._databases[name] = self._chosen(name, tables)
        return self._databases[name]

    def _chosen(self, name: str, tables: Sequence[SqlTable]) -> Database:
        file, keeping = _DATABASES[name]
        if keeping is SHARED:
            # another library's
            return SQLiteFile(self.root / file, tables, keeping)
        if not self.settings.database:
            check_not_moved(self.root)
            return SQLiteFile(self.root / file, tables, keeping)
        if name in LASTING:
            check_moved(self.root, self.root / file)
        return postgres_of(self.settings).database(name, tables, is_lasting=name in LASTING, **_ON_A_SERVER[keeping])

    def file_of(self, name: str) -> SQLiteFile:
        """The file that held the database *name* before it was moved to a server."""
        file, keeping = _DATABASES[name]
        return SQLiteFile(self.root / file, (), keeping)

    def databases_at(self, files: Collection[str]) -> list[SQLiteFile]:
        """The databases that lie in any of *files*, or of which one is the write-ahead log."""
        held = [self.file_of(name) for name in _DATABASES]
        return [database for database in held if not {str(path) for path in database.files}.isdisjoint(files)]

    @cached_property
    def _databases(self) -> dict[str, Database]:
        return {}

    def free_bytes(self) -> int:
        """How much of the disk is free for us."""
        return free_bytes(self.root)

    def relieve(self) -> int:
        """Take from silent processes elsewhere what others wait for; returns from how many."""
        return postgres_of(self.settings).relieve() if self.settings.database else 0

    def time_of_server(self) -> datetime | None:
        """What the clock of the database server says; None where the state lies in files."""
        return postgres_of(self.settings).server.time() if self.settings.database else None

    def check_room(self) -> None:
        """See that the disk has room for more.

        Raises:
            NoSpaceError: it hardly has any.
        """
        check_room(self.root)

    @property
    def events(self) -> Path:
        """The folder of the Delta table of events, where they lie in no lake."""
        return self.table_folders[EVENTS].path

    @property
    def identifiers(self) -> Path:
        """The folder of the Delta table that maps identifiers to customers, where they lie in no lake."""
        return self.table_folders[IDENTIFIERS].path

    @property
    def decisions(self) -> Path:
        """The folder of the decision log: its Delta table and the spool not yet flushed to it."""
        return self.root / "decisions"

    @property
    def catalogue(self) -> Path:
        """The folder of item, offer, campaign and item-context tables."""
        return self.root / "catalogue"

    @property
    def snapshots(self) -> Path:
        """The folder of feature snapshots: one folder a feature view, one Parquet file an ``as_of``."""
        return self.root / "features"

    @property
    def feast(self) -> Path:
        """The folder of Feast's registry and SQLite online store."""
        return self.root / "feast"

    @property
    def inbox(self) -> Path:
        """The SQLite file that holds accepted events until they reach the log."""
        return self._file("inbox")

    @property
    def contacts(self) -> Path:
        """The SQLite file of the contact table: what is personal, encrypted."""
        return self._file("contacts")

    @property
    def access(self) -> Path:
        """The SQLite file of API keys and the audit log."""
        return self._file("access")

    @property
    def event_index(self) -> Path:
        """The SQLite file by which events are found by id and by identifier."""
        return self._file("event_index")

    @property
    def step_index(self) -> Path:
        """The SQLite file by which it is found how identifiers came to whom they belong to."""
        return self._file("step_index")

    @property
    def shop(self) -> Path:
        """The JSON file that describes the shop whose events the log holds."""
        return self.root / "shop.json"

    def _file(self, database: str) -> Path:
        return self.root / _DATABASES[database][0]


def postgres_of(settings: Settings) -> PostgresState:
    """The engine of many machines; its libraries are imported only where it is used.

    Raises:
        MissingStateError: they are not installed.
    """
    try:
        from features.state.postgres_state import PostgresState
    except ImportError as error:
        raise MissingStateError(
            f"UBIQUO_DATABASE needs a package that is not installed ({error}): pip install 'ubiquo[postgres]'"
        ) from None
    return PostgresState(settings.database)


def configure_process() -> None:
    """Switch off the telemetry of every part and pin BLAS to one thread; call before heavy imports.

    implicit's small solves are 40 times slower when OpenBLAS spawns threads inside its own. OpenMP's threads must sleep while
    they wait: spinning, two trainings at once on two cores take some 40 times as long as one after the other.
    """
    for name, value in {
        "DO_NOT_TRACK": "true",
        "BENTOML_DO_NOT_TRACK": "True",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "FEAST_USAGE": "False",
        "OTEL_SDK_DISABLED": "true",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "GIT_PYTHON_REFRESH": "quiet",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_LOGGING_LEVEL": "ERROR",
    }.items():
        os.environ.setdefault(name, value)
