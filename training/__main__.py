"""``python -m training``: train, judge against simple baselines, register, and promote where it is earned."""

from __future__ import annotations

import importlib
import warnings
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from features.catalogue.shop import Shop
from features.state.clock import clock_of, parse_as_of
from features.state.command import run
from features.state.home import Home
from features.state.ports import MissingStateError, deriving
from features.state.settings import Settings
from models.registry import NoChampionError, Registry, model_names

if TYPE_CHECKING:
    # what it comes with takes a second to import
    from training.metrics import Estimate

app = typer.Typer(help="Train and judge ubiquo's models.", no_args_is_help=True, pretty_exceptions_enable=False)
console = Console()
AsOf = Annotated[str | None, typer.Option(help="Learn only from before this date or time; default: where the data ends.")]
Horizon = Annotated[
    int | None,
    typer.Option(min=1, max=365, help="How many days ahead a label looks; default: as mlflow.yaml or the domain says."),
]
Window = Annotated[int | None, typer.Option(min=1, help="How many days back training examples reach; default: all.")]
Seed = Annotated[int, typer.Option(min=0, help="The same seed, data and code give the same model.")]
WithinDays = Annotated[int, typer.Option(min=1, max=365, help="Within how many days something counts as what came of a decision.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="As mlflow.yaml names it, e.g. churn.")]
Version = Annotated[int | None, typer.Option(min=1, help="Which version; default: the challenger.")]
Reason = Annotated[str, typer.Option(help="Why; it is recorded.")]


def _add_model(name: str) -> None:
    """A command that trains one model that ``mlflow.yaml`` names."""

    @app.command(name, help=f"Train, judge and register {name}.")
    def train(as_of: AsOf = None, horizon: Horizon = None, window: Window = None, seed: Seed = 0) -> None:
        _run([name], as_of, horizon, window, seed)


@app.command("all")
def train_all(as_of: AsOf = None, horizon: Horizon = None, window: Window = None, seed: Seed = 0) -> None:
    """All that the shop's data can teach, one after the other."""
    _run(_names(), as_of, horizon, window, seed)


@app.command()
def compare(model: Model, version: Version = None) -> None:
    """Challenger against champion on the same customers and cuts: a table, and an HTML page that MLflow keeps too."""
    from training import comparison

    registry = _registry()
    found = comparison.compare(registry, _named(model), version)
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
    registry, name = _registry(), _named(model)
    chosen, verdict = comparison.verdict_on(registry, name, version)
    print(promotion.promote(registry, name, chosen, verdict, reason if force else None))


@app.command()
def rollback(model: Model, reason: Reason) -> None:
    """Give the place back to the champion before the present one."""
    from training import promotion

    print(promotion.rollback(_registry(), _named(model), reason))


@app.command()
def history(model: Model) -> None:
    """Every version: what it learnt from, how it was judged, and when and why it served."""
    from training import comparison

    name = _named(model)
    rows = comparison.history(_registry(), name)
    if rows.empty:
        raise MissingStateError(f"no version of {name} is registered: train one (python -m training {name})")
    table = Table(*rows.columns, title=name, show_lines=True)
    for row in rows.itertuples(index=False):
        table.add_row(*row)
    console.print(table)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A model that recommends items, as mlflow.yaml names it.")] = "recommendations",
    as_of: AsOf = None,
    cuts: Annotated[int, typer.Option(min=1, max=12, help="How many cuts to judge, a horizon apart; never the tuning cut.")] = 2,
    trials: Annotated[int, typer.Option(min=0, help="Trials of Optuna for each peer and list; 0 leaves the peers out.")] = 12,
    seed: Seed = 0,
) -> None:
    """Judge lists beside their sources, without their parts, and beside implicit's models at defaults and tuned; nothing is registered."""
    from training.bootstrap import model_settings
    from training.dataset import Plan
    from training.evaluate import main as judge

    home = Home.from_environment()
    if model_settings(home).models[_named(model)].kind.answers != "items":
        raise ValueError(f"{model} recommends no items: python -m training {model} judges it")
    warnings.filterwarnings("ignore")
    moment = parse_as_of(as_of, Shop.load(home).timezone) if as_of else None
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with deriving(home), Progress(*columns, console=console) as progress:
        task = progress.add_task("opening the log", total=None)
        text = judge(home, model, Plan(moment, seed=seed), cuts, trials, lambda step: progress.update(task, description=step))
    print(text)


@app.command()
def decisions(
    out: Annotated[Path, typer.Option(help="The Parquet file to write: one row a choice.")],
    as_of: AsOf = None,
    within_days: WithinDays = 14,
) -> None:
    """Join what was decided to what came of it, with the chance of each choice: to learn from, and to judge by."""
    from training.decisions import joined, summary, write

    home = Home.from_environment()
    if out.suffix != ".parquet":
        raise ValueError(f"--out {out}: end the name in .parquet")
    moment = _moment(home, as_of)
    with deriving(home):
        found = joined(home, moment, within_days)
        write(home, found, out)
    table = summary(found.rows)
    shown = Table(*table.columns, title=f"decisions before {moment:%Y-%m-%d %H:%M}, and what came of them within {within_days} days")
    for row in table.itertuples(index=False):
        shown.add_row(*map(str, row))
    console.print(shown)
    console.print(f"{out}: {len(found.rows)} rows; {found.unknown} events name a decision that the log does not know", highlight=False)


@app.command()
def sending(as_of: AsOf = None, seed: Seed = 0) -> None:
    """Learn by which channel and at which hour customers answer messages, and put it in force."""
    from training.sending import fit_rates

    home = Home.from_environment()
    with deriving(home):
        found = fit_rates(home, _moment(home, as_of), seed)
    days = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
    table = Table("channel", "messages", "answered", "rate", "best hour", "its rate", title="messages and answers")
    for channel, number in found.messages.items():
        hours, best = found.rates.hours[channel], int(found.rates.hours[channel].argmax())
        named = f"{days[best // 24]} {best % 24:02}:00" if found.rates.uses_hours else "no hour is better"
        rate = found.rates.rates[channel]
        table.add_row(channel, f"{number}", f"{found.answered[channel]}", f"{rate:.1%}", named, f"{hours[best]:.1%}")
    console.print(table)
    if found.gain is None:
        console.print("hours are not told apart: the last 28 days and what was before do not both hold enough messages")
    else:
        gain, low, high = found.gain
        told = f"hours save {gain:.5f} [{low:.5f}, {high:.5f}] of log loss a message on the last 28 days, by which they were chosen or not"
        console.print(told, highlight=False)


@app.command("judge")
def judge_policy(
    policy: Annotated[
        Path, typer.Option(help="Parquet or CSV: decision_id, place, probability of what was logged; also q_logged, q_target.")
    ],
    reward: Annotated[str, typer.Option(help="What a decision is judged by: shown, clicked, accepted, redeemed or bought.")] = "redeemed",
    as_of: AsOf = None,
    within_days: WithinDays = 14,
    seed: Seed = 0,
) -> None:
    """What another policy would have brought, from the decisions in which something was left to chance."""
    from training.candidate_policy import REWARDS, read_candidate, weigh
    from training.decisions import joined
    from training.off_policy import judge

    chosen = next((each for each in REWARDS if each == reward), None)
    if chosen is None:
        raise ValueError(f"--reward {reward}: give one of {', '.join(REWARDS)}")
    candidate, home = read_candidate(policy), Home.from_environment()
    moment = _moment(home, as_of)
    with deriving(home):
        rows = joined(home, moment, within_days).rows
    weighed = weigh(rows, candidate, chosen)
    found = judge(weighed.evidence, seed=seed)
    about = f"{found.decisions} decisions of {found.customers} customers ({', '.join(weighed.kinds)}) before {moment:%Y-%m-%d %H:%M}"
    table = Table(
        "policy", "estimator", f"{chosen} a decision", "95% interval", "above the logged", "95% interval", "ESS", title=about
    )  # fmt: skip
    table.add_row("logged", "mean", *_told(found.logged), "", "", "")
    for name, value in found.values.items():
        table.add_row(policy.name, name, *_told(value), *_told(found.differences[name]), f"{found.ess[name]:.0f}")
    console.print(table)
    console.print(f"mean weight {found.mean_weight} (1 where everything that the policy does was possible)", highlight=False)
    if found.tau is None:
        console.print("DR and SwitchDR are left out: the file has no q_logged and q_target", highlight=False)
    else:
        console.print(f"SwitchDR gives up weights above {found.tau:.3g}", highlight=False)
    for why, count in weighed.left_out.items():
        console.print(f"left out: {count} decisions: {why}", highlight=False, soft_wrap=True)
    for doubt in found.doubts:
        console.print(f"[yellow]doubt:[/yellow] {doubt}", highlight=False, soft_wrap=True)


@app.command()
def lookalike(
    file: Annotated[Path, typer.Argument(help="A list of customers: ids, or identifiers as KIND:VALUE or in a column such as email.")],
    out: Annotated[Path, typer.Option(help="The CSV to write.")],
    top: Annotated[int, typer.Option(min=1, help="How many customers.")] = 500,
    as_of: AsOf = None,
    seed: Seed = 0,
) -> None:
    """Find the customers who are most like those of a list, by their features."""
    from training.lookalike import find_lookalikes, write_lookalikes

    home = Home.from_environment()
    shop = Shop.load(home)
    moment = parse_as_of(as_of or shop.data_end.isoformat(), shop.timezone)
    with deriving(home):
        found = find_lookalikes(home, file, moment, top, seed)
        write_lookalikes(home, found, out)
    console.print(
        f"{found.listed} customers of the list beside {found.others} others; {found.unknown} rows name nobody known, {found.left_out} "
        f"have no features or do not allow it",
        highlight=False,
    )
    console.print(f"AUC, on customers not learnt from: {found.auc}", highlight=False)
    for name, weight in found.strongest:
        console.print(f"  {'more' if weight > 0 else 'less'} {name} ({weight:+.2f})", highlight=False)
    console.print(f"{out}: the {len(found.customers)} most like them", highlight=False)


@app.command("experiment")
def judge_experiment(
    name: Annotated[str, typer.Argument(metavar="NAME", help="An experiment of policy.yaml, or control-group.")],
    days: Annotated[int, typer.Option(min=1, max=365, help="How many days of a customer count, from the first decision on.")] = 14,
    as_of: AsOf = None,
    baseline: Annotated[str | None, typer.Option(help="The variant that others are compared to; default: the first, or control.")] = None,
    ratio: Annotated[
        str | None, typer.Option(help="The share each variant should have, A=0.5,B=0.5; default: as policy.yaml says.")
    ] = None,
    kind: Annotated[str | None, typer.Option(help="Only decisions of this kind, e.g. next-best-offer.")] = None,
    cuped: Annotated[bool, typer.Option(help="Whether what customers did before is taken into account.")] = True,
) -> None:
    """What the variants of an experiment, or offering at all, caused: revenue, orders and buyers by customer."""
    from training.experiment import analyse
    from training.shares import told_shares

    home = Home.from_environment()
    shares, moment = told_shares(ratio) if ratio else None, _moment(home, as_of)
    with deriving(home):
        found = analyse(home, name, moment, days, baseline=baseline, shares=shares, kind=kind, cuped=cuped)
    table = Table(
        "metric", "variant", "customers", "mean", found.baseline, "lift", "95% interval", "relative", "95% interval", "p",
        title=f"{name}: {days} days of each customer, {'CUPED' if cuped else 'unadjusted'}, before {moment:%Y-%m-%d %H:%M}",
    )  # fmt: skip
    for each in found.effects:
        share = each.relative
        relative = ("-", "-") if share is None else (f"{share.value:+.1%}", f"{share.low:+.1%} to {share.high:+.1%}")
        means = (f"{each.mean:.4g}", f"{each.baseline_mean:.4g}", f"{each.lift.value:+.4g}")
        interval, p = f"{each.lift.low:+.4g} to {each.lift.high:+.4g}", f"{each.p_value:.3g}"
        if each.p_value != each.p_value:
            # where nothing varies there is neither an interval nor a test
            interval = p = "-"
        table.add_row(each.metric, each.variant, f"{found.customers[each.variant]}", *means, interval, *relative, p)
    console.print(table)
    for line in found.remarks:
        console.print(line, highlight=False, soft_wrap=True)


@app.command()
def simulate(
    seed: Seed = 0,
    customers: Annotated[int, typer.Option(min=50, help="Simulated customers in each world.")] = 2_000,
    weeks: Annotated[int, typer.Option(min=1, max=52, help="For how many weeks policies are compared.")] = 12,
    worlds: Annotated[int, typer.Option(min=1, max=100, help="How many worlds, of seeds from --seed on.")] = 5,
    traces: Annotated[int, typer.Option(min=1, max=100, help="How many times as much is observed of each customer.")] = 1,
    out: Annotated[Path | None, typer.Option(help="A CSV file to write: one row a family, world and policy.")] = None,
) -> None:
    """Policies of offers in SIMULATED shops whose true response is known: shares of an oracle's profit."""
    from training.simulation import EXPLORED_WEEKS, LIKELIEST, SIMULATED, write
    from training.simulation import simulate as compared

    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("simulated", total=None)
        seeds = range(seed, seed + worlds)
        pacing, found = compared(seeds, customers, weeks, traces, lambda step: progress.update(task, description=step))
    print(SIMULATED)
    print(f"simulated: {customers} customers in each of {worlds} worlds, seeds from {seed} on; traces {traces}")
    print(f"simulated: {weeks} weeks, after {EXPLORED_WEEKS} in which offers were drawn")
    print(f"chosen on the tuning family's own seeds: {pacing}")
    for each in found:
        table = Table(
            "policy", "profit", "share of the oracle's", "95% interval", "governed above it", "95% interval", "sending", "messages a week",
            "answers", "left", title=f"SIMULATED, {each.family} family: a customer, in minor units",
        )  # fmt: skip
        for row in each.rows.groupby("policy", sort=False).mean(numeric_only=True).itertuples():
            share, above = each.shares[row.Index], each.above[row.Index]
            told = (
                f"{share.value:.1%}",
                f"{share.low:.1%} to {share.high:.1%}",
                f"{above.value:+.0f}",
                f"{above.low:+.0f} to {above.high:+.0f}",
            )
            counts = (f"{row.sending:.0f}", f"{row.messages:.2f}", f"{row.answers:.2f}", f"{row.left:.2f}")
            table.add_row(row.Index, f"{row.profit:.0f}", *told, *counts)
        console.print(table)
        print(f"simulated, {each.family} family: governed above {LIKELIEST} by {each.above[LIKELIEST]}")
    if out is not None:
        write(found, out)


@app.command()
def report() -> None:
    """Print the quality tables of the last runs, as Markdown."""
    home = Home.from_environment()
    found = sorted((home.root / "reports").glob("*.md"))
    if not found:
        raise MissingStateError(f"no report in {home.root}: train first (python -m training all)")
    for path in found:
        print(path.read_text() + "\n")


def _told(estimate: Estimate) -> tuple[str, str]:
    return f"{estimate.value:.4f}", f"{estimate.low:.4f} to {estimate.high:.4f}"


def _moment(home: Home, as_of: str | None) -> datetime:
    """The moment that *as_of* names, or now."""
    return parse_as_of(as_of, Shop.load(home).timezone) if as_of else clock_of(home.settings)()


def _names() -> list[str]:
    return model_names(Settings.from_environment().models_file)


def _named(model: str) -> str:
    names = _names()
    if model not in names:
        raise ValueError(f"there is no model {model!r}: use {', '.join(names)}")
    return model


def _registry() -> Registry:
    warnings.filterwarnings("ignore")
    from training.bootstrap import open_registry

    return open_registry(Home.from_environment())


def _run(models: list[str], as_of: str | None, horizon: int | None, window: int | None, seed: int) -> None:
    from training.bootstrap import model_settings
    from training.dataset import EmptyWindowError, NothingToLearnError, Plan

    home = Home.from_environment()
    moment = parse_as_of(as_of, Shop.load(home).timezone) if as_of else None
    plan = Plan(moment, horizon, window, seed)
    settings = model_settings(home)
    failed: list[str] = []
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    for name in models:
        job = importlib.import_module(f"training.{settings.models[name].kind.module}")
        # importing feast turns warnings on again that no user could mend
        warnings.filterwarnings("ignore")
        with deriving(home), Progress(*columns, console=console) as progress:
            task = progress.add_task(f"{name}: opening the log", total=None)

            def told(step: str, task: object = task, name: str = name, progress: Progress = progress) -> None:
                progress.update(task, description=f"{name}: {step}")  # type: ignore[arg-type]

            try:
                text: str = job.main(home, name, plan, told)
            except EmptyWindowError as error:
                if models == [name]:
                    raise
                text = f"{name}: left out: {error}."
                # what a shop does not do is no failure
                failed += [] if isinstance(error, NothingToLearnError) else [name]
            progress.update(task, description=f"{name}: done")
        data = home.root / "reports" / "data" / f"{name}.md"
        print((data.read_text() + "\n\n" if data.exists() else "") + text + "\n")
    if failed:
        raise ValueError(f"not trained: {', '.join(failed)}; the others are")


def _with_models() -> None:
    for name in _names():
        _add_model(name)
    app()


def main() -> None:
    """Run a command."""
    run(_with_models, console, NoChampionError)


if __name__ == "__main__":
    main()
