"""``python -m features lake``: bring the tables of a home to object storage."""

from __future__ import annotations

import contextlib
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import DownloadColumn, Progress

from features.state.home import Home
from features.state.lake_moving import check_store, copy_table
from features.state.lake_tables import keep_in, kept_in
from features.state.ports import DECISIONS, DERIVED, IMPORT, LOG, SERVING
from features.state.settings import Settings

console = Console()


def register(app: typer.Typer) -> None:
    """Add the command to *app*."""
    app.command("lake")(move)


def move(
    to: Annotated[str, typer.Option(help="Where they are to lie: s3://BUCKET/PREFIX, which UBIQUO_LAKE is to name.")],
    check: Annotated[bool, typer.Option("--check", help="Only see whether the store keeps what several writers rely on.")] = False,
    drop: Annotated[bool, typer.Option("--drop-folder", help="Only delete the tables that were moved; no erasure reaches them.")] = False,
) -> None:
    """Copy the tables of the log to object storage and compare them; safe to kill and to repeat.

    End the service, imports and batches first. The folder stays as it is until you drop it: no erasure reaches it any more.
    """
    lake = Settings(lake=to).lake
    if drop:
        _drop(Home.from_environment(), lake)
        return
    check_store(lake)
    if check:
        console.print(f"of several writers at once one wins at {lake}, as it should be", highlight=False)
        return
    home = Home.from_environment()
    if told := kept_in(home.root):
        raise ValueError(f"the tables of {home.root} lie in {told} already: set UBIQUO_LAKE={told}")
    folders, tables = home.table_folders, home.tables_in(lake)
    with contextlib.ExitStack() as held:
        # an import or a batch that goes on afterwards would write to the folder
        for name in (SERVING, DERIVED, IMPORT):
            held.enter_context(home.lease.take(name))
        for name in (LOG, DECISIONS):
            held.enter_context(home.lease.hold(name))
        size = sum(path.stat().st_size for each in folders.values() for path in each.path.rglob("*") if path.is_file())
        with Progress(*Progress.get_default_columns(), DownloadColumn(), console=console, transient=True) as progress:
            task = progress.add_task("copying and comparing", total=size)
            moved = {name: copy_table(folders[name], tables[name], lambda done: progress.advance(task, done)) for name in folders}
        keep_in(home.root, lake)
    for name, table in moved.items():
        if table is not None:
            console.print(
                f"{name}: version {table.version}, {table.rows} rows in {table.objects} objects of {table.size:,} bytes, "
                f"{table.copied} of them copied now, all compared",
                highlight=False,
            )
    console.print(f"from now on this home needs UBIQUO_LAKE={lake}", highlight=False)
    if old := ", ".join(str(each.path) for each in folders.values() if each.exists):
        console.print(f"the old tables stand in {old}, and no erasure reaches them any more", highlight=False)
        console.print(f"once all is well, delete them: python -m features lake --to {lake} --drop-folder", highlight=False)


def _drop(home: Home, lake: str) -> None:
    """Delete the tables of the folder.

    Raises:
        ValueError: they are all there is.
    """
    if kept_in(home.root) != lake:
        raise ValueError(f"the tables of {home.root} were not moved to {lake}: they stay")
    for name, folder in home.table_folders.items():
        if folder.exists:
            folder.drop()
            console.print(f"{name}: {folder.path} is deleted", highlight=False)
