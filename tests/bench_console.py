"""What the console costs: a customer with ten thousand events, the first paint, the bytes of a page, and how soon an event is on it.

Run: UBIQUO_HOME=a trained home (a copy is used) PYTHONPATH=.:tests python -W ignore tests/bench_console.py
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
import uuid
from datetime import datetime, timedelta
from pathlib import Path

import httpx
from playwright.sync_api import sync_playwright
from scene import Service, copy_home, loyalty_cards, start_service, stop_service

from features.state.home import Home
from serving.console.application import PAGES

EVENTS, BATCH, READS, NEWS = 10_000, 1_000, 60, 60


def fill(service: Service, card: str) -> str:
    """Give a customer ten thousand events of the last year; their id."""
    told = service.ask("churn", {"identifiers": {"loyalty_card": card}})
    end = datetime.fromisoformat(str(told["as_of"]))
    for start in range(0, EVENTS, BATCH):
        batch = [
            {
                "event_id": uuid.uuid4().hex, "name": "view_item", "channel": "web", "identifiers": {"loyalty_card": card},
                "occurred_at": (end - timedelta(minutes=50 * (start + k))).isoformat(), "items": [{"item_id": "1082185"}],
            }
            for k in range(BATCH)
        ]  # fmt: skip
        status, answer = service.post("/v1/events", {"events": batch})
        assert status == 200, answer
        assert answer["accepted"] == BATCH, answer
    return str(told["customer_id"])


def server_times(service: Service, customer: str) -> list[float]:
    """Milliseconds from the request to the whole page, on a kept connection of this machine."""
    taken = []
    with httpx.Client(base_url=f"http://127.0.0.1:{service.port}", timeout=60) as reader:
        for _ in range(READS + 5):
            started = time.perf_counter()
            assert reader.get(f"/console/customers/{customer}").status_code == 200
            taken.append(1_000 * (time.perf_counter() - started))
    return taken[5:]


def main() -> None:
    """Print the figures."""
    source = Home.from_environment()
    with tempfile.TemporaryDirectory() as folder:
        home = copy_home(source, Path(folder) / "home")
        service = start_service(home, UBIQUO_DEMO_SHOP="1")
        try:
            cards = loyalty_cards(home)
            small = str(service.ask("churn", {"identifiers": {"loyalty_card": cards[1]}})["customer_id"])
            large = fill(service, cards[0])
            time.sleep(15)
            for name, customer in (("some hundred events", small), (f"{EVENTS} events more", large)):
                taken = server_times(service, customer)
                cuts = statistics.quantiles(taken, n=100)
                print(f"a customer's page with {name}: p50 {statistics.median(taken):.1f} ms, p95 {cuts[94]:.1f} ms")
            browse(service, large, cards[0])
        finally:
            stop_service(service)


def browse(service: Service, customer: str, card: str) -> None:
    """First contentful paint and bytes of every page, as Chromium's own trace has them; then how soon an event is on a page."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for path in [*(p.path for p in PAGES if p.method == "GET" and "{" not in p.path), f"/customers/{customer}"]:
            page = browser.new_context().new_page()
            session = page.context.new_cdp_session(page)
            session.send("Network.enable")
            received: list[int] = []
            session.on("Network.loadingFinished", lambda told, received=received: received.append(int(told["encodedDataLength"])))
            page.goto(f"http://127.0.0.1:{service.port}/console{path}", wait_until="load")
            page.wait_for_timeout(400)
            paint = page.evaluate("performance.getEntriesByName('first-contentful-paint').map(e => e.startTime)[0] || 0")
            print(f"/console{path.replace(customer, '{id}')}: first contentful paint {paint:.0f} ms, {sum(received) / 1_000:.0f} kB")
            page.context.close()
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{service.port}/console/customers/{customer}")
        taken = []
        for k in range(NEWS):
            mark = f"mark-{k}"
            event = {
                "event_id": uuid.uuid4().hex, "name": "search", "query": mark, "channel": "app", "identifiers": {"loyalty_card": card},
                "occurred_at": str(service.ask("churn", {"customer_id": "nobody"})["as_of"]),
            }  # fmt: skip
            started = time.perf_counter()
            service.ask("events", event)
            # as often as the screen is drawn, in the page itself
            page.wait_for_function("mark => document.querySelector('.timeline').textContent.includes(mark)", arg=mark)
            taken.append(time.perf_counter() - started)
        print(
            f"from an event to the page that shows it: p50 {statistics.median(taken):.2f} s, p99 {statistics.quantiles(taken, n=100)[98]:.2f} s"
        )
        browser.close()


if __name__ == "__main__":
    main()
