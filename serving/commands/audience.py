"""``python -m serving audience``: segments and conditions over all customers, counted and written into files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer
from rich.console import Console
from rich.table import Table

from features.catalogue.shop import Shop
from features.events.event import Channel
from features.people.identity import Identities
from features.state.home import Home
from features.state.ports import deriving
from serving.commands.batch import noting
from serving.intake.queue_asked import wait_until_moved

if TYPE_CHECKING:
    from serving.decide.audience import Audiences, AudienceSize

audience_app = typer.Typer(help="Audiences: the customers for whom a segment, or a condition in CEL, holds.", no_args_is_help=True)
console = Console()
Condition = Annotated[str, typer.Argument(help="A segment by its name (audience list), or a condition in CEL.")]
Through = Annotated[str | None, typer.Option(help="By which they are to be reached: email, sms, push, mail, call_centre or ads.")]
Among = Annotated[Path | None, typer.Option(help="Only the customers of this list: ids, or identifiers as KIND:VALUE or in columns.")]


@audience_app.command("list")
def list_segments() -> None:
    """The segments that there are, what each means, and for how many customers it holds."""
    home = Home.from_environment()
    wait_until_moved(home)
    audiences, conditions = _open(home)
    table = Table("segment", "condition", "customers")
    for name, customers in audiences.sizes().items():
        table.add_row(name, conditions[name], f"{customers:,}")
    console.print(table)


@audience_app.command()
def size(condition: Condition, channel: Through = None, among: Among = None) -> None:
    """Count an audience, and how many of it may be reached by a channel."""
    home = Home.from_environment()
    wait_until_moved(home)
    audiences, _ = _open(home)
    _print(audiences.size(condition, _channel(channel), _listed(home, among)))


@audience_app.command()
def export(
    condition: Condition,
    out: Annotated[Path, typer.Option(help="The file to write: .csv, .parquet or .jsonl")],
    channel: Through = None,
    form: Annotated[str, typer.Option("--for", help="Which tool loads the CSV: plain, excel, braze, klaviyo or audience.")] = "plain",
    with_contact: Annotated[bool, typer.Option("--with-contact", help="Put e-mail and phone into the file.")] = False,
    among: Among = None,
    delimiter: Annotated[str, typer.Option(help="What divides the columns of a CSV.")] = ",",
) -> None:
    """Write an audience into a file: of a channel only those who permit it, without the control group."""
    from serving.decide.batch import Delivery
    from serving.decide.formats import format_named

    home = Home.from_environment()
    delivery = Delivery(format_named(form), delimiter, with_contact, noting(home, "contact data into a file"))
    # before: an erasure may wait for whoever derives, and let nothing into the log meanwhile
    wait_until_moved(home)
    with deriving(home):
        audiences, _ = _open(home)
        found = audiences.export(condition, out, _channel(channel), delivery, _listed(home, among))
    _print(found)
    console.print(f"{out}: {found.members if found.channel is None else found.reached} rows", highlight=False)


def _open(home: Home) -> tuple[Audiences, dict[str, str]]:
    from serving.bootstrap import open_engine
    from serving.decide.audience import Audiences

    engine = open_engine(home)
    audiences = Audiences(home, engine)
    return audiences, {name: condition.text for name, condition in engine.governor.vocabulary.segments.items()}


def _channel(said: str | None) -> Channel | None:
    found = next((each for each in get_args(Channel) if each == said), None)
    if said is not None and found is None:
        raise ValueError(f"--channel {said!r} is not one of {', '.join(get_args(Channel))}")
    return found


def _listed(home: Home, path: Path | None) -> list[str] | None:
    if path is None:
        return None
    from features.people.listed import read_list

    found = read_list(path, Identities(home), Shop.load(home).phone_region)
    if found.unknown:
        console.print(f"{path}: {found.unknown} rows name nobody who is known", highlight=False)
    return found.customers


def _print(found: AudienceSize) -> None:
    console.print(f"{found.members:,} of {found.customers:,} customers: {found.condition}", highlight=False, markup=False)
    if found.channel is not None:
        console.print(f"{found.reached:,} of them can be reached by {found.channel}", highlight=False)
    for why, customers in found.left_out.most_common():
        console.print(f"not reached: {customers:,} customers: {why}", highlight=False)
    if found.feature_at is not None:
        console.print(f"by features of {found.feature_at:%Y-%m-%d %H:%M} UTC or later", highlight=False)
