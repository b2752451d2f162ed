"""``python -m features``: bring events in, compute features, bring them online."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import DownloadColumn, MofNCompleteColumn, Progress
from rich.table import Column, Table

from features.commands import dead_letters, lake, people
from features.state.clock import clock_of, parse_as_of
from features.state.command import EngineOption, run
from features.state.home import Home
from features.state.ports import SERVING, deriving

if TYPE_CHECKING:
    from features.sources.importing import EventSource
    from features.sources.mapped import MappedFiles

app = typer.Typer(help="Know the customer: events, features and the feature store.", no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(dead_letters.app, name="dead-letters")
app.add_typer(people.app, name="people")
lake.register(app)
console = Console()


@app.command("import")
def import_events(
    sources: Annotated[list[str], typer.Argument(metavar="FILE...", help="Files or globs; or complete-journey, the demo's data.")],
    mapping: Annotated[Path | None, typer.Option(help="The YAML that maps columns to events; `guess` proposes one.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the first events and what would be rejected; store nothing.")] = False,
    again: Annotated[bool, typer.Option(help="Read the source even if this import was completed before.")] = False,
    folder: Annotated[Path | None, typer.Option(help="complete-journey: where its eight Parquet files lie.")] = None,
    households: Annotated[int | None, typer.Option(min=1, help="complete-journey: take only so many households.")] = None,
) -> None:
    """Bring a source's events into the log; safe to kill and to repeat."""
    home = Home.from_environment()
    source: EventSource
    if sources == ["complete-journey"] and mapping is None:
        from features.sources.complete_journey import CompleteJourney

        source = CompleteJourney(folder, households)
    else:
        source = _stage(home, sources, mapping, dry_run, again)
        if dry_run:
            return
    _bring_in(home, source, again)


def _stage(home: Home, sources: list[str], mapping: Path | None, dry_run: bool, again: bool) -> MappedFiles:
    from features.sources.importing import finished
    from features.sources.mapped import MappedFiles
    from features.sources.mapping import Mapping

    if mapping is None:
        raise ValueError(f"--mapping is needed: `python -m features guess {sources[0]}` proposes one")
    source = MappedFiles(home, sources, Mapping.read(mapping), trial=dry_run)
    if dry_run or again or finished(home, source) is None:
        with Progress(*Progress.get_default_columns(), DownloadColumn(), console=console) as progress:
            task = progress.add_task("reading and checking", total=source.size)
            source.stage(lambda done: progress.update(task, completed=done))
        show_stage(console, source, first_events=dry_run)
        try:
            source.check()
            if dry_run:
                _rehearse(home, source)
        finally:
            if dry_run:
                source.finish()
    return source


def _rehearse(home: Home, source: MappedFiles) -> None:
    """Tell which events an import would reject, though their rows are in order."""
    from features.sources.importing import rehearse

    seen, wrong = rehearse(home, source)
    if wrong:
        table = Table("events", "field", "reason", title=f"of the first {seen} events {sum(wrong.values())} would be rejected")
        for (field, reason), count in wrong.most_common(20):
            table.add_row(f"{count}", field, reason)
        console.print(table)
    else:
        console.print(f"the first {seen} events would be stored; nothing is yet: leave --dry-run out to import")


def _bring_in(home: Home, source: EventSource, again: bool) -> None:
    from features.sources.importing import bring_in, finished

    if not again and (done := finished(home, source)) is not None:
        console.print(f"{done.source}: this import is already complete ({done.appended + done.repeated} events)")
        return
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console) as progress:
        task = progress.add_task("storing events", total=source.count())
        report = bring_in(home, source, lambda done: progress.update(task, completed=done), again)
    console.print(
        f"{report.source}: {report.appended} events stored, {report.repeated} already known, {report.conflicting} conflicting, "
        f"{report.rejected} rejected; {report.rows_rejected} rows never became one"
    )
    if report.erased:
        console.print(f"{report.erased} events of erased people were not brought back")
    if report.conflicting + report.rejected + report.rows_rejected:
        console.print("python -m features dead-letters lists what was not taken, and why")
    if report.conflicting:
        console.print(
            "[yellow]conflicting:[/yellow] an event that is stored is never changed. Import what it got wrong as a refund, and what is "
            "right under an id of its own."
        )


@app.command()
def guess(
    file: Annotated[str, typer.Argument(help="One of the files.")],
    out: Annotated[Path | None, typer.Option(help="Write the mapping here instead of on the screen.")] = None,
) -> None:
    """Propose a mapping for a file: what each column seems to be, and a YAML to go over."""
    from features.catalogue.shop import Shop
    from features.sources.guessing import propose

    home = Home.from_environment()
    proposal = propose(Path(file), Shop.load(home) if home.shop.exists() else None)
    told = Console(stderr=True)
    told.print(proposal.table())
    for doubt in proposal.doubts:
        told.print(f"[yellow]look at:[/yellow] {escape(doubt)}", highlight=False)
    if proposal.catalogue is not None:
        told.print("these are items of the catalogue, not events: no mapping is needed, but", highlight=False)
        print(proposal.catalogue)
    elif out is None:
        print(proposal.text)
    elif out.exists():
        raise ValueError(f"{out} exists: a guess does not replace a file")
    else:
        out.write_text(proposal.text)
        told.print(f"{out}: go over it, then: python -m features import {file} --mapping {out} --dry-run", highlight=False)


@app.command()
def catalogue(
    table: Annotated[str, typer.Argument(metavar="items|offers|stores", help="Which table the file holds.")],
    file: Annotated[Path | None, typer.Argument(help="CSV, JSON Lines or Parquet with the table's columns; offers may be YAML.")] = None,
    column: Annotated[list[str] | None, typer.Option(help="THEIRS=OURS where a column has another name; repeat as needed.")] = None,
    attribute: Annotated[
        list[str] | None, typer.Option(help="NAME:text|number|list of an attribute of items that is your own; repeat as needed.")
    ] = None,
    delimiter: Annotated[str | None, typer.Option(help="What divides a CSV's fields; default: a comma.")] = None,
    encoding: Annotated[str, typer.Option(help="How a CSV is written, e.g. windows-1252.")] = "utf-8",
    decimal: Annotated[str, typer.Option(help="The decimal sign of numbers: . or ,")] = ".",
    thousands: Annotated[str, typer.Option(help="What divides thousands; default: nothing.")] = "",
    check_only: Annotated[bool, typer.Option("--check-only", help="Only tell what is wrong; replace nothing.")] = False,
    rollback: Annotated[bool, typer.Option("--rollback", help="Put the offers in force that were so before.")] = False,
) -> None:
    """Replace a table of the catalogue by a file, whole and checked; with any mistake in it the last good one stays."""
    import msgspec

    from features.events.event import explain
    from features.sources.catalogue_file import load
    from features.sources.mapping_parts import Files

    if rollback or file is None:
        if table != "offers" or not rollback or file is not None or check_only:
            raise ValueError("name the FILE to load; only `catalogue offers --rollback` does without one, and it checks nothing")
        from features.catalogue.tables import Catalogue

        offers = Catalogue(Home.from_environment())
        rows = offers.roll_back_offers()
        version, left = offers.digest("offers")[:12], len(offers.earlier_offers())
        console.print(
            f"offers: {rows} rows in force, version {version}, as they were before; {left} earlier tables are left", highlight=False
        )
        return
    try:
        files = msgspec.convert({"delimiter": delimiter, "encoding": encoding, "decimal": decimal, "thousands": thousands}, Files)
    except msgspec.ValidationError as error:
        field, reason = explain(error, Files)
        raise ValueError(f"--{field}: {reason}") from None
    found = load(Home.from_environment(), table, file, column or [], files, attribute or [])
    if not check_only:
        if lost := found.lost():
            console.print(f"[yellow]no longer there:[/yellow] the attributes {', '.join(lost)} (--attribute NAME:KIND keeps one)")
        found.save()
    console.print(f"{table}: {len(found.rows)} rows {'are in order' if check_only else 'in force'}")
    for line in found.remarks():
        console.print(line, highlight=False, markup=False)


def show_stage(console: Console, source: MappedFiles, first_events: bool = False) -> None:
    """Print what became of the rows, why some cannot be taken, and the first events."""
    staged = source.staged()
    fates = Table("rows", "", title=f"{source.name}: {staged.rows} rows make {staged.events} events, {staged.anonymous} of them anonymous")
    for count, fate in (
        (staged.taken, "in events"),
        (staged.left_out, "left out of their event: no item"),
        (staged.repeated, "the same as another row: taken once"),
        *((rows, f"skipped: {because}") for because, rows in staged.skipped.items()),
        (staged.held_back, "held back: another row of their event cannot be taken"),
        (staged.rejected, "rejected"),
    ):
        if count:
            fates.add_row(f"{count}", fate)
    console.print(fates)
    if staged.rejected:
        reasons = Table("rows", "field", "reason", "first", title="rejected")
        for rejection in source.rejections()[:20]:
            reasons.add_row(f"{rejection.rows}", rejection.field, rejection.reason, rejection.example)
        console.print(reasons)
    if first_events:
        console.print("the first two events, and the first of each further kind:")
        for raw in source.examples():
            console.print_json(raw.decode())


@app.command()
def materialize(
    as_of: Annotated[str | None, typer.Option(help="Date or time; default: where the imported data ends.")] = None,
    since: Annotated[
        str | None, typer.Option(help="Only the customers of whom anything became known since this date or time; the others' rows stay.")
    ] = None,
    engine: EngineOption = None,
) -> None:
    """Compute every customer's features as of a moment and bring them online; newer online rows stay."""
    from features.catalogue.shop import Shop
    from features.state.ports import UnreachableError
    from features.store.borders import measure_borders
    from features.store.compute import with_engine
    from features.store.event_log import EventLog
    from features.store.feature_store import FeatureStore

    home = with_engine(Home.from_environment(), engine)
    shop = Shop.load(home)
    moment = parse_as_of(as_of or shop.data_end.isoformat(), shop.timezone)
    if moment > clock_of(home.settings)():
        raise ValueError(f"--as-of {moment.isoformat()} lies in the future: live events until then would be taken for old ones")
    log = EventLog(home, shop.timezone)
    log.check_reaches(moment)
    store = FeatureStore(home)
    if since is not None:
        from features.store.customer_rows import CustomerRows

        with deriving(home):
            store.apply()
            count = CustomerRows(home, store, log).bring_up_to(moment, parse_as_of(since, shop.timezone))
        console.print(f"{count} customers of whom anything became known since {since}: their rows are of {moment.isoformat()}")
        return
    views = store.customer_views()
    with deriving(home), Progress(console=console) as progress:
        store.apply()
        before = store.told()
        task = progress.add_task("materializing features", total=2 * len(views))
        for view in views:
            store.backfill(view, {moment: None}, lambda n: progress.advance(task))
            rows = store.materialize(view, moment)
            progress.advance(task)
            progress.console.print(f"{view}: {rows} rows online, as of {moment.isoformat()}")
        if not store.tell(moment, before):
            raise UnreachableError("Redis was replaced, or lost some rows, while they were written: run this again")
        measure_borders(home, store, moment)


@app.command("list")
def list_features(
    domain: Annotated[str | None, typer.Option(help="Which domain; default: the shop's, or grocery.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="As Markdown.")] = False,
) -> None:
    """The feature catalogue: what is known of a customer and of an item, of what it is made, and what it says."""
    from features.catalogue.shop import Shop
    from features.definitions.domain import domain_named
    from features.definitions.listing import as_markdown, listed

    home = Home.from_environment()
    chosen = domain_named(domain or (Shop.load(home).domain if home.shop.exists() else ""))
    if markdown:
        print(as_markdown(chosen))
        return
    table = Table(
        "of", Column("feature", no_wrap=True), "type", "made of", "range", "input of", "says", title=f"{chosen.name}: {chosen.about}"
    )
    for each in listed(chosen):
        table.add_row(each.entity, each.name, each.dtype, each.made_of, each.allowed, each.inputs_of, each.says)
    console.print(table)


@app.command()
def repair(
    clock: Annotated[bool, typer.Option("--clock", help="Also stamp anew what a wrong clock has stamped with a time to come.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Give up what of the stored tables cannot be read any more, so that the rest can be; end the service first.

    Restoring a backup loses less: this names what is lost.
    """
    from features.catalogue.shop import Shop
    from features.store.event_log import EventLog

    home = Home.from_environment()
    if not yes:
        typer.confirm(f"give up what is damaged in {home.root}?", abort=True)
    log = EventLog(home, Shop.load(home).timezone)
    with home.lease.take(SERVING):
        for lost in log.repair():
            console.print(f"[yellow]given up:[/yellow] {lost}", highlight=False)
        if clock:
            console.print(f"{log.stamp_anew(clock_of(home.settings)())} events from a time to come are known from now on")
        console.print(f"{log.count()} events are stored and can be read; now: python -m features materialize", highlight=False)


@app.command("settings")
def show_settings() -> None:
    """The variables of the environment, what each is, and what it means; the secrets are not shown."""
    from features.state.settings import Settings, described, shown, variable_of

    now = Settings.from_environment()
    table = Table(Column("variable", no_wrap=True), "is", "unless set", "meaning")
    for name, default, meaning in described():
        value = getattr(now, name)
        table.add_row(variable_of(name), shown(name, value), default, meaning)
    console.print(table)


@app.command()
def status() -> None:
    """Tell what the log holds."""
    from features.catalogue.shop import Shop
    from features.store.event_log import EventLog

    home = Home.from_environment()
    shop = Shop.load(home)
    log = EventLog(home, shop.timezone)
    console.print(f"{home.root}: shop {shop.name}, {log.count()} events, log version {log.version()}, data ends {shop.data_end}")


def main() -> None:
    """Run a command."""
    from features.sources.complete_journey import UnreadableSourceError

    run(app, console, UnreadableSourceError)


if __name__ == "__main__":
    main()
