"""What one event, identifier, customer and request costs: bytes on disks, bytes of memory, CPU seconds. ``docs/scale.md`` reckons with it.

``python tests/bench_costs.py [disk] [memory] [consents] [intake] [database] [redis] [service] [batch]`` prints the rows of these parts, or of all.
``disk``, ``redis``, ``service`` and ``batch`` look at the demo's home (``UBIQUO_HOME``; copied first); the others make data up.
"""

from __future__ import annotations

import contextlib
import gc
import http.client
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import msgspec
import psutil
from postgres import PostgresCluster, programs
from power_cut import make
from scene import NEW_YEAR, ROOT, event, free_port, loyalty_cards, start_service, stop_service

from features.catalogue.shop import Shop
from features.events.event import SealedEvent, parse_event
from features.people import identity
from features.people.consent import Consents
from features.people.identity import Identities
from features.people.identity_graph import IdentityGraph
from features.people.vault import Vault
from features.state.clock import running_clock
from features.state.home import Home
from features.state.ports import IDENTIFIERS, LOG
from features.state.settings import Settings
from features.store.event_index import Incoming
from features.store.event_log import EventLog
from features.store.feature_store import FeatureStore
from serving.intake.inbox import Inbox
from serving.intake.intake import Intake

CUSTOMERS, EVENTS, STATEMENTS, COMMITS = 100_000, 20_000, 100_000, 300


def told(what: str, value: float, unit: str) -> None:
    print(f"| {what} | {value:,.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 3}f} | {unit} |", flush=True)


def resident() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


@contextlib.contextmanager
def copied(with_models: bool = True) -> Iterator[Home]:
    """A copy of the demo's home; runs and models, which are most of it, only where something asks them."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "home"
        left_out = () if with_models else ("mlflow.db*", "mlartifacts")
        shutil.copytree(Home.from_environment().root, root, ignore=shutil.ignore_patterns(*left_out))
        if (root / "secret.key").exists():
            # what the tests' scenes have set is another's
            os.environ.pop("UBIQUO_SECRET", None)
        yield Home(root, Settings(home=str(root), secret=os.environ.get("UBIQUO_SECRET", "")))


def disk() -> None:
    """What lies on the disk of the demo's home."""
    with copied(with_models=False) as home:
        log, identities = EventLog(home, Shop.load(home).timezone), Identities(home)
        events, customers = log.count(), identities.count()
        keys = len(identities.owners())
        told("the demo: events", events, "")
        told("the demo: customers", customers, "")
        told("the demo: identifiers a customer", keys / customers, "")
        told("log (Parquet)", sum(Path(each).stat().st_size for each in log.files()) / events, "bytes an event")
        told("event index (SQLite)", home.event_index.stat().st_size / events, "bytes an event")
        told(
            "identifiers (Parquet)",
            sum(Path(each).stat().st_size for each in home.tables[IDENTIFIERS].files()) / keys,
            "bytes an identifier",
        )
        told("step index (SQLite)", home.step_index.stat().st_size / keys, "bytes an identifier")
        told("contacts (SQLite)", home.contacts.stat().st_size / keys, "bytes an identifier")
        for view in ("customer_activity", "customer_state"):
            newest = max((home.snapshots / view).rglob("*.parquet"), key=lambda path: path.name)
            told(f"a snapshot of {view}", newest.stat().st_size / customers, "bytes a customer")
        told("online rows (SQLite)", (home.feast / "online.db").stat().st_size / customers, "bytes a customer")


def memory() -> None:
    """The identity graph and the consents of one process: a customer has a card, a cookie, and half of them an address."""
    graph, before, began, steps = IdentityGraph(), resident(), time.process_time(), 0
    for n in range(CUSTOMERS):
        graph.learn([f"loyalty_card:{n:032x}", *([f"email:{n:032x}"] if n % 2 else []), f"cookie:{n:032x}"], (), f"event-{n}", NEW_YEAR)
        # these go once they are written
        steps += len(graph.news)
        graph.news.clear()
    spent, held = time.process_time() - began, resident() - before
    told("identity graph", held / CUSTOMERS, "bytes of memory a customer of 2.5 identifiers, in each process")
    told("identity graph", held / steps, "bytes of memory an identifier, in each process")
    told("identity graph: learnt", spent / CUSTOMERS * 1e6, "CPU us a customer")
    del graph
    steps_of = IdentityGraph()
    for n in range(CUSTOMERS // 10):
        steps_of.learn([f"loyalty_card:{n:032x}", *([f"email:{n:032x}"] if n % 2 else []), f"cookie:{n:032x}"], (), f"event-{n}", NEW_YEAR)
    table, fresh, began = identity._table(steps_of.news, 1), IdentityGraph(), time.process_time()
    for step in identity._steps(table):
        fresh.apply(step)
    told("identity graph: read at a start", (time.process_time() - began) / (CUSTOMERS // 10) * 1e6, "CPU us a customer")


def consents() -> None:
    """What customers have said, in the memory of one process."""
    with tempfile.TemporaryDirectory() as scratch:
        home = make(Path(scratch) / "home")
        memory = Consents(home, Shop.load(home).consent)
        said = {"consent": {"purposes": {"personalization": True}}}
        vault = Vault.open(home)
        events = [sealed(vault, f"c{n}", "consent_update", f"card-{n}", **said) for n in range(STATEMENTS)]
        before = resident()
        for each in events:
            memory.note(each, NEW_YEAR)
        # noted twice: until it is in the log, and for good
        memory._noted = {}
        told("consents", (resident() - before) / STATEMENTS, "bytes of memory a statement, in each process")


def sealed(vault: Vault, event_id: str, name: str, card: str, **more: object) -> SealedEvent:
    return vault.seal(parse_event(event(event_id, name, NEW_YEAR - timedelta(days=1), card, **more), NEW_YEAR)).event


def intake() -> None:
    """Events through the intake into the log and the rows, in this process, on files."""
    with tempfile.TemporaryDirectory() as scratch:
        home = make(Path(scratch) / "home")
        through(home, "files")


def through(home: Home, where: str) -> None:
    store, identities = FeatureStore(home), Identities(home)
    store.apply()
    # not timed: the times of a clock that stands still would only count up
    took = Intake(
        home, running_clock(NEW_YEAR), Inbox(home, running_clock(NEW_YEAR)), store, identities, Consents(home, Shop.load(home).consent)
    )
    raw = [
        event(uuid.uuid4().hex, "view_item", NEW_YEAR - timedelta(days=1), f"card-{n % (EVENTS // 10)}", ["i1"], channel="web")
        for n in range(EVENTS)
    ]
    began = time.process_time()
    for start in range(0, EVENTS, 100):
        took.accept(raw[start : start + 100])
    told(f"accepted, in hundreds ({where})", (time.process_time() - began) / EVENTS * 1e6, "CPU us an event")
    payloads = [
        len(each.payload) + len(each.personal or b"") + len(each.event_id) + len(each.content_hash) for each in took.inbox.waiting(-1)
    ]
    told(f"what waits ({where})", sum(payloads) / len(payloads), "bytes an event, until it is in the log")
    another = Intake(
        home,
        running_clock(NEW_YEAR),
        Inbox(home, running_clock(NEW_YEAR)),
        store,
        Identities(home),
        Consents(home, Shop.load(home).consent),
    )
    following = 0.0
    for start in range(0, 2_000, 100):
        took.accept([{**each, "event_id": uuid.uuid4().hex} for each in raw[start : start + 100]])
        began = time.process_time()
        another.catch_up()
        following += time.process_time() - began
    told(f"followed by each other process ({where})", following / 2_000 * 1e6, "CPU us an event")
    another.inbox.close()
    wall, began = time.perf_counter(), time.process_time()
    took.drain()
    wall, spent = time.perf_counter() - wall, time.process_time() - began
    told(f"moved on to log, index and states ({where})", spent / (EVENTS + 2_000) * 1e6, "CPU us an event")
    told(f"moved on by one mover ({where})", (EVENTS + 2_000) / wall, "events a second on this machine")
    wall, began = time.perf_counter(), time.process_time()
    took.refresh_aggregates()
    told(f"windowed features ({where})", (time.process_time() - began) / (EVENTS // 10) * 1e6, "CPU us a customer who did something")
    alone(took.inbox, where)
    log = EventLog(home, Shop.load(home).timezone)
    times = []
    for n in range(30):
        one = took._parse(event(f"one-{n}", "login", NEW_YEAR - timedelta(days=1), "card-1"), None, None)
        batch = [Incoming(one.event, one.content_hash, NEW_YEAR, NEW_YEAR, "bench")]  # type: ignore[union-attr]
        began = time.perf_counter()
        log.append(batch, identities)
        times.append(time.perf_counter() - began)
    told(f"one commit to the log ({where})", sorted(times)[len(times) // 2] * 1e3, "ms")
    lent = []
    for _ in range(200):
        began = time.perf_counter()
        with home.lease.hold(LOG):
            pass
        lent.append(time.perf_counter() - began)
    told(f"a lease asked for and given back ({where})", sorted(lent)[100] * 1e3, "ms")
    took.close()


class Nothing:
    """Takes a place in the queue each time, and brings nothing."""

    def enter(self, turn: object) -> tuple[tuple[()], tuple[()]]:
        turn.next()  # type: ignore[attr-defined]
        return (), ()

    def stored(self) -> None:
        """Nothing follows."""


def alone(queue: Inbox, where: str) -> None:
    began = time.perf_counter()
    for _ in range(COMMITS):
        done: Future[None] = Future()
        queue.submit(Nothing(), done)  # type: ignore[arg-type]
        done.result(30)
    told(f"turns at the queue, one after the other ({where})", COMMITS / (time.perf_counter() - began), "commits a second")


def database() -> None:
    """The same with PostgreSQL on this machine, and how large its tables get."""
    found = programs()
    if found is None:
        print("| PostgreSQL is not installed | | |")
        return
    cluster = PostgresCluster(found)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            url = cluster.new_database()
            home = make(Path(scratch) / "home")
            home = replace(home, settings=msgspec.structs.replace(home.settings, database=url))
            through(home, "PostgreSQL")
            import psycopg

            with psycopg.connect(url) as connection:
                query = "SELECT schemaname, sum(pg_total_relation_size(format('%I.%I', schemaname, tablename)::regclass)) FROM pg_tables "
                rows = connection.execute(query + "WHERE schemaname LIKE 'ubiquo%' GROUP BY 1 ORDER BY 1").fetchall()
            # those that were followed, and those of single commits, lie there too
            events = EventLog(home, Shop.load(home).timezone).count()
            for schema, size in rows:
                if float(size) / events >= 1:
                    told(f"schema {schema}", float(size) / events, "bytes an event")
    finally:
        cluster.stop()


def redis() -> None:
    """The states of the demo's customers in a Redis of its own."""
    program = shutil.which("redis-server")
    if program is None:
        print("| redis-server is not installed | | |")
        return
    port = free_port()
    server = subprocess.Popen([program, "--port", str(port), "--save", "", "--bind", "127.0.0.1"], stdout=subprocess.DEVNULL)
    try:
        with copied(with_models=False) as home:
            customers = Identities(home).customers()
            views = FeatureStore(home).customer_views()
            here = FeatureStore(home, {"costs": tuple(views)})
            there_home = replace(home, settings=msgspec.structs.replace(home.settings, redis=f"127.0.0.1:{port}"))
            import redis as client

            asked = client.Redis(port=port)
            while True:
                with contextlib.suppress(client.ConnectionError):
                    asked.ping()
                    break
                time.sleep(0.05)
            there = FeatureStore(there_home)
            before, moment = asked.info("memory")["used_memory"], NEW_YEAR
            held = asked.dbsize()
            rows = here.online("costs", customers)
            for view in views:
                names = set(here.views[view].columns)
                there.push(
                    view, [{"customer_id": row["customer_id"], **{k: v for k, v in row.items() if k in names}} for row in rows], moment
                )
            told("online rows (Redis)", (asked.info("memory")["used_memory"] - before) / len(customers), "bytes of memory a customer")
            told("online rows (Redis): keys", (asked.dbsize() - held) / len(customers), "a customer")
    finally:
        server.terminate()
        server.wait()


def service() -> None:
    """Requests to a service on the demo's home."""
    import bench

    with copied() as home:
        who = [{"identifiers": {"loyalty_card": card}} for card in loyalty_cards(home)[:300]]
        running = start_service(home, UBIQUO_CLOCK=f"from:{NEW_YEAR.isoformat()}", UBIQUO_RATE_LIMIT="1000000/second")
        try:
            family = [psutil.Process(running.process.pid), *psutil.Process(running.process.pid).children(recursive=True)]
            told("a service that has just started", sum(each.memory_info().rss for each in family) / 1e6, "MB of memory")
            for route in ("recommendations", "next-best-offer", "churn"):
                bodies = [json.dumps(each).encode() for each in who]
                answered(running.port, f"/v1/{route}", bodies[:100])
                before = bench.cpu_seconds(running.process.pid)
                answers = answered(running.port, f"/v1/{route}", bodies * 2)
                told(f"an answer: {route}", (bench.cpu_seconds(running.process.pid) - before) / answers * 1e3, "CPU ms a request")
            batch = lambda n: [  # noqa: E731
                event(uuid.uuid4().hex, "view_item", NEW_YEAR, f"new-{n}-{k % 20}", ["1082185"], channel="web") for k in range(100)
            ]
            bodies = [json.dumps({"events": batch(n)}).encode() for n in range(100)]
            before = bench.cpu_seconds(running.process.pid)
            taken = 100 * answered(running.port, "/v1/events", bodies)
            told(
                "events over HTTP, in hundreds, acknowledged",
                (bench.cpu_seconds(running.process.pid) - before) / taken * 1e6,
                "CPU us an event",
            )
            deadline = time.monotonic() + 60
            while "ubiquo_events_waiting 0" not in running.get("/metrics")[1].replace("0.0", "0") and time.monotonic() < deadline:
                time.sleep(0.5)
            told("the same, moved on and folded too", (bench.cpu_seconds(running.process.pid) - before) / taken * 1e6, "CPU us an event")
        finally:
            stop_service(running)


def answered(port: int, path: str, bodies: Sequence[bytes]) -> int:
    """How many of these requests, sent one after the other, were answered with 200."""
    connection, good = http.client.HTTPConnection("127.0.0.1", port, timeout=60), 0
    for body in bodies:
        connection.request("POST", path, body, {"content-type": "application/json"})
        with connection.getresponse() as response:
            response.read()
            good += response.status == 200
    connection.close()
    return good


def batch() -> None:
    """The commands of a night, on the demo's home."""
    with copied() as home:
        customers = Identities(home).count()
        environment = {**os.environ, "UBIQUO_HOME": str(home.root), "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
        for name, words in {
            "features of everybody (materialize)": ["features", "materialize"],
            "churn of everybody (score)": ["serving", "score", "churn", "--as-of", "2018-01-01", "--out", str(home.root / "churn.parquet")],
            "recommendations for everybody (score)": [
                "serving", "score", "recommendations", "--as-of", "2018-01-01", "--out", str(home.root / "lists.parquet"),
            ],
        }.items():  # fmt: skip
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            done = subprocess.run([sys.executable, "-m", *words], env=environment, cwd=ROOT, capture_output=True, text=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            if done.returncode:
                print(f"| {name}: {(done.stdout + done.stderr)[-200:]!r} | | |")
                continue
            spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            told(name, spent, "CPU s in all")
            told(name, spent / customers * 1e3, "CPU ms a customer, start included")
        told("the largest of these", after.ru_maxrss / 1e3, "MB of memory")


PARTS: dict[str, Callable[[], None]] = {
    "disk": disk, "memory": memory, "consents": consents, "intake": intake, "database": database, "redis": redis, "service": service, "batch": batch,
}  # fmt: skip


def main() -> None:
    print("| what | | |\n|---|---|---|")
    for name in sys.argv[1:] or PARTS:
        PARTS[name]()


if __name__ == "__main__":
    main()
