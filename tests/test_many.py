"""Several services on one state: whatever one of them takes, the next answer of any other knows, and nothing is lost or stored twice."""

from __future__ import annotations

import asyncio
import http.client
import json
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
from lakes import Lake, lake_environment
from postgres import PostgresCluster
from scene import (
    NEW_YEAR,
    ROOT,
    SECRET,
    Service,
    command,
    copy_home,
    eventually,
    free_port,
    headers_of,
    start_service,
    stop_service,
    surroundings,
)
from servers import Proxy, RedisServer

from features.people.identity import Identities
from features.state.clock import moment_of
from features.state.home import Home
from features.state.postgres_server import server_at
from features.state.settings import Settings
from features.store.customer_rows import CustomerRows
from features.store.event_log import EventLog, connect
from features.store.feature_store import FeatureStore
from serving.http.lanes import Lane, LongAnswers

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
            newcomer = {"cookie": f"visitor-{uuid.uuid4().hex}"}
            [customer] = taken(here, happened("view_item", newcomer, items=[{"item_id": "1082185"}]))
            status, answer = there.post("/bento/recommendations", {"request": {"identifiers": newcomer, "limit": 3}})
            assert (status, answer["customer_id"]) == (200, customer), "by BentoML's own client too"
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
        while status == 202 and "receipt_id" not in json.loads(said):
            # it is still being written down: the answer is fetched where it was asked for
            status, said = there.get(json.loads(said)["ask"])
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

    def test_what_takes_long_is_fetched_whoever_is_asked(self, pair: Pair) -> None:
        here, there = pair.services
        own = LongAnswers(Lane("long", 1, 4, 10.0, 10.0))

        async def asked() -> str:
            found = await own.ask("key", 0.0, time.sleep, 0.2)
            return str(found.result_id)

        ticket = asyncio.run(asked())
        for service in (here, there):
            status, said = service._get(f"/v1/results/{ticket}")
            assert (status, json.loads(said)["state"]) == (202, "running"), "it may be another process's: ask again"
            told = headers_of(service, "GET", f"/v1/results/{ticket}", {})[1]
            assert told["connection"] == "close", "over a connection that may lead to that one"
            assert service._get("/v1/results/nonsense")[0] == 404

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
    """With PostgreSQL, Redis and object storage: the services share nothing else but the folder."""

    @pytest.fixture(scope="class")
    def pair(
        self, trained: Home, postgres: PostgresCluster, redis_url: str, s3_url: str, tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[Pair]:
        home, lake = copy_home(trained, tmp_path_factory.mktemp("machines") / "home"), Lake.made(s3_url)
        url = postgres.new_database()
        servers = {"UBIQUO_REDIS": redis_url, "UBIQUO_LAKE": lake.address, "UBIQUO_DATABASE": url}
        with pytest.MonkeyPatch.context() as patch:
            for name, value in lake_environment(s3_url).items():
                patch.setenv(name, value)
            for arguments, needs in (
                (("features", "lake", "--to", lake.address), ()),
                (("serving", "migrate", "--to", url), ("UBIQUO_LAKE",)),
                (("features", "materialize"), tuple(servers)),
            ):
                done = command(*arguments, home=home.root, **{name: servers[name] for name in needs})
                assert done.returncode == 0, done.stdout + done.stderr
            settings = Settings(database=url, redis=redis_url, lake=lake.address, home=str(home.root), secret=SECRET)
            made = Pair(Home(home.root, settings), **servers)
            yield made
            made.close()
        server_at.cache_clear()
        postgres.give_back(url)


class TestWhenServersFail:
    """PostgreSQL and Redis are killed, or the network between hangs: answers go on and say so, events are refused and none is lost."""

    class Machines:
        """One service that speaks to both servers by a network that may hang, and one that does not."""

        def __init__(self, home: Home, postgres: PostgresCluster, url: str, redis: RedisServer) -> None:
            self.postgres, self.redis, self.home = postgres, redis, home
            self.between = {"postgres": Proxy(postgres.port), "redis": Proxy(redis.port)}
            head, _, database = url.rpartition("/")
            through = f"{head.rpartition(':')[0]}:{self.between['postgres'].port}/{database}"
            self.far = start_service(home, UBIQUO_DATABASE=through, UBIQUO_REDIS=f"127.0.0.1:{self.between['redis'].port}")
            self.near = start_service(home, UBIQUO_DATABASE=url, UBIQUO_REDIS=f"127.0.0.1:{redis.port}")

        def close(self) -> None:
            for service in (self.far, self.near):
                stop_service(service)
            for proxy in self.between.values():
                proxy.close()

    @pytest.fixture(scope="class")
    def machines(self, trained: Home, postgres: PostgresCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
        if shutil.which("redis-server") is None:
            pytest.skip("redis-server is not installed (apt-get install redis-server)")
        home = copy_home(trained, tmp_path_factory.mktemp("failing") / "home")
        url, redis = postgres.new_database(), RedisServer(tmp_path_factory.mktemp("redis-kept"))
        for module, *arguments in (("serving", "migrate", "--to", url), ("features", "materialize")):
            servers = {"UBIQUO_REDIS": f"127.0.0.1:{redis.port}"} | ({"UBIQUO_DATABASE": url} if module == "features" else {})
            done = command(module, *arguments, home=home.root, **servers)
            assert done.returncode == 0, done.stdout + done.stderr
        settings = Settings(database=url, redis=f"127.0.0.1:{redis.port}", home=str(home.root), secret=SECRET)
        made = self.Machines(Home(home.root, settings), postgres, url, redis)
        yield made
        made.close()
        redis.stop()
        server_at.cache_clear()
        postgres.give_back(url)

    @staticmethod
    def answered(service: Service, who: dict[str, str]) -> str | None:
        """How general an answer says to be; it must be one."""
        fallback: str | None = service.ask("recommendations", {"identifiers": who, "limit": 3})["fallback"]
        return fallback

    @staticmethod
    def refused(service: Service) -> bool:
        """Whether an event is refused, with when to come again."""
        body = json.dumps(happened("view_item", {"cookie": "x"}, items=[{"item_id": "1082185"}]))
        connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=30)
        connection.request("POST", "/v1/events", body, HEADERS)
        with connection.getresponse() as response:
            response.read()
            assert response.status in (200, 429, 503), response.status
            if response.status != 200:
                assert int(response.headers["retry-after"]) >= 1
            return response.status != 200

    def goes_on(self, machines: Machines, what: str, load: Callable[[], None]) -> None:
        """Whatever happens: all that was acknowledged to a client of each service is stored, once."""
        ended = threading.Event()
        clients = [Load(service.port, ended) for service in (machines.far, machines.near)]
        for client in clients:
            client.start()
        time.sleep(0.5)
        load()
        time.sleep(1.0)
        ended.set()
        for client in clients:
            client.join(60)
        acknowledged = {event_id for client in clients for event_id in client.acknowledged}
        for service in (machines.far, machines.near):
            eventually(lambda service=service: metric_of(service, "ubiquo_events_waiting") == 0, 300)  # type: ignore[misc]
        found = stored(machines.home)
        assert acknowledged <= set(found), "acknowledged and lost"
        assert len(found) == len(set(found)), "stored twice"
        print(f"{what}: {len(acknowledged)} acknowledged, all stored, none twice")

    def test_postgres_killed(self, machines: Machines) -> None:
        who = {"cookie": f"p-{uuid.uuid4().hex}"}
        taken(machines.near, happened("view_item", who, items=[{"item_id": "1082185"}]))
        assert self.answered(machines.far, who) is None

        def kill() -> None:
            machines.postgres.kill()
            for service in (machines.far, machines.near):
                assert self.refused(service)
                assert "what was just done may be missing" in str(self.answered(service, who))
                status, said = service.get("/readyz")
                assert status == 200
                assert any("events are refused" in each for each in json.loads(said)["degraded"])
            machines.postgres.start()
            for service in (machines.far, machines.near):
                eventually(lambda service=service: not self.refused(service))  # type: ignore[misc]
                eventually(lambda service=service: self.answered(service, who) is None)  # type: ignore[misc]

        self.goes_on(machines, "PostgreSQL killed", kill)

    @pytest.mark.parametrize("loses", ["the last second", "everything"])
    def test_redis_killed(self, machines: Machines, loses: str) -> None:
        who = {"cookie": f"r-{uuid.uuid4().hex}"}
        taken(machines.near, happened("view_item", who, items=[{"item_id": "1082185"}]))
        eventually(lambda: metric_of(machines.near, "ubiquo_events_waiting") == 0)

        def kill() -> None:
            machines.redis.kill()
            for service in (machines.far, machines.near):
                assert "cannot be read now" in str(self.answered(service, who))
                # the queue takes events as before
                assert not self.refused(service)
            if loses == "everything":
                machines.redis.forget()
            machines.redis.start()

        self.goes_on(machines, f"Redis killed, {loses} lost", kill)
        for service in (machines.far, machines.near):
            eventually(lambda service=service: self.answered(service, who) is None)  # type: ignore[misc]
        self.rows_equal_a_replay(machines)

    @staticmethod
    def rows_equal_a_replay(machines: Machines) -> None:
        """What is online of each visitor is what the log tells, once."""
        identities, store = Identities(machines.home), FeatureStore(machines.home)
        visitors = [c for n in range(50) if (c := identities.resolve({"cookie": f"c{n}"})) is not None]
        rows = CustomerRows(machines.home, store, EventLog(machines.home, ZONE), identities)
        online = store.online("state_v1", visitors)
        for customer, row in zip(visitors, online, strict=True):
            assert row["customer_state_at"] is not None
            replayed = rows._replayed([customer], moment_of(row["customer_state_at"]))
            kept = {name: value for name, value in row.items() if name not in ("customer_id", "customer_state_at")}
            assert replayed[customer].to_row().items() >= {k: v for k, v in kept.items() if v is not None}.items()

    @pytest.mark.parametrize("network", ["postgres", "redis"])
    def test_the_network_hangs(self, machines: Machines, network: str) -> None:
        who = {"cookie": f"n-{uuid.uuid4().hex}"}
        taken(machines.near, happened("view_item", who, items=[{"item_id": "1082185"}]))
        assert self.answered(machines.far, who) is None

        def hang() -> None:
            machines.between[network].passes.clear()
            # each is answered, within its deadline
            for _ in range(3):
                assert self.answered(machines.far, who) is not None
            if network == "postgres":
                assert self.refused(machines.far)
                # the server gives the turn to others where whoever has it is silent
                eventually(lambda: not self.refused(machines.near))
            machines.between[network].passes.set()
            eventually(lambda: self.answered(machines.far, who) is None and not self.refused(machines.far))

        self.goes_on(machines, f"the network to {network} hangs", hang)


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
