"""What an answer costs as the log grows: the demo's log once, 4 and 16 times, its customers known by other identifiers each time.

Prints one table; every ratio is of two things measured in this run. ``UBIQUO_BENCH_SIZES`` names other sizes (``1,4,16``),
``UBIQUO_BENCH_MEASURES`` some of the measures.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from scene import NEW_YEAR, ROOT, SECRET, command, surroundings

os.environ["UBIQUO_SECRET"] = SECRET

from features.catalogue.shop import Shop
from features.definitions.view import views_of
from features.people.consent import Consents
from features.people.identity import SCHEMA, Identities
from features.state.clock import running_clock
from features.state.home import Home
from features.state.tables import DeltaFolder
from features.store.customer_rows import CustomerRows
from features.store.event_log import EVENT_SCHEMA, EventLog, connect
from features.store.feature_store import FeatureStore
from features.store.profile import profile
from features.store.snapshots import backfill
from serving.intake.inbox import Inbox

SPEAKERS = 100_000
REGULAR_EVENTS = 10_000
"""Of one customer who comes more often than anybody."""
ZONE = "America/New_York"
PAIRS = "list_transform({}, lambda pair: {{'key': pair.key, 'value': md5(pair.value || '{}')}})"
KEY = "split_part({0}, ':', 1) || ':' || md5(split_part({0}, ':', 2) || '{1}')"


def grow(base: Home, to: Home, times: int) -> None:
    """A home with the log of *base* so many times, and as many consents of visitors besides at every size."""
    (to.root / "log").mkdir(parents=True)
    for name in ("shop.json", "secret.check"):
        if (base.root / name).exists():
            (to.root / name).write_bytes((base.root / name).read_bytes())
    subprocess.run(["cp", "-r", str(base.root / "catalogue"), str(to.root / "catalogue")], check=True)
    db = connect()
    for n in range(times):
        changed = {
            "event_id": f"event_id || '~{n}'", "content_hash": f"md5(content_hash || '{n}')", "identifiers": PAIRS.format("identifiers", n),
            "identity_key": KEY.format("identity_key", n),
        }  # fmt: skip
        columns = ", ".join(f"{changed.get(name, name)} AS {name}" for name in EVENT_SCHEMA.names)
        rows = db.execute(f"SELECT {columns} FROM read_parquet(?)", [DeltaFolder(base.events).files()]).to_arrow_table()
        DeltaFolder(to.events).append(rows.cast(EVENT_SCHEMA))
        changed = {"identity_key": KEY.format("identity_key", n), "customer_id": f"'c_' || left(md5(customer_id || '{n}'), 16)", "through": "NULL",
                   "seq": f"seq + {n} * 10000000"}  # fmt: skip
        columns = ", ".join(f"{changed.get(name, name)} AS {name}" for name in SCHEMA.names)
        steps = db.execute(f"SELECT {columns} FROM read_parquet(?)", [DeltaFolder(base.identifiers).files()]).to_arrow_table()
        DeltaFolder(to.identifiers).append(steps.cast(SCHEMA))
    said = {
        "event_id": "'said-' || k", "name": "'consent_update'", "occurred_at": "TIMESTAMPTZ '2017-12-01'", "known_at": "TIMESTAMPTZ '2017-12-01'",
        "received_at": "TIMESTAMPTZ '2017-12-01'", "local_date": "DATE '2017-12-01'", "local_hour": "0", "identity_key": "'cookie:' || md5('s' || k)",
        "identifiers": "[{'key': 'cookie', 'value': md5('s' || k)}]", "items": "[]", "traits": "[]", "previous": "[]", "source": "'bench'",
        "consent": """'{"purposes":{"personalization":true}}'""", "content_hash": "md5('c' || k)",
    }  # fmt: skip
    columns = ", ".join(f"{said.get(name, 'NULL')} AS {name}" for name in EVENT_SCHEMA.names)
    DeltaFolder(to.events).append(db.execute(f"SELECT {columns} FROM range({SPEAKERS}) AS speakers(k)").to_arrow_table().cast(EVENT_SCHEMA))
    steps = {
        "identity_key": "'cookie:' || md5('s' || k)", "customer_id": "'c_' || left(md5('v' || k), 16)", "known_at": "TIMESTAMPTZ '2017-12-01'",
        "event_id": "'said-' || k", "cause": "'seen'", "seq": "900000000 + k",
    }  # fmt: skip
    columns = ", ".join(f"{steps.get(name, 'NULL')} AS {name}" for name in SCHEMA.names)
    DeltaFolder(to.identifiers).append(db.execute(f"SELECT {columns} FROM range({SPEAKERS}) AS speakers(k)").to_arrow_table().cast(SCHEMA))


# --- each in a process of its own


def index(home: Home) -> dict[str, float]:
    began = time.perf_counter()
    log = EventLog(home, ZONE)
    log.catch_up()
    return {"index made anew, s": time.perf_counter() - began, "events": log.count(), "index, MB": home.event_index.stat().st_size / 1e6}


def snapshot(home: Home, view: str) -> dict[str, float]:
    began = time.perf_counter()
    backfill(home, views_of("grocery")[view], {NEW_YEAR: None})
    return {f"{view}, s": time.perf_counter() - began, f"{view}, peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000}


def median_ms(work: Callable[[], Any], times: int) -> float:
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds) * 1000


def serve(home: Home) -> dict[str, float]:
    from serving.http.service import GC_THRESHOLDS
    from serving.intake.intake import Intake

    # as the service does
    gc.set_threshold(*GC_THRESHOLDS)
    shop = Shop.load(home)
    store, identities, consents = FeatureStore(home), Identities(home), Consents(home, shop.consent)
    store.apply()
    intake = Intake(home, running_clock(NEW_YEAR), Inbox(home, running_clock(NEW_YEAR)), store, identities, consents)
    # the same customer at every size: the first replica's first
    [(key,)] = connect().execute(
        f"SELECT identity_key FROM (SELECT {KEY.format('identity_key', 0)} AS identity_key FROM read_parquet(?)) ORDER BY 1 LIMIT 1",
        [DeltaFolder(Home(Path(os.environ['UBIQUO_BENCH_BASE'])).identifiers).files()],
    ).fetchall()  # fmt: skip
    customer = identities.owner_of([key])
    assert customer is not None

    def batch() -> list[dict[str, Any]]:
        at = (NEW_YEAR - timedelta(hours=1)).isoformat()
        return [
            {"event_id": uuid.uuid4().hex, "name": "view_item", "occurred_at": at, "identifiers": {"cookie": uuid.uuid4().hex}, "items": [{"item_id": "1082185"}]}
            for _ in range(1_000)
        ]  # fmt: skip

    sent: list[list[dict[str, Any]]] = []

    def accept() -> None:
        sent.append(batch())
        assert intake.accept(sent[-1]).accepted == 1_000

    again: Iterator[list[dict[str, Any]]]
    found = {"accept 1,000 new, ms": median_ms(accept, 7)}
    intake.drain()
    again = iter(sent)
    found["accept 1,000 repeated, ms"] = median_ms(lambda: intake.accept(next(again)), 7)
    intake._drain.rows.compute([customer], NEW_YEAR)
    found["micro-batch of one customer, ms"] = median_ms(lambda: intake._drain.rows.compute([customer], NEW_YEAR), 5)
    contacts = intake.contacts
    found["profile, ms"] = median_ms(lambda: profile(home, identities, consents, contacts, customer), 15)
    for first in range(0, REGULAR_EVENTS, 1_000):
        said = [{**each, "identifiers": {"loyalty_card": "a regular"}} for each in batch()]
        answer = intake.accept([{**each, "event_id": f"regular-{first + k}"} for k, each in enumerate(said)])
    intake.drain()
    regular = answer.events[0].customer_id or ""
    assert len(profile(home, identities, consents, contacts, regular, REGULAR_EVENTS)["events"]) == REGULAR_EVENTS
    found[f"profile of one with {REGULAR_EVENTS:,} events, ms"] = median_ms(
        lambda: profile(home, identities, consents, contacts, regular), 15
    )
    intake.close()
    return found


def nightly(home: Home) -> dict[str, float]:
    """All rows brought online, against those of the hundredth part of the customers."""
    store, log = FeatureStore(home), EventLog(home, ZONE)
    store.apply()
    log.catch_up()
    began = time.perf_counter()
    for view in store.customer_views():
        store.backfill(view, {NEW_YEAR: None})
        store.materialize(view, NEW_YEAR)
    full = time.perf_counter() - began
    identities = Identities(home)
    some = [customer for customer, key in sorted(identities.strongest().items()) if key.startswith("loyalty_card")][::100]
    rows = CustomerRows(home, store, log, identities)
    began = time.perf_counter()
    rows.rebuild(some, NEW_YEAR, is_now=False)
    rows.compute(some, NEW_YEAR, is_now=False)
    part = time.perf_counter() - began
    return {"materialize all, s": full, f"materialize 1 of 100 ({len(some)}), s": part, "1 of 100 / all": part / full}


def erase(home: Home) -> dict[str, float]:
    """What is done at once for one customer who asks to be erased, and the run that purges the files of all who asked, with its proof."""
    from serving.bootstrap import open_office

    with open_office(home, running_clock(NEW_YEAR), purge_at="03:30") as office:
        cards = sorted(key for key in Identities(home).strongest().values() if key.startswith("loyalty_card"))
        customers = [office._identities.owner_of([key]) or "" for key in cards[:5]]
        waiting = iter(customers)
        receipts: list[str] = []
        at_once = median_ms(lambda: receipts.append(office.begin(next(waiting))), len(customers))
        began = time.perf_counter()
        office.purge()
        for receipt_id in receipts:
            assert office.receipt(receipt_id, timeout=None).proof.found == []
        return {"erased: hidden at once, ms": at_once, "erased: purge of five, with its proof, s": time.perf_counter() - began}


MEASURES: dict[str, Callable[[Home], dict[str, float]]] = {
    "index": index,
    "activity": lambda home: snapshot(home, "customer_activity"),
    "history": lambda home: snapshot(home, "customer_state"),
    "items": lambda home: snapshot(home, "item_stats"),
    "serve": serve,
    "nightly": nightly,
    "erase": erase,
}


def main() -> int:
    sizes = [int(size) for size in os.environ.get("UBIQUO_BENCH_SIZES", "1,4,16").split(",")]
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        base = Home(Path(os.environ.get("UBIQUO_BENCH_HOME", f"{scratch}/base")))
        if not base.events.exists():
            done = command("features", "import", "complete-journey", home=base.root)
            assert done.returncode == 0, done.stdout + done.stderr
        for size in sizes:
            home = Home(Path(scratch) / f"times-{size}")
            grow(base, home, size)
            for name in os.environ.get("UBIQUO_BENCH_MEASURES", ",".join(MEASURES)).split(","):
                done = subprocess.run(
                    [sys.executable, "-W", "ignore", __file__, name, str(home.root)], cwd=ROOT, capture_output=True, text=True,
                    env={**surroundings(), "UBIQUO_BENCH_BASE": str(base.root), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
                )  # fmt: skip
                assert done.returncode == 0, done.stdout + done.stderr
                for what, value in json.loads(done.stdout.splitlines()[-1]).items():
                    found.setdefault(what, []).append(value)
    table = Table(
        "", *(f"{size} x" for size in sizes), f"{sizes[-1]} x / {sizes[0]} x", title=f"the demo's log, {SPEAKERS:,} consents besides"
    )
    for what, values in found.items():
        table.add_row(what, *(f"{value:,.0f}" if value >= 100 else f"{value:.2f}" for value in values), f"{values[-1] / values[0]:.2f}")
    Console(width=150).print(table)
    return 0


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(MEASURES[sys.argv[1]](Home(Path(sys.argv[2])))))
    else:
        sys.exit(main())
