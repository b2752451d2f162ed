"""What grows by itself: the disk under 10,000 appends of one event, and memory over minutes of live events and answers.

``UBIQUO_SOAK_MINUTES`` says how long the service is watched (20). Prints tables; compares what was measured in one run.
"""

from __future__ import annotations

import http.client
import json
import os
import statistics
import sys
import tempfile
import threading
import time
import uuid
from datetime import timedelta
from pathlib import Path

import psutil
from power_cut import make
from rich.console import Console
from rich.table import Table
from scene import NEW_YEAR, SECRET, Service, copy_home, event, start_service, stop_service

os.environ["UBIQUO_SECRET"] = SECRET

from features.catalogue.shop import Shop
from features.events.event import parse_event
from features.people.identity import Identities
from features.state.home import Home
from features.store.event_index import Incoming
from features.store.event_log import EventLog

APPENDS = int(os.environ.get("UBIQUO_APPENDS", "10000"))
EVENTS_A_SECOND, ANSWERS_A_SECOND = 500, 100


def megabytes(folder: Path) -> float:
    return sum(each.stat().st_blocks * 512 for each in folder.rglob("*") if each.is_file()) / 1e6


def appended(folder: Path, sizes: list[int]) -> tuple[EventLog, list[float]]:
    """A log to which batches of these sizes were appended, and the seconds that each append took."""
    home = make(folder)
    shop = Shop.load(home)
    log, identities, seconds, n = EventLog(home, shop.timezone), Identities(home), [], 0
    for size in sizes:
        batch = []
        for _ in range(size):
            raw = event(f"e{n}-{uuid.uuid4().hex}", "login", NEW_YEAR - timedelta(days=1), f"card-{n % 500}")
            sealed, content_hash, personal = identities.vault.seal(parse_event(raw, NEW_YEAR))
            batch.append(Incoming(sealed, content_hash, sealed.occurred_at, NEW_YEAR, "bench", personal=personal))
            n += 1
        began = time.perf_counter()
        log.append(batch, identities)
        seconds.append(time.perf_counter() - began)
    return log, seconds


def growth(console: Console) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        many, seconds = appended(Path(scratch) / "many", [1] * APPENDS)
        at_once, _ = appended(Path(scratch) / "once", [APPENDS])
        folders = [Path(scratch) / name / "log" for name in ("many", "once")]
        before = [megabytes(folder) for folder in folders]
        for log in (many, at_once):
            log.maintain(kept_seconds=0.0)
        after = [megabytes(folder) for folder in folders]
    first, last = statistics.median(seconds[:200]) * 1000, statistics.median(seconds[-200:]) * 1000
    table = Table("", "disk MB", "once the retention has passed", "ms an append, first 200", "last 200", title=f"{APPENDS:,} events")
    table.add_row("one at a time", f"{before[0]:.1f}", f"{after[0]:.2f}", f"{first:.1f}", f"{last:.1f}")
    table.add_row("all at once", f"{before[1]:.1f}", f"{after[1]:.2f}", "", "")
    console.print(table)
    console.print(f"disk: {after[0] / after[1]:.2f} times; time of an append, last to first: {last / first:.2f} times", highlight=False)


class Steady(threading.Thread):
    """Posts bodies at a steady rate and counts what is not answered with 200."""

    def __init__(self, service: Service, path: str, rate: float, body: object) -> None:
        super().__init__(daemon=True)
        self.service, self.path, self.rate, self.body = service, path, rate, body
        self.sent = self.bad = 0
        self.stop = threading.Event()

    def run(self) -> None:
        connection, began = http.client.HTTPConnection("127.0.0.1", self.service.port, timeout=30), time.monotonic()
        while not self.stop.is_set():
            time.sleep(max(0.0, began + self.sent / self.rate - time.monotonic()))
            self.sent += 1
            try:
                connection.request(
                    "POST", self.path, json.dumps(self.body() if callable(self.body) else self.body), {"content-type": "application/json"}
                )
                with connection.getresponse() as response:
                    response.read()
                    self.bad += response.status != 200
            except (OSError, http.client.HTTPException):
                self.bad += 1
                connection.close()


def soak(made: Home, minutes: float, console: Console) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        service = start_service(copy_home(made, Path(scratch) / "home"))
        n = 0

        def batch() -> object:
            nonlocal n
            n += 50
            return {
                "events": [
                    {
                        "event_id": uuid.uuid4().hex, "name": "view_item", "occurred_at": NEW_YEAR.isoformat(), "channel": "web",
                        "identifiers": {"cookie": f"visitor-{(n + k) % 20_000}"}, "items": [{"item_id": "1082185"}],
                    }
                    for k in range(50)
                ]
            }  # fmt: skip

        loads = [
            Steady(service, "/v1/events", EVENTS_A_SECOND / 50, batch),
            Steady(service, "/v1/recommendations", ANSWERS_A_SECOND, {"identifiers": {"cookie": "visitor-7"}}),
        ]
        for load in loads:
            load.start()
        process, samples = psutil.Process(service.process.pid), []
        began = time.monotonic()
        while time.monotonic() - began < minutes * 60:
            time.sleep(5)
            samples.append((time.monotonic() - began, process.memory_info().rss / 1e6))
        for load in loads:
            load.stop.set()
            load.join()
        status, ready = service.get("/readyz")
        stop_service(service)
    table = Table("minute", "resident MB, median of the minute", title=f"{EVENTS_A_SECOND} events/s and {ANSWERS_A_SECOND} answers/s")
    by_minute: dict[int, list[float]] = {}
    for at, size in samples:
        by_minute.setdefault(int(at // 60), []).append(size)
    medians = [statistics.median(sizes) for _, sizes in sorted(by_minute.items())]
    for minute, size in enumerate(medians):
        table.add_row(str(minute), f"{size:.0f}")
    console.print(table)
    half = medians[len(medians) // 2 :]
    rest = [size for at, size in samples if at > began * 0 + 120] or [size for _, size in samples]
    console.print(
        f"events sent {loads[0].sent * 50:,}, requests not answered with 200: {loads[0].bad + loads[1].bad} of {loads[0].sent + loads[1].sent:,}; readyz {status}; "
        f"second half: {min(half):.0f} to {max(half):.0f} MB; from the third minute: {min(rest):.0f} to {max(rest):.0f} MB", highlight=False,
    )  # fmt: skip
    if status != 200:
        console.print(ready)


def main() -> int:
    from attack import trained_home

    console = Console(width=160)
    growth(console)
    with tempfile.TemporaryDirectory() as scratch:
        soak(trained_home(Path(scratch)), float(os.environ.get("UBIQUO_SOAK_MINUTES", "20")), console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
