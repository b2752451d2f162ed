"""``python -m features dead-letters``: list, explain and replay what could not be taken."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from features.state.clock import clock_of
from features.state.home import Home
from features.store.event_log import EventLog

app = typer.Typer(help="What could not be taken, and why.", invoke_without_command=True, pretty_exceptions_enable=False)
console = Console()


@app.callback()
def overview(context: typer.Context) -> None:
    """List what could not be taken; explain and replay tell and do more."""
    if context.invoked_subcommand is None:
        listed()


@app.command("list")
def listed(limit: Annotated[int, typer.Option(min=1)] = 50) -> None:
    """List the rows that could not be taken, newest last, each with the field at fault and the reason."""
    letters = EventLog(Home.from_environment(), "UTC").letters.read()
    table = Table("letter", "received", "source", "field", "reason", "row", title=f"{len(letters)} dead letters")
    for letter in letters[-limit:]:
        received = f"{letter['received_at']:%Y-%m-%d %H:%M:%S}"
        table.add_row(letter["letter_id"][:8], received, letter["source"], letter["field"], letter["reason"], letter["raw"][:200])
    console.print(table)


@app.command()
def explain(letter: Annotated[str, typer.Argument(help="The letter's id, or how it begins.")]) -> None:
    """Show one row whole, with what is wrong and how to go on."""
    [found] = _chosen([letter])
    console.print(f"received {found['received_at']:%Y-%m-%d %H:%M:%S} UTC from {found['source']}", highlight=False)
    console.print(f"[red]{found['field']}[/red]: {found['reason']}", highlight=False)
    try:
        console.print_json(found["raw"])
    except ValueError:
        console.print(found["raw"], highlight=False, markup=False)
    console.print(
        f"correct it and send it again, or: python -m features dead-letters replay {found['letter_id'][:8]} --with mended.json",
        highlight=False,
    )


@app.command()
def replay(
    letters: Annotated[list[str] | None, typer.Argument(help="Ids, or how they begin; default: all.")] = None,
    mended: Annotated[Path | None, typer.Option("--with", help="A file with the mended JSON of the one letter.")] = None,
) -> None:
    """Read letters again, and store those that are good by now; they leave the list."""
    from features.sources.replay import replay as replay_all

    if mended is not None and len(letters or []) != 1:
        raise ValueError("--with mends one letter: name it")
    content = None if mended is None else msgspec.json.decode(mended.read_bytes())
    home = Home.from_environment()
    chosen = _chosen(letters) if letters else EventLog(home, "UTC").letters.read()
    told = replay_all(home, chosen, clock_of(home.settings)(), content)
    table = Table("letter", "outcome", "field", "reason")
    for each in told:
        table.add_row(each.letter_id[:8], each.outcome, each.field, each.reason)
    console.print(table)


def _chosen(names: list[str]) -> list[dict[str, Any]]:
    """The letters of these ids.

    Raises:
        ValueError: an id fits none, or several.
    """
    letters = EventLog(Home.from_environment(), "UTC").letters.read()
    found = []
    for name in names:
        fitting = [letter for letter in letters if letter["letter_id"].startswith(name)]
        if len(fitting) != 1:
            raise ValueError(f"{len(fitting)} dead letters begin with {name!r}: give more of the id")
        found += fitting
    return found
