"""``python -m serving score`` and ``coverage``: every customer at once."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from features.catalogue.shop import Shop
from features.events.event import Channel
from features.people.vault import Vault
from features.state.clock import clock_of, parse_as_of
from features.state.command import EngineOption
from features.state.home import Home
from features.state.ports import deriving
from serving.intake.queue_asked import wait_until_moved
from serving.privacy.keys import Audit

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from models.recommender.listings import Listing

console = Console()


def register(app: typer.Typer) -> None:
    """Add the commands to the front door."""
    app.command()(score)
    app.command()(coverage)


def score(
    model: Annotated[str, typer.Argument(help="As mlflow.yaml names it: churn, recommendations, next-best-offer ...")],
    out: Annotated[Path, typer.Option(help="The file to write: .csv, .parquet or .jsonl")],
    as_of: Annotated[str | None, typer.Option(help="Date or time; default: where the imported data ends.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100, help="How many items or offers a customer.")] = 10,
    channel: Annotated[str | None, typer.Option(help="Through what the answers will reach them, e.g. email: only with permission.")] = None,
    listing: Annotated[
        str, typer.Option(help="Which list, of a model that recommends items, e.g. also_like, buy_again, email.")
    ] = "for_you",
    form: Annotated[str, typer.Option("--for", help="Which tool loads the CSV: plain, excel, braze, klaviyo or audience.")] = "plain",
    with_contact: Annotated[
        bool, typer.Option("--with-contact", help="Put e-mail and phone into the file, of those alone who may be reached by --channel.")
    ] = False,
    delimiter: Annotated[str, typer.Option(help="What divides the columns of a CSV.")] = ",",
    engine: EngineOption = None,
) -> None:
    """Score every customer into a file, with the answers that HTTP would give at that moment; each is a decision in the log."""
    from features.store.compute import with_engine
    from serving.bootstrap import open_engine
    from serving.decide.batch import Delivery
    from serving.decide.batch import score as score_all
    from serving.decide.formats import format_named

    home = with_engine(Home.from_environment(), engine)
    moment, through, chosen = _asked(home, model, as_of, channel, listing)
    delivery = Delivery(format_named(form), delimiter, with_contact, noting(home, "contact data into a file"))
    with deriving(home), Progress(console=console) as progress:
        task = progress.add_task(f"scoring {model}", total=None)
        found = score_all(
            home, open_engine, model, moment, out, limit, lambda done, of: progress.update(task, completed=done, total=of), through, chosen,
            delivery,
        )  # fmt: skip
    console.print(f"{out}: {found.rows} rows of {found.customers} customers, as of {moment.isoformat()}", highlight=False)
    for why, customers in found.left_out.most_common():
        console.print(f"left out: {customers} customers: {why}", highlight=False)
    before = f", {found.known} stood there from the same batch before" if found.known else ""
    console.print(f"{found.logged} decisions logged{before}", highlight=False)


def noting(home: Home, action: str) -> Callable[[Sequence[str]], None]:
    """What notes in the audit log whose contact data leaves by a command."""

    def note(customers: Sequence[str]) -> None:
        Audit(home, Vault.open(home)).note_all(clock_of(home.settings)(), "command line", action, customers, "done")

    return note


def coverage(
    model: Annotated[str, typer.Argument(help="As mlflow.yaml names it: churn, recommendations, next-best-offer ...")],
    as_of: Annotated[str | None, typer.Option(help="Date or time; default: where the imported data ends.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100, help="How many items or offers a customer.")] = 10,
    channel: Annotated[str | None, typer.Option(help="Through what the answers would reach them, e.g. email.")] = None,
    listing: Annotated[str, typer.Option(help="Which list, of a model that recommends items.")] = "for_you",
) -> None:
    """Count who would end with nothing, and at which stage. Writes nothing."""
    from serving.bootstrap import open_engine
    from serving.decide.coverage import coverage as count

    home = Home.from_environment()
    moment, through, chosen = _asked(home, model, as_of, channel, listing)
    with deriving(home), Progress(console=console) as progress:
        task = progress.add_task(f"asking {model}", total=None)
        found = count(
            home, open_engine, model, moment, limit, through, chosen, lambda done, of: progress.update(task, completed=done, total=of)
        )
    table = Table("what becomes of the customers", "customers", "share", title=f"{model}, as of {moment:%Y-%m-%d %H:%M}")
    lines = [("an answer of their own", found.own), *((f"a general answer: {why}", n) for why, n in found.general.most_common())]
    lines += [(f"nothing: {why}", n) for why, n in found.nothing.most_common()]
    for name, customers in [*lines, ("all", found.customers)]:
        table.add_row(name, f"{customers:,}", f"{customers / max(found.customers, 1):.1%}")
    console.print(table)


def _asked(home: Home, model: str, as_of: str | None, channel: str | None, listing: str) -> tuple[datetime, Channel | None, Listing]:
    """The moment, the channel and the list that the command line names, once all that was accepted is known.

    Raises:
        ValueError: there is no such model, channel or list.
        MissingStateError: what was accepted does not get into the log.
    """
    from models.recommender.listings import Listing
    from models.registry import model_names

    shop = Shop.load(home)
    names = model_names(home.settings.models_file)
    if model not in names:
        raise ValueError(f"there is no model {model!r}: use one of {', '.join(names)}")
    through = next((c for c in get_args(Channel) if c == channel), None)
    if channel is not None and through is None:
        raise ValueError(f"--channel {channel!r} is not one of {', '.join(get_args(Channel))}")
    chosen = next((each for each in get_args(Listing) if each == listing), None)
    if chosen is None:
        raise ValueError(f"--listing {listing!r} is not one of {', '.join(get_args(Listing))}")
    moment = parse_as_of(as_of or shop.data_end.isoformat(), shop.timezone)
    wait_until_moved(home)
    return moment, through, chosen
