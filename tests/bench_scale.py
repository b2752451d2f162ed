"""What recommending costs as a shop grows, on re-keyed replicas of the demo with noise: not real shops, and said so.

``UBIQUO_BENCH_SCALES`` lists customers x items as multiples of the demo, such as ``1x1,10x1,10x10``; each is fitted in a process of its
own. ``UBIQUO_BENCH_ITEMS`` lists catalogue sizes whose requests are timed, with made-up neighbours.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from datetime import UTC, datetime
from typing import Any

import numpy as np
import scipy.sparse as sp

from features.state.home import Home
from models.attributes import Attributes
from models.decision import Query
from models.recommender.config import RANKED, RecommenderConfig
from models.recommender.content import Contents
from models.recommender.ease import TARGETS, fit_ease, form_of
from models.recommender.neighbours import Neighbours, strongest_of_rows
from models.recommender.owned import Histories
from models.recommender.recommender import Recommender
from models.recommender.shelf import STATISTICS, Shelf
from models.recommender.sources import Known
from training.bootstrap import open_registry
from training.dataset import Plan, open_experiment
from training.lessons import Lessons

NOISE = 0.1
"""Which share of a replica's purchases is of another item, drawn by popularity."""
NOW = datetime(2018, 1, 1, 5, tzinfo=UTC)


def demo() -> tuple[Histories, int]:
    """The demo's histories at the end of its data, and how many items the model knows."""
    home = Home.from_environment()
    truth, cuts = open_experiment(home, "recommendations", Plan())
    lessons = Lessons(home, truth, cuts, "recommendations_v1", RecommenderConfig(), lambda step: None)
    moment = lessons.at(cuts.final)
    return moment.histories, len(moment.item_ids)


def replica(histories: Histories, items: int, customers: int, catalogues: int) -> sp.csr_matrix:
    """Customers by items, so many times the customers spread over so many times the items."""
    owned, rng = histories.owned(items), np.random.default_rng(0)
    popular = np.sort(owned.indices)
    parts = []
    for copy in range(customers):
        part = owned.copy()
        noisy = rng.random(len(part.indices)) < NOISE
        part.indices = part.indices.copy()
        part.indices[noisy] = popular[rng.integers(len(popular), size=int(noisy.sum()))]
        part.indices += (copy % catalogues) * items
        parts.append(sp.csr_matrix((part.data, part.indices, part.indptr), shape=(part.shape[0], items * catalogues)))
    whole = sp.vstack(parts).tocsr()
    whole.sum_duplicates()
    whole.data[:] = 1.0
    return whole


def fit_one(scale: str) -> None:
    customers, catalogues = map(int, scale.split("x"))
    histories, items = demo()
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    matrix = replica(histories, items, customers, catalogues)
    wall, cpu = time.perf_counter(), time.process_time()
    config = RecommenderConfig()
    fit_ease(matrix, config.ease_penalty, config.ease_neighbours, config.memory_bytes)
    told = {
        "scale": scale, "customers": matrix.shape[0], "items": matrix.shape[1], "purchases": int(matrix.nnz),
        "form": form_of(matrix.shape[0], matrix.shape[1], config.memory_bytes), "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu, "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, "before_gb": base / 1e6,
    }  # fmt: skip
    print(json.dumps(told))


def made_up(trained: Recommender, items: int) -> Recommender:
    """A model of many items: neighbours, statistics and attributes drawn at random, with the champion's own rankers."""
    rng, keep = np.random.default_rng(0), trained.config.ease_neighbours
    weights = rng.gamma(1.0, 0.01, items * keep).astype(np.float32)
    # popular sources speak for many, as they do
    sources = (items * rng.random(items * keep) ** 3).astype(np.int32)
    by_target = sp.csr_matrix((weights, sources, np.arange(0, items * keep + 1, keep)), shape=(items, items))
    liked = Neighbours(strongest_of_rows(by_target.T.tocsr(), TARGETS))
    nothing = Neighbours(sp.csr_matrix((items, items), dtype=np.float32))
    known = trained.shelf.known
    drawn = rng.integers(known, size=items)
    statistics = {name: np.asarray(trained.shelf.statistics[name])[drawn] for name in STATISTICS}
    columns = {name: [trained.attributes.text(name, int(k)) for k in drawn] for name in trained.shelf.groups}
    shelf = Shelf([str(k) for k in range(items)], Attributes.of(columns), statistics, None, trained.shelf.groups)
    model = Recommender(trained.config, shelf, Known(liked, nothing, nothing, {}), Contents.of([]), frozenset())
    return model.ranked_by(trained.rankers, {"any": RANKED, "new": RANKED})


def ask(model: Recommender, rows: list[dict[str, Any]], listing: str) -> tuple[float, float]:
    """p50 and p99 in ms, in process."""
    rng, times = np.random.default_rng(0), []
    for number, row in enumerate(rows):
        query = Query.from_row(str(number), NOW, row, listing=listing)
        started = time.perf_counter()
        model.pipeline.decide(query, rng)
        if number >= 50:
            times.append(time.perf_counter() - started)
    return float(np.percentile(times, 50) * 1e3), float(np.percentile(times, 99) * 1e3)


def main() -> None:
    if len(sys.argv) > 1:
        fit_one(sys.argv[1])
        return
    scales = os.environ.get("UBIQUO_BENCH_SCALES", "1x1,10x1,10x10").split(",")
    print("EASE on re-keyed replicas of the demo with noise (customers x items as multiples of it), two cores:\n")
    print(
        "| scale | customers | items | purchases | form | seconds | CPU seconds | peak GB (before the fit) |\n|---|---|---|---|---|---|---|---|"
    )
    for scale in filter(None, scales):
        done = subprocess.run([sys.executable, "-W", "ignore", __file__, scale], capture_output=True, text=True, check=True)
        told = json.loads(done.stdout.splitlines()[-1])
        print(
            f"| {told['scale']} | {told['customers']:,} | {told['items']:,} | {told['purchases']:,} | {told['form']} | {told['seconds']:.0f} | "
            f"{told['cpu_seconds']:.0f} | {told['peak_gb']:.1f} ({told['before_gb']:.1f}) |",
            flush=True,
        )
    trained: Recommender = open_registry(Home.from_environment()).load("recommendations@champion").model
    print("\nOne list in process, neighbours made up, the champion's rankers, customers who hold 300 items:\n")
    print("| items | for you p50 / p99 ms | also like p50 / p99 ms |\n|---|---|---|")
    for items in map(int, os.environ.get("UBIQUO_BENCH_ITEMS", "22000,200000,1000000").split(",")):
        model, rng = made_up(trained, items), np.random.default_rng(1)
        rows = [_row(rng, items) for _ in range(450)]
        for_you, also_like = ask(model, rows, "for_you"), ask(model, rows, "also_like")
        print(f"| {items:,} | {for_you[0]:.2f} / {for_you[1]:.2f} | {also_like[0]:.2f} / {also_like[1]:.2f} |", flush=True)


def _row(rng: np.random.Generator, items: int) -> dict[str, Any]:
    held = sorted({str(k) for k in (items * rng.random(300) ** 3).astype(int)})
    now, ages = int(NOW.timestamp()), rng.integers(1, 300, size=(2, len(held))) * 86_400
    first, last = now - ages.max(axis=0), now - ages.min(axis=0)
    return {
        "bought_item_ids": held, "bought_counts": rng.integers(1, 9, len(held)).tolist(), "bought_last_at": last.tolist(),
        "bought_first_at": first.tolist(), "bought_weights": rng.random(len(held)).tolist(),
    }  # fmt: skip


if __name__ == "__main__":
    main()
