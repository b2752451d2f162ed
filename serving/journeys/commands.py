"""The commands about journeys and about what leaves: they look, try and export; the service is what runs them."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from features.catalogue.shop import Shop
from features.state.clock import clock_of
from features.state.home import Home

if TYPE_CHECKING:
    from serving.journeys.plan import Plans

journeys_app = typer.Typer(help="Journeys: what is done for a customer over time.", no_args_is_help=True)
outbox_app = typer.Typer(help="The outbox: what was decided and leaves.", no_args_is_help=True)
console = Console()
File = Annotated[Path | None, typer.Argument(help="A journeys file; default: the one in force in this home.")]


@journeys_app.command()
def show(file: File = None) -> None:
    """Check a journeys file, and print what each journey does, step by step."""
    from serving.journeys.plan import told_duration

    plans = _plans(file)
    for plan in plans.plans.values():
        start = plan.journey.start
        begins = f"every day at {start.at}" if start.every else f"on {' or '.join(start.on)}"
        begins += f", {start.after} later" if start.after else ""
        begins += f" unless {' or '.join(start.unless)}" if start.unless else ""
        table = Table("", "step", title=f"{plan.journey.name}: {begins}" + (f", when {start.when}" if start.when else ""))
        for number, operation in enumerate(plan.operations):
            if number == plan.conversion:
                if not plan.journey.stop_on:
                    break
                table.add_section()
                table.add_row("", f"after {' or '.join(plan.journey.stop_on)}:")
            table.add_row(f"{number}", operation.told())
        console.print(table)
    for sink in plans.said.sinks:
        console.print(f"sink {sink.name}: {', '.join(sink.channels)} to {sink.url or 'files'}, given up after {sink.give_up_after}")
    longest = max((o.seconds for p in plans.plans.values() for o in p.operations), default=0)
    console.print(f"{len(plans.plans)} journeys are in order" + (f"; the longest wait is {told_duration(longest)}" if longest else ""))


@journeys_app.command()
def test(
    file: Annotated[Path, typer.Argument(help="A journeys file.")],
    events: Annotated[Path, typer.Argument(help="JSON Lines of events, with customer, occurred_at and name.")],
) -> None:
    """Run the journeys of a file over events that you made up. Conditions are taken to hold, messages to go out."""
    import msgspec

    from features.definitions.domain import domain_named
    from features.events.event import EVENT_NAMES

    told = [msgspec.json.decode(line) for line in events.read_bytes().splitlines() if line.strip()]
    for number, each in enumerate(told, 1):
        if missing := [name for name in ("customer", "occurred_at", "name") if name not in each]:
            raise ValueError(f"{events}, line {number}: {missing[0]}: is missing")
        if each["name"] not in EVENT_NAMES and each["name"] not in domain_named(Shop.load(Home.from_environment()).domain).events:
            raise ValueError(f"{events}, line {number}: name: {each['name']!r} is no event that there is")
    rows = sorted((str(e["customer"]), datetime.fromisoformat(e["occurred_at"]), str(e["name"])) for e in told)
    _print_replay(_plans(file), sorted(rows, key=lambda row: row[1]))


@journeys_app.command()
def replay(file: File = None) -> None:
    """Run journeys over the shop's past events: how many would have begun, come to each offer, and converted. Nothing is sent."""
    home = Home.from_environment()
    _print_replay(_plans(file), _past(home))


@journeys_app.command()
def status() -> None:
    """How many customers are where in each journey."""
    from serving.journeys.runs import Runs

    runs = Runs(Home.from_environment())
    table = Table("journey", "state", "runs")
    for journey, state, number in runs.counts():
        table.add_row(journey, state, f"{number}")
    console.print(table)
    table = Table("sink", "messages are", "messages")
    for sink, status, number in runs.outgoing.counts():
        table.add_row(sink, status, f"{number}")
    console.print(table)


@outbox_app.command()
def export(
    sink: Annotated[str, typer.Argument(help="A sink of journeys.yaml without a url.")],
    out: Annotated[Path, typer.Option(help="The file to write: .csv or .jsonl.")],
    form: Annotated[str, typer.Option("--format", help="plain, excel, braze, klaviyo or audience.")] = "plain",
) -> None:
    """Write what waits for a sink into a file, with contact data; permissions are those of this moment."""
    from features.people.consent import Consents
    from features.people.contacts import Contacts
    from features.people.identity import Identities
    from features.state.ports import deriving
    from serving.decide.formats import format_named
    from serving.decide.ledger import Ledger
    from serving.journeys.desk import JourneyDesk
    from serving.journeys.outbox import export
    from serving.journeys.runs import Runs

    home = Home.from_environment()
    plans = _plans(None)
    if sink not in plans.sinks or plans.sinks[sink].url is not None:
        known = ", ".join(s.name for s in plans.said.sinks if s.url is None) or "none is declared"
        raise ValueError(f"{sink!r} is no sink for files: use one of journeys.yaml without a url ({known})")
    chosen = format_named(form, "--format")
    identities = Identities(home)
    consents, contacts = Consents(home, Shop.load(home).consent), Contacts(home, identities.vault)
    desk = JourneyDesk(home, None, None, None, identities, consents, contacts, None, Ledger(home).release)
    with deriving(home):
        rows, dropped = export(Runs(home).outgoing, desk, home, sink, out, chosen, clock_of(home.settings)())
    console.print(f"{out}: {rows} rows; {dropped} were dropped, as the customer does not permit the channel any more", highlight=False)


@outbox_app.command()
def secret(sink: Annotated[str, typer.Argument(help="A sink with a url.")]) -> None:
    """Print the secret with which webhooks to a sink are signed (Standard Webhooks)."""
    from features.people.vault import Vault

    home = Home.from_environment()
    if sink not in _plans(None).sinks:
        raise ValueError(f"{sink!r} is no sink of journeys.yaml")
    print(f"whsec_{base64.b64encode(Vault.open(home).webhook_key(sink)).decode()}")


def _plans(file: Path | None) -> Plans:
    from features.definitions.domain import domain_named
    from features.definitions.segments import Vocabulary
    from features.events.event import EVENT_NAMES
    from features.state.ports import MissingStateError
    from serving.journeys.plan import JOURNEYS, Plans

    home = Home.from_environment()
    domain, path = Shop.load(home).domain, file or home.root / JOURNEYS
    if not path.exists():
        raise MissingStateError(f"there is no {path}: write one (docs/journeys.md)")
    return Plans.read(path, Vocabulary.load(home, domain), frozenset((*EVENT_NAMES, *domain_named(domain).events)))


def _print_replay(plans: Plans, events: Iterable[tuple[str, datetime, str]]) -> None:
    from serving.journeys.replay import Replay

    for journey, counts in Replay(plans).run(events).items():
        table = Table("what", "times", title=f"{journey} (every condition taken to hold, every message to go out)")
        for what, times in sorted(counts.items()):
            table.add_row(what, f"{times}")
        console.print(table)


def _past(home: Home) -> Iterator[tuple[str, datetime, str]]:
    from features.people.consent import LEARNING
    from features.store.timeline import open_timeline

    clock = clock_of(home.settings)()
    opened = open_timeline(home, identified_by=clock, purposes=LEARNING)
    con = opened.events.get_backend().con
    query = "SELECT customer_id, occurred_at, name FROM events WHERE customer_id IS NOT NULL ORDER BY occurred_at, event_id"
    found = con.execute(query)
    while rows := found.fetchmany(10_000):
        yield from rows
