"""Durable intake and identity, measured: ``make bench`` prints the tables.

Server and client have a core each. The floor is an endpoint on the same kind of server that reads the same JSON and acknowledges
it without storing anything.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
from scene import NEW_YEAR, ROOT, SECRET, Service, TinyShop, event, free_port, start_service, stop_service

from features import tables
from features.event_log import EVENT_SCHEMA, EventLog, connect
from features.home import Home
from features.identity import Identities
from features.shop import Shop
from features.vault import Vault

FLOOR = """
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


def intake(home: Home) -> None:
    folder = home.root / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ack.py").write_text(FLOOR)
    port = free_port()
    floor = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", "ack:app", "--port", str(port), "--no-access-log", "--log-level", "error"], cwd=folder
    )
    service: Service = start_service(home, UBIQUO_MAX_WAITING="1000000")
    try:
        cores = sorted(os.sched_getaffinity(0))
        pin(service.process.pid, cores[0])
        pin(floor.pid, cores[0])
        os.sched_setaffinity(0, [cores[-1]])
        asyncio.run(send(service.port, "/v1/events", bodies(20)))
        print("| intake, batches of 100 | events/s | share of acknowledging without storing |\n|---|---|---|")
        rates: dict[str, list[float]] = {"bare uvicorn: read, acknowledge, store nothing": [], "**durable intake** (/v1/events)": []}
        for _ in range(3):
            rates["bare uvicorn: read, acknowledge, store nothing"].append(asyncio.run(send(port, "/", bodies(BATCHES))))
            rates["**durable intake** (/v1/events)"].append(asyncio.run(send(service.port, "/v1/events", bodies(BATCHES))))
        base = sorted(rates["bare uvicorn: read, acknowledge, store nothing"])[1]
        for name, each in rates.items():
            print(f"| {name} | {sorted(each)[1]:.0f} | {sorted(each)[1] / base:.2f} |")
    finally:
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
        stop_service(service)
        floor.terminate()
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
        tables.append(home.events, pa.Table.from_pylist(rows, EVENT_SCHEMA))
    code = (
        "import resource, time; from features.home import Home; from features.identity_rebuild import rebuild\n"
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
    intake(Home.from_environment())
    # from here on everything is invented
    os.environ["UBIQUO_SECRET"] = SECRET
    with tempfile.TemporaryDirectory() as scratch:
        identity(Home(Path(scratch)))


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
