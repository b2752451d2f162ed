"""``python -m serving``: the HTTP service, batch scoring and the demo."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from features.catalogue.shop import Shop
from features.events.identifiers import KINDS
from features.people.identity import Identities
from features.people.vault import Vault
from features.state.clock import clock_of, system_clock
from features.state.command import run
from features.state.disk import DamagedStateError, make_folder, write_atomically
from features.state.home import Home
from features.state.ports import MissingStateError
from serving.commands import backup
from serving.commands.audience import audience_app
from serving.commands.batch import register as register_batch
from serving.commands.migrate import register as register_migrate
from serving.decide.rule_commands import rules_app
from serving.journeys.commands import journeys_app, outbox_app
from serving.privacy.keys import REFRESH_SECONDS, Audit, Keys

if TYPE_CHECKING:
    pass

app = typer.Typer(help="Serve ubiquo's answers over HTTP (the default) and in bulk.", pretty_exceptions_enable=False)
keys_app = typer.Typer(help="API keys.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")
app.add_typer(journeys_app, name="journeys")
app.add_typer(outbox_app, name="outbox")
app.add_typer(rules_app, name="rules")
app.add_typer(audience_app, name="audience")
register_batch(app)
backup.register(app)
register_migrate(app)
console = Console()


@app.callback(invoke_without_command=True)
def serve(
    context: typer.Context,
    host: Annotated[str, typer.Option(help="Address to listen on; beyond loopback UBIQUO_API_KEY must be set.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 3000,
    workers: Annotated[int, typer.Option(min=1, max=64, help="How many processes answer; each holds the models in memory.")] = 1,
) -> None:
    """Start the HTTP service."""
    if context.invoked_subcommand is not None:
        return
    home = Home.from_environment()
    check_bind(host, port)
    check_champions(home)
    make_folder(home.root)
    os.environ["UBIQUO_LOOPBACK"] = "1" if is_loopback(host) else "0"
    os.environ["UBIQUO_SINGLE_PROCESS"] = "1" if workers == 1 else "0"
    os.environ.setdefault("BENTOML_HOME", str(home.root / "bentoml"))
    if home.settings.log == "text":
        console.print(f"serving on http://{host}:{port}: /v1/..., /openapi.json, /metrics, /readyz; Ctrl-C ends it", highlight=False)
    if workers > 1:
        from serving.http.workers import supervise

        sys.exit(supervise(host, port, workers, os.environ))
    from serving.http.server import serve as serve_http

    sys.exit(serve_http(host, port))


@app.command(hidden=True)
def worker(listening: int, told: int) -> None:
    """Answer beside others on a socket that ``--workers`` has opened."""
    from serving.http.server import work

    sys.exit(work(listening, told))


@app.command()
def demo(
    tour_only: Annotated[bool, typer.Option(help="End after the tour instead of serving on.")] = False,
    households: Annotated[int | None, typer.Option(help="Take only so many households.")] = None,
    port: Annotated[int, typer.Option(min=1, max=65535)] = 3000,
) -> None:
    """Run the whole loop on a real retailer's year, then serve it and show it over HTTP."""
    from serving.demo import run as run_demo

    check_bind("127.0.0.1", port)
    sys.exit(run_demo(Home.from_environment(), households, port, tour_only, console))


@keys_app.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="What to call it, e.g. webshop.")],
    scope: Annotated[list[str], typer.Option(help="ingest, decide, read_customer, manage or admin; repeat for several. Or browser.")],
) -> None:
    """Make a key and print it, once."""
    token = Keys(Home.from_environment()).create(name, scope, system_clock())
    print(token)


@keys_app.command("list")
def list_keys() -> None:
    """Show the keys' names, scopes and dates."""
    table = Table("name", "scopes", "made", "revoked")
    for key in Keys(Home.from_environment()).listed():
        made, revoked = (f"{key[k]:%Y-%m-%d %H:%M}" if key[k] else "" for k in ("created_at", "revoked_at"))
        table.add_row(key["name"], " ".join(key["scopes"]), made, revoked)
    console.print(table)


@keys_app.command("revoke")
def revoke_key(name: str) -> None:
    """Let a key open nothing any more."""
    Keys(Home.from_environment()).revoke(name, system_clock())
    console.print(f"{name}: revoked; a running service refuses it within {REFRESH_SECONDS:.0f} s")


@app.command()
def audit(
    customer: Annotated[str | None, typer.Argument(help="A customer id; default: everybody.")] = None,
) -> None:
    """Show who read or erased which customer; customers stand there as keyed hashes."""
    home = Home.from_environment()
    table = Table("at", "key", "action", "customer", "outcome")
    for line in Audit(home, Vault.open(home)).lines(customer):
        table.add_row(f"{line['at']:%Y-%m-%d %H:%M:%S}", line["key"], line["action"], line["subject"], line["outcome"])
    console.print(table)


@app.command()
def erase(
    customer: Annotated[str, typer.Argument(help="A customer id, or an identifier as KIND:VALUE, e.g. email:ada@example.org.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Erase a customer from every store, prove it, and keep a receipt. There is no way back."""
    from serving.bootstrap import open_office

    home = Home.from_environment()
    with open_office(home, clock_of(home.settings)) as office:
        customer_id = _customer(home, customer)
        if not yes:
            typer.confirm(f"erase {customer_id} for good?", abort=True)
        audit_log = Audit(home, Vault.open(home))
        receipt = office.erase(customer_id)
        audit_log.note(receipt.erased_at, "command line", "erase", customer_id, "done")
    table = Table("place", "rows taken out", title=f"receipt {receipt.receipt_id}")
    for place, count in receipt.places.items():
        table.add_row(place, str(count))
    table.add_row("tombstones raised", str(receipt.tombstones))
    console.print(table)
    places = f"{receipt.proof.files} files" + (f" and {receipt.proof.tables} tables" if receipt.proof.tables else "")
    console.print(f"searched {places} for {receipt.proof.values} values: {len(receipt.proof.found)} found")
    for trace in receipt.proof.found:
        console.print(f"[red]found[/red] {trace.what} in {trace.file}", highlight=False)
    if receipt.proof.found:
        raise typer.Exit(1)


@app.command()
def export(
    customer: Annotated[str, typer.Argument(help="A customer id, or an identifier as KIND:VALUE.")],
    out: Annotated[Path | None, typer.Option(help="Write JSON Lines here instead of on the screen.")] = None,
) -> None:
    """Give out everything that is held of a customer."""
    from serving.bootstrap import open_office

    home = Home.from_environment()
    with open_office(home, clock_of(home.settings)) as office:
        customer_id = _customer(home, customer)
        lines = b"".join(office.export(customer_id))
        Audit(home, Vault.open(home)).note(clock_of(home.settings)(), "command line", "export", customer_id, "done")
    if out is None:
        sys.stdout.buffer.write(lines)
    else:
        write_atomically(out, lines, mode=0o600)
        console.print(f"{out}: {len(lines.splitlines())} lines")


def _customer(home: Home, said: str) -> str:
    """The customer that the command line names.

    Raises:
        ValueError: nobody is known by it.
    """
    kind, colon, value = said.partition(":")
    identities = Identities(home)
    if colon and kind in KINDS:
        found = identities.resolve({kind: value}, Shop.load(home).phone_region)
    else:
        found = said if identities.members(identities.current(said)) else None
    if found is None:
        raise ValueError("nobody is known by that: give a customer id, or an identifier as KIND:VALUE")
    return found


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach *host*.

    Raises:
        ValueError: it is no address.
    """
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        raise ValueError(f"--host {host!r} is not an address: use 127.0.0.1, or 0.0.0.0 with a key made first") from None


def check_bind(host: str, port: int) -> None:
    """Refuse a wide bind without a key, and a port that is taken, before anything heavy starts.

    Raises:
        ValueError: with the mend.
    """
    loopback = is_loopback(host)
    if not loopback and not Keys(Home.from_environment()).any():
        raise ValueError(
            f"--host {host} is open to others: make a key first (python -m serving keys create NAME --scope decide), "
            "set UBIQUO_API_KEY, or stay on 127.0.0.1"
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"port {port} on {host} cannot be used ({error.strerror}): end what uses it or choose another --port"
            ) from None


def check_champions(home: Home) -> None:
    """Refuse to serve nothing; say what is missing.

    Raises:
        MissingStateError: nothing was imported, or no model has a champion.
    """
    from sqlalchemy.exc import DatabaseError

    from models.registry import Registry
    from serving.bootstrap import model_settings

    Shop.load(home)
    try:
        registry = Registry(model_settings(home))
        models = registry.settings.models
        missing = [name for name in models if registry.version_of(name, registry.settings.champion) is None]
    except DatabaseError as error:
        told = f"the registry cannot be read ({error.orig}): put mlflow.db back from a backup, or move it away and train again"
        raise DamagedStateError(told) from None
    if len(missing) == len(models):
        raise MissingStateError("the registry has no champion: train and promote one (python -m training all)")
    for name in missing:
        console.print(f"[yellow]no champion for {name}[/yellow]: it will answer 503 until one is promoted (python -m training {name})")


def main() -> None:
    """Run a command."""
    from models.registry import NoChampionError

    run(app, console, NoChampionError)


if __name__ == "__main__":
    main()
