"""``python -m serving migrate``: the lasting databases of a home, from its files to a database server, and their tables there."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from features.state.home import Home, postgres_of
from features.state.moving import note_back
from features.state.ports import SERVING
from features.state.settings import SettingError, Settings, shown

console = Console()


def register(app: typer.Typer) -> None:
    """Add the command to *app*."""

    @app.command()
    def migrate(
        to: Annotated[str, typer.Option(help="Move the databases of this home to postgresql://user:password@host:port/database.")] = "",
        back: Annotated[bool, typer.Option("--back", help="Let the files count again, as they were before they were moved.")] = False,
        drop_files: Annotated[
            bool, typer.Option("--drop-files", help="Delete the files that were moved; there is no way back then.")
        ] = False,
        yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    ) -> None:
        """Move the databases of a home to PostgreSQL; without --to, bring the tables on the server to what this release needs."""
        home = Home.from_environment()
        if back:
            _go_back(home, yes)
        elif drop_files:
            _drop(home, yes)
        elif to:
            _move(home, Settings.from_environment({"UBIQUO_DATABASE": to}).database)
        elif home.settings.database:
            _bring_up(home)
        else:
            raise SettingError("say where to: python -m serving migrate --to postgresql://user:password@host:port/database")


def _move(home: Home, url: str) -> None:
    # what it imports is there where it is used
    postgres_of(Settings(database=url))
    from features.state.postgres_moving import move
    from serving.intake.queue_asked import last_received

    if not home.settings.database and home.file_of("inbox").exists:
        # an inbox of an earlier release gets its places
        last_received(home)
    with console.status("copying") as status:
        moved = move(home, url, lambda database, table, rows: status.update(f"{database}.{table}: {rows} rows"))
    table = Table("database", "table", "rows", title="moved, and compared row by row")
    for each in moved:
        table.add_row(each.database, each.table, f"{each.rows}")
    console.print(table)
    console.print(
        f"next: set UBIQUO_DATABASE={shown('database', url)} for every command and service, and UBIQUO_SECRET or the secret.key of a "
        "folder that all of them share; what is derived is made anew at the first start. Once all is well delete the files here, which "
        "no erasure reaches any more: python -m serving migrate --drop-files",
        highlight=False,
        soft_wrap=True,
    )


def _go_back(home: Home, yes: bool) -> None:
    if home.settings.database:
        raise SettingError("UBIQUO_DATABASE is set: leave it out to go back to the files")
    if not home.file_of("contacts").exists:
        raise SettingError(f"the files of {home.root} were deleted: there is no way back to them")
    if not yes:
        typer.confirm("what came in since the move stays on the server and will be missing here: go back to the files?", abort=True)
    with home.lease.take(SERVING):
        was_moved = note_back(home.root)
    console.print("the files count again" if was_moved else "they were not moved")


def _drop(home: Home, yes: bool) -> None:
    from features.state.postgres_moving import drop_files

    if not yes:
        typer.confirm("delete the files that were moved to the server?", abort=True)
    console.print(f"{drop_files(home)} database files deleted")


def _bring_up(home: Home) -> None:
    state = postgres_of(home.settings)
    from features.state.postgres_migrations import bring_up, revision_of

    before = revision_of(state.server)
    bring_up(state.server)
    now = revision_of(state.server)
    told = f"revision {now}" if before == now else f"revision {now} (before: {before or 'no tables'})"
    console.print(f"{state.server.place}: {told}", highlight=False)
