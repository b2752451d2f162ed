"""Several services on one state, within one process: what one of them takes, moves on or erases, and what the others make of it."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from scene import NEW_YEAR, TinyShop, customer, event, eventually
from test_journeys import CART, EVENTS, HOUR, WORDS, Scene, Shop

from features.definitions.segments import Vocabulary
from features.people.consent import Consents
from features.people.hidden import Hidden
from features.people.identity import Identities
from features.people.tombstones import Tombstones
from features.people.vault import IDENTIFIER, Personal, Vault
from features.state.clock import fixed_clock, moment_of, system_clock
from features.state.home import Home
from features.state.ports import SERVING, MovedOnError, UnreachableError
from features.state.settings import Settings
from features.state.sqlite_file import SQLiteFile
from features.store import decision_log
from features.store.customer_rows import CustomerRows
from features.store.decision_log import DecisionLog
from features.store.feature_store import FeatureStore
from models.registry import Registry
from serving.bootstrap import check_clocks, model_settings
from serving.decide.questions import OffersAnswer
from serving.http import siblings, workers
from serving.http.app import App
from serving.intake import intake as intakes
from serving.intake.event_queue import ClocksApartError
from serving.intake.inbox import Inbox
from serving.intake.intake import Intake
from serving.journeys.plan import Plans
from serving.journeys.runner import Runner
from serving.journeys.runs import Runs
from serving.privacy.erasure import Office

ADA = {"email": "ada@shop.org"}
SOON = 1 / 60
"""Hours: after all that has come by a clock that stands still, and not from the future."""


def taken(intake: Intake, *events: dict[str, Any]) -> list[str]:
    """What becomes of events, as over HTTP: whoever answers knows first what the others have taken."""
    intake.catch_up()
    return [each.status for each in intake.accept(events).events]


def did(event_id: str, name: str, who: dict[str, str], hours: float = -1, **more: Any) -> dict[str, Any]:
    return {**event(event_id, name, NEW_YEAR + timedelta(hours=hours), card=None), "identifiers": who, **more}


def decided(decision_id: str, customer_id: str) -> dict[str, Any]:
    return {
        "decision_id": decision_id, "kind": "churn", "customer_id": customer_id, "as_of": NEW_YEAR, "model": "churn/1", "feature_at": 1,
        "fallback": None, "request": {}, "choices": [], "features": {},
    }  # fmt: skip


class TestTwoIntakes:
    @pytest.fixture
    def two(self, tiny: TinyShop) -> Iterator[tuple[Intake, Intake]]:
        tiny.add(event("first", "login", NEW_YEAR - timedelta(days=3), card="1"))
        clock = fixed_clock(NEW_YEAR)
        made = []
        for home in (tiny.home, Home(tiny.home.root)):
            store = FeatureStore(home)
            store.apply()
            made.append(Intake(home, clock, Inbox(home, clock), store, Identities(home), Consents(home, tiny.shop.consent)))
        yield made[0], made[1]
        for intake in made:
            if intake.inbox.is_open:
                intake.close()

    def test_who_begins_anew_at_one_is_welcome_at_the_other_at_once(self, tiny: TinyShop, two: tuple[Intake, Intake]) -> None:
        one, other = two
        keys = [one.identities.vault.key("email", "ada@shop.org")]
        office = Tombstones(tiny.home, one.identities.vault)
        office.add(keys, NEW_YEAR - timedelta(days=1))
        office.settle(keys)
        assert taken(one, did("up", "sign_up", ADA, -2)) == ["accepted"]
        assert taken(other, did("look", "view_item", ADA, items=[{"item_id": "i1"}])) == ["accepted"]
        # and where somebody else is erased meanwhile, at the first too
        office.add([one.identities.vault.key("email", "bob@shop.org")], NEW_YEAR)
        assert taken(one, did("look-2", "view_item", ADA, items=[{"item_id": "i1"}])) == ["accepted"]
        assert one.drain() == 3
        assert one._log.count() == 4

    def test_who_has_lost_the_lease_folds_nothing_twice(self, tiny: TinyShop, two: tuple[Intake, Intake], monkeypatch: Any) -> None:
        one, other = two
        card = {"loyalty_card": "1"}
        assert taken(one, did("before", "view_item", card, -2, items=[{"item_id": "i1"}])) == ["accepted"]
        one.drain()
        fold = one._drain._fold

        def stalled(*rest: Any) -> None:
            # the network hangs between log and rows; the server gives the lease to another, which finds all of it in the log
            monkeypatch.undo()
            with one._drain._lease.hold("nothing") as held:
                monkeypatch.setattr(other._drain, "_lease", type("Given", (), {"hold": lambda *a, **k: contextlib.nullcontext(held)})())
                assert other.drain() == 1
            fold(*rest)

        assert taken(one, did("bought", "view_item", card, items=[{"item_id": "i2"}])) == ["accepted"]
        monkeypatch.setattr(one._drain, "_fold", stalled)
        one.drain()
        store = FeatureStore(tiny.home)
        rows = CustomerRows(tiny.home, store, tiny.log)
        [held] = store.online("state_v1", [customer("1")])
        rows.rebuild([customer("1")], moment_of(held["customer_state_at"]))
        assert [held] == store.online("state_v1", [customer("1")])

    def test_events_are_taken_while_the_lake_is_away_though_another_has_just_moved_some(
        self, two: tuple[Intake, Intake], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def away(*_: Any) -> None:
            raise UnreachableError("the lake does not answer")

        one, other = two
        view = {"items": [{"item_id": "i1"}]}
        assert taken(one, did("a", "view_item", {"loyalty_card": "1"}, **view)) == ["accepted"]
        other.catch_up()
        one.drain()
        with monkeypatch.context() as patch:
            patch.setattr(other.identities, "refresh", away)
            assert taken(other, did("b", "view_item", {"loyalty_card": "1"}, **view)) == ["accepted"]
        assert other.drain() == 1

    def test_nobody_waits_long_for_a_lake_that_is_silent(self, two: tuple[Intake, Intake], monkeypatch: pytest.MonkeyPatch) -> None:
        one, other = two
        answers, asked, refresh = threading.Event(), threading.Event(), other.identities.refresh

        def silent() -> None:
            asked.set()
            assert answers.wait(60)
            refresh()

        monkeypatch.setattr(other.identities, "refresh", silent)
        monkeypatch.setattr(intakes, "MISSING_SECONDS", 0.2)
        view = {"items": [{"item_id": "i1"}]}
        who = {"loyalty_card": "1"}
        assert taken(one, did("a", "view_item", who, **view)) == ["accepted"]
        other.catch_up()
        one.drain()
        # all of it was followed: nobody needs the lake, and what is looked up there is looked up by who has time
        assert taken(other, did("b", "view_item", who, **view)) == ["accepted"]
        assert not asked.is_set()
        assert taken(one, did("c", "view_item", who, **view), did("d", "login", {**who, "user_id": "ada"})) == ["accepted"] * 2
        one.drain()
        assert taken(one, did("e", "view_item", who, **view)) == ["accepted"]
        for _ in range(3):
            # this one was too late to follow those: it says so, each time and soon
            with pytest.raises(UnreachableError, match="cannot be read yet"):
                other.catch_up()
        assert asked.is_set()
        assert [each.status for each in other.accept([did("f", "view_item", who, **view)]).events] == ["accepted"]
        held = [at for at, _ in other.recent.fresh(customer("1"))]
        assert len(held) == len(set(held)) == 2, "what was followed counts once, however often it was looked for"
        answers.set()
        other.take_in()
        other.catch_up()
        assert other.identities.resolve({"user_id": "ada"}) == customer("1")
        other.drain()
        assert (len(other.backlog), other.backlog.bytes) == (0, 0)

    def test_who_has_nothing_to_compute_puts_nothing_into_the_queue(self, two: tuple[Intake, Intake]) -> None:
        one, other = two
        assert taken(one, did("a", "view_item", {"loyalty_card": "1"}, items=[{"item_id": "i1"}])) == ["accepted"]
        one.drain()
        assert one.refresh_if_due() == 1
        other.catch_up()
        last = other.inbox.standing().last
        assert (one.refresh_if_due(), other.refresh_if_due()) == (0, 0)
        one.catch_up()
        assert one.inbox.standing().last == last

    def test_whoever_goes_on_computes_what_another_had_moved_on_when_it_was_killed(
        self, tiny: TinyShop, two: tuple[Intake, Intake], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def baskets() -> int | None:
            [row] = FeatureStore(tiny.home).online("activity_v1", [customer("9")])
            found: int | None = row["baskets_28"]
            return found

        one, other = two
        bought = {"loyalty_card": "9"}
        assert taken(one, did("bought", "purchase", bought, items=[{"item_id": "i2"}])) == ["accepted"]
        one.drain()
        # nothing more comes of that one; the other has only followed
        assert baskets() is None
        assert (other.refresh_if_due(), baskets()) == (1, 1)
        assert other.refresh_if_due() == 0
        assert taken(one, did("again", "purchase", bought, items=[{"item_id": "i3"}])) == ["accepted"]
        one.drain()

        def killed(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(one._drain.rows, "compute", killed)
            with pytest.raises(KeyboardInterrupt):
                one.refresh_aggregates()
        assert (other.refresh_if_due(), baskets()) == (1, 2)

    def test_what_an_erased_person_allowed_is_forgotten_by_all(self, tiny: TinyShop, two: tuple[Intake, Intake]) -> None:
        one, other = two
        decisions = DecisionLog(tiny.home)
        store, registry = FeatureStore(tiny.home), Registry(model_settings(tiny.home))
        office = Office(tiny.home, fixed_clock(NEW_YEAR), store, one, decisions, registry, purge_at="")
        said = {"consent": {"permissions": {"email": True}, "policy_version": "v1", "source": "form"}}
        assert taken(other, did("up", "sign_up", ADA, -3, **said)) == ["accepted"]
        one.drain()
        # as it moves on what is known to it, it notes nothing any more
        other.catch_up()
        key = one.identities.vault.key("email", "ada@shop.org")
        for intake in two:
            assert intake._consents.allows([key], "email")
        owner = one.identities.owner_of([key])
        assert owner is not None
        office.receipt(office.begin(owner), timeout=60)
        office.close()
        decisions.close()
        assert taken(other, did("anew", "sign_up", ADA, SOON)) == ["accepted"]
        for intake in two:
            assert not intake._consents.allows([key], "email")

    def test_a_cookie_of_an_erased_person_that_comes_again_is_in_the_contact_table_again(
        self, tiny: TinyShop, two: tuple[Intake, Intake]
    ) -> None:
        one, other = two
        both = {**ADA, "cookie": "cookie-of-ada"}
        assert taken(other, did("up", "sign_up", both, -3)) == ["accepted"]
        other.drain()
        decisions = DecisionLog(tiny.home)
        office = Office(tiny.home, fixed_clock(NEW_YEAR), FeatureStore(tiny.home), one, decisions, Registry(model_settings(tiny.home)), "")
        one.catch_up()
        owner = one.identities.resolve(ADA)
        assert owner is not None
        office.receipt(office.begin(owner), timeout=60)
        office.close()
        decisions.close()
        assert taken(other, did("anew", "sign_up", ADA, SOON), did("again", "login", both, SOON)) == ["accepted", "accepted"]
        other.drain()
        vault = one.identities.vault
        keys = [vault.key("email", "ada@shop.org"), vault.key("cookie", "cookie-of-ada")]
        assert other.contacts.identifiers(keys) == dict(zip(keys, ("ada@shop.org", "cookie-of-ada"), strict=True))

    def test_whom_another_has_hidden_is_remembered_no_more(self, tiny: TinyShop, two: tuple[Intake, Intake]) -> None:
        _, other = two
        said = {"consent": {"permissions": {"email": True}, "policy_version": "v1", "source": "form"}}
        assert taken(other, did("up", "sign_up", ADA, -3, **said)) == ["accepted"]
        other.drain()
        key = other.identities.vault.key("email", "ada@shop.org")
        personal = [Personal(key, IDENTIFIER, "ada@shop.org")]
        assert other._consents.allows([key], "email")
        assert other.contacts.news(personal) == []
        Hidden(Home(tiny.home.root)).add([key], [], [])
        other.identities.hidden.look_again()
        assert other.identities.owner_of([key]) is None
        assert not other._consents.allows([key], "email")
        assert other.contacts.news(personal) == personal


class TestClocks:
    def test_a_clock_that_was_wrong_stops_nobody_once_all_have_ended(self, tiny: TinyShop) -> None:
        right, wrong = fixed_clock(NEW_YEAR), fixed_clock(NEW_YEAR + timedelta(days=1))
        home = Home(tiny.home.root, Settings(shared=True))
        early = Inbox(home, wrong)
        early.moment()
        early.close()
        stopped = Inbox(home, right)
        with pytest.raises(ClocksApartError, match="then end all services and start them again"):
            stopped.moment()
        with home.lease.take(SERVING, shared=True):
            check_clocks(home, right)
        with pytest.raises(ClocksApartError):
            stopped.moment()
        stopped.close()
        # none is left that would see receipts go back
        check_clocks(home, right)
        again = Inbox(home, right)
        assert NEW_YEAR <= again.moment() <= NEW_YEAR + timedelta(seconds=1)
        again.close()

    def test_a_machine_whose_clock_is_not_the_servers_does_not_join(self, tiny: TinyShop, postgres_url: str) -> None:
        home = Home(tiny.home.root, Settings(database=postgres_url))
        check_clocks(home, system_clock)
        with pytest.raises(ClocksApartError, match=r"the database server's .*: set both right"):
            check_clocks(home, lambda: system_clock() + timedelta(days=1))


class TestDecisions:
    def test_an_erasure_reaches_what_another_service_has_decided_and_not_flushed(self, tiny: TinyShop) -> None:
        one, other = DecisionLog(tiny.home), DecisionLog(Home(tiny.home.root))
        other.flush_if_due()
        assert other.append(decided("hers", "ada"))
        assert other.append(decided("his", "bob"))
        ended = threading.Event()

        def work() -> None:
            while not ended.wait(0.02):
                other.flush_if_due()

        background = threading.Thread(target=work)
        background.start()
        try:
            assert one.erase_everywhere(["ada"]) == 1
        finally:
            ended.set()
            background.join()
        other.flush()
        assert [row["decision_id"] for row in one.read()] == ["his"]
        one.close()
        other.close()

    def test_an_erasure_is_not_done_where_another_service_keeps_hold_of_its_decisions(
        self, tiny: TinyShop, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(decision_log, "OTHERS_SECONDS", 0.0)
        one, other = DecisionLog(tiny.home), DecisionLog(Home(tiny.home.root))
        assert other.append(decided("hers", "ada"))
        with pytest.raises(TimeoutError, match="spool"):
            one.erase_everywhere(["ada"])
        other.close()
        assert one.erase_everywhere(["ada"]) == 1
        one.close()

    def test_who_has_lost_the_lease_appends_no_decision_that_another_has_moved(
        self, tiny: TinyShop, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one, other = DecisionLog(tiny.home), DecisionLog(Home(tiny.home.root))
        assert one.append(decided("d", "ada"))
        columns = decision_log._columns

        def stalled(lines: Sequence[Any]) -> Any:
            # the network hangs, and the server gives the lease to another, which finds a spool that nobody uses
            monkeypatch.undo()
            assert other._flush() == 1
            return columns(lines)

        monkeypatch.setattr(decision_log, "_columns", stalled)
        with pytest.raises(MovedOnError):
            one._flush()
        assert one.flush() == 0
        assert [row["decision_id"] for row in one.read()] == ["d"]
        one.close()
        other.close()


def test_two_who_are_hidden_within_one_tick_of_the_disks_clock_are_both_hidden_to_others(
    tiny: TinyShop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("features.people.hidden.LOOK_SECONDS", 0.0)
    stamp = SQLiteFile.stamp
    # the clock of a file system ticks every few milliseconds, and a file of few rows keeps its size
    monkeypatch.setattr(SQLiteFile, "stamp", lambda self: None if stamp(self) is None else ("the same", 1, 4096))
    one, other = Hidden(tiny.home), Hidden(Home(tiny.home.root))
    one.add(["a"], [], [])
    assert other.keys == {"a"}
    one.add(["b"], [], [])
    assert other.keys == {"a", "b"}


def test_who_asks_while_another_thread_looks_is_told_no_less(tiny: TinyShop, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = Hidden(tiny.home), Hidden(Home(tiny.home.root))
    assert other.keys == frozenset()
    one.add(["a"], [], [])
    other.look_again()
    stamp, looks, goes_on = SQLiteFile.stamp, threading.Event(), threading.Event()

    def slow(database: SQLiteFile) -> Any:
        looks.set()
        goes_on.wait(60)
        return stamp(database)

    monkeypatch.setattr(SQLiteFile, "stamp", slow)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(lambda: other.keys)
        looks.wait(60)
        second = threads.submit(lambda: other.keys)
        wait([second], 0.2)
        goes_on.set()
        assert first.result() == second.result() == {"a"}


class Lake:
    """What a process remembers of the log, which lies in a lake that may be away."""

    def __init__(self) -> None:
        self.is_away, self.looks = True, 0

    def refresh(self) -> None:
        self.looks += 1
        if self.is_away:
            raise UnreachableError("the lake does not answer")


def test_whom_another_hides_is_hidden_though_the_log_cannot_be_read(tiny: TinyShop) -> None:
    lake = Lake()
    one, other = Hidden(tiny.home), Hidden(Home(tiny.home.root), lake.refresh)
    one.add(["a"], ["c"], ["e"])
    other.look_again()
    assert (other.keys, other.customers, other.events) == ({"a"}, {"c"}, {"e"})


def test_who_is_purged_stays_hidden_until_all_that_is_remembered_was_forgotten(tiny: TinyShop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("features.people.hidden.FORGET_AGAIN_SECONDS", 0.0)
    lake = Lake()
    one, other = Hidden(tiny.home), Hidden(Home(tiny.home.root), lake.refresh)
    one.add(["a"], [], [])
    other.look_again()
    assert other.keys == {"a"}
    one.remove(["a"], [], [])
    one.add(["b"], [], [])
    other.look_again()
    assert other.keys == {"a", "b"}
    assert other.keys == {"a", "b"}, "as often as it is asked"
    lake.is_away = False
    assert other.keys == {"b"}
    looks = lake.looks
    assert other.keys == {"b"}
    assert lake.looks == looks


def test_who_was_hidden_and_purged_since_it_was_looked_is_forgotten_too(tiny: TinyShop) -> None:
    lake = Lake()
    lake.is_away = False
    one, other = Hidden(tiny.home), Hidden(Home(tiny.home.root), lake.refresh)
    one.add(["a"], [], [])
    one.remove(["a"], [], [])
    other.look_again()
    assert (other.keys, lake.looks) == (frozenset(), 1)


def test_who_asks_waits_no_longer_than_a_moment_for_a_lake_that_is_slow(tiny: TinyShop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("features.people.hidden.PURGED_SECONDS", 0.1)
    begun, ends = threading.Event(), threading.Event()

    def slow() -> None:
        begun.set()
        ends.wait(60)

    one, other = Hidden(tiny.home), Hidden(Home(tiny.home.root), slow)
    one.add(["a"], [], [])
    assert other.keys == {"a"}
    one.remove(["a"], [], [])
    other.look_again()
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(lambda: other.keys)
        begun.wait(60)
        try:
            assert threads.submit(lambda: other.keys).result(10) == {"a"}, "who was purged is hidden meanwhile"
        finally:
            ends.set()
        assert first.result() == frozenset()


def test_a_look_that_failed_is_made_again_soon(tiny: TinyShop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("features.people.hidden.LOOK_SECONDS", 60.0)
    monkeypatch.setattr("features.people.hidden.LOOK_AGAIN_SECONDS", 0.0)
    one, other = Hidden(tiny.home), Hidden(Home(tiny.home.root))
    assert other.keys == frozenset()
    one.add(["a"], [], [])
    other.look_again()

    def away(_: SQLiteFile) -> Any:
        raise UnreachableError("the database does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(SQLiteFile, "stamp", away)
        assert other.keys == frozenset()
    assert other.keys == {"a"}


def test_whoever_looks_takes_no_turn_of_those_who_write(tiny: TinyShop) -> None:
    vault = Vault.open(tiny.home)
    home = Home(tiny.home.root)
    hidden, stones = Hidden(tiny.home), Tombstones(tiny.home, vault)
    hidden.add(["a"], [], [])
    stones.add(["email:x"], NEW_YEAR)
    looks, reads = Hidden(home), Tombstones(home, vault)
    with home.database("hidden").begin(), home.database("tombstones").begin(), ThreadPoolExecutor(1) as threads:
        assert threads.submit(lambda: looks.keys).result(10) == {"a"}
        assert threads.submit(lambda: reads.stand_since(["email:x"], NEW_YEAR)).result(10)
    looks.close()
    reads.close()
    assert looks.keys == {"a"}, "it is opened again where it is needed"


def open_files() -> int:
    """How many files this process holds open, without those that wait to be let go."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


class TestSupervisor:
    @pytest.fixture
    def supervisor(self, tmp_path: Path) -> Iterator[workers.Supervisor]:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            yield workers.Supervisor(listener, 1, dict(os.environ))

    def test_a_process_that_ends_again_and_again_leaves_no_open_file(
        self, supervisor: workers.Supervisor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(workers.sys, "executable", "/bin/false")
        before = open_files()
        for _ in range(5):
            supervisor._start_at = 0.0
            supervisor._start_again()
            [process] = supervisor._processes
            process.wait()
            supervisor._start_again()
            assert supervisor._processes == []
        assert open_files() == before

    def test_where_no_process_can_be_started_now_the_others_go_on(
        self, supervisor: workers.Supervisor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(workers.sys, "executable", "/nowhere/python")
        before = open_files()
        supervisor._start_again()
        assert supervisor._processes == []
        assert open_files() == before
        assert supervisor._waits > 0


class TestJourneysOfTwoServices:
    @pytest.fixture
    def scene(self, tmp_path: Path) -> Scene:
        return Scene(tmp_path / "home")

    def test_a_step_that_two_take_as_the_lease_was_lost_keeps_its_promise(self, scene: Scene) -> None:
        class Stalled(Shop):
            def offer(self, *asked: Any) -> OffersAnswer:
                answer = super().offer(*asked)
                assert scene.runner.step_due(scene.now) == 1
                return answer

        shop = Stalled()
        slow = Runner(Runs(Home(scene.home.root)), scene.plans, WORDS, shop, ZoneInfo("America/New_York"))
        scene.happens("add_to_cart")
        scene.now += 2 * HOUR
        slow.step_due(scene.now)
        assert scene.left() == [("push", "waiting")]
        assert shop.decided[0][1] == scene.shop.decided[0][1]
        assert shop.released == scene.shop.released == []

    def test_a_journey_of_words_that_one_has_yet_to_read_goes_on_there(self, scene: Scene) -> None:
        words = Vocabulary.parse(b"segments:\n  fresh: recency_days < 5\n", "segments.yaml", "")
        path = scene.home.root / "journeys.yaml"
        path.write_text(CART.replace("URL", "http://127.0.0.1:9/").replace("recency_days < 90", "fresh"))
        new = Plans.read(path, words, EVENTS)
        one = Runner(Runs(Home(scene.home.root)), new, words, scene.shop, ZoneInfo("America/New_York"))
        one.follow([scene.event("add_to_cart")])
        scene.later(HOUR + timedelta(minutes=1))
        assert scene.ended() == {"waiting": 1}
        scene.runner.plans, scene.runner.vocabulary = new, words
        scene.later(timedelta(minutes=2), timedelta(seconds=30))
        assert scene.left() == [("push", "waiting")]


def test_a_process_that_nobody_has_asked_tells_its_champions_to_those_beside_it(
    tiny: TinyShop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(siblings, "TELL_SECONDS", 0.01)
    settings, own = model_settings(tiny.home), tmp_path / f"{os.getpid()}.prom"
    app = App(settings, str(tmp_path))

    def champions(text: str) -> list[float]:
        return [float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith("ubiquo_champions")]

    try:
        eventually(lambda: own.exists() and champions(own.read_text()) == [0.0])
        app.runtime = SimpleNamespace(  # type: ignore[assignment]
            engine=SimpleNamespace(missing=lambda: ["churn"]), decisions=SimpleNamespace(unlogged=0), intake=SimpleNamespace(waiting=0)
        )
        # what a process that was never asked has told stands beside this one's
        eventually(lambda: champions(own.read_text()) == [len(settings.models) - 1.0])
        (tmp_path / "1.prom").write_bytes(own.read_bytes())
        assert champions(app._siblings.told().decode()) == [len(settings.models) - 1.0] * 2
    finally:
        app.close()
