"""Where ubiquo keeps its state on disk, and the process settings that every command shares."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from features.state.disk import make_folder
from features.state.settings import Settings


class MissingStateError(RuntimeError):
    """A table, snapshot or model that a command needs does not exist yet; the message names the mend."""


DERIVED = "derived"
"""The lock between an erasure and whoever writes what follows from the log."""


@dataclass(frozen=True)
class Home:
    """The folder that holds all data, stores and models of one ubiquo installation."""

    root: Path

    @classmethod
    def from_environment(cls) -> Home:
        """The home named by ``UBIQUO_HOME``, or ``var`` under the working directory."""
        return cls(Settings.from_environment().root)

    @property
    def events(self) -> Path:
        """The Delta table of events."""
        return self.root / "log" / "events"

    @property
    def dead_letters(self) -> Path:
        """The Delta table of rejected rows."""
        return self.root / "log" / "dead_letters"

    @property
    def identifiers(self) -> Path:
        """The Delta table that maps identifiers to customers."""
        return self.root / "log" / "identifiers"

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
        return self.root / "inbox.db"

    @property
    def contacts(self) -> Path:
        """The SQLite file of the contact table: what is personal, encrypted."""
        return self.root / "contacts.db"

    @property
    def tombstones(self) -> Path:
        """The SQLite file of what is left of erased people."""
        return self.root / "tombstones.db"

    @property
    def access(self) -> Path:
        """The SQLite file of API keys and the audit log."""
        return self.root / "access.db"

    @property
    def event_index(self) -> Path:
        """The SQLite file by which events are found by id and by identifier."""
        return self.root / "log" / "events.index"

    @property
    def step_index(self) -> Path:
        """The SQLite file by which it is found how identifiers came to whom they belong to."""
        return self.root / "log" / "identifiers.index"

    @property
    def letter_index(self) -> Path:
        """The SQLite file by which it is found which dead letters are kept."""
        return self.root / "log" / "dead_letters.index"

    @property
    def secret(self) -> Path:
        """The file of the secret under which identifiers are hashed and contacts encrypted."""
        return self.root / "secret.key"

    @property
    def shop(self) -> Path:
        """The JSON file that describes the shop whose events the log holds."""
        return self.root / "shop.json"

    def held(self, name: str, exclusive: bool = False) -> IO[str]:
        """Hold the lock *name* until the file is closed, alone or beside others that do not ask to be alone.

        Raises:
            BlockingIOError: somebody holds it so that it cannot be had.
        """
        make_folder(self.root)
        handle = open(self.root / f"{name}.lock", "w")  # noqa: SIM115 - the caller closes it
        try:
            fcntl.flock(handle, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.close()
            raise
        return handle

    def deriving(self) -> contextlib.AbstractContextManager[None]:
        """Hold this from the first read of customers' rows to the last write of what follows from them: no erasure comes in between."""
        return self.locked(DERIVED, shared=True)

    @contextlib.contextmanager
    def locked(self, name: str, shared: bool = False) -> Iterator[None]:
        """Hold the inter-process lock *name*, alone or *shared*; the operating system frees it if the process dies."""
        make_folder(self.root)
        with open(self.root / f"{name}.lock", "w") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
            yield


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
