"""Crashes, cut connections, lost answers, lost leases and clocks that jump, some ten thousand of them, against the code that takes
events in: what was acknowledged must be stored once, in one order, and known alike by everybody.

    python tests/simulate_crashes.py --crashes 10000      # seeds 1, 2, 3, ... until so many processes were killed
    python tests/simulate_crashes.py --seed 17 --trace    # one seed again, with what its processes logged

Real code: intake, inbox, drain, backlog, what was recently learnt, identities, consents, log with its indexes, dead letters, contacts,
tombstones, customers' rows with their folds. Not covered: the engines behind the ports (``crash_ports`` stands in for them), erasures,
imports, journeys, decisions, HTTP. Threads change only where a port is called or a lock is waited for.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import os
import shutil
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import crash_ports
import crash_world
import msgspec
from crash_ports import Shared, State, later
from crash_stand_ins import Rows, Watched, stand_in
from crash_world import Process, World, unhurt

from features.catalogue.shop import Shop
from features.definitions.folds.registered import NAMES
from features.events.identifiers import normalise_all
from features.people.consent import Consents
from features.people.identity import Identities
from features.people.identity_graph import IdentityGraph
from features.people.identity_state import keys_of
from features.state.ports import EVENTS
from features.store.event_index import EventIndex
from serving.intake.intake import Intake

START = datetime(2026, 1, 5, 12, tzinfo=UTC)
TICK, AGGREGATE, CLIENT_WAITS = 1.0, 5.0, 10.0
RATES = (0.003, 0.01, 0.02, 0.03)
LIMIT = 6 * 3600.0
"""After so many simulated seconds a run has got stuck."""
logger = logging.getLogger("simulation")


class Service(Process):
    """One service process."""

    def __init__(self, scene: Scene, number: int) -> None:
        world = scene.world
        super().__init__(world, number, world.random.choice((0.0, 0.0, 0.002, -0.3, 4.0, -45.0)))
        self.scene, self.intake, self.order = scene, None, []  # type: Scene, Intake | None, list[tuple[int, str]]
        world.spawn(self, self._run)

    def _run(self) -> None:
        try:
            self.intake = self._started()
        except Exception as error:
            # as a service does that cannot start: it ends, and is started again
            logger.info("%.3f process %d cannot start: %r", self.world.now, self.number, error)
            self.world.kill(self)
            raise crash_world.Killed from error
        self.world.spawn(self, lambda: self._chore(self.intake.drain_if_due, TICK))  # type: ignore[union-attr]
        self.world.spawn(self, lambda: self._chore(self.intake.refresh_if_due, AGGREGATE))  # type: ignore[union-attr]

    def _started(self) -> Intake:
        state: Any = State(self.scene.shared, self, self.scene.is_served)
        clock = lambda: later(START, self.world, self)  # noqa: E731
        queue = Watched(state, clock, lambda seq, event_id: self.order.append((seq, event_id)))
        identities, consents = Identities(state), Consents(state, Shop.load(state).consent)
        return Intake(state, clock, queue, self.scene.shared.online, identities, consents)  # type: ignore[arg-type]

    def _chore(self, work: Callable[[], object], seconds: float) -> None:
        while True:
            self.world.sleep(seconds * self.world.random.uniform(0.2, 1.2))
            if self.world.random.random() < self.world.rate:
                # the machine's clock is set
                self.ahead += self.world.random.choice((-60.0, -0.5, 0.5, 9.0, 60.0))
                self.world.struck["the clock", "jumps"] += 1
            try:
                work()
            except Exception as error:
                logger.info("%.3f process %d at %s: %r", self.world.now, self.number, work.__name__, error)


@dataclass
class Scene:
    """One run: the shared state, the services, and what clients have sent and were told."""

    world: World
    shared: Shared
    is_served: bool
    services: dict[int, Service] = field(default_factory=dict)
    started: int = 0
    sent: dict[str, dict[str, Any]] = field(default_factory=dict)
    acknowledged: dict[str, str | None] = field(default_factory=dict)
    """Each acknowledged event, and the customer that was told."""

    def keep_alive(self, number: int) -> None:
        """What starts a service again once it has ended."""
        while True:
            if number not in self.services:
                self.services[number] = self._begun()
            elif not self.services[number].is_alive:
                self.world.sleep(self.world.random.choice((0.05, 0.5, 3.0)))
                self.services[number] = self._begun()
            service = self.services[number]
            self.world.wait(lambda service=service: not service.is_alive)  # type: ignore[misc]

    def _begun(self) -> Service:
        self.started += 1
        return Service(self, self.started)

    def fail_over(self) -> None:
        """The server of the online rows is replaced now and then, while they are written too."""
        while True:
            self.world.sleep(self.world.random.expovariate(0.05))
            if self.world.random.random() < 50 * self.world.rate:
                self.shared.online.fail_over()

    def client(self, number: int, batches: int) -> None:
        """Sends batches, each again until it is acknowledged."""
        random = self.world.random
        for n in range(batches):
            self.world.sleep(random.expovariate(2.0))
            batch = [self._event(f"{number}-{n}-{k}") for k in range(random.choice((1, 1, 2, 5)))]
            if self.sent and random.random() < 0.15:
                batch.append(self.sent[random.choice(list(self.sent))])
            for each in batch:
                self.sent[each["event_id"]] = each
            while not self._posted(batch):
                self.world.sleep(random.uniform(0.05, 1.0))

    def _event(self, event_id: str) -> dict[str, Any]:
        random = self.world.random
        who, cookie = random.randrange(8), {"cookie": f"c{random.randrange(10)}"}
        known = random.choice(({"user_id": f"u{who}"}, {"loyalty_card": f"l{who}"}, {"user_id": f"u{who}", "email": f"mail{who}@shop.org"}))
        name = random.choice(("view_item", "view_item", "add_to_cart", "login", "purchase", "consent_update"))
        identifiers = cookie if name == "view_item" else known | cookie if random.random() < 0.5 else known
        raw: dict[str, Any] = {
            "event_id": event_id, "name": name, "occurred_at": (START + timedelta(seconds=self.world.now - 120)).isoformat(),
            "identifiers": identifiers, "channel": "web", "currency": "USD",
        }  # fmt: skip
        if name in ("view_item", "add_to_cart", "purchase"):
            raw["items"] = [{"item_id": f"i{random.randrange(9)}", "quantity": 1, "amount_minor": 100}]
        if name == "consent_update":
            raw["consent"] = {"purposes": {"personalization": random.random() < 0.7}}
        return raw

    def _posted(self, batch: Sequence[dict[str, Any]]) -> bool:
        """Send to any service; whether all of it was acknowledged."""
        told = list[Any]()
        if (
            not self.services
            or not (service := self.services[self.world.random.choice(list(self.services))]).is_alive
            or service.intake is None
        ):
            return False

        def answer() -> None:
            assert service.intake is not None
            before = [name for name in self.acknowledged if self.world.random.random() < 0.2]
            try:
                service.intake.catch_up()
                self._see_that_it_knows(service, before)
            except OSError as error:
                logger.info("%.3f process %d cannot be asked: %r", self.world.now, service.number, error)
            try:
                told.append(service.intake.accept(batch))
            except Exception as error:
                told.append(error)

        task = self.world.spawn(service, answer)
        self.world.wait(lambda: task.done or not service.is_alive, CLIENT_WAITS)
        if not told or isinstance(told[0], Exception):
            if told:
                logger.info("%.3f process %d refuses: %r", self.world.now, service.number, told[0])
            return False
        for receipt in told[0].events:
            if receipt.status not in ("accepted", "duplicate"):
                self.world.wrong(f"{receipt.event_id} is {receipt.status}: {receipt.reason}")
            else:
                self.acknowledged.setdefault(receipt.event_id, receipt.customer_id)
        return True

    def _see_that_it_knows(self, service: Service, names: Sequence[str]) -> None:
        """What was acknowledged anywhere before a question began counts in its answer: who it is of is known."""
        assert service.intake is not None
        for name in names:
            identities = service.intake.identities
            keys = identities.vault.keys(normalise_all(self.sent[name]["identifiers"]))
            if not all(identities.knows(key) for key in keys):
                self.world.wrong(f"{service.number} does not know who {name} is of, though it was acknowledged before it was asked")


@contextlib.contextmanager
def scene_of(seed: int, rate: float, is_fenced: bool = True) -> Iterator[Scene]:
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None, prefix="crashes-"))
    world = crash_world.threading.world = World(seed, rate)
    shared = Shared(world, folder, is_fenced)
    (folder / "shop.json").write_bytes(msgspec.json.encode(Shop(name="tiny", timezone="America/New_York", currency="USD", data_end=START)))
    crash_ports.files.clear()
    scene = Scene(world, shared, is_served=world.random.random() < 0.7)
    try:
        yield scene
    finally:
        for service in scene.services.values():
            if service.is_alive:
                world.bury(service)
        world._end_the_dead()
        for service in scene.services.values():
            for close in service.closing:
                close()
        # what has not ended keeps its frames, and they the files
        for task in world.tasks:
            if not task.done:
                world.end(task)
        shutil.rmtree(folder)


def run(seed: int, rate: float = 0.0, is_fenced: bool = True) -> tuple[Scene, dict[str, Any]]:
    """One run; returns what was counted."""
    with scene_of(seed, rate or RATES[seed % len(RATES)], is_fenced) as scene:
        world = scene.world
        for number in range(world.random.choice((1, 2, 3, 4))):
            world.spawn(None, lambda number=number: scene.keep_alive(number))  # type: ignore[misc]
        world.spawn(None, scene.fail_over)
        clients = [world.spawn(None, lambda n=n: scene.client(n, 25)) for n in range(4)]  # type: ignore[misc]
        if not world.run(lambda: all(client.done for client in clients), LIMIT):
            world.wrong("clients are never done")
        with unhurt(world):
            # windowed features follow a little later
            world.run(lambda: False, world.now + 3 * AGGREGATE)
            if not world.run(lambda: settled(scene), world.now + 600):
                world.wrong("it never comes to rest")
            else:
                checked = world.spawn(None, lambda: check(scene))
                if not world.run(lambda: checked.done, world.now + 600):
                    world.wrong("it cannot be looked at")
        kills = sum(count for (_, fault), count in world.struck.items() if fault.startswith("killed"))
        return scene, {"kills": kills, "acknowledged": len(scene.acknowledged), **stored(scene)}


def settled(scene: Scene) -> bool:
    """Whether every service stands, and nothing waits at any of them."""
    alive = all(service.is_alive and service.intake is not None for service in scene.services.values())
    query = "SELECT (SELECT count(*) FROM waiting) + (SELECT count(*) FROM to_compute)"
    [(waiting,)] = [(1,)] if not alive else _raw(scene, "inbox", query)
    return alive and waiting == 0 and not any(lent for lent in scene.shared.lease.holders.values())


def _raw(scene: Scene, name: str, query: str) -> list[Any]:
    import sqlite3

    with contextlib.closing(sqlite3.connect(scene.shared.folder / f"{name}.db")) as connection:
        return connection.execute(query).fetchall()


def log_of(scene: Scene) -> list[dict[str, Any]]:
    table = scene.shared.tables[EVENTS]
    return [row for name in table._files for row in crash_ports.files[name].to_pylist()]


def stored(scene: Scene) -> dict[str, int]:
    counts = Counter(row["event_id"] for row in log_of(scene))
    lost, twice = [name for name in scene.acknowledged if name not in counts], [name for name, n in counts.items() if n > 1]
    alien = [name for name in counts if name not in scene.sent]
    for what, names in (("acknowledged and lost", lost), ("stored twice", twice), ("stored and never sent", alien)):
        for name in names:
            scene.world.wrong(f"{name} is {what}")
    return {"stored": len(counts), "lost": len(lost), "twice": len(twice), "alien": len(alien)}


def check(scene: Scene) -> None:
    """What must hold once all has come to rest."""
    wrong, services = scene.world.wrong, list(scene.services.values())
    for service in services:
        assert service.intake is not None
        while True:
            with contextlib.suppress(OSError):
                service.intake.catch_up()
                break
            # it waits for the database, as a question does
            scene.world.sleep(1.0)
        service.intake.identities.refresh()
        service.intake._consents.refresh()
    fresh = Service(scene, 0)
    scene.world.wait(lambda: fresh.intake is not None)
    assert fresh.intake is not None
    # one order
    places: dict[int, str] = {}
    for service in services:
        numbers = [seq for seq, _ in service.order]
        if numbers != sorted(set(numbers)):
            wrong(f"{service.number} has followed the queue out of order, or twice: {numbers}")
        for seq, event_id in service.order:
            if places.setdefault(seq, event_id) != event_id:
                wrong(f"place {seq} is {places[seq]} to some and {event_id} to others")
    # in the log they lie in that order
    where = {event_id: seq for seq, event_id in places.items()}
    seqs = [where[row["event_id"]] for row in sorted(log_of(scene), key=lambda row: row["known_at"]) if row["event_id"] in where]
    if seqs != sorted(seqs):
        wrong("the log is in another order than the queue")
    # who is who
    owners = fresh.intake.identities.owners()
    for service in services:
        assert service.intake is not None
        if service.intake.identities.owners() != owners:
            wrong(f"{service.number} takes other customers for the same than the table does")
        if service.intake.identities._graph.news:
            wrong(f"{service.number} has learnt what was never written")
    graph = IdentityGraph()
    for row in sorted(log_of(scene), key=lambda row: row["known_at"]):
        event = EventIndex._from_row(row).event
        graph.learn(keys_of(event.identifiers), keys_of(event.previous), event.event_id, row["known_at"])
    if graph.owners() != owners:
        wrong("the identifiers table tells otherwise than the log")
    _check_rows(scene, fresh.intake)
    scene.world.bury(fresh)


def _check_rows(scene: Scene, fresh: Intake) -> None:
    """The online states are those of a replay of the log."""
    forever = START + timedelta(days=999)
    rows = fresh._drain.rows
    assert isinstance(rows, Rows)
    customers = fresh.identities.customers()
    expected: Mapping[str, dict[str, str]] = {who: state.to_row() for who, state in rows._replayed(customers, forever).items()}
    online = scene.shared.online.rows["customer_state"]
    for who in sorted({*expected, *online}):
        held = None if who not in online else {name: online[who][1].get(name) for name in NAMES}
        if held != (expected.get(who) and dict(expected[who])):
            scene.world.wrong(f"the row of {who} is not what the log tells: {_difference(held, expected.get(who))}")
    counts = {who: len(events) for who, events in rows._past(customers, forever).items()}
    held_counts = {who: row["events"] for who, (_, row) in scene.shared.online.rows["customer_activity"].items()}
    if stale := [who for who, count in counts.items() if held_counts.get(who) != count]:
        scene.world.wrong(f"windowed features do not know all that the log tells: {', '.join(stale)}")


def _difference(held: Mapping[str, Any] | None, expected: Mapping[str, Any] | None) -> str:
    if held is None or expected is None:
        return f"{'nothing' if held is None else 'a row'} is online, and {'nothing' if expected is None else 'a row'} should be"
    name = next(name for name in NAMES if held.get(name) != expected.get(name))
    return f"{name} is {held.get(name)}, and should be {expected.get(name)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--crashes", type=int, default=10_000, help="how many processes are killed in all")
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("--seed", type=int, help="only this one")
    parser.add_argument("--rate", type=float, default=0.0, help="how likely a fault is at one call of a port; else as the seed says")
    parser.add_argument("--unfenced", action="store_true", help="tables that take no heed of the version that was seen: it must go wrong")
    parser.add_argument("--trace", action="store_true", help="what the processes log")
    parser.add_argument("--json", action="store_true", help="one line of JSON in the place of tables")
    said = parser.parse_args()
    if os.environ.get("PYTHONHASHSEED") != "0":
        # the order of sets follows from it
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "PYTHONHASHSEED": "0"})
    logging.basicConfig(level=logging.INFO if said.trace else logging.CRITICAL + 1, format="%(message)s")
    stand_in()
    gc.disable()
    struck: Counter[tuple[str, str]] = Counter()
    total: Counter[str] = Counter()
    failed: dict[int, list[str]] = {}
    began, seed, digest = time.perf_counter(), said.seed or said.first, 0
    while True:
        scene, told = run(seed, said.rate, not said.unfenced)
        struck += scene.world.struck
        total.update({"runs": 1, "processes": scene.started, **told})
        digest = zlib.crc32(f"{scene.world.digest}".encode(), digest)
        if scene.world.problems:
            failed[seed] = scene.world.problems
            print(f"seed {seed}: {len(scene.world.problems)} problems, first {scene.world.problems[0]}", file=sys.stderr, flush=True)
            if said.seed and scene.world.first_error is not None:
                logger.error("the first error", exc_info=scene.world.first_error)
        seed += 1
        if seed % 20 == 0:
            gc.collect()
        if said.seed or total["kills"] >= said.crashes:
            break
    report(struck, total, failed, time.perf_counter() - began, digest, said.json)
    return 1 if failed else 0


def report(
    struck: Counter[tuple[str, str]], total: Counter[str], failed: Mapping[int, list[str]], seconds: float, digest: int, as_json: bool
) -> None:
    if as_json:
        faults = Counter[str]()
        for (_, fault), count in struck.items():
            faults[fault] += count
        print(json.dumps({**total, "faults": faults, "failed": failed, "digest": digest}))
        return
    columns = (*crash_world.FAULTS, "jumps", "last writes lost")
    print("| at | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for what in sorted({what for what, _ in struck}):
        print(f"| {what} | " + " | ".join(f"{struck[what, fault] or ''}" for fault in columns) + " |")
    print("| **all** | " + " | ".join(f"{sum(n for (_, fault), n in struck.items() if fault == each):,}" for each in columns) + " |\n")
    print(
        f"{total['kills']:,} kills of {total['processes']:,} processes in {total['runs']:,} runs, {seconds:.0f} s: {total['acknowledged']:,} "
        f"events acknowledged, {total['stored']:,} stored, {total['lost']} lost, {total['twice']} twice, {total['alien']} never sent; "
        f"seeds that failed: {list(failed) or 'none'}"
    )
    for seed, problems in failed.items():
        print(f"seed {seed}: " + "; ".join(problems[:3]))


if __name__ == "__main__":
    sys.exit(main())
