"""The quick form of ``make attack``, and what a clock, an order of events and a broken part may not do."""

from __future__ import annotations

import asyncio
import itertools
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from attack import Row, attack_connections, attack_corpus, attack_grammar, attack_schema, metric
from hypothesis import given
from hypothesis import strategies as st
from scene import NEW_YEAR, ROOT, Service, TinyShop, copy_home, event, free_port, start_service, stop_service, surroundings, told

from features.definitions.folds.fold import Line, Touch
from features.definitions.folds.registered import CustomerState
from features.people.consent import Consents
from features.people.identity import Identities
from features.state.clock import MAX_LEAP, WatchedClock, fixed_clock
from features.state.home import Home
from features.store.feature_store import FeatureStore
from serving.decide.reader import OnlineReader
from serving.http.lanes import CrowdedError, Lane, LateError, LongAnswers, Ticket
from serving.intake.inbox import Inbox
from serving.intake.intake import Intake
from serving.runtime import AlreadyServedError, hold

BUSY_SECONDS = 0.1


def check(row: Row, examples: list[str]) -> None:
    assert row.cases > 0
    assert (row.errors, row.hangs) == (0, 0), examples[:5]


class TestClients:
    """Against one service, which goes on answering everybody else."""

    @pytest.fixture(scope="class")
    def attacked(self, trained: Home, tmp_path_factory: pytest.TempPathFactory) -> Any:
        home = copy_home(trained, tmp_path_factory.mktemp("attacked") / "home")
        running = start_service(home)
        yield running
        stop_service(running)

    def test_no_message_that_ever_did_harm_does_it_again(self, attacked: Service) -> None:
        examples: list[str] = []
        check(attack_corpus(attacked, examples), examples)
        # of the processor's time: others share the machine while this runs
        assert metric(attacked, "ubiquo_loop_busy_seconds") < BUSY_SECONDS, "a client's message held the event loop"
        assert attacked.get("/readyz")[0] == 200

    def test_nor_do_messages_that_are_nearly_right(self, attacked: Service) -> None:
        examples: list[str] = []
        check(attack_grammar(attacked, 1_500, 60.0, examples, seed=random.randrange(10**6)), examples)
        assert metric(attacked, "ubiquo_loop_busy_seconds") < BUSY_SECONDS

    def test_nor_what_the_published_description_allows(self, attacked: Service) -> None:
        examples: list[str] = []
        check(attack_schema(attacked, 20.0, examples), examples)

    def test_half_sent_requests_shut_nobody_out(self, attacked: Service) -> None:
        examples: list[str] = []
        check(attack_connections(attacked, examples), examples)

    def test_what_is_sent_between_reaches_the_log(self, attacked: Service) -> None:
        status, answer = attacked.post("/v1/events", event("between", "purchase", NEW_YEAR, "zoe", ["1082185"]))
        assert (status, answer["accepted"]) == (200, 1)
        deadline = time.monotonic() + 30
        while metric(attacked, "ubiquo_events_waiting") and time.monotonic() < deadline:
            time.sleep(0.5)
        assert metric(attacked, "ubiquo_events_waiting") == 0


class Machine:
    """A machine whose wall clock is set, and whose other clock only runs."""

    def __init__(self) -> None:
        self.now, self.run = datetime(2026, 1, 1, tzinfo=UTC), 0.0
        self.clock = WatchedClock(lambda: self.now, lambda: self.run)

    def passes(self, seconds: float) -> None:
        self.now, self.run = self.now + timedelta(seconds=seconds), self.run + seconds


class TestClock:
    def test_thirty_days_ahead_for_eight_seconds_are_not_followed(self) -> None:
        machine = Machine()
        before = machine.clock()
        machine.now += timedelta(days=30)
        for _ in range(8):
            machine.passes(1)
            assert machine.clock() - before < timedelta(seconds=9)
        assert machine.clock.leap == timedelta(days=30)
        machine.now -= timedelta(days=30)
        assert machine.clock() == machine.now
        assert not machine.clock.leap

    @given(st.lists(st.tuples(st.floats(0, 100), st.floats(-1e7, 1e7)), max_size=30))
    def test_whatever_the_wall_clock_does_time_never_runs_backwards_nor_leaps(self, steps: list[tuple[float, float]]) -> None:
        machine = Machine()
        last = machine.clock()
        for passed, leap in steps:
            machine.passes(passed)
            machine.now += timedelta(seconds=leap)
            now = machine.clock()
            assert last <= now <= last + timedelta(seconds=passed) + 2 * MAX_LEAP
            last = now

    def test_a_row_from_a_time_to_come_is_not_believed_and_made_anew(self, tiny: TinyShop) -> None:
        store, identities = FeatureStore(tiny.home), Identities(tiny.home)
        store.apply()
        intake = Intake(
            tiny.home,
            fixed_clock(NEW_YEAR),
            Inbox(tiny.home, fixed_clock(NEW_YEAR)),
            store,
            identities,
            Consents(tiny.home, tiny.shop.consent),
        )
        answer = intake.accept([event("a", "purchase", NEW_YEAR - timedelta(days=1), "1", ["i1"])])
        her = answer.events[0].customer_id
        assert her is not None
        intake.drain()
        late = NEW_YEAR + timedelta(days=30)
        wrong = CustomerState().step(Touch("x", "purchase", late, late.date(), lines=(Line("wrong", 1, 1),)))
        store.push("customer_state", [{"customer_id": her, **wrong.to_row()}], late)
        reader = OnlineReader(store, tiny.shop.timezone, intake.recent)
        asked = ("state_v1", ("customer_state",), ("history",), her)
        assert reader.features(*asked, NEW_YEAR) == {}
        intake.refresh_aggregates()
        assert reader.features(*asked, NEW_YEAR + timedelta(seconds=1))["bought_item_ids"] == ["i1"]
        intake.close()


class TestOrder:
    def test_shuffled_repeated_and_by_four_threads_the_customers_are_the_same(self, tiny: TinyShop, tmp_path: Path) -> None:
        # browsed, logged in on the same device, bought with an address: each alone, and together
        shown = (["cookie"], ["cookie", "user_id"], ["user_id"], ["user_id", "email"], ["email"], ["cookie", "user_id", "email"])
        said = [
            {
                **event(f"{who}-{k}", "view_item", NEW_YEAR - timedelta(hours=k), None, [f"i{k}"]),
                "identifiers": {kind: f"{who}@shop.org" if kind == "email" else f"{kind}-{who}" for kind in kinds},
            }
            for who in range(40)
            for k, kinds in enumerate(shown)
        ]
        found = []
        for run in range(2):
            home = Home(tmp_path / f"run-{run}")
            copy_of(tiny.home, home)
            store, identities = FeatureStore(home), Identities(home)
            store.apply()
            intake = Intake(
                home, fixed_clock(NEW_YEAR), Inbox(home, fixed_clock(NEW_YEAR)), store, identities, Consents(home, tiny.shop.consent)
            )
            if run:
                mixed = said * 2
                random.Random(3).shuffle(mixed)
                senders = [Sender(intake, mixed[n::4]) for n in range(4)]
                for sender in senders:
                    sender.start()
                for sender in senders:
                    sender.join()
            else:
                intake.accept(said)
            given_ids = {c for raw in said if (c := identities.resolve(raw["identifiers"]))}
            intake.drain()
            intake.refresh_aggregates()
            rows = {}
            for who in range(40):
                customer = identities.resolve({"user_id": f"user_id-{who}"})
                assert customer is not None
                assert identities.current(customer) == customer
                row = told(store, customer)
                rows[who] = [row["recent_item_ids"], row["recent_at"], row["last_channel"], sorted(identities.members(customer))]
            assert len(given_ids) == 40
            found.append(rows)
            intake.close()
            # an id that was given out goes on to name the same customer, also for a process that starts now
            again = Identities(home)
            assert {again.current(c) for c in given_ids} == {again.resolve({"user_id": f"user_id-{who}"}) for who in range(40)}
        assert found[0] == found[1]


class Sender(threading.Thread):
    """Sends events one by one."""

    def __init__(self, intake: Intake, raw: list[dict[str, Any]]) -> None:
        super().__init__()
        self.intake, self.raw = intake, raw

    def run(self) -> None:
        for each in self.raw:
            self.intake.accept([each])


def copy_of(home: Home, to: Home) -> None:
    shutil.copytree(home.root, to.root)


class TestLanes:
    def run(self, work: Callable[[], Any]) -> Any:
        return asyncio.run(work())

    def test_what_has_no_place_is_refused_at_once_and_nothing_is_begun(self) -> None:
        lane, gate, begun = (
            Lane("tests", threads=1, waiting=1, patience_seconds=30, deadline_seconds=30),
            threading.Event(),
            itertools.count(),
        )

        async def crowd() -> list[Any]:
            waiting = [asyncio.create_task(lane.run(lambda: (next(begun), gate.wait(10)))) for _ in range(5)]
            await asyncio.sleep(0.2)
            refused = [task for task in waiting if task.done()]
            assert len(refused) == 3
            assert all(isinstance(task.exception(), CrowdedError) for task in refused)
            gate.set()
            return await asyncio.gather(*waiting, return_exceptions=True)

        outcomes = self.run(crowd)
        assert sum(isinstance(each, CrowdedError) for each in outcomes) == 3
        assert next(begun) == 2
        assert self.run(lambda: lane.run(lambda: 7)) == 7, "the places are free again"
        lane.close()

    def test_what_takes_too_long_is_told_and_goes_on(self) -> None:
        lane, done = Lane("tests", threads=1, waiting=1, patience_seconds=30, deadline_seconds=0.1), threading.Event()

        def slow() -> None:
            time.sleep(0.4)
            done.set()

        with pytest.raises(LateError):
            self.run(lambda: lane.run(slow))
        assert done.wait(5)
        lane.close()

    def test_a_long_answer_is_given_later_and_to_the_key_that_asked(self) -> None:
        lane, gate = Lane("tests", threads=1, waiting=4, patience_seconds=30, deadline_seconds=30), threading.Event()
        answers = LongAnswers(lane)

        async def ask() -> None:
            ticket = await answers.ask("ann", 0.05, lambda: gate.wait(10) and "the answer")
            assert isinstance(ticket, Ticket)
            with pytest.raises(LookupError):
                await answers.fetch(ticket.result_id, "bob")
            gate.set()
            assert await answers.fetch(ticket.result_id, "ann", 5) == "the answer"
            with pytest.raises(LookupError):
                await answers.fetch(ticket.result_id, "ann")

        self.run(ask)
        lane.close()


def test_a_second_service_on_one_home_is_refused(tiny: TinyShop) -> None:
    first = hold(tiny.home, is_shared=False)
    with pytest.raises(AlreadyServedError, match="another service runs"):
        hold(tiny.home, is_shared=False)
    first.close()
    hold(tiny.home, is_shared=False).close()


def test_a_model_that_cannot_be_loaded_fails_alone_and_a_service_that_cannot_start_exits(trained: Home, tmp_path: Path) -> None:
    home = copy_home(trained, tmp_path / "home")
    broken = [
        path for path in home.root.glob("mlartifacts/**/*") if path.is_file() and "churn" in path.read_bytes()[:400].decode("latin-1")
    ]
    manifests = [path for path in broken if path.name == "manifest.json"]
    assert manifests
    for path in manifests:
        path.write_text("{}")
    running = start_service(home)
    try:
        status, problem = running.post("/v1/churn", {})
        assert status == 503
        assert "cannot be loaded" in problem["detail"]
        assert running.post("/v1/recommendations", {})[0] == 200
        assert running.post("/v1/next-best-offer", {})[0] == 200
        ready, told = running.get("/readyz")
        assert ready == 200
        assert "churn" in told
        started = [sys.executable, "-W", "ignore", "-m", "serving", "--port", str(free_port())]
        second = subprocess.run(
            started, cwd=ROOT, env={**surroundings(), "UBIQUO_HOME": str(home.root)}, capture_output=True, text=True, timeout=120
        )
        assert second.returncode == 1
        assert "another service runs" in second.stdout
        assert "Traceback" not in second.stdout + second.stderr
    finally:
        stop_service(running)
