"""Several services on one state: whatever one of them takes, the next answer of any other knows, and nothing is lost or stored twice."""

from __future__ import annotations

import http.client
import json
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
from postgres import PostgresCluster
from scene import NEW_YEAR, ROOT, SECRET, Service, command, copy_home, eventually, free_port, start_service, stop_service, surroundings

from features.people.identity import Identities
from features.state.home import Home
from features.state.settings import Settings
from features.store.event_log import EventLog, connect

ZONE = "America/New_York"
HEADERS = {"content-type": "application/json"}


def happened(name: str, who: dict[str, str], **more: Any) -> dict[str, Any]:
    return {"event_id": uuid.uuid4().hex, "name": name, "occurred_at": NEW_YEAR.isoformat(), "channel": "web", "identifiers": who, **more}


def taken(service: Service, *events: dict[str, Any]) -> list[str | None]:
    answer = service.ask("events", {"events": list(events)})
    assert answer["accepted"] == len(events), answer
    return [each["customer_id"] for each in answer["events"]]


def known_as(service: Service, who: dict[str, str]) -> str | None:
    found: str | None = service.ask("churn", {"identifiers": who})["customer_id"]
    return found


class Load(threading.Thread):
    """A client that sends batches as fast as it is answered, and remembers what was acknowledged and what failed."""

    def __init__(self, port: int, until: threading.Event) -> None:
        super().__init__(daemon=True)
        self.port, self.until, self.acknowledged, self.answers = port, until, list[str](), 0
        self.failures: list[str] = []

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        while not self.until.is_set():
            events = [happened("view_item", {"cookie": f"c{random.randrange(50)}"}, items=[{"item_id": "1082185"}]) for _ in range(5)]
            try:
                connection.request("POST", "/v1/events", json.dumps({"events": events}), HEADERS)
                with connection.getresponse() as response:
                    answer = json.load(response)
                    if response.status == 200:
                        self.acknowledged += [e["event_id"] for e in answer["events"] if e["status"] == "accepted"]
                        self.answers += 1
                    else:
                        self.failures.append(f"{response.status} {answer}")
            except (OSError, http.client.HTTPException, ValueError) as error:
                self.failures.append(f"{type(error).__name__}: {error}")
                connection.close()
                time.sleep(0.05)


def stored(home: Home) -> list[str]:
    rows = connect().execute("SELECT event_id FROM read_parquet(?)", [EventLog(home, ZONE).files()]).fetchall()
    return [event_id for (event_id,) in rows]


class Pair:
    """Two services on one state, as on two machines."""

    def __init__(self, home: Home, **environment: str) -> None:
        self.home, self._environment = home, {"UBIQUO_SHARED": "1", **environment}
        self.services = [start_service(home, **self._environment) for _ in range(2)]

    def start_again(self, n: int) -> None:
        self.services[n] = start_service(self.home, **self._environment)

    def close(self) -> None:
        for service in self.services:
            stop_service(service)


class ManyServicesContract:
    """What must hold wherever the state lies."""

    @pytest.fixture(scope="class")
    def pair(self, trained: Home, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
        raise NotImplementedError

    def test_an_event_taken_by_one_is_in_the_next_answer_of_the_other(self, pair: Pair) -> None:
        for round_ in range(20):
            here, there = pair.services[:: 1 if round_ % 2 else -1]
            who = {"cookie": f"visitor-{uuid.uuid4().hex}"}
            assert known_as(there, who) is None
            assert there.ask("recommendations", {"identifiers": who})["fallback"] is not None
            [customer] = taken(here, happened("view_item", who, items=[{"item_id": "1082185"}]))
            answer = there.ask("recommendations", {"identifiers": who, "limit": 3})
            assert answer["customer_id"] == customer
            assert answer["fallback"] is None, "what was looked at is known, and not only by whom"
            # who signs in at the other is the same customer here, with what they looked at
            person = {"user_id": f"user-{uuid.uuid4().hex}"}
            taken(there, happened("login", {**who, **person}))
            assert known_as(here, person) == known_as(there, who) == known_as(here, who)

    def test_a_withdrawn_consent_counts_at_the_other_at_once(self, pair: Pair) -> None:
        here, there = pair.services
        who = {"user_id": f"user-{uuid.uuid4().hex}"}
        said = {"purposes": {"personalization": False}, "policy_version": "1", "source": "test"}
        taken(here, happened("view_item", who, items=[{"item_id": "1082185"}]))
        assert there.ask("recommendations", {"identifiers": who})["fallback"] is None
        taken(here, happened("consent_update", who, consent=said))
        assert "does not allow" in there.ask("recommendations", {"identifiers": who})["fallback"]

    def test_both_learn_who_is_who_in_one_order_whoever_takes_what(self, pair: Pair) -> None:
        """Shared tablets, two users of one address, merges: what is learnt depends on the order, and that is one."""
        tag, chance = uuid.uuid4().hex[:8], random.Random(7)
        names = {"cookie": 6, "email": 4, "user_id": 4}

        def somebody() -> dict[str, str]:
            kinds = chance.sample(sorted(names), chance.choice([1, 2, 2, 3]))
            values = {kind: f"{kind}-{tag}-{chance.randrange(names[kind])}" for kind in kinds}
            return {kind: f"{value}@example.org" if kind == "email" else value for kind, value in values.items()}

        people = [somebody() for _ in range(240)]
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda n: taken(pair.services[n % 2], happened("login", people[n])), range(len(people))))
        everybody = [{kind: value} for kind, value in sorted({pair for who in people for pair in who.items()})]
        here, there = ([known_as(service, who) for who in everybody] for service in pair.services)
        assert here == there
        for service in pair.services:
            eventually(lambda service=service: metric_of(service, "ubiquo_events_waiting") == 0)  # type: ignore[misc]
        written = Identities(pair.home)
        assert [written.resolve(who) for who in everybody] == here, "and so it is written"  # type: ignore[arg-type]

    def test_who_is_erased_by_one_is_nobody_to_the_other_from_the_receipt_on(self, pair: Pair) -> None:
        here, there = pair.services
        who = {"user_id": f"gone-{uuid.uuid4().hex}"}
        [customer] = taken(here, happened("view_item", who, items=[{"item_id": "1082185"}]))
        assert known_as(there, who) == customer
        status, said = there.get(f"/v1/customers/{customer}", "DELETE")
        assert status in (200, 202), said
        assert known_as(here, who) is None
        receipt = json.loads(said)["receipt_id"]

        def done() -> bool:
            status, said = here.get(f"/v1/erasures/{receipt}")
            assert status in (200, 202), said
            return status == 200

        eventually(done)
        time.sleep(1.5)
        assert known_as(here, who) is known_as(there, who) is None

    def test_a_repeat_at_the_other_is_a_duplicate_before_and_after_it_is_moved_on(self, pair: Pair) -> None:
        here, there = pair.services
        event = happened("view_item", {"cookie": "again"}, items=[{"item_id": "1082185"}])
        taken(here, event)
        assert there.ask("events", {"events": [event]})["duplicates"] == 1
        eventually(lambda: metric_of(there, "ubiquo_events_waiting") == 0)
        for service in pair.services:
            assert service.ask("events", {"events": [event]})["duplicates"] == 1

    def test_what_was_acknowledged_is_stored_exactly_once_whichever_is_killed(self, pair: Pair) -> None:
        ended = threading.Event()
        acknowledged: list[str] = []
        for n in (0, 1):
            ended.clear()
            clients = [Load(service.port, ended) for service in pair.services for _ in range(2)]
            for client in clients:
                client.start()
            time.sleep(random.uniform(0.5, 2.0))
            stop_service(pair.services[n], signal.SIGKILL)
            before = sum(client.answers for client in clients if client.port == pair.services[1 - n].port)
            time.sleep(1.5)
            after = sum(client.answers for client in clients if client.port == pair.services[1 - n].port)
            assert after > before, "the other goes on"
            ended.set()
            for client in clients:
                client.join(60)
                acknowledged += client.acknowledged
            pair.start_again(n)
        for service in pair.services:
            eventually(lambda service=service: metric_of(service, "ubiquo_events_waiting") == 0)  # type: ignore[misc]
        found = stored(pair.home)
        print(f"2 kills: {len(acknowledged)} acknowledged, {len(set(acknowledged) & set(found))} of them stored, "
              f"{len(found) - len(set(found))} stored twice")  # fmt: skip
        assert len(acknowledged) > 100
        assert set(acknowledged) <= set(found), "acknowledged and lost"
        assert len(found) == len(set(found)), "stored twice"


class TestOnOneMachine(ManyServicesContract):
    """On the files of one home."""

    @pytest.fixture(scope="class")
    def pair(self, trained: Home, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
        made = Pair(copy_home(trained, tmp_path_factory.mktemp("many") / "home"))
        yield made
        made.close()


class TestOnManyMachines(ManyServicesContract):
    """With PostgreSQL and Redis: the services share nothing else but the folder."""

    @pytest.fixture(scope="class")
    def pair(self, trained: Home, postgres: PostgresCluster, redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
        home = copy_home(trained, tmp_path_factory.mktemp("machines") / "home")
        url, servers = postgres.new_database(), {"UBIQUO_REDIS": redis_url}
        done = command("serving", "migrate", "--to", url, home=home.root)
        assert done.returncode == 0, done.stdout + done.stderr
        servers["UBIQUO_DATABASE"] = url
        done = command("features", "materialize", home=home.root, **servers)
        assert done.returncode == 0, done.stdout + done.stderr
        made = Pair(Home(home.root, Settings(database=url, redis=redis_url, home=str(home.root), secret=SECRET)), **servers)
        yield made
        made.close()
        postgres.give_back(url)


def metric_of(service: Service, name: str) -> float:
    _, text = service.get("/metrics")
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))


class TestWorkers:
    """``python -m serving --workers 2``."""

    @pytest.fixture(scope="class")
    def service(self, trained: Home, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
        home, port = copy_home(trained, tmp_path_factory.mktemp("workers") / "home"), free_port()
        surrounding = {**surroundings(), "UBIQUO_HOME": str(home.root), "UBIQUO_CLOCK": f"from:{NEW_YEAR.isoformat()}"}
        line = [sys.executable, "-W", "ignore", "-m", "serving", "--workers", "2", "--port", str(port)]
        with open(home.root / "workers.log", "wb") as log:
            process = subprocess.Popen(line, env=surrounding, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        service = Service(home, port, process)
        eventually(lambda: len(self.working(service)) == 2, 180)
        yield service
        stop_service(service, signal.SIGTERM)
        assert process.returncode == 0, (home.root / "workers.log").read_text()

    @staticmethod
    def working(service: Service) -> set[int]:
        """The processes that tell their metrics."""
        try:
            status, text = service.get("/metrics")
        except OSError:
            return set()
        lines = [line for line in text.splitlines() if line.startswith("ubiquo_champions{")] if status == 200 else []
        return {int(line.split('"')[1]) for line in lines}

    def test_every_process_is_replaced_without_a_failed_request(self, service: Service) -> None:
        before, ended = self.working(service), threading.Event()
        clients = [Load(service.port, ended) for _ in range(6)]
        for client in clients:
            client.start()
        service.process.send_signal(signal.SIGHUP)
        eventually(lambda: len(self.working(service) - before) == 2 and not self.working(service) & before, 180)
        ended.set()
        for client in clients:
            client.join(60)
        assert not [failure for client in clients for failure in client.failures]
        assert all(client.answers > 5 for client in clients)

    def test_a_killed_process_costs_its_own_connections_and_is_replaced(self, service: Service) -> None:
        before, ended = self.working(service), threading.Event()
        clients = [Load(service.port, ended) for _ in range(4)]
        for client in clients:
            client.start()
        victim = sorted(before)[0]
        psutil.Process(victim).kill()
        eventually(lambda: len(self.working(service) - {victim}) == 2, 180)
        ended.set()
        for client in clients:
            client.join(60)
        # what was in that process's hands when it was killed
        assert sum(len(client.failures) for client in clients) <= len(clients)
        eventually(lambda: metric_of(service, "ubiquo_events_waiting") == 0)
        found = stored(service.home)
        acknowledged = {event_id for client in clients for event_id in client.acknowledged}
        assert acknowledged <= set(found)
        assert len(found) == len(set(found))
