"""``python -m serving backup`` and ``restore``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from features.state.backup import Manifest, back_up
from features.state.backup import restore as restored
from features.state.home import Home
from features.state.settings import Settings

console = Console()


def register(app: typer.Typer) -> None:
    """Add the commands to *app*."""
    app.command("backup")(backup)
    app.command("restore")(restore)


def backup(
    to: Annotated[Path, typer.Option(help="The folder to copy the home into; there must be nothing in it.")],
) -> None:
    """Copy the home as it is now, while a service runs on it. The copy holds the secret and everything personal: keep it as both."""
    with console.status("copying"):
        manifest = back_up(Home.from_environment(), to)
    console.print(f"{to}: {_told(manifest)}", highlight=False)


def restore(
    source: Annotated[Path, typer.Option("--from", help="The folder of a backup.")],
) -> None:
    """Make the home that UBIQUO_HOME names of a backup; there must be nothing in it."""
    root = Settings.from_environment().root
    with console.status("comparing and copying"):
        manifest = restored(source, root)
    console.print(f"{root}: {_told(manifest)}", highlight=False)
    console.print("erase again whom you have erased since the backup was made: it holds them still", highlight=False)


def _told(manifest: Manifest) -> str:
    rows = ", ".join(f"{name} {count} rows (version {manifest.versions[name]})" for name, count in manifest.rows.items())
    return f"{len(manifest.files)} files of {sum(each.size for each in manifest.files.values()):,} bytes; {rows}"
