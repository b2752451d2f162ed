"""Durable intake and identity, measured: ``make bench`` prints the tables.

Server and client have a core each. Beside the service stand two endpoints of a bare uvicorn that acknowledge the same batches without
storing anything: one reads the JSON, the other checks and seals each event too, as the intake does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
from scene import NEW_YEAR, ROOT, SECRET, Service, TinyShop, copy_home, event, free_port, start_service, stop_service

from features.catalogue.shop import Shop
from features.people.identity import Identities
from features.people.vault import Vault
from features.state.home import Home
from features.state.tables import DeltaFolder
from features.store.event_log import EVENT_SCHEMA, EventLog, connect

READING = """
import msgspec
BODY = b'{"accepted":100}'
HEAD = [(b"content-type", b"application/json"), (b"content-length", str(len(BODY)).encode())]
async def app(scope, receive, send):
    if scope["type"] == "http":
        body = b""
        while True:
            message = await receive()
            body += message["body"]
            if not message.get("more_body"):
                break
        msgspec.json.decode(body)
        await send({"type": "http.response.start", "status": 200, "headers": HEAD})
        await send({"type": "http.response.body", "body": BODY})
"""
CHECKING = """
import msgspec
from features.state.clock import system_clock
from features.events.event import parse_event
from features.state.home import Home
from features.catalogue.shop import Shop
from features.people.vault import Vault
from serving.intake.receipts import EventReceipt, EventsAnswer
home = Home.from_environment()
vault, shop = Vault.open(home), Shop.load(home)
async def app(scope, receive, send):
    if scope["type"] == "http":
        body = b""
        while True:
            message = await receive()
            body += message["body"]
            if not message.get("more_body"):
                break
        events = [vault.seal(parse_event(raw, system_clock(), shop.currency, shop.phone_region)).event
                  for raw in msgspec.json.decode(body)["events"]]
        answer = msgspec.json.encode(EventsAnswer(len(events), 0, 0, 0, [EventReceipt("accepted", e.event_id) for e in events]))
        head = [(b"content-type", b"application/json"), (b"content-length", str(len(answer)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": answer})
"""
BATCH, BATCHES, CONNECTIONS, CUSTOMERS = 100, 600, 8, 5_000
IDENTIFIERS = 1_000_000


def bodies(count: int) -> list[bytes]:
    """Batches of views and purchases of a few thousand customers, every event new."""
    names = ("view_item", "add_to_cart", "search", "purchase")
    made = []
    for k in range(count * BATCH):
        at = (NEW_YEAR - timedelta(seconds=k % 3600)).isoformat()
        name = names[k % 4]
        items = [{"item_id": str(1_000_000 + k % 997), "quantity": 1, "amount_minor": 199}] if name != "search" else []
        made.append({
            "event_id": uuid.uuid4().hex, "name": name, "occurred_at": at, "identifiers": {"cookie": f"bench-{k * 7919 % CUSTOMERS}"},
            "channel": "web", "items": items, "currency": "USD", **({"query": "bananas"} if name == "search" else {}),
        })  # fmt: skip
    return [json.dumps({"events": made[k : k + BATCH]}).encode() for k in range(0, len(made), BATCH)]


async def send(port: int, path: str, batches: list[bytes]) -> float:
    """Events a second over several connections, until the last is acknowledged."""
    waiting = iter(batches)

    async def one() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for body in waiting:
            writer.write(
                b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (path.encode(), len(body))
            )
            writer.write(body)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            length = next(int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
            await reader.readexactly(length)
        writer.close()

    began = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(CONNECTIONS)))
    return len(batches) * BATCH / (time.perf_counter() - began)


def pin(pid: int, core: int) -> None:
    """Keep a process and its children on one core."""
    for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
        process.cpu_affinity([core])
        for thread in process.threads():
            os.sched_setaffinity(thread.id, [core])


def endpoint(folder: Path, name: str, code: str, home: Home) -> tuple[int, subprocess.Popen[bytes]]:
    """A bare uvicorn that runs *code*."""
    (folder / f"{name}.py").write_text(code)
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", f"{name}:app", "--port", str(port), "--no-access-log", "--log-level", "error"]
    environment = {**os.environ, "UBIQUO_HOME": str(home.root), "PYTHONPATH": str(ROOT)}
    return port, subprocess.Popen(command, cwd=folder, env=environment)


FORGETFUL = """
from serving.intake import inbox
from serving.intake.event_queue import Turn
def forget(self, entry, done):
    entry.enter(Turn(self._standing, self._clock))
    entry.stored()
    done.set_result(None)
inbox.Inbox.submit = forget
from serving.__main__ import main
main()
"""


def forgetful_service(home: Home, folder: Path) -> Service:
    """The very service, but for an inbox that says it has stored what it has not."""
    (folder / "forgetful.py").write_text(FORGETFUL)
    port = free_port()
    environment = {
        **os.environ, "UBIQUO_HOME": str(home.root), "PYTHONPATH": str(ROOT), "UBIQUO_MAX_WAITING": "10000000",
        "UBIQUO_CLOCK": f"from:{NEW_YEAR.isoformat()}",
    }  # fmt: skip
    command = [sys.executable, "-W", "ignore", "forgetful.py", "--port", str(port)]
    process = subprocess.Popen(
        command, env=environment, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    service = Service(home, port, process)
    for _ in range(600):
        with contextlib.suppress(OSError):
            if service.get("/readyz")[0] == 200:
                return service
        if process.poll() is not None:
            break
        time.sleep(0.2)
    stop_service(service, signal.SIGKILL)
    raise RuntimeError("it did not start")


@contextlib.contextmanager
def standing_still(*processes: subprocess.Popen[bytes]) -> Iterator[None]:
    """Those who share the core do nothing meanwhile: a service that was measured goes on to recompute features."""
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            process.send_signal(signal.SIGCONT)


def settle(home: Home) -> None:
    """Wait until nothing waits for the log."""
    with sqlite3.connect(f"file:{home.inbox}?mode=ro", uri=True) as inbox:
        while inbox.execute("SELECT count(*) FROM waiting").fetchone() != (0,):
            time.sleep(0.05)


def intake(home: Home) -> None:
    folder = home.root / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    reading, reader = endpoint(folder, "reading", READING, home)
    checking, checker = endpoint(folder, "checking", CHECKING, home)
    # a home has one service
    other = copy_home(home, home.root.with_name("forgetful"))
    service: Service = start_service(home, UBIQUO_MAX_WAITING="1000000")
    forgetful = forgetful_service(other, folder)
    rates: dict[str, list[float]] = {}
    settled: list[float] = []
    try:
        cores = sorted(os.sched_getaffinity(0))
        processes = {service.port: service.process, forgetful.port: forgetful.process, reading: reader, checking: checker}
        for process in processes.values():
            pin(process.pid, cores[0])
        os.sched_setaffinity(0, [cores[-1]])
        for port in (service.port, forgetful.port):
            asyncio.run(send(port, "/v1/events", bodies(20)))
        for _ in range(3):
            for name, port, path in (("reads, stores nothing", reading, "/"), ("reads, checks and seals, stores nothing", checking, "/"),
                                     ("the same service with an inbox that stores nothing", forgetful.port, "/v1/events"),
                                     ("**durable intake**", service.port, "/v1/events")):  # fmt: skip
                batches = bodies(BATCHES)
                with standing_still(*(process for its, process in processes.items() if its != port)):
                    began = time.perf_counter()
                    rates.setdefault(name, []).append(asyncio.run(send(port, path, batches)))
                    if port == service.port:
                        settle(home)
                        settled.append(BATCHES * BATCH / (time.perf_counter() - began))
    finally:
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
        stop_service(service)
        stop_service(forgetful, signal.SIGKILL)
        reader.terminate()
        checker.terminate()
    middle = {name: sorted(each)[1] for name, each in rates.items()}
    print("| batches of 100, one core | events/s | durable intake, as a share |\n|---|---|---|")
    for name, each in middle.items():
        print(f"| {name} | {each:.0f} | {middle['**durable intake**'] / each:.2f} |")
    print(
        f"\nWith the log and the online rows of {CUSTOMERS:,} customers brought up to date, all on that core: {sorted(settled)[1]:.0f} events/s."
    )
    stored = connect().execute("SELECT count(*), count(DISTINCT event_id) FROM read_parquet(?)", [EventLog(home, "UTC").files()]).fetchall()
    print(f"\nStored afterwards: {stored[0][0]} events, {stored[0][1]} of them distinct.")


def identity(home: Home) -> None:
    shop = Shop(name="bench", timezone="UTC", currency="USD", data_end=NEW_YEAR)
    shop.save(home)
    TinyShop(home, shop).add(event("first", "login", NEW_YEAR - timedelta(days=9)))
    vault, start = Vault(SECRET.encode()), datetime(2017, 1, 1, tzinfo=UTC)
    people = IDENTIFIERS // 2
    for first in range(0, people, 100_000):
        rows: list[dict[str, Any]] = []
        for k in range(first, min(first + 100_000, people)):
            card, cookie = vault.hash("loyalty_card", f"card-{k}"), vault.hash("cookie", f"cookie-{k}")
            both = [{"key": "loyalty_card", "value": card}, {"key": "cookie", "value": cookie}]
            at = start + timedelta(seconds=k)
            known = {"known_at": at, "received_at": at, "occurred_at": at, "name": "login", "previous": [], "items": [], "traits": []}
            rows.append({"event_id": f"a{k}", "identity_key": f"cookie:{cookie}", "identifiers": both[1:], **known})
            rows.append({"event_id": f"b{k}", "identity_key": f"loyalty_card:{card}", "identifiers": both, **known})
        DeltaFolder(home.events).append(pa.Table.from_pylist(rows, EVENT_SCHEMA))
    code = (
        "import resource, time; from features.state.home import Home; from features.store.identity_rebuild import rebuild\n"
        "began = time.perf_counter(); customers = rebuild(Home.from_environment(), 'UTC')\n"
        "print(customers, time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    )
    environment = {**os.environ, "UBIQUO_HOME": str(home.root), "UBIQUO_SECRET": SECRET}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    customers, seconds, memory = done.stdout.split()
    print(
        f"\nIdentity worked out anew for {IDENTIFIERS:,} identifiers: {int(customers):,} customers, {float(seconds):.0f} s, peak {float(memory):.0f} MB."
    )
    identities = Identities(home, vault)
    keys = [vault.key("cookie", f"cookie-{k}") for k in range(0, people, 50)]
    plain = dict.fromkeys(keys, "c")
    timed = {}
    for name, look in (("dict", plain.get), ("identity", lambda key: identities.owner_of((key,)))):
        began = time.perf_counter()
        for key in keys:
            look(key)
        timed[name] = (time.perf_counter() - began) / len(keys)
    print(
        f"A known identifier is found in {timed['identity'] * 1e9:.0f} ns, {timed['identity'] / timed['dict']:.1f} times one look-up in a dictionary."
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        # the events are invented: they belong in no home that somebody uses
        intake(copy_home(Home.from_environment(), Path(folder) / "home"))
    # from here on everything is invented
    os.environ["UBIQUO_SECRET"] = SECRET
    with tempfile.TemporaryDirectory() as scratch:
        identity(Home(Path(scratch)))


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
