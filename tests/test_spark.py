"""Spark in the place of DuckDB: the same features, training rows, scores and files, whichever works them out."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
from both_engines import TOLERANCE, apart, compared, rows_of
from pandas.testing import assert_frame_equal
from scene import NEW_YEAR, ROOT, TinyShop, copy_home, event, told
from typer.testing import CliRunner

from features import __main__ as features_commands
from features.definitions.view import views_of
from features.people.identity import Identities
from features.state.home import Home
from features.state.ports import MissingStateError
from features.state.settings import Settings
from features.store import snapshots, spark_compute, spark_session
from features.store.compute import with_engine
from features.store.duckdb_compute import DuckDBCompute
from features.store.feature_store import FeatureStore
from features.store.spark_compute import PART_ROWS, SparkCompute, brought_back
from models.decision import Query
from models.recommender.config import RecommenderConfig
from models.recommender.factors import FactorSettings, learn_factors, spoken_by
from models.recommender.owned import Histories
from models.recommender.recommender import Recommender
from models.recommender.shelf import STATISTICS
from models.recommender.stock import Stock
from models.registry import load_settings
from serving.bootstrap import open_engine
from serving.decide import spread
from serving.decide.batch import is_independent, score
from serving.decide.population import Population
from training.dataset import Truth
from training.spark_factors import PURCHASES, learn_spread, purchases_of

EARLIER = NEW_YEAR - timedelta(days=40)
CUSTOMERS = 24
CAMPAIGNS = pd.DataFrame(
    {
        "campaign_id": ["c0", "c1", "c2"], "campaign_type": ["A", "B", "A"],
        "valid_from": pd.to_datetime([NEW_YEAR - timedelta(days=days) for days in (90, 60, 60)]),
        "valid_until": pd.to_datetime([NEW_YEAR - timedelta(days=days) for days in (45, 15, 0)]),
    }
)  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One session for all: its start takes longer than most of what it is asked."""
    try:
        spark_session.check_spark()
    except MissingStateError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    home = Home(tmp_path_factory.mktemp("spark"), Settings(spark_master="local[2]"))
    os.environ["JDK_JAVA_OPTIONS"] = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
    session = spark_session.open_session(home)
    # for so little data it costs more to divide, plan anew and compile than to do the work
    for name, value in (
        ("spark.sql.shuffle.partitions", "2"), ("spark.sql.adaptive.enabled", "false"), ("spark.sql.codegen.wholeStage", "false"),
        ("spark.sql.codegen.factoryMode", "NO_CODEGEN"),
    ):  # fmt: skip
        session.conf.set(name, value)
    yield
    session.stop()


@pytest.fixture
def busy(tiny: TinyShop) -> TinyShop:
    """A few dozen customers who do all that a shop's customers do."""
    rng = random.Random(7)
    raw: list[dict[str, Any]] = []
    for number in range(CUSTOMERS):
        raw += visits(rng, f"{number}")
    raw += [event(f"nobody-{k}", "purchase", NEW_YEAR - timedelta(days=k), None, [("i1", 1, 100)], channel="store") for k in range(1, 9)]
    tiny.add(*raw)
    # one who proves to be another, one who withdraws, and one who does so for a while
    tiny.add(joined("same", NEW_YEAR - timedelta(days=20), loyalty_card="1", user_id="shared"))
    tiny.add(joined("again", NEW_YEAR - timedelta(days=10), loyalty_card="2", user_id="shared"))
    tiny.add(event("no", "consent_update", NEW_YEAR - timedelta(days=5), "3", consent={"purposes": {"personalization": False}}))
    for days, said in ((60, False), (30, True)):
        at = NEW_YEAR - timedelta(days=days)
        tiny.add(event(f"says-{days}", "consent_update", at, "4", consent={"purposes": {"personalization": said, "analytics": said}}))
    return tiny


def visits(rng: random.Random, card: str) -> list[dict[str, Any]]:
    """What one customer did within half a year."""
    raw = []
    for k in range(rng.randint(1, 14)):
        at = NEW_YEAR - timedelta(days=rng.uniform(0.01, 180), seconds=rng.randrange(60))
        name, channel = f"{card}-{k}", rng.choice(["store", "web", "app"])
        lines = [
            (f"i{rng.randrange(12)}", rng.randint(0, 3), rng.randint(1, 3000), rng.choice([0, 0, 25])) for _ in range(rng.randint(1, 5))
        ]
        raw.append(event(f"{name}b", "purchase", at, card, lines, channel=channel, store_id=rng.choice(["s1", "s2", None])))
        raw.append(event(f"{name}v", "view_item", at - timedelta(minutes=9), card, [lines[0][0]], channel="web", session_id=f"s{k}"))
        raw.append(event(f"{name}a", "add_to_cart", at - timedelta(minutes=8), card, [lines[0]], channel="web", session_id=f"s{k}"))
        raw.append(event(f"{name}s", "search", at - timedelta(minutes=7), card, channel="web", query="bread", session_id=f"s{k}"))
        if rng.random() < 0.4:
            raw.append(event(f"{name}r", "refund", at + timedelta(minutes=5), card, [lines[0]], channel="store"))
        if rng.random() < 0.6:
            campaign = rng.randrange(3)
            raw.append(event(f"{name}m", "message_sent", at - timedelta(days=3), card, campaign_id=f"c{campaign}", channel="mail"))
            told_of = {"campaign_id": f"c{campaign}", "offer_id": f"c{campaign}-{rng.randrange(3)}"}
            raw.append(event(f"{name}o", "offer_redeem", at, card, **told_of))
    return raw


def joined(event_id: str, at: Any, **identifiers: str) -> dict[str, Any]:
    return {"event_id": event_id, "name": "login", "occurred_at": at.isoformat(), "identifiers": identifiers}


@pytest.mark.parametrize(("domain", "only"), [("grocery", ()), ("retail", ("customer_activity",))])
def test_every_definition_and_every_fold_gives_the_same_rows(busy: TinyShop, domain: str, only: tuple[str, ...]) -> None:
    # folds and what is told of items are the same in every domain
    msgspec.structs.replace(busy.shop, domain=domain).save(busy.home)
    found = compared(busy.home, [EARLIER, NEW_YEAR], only=only)
    assert [each for each in found if not each.agrees] == []
    assert len(found) == 2 * (len(only) or 2 + 6), "two views of definitions and six folds, at two moments"
    assert all(each.rows > 0 for each in found)
    assert [each.empty for each in found if each.at == NEW_YEAR and each.empty] == [], "a column of nothing compares nothing"


def test_a_snapshot_stands_whichever_made_it(busy: TinyShop) -> None:
    by_spark, by_duckdb = (FeatureStore(with_engine(busy.home, engine)) for engine in ("spark", "duckdb"))
    for view, moments in (("customer_activity", [NEW_YEAR]), ("customer_state", [EARLIER, NEW_YEAR])):
        assert by_spark.backfill(view, dict.fromkeys(moments)) == len(moments)
        path = by_spark.snapshot(view, NEW_YEAR)
        written = pq.read_table(path)
        assert written.equals(written.sort_by(written.column_names[0])), "in the order of the keys"
        assert by_duckdb.backfill(view, dict.fromkeys(moments)) == 0
    assert not list(busy.home.snapshots.rglob("*.part"))


def test_only_those_asked_for_are_in_a_snapshot(busy: TinyShop) -> None:
    store = FeatureStore(with_engine(busy.home, "spark"))
    some = sorted(set(Identities(busy.home).owners().values()) - {None})[:3]
    for view in store.customer_views():
        store.backfill(view, {NEW_YEAR: some})
        assert pq.read_table(store.snapshot(view, NEW_YEAR))["customer_id"].to_pylist() == some


def test_a_log_of_nobody_makes_empty_snapshots(tiny: TinyShop) -> None:
    tiny.add(event("nobody", "login", NEW_YEAR - timedelta(days=1), None))
    for view in ("customer_activity", "customer_state"):
        assert [len(table) for table in rows_of(tiny.home, "spark", views_of("grocery")[view], [NEW_YEAR]).values()] == [0]


def test_the_command_brings_the_same_rows_online(busy: TinyShop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UBIQUO_HOME", str(busy.home.root))
    customers = sorted({owner for owner in Identities(busy.home).owners().values() if owner is not None})
    online = {}
    for engine in ("duckdb", "spark"):
        done = CliRunner().invoke(features_commands.app, ["materialize", "--engine", engine])
        assert done.exit_code == 0, done.output
        store = FeatureStore(busy.home)
        online[engine] = [told(store, customer) for customer in customers]
        for view in store.customer_views():
            store.snapshot(view, NEW_YEAR).unlink()
    assert len(online["spark"]) > CUSTOMERS / 2
    for one, other in zip(online["duckdb"], online["spark"], strict=True):
        assert {name: value for name, value in one.items() if apart(value, other[name]) > TOLERANCE} == {}


def test_an_engine_that_is_none_is_told(tiny: TinyShop, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="--engine 'hadoop': use one of duckdb, spark"):
        with_engine(tiny.home, "hadoop")
    monkeypatch.setattr(spark_session, "java", lambda: None)
    with pytest.raises(MissingStateError, match="openjdk-17-jre-headless"):
        with_engine(tiny.home, "spark")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingStateError, match=r"ubiquo\[spark\]"):
        with_engine(tiny.home, "spark")


def test_what_the_driver_holds_at_once_does_not_grow_with_the_rows(spark: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compute, rows = SparkCompute(Home(tmp_path, Settings())), 5 * PART_ROWS
    # what would join small parts
    compute.session.conf.set("spark.sql.adaptive.enabled", "true")
    try:
        given = compute.given("raw", pa.table({"key": [f"{n:06}" for n in reversed(range(rows))]}))
        table = compute.kept("rows", lambda given=given: given)

        def count(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            yield pa.record_batch({"rows": [sum(len(batch) for batch in batches)]})

        stepped = [batch["rows"][0].as_py() for batch in compute.stepped(lambda table=table: table, "key", ["key"], count)]
        assert sum(stepped) == rows
        assert max(stepped) < 2 * PART_ROWS
        in_order = [key for batch in compute.stepped(lambda table=table: table, "key", ["key"], iter) for key in batch["key"].to_pylist()]
        assert in_order == [f"{n:06}" for n in range(rows)]
        parts: list[int] = []
        monkeypatch.setattr(
            spark_compute,
            "brought_back",
            lambda frame, step, real=brought_back: parts.append(frame.rdd.getNumPartitions()) or real(frame, step),
        )
        keys = [
            key for part in compute.ordered(lambda as_of, table=table: table, NEW_YEAR, "key", "rows") for key in part["key"].to_pylist()
        ]
        assert keys == [f"{n:06}" for n in range(rows)]
        assert parts == [5]
    finally:
        compute.session.conf.set("spark.sql.adaptive.enabled", "false")
        compute.close()


def test_labels_are_the_same(busy: TinyShop) -> None:
    truths = [Truth(with_engine(busy.home, engine), NEW_YEAR) for engine in ("duckdb", "spark")]
    one, other = truths
    assert one.start == other.start
    assert_frame_equal(one.visits, other.visits)
    for make in (
        lambda truth: truth.churn_spine([EARLIER], 28),
        lambda truth: truth.next_order_spine([EARLIER], 28),
        lambda truth: truth.lines(EARLIER, NEW_YEAR),
        lambda truth: truth.redemptions(),
        lambda truth: truth.campaign_spine(CAMPAIGNS),
    ):
        assert len(make(one)) > 0
        assert_frame_equal(make(one), make(other))
    assert one.sent_campaigns() == other.sent_campaigns() != set()
    assert one.bought(EARLIER, NEW_YEAR) == other.bought(EARLIER, NEW_YEAR) != {}
    for truth in truths:
        truth.timeline.close()


@pytest.fixture(scope="module")
def scored(trained: Home, tmp_path_factory: pytest.TempPathFactory) -> Home:
    return copy_home(trained, tmp_path_factory.mktemp("scored") / "home")


@pytest.mark.parametrize(("model", "suffix"), [("churn", ".csv"), ("recommendations", ".jsonl"), ("next-best-offer", ".parquet")])
def test_a_batch_file_is_the_same_to_the_byte(scored: Home, model: str, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # that snapshots are the same is seen above
    monkeypatch.setattr(snapshots, "compute_of", DuckDBCompute)
    by_duckdb, by_spark = (scored.root / f"{model}-{engine}{suffix}" for engine in ("duckdb", "spark"))
    there = score(with_engine(scored, "duckdb"), open_engine, model, NEW_YEAR, by_duckdb, 3)
    asked = []
    monkeypatch.setattr(spread, "_rows", lambda *given, rows=spread._rows: asked.append(given) or rows(*given))
    monkeypatch.setattr(spread, "PART_CUSTOMERS", 600)
    here = score(with_engine(scored, "spark"), open_engine, model, NEW_YEAR, by_spark, 3)
    assert asked, "Spark was asked"
    assert (here.rows, here.customers) == (there.rows, there.customers)
    assert here.customers > 1000
    assert (there.logged, here.logged, here.known) == (here.customers, 0, here.customers), (
        "each decision stood there, with the same choices"
    )
    if suffix == ".parquet":
        assert pq.read_table(by_spark).equals(pq.read_table(by_duckdb))
    else:
        assert by_spark.read_bytes() == by_duckdb.read_bytes()


def test_what_promises_something_is_asked_in_order_by_one(scored: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    crowd = Population.open(scored, open_engine, "next-best-offer", NEW_YEAR)
    assert is_independent(crowd, None)
    assert not is_independent(crowd, "email"), "a message to a customer is promised in the ledger"
    monkeypatch.setattr(crowd.engine, "limited", lambda: ({"an offer": 3}, {}))
    assert not is_independent(crowd, None), "who is asked first gets what there are few of"


def test_what_factors_are_learnt_from_is_what_customers_hold(busy: TinyShop) -> None:
    store = FeatureStore(busy.home)
    store.backfill("customer_state", {NEW_YEAR: None})
    states = store.snapshot("customer_state", NEW_YEAR)
    positions = {f"i{k}": k for k in range(10)}
    told = [store.expanded(row, NEW_YEAR, ("history",)) for row in pq.read_table(states).to_pylist()]
    histories = Histories.of(told, positions)
    matrix = histories.owned(len(positions))
    matrix.data = histories.strengths(NEW_YEAR.timestamp())
    home = with_engine(busy.home, "spark")
    held = purchases_of(home, states, positions, NEW_YEAR, None).toArrow().to_pylist()
    assert len(held) == matrix.nnz > 50
    assert {(row["customer"], row["item"]): row["strength"] for row in held} == {
        (int(c), int(i)): pytest.approx(float(v), rel=1e-6) for c, i, v in zip(*matrix.nonzero(), matrix.data, strict=True)
    }
    late = purchases_of(home, states, positions, NEW_YEAR, NEW_YEAR - timedelta(days=7)).toArrow()
    assert 0 < len(late) < len(held), "whoever did not buy since teaches nothing"


@pytest.mark.parametrize("engine", ["duckdb", "spark"])
def test_items_that_the_same_customers_buy_speak_for_each_other(spark: None, tmp_path: Path, engine: str) -> None:
    rng = np.random.default_rng(0)
    taste = np.repeat([0, 1], 60)
    bought = sp.csr_matrix((rng.random((120, 8)) < 0.5) & ((np.arange(8) < 4)[None, :] == (taste == 0)[:, None]), dtype=np.float32)
    settings = FactorSettings(factors=2, iterations=6)
    if engine == "spark":
        rows = [(int(c), int(i), 1.0) for c, i in zip(*bought.nonzero(), strict=True)]
        home = Home(tmp_path)
        factors = learn_spread(home, spark_session.open_session(home).createDataFrame(rows, PURCHASES), 9, settings, 1)
        assert not factors[8].any(), "what nobody bought has no factors"
    else:
        factors = learn_factors(bought, settings, 1)
    liked = spoken_by(factors[:8], settings.ridge, 3)
    for item in range(8):
        spoken_for = set(liked.targets[liked.offsets[item] : liked.offsets[item + 1]].tolist())
        assert spoken_for == set(range(item // 4 * 4, item // 4 * 4 + 4)) - {item}
    items = [f"i{k}" for k in range(8)]
    histories = Histories.of(
        [{"customer_id": f"{c}", **holding([items[i] for i in bought[c].indices])} for c in range(120)], places_of(items)
    )
    stock = Stock(
        items, {name: np.ones(8) * (5 if name == "buyers" else 1) for name in STATISTICS}, {"category": ["C"] * 8}, frozenset(items)
    )
    fitted = Recommender.fit(histories, stock, RecommenderConfig(learner="ALS", als=settings), liked=liked)
    fitted.save(tmp_path / "model")
    served = Recommender.load(tmp_path / "model")
    assert served.config.learner == "ALS"
    query = Query.from_row("a customer", NEW_YEAR, holding(["i0", "i1"]), limit=2, listing="also_like")
    assert {choice.id for choice in served.pipeline.decide(query, np.random.default_rng(0)).choices} == {"i2", "i3"}


def holding(items: list[str]) -> dict[str, Any]:
    at = int(NEW_YEAR.timestamp()) - 86_400 * 3
    ones = [1] * len(items)
    return {
        "bought_item_ids": items, "bought_counts": ones, "bought_last_at": [at] * len(items), "bought_first_at": [at] * len(items),
        "bought_weights": [1.0] * len(items), "recent_item_ids": [], "recent_at": [], "recent_weights": [],
    }  # fmt: skip


def places_of(items: list[str]) -> dict[str, int]:
    return {item: place for place, item in enumerate(items)}


def test_a_learner_that_is_none_is_told(tmp_path: Path) -> None:
    text = (
        (ROOT / "mlflow.yaml").read_text().replace("registered_name: recommendations", "registered_name: recommendations\n    learner: SVD")
    )
    (tmp_path / "mlflow.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"recommendations\.learner: 'SVD': use one of EASE, ALS"):
        load_settings(tmp_path, tmp_path / "mlflow.yaml")
    (tmp_path / "mlflow.yaml").write_text(text.replace("SVD", "ALS"))
    assert load_settings(tmp_path, tmp_path / "mlflow.yaml").models["recommendations"].learner == "ALS"
