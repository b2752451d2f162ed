"""``python -m features people``: who is one customer and why, splits and merges by hand, links between contacts, the consent policy."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from features.catalogue.shop import Shop
from features.events.identifiers import KINDS, kind_of
from features.people.contacts import Contacts
from features.people.identity import Identities
from features.people.identity_state import Step
from features.state.clock import clock_of
from features.state.home import Home
from features.state.ports import LOG, deriving

app = typer.Typer(help="Who is one customer, and what may be done by default.", no_args_is_help=True, pretty_exceptions_enable=False)
console = Console()


@app.command()
def show(customer: Annotated[str, typer.Argument(help="A customer id, or an identifier as KIND:VALUE.")]) -> None:
    """Tell by which identifiers a customer is known, and what joined or parted them."""
    home = Home.from_environment()
    identities = Identities(home)
    customer_id = found(home, identities, customer)
    clear = Contacts(home, identities.vault).identifiers(identities.members(customer_id))
    table = Table("kind", "value", title=customer_id)
    for key in identities.members(customer_id):
        table.add_row(kind_of(key), clear.get(key, ""))
    console.print(table)
    console.print(_story(identities.story(customer_id)))


def _story(steps: list[Step]) -> Table:
    table = Table("known at", "kind", "customer", "cause", "event")
    for step in steps:
        table.add_row(
            f"{step.known_at:%Y-%m-%d %H:%M:%S}", kind_of(step.identity_key), step.customer_id or "nobody", step.cause, step.event_id
        )
    return table


@app.command()
def part(
    customer: Annotated[str, typer.Argument(help="A customer id, or an identifier as KIND:VALUE.")],
    off: Annotated[list[str], typer.Option(help="An identifier to take from them, as KIND:VALUE; repeat as needed.")],
    reason: Annotated[str, typer.Option(help="Why; it is kept.")],
) -> None:
    """Split a customer in two, for good: no event will join the two again. `join` undoes it."""
    home = Home.from_environment()
    with deriving(home):
        identities = Identities(home)
        keys = [_key(home, identities, each) for each in off]
        new = identities.part(found(home, identities, customer), keys, clock_of(home.settings)(), f"by hand: {reason}")
        with home.lease.hold(LOG):
            identities.flush()
    console.print(f"{new}: {len(keys)} identifiers parted")


@app.command()
def join(
    one: Annotated[str, typer.Argument(help="A customer id, or an identifier as KIND:VALUE.")],
    other: Annotated[str, typer.Argument(help="Likewise.")],
    reason: Annotated[str, typer.Option(help="Why; it is kept.")],
) -> None:
    """Make two customers one, because you know better. `part` undoes it."""
    home = Home.from_environment()
    with deriving(home):
        identities = Identities(home)
        first, second = found(home, identities, one), found(home, identities, other)
        identities.join(first, second, clock_of(home.settings)(), f"by hand: {reason}")
        with home.lease.hold(LOG):
            identities.flush()
    console.print(f"{identities.current(second)}: joined")


@app.command()
def rebuild() -> None:
    """Work out anew from the log who is whom; what was decided by hand stays."""
    from features.store.identity_rebuild import rebuild as rebuild_all

    home = Home.from_environment()
    with Progress(console=console) as progress:
        task = progress.add_task("replaying the log", total=None)
        customers = rebuild_all(home, Shop.load(home).timezone, lambda done, of: progress.update(task, completed=done, total=of))
    console.print(f"{customers} customers")


@app.command()
def link(
    accept_above: Annotated[
        float | None, typer.Option(help="Match weight from which a link is accepted; default: the evaluated one.")
    ] = None,
) -> None:
    """Look for people who are known twice by their contact data (Splink); joins the certain, lists the likely for review."""
    from features.people.linkage import ACCEPT_WEIGHT, propose

    home = Home.from_environment()
    with deriving(home):
        links = propose(home, ACCEPT_WEIGHT if accept_above is None else accept_above, clock_of(home.settings)())
    table = Table("one", "other", "weight", "what agrees", "outcome")
    for each in links:
        table.add_row(each.one, each.other, f"{each.weight:.1f}", ", ".join(each.agreeing), each.outcome)
    console.print(table)
    console.print("python -m features people join ONE OTHER --reason ... accepts a proposal", highlight=False)


@app.command()
def policy(
    set_: Annotated[list[str] | None, typer.Option("--set", help="PURPOSE-OR-CHANNEL=opt-in|opt-out; repeat as needed.")] = None,
) -> None:
    """Show, or set, what may be done with and for customers who have said nothing."""
    import msgspec

    from features.people.consent import CONTACT_CHANNELS, PURPOSES, ConsentPolicy

    home = Home.from_environment()
    shop = Shop.load(home)
    purposes, permissions = dict(shop.consent.purposes), dict(shop.consent.permissions)
    for each in set_ or []:
        subject, _, rule = each.partition("=")
        if rule not in ("opt-in", "opt-out") or subject not in (*PURPOSES, *CONTACT_CHANNELS):
            raise ValueError(f"--set {each}: write one of {', '.join((*PURPOSES, *CONTACT_CHANNELS))}, then =opt-in or =opt-out")
        chosen = purposes if subject in PURPOSES else permissions
        chosen.update(msgspec.convert({subject: rule}, dict))
    decided = msgspec.convert({"purposes": purposes, "permissions": permissions}, ConsentPolicy)
    if set_:
        msgspec.structs.replace(shop, consent=decided).save(home)
    table = Table(
        "",
        "of customers who have said nothing",
        title="consent policy" + (" (a running service takes it at its next start)" if set_ else ""),
    )
    for subject in (*PURPOSES, *CONTACT_CHANNELS):
        table.add_row(subject, "allowed (opt-out)" if decided.default(subject) else "forbidden (opt-in)")
    console.print(table)


def found(home: Home, identities: Identities, said: str) -> str:
    """The customer that a command line names.

    Raises:
        ValueError: nobody is known by it.
    """
    kind, _, value = said.partition(":")
    if value and kind in KINDS:
        customer = identities.resolve({kind: value}, Shop.load(home).phone_region)
    else:
        current = identities.current(said)
        customer = current if identities.members(current) else None
    if customer is None:
        raise ValueError("nobody is known by that: give a customer id, or an identifier as KIND:VALUE")
    return customer


def _key(home: Home, identities: Identities, said: str) -> str:
    from features.events.identifiers import normalise

    kind, _, value = said.partition(":")
    chosen = next((each for each in KINDS if each == kind), None)
    form = normalise(chosen, value, Shop.load(home).phone_region) if chosen and value else None
    if chosen is None or form is None:
        raise ValueError(f"{said!r} is no identifier: write KIND:VALUE with one of {', '.join(KINDS)}")
    return identities.vault.key(chosen, form)
