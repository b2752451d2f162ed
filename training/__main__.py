"""``python -m training``: train, judge against simple baselines, register, and promote where it is earned."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from features.clock import parse_as_of
from features.command import run
from features.home import Home, MissingStateError
from features.shop import Shop

app = typer.Typer(help="Train and judge ubiquo's models.", no_args_is_help=True, pretty_exceptions_enable=False)
console = Console()
AsOf = Annotated[str | None, typer.Option(help="Learn only from before this date or time; default: where the data ends.")]
Seed = Annotated[int, typer.Option(min=0, help="The same seed, data and code give the same model.")]


@app.command()
def churn(as_of: AsOf = None, seed: Seed = 0) -> None:
    """Who will stay away for the next 28 days?"""
    _run(["churn"], as_of, seed)


@app.command()
def recommendations(as_of: AsOf = None, seed: Seed = 0) -> None:
    """What will each customer buy, and what new would she like?"""
    _run(["recommendations"], as_of, seed)


@app.command("next-best-offer")
def next_best_offer(as_of: AsOf = None, seed: Seed = 0) -> None:
    """Which campaign will a customer answer, and with which coupon?"""
    _run(["next-best-offer"], as_of, seed)


@app.command("all")
def train_all(as_of: AsOf = None, seed: Seed = 0) -> None:
    """All three, one after the other."""
    _run(["churn", "next-best-offer", "recommendations"], as_of, seed)


@app.command()
def report() -> None:
    """Print the quality tables of the last runs, as Markdown."""
    home = Home.from_environment()
    found = sorted((home.root / "reports").glob("*.md"))
    if not found:
        raise MissingStateError(f"no report in {home.root}: train first (python -m training all)")
    for path in found:
        print(path.read_text() + "\n")


def _run(kinds: list[str], as_of: str | None, seed: int) -> None:
    from training import churn as churn_job
    from training import next_best_offer as offer_job
    from training import recommendations as recommendation_job

    # importing feast turns warnings on again that no user could mend
    warnings.filterwarnings("ignore")
    jobs: dict[str, Callable[..., str]] = {
        "churn": churn_job.main,
        "next-best-offer": offer_job.main,
        "recommendations": recommendation_job.main,
    }
    home = Home.from_environment()
    moment = parse_as_of(as_of, Shop.load(home).timezone) if as_of else None
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    for kind in kinds:
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(f"{kind}: opening the log", total=None)

            def told(step: str, task: object = task, kind: str = kind, progress: Progress = progress) -> None:
                progress.update(task, description=f"{kind}: {step}")  # type: ignore[arg-type]

            text = jobs[kind](home, moment, seed, told)
            progress.update(task, description=f"{kind}: done")
        print(text + "\n")


def main() -> None:
    """Run a command."""
    run(app, console)


if __name__ == "__main__":
    main()
