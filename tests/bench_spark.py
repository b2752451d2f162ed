"""Spark beside DuckDB: whether their rows are equal, and what a materialization takes as the log grows.

``UBIQUO_HOME`` names the home (the demo's). The first table compares every view and fold, row by row; the second materializes the log once
and 16 times (``UBIQUO_BENCH_SIZES``) by each engine (``UBIQUO_BENCH_ENGINES``), in a process of its own, Spark with 2 GB for its Java's
heap. Memory is the most that was held at one time; of Python's workers, which are forks, what is their own. Both Sparks are local[2].
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC
from pathlib import Path

import psutil
from both_engines import compared
from rich.console import Console
from rich.table import Table
from scene import ROOT

from features.catalogue.shop import Shop
from features.definitions.view import views_of
from features.state.home import Home, configure_process

JAVA_MEMORY = "2g"
SURROUNDINGS = dict(os.environ)
"""Before other benchmarks, whose tools are used here, set a secret of their own."""
ENGINES = os.environ.get("UBIQUO_BENCH_ENGINES", "duckdb,spark").split(",")
SIZES = [int(size) for size in os.environ.get("UBIQUO_BENCH_SIZES", "1,16").split(",")]


def equality(home: Home, console: Console) -> None:
    at = Shop.load(home).data_end.astimezone(UTC)
    seconds: dict[tuple[str, str], float] = {}
    found = compared(home, [at], lambda view, engine, took: seconds.update({(view, engine): took}))
    table = Table("view", "rows", "columns", "exactly equal", "largest difference", "DuckDB, s", "Spark, s", title=f"as of {at:%Y-%m-%d}")
    for each in found:
        view = each.view.partition(":")[0]
        times = [f"{seconds.pop((view, engine)):.1f}" if (view, engine) in seconds else "" for engine in ("duckdb", "spark")]
        table.add_row(each.view, f"{each.rows}", f"{each.columns}", f"{each.exact}", f"{each.largest:.1e}", *times)
    console.print(table)


def materialized(home: Home) -> None:
    """What the command does but for the command line: snapshots, and rows online."""
    from features.store.compute import with_engine
    from features.store.feature_store import FeatureStore

    home = with_engine(home, None)
    at = Shop.load(home).data_end.astimezone(UTC)
    store = FeatureStore(home)
    store.apply()
    took = {}
    for view in views_of(Shop.load(home).domain):
        began = time.perf_counter()
        store.backfill(view, {at: None})
        took[view] = time.perf_counter() - began
        if view in store.customer_views():
            began = time.perf_counter()
            took["customers"] = store.materialize(view, at)
            took["online"] = took.get("online", 0.0) + time.perf_counter() - began
    print(json.dumps(took))


class Watched(threading.Thread):
    """Notes the most memory that a process and those that it has started have held, by their names."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._process = psutil.Process(pid)
        self.peak: dict[str, float] = {}
        self.cpu: dict[int, float] = {}

    def run(self) -> None:
        while True:
            now: dict[str, float] = {}
            try:
                for each in (self._process, *self._process.children(recursive=True)):
                    name = "java" if "java" in each.name() else "driver" if each.pid == self._process.pid else "workers"
                    # workers are forks of one process, which would count once for each
                    held = (each.memory_full_info().uss if name == "workers" else each.memory_info().rss) / 1e6
                    now[name] = now.get(name, 0.0) + held
                    if name == "workers":
                        now["one worker"] = max(now.get("one worker", 0.0), held)
                    times = each.cpu_times()
                    self.cpu[each.pid] = times.user + times.system
            except psutil.Error:
                if not self._process.is_running():
                    return
            self.peak = {name: max(now.get(name, 0.0), self.peak.get(name, 0.0)) for name in {*now, *self.peak}}
            time.sleep(0.2)


def growth(home: Home, console: Console) -> None:
    table = Table(
        "log",
        "engine",
        "customers",
        "activity, s",
        "states, s",
        "items, s",
        "online, s",
        "CPU, s",
        "peak MB: driver",
        "Java",
        "workers",
        "one",
    )
    with tempfile.TemporaryDirectory() as scratch:
        for size in SIZES:
            grown = home
            if size > 1:
                from bench_log import grow

                grown = Home(Path(scratch) / f"{size}")
                grow(home, grown, size)
            for engine in ENGINES:
                for name in ("features", "feast"):
                    subprocess.run(["rm", "-rf", str(grown.root / name)], check=True)
                environment = {
                    **SURROUNDINGS, "UBIQUO_HOME": str(grown.root), "UBIQUO_ENGINE": engine, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
                    "PYSPARK_SUBMIT_ARGS": f"--driver-memory {JAVA_MEMORY} pyspark-shell",
                }  # fmt: skip
                command = [sys.executable, "-W", "ignore", __file__, "materialized"]
                process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                watched = Watched(process.pid)
                watched.start()
                out, err = process.communicate()
                if process.returncode:
                    console.print(f"{size} times, {engine}: {err[-2000:]}", highlight=False, markup=False)
                    continue
                took = json.loads(out.splitlines()[-1])
                console.print(f"{size} times, {engine}: {took}, peak MB {watched.peak}, load {os.getloadavg()[0]:.1f}", highlight=False)
                table.add_row(
                    f"{size}x", engine, f"{took['customers']}",
                    *(f"{took[name]:.1f}" for name in ("customer_activity", "customer_state", "item_stats", "online")),
                    f"{sum(watched.cpu.values()):.0f}", *(f"{watched.peak.get(name, 0.0):.0f}" for name in ("driver", "java", "workers", "one worker")),
                )  # fmt: skip
    console.print(table)


def main() -> int:
    configure_process()
    home = Home.from_environment()
    if sys.argv[1:] == ["materialized"]:
        materialized(home)
        return 0
    console = Console(width=160)
    measures = sys.argv[1:] or ["equality", "growth"]
    console.print(f"load of the machine before: {os.getloadavg()[0]:.1f}")
    if "equality" in measures:
        equality(home, console)
    if "growth" in measures:
        with tempfile.TemporaryDirectory() as scratch:
            copied = Home(Path(scratch) / "home")
            subprocess.run(["cp", "-r", str(home.root), str(copied.root)], check=True)
            growth(copied, console)
    console.print(f"load of the machine after: {os.getloadavg()[0]:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
