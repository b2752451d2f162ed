"""Who may serve: the rule with its guards, comparisons on the same rows, rollback, and the data that stops a training."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import cast
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import yaml
from scene import NEW_YEAR, ROOT, TinyShop, command, copy_home, event

from features.state.home import Home
from features.store.timeline import open_timeline
from models.eligibility import Eligibility
from models.inputs import Input
from models.registry import Crowning, GateLimits, Promotion, load_settings
from models.reports import read_history
from training import days_to_next_order, promotion
from training.bootstrap import open_registry
from training.evaluation import by_segment, leads, same_rows
from training.gate import DataQualityError, Gate, ks, psi, reference_rows
from training.metrics import Estimate
from training.page import page
from training.rendering import markdown
from training.run import TrackedRun

RULE = Promotion("average_precision", "recency", "paired_bootstrap", 0.95, 300, {"auc": 0.01, "brier": 0.003})


def evaluation(signal: float, seed: int = 0, noise_seed: int = 1, rows: int = 1500) -> pd.DataFrame:
    """Probabilities that tell more of the labels the larger *signal* is; the customers and labels depend on *seed* alone."""
    rng, own = np.random.default_rng(seed), np.random.default_rng(noise_seed)
    labels = rng.random(rows) < 0.2
    shared = rng.normal(size=rows)
    score = 1 / (1 + np.exp(-(signal * (labels - 0.2) + 0.6 * shared + own.normal(0, 0.2, rows) - 1.6)))
    frame = {"customer_id": [f"c{k}" for k in range(rows)], "unit": "u", "group": "g", "label": labels, "score": score}
    return pd.DataFrame(frame).assign(segment=np.where(np.arange(rows) % 3 == 0, "new", "old"))


class TestTheRule:
    @pytest.mark.parametrize(
        ("lead", "passed"),
        [(Estimate(0.1, 0.02, 0.2), True), (Estimate(0.1, -0.02, 0.2), False), (Estimate(float("nan"), float("nan"), float("nan")), False)],
    )
    def test_the_first_champion_must_beat_its_baseline_beyond_noise(self, lead: Estimate, passed: bool) -> None:
        assert promotion.first(RULE, lead).passed is passed

    def test_no_model_serves_that_another_row_of_its_own_table_beats(self) -> None:
        leads_over = {"logistic": Estimate(-0.003, -0.005, -0.001), "recency": Estimate(0.1, 0.05, 0.2), "tie": Estimate(-0.1, -0.3, 0.1)}
        beaten = promotion.beaten_by(leads_over)
        assert beaten is not None
        assert beaten.startswith("logistic of its own table is better")
        assert promotion.beaten_by({name: lead for name, lead in leads_over.items() if name != "logistic"}) is None
        first = promotion.first(RULE, Estimate(0.1, 0.02, 0.2), beaten)
        assert not first.passed
        assert "logistic of its own table" in first.reason
        later = promotion.rival(RULE, 3, evaluation(2.0), evaluation(1.0), beaten)
        assert not later.passed
        assert "logistic of its own table" in later.reason

    def test_a_clearly_better_challenger_passes_and_says_by_how_much(self) -> None:
        verdict = promotion.rival(RULE, 3, evaluation(2.0), evaluation(1.0))
        assert verdict.passed
        assert "lead over champion 3" in verdict.reason
        assert verdict.leads["average_precision"].lead.low > 0

    def test_a_worse_one_does_not_pass(self) -> None:
        assert not promotion.rival(RULE, 3, evaluation(0.8), evaluation(1.0)).passed

    def test_an_equal_one_passes_about_as_rarely_as_the_level_says(self) -> None:
        passed = [promotion.rival(RULE, 3, evaluation(1.0, k, 2 * k + 1), evaluation(1.0, k, 2 * k + 2)).passed for k in range(60)]
        # half of 5%: more than 6 of 60 has a chance below 1 in 1000
        assert sum(passed) <= 6

    def test_a_better_ranking_with_worse_probabilities_is_stopped_by_the_guard(self) -> None:
        boast = evaluation(2.0)
        boast["score"] = boast["score"] ** 0.3
        verdict = promotion.rival(RULE, 3, boast, evaluation(1.0))
        assert verdict.leads["average_precision"].lead.low > 0
        assert not verdict.passed
        assert "guard brier" in verdict.reason

    def test_other_customers_labels_or_cuts_are_not_compared(self) -> None:
        ours = evaluation(2.0)
        for theirs in (ours.iloc[:-1], ours.assign(label=~ours["label"]), ours.assign(unit="later")):
            assert same_rows(ours, theirs) is None
            assert not promotion.rival(RULE, 3, ours, theirs).passed
        assert not promotion.rival(RULE, 3, ours, None).passed

    def test_where_both_judged_some_cuts_alike_only_these_count(self) -> None:
        ours = pd.concat([evaluation(2.0), evaluation(2.0).assign(unit="later")])
        both = same_rows(ours, evaluation(1.0))
        assert both is not None
        assert set(both["unit"]) == {"u"}

    def test_a_lead_in_brier_is_a_fall_of_it(self) -> None:
        both = same_rows(evaluation(2.0), evaluation(1.0))
        assert both is not None
        found = leads(both, ["brier"], 200, 0.95)["brier"]
        assert found.ours < found.theirs
        assert found.lead.value == pytest.approx(found.theirs - found.ours)

    def test_lists_are_compared_by_listing_and_measure(self) -> None:
        rng = np.random.default_rng(0)
        rows = [(f"c{k}", "u", listing) for k in range(300) for listing in ("for_you", "also_like")]
        theirs = pd.DataFrame(rows, columns=["customer_id", "unit", "listing"]).assign(segment="all", recall_at_10=0.5, mrr=0.5)
        theirs["ndcg_at_10"] = rng.random(len(theirs))
        ours = theirs.assign(ndcg_at_10=theirs["ndcg_at_10"] + np.where(theirs["listing"] == "for_you", 0.1, -0.1))
        both = same_rows(ours, theirs)
        assert both is not None
        found = leads(both, ["ndcg_at_10_for_you", "ndcg_at_10_also_like"], 200, 0.95)
        assert found["ndcg_at_10_for_you"].lead.value == pytest.approx(0.1)
        assert found["ndcg_at_10_also_like"].lead.value == pytest.approx(-0.1)
        rule = Promotion("ndcg_at_10_for_you", "popularity", "paired_bootstrap", 0.95, 200, {"ndcg_at_10_also_like": 0.003})
        assert "guard ndcg_at_10_also_like" in promotion.rival(rule, 1, ours, theirs).reason


class Book:
    """A registry in memory: who was crowned when."""

    def __init__(self) -> None:
        self.notes: list[Crowning] = []

    def promote(self, kind: str, version: int, at: datetime, how: str, reason: str) -> None:
        self.notes.append(Crowning(at, version, how, reason))  # type: ignore[arg-type]

    def crownings(self, kind: str) -> list[Crowning]:
        return self.notes


class TestChampionsComeAndGo:
    def test_without_a_passed_rule_only_a_reason_promotes_and_it_is_kept(self) -> None:
        book, refused = Book(), promotion.Verdict(False, "0.1 [-0.1, 0.2]")
        with pytest.raises(promotion.NotPromotedError, match=r"0\.1 \[-0\.1, 0\.2\].*--force --reason"):
            promotion.promote(book, "churn", 2, refused, None)  # type: ignore[arg-type]
        assert book.notes == []
        promotion.promote(book, "churn", 2, refused, "the old one is broken")  # type: ignore[arg-type]
        [note] = book.notes
        assert (note.how, note.version) == ("forced", 2)
        assert "the old one is broken" in note.reason
        assert "0.1 [-0.1, 0.2]" in note.reason

    def test_rolling_back_twice_goes_two_back_and_not_to_and_fro(self) -> None:
        book, passed, t = Book(), promotion.Verdict(True, "better"), iter(range(100))

        def clock() -> datetime:
            return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(days=next(t))

        for version in (1, 2, 3):
            promotion.promote(book, "churn", version, passed, None, clock)  # type: ignore[arg-type]
        promotion.rollback(book, "churn", "complaints", clock)  # type: ignore[arg-type]
        promotion.rollback(book, "churn", "more complaints", clock)  # type: ignore[arg-type]
        assert [n.version for n in book.notes] == [1, 2, 3, 2, 1]
        with pytest.raises(promotion.NotPromotedError, match="nothing to roll back to"):
            promotion.rollback(book, "churn", "despair", clock)  # type: ignore[arg-type]
        promotion.promote(book, "churn", 3, passed, None, clock)  # type: ignore[arg-type]
        assert promotion.standing(book.notes) == [1, 3]


class TestTheGate:
    def gate(self, **limits: float) -> Gate:
        return Gate("churn", GateLimits(**limits))  # type: ignore[arg-type]

    def shopping(self, tiny: TinyShop, days: range, a_day: int = 3) -> None:
        tiny.add(
            *(
                event(f"{d}-{k}", "purchase", NEW_YEAR - timedelta(days=d, hours=1), card=f"{k}", items=[("i0", 1, 9)])
                for d in days
                for k in range(a_day)
            )
        )

    def looked(self, tiny: TinyShop, **limits: float) -> Gate:
        gate = self.gate(**limits)
        gate.look_at_log(open_timeline(tiny.home, NEW_YEAR), NEW_YEAR)
        return gate

    def test_good_data_passes(self, tiny: TinyShop) -> None:
        self.shopping(tiny, range(200))
        gate = self.looked(tiny)
        gate.stop_if_severe()
        assert {c.severity for c in gate.checks} == {"ok"}

    def test_stale_data_stops_the_run_and_says_until_when_there_is_some(self, tiny: TinyShop) -> None:
        self.shopping(tiny, range(20, 200))
        with pytest.raises(DataQualityError, match=r"(?s)age of the last purchase: 20\.0 days.*--as-of 2017-12-12"):
            self.looked(tiny).stop_if_severe()

    def test_a_fall_in_volume_stops_the_run(self, tiny: TinyShop) -> None:
        self.shopping(tiny, range(28, 200))
        self.shopping(tiny, range(0, 28, 7))
        with pytest.raises(DataQualityError, match=r"purchases of the last 28 days: 12 \(14% of the usual 84\)"):
            self.looked(tiny).stop_if_severe()

    def test_items_that_no_catalogue_knows_stop_the_run(self, tiny: TinyShop) -> None:
        self.shopping(tiny, range(200))
        tiny.add(
            *(
                event(f"u{d}", "purchase", NEW_YEAR - timedelta(days=d, hours=2), items=[(f"unheard-{k}", 1, 1) for k in range(2)])
                for d in range(200)
            )
        )
        with pytest.raises(DataQualityError, match="features catalogue items FILE"):
            self.looked(tiny).stop_if_severe()

    def test_impossible_values_and_repeated_keys_stop_the_run(self) -> None:
        frame = pd.DataFrame(
            {"customer_id": ["a", "a"], "recency_days": [1.0, -1.0], "weekend_share_91": [0.5, 1.5], "visit_trend": [-3.0, np.inf]}
        )
        gate = self.gate()
        gate.look_at_rows(
            frame, ["customer_id"], [Input("recency_days"), Input("weekend_share_91", high=1.0), Input("visit_trend", low=None)]
        )
        with pytest.raises(DataQualityError) as error:
            gate.stop_if_severe()
        for told in ("same key: 1", "recency_days: 1 rows", "weekend_share_91: 1 rows", "visit_trend: 1 rows"):
            assert told in str(error.value)

    def test_the_checks_leave_pyarrows_sense_of_time_alone(self) -> None:
        self.gate().look_at_rows(pd.DataFrame({"customer_id": ["a"], "recency_days": [1.0]}), ["customer_id"], [Input("recency_days")])
        noon = datetime(2024, 3, 1, 12, tzinfo=ZoneInfo("Europe/Paris"))
        assert pa.array([noon], pa.timestamp("us", tz="Europe/Paris"))[0].as_py() == noon

    @pytest.mark.parametrize("rate", [0.0, 0.001, 0.999])
    def test_a_label_that_hardly_varies_stops_the_run(self, rate: float) -> None:
        gate = self.gate()
        gate.look_at_labels(np.arange(1000) < rate * 1000, None)
        with pytest.raises(DataQualityError, match="choose another --horizon"):
            gate.stop_if_severe()

    def test_drift_alerts_and_does_not_stop(self) -> None:
        rng = np.random.default_rng(0)
        reference = pd.DataFrame({"same": rng.normal(size=3000), "moved": rng.normal(size=3000)})
        gate = self.gate()
        gate.look_at_drift(pd.DataFrame({"same": rng.normal(size=2000), "moved": rng.normal(1, 1, 2000)}), reference)
        gate.stop_if_severe()
        assert {c.name: c.severity for c in gate.checks} == {"drift of same": "ok", "drift of moved": "warning"}
        assert "drift of moved" in markdown(gate.document())

    def test_psi_and_ks_of_known_shifts(self) -> None:
        same = np.arange(1000.0)
        assert psi(same, same) == pytest.approx(0, abs=1e-12)
        assert ks(same, same + 500) == pytest.approx(0.5)
        # half of the customers' values lost: the lost band goes from 1e-4 to 0.5, the others from 0.1 to 0.05 each
        half = np.where(np.arange(1000) % 2 == 0, same, np.nan)
        assert psi(same, half) == pytest.approx((0.5 - 1e-4) * np.log(0.5 / 1e-4) + 10 * (0.05 - 0.1) * np.log(0.5), rel=1e-6)
        assert len(reference_rows(pd.DataFrame({"a": range(20_000)}))) == 5_000


def test_a_page_escapes_what_it_shows() -> None:
    text = page("<script>", [pd.DataFrame({"a": ["<b>x</b>"]}), "1 < 2"])
    assert "<script>" not in text.split("<style>")[0].replace("<title>", "")
    assert "<b>x</b>" not in text
    assert "1 &lt; 2" in text


def test_segments_too_small_to_tell_are_left_out() -> None:
    frame = evaluation(1.0, rows=300)
    frame.loc[:9, "segment"] = "tiny"
    assert set(by_segment(frame, "auc", 50)) == {"new", "old"}


class TestTheLoopOfADataScientist:
    """Retrain, compare, be refused, force it, regret it: by the commands, on the small cut of the real data."""

    def test_from_challenger_to_rollback(self, trained: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        home = copy_home(trained, tmp_path / "home").root

        def run(*arguments: str, code: int = 0) -> str:
            done = command("training", *arguments, home=home)
            assert done.returncode == code, done.stdout + done.stderr
            assert "Traceback" not in done.stdout + done.stderr
            return done.stdout

        assert "champion and challenger at once" in run("compare", "churn", code=1)
        told = run("churn", "--seed", "7", "--trials", "2")
        assert "champion 1 stays: average_precision: lead over champion 1" in told
        assert "Trees of lightgbm, chosen by 2 trials on an earlier cut: " in told
        assert [(each.version, each.promoted) for each in read_history(home, "churn")] == [(1, True), (2, False)]
        told = run("compare", "churn")
        assert "The rule does not promote version 2" in told
        [written] = (home / "reports").glob("comparison-churn-2-1.html")
        assert "data:image/png" in written.read_text()
        assert "is not promoted: average_precision: lead over champion 1" in run("promote", "churn", code=1)
        assert "go together" in run("promote", "churn", "--force", code=1)
        assert "forced: a rehearsal" in run("promote", "churn", "--force", "--reason", "a rehearsal")
        assert "Version 1 is the champion again, in place of 2: it is over" in run("rollback", "churn", "--reason", "it is over")
        told = " ".join(run("history", "churn").split())
        assert "forced: a" in told
        assert "rollback: it is" in told
        monkeypatch.setenv("UBIQUO_HOME", str(home))
        registry = open_registry(Home.from_environment())
        assert registry.version_of("churn", "champion") == 1
        assert [c.how for c in registry.crownings("churn")] == ["rule", "forced", "rollback"]


class TestTheFileOfModels:
    """mlflow.yaml: what cannot be meant is told by model and field before anything is trained or served."""

    @pytest.mark.parametrize(
        ("name", "changes", "said"),
        [
            ("churn-56", {}, r"models\.churn-56\.registered_name: 'churn' is that of churn"),
            ("churn-56", {"registered_name": "churn-56"}, r"models\.churn-56\.experiment: 'ubiquo/churn' is that of churn"),
            ("churn-56", {"kind": "horoscope"}, r"models\.churn-56\.kind: there is no kind of model 'horoscope': use one of churn"),
            ("churn-56", {"horizon_days": 56.5}, r"models\.churn-56\.horizon_days: 56\.5 is no whole number"),
            ("churn-56", {"horizon_days": "56"}, r"models\.churn-56\.horizon_days: '56' is no whole number"),
            ("churn-56", {"horizon_days": 4000}, r"between 1 and 365"),
            ("churn-56", {"experiment": "mine"}, r"models\.churn-56\.experiment: 'mine' must begin with ubiquo/"),
            ("report", {}, r"models\.report: 'python -m training report' is something else"),
            ("Churn", {}, r"models\.Churn: a model's name stands in its address"),
        ],
    )
    def test_a_mistake_is_told(self, tmp_path: Path, name: str, changes: dict[str, object], said: str) -> None:
        with pytest.raises(ValueError, match=said):
            load_settings(tmp_path, self.written(tmp_path, name, {"kind": "churn", **changes}))

    def test_one_service_is_of_the_same_views(self, tmp_path: Path) -> None:
        lists = yaml.safe_load((ROOT / "mlflow.yaml").read_text())["models"]["recommendations"]
        more = {**lists, "registered_name": "more", "experiment": "ubiquo/more", "kind": "recommendations", "feature_service": "churn_v1"}
        with pytest.raises(ValueError, match=r"models\.more\.feature_service: 'churn_v1' reads customer_activity for churn"):
            load_settings(tmp_path, self.written(tmp_path, "more", more))

    def test_two_horizons_of_one_kind_are_two_entries(self, tmp_path: Path) -> None:
        own = {"kind": "churn", "registered_name": "churn-56", "experiment": "ubiquo/churn-56", "horizon_days": 56}
        found = load_settings(tmp_path, self.written(tmp_path, "churn-56", own)).models
        assert found["churn-56"].kind is found["churn"].kind
        assert (found["churn"].horizon_days, found["churn-56"].horizon_days) == (None, 56)

    def test_a_file_that_cannot_be_read_is_told_without_a_traceback(self, tmp_path: Path) -> None:
        for content in (None, "models: [", "nothing: here"):
            path = tmp_path / "mlflow.yaml"
            if content is not None:
                path.write_text(content)
            done = command("training", "history", "churn", home=tmp_path, UBIQUO_MLFLOW=str(path))
            assert done.returncode == 1
            assert "mlflow.yaml" in done.stdout
            assert "Traceback" not in done.stdout + done.stderr

    @staticmethod
    def written(tmp_path: Path, name: str, changes: dict[str, object]) -> Path:
        settings = yaml.safe_load((ROOT / "mlflow.yaml").read_text())
        settings["models"][name] = {**settings["models"]["churn"], **changes}
        path = tmp_path / "mlflow.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path


@pytest.mark.parametrize(("usual", "constant", "better"), [(9.0, 4.0, "constant"), (4.0, 9.0, "usual interval")])
def test_days_to_the_next_order_are_held_against_whichever_simple_rule_errs_less(usual: float, constant: float, better: str) -> None:
    cuts = SimpleNamespace(horizon_days=28, tests=[NEW_YEAR], day=lambda moment: f"{moment:%Y-%m-%d}")
    rule = Promotion("mae_days", "the better simple rule", "paired_bootstrap", 0.95, 300, {})
    run = SimpleNamespace(cuts=cuts, model="days-to-next-order", settings=SimpleNamespace(promotion=rule))
    days = np.arange(40, dtype=float) % 20
    told = {"usual interval": days + usual, "constant": days + constant, "logistic": days + 5}
    scored = pd.DataFrame({"customer_id": [f"c{k}" for k in range(40)], "unit": "u", "days": days, **told})
    report, _ = days_to_next_order.judge(scored, cast(TrackedRun, run), Eligibility(2, 91), 1)
    assert report.baseline == better
    assert report.lead.value == pytest.approx(-1.0), "four days off beat five"
    assert not promotion.first(rule, report.lead).passed
