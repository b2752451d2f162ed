"""What a governed decision costs beside the same without policy and ledger, and what waiting journeys cost the intake: ``make bench``.

Ratios of what is measured alternately in one run, on the home that ``UBIQUO_HOME`` names; it works on a copy.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from scene import NEW_YEAR, ROOT, copy_home

from features.catalogue.tables import Catalogue
from features.definitions.segments import SEGMENTS
from features.people.identity import Identities
from features.sources.catalogue_file import load
from features.state.clock import running_clock
from features.state.home import Home
from serving import bootstrap
from serving.bootstrap import open_engine
from serving.decide.batch import score
from serving.decide.governor import POLICY
from serving.decide.questions import NextBestOfferRequest
from serving.decide.who import Who
from serving.journeys.plan import JOURNEYS
from serving.journeys.runs import Run

OFFERS, ROUNDS, JOURNEYS_WAITING, EVENTS = 200, 400, 100_000, 4_000
EVERYTHING = {
    "control_group": {"share": 0.05, "salt": "bench", "covers": ["recommendations"]},
    "contact": {
        "caps": [{"most": 500, "per": "month"}, {"most": 400, "per": "week", "channels": ["mail"]}, {"most": 300, "per": "day", "each": "offer"}],
        "quiet_hours": {"from": "02:00", "to": "02:01"}, "offer_rest_days": 1, "item_rest_days": 1, "answered_rest_days": 1,
        "complaint_days": 7, "reserved_minutes": 1,
    },
    "arbitration": {"sending_minor": {"mail": 60}, "context": [{"when": "weather == 'rain'", "factor": 2.0, "stages": ["retain"]}]},
}  # fmt: skip


def two_hundred(home: Home, budgets: bool) -> None:
    """So many offers, with every kind of filter; a tenth of them may have a budget."""
    items = Catalogue(home).read("items")["item_id"].to_pylist()
    (home.root / SEGMENTS).write_text("context: {weather: text}\nsegments: {lapsing: recency_days > 30.0}\n")
    lines = []
    for k in range(OFFERS):
        more = {"budget": 10_000_000} if budgets and k % 10 == 0 else {}
        more |= {"store_ids": ["1", "2"]} if k % 7 == 0 else {}
        conditions = ("recency_days < 400.0", "lapsing || visit_days_total > 1.0", "hour >= 0.0 && weekday <= 7.0", "channel != 'sms'")
        lines.append(
            {
                "offer_id": f"o{k}", "valid_from": "2017-12-01", "valid_until": "2018-03-01", "item_ids": items[k * 5 : k * 5 + 5],
                "stage": "retain" if k % 2 else "upsell", "channels": ["mail", "email", "web"], "cost_minor": 1, "category": f"g{k % 50}",
                "eligible": conditions[k % 4], **more,
            }
        )  # fmt: skip
    path = home.root / "bench.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    load(home, "offers", path).save()


def decisions(home: Home) -> None:
    """The same decision with and without policy and ledger, alternately."""
    policy = home.root / POLICY
    # the folds that tell of messages are read either way: what was sent to them is known
    at = [int((NEW_YEAR - timedelta(days=k)).timestamp()) for k in range(20, 2, -2)]
    row = {
        "contacted_at": at, "contacted_by": ["mail"] * len(at), "contacted_offers": ["o3"] * len(at), "contacted_decisions": [""] * len(at),
        "recency_days": 3.0, "visit_days_total": 60.0, "tenure_days": 300.0,
    }  # fmt: skip
    policy.unlink(missing_ok=True)
    two_hundred(home, budgets=False)
    plain = open_engine(home)
    two_hundred(home, budgets=True)
    policy.write_text(json.dumps(EVERYTHING))
    governed = open_engine(home)
    ask = NextBestOfferRequest(channel="mail", context={"weather": "rain"}, store_id="1")
    times: dict[str, list[float]] = {"without": [], "with": [], "dry": []}
    looks = NextBestOfferRequest(channel="mail", context={"weather": "rain"}, store_id="1", dry_run=True)
    for number in range(ROUNDS):
        who = Who(f"bench-{number}")
        for name, engine, request in (("without", plain, ask), ("with", governed, ask), ("dry", governed, looks)):
            began = time.perf_counter()
            answer, _ = engine.next_best_offer("next-best-offer", request, who, row, NEW_YEAR)
            times[name].append(time.perf_counter() - began)
            assert answer.offers, answer.fallback
    plain_budget = {name: np.median(each) * 1e3 for name, each in times.items()}
    print(f"| one decision over {OFFERS} offers with all filters | p50 ms | times |")
    print("|---|---|---|")
    base = plain_budget["without"]
    said = {
        "without": "no policy, no budgets, no ledger",
        "with": "within the policy, promised",
        "dry": "within the policy, only looked at",
    }
    for name, value in plain_budget.items():
        print(f"| {said[name]} | {value:.2f} | {value / base:.2f} |")


def intake(home: Home) -> None:
    """Events a second through the intake, with no journeys, with journeys that none waits in, and with so many waiting."""
    journey = {
        "name": "cart",
        "start": {"on": ["begin_checkout"], "after": "30d"},
        "stop_on": ["purchase"],
        "steps": [{"offer": {"channels": ["mail"]}}],
    }
    customers = Identities(home).customers()
    rates: dict[str, list[float]] = {}

    def run(name: str, prepare: Callable[[Any], None]) -> None:
        runtime = bootstrap.start(home, running_clock(NEW_YEAR + timedelta(days=len(rates.get(name, ())) * 3 + len(rates))))
        try:
            prepare(runtime)
            now = runtime.clock()
            events = [
                {
                    "event_id": uuid.uuid4().hex, "name": "view_item", "occurred_at": now.isoformat(),
                    "identifiers": {"loyalty_card": f"bench-{k % 500}"}, "items": [{"item_id": "1082185"}],
                }
                for k in range(EVENTS)
            ]  # fmt: skip
            began, spent = time.perf_counter(), time.process_time()
            for start in range(0, EVENTS, 200):
                runtime.intake.accept(events[start : start + 200])
            runtime.intake.drain()
            rates.setdefault(name, []).append(time.process_time() - spent)
            del began
        finally:
            runtime.close()

    def waiting(runtime: Any) -> None:
        at = int(runtime.clock().timestamp() * 1e6)
        plan = runtime.journeys.runner.plans.plans["cart"]
        if runtime.journeys.runs.counts():
            return
        with runtime.journeys.runs.changing() as change:
            for k in range(JOURNEYS_WAITING):
                who = customers[k % len(customers)] if k % 50 == 0 else f"somebody-{k}"
                run = Run(f"r{k}", "cart", plan.digest, who, 0, at + 30 * 86_400_000_000, at, at, {"begins": True})
                change.begin(run, plan.text, f"cart {k}")

    for _ in range(5):
        (home.root / JOURNEYS).unlink(missing_ok=True)
        run("no journeys", lambda runtime: None)
        (home.root / JOURNEYS).write_text(json.dumps({"journeys": [journey], "sinks": [{"name": "files", "channels": ["mail"]}]}))
        run(f"{JOURNEYS_WAITING:,} waiting", waiting)
    base = float(np.median(rates["no journeys"]))
    print(f"\n| {EVENTS:,} events taken in and folded | CPU seconds | times |")
    print("|---|---|---|")
    for name, spent in rates.items():
        print(f"| {name} | {np.median(spent):.2f} | {np.median(spent) / base:.3f} |")


def batch(home: Home) -> None:
    """Every customer by mail within the caps: time, memory as it goes, and whether the file keeps the caps."""
    (home.root / POLICY).write_text(json.dumps({**EVERYTHING, "contact": {"caps": [{"most": 1, "per": "day"}], "reserved_minutes": 1440}}))
    process, held = psutil.Process(), []
    out = home.root / "bench-batch.jsonl"
    engine_of = lambda home: bootstrap.open_engine(home)  # noqa: E731
    began = time.perf_counter()
    rows = score(home, engine_of, "next-best-offer", NEW_YEAR, out, 1, lambda done, of: held.append(process.memory_info().rss), "mail").rows
    spent = time.perf_counter() - began
    offered = [line for line in map(json.loads, out.read_text().splitlines()) if line["id"] is not None]
    twice = len(offered) - len({line["customer_id"] for line in offered})
    # promised again within the day by another batch: nothing is left
    other = home.root / "bench-again.jsonl"
    score(home, engine_of, "next-best-offer", NEW_YEAR, other, 1, channel="email")
    again = {line["customer_id"] for line in map(json.loads, other.read_text().splitlines()) if line["id"] is not None}
    print(
        f"\nBatch by mail within a cap of one a day: {rows} rows in {spent:.1f} s, {spent / rows * 1e6 / 3600:.1f} h a million customers;"
    )
    print(
        f"{len(offered)} offers, {twice} customers with two, {len(again & {line['customer_id'] for line in offered})} of them offered more by e-mail;"
    )
    print(f"memory after the first chunk {held[0] / 1e6:.0f} MB, at the end {held[-1] / 1e6:.0f} MB")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        home = copy_home(Home.from_environment(), Path(folder) / "home")
        decisions(home)
        batch(home)
        intake(home)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    os.chdir(ROOT)
    main()
