"""``python -m features lake``: bring the tables of a home to object storage."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.progress import DownloadColumn, Progress

from features.state.home import Home
from features.state.lake_moving import check_store, copy_table
from features.state.lake_tables import keep_in, kept_in
from features.state.ports import DECISIONS, LOG, SERVING
from features.state.settings import Settings

console = Console()


def register(app: typer.Typer) -> None:
    """Add the command to *app*."""
    app.command("lake")(move)


def move(
    to: Annotated[str, typer.Option(help="Where they are to lie: s3://BUCKET/PREFIX, which UBIQUO_LAKE is to name.")],
    check: Annotated[bool, typer.Option("--check", help="Only see whether the store keeps what several writers rely on.")] = False,
) -> None:
    """Copy the tables of the log to object storage and compare them; safe to kill and to repeat. End the service first.

    The folder stays as it is, until you delete it.
    """
    lake = Settings(lake=to).lake
    check_store(lake)
    if check:
        console.print(f"of several writers at once one wins at {lake}, as it should be", highlight=False)
        return
    home = Home.from_environment()
    if told := kept_in(home.root):
        raise ValueError(f"the tables of {home.root} lie in {told} already: set UBIQUO_LAKE={told}")
    folders, tables = home.table_folders, home.tables_in(lake)
    with home.lease.take(SERVING), home.lease.hold(LOG), home.lease.hold(DECISIONS):
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
    old = ", ".join(str(each.path) for each in folders.values() if each.exists) or "nothing"
    console.print(f"from now on this home needs UBIQUO_LAKE={lake}", highlight=False)
    console.print(f"what may be deleted once all is well: {old}", highlight=False)
