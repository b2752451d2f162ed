"""Judging: measures against scikit-learn, honest splits, and promotion that noise does not earn."""

from __future__ import annotations

import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from scene import NEW_YEAR, ROOT, TinyShop, command, event, free_port, surroundings
from scene import customer as customer_of
from sklearn.metrics import average_precision_score, ndcg_score, roc_auc_score

from features.state.clock import local_midnight
from features.state.home import Home
from features.state.settings import Settings
from models.inputs import matrix
from models.probability import Boosted, shifted
from models.registry import Registry, load_settings
from models.reports import Document, InputBins, Sheet, history_path, read_history, read_reports, version_path
from training.bootstrap import open_registry
from training.dataset import Cuts, EmptyWindowError, Plan, Truth, days_before, training_cutoffs
from training.drift import drift, moved
from training.gate import edges_of, shares_of
from training.kept import calibration_points, keep_report
from training.metrics import BinaryScores, bootstrap, calibration, difference, ranking_measures
from training.page import page
from training.rendering import fit, markdown, print_rich
from training.run import TrackedRun, artifact_frame, inputs_digest
from training.shift import lasting_shift, miss
from training.tuning import of_probabilities, tuned

ZONE = "America/New_York"
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def midnight(text: str) -> datetime:
    return local_midnight(date.fromisoformat(text), ZONE)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=4, max_size=80).filter(lambda r: 0 < sum(x for x, _ in r) < len(r)))
def test_auc_and_average_precision_are_scikit_learns_ties_included(rows: list[tuple[bool, int]]) -> None:
    labels, scores = np.array([r[0] for r in rows]), np.array([float(r[1]) for r in rows])
    found = BinaryScores(labels, scores, False).measures(np.ones(len(rows)))
    assert found["auc"] == pytest.approx(roc_auc_score(labels, scores))
    assert found["average_precision"] == pytest.approx(average_precision_score(labels, scores))


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3), st.integers(0, 3)), min_size=6, max_size=40))
def test_a_weight_is_a_repetition(rows: list[tuple[bool, int, int]]) -> None:
    labels, scores, weights = (np.array(column) for column in zip(*rows, strict=True))
    repeated = np.repeat(labels, weights)
    if not 0 < repeated.sum() < len(repeated):
        return
    weighted = BinaryScores(labels, scores.astype(float), False).measures(weights.astype(float))
    plain = BinaryScores(repeated, np.repeat(scores, weights).astype(float), False).measures(np.ones(len(repeated)))
    assert weighted["auc"] == pytest.approx(plain["auc"])
    assert weighted["average_precision"] == pytest.approx(plain["average_precision"])


def test_ranking_measures_against_hand_and_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    scores, truth = rng.random(50), np.array([3, 14, 15, 9, 26])
    picks = np.argsort(-scores)[:10]
    recall, ndcg, reciprocal = ranking_measures(scores, picks, truth)
    relevance = np.isin(np.arange(50), truth).astype(float)
    assert ndcg == pytest.approx(ndcg_score([relevance], [scores], k=10))
    assert recall == pytest.approx(np.isin(picks, truth).sum() / 5)
    assert 1 / reciprocal == pytest.approx(1 + np.argmax(np.isin(np.argsort(-scores), truth)))


def test_a_list_that_knows_nothing_earns_the_middle_rank_not_the_first() -> None:
    assert ranking_measures(np.zeros(99), np.arange(10), np.array([50]))[2] == pytest.approx(1 / 50)


def test_an_interval_of_paired_models_is_narrower_than_their_own() -> None:
    rng = np.random.default_rng(1)
    customers = [f"c{k % 200}" for k in range(400)]
    a = rng.normal(size=400)
    b = a + rng.normal(0.1, 0.05, size=400)
    values, drawn = bootstrap(customers, lambda w: np.array([np.average(a, weights=w), np.average(b, weights=w)]), draws=300)
    lead = difference(values, drawn, ["a", "b"], "b", "a")
    assert lead.low > 0.08
    assert lead.high < 0.12


def test_calibration_accepts_honest_probabilities_and_rejects_boasts() -> None:
    rng = np.random.default_rng(2)
    p = rng.beta(1, 6, 3000)
    labels = rng.random(3000) < p
    assert calibration(labels, p).p_value > 0.01
    boast = calibration(labels, p**0.5)
    assert boast.p_value < 1e-6
    assert boast.ece > 3 * boast.ece_floor


def test_a_miss_is_found_again_and_one_large_campaign_says_little_of_the_next() -> None:
    rng = np.random.default_rng(9)
    foretold = rng.uniform(0.02, 0.4, 20_000)
    happened = rng.random(len(foretold)) < shifted(foretold, np.full(len(foretold), -0.6))
    added, told = miss(happened, foretold)
    assert added == pytest.approx(-0.6, abs=0.08)
    assert lasting_shift([]) == 0.0
    assert -0.2 < lasting_shift([(added, told)]) < 0.0
    assert lasting_shift([(added, told)] * 200) == pytest.approx(added, abs=0.05)
    assert lasting_shift([(added, told), (-added, told)]) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("theirs", "ours", "said"),
    [
        ("metric: average_precision", "metric: brier", "brier"),
        ("metric: average_precision", "metric: accuracy", "accuracy"),
        ("guards: {auc: 0.01", "guards: {acu: 0.01", "acu"),
        ("guards: {auc: 0.01", "guards: {auc: -0.01", "margins not be negative"),
        ("rule: paired_bootstrap", "rule: whichever", "rule must be"),
        ("level: 0.95", "level: 95", "level must lie"),
        ("max_age_days: 7", "max_age_days: soon", "max_age_days"),
        ("max_age_days: 7", "max_aeg_days: 7", "max_aeg_days"),
    ],
)
def test_settings_that_no_job_can_judge_by_are_refused(tmp_path: Path, theirs: str, ours: str, said: str) -> None:
    path = tmp_path / "mlflow.yaml"
    path.write_text((ROOT / "mlflow.yaml").read_text().replace(theirs, ours))
    with pytest.raises(ValueError, match=said):
        load_settings(Path("var"), path)


def test_the_cuts_are_local_midnights_and_no_training_window_reaches_past_its_cut() -> None:
    cuts = Cuts.before(NEW_YEAR, midnight("2017-01-01"), ZONE)
    assert cuts.tests == (midnight("2017-11-06"), midnight("2017-12-04"))
    assert cuts.tuning == midnight("2017-10-09")
    for cut in (*cuts.tests, cuts.final):
        cutoffs = training_cutoffs(cut, cuts.start, ZONE)
        assert len(cutoffs) > 5
        assert all(days_before(c, -28, ZONE) <= cut for c in cutoffs)
        assert set(cutoffs) <= set(training_cutoffs(cuts.final, cuts.start, ZONE))


def test_too_short_a_window_is_refused_with_the_number_of_days_needed() -> None:
    with pytest.raises(EmptyWindowError, match="196 days are needed"):
        Cuts.before(NEW_YEAR, NEW_YEAR - timedelta(days=100), ZONE)


def test_a_label_counts_visits_from_the_cut_up_to_but_not_at_the_end(tiny: TinyShop) -> None:
    cut = midnight("2017-11-06")
    end = midnight("2017-12-04")
    tiny.add(
        *(event(f"old{c}", "purchase", cut - timedelta(days=9), card=c, items=[("i0", 1, 1)]) for c in "1234"),
        event("at the cut", "purchase", cut, card="1", items=[("i0", 1, 1)]),
        event("just before the end", "purchase", end - timedelta(microseconds=1), card="2", items=[("i0", 1, 1)]),
        event("at the end", "purchase", end, card="3", items=[("i0", 1, 1)]),
        event("not yet a customer", "purchase", cut + timedelta(days=1), card="5", items=[("i0", 1, 1)]),
    )
    spine = Truth(tiny.home, NEW_YEAR).churn_spine([cut])
    assert len(spine) == 4
    assert spine["label"].sum() == 2


def test_the_next_visit_after_each_cut_is_what_the_visits_say(tiny: TinyShop) -> None:
    rng = random.Random(3)
    visits = {f"{card}": [NEW_YEAR - timedelta(hours=rng.randrange(1, 4000)) for _ in range(rng.randint(1, 6))] for card in range(1, 13)}
    tiny.add(*(event(f"{c}-{k}", "purchase", at, card=c, items=[("i0", 1, 1)]) for c, ats in visits.items() for k, at in enumerate(ats)))
    cuts, horizon = [midnight("2017-09-11"), midnight("2017-10-09"), midnight("2017-11-13")], 28
    wanted = {}
    for cut in cuts:
        for card, ats in visits.items():
            if min(ats) < cut:
                next_visit = min((at for at in ats if cut <= at < days_before(cut, -horizon, ZONE)), default=None)
                days = float(horizon) if next_visit is None else min((next_visit - cut) / timedelta(days=1), float(horizon))
                wanted[customer_of(card), cut] = (next_visit is None, days)
    truth = Truth(tiny.home, NEW_YEAR)
    left, days = truth.churn_spine(cuts, horizon), truth.next_order_spine(cuts, horizon)
    keys = list(zip(left["customer_id"], left["event_timestamp"].dt.to_pydatetime(), strict=True))
    assert len(keys) == len(wanted)
    assert len({away for away, _ in wanted.values()}) == 2
    assert dict(zip(keys, zip(left["label"], days["days"], strict=True), strict=True)) == wanted
    assert days["customer_id"].tolist() == left["customer_id"].tolist()


def test_a_campaign_is_labelled_by_what_its_recipients_redeemed_in_time(tiny: TinyShop) -> None:
    start = NEW_YEAR - timedelta(days=60)
    tiny.add(
        event("p", "purchase", start - timedelta(days=5), items=[("i0", 1, 1)]),
        *(event(f"s{c}", "message_sent", start, card=c, campaign_id="c0") for c in "123"),
        event("in time", "offer_redeem", start + timedelta(days=3), card="1", campaign_id="c0", offer_id="c0-1"),
        event("too late", "offer_redeem", start + timedelta(days=40), card="2", campaign_id="c0", offer_id="c0-1"),
        event("not sent", "offer_redeem", start + timedelta(days=3), card="4", campaign_id="c0", offer_id="c0-1"),
    )
    campaign = pd.DataFrame([{"campaign_id": "c0", "campaign_type": "A", "valid_from": start, "valid_until": start + timedelta(days=30)}])
    assert Truth(tiny.home, NEW_YEAR).campaign_spine(campaign)["label"].sum() == 1


def test_training_before_anybody_bought_ends_with_the_mend(tiny: TinyShop) -> None:
    tiny.add(event("p", "purchase", NEW_YEAR - timedelta(days=5), items=[("i0", 1, 1)]))
    for as_of, said in (("2016-01-01", "choose a later --as-of"), ("2018-01-01", "too short")):
        done = command("training", "churn", "--as-of", as_of, home=tiny.home.root)
        assert done.returncode == 1
        assert said in done.stdout
        assert "Traceback" not in done.stdout + done.stderr


def test_another_engine_is_another_input_only_where_it_learns_otherwise(tiny: TinyShop) -> None:
    tiny.add(event("e", "purchase", NEW_YEAR - timedelta(days=1), "1", [("i1", 1, 100)]))
    cuts, source = Cuts.before(NEW_YEAR, NEW_YEAR - timedelta(days=700), ZONE), load_settings(tiny.home.root).source
    homes = [Home(tiny.home.root, Settings(engine=engine)) for engine in ("duckdb", "spark")]  # type: ignore[arg-type]
    found = {learner: {inputs_digest(source, home, 1, cuts, Plan(), learner) for home in homes} for learner in ("EASE", "ALS")}  # type: ignore[arg-type]
    assert {learner: len(digests) for learner, digests in found.items()} == {"EASE": 1, "ALS": 2}


def test_the_settings_name_what_is_wrong_with_them(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.yaml"
    path.write_text("tracking_uri: x\nmodels:\n  churn: {experiment: e}\n")
    with pytest.raises(ValueError, match=r"mlflow\.yaml"):
        load_settings(Path("var"), path)


def downloaded(tracking_uri: str, into: Path) -> str:
    """The files of the churn champion of a registry: the sealed folder, fetched by a process of its own."""
    code = (
        "import mlflow, sys\nfolder = mlflow.artifacts.download_artifacts('models:/churn@champion', dst_path=sys.argv[1])\nprint(folder)\n"
    )
    into.mkdir()
    environment = {**surroundings(), "MLFLOW_TRACKING_URI": tracking_uri}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(into)], env=environment, capture_output=True, text=True, check=True
    )
    return f"{done.stdout.strip().splitlines()[-1]}/artifacts"


@pytest.fixture
def tracking_server(tmp_path: Path) -> Iterator[str]:
    port = free_port()
    command = [
        sys.executable, "-W", "ignore", "-m", "mlflow", "server", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{tmp_path}/team.db", "--artifacts-destination", str(tmp_path / "team-artifacts"),
    ]  # fmt: skip
    environment = {**surroundings(), "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    log = open(tmp_path / "server.log", "wb")  # noqa: SIM115 - the child keeps it
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
            break
        except OSError:
            time.sleep(0.3)
    else:
        raise AssertionError((tmp_path / "server.log").read_text())
    yield f"http://127.0.0.1:{port}"
    os.killpg(process.pid, signal.SIGTERM)
    process.wait()


def wide_document() -> Document:
    """Ten measures of five models, as recommendations are judged, and a table of sentences."""
    lists = ("for_you", "also_like")
    columns = [f"{each} {measure}" for each in lists for measure in ("R@10", "N@10", "MRR", "coverage", "novelty")]
    names = ["popularity", "personal frequency", "EASE", "EASE, lately", "as served"]
    rng = np.random.default_rng(4)
    rows = [
        [name, *(f"{a:.3f} [{b:.3f}, {c:.3f}]" if k % 5 < 3 else f"{a:.3f}" for k, (a, b, c) in enumerate(rng.random((10, 3))))]
        for name in names
    ]
    judged = Sheet(columns=["model", *columns], rows=rows, groups=["", *(c.split()[0] for c in columns)], served=4)
    said = "import the events up to 2018-01-01, or train with --as-of 2017-12-24, whichever tells more of the 5746 purchases"
    checks = Sheet(
        columns=["check", "", "found", "allowed", "what to do"], rows=[["age of the last purchase", "severe", "8.5 days", "7", said]]
    )
    return Document("Lists, 28 days", [judged, "Lead: 0.246 [0.236, 0.254].", checks, "looked at 3 times"])


def shown(document: Document, width: int) -> str:
    console = Console(width=width, file=io.StringIO())
    print_rich(document, console)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [80, 100, 200])
def test_a_table_fits_its_terminal_and_loses_no_number(width: int) -> None:
    document = wide_document()
    told = shown(document, width)
    assert max(map(len, told.splitlines())) <= width
    wanted = Counter(
        number for part in document.parts if isinstance(part, Sheet) for row in part.rows for number in NUMBER.findall(" ".join(row))
    )
    assert not wanted - Counter(NUMBER.findall(told))
    assert "…" not in told
    assert "(served)" in told


def test_many_measures_are_turned_round_before_they_are_parted() -> None:
    sheet = wide_document().parts[0]
    assert isinstance(sheet, Sheet)
    [turned] = fit(sheet, 100)
    assert turned.columns == ["", "popularity", "personal frequency", "EASE", "EASE, lately", "as served (served)"]
    assert [part.title for part in fit(sheet, 80)] == ["for_you", "for_you", "also_like", "also_like"]
    assert [part.title for part in fit(sheet, 110)] == ["for_you", "also_like"]
    assert fit(sheet, 300)[0].columns[1] == "for_you R@10"


def test_markdown_and_html_hold_the_same_rows() -> None:
    document = wide_document()
    [table, checks] = [part for part in document.parts if isinstance(part, Sheet)]
    text, html = markdown(document), page(document.title, document.parts)
    for cell in (*table.rows[2], *checks.rows[0]):
        assert cell in text
        assert cell in html
    assert "| **as served** (served) | " in text
    assert '<tr class="served"><td>as served</td>' in html
    risky = Document("t", [Sheet(columns=["a"], rows=[["<script>|x"]])])
    assert "<script>" not in page("t", risky.parts)
    assert "\\|x |" in markdown(risky)


def test_every_calibration_point_holds_its_share_in_its_interval() -> None:
    rng = np.random.default_rng(5)
    foretold = rng.random(1003)
    points = calibration_points(rng.random(1003) < foretold, foretold)
    assert sum(point.rows for point in points) == 1003
    assert [point.predicted for point in points] == sorted(point.predicted for point in points)
    assert all(0 <= (p.observed.low or 0) <= p.observed.value <= (p.observed.high or 0) <= 1 for p in points)
    none = calibration_points(np.zeros(20, bool), np.full(20, 0.1), bands=1)[0].observed
    assert (none.value, none.low) == (0.0, 0.0)
    assert none.high == pytest.approx(0.161, abs=0.001), "Wilson's interval of 0 of 20"


def bins(name: str, values: np.ndarray) -> InputBins:
    edges = edges_of(values)
    return InputBins(name=name, edges=edges.tolist(), shares=shares_of(values, edges).tolist())


def test_an_input_moves_when_its_values_do_and_not_by_chance() -> None:
    rng = np.random.default_rng(6)
    before = rng.normal(size=4000)
    still, far = moved(bins("x", before), rng.normal(size=3000), 4000), moved(bins("x", before), rng.normal(1, 1, 3000), 4000)
    assert (still.verdict, far.verdict) == ("stable", "moved")
    assert moved(bins("x", before), rng.normal(0.42, 1, 3000), 4000).verdict == "watch"
    gone = moved(bins("x", before), np.full(3000, np.nan), 4000)
    assert (gone.verdict, gone.now[-1]) == ("moved", 1.0)
    # twenty customers are spread anyhow: their index is large, and means nothing
    few = moved(bins("x", before), rng.normal(size=20), 4000)
    assert few.psi > 0.1
    assert few.verdict == "stable"


class FakeRun:
    """Keeps the trials that a tuning logs."""

    def __init__(self) -> None:
        self.trials: list[tuple[str, float]] = []

    def trial(self, name: str, parameters: Mapping[str, Any], metric: str, value: float) -> float:
        self.trials.append((name, value))
        return value


def test_a_tuning_starts_from_the_defaults_is_repeatable_and_keeps_them_where_they_are_best() -> None:
    defaults = Boosted.DEFAULTS

    def many_leaves(settings: Mapping[str, float]) -> float:
        return settings["num_leaves"]

    def few(settings: Mapping[str, float]) -> float:
        return -abs(settings["num_leaves"] - defaults["num_leaves"]) - abs(settings["trees"] - defaults["trees"])

    runs = [FakeRun(), FakeRun()]
    first, second = (
        tuned(cast(TrackedRun, run), "lightgbm", of_probabilities, defaults, "average_precision", many_leaves, 8, 3) for run in runs
    )
    assert first == second
    assert runs[0].trials == runs[1].trials
    assert runs[0].trials[0] == ("lightgbm trial 0", defaults["num_leaves"])
    assert set(first) == set(defaults)
    assert first["num_leaves"] > defaults["num_leaves"]
    assert tuned(cast(TrackedRun, FakeRun()), "lightgbm", of_probabilities, defaults, "average_precision", few, 5, 3) == {}


class TestTheTrainedSmallCut:
    """What the jobs left behind, on real data."""

    @pytest.fixture
    def registry(self, trained: Home, monkeypatch: pytest.MonkeyPatch) -> Registry:
        monkeypatch.setenv("UBIQUO_HOME", str(trained.root))
        return open_registry(Home.from_environment())

    @pytest.mark.parametrize("kind", ["churn", "recommendations", "next-best-offer"])
    def test_each_champion_can_be_traced_and_loads_with_the_same_answers_as_pyfunc(self, registry: Registry, kind: str) -> None:
        import mlflow

        loaded = registry.load(f"{kind}@champion")
        assert {"log_version", "commit", "feature_service", "as_of", "inputs", "promotion"} <= set(loaded.tags)
        pyfunc = mlflow.pyfunc.load_model(f"models:/{loaded.name}@champion")
        example = pyfunc.input_example
        answer = pyfunc.predict(example)
        assert len(answer) == 1
        if kind == "churn":
            assert float(answer[0]) == pytest.approx(float(loaded.model.predict_frame(example, {})[0]))

    def test_a_stranger_to_this_process_gets_the_same_answers_from_mlflow_alone(
        self, trained: Home, registry: Registry, tmp_path: Path
    ) -> None:
        loaded = registry.load("churn@champion")
        rows = artifact_frame(registry.run_of("churn", loaded.version), "reference.parquet")
        assert rows is not None
        rows.to_parquet(tmp_path / "rows.parquet")
        code = (
            "import mlflow, pandas as pd\n"
            "model = mlflow.pyfunc.load_model('models:/churn@champion')\n"
            "pd.Series(model.predict(pd.read_parquet('rows.parquet'))).to_frame('p').to_parquet('answers.parquet')\n"
        )
        environment = {**surroundings(), "MLFLOW_TRACKING_URI": open_registry(Home.from_environment()).settings.tracking_uri}
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        theirs = pd.read_parquet(tmp_path / "answers.parquet")["p"]
        assert len(theirs) > 500
        np.testing.assert_array_equal(theirs.to_numpy(), loaded.model.predict(matrix(rows.to_dict("records"), loaded.model.inputs)))

    def test_the_run_carries_what_a_data_scientist_looks_for(self, registry: Registry) -> None:
        import mlflow

        client = mlflow.MlflowClient()
        for kind in ("churn", "recommendations", "next-best-offer"):
            version = registry.version_of(kind, "champion")
            assert version is not None
            run = client.get_run(registry.run_of(kind, version))
            assert {"seed", "as_of", "horizon_days", "window_days"} <= set(run.data.params)
            [dataset] = run.inputs.dataset_inputs
            assert "complete-journey" in dataset.dataset.name
            assert "version=" in dataset.dataset.source
            trials = client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run.info.run_id}'")
            assert len(trials) >= 2
            assert all(trial.data.metrics and trial.data.params for trial in trials)
            artifacts = {a.path for a in client.list_artifacts(run.info.run_id)}
            assert {"report.html", "data_quality.html", "data_quality.json", "model_card.md", "evaluation.parquet", "plots"} <= artifacts
            card = client.get_model_version(registry.settings.models[kind].registered_name, str(version)).description
            for part in ("## Data and window", "## How good it is", "## By segment", "## Limits"):
                assert part in card

    def test_another_tracking_server_is_respected_and_gets_the_very_same_model(
        self, trained: Home, registry: Registry, tmp_path: Path, tracking_server: str
    ) -> None:
        home = tmp_path / "home"
        shutil.copytree(trained.root, home, ignore=shutil.ignore_patterns("mlartifacts", "mlflow.db", "inbox*", "*.log"))
        done = command("training", "churn", home=home, MLFLOW_TRACKING_URI=tracking_server)
        assert done.returncode == 0, done.stdout + done.stderr
        assert not (home / "mlflow.db").exists()
        first = Path(downloaded(open_registry(Home.from_environment()).settings.tracking_uri, tmp_path / "first"))
        second = Path(downloaded(tracking_server, tmp_path / "second"))
        names = sorted(p.relative_to(first) for p in first.rglob("*") if p.is_file())
        assert names
        for name in names:
            assert (first / name).read_bytes() == (second / name).read_bytes(), name

    def test_every_report_shows_its_baseline_an_interval_and_how_often_the_cuts_were_seen(self, trained: Home, registry: Registry) -> None:
        for kind, baseline in (("churn", "recency"), ("recommendations", "popularity"), ("next-best-offer", "past redemptions")):
            text = (trained.root / "reports" / f"{kind}.md").read_text()
            assert f"| {baseline} |" in text
            assert "(served)" in text
            assert "paired:" in text
            assert "looked at 1 times" in text

    def test_every_run_is_kept_as_data(self, trained: Home, registry: Registry) -> None:
        found = read_reports(trained.root)
        assert not found.unreadable
        assert set(found.models) == {"churn", "recommendations", "next-best-offer", "days-to-next-order"}
        for name, report in found.models.items():
            rule = registry.settings.models[name].promotion
            value = report.quality[report.served][rule.metric]
            assert value.low is not None
            assert value.low <= value.value <= (value.high or 0)
            assert report.baseline in report.quality
            assert report.run_id == registry.run_of(name, report.version)
            assert len(report.cuts) >= 2
            [line] = [line for line in found.history[name] if line.version == report.version]
            assert (line.value, line.promoted, line.verdict) == (value, report.promoted, report.verdict)
            answers = report.base_rate is not None
            assert sum(point.rows for point in report.calibration) == (sum(cut.rows for cut in report.cuts) if answers else 0)
            assert all(sum(each.shares) == pytest.approx(1) for each in report.inputs)

    def test_a_report_is_kept_once_and_a_damaged_one_hides_no_other(self, trained: Home, tmp_path: Path) -> None:
        home = Home(tmp_path)
        assert read_reports(tmp_path).models == {}
        reports = read_reports(trained.root).models
        for name in ("churn", "next-best-offer", "churn"):
            keep_report(home, reports[name])
        assert len(read_history(tmp_path, "churn")) == 1
        assert read_reports(tmp_path).models["churn"] == reports["churn"]
        damaged = version_path(tmp_path, "churn", reports["churn"].version)
        damaged.write_text('{"model": "churn"}')
        history_path(tmp_path, "churn").write_text("{")
        found = read_reports(tmp_path)
        assert set(found.models) == {"next-best-offer"}
        assert set(found.unreadable) == {str(damaged), str(history_path(tmp_path, "churn"))}
        assert "python -m training" in found.unreadable[str(damaged)]

    def test_the_report_command_prints_every_number_at_80_columns(self, trained: Home) -> None:
        narrow = command("training", "report", "--format", "rich", home=trained.root, COLUMNS="80")
        assert narrow.returncode == 0, narrow.stdout + narrow.stderr
        assert max(map(len, narrow.stdout.splitlines())) <= 80
        documents = [report.document for report in read_reports(trained.root).models.values()]
        wanted = {number for each in documents for number in NUMBER.findall(markdown(each))}
        assert wanted <= set(NUMBER.findall(narrow.stdout))

    def test_drift_is_measured_on_the_customers_asked_about_and_kept(self, trained: Home, registry: Registry) -> None:
        for model in ("churn", "next-best-offer", "recommendations"):
            found = drift(trained, registry, model)
            assert found.inputs
            assert found.rows > 300
            assert all(sum(each.now) == pytest.approx(1) for each in found.inputs)
            assert [each.psi for each in found.inputs] == sorted((each.psi for each in found.inputs), reverse=True)
        # offers were learnt as of this very moment: nothing can have moved
        assert {each.psi for each in drift(trained, registry, "next-best-offer").inputs} == {0.0}
        done = command("training", "drift", "churn", home=trained.root)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "| input | PSI | by chance alone below | verdict |" in done.stdout
        assert read_reports(trained.root).drifts["churn"].version == registry.version_of("churn", "champion")

    def test_training_again_on_the_same_inputs_re_uses_what_stands(self, trained: Home, registry: Registry) -> None:
        before = registry.version_of("churn", "challenger")
        assert command("training", "churn", home=trained.root).returncode == 0
        assert registry.version_of("churn", "challenger") == before

    def test_no_file_of_a_model_is_pickled(self, trained: Home) -> None:
        names = [p.name for p in (trained.root / "mlartifacts").rglob("*") if p.is_file()]
        assert names
        assert not [n for n in names if n.endswith((".pkl", ".pickle", ".joblib"))]

    def test_a_time_before_the_data_is_utc_aware(self, registry: Registry) -> None:
        as_of = registry.load("churn@champion").tags["as_of"]
        assert datetime.fromisoformat(as_of).astimezone(UTC) == NEW_YEAR
