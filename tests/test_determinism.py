"""The same log, seed and code give the same tables and models in any home, whatever secret its customers' ids are made with."""

from __future__ import annotations

import hashlib
import shutil
import sqlite3
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from scene import NEW_YEAR, TinyShop, command, event

from features.catalogue.tables import ITEMS, OFFERS, Catalogue
from features.definitions.shopping import FADED_UNITS
from features.definitions.view import views_of
from features.people.consent import STATISTICS
from features.state.home import Home
from features.store.timeline import open_timeline
from models.registry import model_names
from training.dataset import Truth, customers_in_order
from training.metrics import bootstrap

CUSTOMERS, DAYS = 140, 310
SECRETS = ("the secret of the first of two homes", "what the second of them keeps to itself")
ITEMS_SOLD, CAMPAIGNS = 30, 12
Raw = dict[str, Any]


def invented() -> list[Raw]:
    """Some months of a shop: some customers come often and some leave, and some use the coupons that all are sent."""
    rng = np.random.default_rng(7)
    start, events = NEW_YEAR - timedelta(days=DAYS), []
    for n in range(CUSTOMERS):
        card, rate, favourites = f"card-{n}", rng.uniform(0.05, 0.4), rng.permutation(ITEMS_SOLD - 1)[:6]
        leaves = DAYS if rng.random() < 0.6 else int(rng.integers(60, DAYS))
        for day in np.flatnonzero(rng.random(leaves) < rate).tolist():
            # the last item is on no coupon, and all buy it; now and then they try another
            basket = {ITEMS_SOLD - 1, *rng.choice(favourites, 2, replace=False), int(rng.integers(ITEMS_SOLD))}
            bought = [(f"i{k}", int(rng.integers(1, 4)), int(rng.integers(50, 900))) for k in sorted(basket)]
            at = start + timedelta(days=day, hours=int(rng.integers(8, 20)), seconds=n)
            events.append(event(f"{card}-{day}", "purchase", at, card, bought, store_id=f"s{n % 3}", channel="store"))
        for c in range(CAMPAIGNS):
            # to all at one moment: only the ids of the events tell them apart
            begins = campaign_start(c)
            events.append(event(f"sent-{c}-{card}", "message_sent", begins, card, campaign_id=f"c{c}", channel="mail"))
            if rng.random() < rate:
                at, offer = begins + timedelta(days=int(rng.integers(1, 9))), f"c{c}-{int(rng.integers(3))}"
                events.append(event(f"used-{c}-{card}", "offer_redeem", at, card, campaign_id=f"c{c}", offer_id=offer))
    return events


def campaign_start(c: int) -> datetime:
    return NEW_YEAR - timedelta(days=300 - 22 * c)


@pytest.fixture
def two_homes(tiny: TinyShop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[TinyShop, str]]:
    """The same events in two homes, each with its secret; into the second they came in another order."""
    offers = [
        {"offer_id": f"c{c}-{k}", "campaign_id": f"c{c}", "campaign_type": "AB"[c % 2], "channel": "mail",
         "valid_from": campaign_start(c), "valid_until": campaign_start(c) + timedelta(days=12), "item_ids": [f"i{3 * k}", f"i{3 * k + 1}"]}
        for c in range(CAMPAIGNS) for k in range(3)
    ]  # fmt: skip
    items = [
        {"item_id": f"i{k}", "department": f"D{k % 2}", "category": f"C{k % 5}", "type": f"T{k}", "brand": "N", "manufacturer": "M",
         "size": "1", "recommendable": True}
        for k in range(ITEMS_SOLD)
    ]  # fmt: skip
    Catalogue(tiny.home).save("items", pa.Table.from_pylist(items, ITEMS), ITEMS)
    Catalogue(tiny.home).save("offers", pa.Table.from_pylist(offers, OFFERS), OFFERS)
    events, homes = invented(), []
    for n, secret in enumerate(SECRETS):
        monkeypatch.setenv("UBIQUO_SECRET", secret)
        shop = TinyShop(Home(shutil.copytree(tiny.home.root, tmp_path / f"home-{n}")), tiny.shop)
        order = np.random.default_rng(n).permutation(len(events)).tolist() if n else range(len(events))
        shop.add(*(events[k] for k in order))
        homes.append((shop, secret))
    return homes


def in_each(homes: list[tuple[TinyShop, str]], monkeypatch: pytest.MonkeyPatch, found: Callable[[Home], Any]) -> list[Any]:
    results = []
    for shop, secret in homes:
        monkeypatch.setenv("UBIQUO_SECRET", secret)
        results.append(found(shop.home))
    return results


def models(home: Home) -> dict[str, str]:
    """Each file of each model by its kind and name, and what it holds."""
    files = [path for path in (home.root / "mlartifacts").rglob("*") if path.is_file() and path.parent.name in model_names()]
    return {f"{path.parent.name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def measures(home: Home) -> list[tuple[str, str, float]]:
    """All that MLflow keeps of the runs in numbers, those of the tuning with them, to the last bit."""
    with sqlite3.connect(home.root / "mlflow.db") as registry:
        query = "SELECT runs.name, metrics.key, metrics.value FROM metrics JOIN runs USING (run_uuid) ORDER BY 1, 2, 3"
        return registry.execute(query).fetchall()


def frames(home: Home, name: str) -> list[pd.DataFrame]:
    """Frames that the runs kept, without whom each row is about."""
    paths = sorted((home.root / "mlartifacts").rglob(name), key=lambda path: path.stat().st_mtime)
    return [pd.read_parquet(path).drop(columns="customer_id", errors="ignore") for path in paths]


@pytest.mark.evidence
def test_two_homes_train_the_same_models_and_print_the_same_tables(two_homes: list[tuple[TinyShop, str]]) -> None:
    printed = []
    for shop, secret in two_homes:
        # fresh: what is forked from one process has one hash seed
        done = command("training", "all", home=shop.home.root, fresh=True, UBIQUO_SECRET=secret)
        assert done.returncode == 0, done.stdout + done.stderr
        printed.append([line for line in done.stdout.splitlines() if ": done" not in line])
    (one, _), (other, _) = two_homes
    assert printed[0] == printed[1]
    assert sum(line.startswith("| ") for line in printed[0]) > 20, "the tables are in it"
    assert models(one.home) == models(other.home)
    assert {name.partition("/")[0] for name in models(one.home)} == set(model_names())
    assert measures(one.home) == measures(other.home)
    assert {"lightgbm_auc", "logistic_auc", "as_served_ndcg_at_10_for_you"} <= {key for _, key, _ in measures(one.home)}
    for name in ("evaluation.parquet", "reference.parquet"):
        ours, theirs = frames(one.home, name), frames(other.home, name)
        assert len(ours) == len(theirs) == len(model_names())
        for a, b in zip(ours, theirs, strict=True):
            pd.testing.assert_frame_equal(a, b, check_exact=True)


def test_the_customers_come_in_the_order_of_their_first_events(
    two_homes: list[tuple[TinyShop, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def first_events(home: Home) -> list[str]:
        past = open_timeline(home, NEW_YEAR).before(NEW_YEAR)
        events = past.events.select("customer_id", "known_at", "event_id").to_pandas().sort_values(["known_at", "event_id"])
        first = events.groupby("customer_id")["event_id"].first()
        return [str(first[customer]) for customer in customers_in_order(past)]

    here, there = in_each(two_homes, monkeypatch, first_events)
    assert here == there
    assert len(here) == CUSTOMERS
    known = {raw["event_id"]: datetime.fromisoformat(raw["occurred_at"]).astimezone(UTC) for raw in invented()}
    assert here == sorted(here, key=lambda event_id: (known[event_id], event_id))
    ids = in_each(two_homes, monkeypatch, lambda home: customers_in_order(open_timeline(home, NEW_YEAR).before(NEW_YEAR)))
    assert not set(ids[0]) & set(ids[1]), "though none of them has the same id in both"


def test_spines_follow_that_order(two_homes: list[tuple[TinyShop, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    campaigns = pd.DataFrame(
        [{"campaign_id": f"c{c}", "campaign_type": "A", "valid_from": campaign_start(c), "valid_until": NEW_YEAR} for c in range(CAMPAIGNS)]
    )

    def spines(home: Home) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
        truth = Truth(home, NEW_YEAR)
        place = {customer: n for n, customer in enumerate(customers_in_order(truth.timeline.before(NEW_YEAR)))}
        found = []
        for spine in (truth.churn_spine([NEW_YEAR - timedelta(days=d) for d in (80, 40)]), truth.campaign_spine(campaigns)):
            within = spine.groupby("campaign_id" if "campaign_id" in spine else "event_timestamp")["customer_id"]
            assert all(part.map(place).is_monotonic_increasing for _, part in within)
            found.append(list(spine.assign(customer_id=spine["customer_id"].map(place)).itertuples(index=False, name=None)))
        return found[0], found[1]

    here, there = in_each(two_homes, monkeypatch, spines)
    assert here == there


def test_an_interval_does_not_depend_on_what_the_customers_are_called() -> None:
    rng = np.random.default_rng(3)
    values, called = rng.normal(size=300), rng.permutation(100).tolist()
    found = [
        bootstrap([f"c{names[k % 100]:03}" for k in range(300)], lambda w: np.array([np.average(values, weights=w)]), draws=50)[1]
        for names in (range(100), called)
    ]
    np.testing.assert_array_equal(*found)


def test_popularity_is_a_sum_that_no_order_of_adding_changes(tiny: TinyShop) -> None:
    tiny.add(*(event(f"p{k}", "purchase", NEW_YEAR - timedelta(days=k, seconds=7 * k), f"{k}", [("i1", 1, 100)]) for k in range(40)))
    opened = open_timeline(tiny.home, NEW_YEAR, purposes=STATISTICS)
    compute = views_of("grocery")["item_stats"].compute
    assert compute is not None
    [popularity] = compute(opened, NEW_YEAR).to_pandas()["popularity"]
    assert popularity > 1
    assert (popularity * FADED_UNITS).is_integer()
