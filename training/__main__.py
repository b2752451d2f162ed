"""``python -m training``: train, judge against simple baselines, register, and promote where it is earned."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from features.catalogue.shop import Shop
from features.state.clock import parse_as_of
from features.state.command import run
from features.state.home import Home, MissingStateError
from models.registry import KINDS, Kind, NoChampionError, Registry

app = typer.Typer(help="Train and judge ubiquo's models.", no_args_is_help=True, pretty_exceptions_enable=False)
console = Console()
AsOf = Annotated[str | None, typer.Option(help="Learn only from before this date or time; default: where the data ends.")]
Horizon = Annotated[int, typer.Option(min=1, max=365, help="How many days ahead a label looks.")]
Window = Annotated[int | None, typer.Option(min=1, help="How many days back training examples reach; default: all.")]
Seed = Annotated[int, typer.Option(min=0, help="The same seed, data and code give the same model.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="churn, recommendations or next-best-offer")]
Version = Annotated[int | None, typer.Option(min=1, help="Which version; default: the challenger.")]
Reason = Annotated[str, typer.Option(help="Why; it is recorded.")]


@app.command()
def churn(as_of: AsOf = None, horizon: Horizon = 28, window: Window = None, seed: Seed = 0) -> None:
    """Who will stay away for the whole horizon?"""
    _run(["churn"], as_of, horizon, window, seed)


@app.command()
def recommendations(as_of: AsOf = None, horizon: Horizon = 28, window: Window = None, seed: Seed = 0) -> None:
    """What will each customer buy, and what new would she like?"""
    _run(["recommendations"], as_of, horizon, window, seed)


@app.command("next-best-offer")
def next_best_offer(as_of: AsOf = None, seed: Seed = 0) -> None:
    """Which campaign will a customer answer, and with which coupon? A label looks as far ahead as its campaign runs."""
    _run(["next-best-offer"], as_of, 28, None, seed)


@app.command("all")
def train_all(as_of: AsOf = None, horizon: Horizon = 28, window: Window = None, seed: Seed = 0) -> None:
    """All that the shop's data can teach, one after the other."""
    _run(["churn", "next-best-offer", "recommendations"], as_of, horizon, window, seed)


@app.command()
def compare(model: Model, version: Version = None) -> None:
    """Challenger against champion on the same customers and cuts: a table, and an HTML page that MLflow keeps too."""
    from training import comparison

    registry = _registry()
    found = comparison.compare(registry, _kind(model), version)
    print(found.text())
    console.print(f"page: {comparison.publish(Home.from_environment(), registry, found)}", soft_wrap=True, highlight=False)


@app.command()
def promote(
    model: Model,
    version: Version = None,
    force: Annotated[bool, typer.Option("--force", help="Promote against the rule.")] = False,
    reason: Annotated[str | None, typer.Option(help="Why it is forced; it is recorded.")] = None,
) -> None:
    """Make a version the champion, if the rule in mlflow.yaml lets it; a running service takes it within half a minute."""
    from training import comparison, promotion

    if force != bool(reason and reason.strip()):
        raise ValueError("--force and --reason 'why' go together: what is done against the rule must be accounted for")
    registry, kind = _registry(), _kind(model)
    chosen, verdict = comparison.verdict_on(registry, kind, version)
    print(promotion.promote(registry, kind, chosen, verdict, reason if force else None))


@app.command()
def rollback(model: Model, reason: Reason) -> None:
    """Give the place back to the champion before the present one."""
    from training import promotion

    print(promotion.rollback(_registry(), _kind(model), reason))


@app.command()
def history(model: Model) -> None:
    """Every version: what it learnt from, how it was judged, and when and why it served."""
    from training import comparison

    kind = _kind(model)
    rows = comparison.history(_registry(), kind)
    if rows.empty:
        raise MissingStateError(f"no version of {kind} is registered: train one (python -m training {kind})")
    table = Table(*rows.columns, title=kind, show_lines=True)
    for row in rows.itertuples(index=False):
        table.add_row(*row)
    console.print(table)


@app.command()
def report() -> None:
    """Print the quality tables of the last runs, as Markdown."""
    home = Home.from_environment()
    found = sorted((home.root / "reports").glob("*.md"))
    if not found:
        raise MissingStateError(f"no report in {home.root}: train first (python -m training all)")
    for path in found:
        print(path.read_text() + "\n")


def _kind(model: str) -> Kind:
    for kind in KINDS:
        if kind == model:
            return kind
    raise ValueError(f"there is no model {model!r}: use {', '.join(KINDS)}")


def _registry() -> Registry:
    warnings.filterwarnings("ignore")
    return Registry()


def _run(kinds: list[str], as_of: str | None, horizon: int, window: int | None, seed: int) -> None:
    from training import churn as churn_job
    from training import next_best_offer as offer_job
    from training import recommendations as recommendation_job
    from training.dataset import Plan

    # importing feast turns warnings on again that no user could mend
    warnings.filterwarnings("ignore")
    jobs: dict[str, Callable[..., str]] = {
        "churn": churn_job.main,
        "next-best-offer": offer_job.main,
        "recommendations": recommendation_job.main,
    }
    home = Home.from_environment()
    moment = parse_as_of(as_of, Shop.load(home).timezone) if as_of else None
    plan = Plan(moment, horizon, window, seed)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    for kind in kinds:
        with home.deriving(), Progress(*columns, console=console) as progress:
            task = progress.add_task(f"{kind}: opening the log", total=None)

            def told(step: str, task: object = task, kind: str = kind, progress: Progress = progress) -> None:
                progress.update(task, description=f"{kind}: {step}")  # type: ignore[arg-type]

            try:
                text = jobs[kind](home, plan, told)
            except offer_job.NoCampaignsError as error:
                if kinds == [kind]:
                    raise
                text = f"next-best-offer: left out: {error}."
            progress.update(task, description=f"{kind}: done")
        data = home.root / "reports" / "data" / f"{kind}.md"
        print((data.read_text() + "\n\n" if data.exists() else "") + text + "\n")


def main() -> None:
    """Run a command."""
    run(app, console, NoChampionError)


if __name__ == "__main__":
    main()
