"""Bringing the tables on a server to what this code knows: at the first use of a process, by one process at a time."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection
from sqlalchemy.exc import OperationalError

from features.state.migrations import FOLDER, HEAD, REVISIONS
from features.state.ports import MissingStateError
from features.state.postgres import OWN, alone
from features.state.postgres_server import READ_SECONDS, PostgresServer, UnreachableDatabaseError, is_missing, raw

_VERSION = sa.text(f"SELECT version_num FROM {OWN}.alembic_version")


class NewerStateError(MissingStateError):
    """The tables on a server are those of a newer release than this code."""


def bring_up(server: PostgresServer) -> None:
    """Make the lasting tables, or bring them to the newest revision; costs a query where they are that.

    Raises:
        NewerStateError: they are newer than this code.
        MissingStateError: they must be changed, and the package that does it is not installed.
    """
    if server.is_current:
        return
    try:
        found = revision_of(server)
    except UnreachableDatabaseError as error:
        if error.is_silent:
            raise
        # what the pool kept may have been lost long ago
        found = revision_of(server)
    _check(server, found)
    if found != HEAD:
        with alone(server) as connection:
            # another process may have been faster
            _check(server, _revision(connection))
            _upgrade(connection)
    server.is_current = True


def revision_of(server: PostgresServer) -> str | None:
    """The revision of the tables on a server; None where there are none."""
    with server.engine.connect() as connection:
        raw(connection).patience = READ_SECONDS
        try:
            return connection.execute(_VERSION).scalar()
        except OperationalError as error:
            if is_missing(error):
                return None
            raise


def _revision(connection: Connection) -> str | None:
    is_there = connection.execute(sa.text(f"SELECT to_regclass('{OWN}.alembic_version') IS NOT NULL")).scalar()
    return connection.execute(_VERSION).scalar() if is_there else None


def _check(server: PostgresServer, found: str | None) -> None:
    if found is not None and found not in REVISIONS:
        raise NewerStateError(
            f"the tables in {server.place} are of revision {found}, and this release knows none beyond {HEAD}: run the newer one, or put "
            "the database back from a backup of before"
        )


def _upgrade(connection: Connection) -> None:
    try:
        from alembic.operations import Operations
        from alembic.runtime.migration import MigrationContext
        from alembic.script import ScriptDirectory
    except ImportError as error:
        raise MissingStateError(
            f"UBIQUO_DATABASE needs a package that is not installed ({error}): pip install 'ubiquo[postgres]'"
        ) from None
    script = ScriptDirectory(str(FOLDER))

    def steps(current: Any, _: Any) -> Any:
        return script._upgrade_revs(HEAD, current)

    connection.execute(sa.schema.CreateSchema(OWN, if_not_exists=True))
    context = MigrationContext.configure(connection, opts={"fn": steps, "version_table_schema": OWN})
    with Operations.context(context):
        context.run_migrations()
