"""``make attack``: what a client, a crash, a full disk and a clock can do to a running service, as one table.

Everything goes to a service on loopback that this starts on a copy of a trained home. ``UBIQUO_ATTACK_SECONDS`` bounds the whole (600);
``UBIQUO_ATTACK_CASES`` says how many fuzzed messages are sent at most (100,000).
"""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import contextlib
import gzip
import http.client
import json
import multiprocessing
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.table import Table
from scene import ROOT, SECRET, Service, command, copy_home, free_port, loyalty_cards, start_service, stop_service, surroundings

os.environ["UBIQUO_SECRET"] = SECRET

from features.state.home import Home
from features.store.event_log import EventLog, connect

DEADLINE_SECONDS = 6.0
"""No answer may come later; what takes long is answered with 202 within it."""
JSON = {"content-type": "application/json"}
ZONE = "America/New_York"


@dataclass
class Row:
    """What one attack did."""

    attack: str
    cases: int = 0
    errors: int = 0
    """Answers 500."""
    hangs: int = 0
    """Answers later than the deadline, or none."""
    acknowledged: int = 0
    lost: int = 0
    twice: int = 0
    stalls: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def held(self) -> bool:
        return not (self.errors or self.hangs or self.lost or self.twice)


def live(name: str, **more: Any) -> dict[str, Any]:
    return {"event_id": uuid.uuid4().hex, "name": name, "occurred_at": "2018-01-01T05:00:00Z", **more}


def corpus() -> Iterator[tuple[str, str, dict[str, str], bytes]]:
    """Every message that was ever found to do harm, and its kin: method, path, headers, body."""
    huge = ["1e99999999", "1e300000", "-1e300000", "1e400", "9" * 4_000, "-0.0", "1e-99999999", "NaN", "Infinity", "0." + "0" * 5_000 + "1"]
    for number in huge:
        for key in ("quantity", "price", "value", "revenue"):
            for said in (number, f'"{number}"'):
                line = f'"{key}": {said}}}'
                products = f'"properties": {{"currency": "USD", "products": [{{"product_id": "1082185", {line}]}}'
                track = f'{{"type": "track", "event": "Order Completed", "userId": "u", "messageId": "{uuid.uuid4().hex}", {products}}}'
                yield "POST", "/v1/batch", JSON, f'{{"batch": [{track}]}}'.encode()
                params = f'"params": {{"currency": "USD", "items": [{{"item_id": "1082185", {line}]}}'
                yield "POST", "/mp/collect", JSON, f'{{"client_id": "1.2", "events": [{{"name": "purchase", {params}}}]}}'.encode()
        items = f'"items": [{{"item_id": "1", "quantity": {number}}}]'
        yield (
            "POST",
            "/v1/events",
            JSON,
            f'{{"event_id": "n", "name": "purchase", "occurred_at": "2018-01-01T05:00:00Z", {items}}}'.encode(),
        )
        yield "POST", "/v1/recommendations", JSON, f'{{"limit": {number}}}'.encode()
    many = ", ".join(f'{{"product_id": "p{k}", "quantity": 1e40000}}' for k in range(200))
    yield "POST", "/v1/track", JSON, f'{{"event": "Order Completed", "userId": "u", "properties": {{"products": [{many}]}}}}'.encode()
    # a poisoned identity
    yield "POST", "/v1/alias", JSON, json.dumps({"anonymousId": "B", "previousId": "B", "messageId": uuid.uuid4().hex}).encode()
    zoe = {
        "type": "track",
        "event": "Order Completed",
        "userId": "zoe",
        "messageId": uuid.uuid4().hex,
        "properties": {"products": [{"product_id": "1082185"}]},
    }
    for who in ("bob", "ann"):
        identify = {"type": "identify", "userId": who, "anonymousId": "B", "messageId": uuid.uuid4().hex}
        yield "POST", "/v1/batch", JSON, json.dumps({"batch": [zoe, identify]}).encode()
    # long texts
    for text in ("a" * 900_000, "+1" * 400_000, "a@" * 300_000, "%40" * 200_000, "1 " * 400_000, "." * 900_000):
        yield "POST", "/v1/identify", JSON, json.dumps({"userId": "u", "traits": {"note": text}}).encode()
        yield "POST", "/v1/track", JSON, json.dumps({"userId": "u", "event": "Searched", "properties": {"query": text[:30_000]}}).encode()
        yield "POST", "/v1/events", JSON, json.dumps(live("search", query=text)).encode()
    # large purchases of one customer, then a question
    for k in range(8):
        items = [{"item_id": f"i{k}-{n}"} for n in range(5_000)]
        yield "POST", "/v1/events", JSON, json.dumps(live("purchase", identifiers={"user_id": "hoarder"}, items=items)).encode()
        items = items[:1_000]
        yield "POST", "/v1/events", JSON, json.dumps(live("purchase", identifiers={"user_id": "hoarder"}, items=items)).encode()
    for path in ("recommendations", "next-best-offer", "churn", "profile"):
        yield "POST", f"/v1/{path}", JSON, json.dumps({"identifiers": {"user_id": "hoarder"}}).encode()
    # nesting, odd JSON, odd text
    for body in (b"[" * 200_000, b'{"a":' * 100_000, b"", b"null", b"[]", b"{}", b'"x"', b"7", b"\xff\xfe\x00", b'{"events": []}', b'{"events": {}}',
                 b'{"batch": [null, 1, "x", [], {}]}', b'{"events": [null, 1, "x", [], {}]}', b'{"request": 7}', b'{"request": {}}',
                 json.dumps(live("identify", identifiers={"email": "\ud800@x.org"})).encode(), json.dumps(live("login", identifiers={"user_id": "\x00"})).encode()):  # fmt: skip
        for path in (
            "/v1/events",
            "/v1/batch",
            "/v1/track",
            "/v1/import",
            "/mp/collect",
            "/v1/recommendations",
            "/v1/churn",
            "/v1/profile",
            "/bento/events",
            "/bento/churn",
        ):
            yield "POST", path, JSON, body
    # kinds of bodies
    part = b'--b\r\ncontent-disposition: form-data; name="request"\r\n\r\n{}\r\n--b--\r\n'
    for path in ("/bento/events", "/bento/recommendations", "/v1/events", "/v1/batch"):
        yield "POST", path, {"content-type": "multipart/form-data; boundary=b"}, part
        yield "POST", path, {"content-type": "multipart/form-data"}, part
        yield "POST", path, {"content-type": "text/plain"}, b"{}"
        yield "POST", path, {}, b"{}"
        yield "POST", path, {"content-type": "application/vnd.bentoml+pickle"}, b"\x80\x04."
        yield "POST", path, {**JSON, "content-encoding": "gzip"}, b"\x1f\x8b\x08no gzip"
        yield "POST", path, {**JSON, "content-encoding": "gzip"}, gzip.compress(b"x" * 30_000_000)
    # upgrades, keys, methods, paths
    upgrade = {
        "connection": "Upgrade",
        "upgrade": "websocket",
        "sec-websocket-version": "13",
        "sec-websocket-key": base64.b64encode(b"0" * 16).decode(),
    }
    for path in ("/", "/v1/events", "/bento/events", "/readyz"):
        yield "GET", path, upgrade, b""
        yield "GET", path, {"authorization": "Basic \xff\xfe"}, b""
        yield "GET", path, {"authorization": "Bearer " + "x" * 20_000}, b""
        for method in ("PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "TRACE"):
            yield method, path, JSON, b""
    for path in (
        "/v1/customers/%00",
        "/v1/customers/" + "x" * 8_000,
        "/v1/customers/%ff%fe",
        "/v1/customers/..%2f..%2fetc/export",
        "/v1/erasures/%2e%2e",
        "/v1/results/x",
        "/docs.json",
        "/schema.json",
        "/%",
        "//",
        "/v1//events",
    ):
        for method in ("GET", "DELETE", "POST"):
            yield method, path, JSON, b""
    for path in ("recommendations", "similar-items", "next-best-offer"):
        for field_ in ("include", "exclude"):
            yield "POST", f"/v1/{path}", JSON, json.dumps({"item_id": "x", field_: {"department": ["ada@shop.org"] * 3_000}}).encode()
            yield "POST", f"/v1/{path}", JSON, json.dumps({"item_id": "x", field_: {"x" * 9_000: ["y"]}}).encode()
        yield "POST", f"/v1/{path}", JSON, json.dumps({"item_id": "x", "exclude_item_ids": ["ada%2540shop.org"]}).encode()


TEXTS = [
    "",
    "x",
    "1082185",
    "ada@shop.org",
    "%2540",
    "+4915112345678",
    "\x00",
    "\ud7ff",
    "é" * 300,
    "a" * 5_000,
    "null",
    "2018-01-01T05:00:00Z",
    "USD",
    "web",
    "B",
]
NUMBERS = [0, 1, -1, 2**31, 2**63, 2**70, -(2**70), 0.5, 1e308, 1e-320]
KEYS = ["event_id", "name", "occurred_at", "identifiers", "items", "item_id", "quantity", "amount_minor", "currency", "channel", "traits", "previous", "consent", "purposes",
        "type", "event", "userId", "anonymousId", "previousId", "messageId", "timestamp", "sentAt", "properties", "products", "product_id", "price", "context",
        "client_id", "events", "params", "batch", "value", "revenue", "limit", "listing", "include", "exclude", "customer_id", "request", "externalIds", "groupId"]  # fmt: skip
NAMES = [
    "view_item",
    "purchase",
    "alias",
    "identify",
    "consent_update",
    "search",
    "Order Completed",
    "Product Viewed",
    "page_view",
    "custom",
    "refund",
]
KINDS = ["loyalty_card", "user_id", "email", "phone", "device", "cookie", "receipt"]
PATHS = ["/v1/events", "/v1/batch", "/v1/track", "/v1/identify", "/v1/alias", "/v1/page", "/v1/screen", "/v1/group", "/v1/import", "/mp/collect",
         "/v1/recommendations", "/v1/similar-items", "/v1/next-best-offer", "/v1/churn", "/bento/events", "/bento/churn"]  # fmt: skip


class Grammar:
    """Messages that are nearly right: a good one, with some of its parts replaced, left out or made large."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def value(self, depth: int = 0) -> Any:
        pick = self.random.random()
        if depth > 4 or pick < 0.45:
            return self.random.choice(TEXTS)
        if pick < 0.6:
            return self.random.choice(NUMBERS)
        if pick < 0.7:
            return self.random.choice([None, True, False, [], {}])
        if pick < 0.85:
            return [self.value(depth + 1) for _ in range(self.random.randrange(4))]
        return {self.random.choice(KEYS + KINDS): self.value(depth + 1) for _ in range(self.random.randrange(4))}

    def good(self, path: str) -> Any:
        r = self.random
        who = {
            r.choice(KINDS): r.choice(["B", "C", "ada@shop.org", "+14155550100", f"u{r.randrange(500)}"]) for _ in range(r.randrange(1, 3))
        }
        if path in ("/v1/events", "/bento/events"):
            said = live(r.choice(NAMES), identifiers=who, channel="web", items=[{"item_id": "1082185", "quantity": r.randrange(5)}])
            if said["name"] == "alias":
                said["previous"] = {"cookie": r.choice("BC")}
            if said["name"] == "consent_update":
                said["consent"] = {"purposes": {"personalization": r.random() < 0.5}}
            return {"request": said} if path.startswith("/bento") else said
        if path == "/mp/collect":
            return {
                "client_id": r.choice("BC"),
                "events": [{"name": r.choice(NAMES), "params": {"items": [{"item_id": "1082185", "price": 1.5}], "currency": "USD"}}],
            }
        message = {"type": r.choice(["track", "identify", "alias", "page"]), "messageId": uuid.uuid4().hex, "userId": r.choice(["ann", "bob", "B"]),
                   "anonymousId": r.choice("BC"), "previousId": r.choice("BC"), "event": r.choice(NAMES), "properties": {"products": [{"product_id": "1082185", "price": "2.5"}]},
                   "traits": {"email": "ada@shop.org"}}  # fmt: skip
        if path in ("/v1/batch", "/v1/import"):
            return {"batch": [message, self.value()]}
        if path.startswith(("/v1/rec", "/v1/next", "/v1/churn", "/v1/similar", "/bento")):
            asked = {"identifiers": who, "limit": r.randrange(0, 12)} | ({"item_id": "1082185"} if "similar" in path else {})
            return {"request": asked} if path.startswith("/bento") else asked
        return message

    def mutated(self, said: Any, depth: int = 0) -> Any:
        if self.random.random() < 0.12:
            return self.value(depth)
        if isinstance(said, dict):
            kept = {k: self.mutated(v, depth + 1) for k, v in said.items() if self.random.random() > 0.06}
            if self.random.random() < 0.1:
                kept[self.random.choice(KEYS)] = self.value(depth)
            return kept
        if isinstance(said, list):
            return [self.mutated(v, depth + 1) for v in said for _ in range(1 if self.random.random() < 0.95 else 3)]
        return said

    def case(self) -> tuple[str, str, dict[str, str], bytes]:
        path = self.random.choice(PATHS)
        body = json.dumps(self.mutated(self.good(path))).encode()
        if self.random.random() < 0.02:
            at = self.random.randrange(len(body) + 1)
            body = body[:at] + self.random.randbytes(3) + body[at:]
        return "POST", path, JSON, body


class Client:
    """One connection that sends cases and counts what comes of them."""

    def __init__(self, port: int, row: Row, examples: list[str]) -> None:
        self.port, self.row, self.examples = port, row, examples
        self.connection: http.client.HTTPConnection | None = None

    def send(self, method: str, path: str, headers: dict[str, str], body: bytes) -> int | None:
        began = time.monotonic()
        status = None
        for attempt in range(2):
            fresh = self.connection is None
            try:
                if self.connection is None:
                    self.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_SECONDS + 4)
                self.connection.putrequest(method, path, skip_accept_encoding=True)
                for name, value in {**headers, "content-length": str(len(body))}.items():
                    self.connection.putheader(name, value.encode("latin-1"))
                self.connection.endheaders(body)
                with self.connection.getresponse() as response:
                    response.read()
                    status = response.status
                    if response.will_close:
                        self.close()
                break
            except TimeoutError:
                self.close()
                break
            except (OSError, http.client.HTTPException, ValueError):
                self.close()
                # a kept connection may have been closed meanwhile: once more on a new one
                if fresh or attempt:
                    break
        self.row.cases += 1
        late = time.monotonic() - began > DEADLINE_SECONDS
        if status is not None and status >= 500 and status not in (503, 507):
            self.row.errors += 1
            self.examples.append(f"{status}: {method} {path[:60]} {body[:300]!r}")
        if late or (status is None and not self.answers()):
            self.row.hangs += 1
            self.examples.append(f"late or silent: {method} {path[:60]} {body[:300]!r}")
        return status

    def answers(self) -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException):
            probe = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_SECONDS)
            probe.request("GET", "/livez")
            return probe.getresponse().status == 200
        return False

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None


def metric(service: Service, name: str) -> float:
    found = re.search(rf"^{name} ([0-9.e+-]+)$", service.get("/metrics")[1], re.M)
    assert found is not None, name
    return float(found.group(1))


def on_all(
    service: Service, row: Row, cases: Iterator[tuple[str, str, dict[str, str], bytes]], threads: int, until: float, examples: list[str]
) -> None:
    lock = threading.Lock()

    def work() -> None:
        client = Client(service.port, row, examples)
        while time.monotonic() < until:
            with lock:
                case = next(cases, None)
            if case is None:
                break
            client.send(*case)
        client.close()

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def attack_corpus(service: Service, examples: list[str]) -> Row:
    row = Row("every message that did harm once")
    before = metric(service, "ubiquo_loop_stalls")
    on_all(service, row, corpus(), 2, time.monotonic() + 300, examples)
    row.stalls = int(metric(service, "ubiquo_loop_stalls") - before)
    row.notes.append(f"longest on the loop {metric(service, 'ubiquo_loop_busy_seconds') * 1000:.0f} ms of processor")
    status, body = service.get("/readyz")
    if status != 200:
        row.errors += 1
        examples.append(f"not ready after the corpus: {body}")
    return row


def attack_grammar(service: Service, most: int, seconds: float, examples: list[str], seed: int = 0) -> Row:
    row, grammar = Row("own grammar"), Grammar(seed)
    before = metric(service, "ubiquo_loop_stalls")
    on_all(service, row, (grammar.case() for _ in range(most)), 8, time.monotonic() + seconds, examples)
    row.stalls = int(metric(service, "ubiquo_loop_stalls") - before)
    return row


def attack_schema(service: Service, seconds: float, examples: list[str]) -> Row:
    """Schemathesis over the published description of all routes."""
    row = Row("schemathesis, all routes")
    before = metric(service, "ubiquo_loop_stalls")
    program = str(Path(sys.executable).with_name("schemathesis"))
    url = f"http://127.0.0.1:{service.port}/openapi.json"
    arguments = ["run", url, "--checks", "not_a_server_error", "--phases", "examples,coverage,fuzzing", "--max-examples", "400", "--request-timeout", "8",
                 "--continue-on-failure", "--suppress-health-check", "all", "--no-color", "--workers", "2", "--generation-database", "none", "--max-time", str(int(seconds))]  # fmt: skip
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=seconds + 120, cwd=tempfile.gettempdir())
    found = re.search(r"([\d,]+) (?:generated|test cases)", done.stdout) or re.search(r"Test cases:\s*\n\s*([\d,]+)", done.stdout)
    row.cases = int(found.group(1).replace(",", "")) if found else 0
    if done.returncode not in (0,) and ("Server error" in done.stdout or not row.cases):
        row.errors += max(1, done.stdout.count("Server error"))
        examples.append(done.stdout[-3_000:])
    row.stalls = int(metric(service, "ubiquo_loop_stalls") - before)
    return row


def attack_connections(service: Service, examples: list[str]) -> Row:
    """Many that never finish their headers, or their body; everybody else is answered meanwhile."""
    row = Row("1,500 half-sent headers, slow bodies")
    held = []
    for k in range(1_500):
        with contextlib.suppress(OSError):
            connection = socket.create_connection(("127.0.0.1", service.port), timeout=5)
            connection.send(
                b"POST /v1/events HTTP/1.1\r\nhost: x\r\n"
                + (b"content-type: application/json\r\ncontent-length: 900000\r\n\r\n{" if k % 10 == 0 else b"x-slow: ")
            )
            held.append(connection)
        row.cases += 1
        if k % 50 == 0:
            client = Client(service.port, row, examples)
            if client.send("POST", "/v1/recommendations", JSON, b"{}") != 200:
                row.hangs += 1
                examples.append(f"not answered beside {k} half-sent requests")
            client.close()
    for connection in held:
        connection.close()
    return row


def acknowledged_by(port: int, seconds: float, taken: list[str] | None = None, size: int = 20) -> list[str]:
    """Send batches until the service goes away or the time is up; the ids that were acknowledged."""
    taken = [] if taken is None else taken
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    until = time.monotonic() + seconds
    with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
        while time.monotonic() < until:
            batch = [
                live("view_item", identifiers={"cookie": f"k{random.randrange(2_000)}"}, items=[{"item_id": "1082185"}])
                for _ in range(size)
            ]
            connection.request("POST", "/v1/events", json.dumps({"events": batch}), JSON)
            with connection.getresponse() as response:
                answer = json.load(response)
                if response.status == 200:
                    taken += [each["event_id"] for each in answer["events"] if each["status"] == "accepted"]
                elif response.status == 429:
                    time.sleep(0.2)
    return taken


def stored(home: Home) -> Counter[str]:
    rows = connect().execute("SELECT event_id FROM read_parquet(?)", [EventLog(home, ZONE).files()]).fetchall()
    return Counter(name for (name,) in rows)


class Sender(threading.Thread):
    """Sends batches until the service goes away."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.port, self.taken = port, list[str]()

    def run(self) -> None:
        acknowledged_by(self.port, 30, self.taken)


def _quietly(service: Service, path: str) -> None:
    # it is killed while it answers
    with contextlib.suppress(OSError, http.client.HTTPException):
        service.get(path, "DELETE")


def attack_kills(home: Home, kills: int, until: float) -> Row:
    """Kill -9 of intake, drain, erasure, materialization, scoring and training, at random moments."""
    row, chance = Row("kill -9 at random moments"), random.Random(1)
    acknowledged: list[str] = []
    starts: list[float] = []
    cards = loyalty_cards(home)
    for k in range(kills):
        if time.monotonic() > until:
            row.notes.append(f"out of time after {k} kills")
            break
        row.cases += 1
        if k % 4 == 3:
            arguments = [
                ("features", "materialize"),
                ("serving", "score", "churn", "--out", str(home.root / "scored.parquet")),
                ("training", "churn"),
            ][k // 4 % 3]
            process = subprocess.Popen([sys.executable, "-W", "ignore", "-m", *arguments], cwd=ROOT, env={**surroundings(), "UBIQUO_HOME": str(home.root)},
                                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
            time.sleep(chance.uniform(3, 12))
            process.kill()
            process.wait()
            continue
        began = time.monotonic()
        service = start_service(home)
        starts.append(time.monotonic() - began)
        clients = [Sender(service.port) for _ in range(3)]
        for client in clients:
            client.start()
        time.sleep(chance.uniform(0.1, 3.5))
        if k % 4 == 1:
            status, profile = service.post("/v1/profile", {"identifiers": {"loyalty_card": cards[k]}})
            if status == 200:
                eraser = threading.Thread(target=_quietly, args=(service, f"/v1/customers/{profile['customer_id']}"), daemon=True)
                eraser.start()
                time.sleep(chance.uniform(0.0, 1.5))
        stop_service(service, signal.SIGKILL)
        for client in clients:
            client.join(60)
            acknowledged += client.taken
    service = start_service(home)
    stop_service(service)
    held = stored(home)
    row.acknowledged, row.lost = len(acknowledged), sum(name not in held for name in acknowledged)
    row.twice = sum(count > 1 for count in held.values())
    row.notes.append(f"ready again in {statistics.median(starts):.1f} s at the median, {max(starts):.1f} s at most")
    return row


@contextlib.contextmanager
def small_disk(size: str, place: Path) -> Iterator[Path]:
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(path: Path, leave: int = 0) -> None:
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 1_000_000)
    if leave:
        with open(path, "r+b") as file:
            file.truncate(max(0, path.stat().st_size - leave))


def attack_full_disk(made: Home, folder: Path, examples: list[str]) -> Row:
    row = Row("a full disk")
    size = sum(path.stat().st_size for path in made.root.rglob("*") if path.is_file())
    with small_disk(f"{size // 1_000_000 + 260}m", folder / "small") as place:
        home = copy_home(made, place / "home")
        service = start_service(home)
        taken = acknowledged_by(service.port, 1.0)
        filler = place / "filler"
        fill(filler)
        client = Client(service.port, row, examples)
        log = next(home.root.glob("service-*.log"))
        lines = len(log.read_bytes().splitlines())
        answers: Counter[tuple[str, int | None]] = Counter()
        until = time.monotonic() + 10
        while time.monotonic() < until:
            answers["ask", client.send("POST", "/v1/recommendations", JSON, b"{}")] += 1
            answers["ask", client.send("POST", "/v1/churn", JSON, b"{}")] += 1
            answers["event", client.send("POST", "/v1/events", JSON, json.dumps(live("login", identifiers={"cookie": "c"})).encode())] += 1
        written = len(log.read_bytes().splitlines()) - lines
        ready = service.get("/readyz")[0]
        row.notes.append(f"full for 10 s: answers {dict(answers)}, readyz {ready}, {written} log lines")
        if set(answers) != {("ask", 200), ("event", 507)} or ready != 503:
            row.errors += 1
            examples.append(f"full disk: {dict(answers)}, readyz {ready}")
        stop_service(service, signal.SIGKILL)
        refused = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "serving", "--port", str(free_port())],
            cwd=ROOT, env={**surroundings(), "UBIQUO_HOME": str(home.root)}, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        row.notes.append(f"started on the full disk: exit {refused.returncode}, {refused.stdout.strip().splitlines()[-1:]}")
        if refused.returncode != 1 or "error:" not in refused.stdout or "Traceback" in refused.stdout + refused.stderr:
            row.errors += 1
            examples.append(refused.stdout[-1_000:] + refused.stderr[-1_000:])
        filler.unlink()
        service = start_service(home)
        row.notes.append("with room again it is ready")
        taken += acknowledged_by(service.port, 1.0)
        stop_service(service)
        held = stored(home)
        row.acknowledged, row.lost, row.twice = len(taken), sum(name not in held for name in taken), sum(n > 1 for n in held.values())
    return row


def attack_power_cut(made: Home, folder: Path, examples: list[str], copies: int = 6) -> Row:
    """Copies of the disk while a service takes events in and erases customers: whatever was promised by then must be on each."""
    row = Row("the power is cut while a customer is erased")
    size = sum(path.stat().st_size for path in made.root.rglob("*") if path.is_file())
    image, place = folder / "image", folder / "disk"
    place.mkdir()
    with open(image, "wb") as file:
        file.truncate(3 * size + 400_000_000)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    cards, taken, promised = loyalty_cards(made), list[str](), list[tuple[Path, list[str], set[str]]]()
    with mounted_image(image, place):
        home = copy_home(made, place / "home")
        # what was there before is on the disk
        os.sync()
        service = start_service(home)
        sender = Sender(service.port)
        sender.taken = taken
        sender.start()
        erased: set[str] = set()

        def erase() -> None:
            for card in cards[: copies // 2]:
                _, profile = service.post("/v1/profile", {"identifiers": {"loyalty_card": card}})
                status, answer = service.get(f"/v1/customers/{profile['customer_id']}", "DELETE")
                receipt = json.loads(answer)
                while status == 202:
                    time.sleep(0.1)
                    status, answer = service.get(f"/v1/erasures/{receipt['receipt_id']}")
                if status == 200:
                    erased.add(card)

        eraser = threading.Thread(target=erase, daemon=True)
        eraser.start()
        for k in range(copies):
            # while one is erased, and at once when a receipt is given
            before, until = len(erased), time.monotonic() + (1.5 if k % 2 == 0 else 30)
            while len(erased) == before and time.monotonic() < until and eraser.is_alive():
                time.sleep(0.02)
            by_then = list(taken), set(erased)
            service.process.send_signal(signal.SIGSTOP)
            copy = folder / f"image-{k}"
            subprocess.run(["cp", "--sparse=always", str(image), str(copy)], check=True)
            service.process.send_signal(signal.SIGCONT)
            promised.append((copy, *by_then))
        eraser.join(120)
        stop_service(service, signal.SIGKILL)
        sender.join(60)
    for copy, acknowledged, gone in promised:
        row.cases += 1
        with mounted_image(copy, place):
            home = Home(place / "home")
            service = start_service(home)
            for card in sorted(gone):
                if service.post("/v1/profile", {"identifiers": {"loyalty_card": card}})[0] != 404:
                    row.errors += 1
                    examples.append(f"{copy.name}: a customer who was erased is there again")
            for card in cards[copies:][:5]:
                if service.post("/v1/profile", {"identifiers": {"loyalty_card": card}})[0] != 200:
                    row.errors += 1
                    examples.append(f"{copy.name}: a customer who was there is gone")
            stop_service(service)
            held = stored(home)
            row.acknowledged += len(acknowledged)
            row.lost += sum(name not in held for name in acknowledged)
            row.twice += sum(count > 1 for count in held.values())
        copy.unlink()
    row.notes.append(f"erased by the last copy: {len(promised[-1][2])} of {copies // 2}")
    return row


@contextlib.contextmanager
def mounted_image(image: Path, place: Path) -> Iterator[None]:
    subprocess.run(["mount", "-o", "loop", str(image), str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@dataclass
class Timed:
    """What came of requests that were sent at a steady rate, whether or not earlier ones were answered."""

    statuses: Counter[int | None] = field(default_factory=Counter)
    good: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)

    def centile(self, which: float, of: list[float]) -> float:
        return sorted(of)[min(len(of) - 1, int(which * len(of)))] * 1000 if of else float("nan")


def open_loop(port: int, rate: float, seconds: float, body: bytes, connections: int = 64) -> Timed:
    """An open loop: each request is due at its moment and timed from it (wrk2's correction for coordinated omission).

    In a process of its own, on one thread: a client that shares the interpreter with others would time itself.
    """
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_open_loop, port, rate, seconds, body, connections).result()


def _open_loop(port: int, rate: float, seconds: float, body: bytes, connections: int) -> Timed:
    return uvloop.run(_sent(port, rate, seconds, body, connections))


async def _sent(port: int, rate: float, seconds: float, body: bytes, connections: int) -> Timed:
    timed = Timed()
    head = f"POST /v1/recommendations HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    request = head.encode() + body
    idle: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter] | None] = asyncio.Queue()
    for _ in range(connections):
        idle.put_nowait(None)

    async def one(due: float) -> None:
        streams = await idle.get()
        sent, status = time.monotonic(), None
        try:
            async with asyncio.timeout(30):
                reader, writer = streams or await asyncio.open_connection("127.0.0.1", port)
                streams = reader, writer
                writer.write(request)
                answer = await reader.readuntil(b"\r\n\r\n")
                status = int(answer[9:12])
                await reader.readexactly(int(re.search(rb"content-length: (\d+)", answer).group(1)))  # type: ignore[union-attr]
        except (OSError, asyncio.IncompleteReadError, TimeoutError):
            if streams is not None:
                streams[1].close()
            streams = None
        now = time.monotonic()
        idle.put_nowait(streams)
        timed.statuses[status] += 1
        if status == 200:
            timed.good.append(now - due)
        elif status in (429, 503):
            # from when it was sent: the client's own lateness is not the service's
            timed.refused.append(now - sent)

    began = time.monotonic() + 0.2
    async with asyncio.TaskGroup() as tasks:
        for k in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, began + k / rate - time.monotonic()))
            tasks.create_task(one(began + k / rate))
    while not idle.empty():
        streams = idle.get_nowait()
        if streams is not None:
            streams[1].close()
    return timed


def attack_overload(service: Service, seconds: float, examples: list[str]) -> Row:
    row = Row("twice the capacity, open loop")
    body = json.dumps({"identifiers": {"loyalty_card": loyalty_cards(service.home)[0]}, "limit": 10}).encode()
    # as many at once as are never refused: what comes back then is the capacity
    probe = open_loop(service.port, 3_000, 4, body, connections=8)
    capacity = len(probe.good) / max(probe.good)
    half = open_loop(service.port, capacity / 2, seconds, body)
    twice = open_loop(service.port, capacity * 2, seconds, body)
    time.sleep(5)
    after = open_loop(service.port, capacity / 2, seconds / 2, body)
    for name, each in (("half", half), ("twice", twice), ("after", after)):
        row.cases += sum(each.statuses.values())
        row.hangs += each.statuses[None]
        row.notes.append(
            f"{name}: p50 {each.centile(0.5, each.good):.1f} p99 {each.centile(0.99, each.good):.1f} ms, {dict(each.statuses)}, "
            f"refused in p50 {each.centile(0.5, each.refused):.1f} p99 {each.centile(0.99, each.refused):.1f} ms"
        )
    row.notes.insert(0, f"capacity {capacity:.0f}/s; half: p99 = {half.centile(0.99, half.good) / half.centile(0.5, half.good):.1f} x p50")
    return row


def attack_clock(made: Home, folder: Path, examples: list[str]) -> Row:
    """The machine's clock, 30 days ahead for 8 seconds."""
    row = Row("a clock that leaps by 30 days")
    library = next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))), None)
    if library is None:
        row.notes.append("not run: libfaketime is not installed (apt-get install faketime)")
        return row
    home, says = copy_home(made, folder / "clock"), folder / "says"
    says.write_text("+0")
    service = start_service(
        home,
        UBIQUO_CLOCK="system",
        LD_PRELOAD=str(library),
        FAKETIME_TIMESTAMP_FILE=str(says),
        FAKETIME_NO_CACHE="1",
        DONT_FAKE_MONOTONIC="1",
    )
    client = Client(service.port, row, examples)
    wrong = 0

    def touch() -> None:
        nonlocal wrong
        client.send("POST", "/v1/events", JSON, json.dumps({**live("login", identifiers={"cookie": "c"})}).encode())
        _, answer = service.post("/v1/churn", {"identifiers": {"cookie": "c"}})
        wrong += abs(time.time() - _moment(answer["as_of"])) > 30

    for _ in range(5):
        touch()
    says.write_text("+30d")
    ahead = time.monotonic() + 8
    seen = 0
    while time.monotonic() < ahead:
        touch()
        seen = max(seen, int(service.get("/readyz")[0] == 503))
        time.sleep(0.3)
    says.write_text("+0")
    for _ in range(5):
        touch()
    time.sleep(2)
    ready = service.get("/readyz")[0]
    stop_service(service)
    rows = connect().execute("SELECT max(known_at) FROM read_parquet(?)", [EventLog(home, ZONE).files()]).fetchall()
    late = rows[0][0].timestamp() - time.time()
    row.notes.append(
        f"answers off by more than 30 s: {wrong}; readyz said so: {bool(seen)}, and 200 after: {ready == 200}; last event known {late:.0f} s from now"
    )
    if wrong or late > 60 or not seen or ready != 200:
        row.errors += 1
        examples.append(row.notes[-1])
    return row


def _moment(text: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(text).timestamp()


def show(rows: list[Row], console: Console) -> None:
    table = Table(
        "attack", "cases", "500s", "hangs", "acknowledged", "lost", "twice", "stalls > 100 ms", title="what was tried, and what came of it"
    )
    for row in rows:
        table.add_row(
            row.attack, f"{row.cases:,}", *(f"{n:,}" for n in (row.errors, row.hangs, row.acknowledged, row.lost, row.twice, row.stalls))
        )
    console.print(table)
    for row in rows:
        for note in row.notes:
            console.print(f"{row.attack}: {note}", highlight=False)


def trained_home(folder: Path) -> Home:
    """A trained home, made by the README's commands on a small cut of the real data."""
    given = os.environ.get("UBIQUO_TEST_HOME")
    if given:
        return copy_home(Home(Path(given)), folder / "made")
    home = Home(folder / "made")
    for arguments in (("features", "import", "complete-journey", "--households", "1200"), ("features", "materialize"), ("training", "all")):
        done = command(*arguments, home=home.root)
        assert done.returncode == 0, done.stdout + done.stderr
    return home


def main() -> int:
    console = Console(width=180)
    budget = float(os.environ.get("UBIQUO_ATTACK_SECONDS", "600"))
    most = int(os.environ.get("UBIQUO_ATTACK_CASES", "100000"))
    kills = int(os.environ.get("UBIQUO_KILLS", "40"))
    examples: list[str] = []
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        made = trained_home(folder)
        began = time.monotonic()
        service = start_service(copy_home(made, folder / "open"))

        def run(attack: Callable[..., Row], *arguments: Any) -> None:
            rows.append(attack(*arguments, examples))
            console.print(f"{time.monotonic() - began:5.0f} s: {rows[-1].attack}: {'held' if rows[-1].held else 'DID NOT HOLD'}")

        run(attack_corpus, service)
        run(attack_connections, service)
        run(attack_overload, service, budget * 0.02)
        run(attack_schema, service, budget * 0.12)
        run(attack_grammar, service, most, budget * 0.25)
        stop_service(service)
        run(attack_full_disk, made, folder)
        run(attack_power_cut, made, folder)
        run(attack_clock, made, folder)
        rows.append(attack_kills(copy_home(made, folder / "killed"), kills, began + budget))
    show(rows, console)
    for example in examples[:20]:
        console.print(example, highlight=False)
    return 0 if all(row.held for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
