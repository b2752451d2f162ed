"""``python -m training``: train, judge against simple baselines, register, and promote where it is earned."""

from __future__ import annotations

import importlib
import warnings
from datetime import datetime
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from features.catalogue.shop import Shop
from features.state.clock import clock_of, parse_as_of
from features.state.command import EngineOption, run
from features.state.home import Home
from features.state.ports import MissingStateError, deriving
from features.state.settings import Settings
from models.registry import NoChampionError, Registry, model_names
from models.reports import Document, read_reports
from training.documents import (
    decisions_document,
    drift_document,
    experiment_document,
    experiment_report,
    history_document,
    judged_document,
    sending_document,
    simulated_documents,
)
from training.rendering import Rendering, show

app = typer.Typer(help="Train and judge ubiquo's models.", no_args_is_help=True, pretty_exceptions_enable=False)
console = Console()
progress_console = Console(stderr=True)
"""Where the steps of a job are told, so that its tables can be taken from the output."""
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
Trials = Annotated[
    int, typer.Option(min=0, help="Trials of Optuna for the boosted trees, on the tuning cut; 0 takes the settings that they come with.")
]
Format = Annotated[
    Rendering | None,
    typer.Option("--format", help="How tables are printed; default: rich on a terminal, fitted to its width, else markdown."),
]
Reason = Annotated[str, typer.Option(help="Why; it is recorded.")]


def _add_model(name: str) -> None:
    """A command that trains one model that ``mlflow.yaml`` names."""

    @app.command(name, help=f"Train, judge and register {name}.")
    def train(
        as_of: AsOf = None,
        horizon: Horizon = None,
        window: Window = None,
        seed: Seed = 0,
        trials: Trials = 0,
        engine: EngineOption = None,
        form: Format = None,
    ) -> None:
        _run([name], as_of, RunOptions(horizon, window, seed, trials), form, engine)


@app.command("all")
def train_all(
    as_of: AsOf = None,
    horizon: Horizon = None,
    window: Window = None,
    seed: Seed = 0,
    trials: Trials = 0,
    engine: EngineOption = None,
    form: Format = None,
) -> None:
    """All that the shop's data can teach, one after the other."""
    _run(_names(), as_of, RunOptions(horizon, window, seed, trials), form, engine)


@app.command()
def compare(model: Model, version: Version = None, form: Format = None) -> None:
    """Challenger against champion on the same customers and cuts: a table, and an HTML page that MLflow keeps too."""
    from training import comparison

    registry = _registry()
    found = comparison.compare(registry, _named(model), version)
    told, page = found.document(), comparison.publish(Home.from_environment(), registry, found)
    show([Document(told.title, [*told.parts, f"page: {page}"])], form, console)


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
def history(model: Model, form: Format = None) -> None:
    """Every version: what it learnt from, how it was judged, and when and why it served."""
    from training import comparison

    name = _named(model)
    rows = comparison.history(_registry(), name)
    if rows.empty:
        raise MissingStateError(f"no version of {name} is registered: train one (python -m training {name})")
    show([history_document(name, rows)], form, console)


@app.command()
def drift(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="As mlflow.yaml names it; default: every one with a champion.")
    ] = None,
    as_of: AsOf = None,
    form: Format = None,
) -> None:
    """How far the inputs of the champions have moved since they learnt; also kept as JSON in the home's reports."""
    from training.drift import drift as measure
    from training.kept import keep_drift

    registry, home = _registry(), Home.from_environment()
    champion = registry.settings.champion
    names = [_named(model)] if model else [name for name in _names() if registry.version_of(name, champion) is not None]
    if not names:
        raise NoChampionError("no model has a champion: train first (python -m training all)")
    moment = parse_as_of(as_of, Shop.load(home).timezone) if as_of else None
    found = []
    for name in names:
        with deriving(home):
            report = measure(home, registry, name, moment)
            keep_drift(home, report)
        found.append(drift_document(report))
    show(found, form, console)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A model that recommends items, as mlflow.yaml names it.")] = "recommendations",
    as_of: AsOf = None,
    cuts: Annotated[int, typer.Option(min=1, max=12, help="How many cuts to judge, a horizon apart; never the tuning cut.")] = 2,
    trials: Annotated[int, typer.Option(min=0, help="Trials of Optuna for each peer and list; 0 leaves the peers out.")] = 12,
    seed: Seed = 0,
    form: Format = None,
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
    with deriving(home), Progress(*columns, console=progress_console) as progress:
        task = progress.add_task("opening the log", total=None)
        document = judge(home, model, Plan(moment, seed=seed), cuts, trials, lambda step: progress.update(task, description=step))
    show([document], form, console)


@app.command()
def decisions(
    out: Annotated[Path, typer.Option(help="The Parquet file to write: one row a choice.")],
    as_of: AsOf = None,
    within_days: WithinDays = 14,
    form: Format = None,
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
    note = f"{out}: {len(found.rows)} rows; {found.unknown} events name a decision that the log does not know"
    show([decisions_document(summary(found.rows), moment, within_days, [note])], form, console)


@app.command()
def sending(as_of: AsOf = None, seed: Seed = 0, form: Format = None) -> None:
    """Learn by which channel and at which hour customers answer messages, and put it in force."""
    from training.sending import fit_rates

    home = Home.from_environment()
    with deriving(home):
        found = fit_rates(home, _moment(home, as_of), seed)
    show([sending_document(found)], form, console)


@app.command("judge")
def judge_policy(
    policy: Annotated[
        Path, typer.Option(help="Parquet or CSV: decision_id, place, probability of what was logged; also q_logged, q_target.")
    ],
    reward: Annotated[str, typer.Option(help="What a decision is judged by: shown, clicked, accepted, redeemed or bought.")] = "redeemed",
    as_of: AsOf = None,
    within_days: WithinDays = 14,
    seed: Seed = 0,
    form: Format = None,
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
    show([judged_document(policy.name, chosen, moment, weighed, found)], form, console)


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
    form: Format = None,
) -> None:
    """What the variants of an experiment, or offering at all, caused: revenue, orders and buyers by customer; kept as JSON too."""
    from training.experiment import analyse
    from training.kept import keep_experiment
    from training.shares import told_shares

    home = Home.from_environment()
    shares, moment = told_shares(ratio) if ratio else None, _moment(home, as_of)
    with deriving(home):
        found = analyse(home, name, moment, days, baseline=baseline, shares=shares, kind=kind, cuped=cuped)
        report = experiment_report(name, found, moment, days, cuped, kind, clock_of(home.settings)())
        keep_experiment(home, report)
    show([experiment_document(report)], form, console)


@app.command()
def simulate(
    seed: Seed = 0,
    customers: Annotated[int, typer.Option(min=50, help="Simulated customers in each world.")] = 2_000,
    weeks: Annotated[int, typer.Option(min=1, max=52, help="For how many weeks policies are compared.")] = 12,
    worlds: Annotated[int, typer.Option(min=1, max=100, help="How many worlds, of seeds from --seed on.")] = 5,
    traces: Annotated[int, typer.Option(min=1, max=100, help="How many times as much is observed of each customer.")] = 1,
    out: Annotated[Path | None, typer.Option(help="A CSV file to write: one row a family, world and policy.")] = None,
    form: Format = None,
) -> None:
    """Policies of offers in SIMULATED shops whose true response is known: shares of an oracle's profit."""
    from training.simulation import EXPLORED_WEEKS, LIKELIEST, SIMULATED, write
    from training.simulation import simulate as compared

    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=progress_console, transient=True
    ) as progress:
        task = progress.add_task("simulated", total=None)
        seeds = range(seed, seed + worlds)
        pacing, found = compared(seeds, customers, weeks, traces, lambda step: progress.update(task, description=step))
    head = Document(
        SIMULATED,
        [
            f"simulated: {customers} customers in each of {worlds} worlds, seeds from {seed} on; traces {traces}",
            f"simulated: {weeks} weeks, after {EXPLORED_WEEKS} in which offers were drawn",
            f"chosen on the tuning family's own seeds: {pacing}",
        ],
    )
    show([head, *simulated_documents(found, LIKELIEST)], form, console)
    if out is not None:
        write(found, out)


@app.command()
def report(form: Format = None) -> None:
    """Print the quality tables of the last runs."""
    home = Home.from_environment()
    found = read_reports(home.root)
    for why in found.unreadable.values():
        progress_console.print(f"left out: {why}", soft_wrap=True, highlight=False)
    if not found.models:
        raise MissingStateError(f"no report in {home.root}: train first (python -m training all)")
    show([each.document for each in found.models.values()], form, console)


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


class RunOptions(NamedTuple):
    """What a command says of a run besides its moment; see ``training.dataset.Plan``."""

    horizon_days: int | None
    window_days: int | None
    seed: int
    trials: int


def _run(models: list[str], as_of: str | None, asked: RunOptions, form: Rendering | None, engine: str | None) -> None:
    from features.store.compute import with_engine
    from training.bootstrap import model_settings
    from training.dataset import EmptyWindowError, NothingToLearnError, Plan

    home = with_engine(Home.from_environment(), engine)
    moment = parse_as_of(as_of, Shop.load(home).timezone) if as_of else None
    plan, settings = Plan(moment, *asked), model_settings(home)
    failed: list[str] = []
    documents: list[Document] = []
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    for name in models:
        job = importlib.import_module(f"training.{settings.models[name].kind.module}")
        # importing feast turns warnings on again that no user could mend
        warnings.filterwarnings("ignore")
        with deriving(home), Progress(*columns, console=progress_console) as progress:
            task = progress.add_task(f"{name}: opening the log", total=None)

            def told(step: str, task: object = task, name: str = name, progress: Progress = progress) -> None:
                progress.update(task, description=f"{name}: {step}")  # type: ignore[arg-type]

            try:
                found = job.main(home, name, plan, told)
                documents += [found.data, found.document]
            except EmptyWindowError as error:
                if models == [name]:
                    raise
                documents.append(Document(f"{name}: left out", [f"{error}."]))
                # what a shop does not do is no failure
                failed += [] if isinstance(error, NothingToLearnError) else [name]
            progress.update(task, description=f"{name}: done")
        if form is not Rendering.HTML:
            # as they come; a page is made of all
            show(documents, form, console)
            documents.clear()
    if documents:
        show(documents, form, console)
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
