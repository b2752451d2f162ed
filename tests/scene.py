"""What the tests act on: commands, a tiny invented shop, a running service."""

from __future__ import annotations

import gc
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any

import psutil
from warm import Forge, Forked

from features.catalogue.shop import Shop
from features.events.event import parse_event
from features.people.contacts import Contacts
from features.people.identity import Identities
from features.people.identity_state import mint_customer_id
from features.people.vault import Vault
from features.state.home import Home
from features.store.event_index import Incoming
from features.store.event_log import EventLog
from features.store.feature_store import FeatureStore
from serving.intake.event_queue import Accepted, Refused, Turn

Process = subprocess.Popen[bytes] | Forked
ROOT = Path(__file__).resolve().parent.parent
SMALL_CUT = 1200
NEW_YEAR = datetime(2018, 1, 1, 5, tzinfo=UTC)
"""Where the real data ends: midnight in New York."""


SECRET = "a secret that only the tests know" * 2
"""One for all homes, so that what is hashed in two of them can be compared."""


def customer(card: str) -> str:
    """The id of the customer who was first seen with this loyalty card."""
    return mint_customer_id(Vault(SECRET.encode()).key("loyalty_card", card))


def loyalty_cards(home: Home) -> list[str]:
    """Every loyalty card of the home, in clear, in the order of the cards."""
    identities = Identities(home)
    keys = [key for key in identities.strongest().values() if key.startswith("loyalty_card:")]
    return sorted(Contacts(home, identities.vault).identifiers(keys).values())


def surroundings() -> dict[str, str]:
    """This process's environment without what MLflow leaves in it, so that each home keeps to its own registry."""
    return {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_TRACKING")}


forge: Forge | None = None
"""What forks the processes of commands and services; without it each is an interpreter of its own."""


def launched(module: str, arguments: Sequence[str], environment: Mapping[str, str], out: IO[bytes], err: IO[bytes], fresh: bool) -> Process:
    """``python -m MODULE ARGUMENTS`` in a process, which imports everything itself if it is to be *fresh*."""
    if forge is not None and not fresh:
        return forge.run(module, list(arguments), environment, out, err)
    line = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    return subprocess.Popen(line, cwd=ROOT, env=environment, stdout=out, stderr=err, start_new_session=True)


def command(
    module: str, *arguments: str, home: Path, timeout: float = 600, fresh: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run one of ubiquo's commands as a user would."""
    surrounding = {**surroundings(), "UBIQUO_HOME": str(home), "COLUMNS": "200", **environment}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = launched(module, arguments, surrounding, out, err, fresh)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        said = []
        for file in (out, err):
            file.seek(0)
            said.append(file.read().decode())
    return subprocess.CompletedProcess([module, *arguments], process.returncode, *said)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


LINE = ("item_id", "quantity", "amount_minor", "coupon_minor")


def event(event_id: str, name: str, at: datetime, card: str | None = "1", items: Any = (), **more: Any) -> dict[str, Any]:
    """A raw event as a client would send it; items are ids, or (id, quantity, cents), or with a coupon's cents too."""
    lines = [{"item_id": i} if isinstance(i, str) else dict(zip(LINE, i, strict=False)) for i in items]
    who = {} if card is None else {"identifiers": {"loyalty_card": card}}
    return {"event_id": event_id, "name": name, "occurred_at": at.isoformat(), "items": lines, "currency": "USD", **who, **more}


@dataclass
class TinyShop:
    """An invented shop whose log is written event by event."""

    home: Home
    shop: Shop

    @property
    def log(self) -> EventLog:
        return EventLog(self.home, self.shop.timezone)

    def incoming(self, *raw: dict[str, Any], known_at: datetime | None = None) -> list[Incoming]:
        received, batch, vault = self.shop.data_end, [], Vault.open(self.home)
        for each in raw:
            event, content_hash, personal = vault.seal(parse_event(each, received))
            batch.append(Incoming(event, content_hash, known_at or event.occurred_at, received, "test", personal=personal))
        return batch

    def add(self, *raw: dict[str, Any], known_at: datetime | None = None) -> Any:
        return self.log.append(self.incoming(*raw, known_at=known_at), Identities(self.home))


def told(store: FeatureStore, customer_id: str, at: datetime = NEW_YEAR) -> dict[str, Any]:
    """One customer's online rows, with what their state tells."""
    [row] = store.online("customer_v1", [customer_id])
    return store.expanded(row, at)


def copy_home(home: Home, to: Path) -> Home:
    """A home of one's own, to change or to destroy."""
    # a connection that is let go of while its home is copied takes its write-ahead log away
    gc.collect()
    shutil.copytree(home.root, to, ignore=shutil.ignore_patterns("*.lock", "service-*.log"))
    return Home(to)


def eventually(check: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.2)


@dataclass
class Service:
    """A running service and how to talk to it."""

    home: Home
    port: int
    process: Process

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, dict[str, Any]]:
        status, answer = self._post(path, body, **headers)
        while status == 202 and answer.get("ask", "").startswith("/v1/results/"):
            status, text = self.get(answer["ask"], **headers)
            answer = json.loads(text)
        return status, answer

    def _post(self, path: str, body: Any, **headers: str) -> tuple[int, dict[str, Any]]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, {"content-type": "application/json", **headers})
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return response.status, json.loads(response.read() or b"{}")
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def ask(self, path: str, body: Any) -> dict[str, Any]:
        status, answer = self.post(f"/v1/{path}", body)
        deadline = time.monotonic() + 60
        while status == 503 and answer["title"] == "Busy" and time.monotonic() < deadline:
            # the first question of a process, on a machine that has other work: sent again, as the answer says
            time.sleep(1)
            status, answer = self.post(f"/v1/{path}", body)
        assert status == 200, answer
        return answer

    def get(self, path: str, method: str = "GET", **headers: str) -> tuple[int, str]:
        status, text = self._get(path, method, **headers)
        while status == 202 and '"/v1/results/' in text:
            status, text = self._get(json.loads(text)["ask"], **headers)
        return status, text

    def _get(self, path: str, method: str = "GET", **headers: str) -> tuple[int, str]:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", method=method, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


def headers_of(service: Service, method: str, path: str, headers: dict[str, str]) -> tuple[int, dict[str, str]]:
    """The status and the headers of an answer, their names in small letters."""
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=30)
    connection.request(method, path, b"{}" if method == "POST" else None, {"content-type": "application/json", **headers})
    with connection.getresponse() as response:
        found = response.status, {name.lower(): value for name, value in response.getheaders()}
    connection.close()
    return found


def start_service(home: Home, fresh: bool = False, **environment: str) -> Service:
    port = free_port()
    surrounding = {**surroundings(), "UBIQUO_HOME": str(home.root), "UBIQUO_CLOCK": f"from:{NEW_YEAR.isoformat()}", **environment}
    with open(home.root / f"service-{port}.log", "wb") as log:
        process = launched("serving", ["--port", str(port)], surrounding, log, log, fresh)
    service = Service(home, port, process)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if service.get("/readyz")[0] == 200:
                return service
        except OSError:
            pass
        time.sleep(0.2)
    stop_service(service, signal.SIGKILL)
    raise AssertionError((home.root / f"service-{port}.log").read_text())


def stop_service(service: Service, how: signal.Signals = signal.SIGINT) -> None:
    if service.process.poll() is None:
        if how == signal.SIGKILL:
            # the worker that answers is a session of its own: a crash must take it too
            for child in psutil.Process(service.process.pid).children(recursive=True):
                child.kill()
        os.killpg(service.process.pid, how)
        try:
            service.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(service.process.pid, signal.SIGKILL)
            service.process.wait()


class Webhook:
    """A webhook that answers what it is told to, and notes what it took."""

    def __init__(self) -> None:
        self.answer, self.took, self.asked = 200, list[tuple[dict[str, str], bytes]](), 0
        self.meanwhile: Callable[[], None] = lambda: None
        """What happens while it has a message."""
        webhook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                webhook.asked += 1
                webhook.meanwhile()
                if webhook.answer < 300:
                    webhook.took.append(({k.lower(): v for k, v in self.headers.items()}, body))
                self.send_response(webhook.answer)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/hook"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Pages:
    """A shop's own web server, from an origin of its own: it answers what was put into ``files``, by path."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        pages = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                content = pages.files.get(path)
                self.send_response(404 if content is None else 200)
                self.send_header("Content-Type", "text/javascript" if path.endswith(".js") else "text/html; charset=utf-8")
                self.send_header("Content-Length", str(len(content or b"")))
                self.end_headers()
                self.wfile.write(content or b"")

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.origin = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def histories(bought: dict[str, list[str]], at: datetime = NEW_YEAR) -> list[dict[str, Any]]:
    """Feature rows of customers who bought each of some items once, a day before."""
    when = int((at - timedelta(days=1)).timestamp())
    return [
        {
            "customer_id": customer,
            "bought_item_ids": items,
            "bought_counts": [1] * len(items),
            "bought_last_at": [when] * len(items),
            "bought_first_at": [when] * len(items),
            "bought_weights": [1.0] * len(items),
            "recent_item_ids": [],
            "recent_at": [],
            "recent_weights": [],
        }
        for customer, items in bought.items()
    ]


class Brought:
    """What a request brings to the queue: letters and refused rows, as they are to lie there."""

    def __init__(self, letters: Sequence[Accepted] = (), refused: Sequence[Refused] = ()) -> None:
        self._letters, self._refused = letters, refused
        self.entered: list[Accepted] = []
        self.is_stored = False

    def enter(self, turn: Turn) -> tuple[Sequence[Accepted], Sequence[Refused]]:
        self.entered = [letter._replace(seq=turn.next()[0]) for letter in self._letters]
        return self.entered, [each._replace(seq=turn.next()[0]) for each in self._refused]

    def stored(self) -> None:
        self.is_stored = True
