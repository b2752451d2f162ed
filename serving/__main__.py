"""``python -m serving``: the HTTP service, batch scoring and the demo."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from features.clock import parse_as_of
from features.command import run
from features.home import Home, MissingStateError
from features.shop import Shop

app = typer.Typer(help="Serve ubiquo's answers over HTTP (the default) and in bulk.", pretty_exceptions_enable=False)
console = Console()
ROOT = Path(__file__).resolve().parent.parent


@app.callback(invoke_without_command=True)
def serve(
    context: typer.Context,
    host: Annotated[str, typer.Option(help="Address to listen on; beyond loopback UBIQUO_API_KEY must be set.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 3000,
) -> None:
    """Start the HTTP service."""
    if context.invoked_subcommand is not None:
        return
    home = Home.from_environment()
    check_bind(host, port)
    check_champions(home)
    home.root.mkdir(parents=True, exist_ok=True)
    # check_bind has let this address pass without a key only if it is loopback
    os.environ["UBIQUO_LOOPBACK"] = "1"
    os.environ.setdefault("BENTOML_HOME", str(home.root / "bentoml"))
    console.print(f"serving on http://{host}:{port}: /v1/..., /openapi.json, /metrics, /readyz; Ctrl-C ends it", highlight=False)
    command = ["bentoml", "serve", "serving.service:Ubiquo", "--working-dir", str(ROOT), "--host", host, "--port", str(port)]
    os.execv(sys.executable, [sys.executable, "-m", *command])


@app.command()
def score(
    kind: Annotated[str, typer.Argument(help="churn, recommendations or next-best-offer")],
    out: Annotated[Path, typer.Option(help="The file to write: .parquet or .jsonl")],
    as_of: Annotated[str | None, typer.Option(help="Date or time; default: where the imported data ends.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100, help="How many items or offers a customer.")] = 10,
) -> None:
    """Score every customer into a file, with the answers that HTTP would give at that moment."""
    from models.registry import KINDS
    from serving.batch import score as score_all

    home = Home.from_environment()
    shop = Shop.load(home)
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is not a kind to score: use one of {', '.join(KINDS)}")
    chosen = next(k for k in KINDS if k == kind)
    moment = parse_as_of(as_of or shop.data_end.isoformat(), shop.timezone)
    with Progress(console=console) as progress:
        task = progress.add_task(f"scoring {kind}", total=None)
        rows = score_all(home, chosen, moment, out, limit, lambda done, of: progress.update(task, completed=done, total=of))
    console.print(f"{out}: {rows} rows, as of {moment.isoformat()}", highlight=False)


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


def check_bind(host: str, port: int) -> None:
    """Refuse a wide bind without a key, and a port that is taken, before anything heavy starts.

    Raises:
        ValueError: with the mend.
    """
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        raise ValueError(f"--host {host!r} is not an address: use 127.0.0.1, or 0.0.0.0 with UBIQUO_API_KEY set") from None
    if not loopback and not os.environ.get("UBIQUO_API_KEY"):
        raise ValueError(f"--host {host} is open to others: set UBIQUO_API_KEY to a secret first, or stay on 127.0.0.1")
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
    from models.registry import KINDS, Registry

    Shop.load(home)
    registry = Registry()
    missing = [kind for kind in KINDS if registry.version_of(kind, registry.settings.champion) is None]
    if len(missing) == len(KINDS):
        raise MissingStateError("the registry has no champion: train and promote one (python -m training all)")
    for kind in missing:
        console.print(f"[yellow]no champion for {kind}[/yellow]: it will answer 503 until one is promoted (python -m training {kind})")


def main() -> None:
    """Run a command."""
    from serving.schemas import HttpProblem

    run(app, console, HttpProblem)


if __name__ == "__main__":
    main()
