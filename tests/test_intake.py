"""Acknowledged means stored, exactly once: under load, after a kill at any moment, and with an inbox that has a bound."""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import Future
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from scene import NEW_YEAR, SECRET, Brought, Service, TinyShop, copy_home, customer, event, start_service, stop_service, told
from sqlalchemy.exc import OperationalError

from features.people.consent import Consents
from features.people.contacts import Contacts
from features.people.identity import Identities
from features.people.tombstones import Tombstones
from features.people.vault import IDENTIFIER, Personal
from features.sources import segment
from features.sources.replay import TRANSLATORS
from features.state.clock import fixed_clock
from features.state.home import Home
from features.state.ports import MissingStateError
from features.store.event_log import EventLog, connect
from features.store.feature_store import FeatureStore
from serving.decide.reader import OnlineReader
from serving.intake.event_queue import Accepted
from serving.intake.inbox import Inbox
from serving.intake.intake import InboxFullError, Intake, NotStoredError
from serving.intake.queue_asked import wait_until_moved

ZONE = "America/New_York"
KILLS = int(os.environ.get("UBIQUO_KILLS", "2"))
"""``make bench`` kills more often."""


def batch(size: int, who: str | None = None, at: datetime = NEW_YEAR) -> list[dict[str, Any]]:
    return [
        {
            "event_id": uuid.uuid4().hex, "name": "view_item", "occurred_at": at.isoformat(), "channel": "web",
            "identifiers": {"cookie": who or f"cookie-{uuid.uuid4().hex[:8]}"}, "items": [{"item_id": "1082185"}],
        }
        for _ in range(size)
    ]  # fmt: skip


class Load(threading.Thread):
    """A client that sends batches as fast as it is answered, and remembers what was acknowledged."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.port, self.acknowledged, self.sent = port, list[str](), 0

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            while True:
                events = batch(20)
                self.sent += len(events)
                connection.request("POST", "/v1/events", json.dumps({"events": events}), {"content-type": "application/json"})
                with connection.getresponse() as response:
                    answer = json.load(response)
                    if response.status == 200:
                        self.acknowledged += [e["event_id"] for e in answer["events"] if e["status"] == "accepted"]
        except (OSError, http.client.HTTPException, ValueError):
            return  # the service was killed


def test_what_was_acknowledged_is_stored_exactly_once_whenever_the_process_is_killed(trained: Home, tmp_path: Path) -> None:
    home, random_moment = copy_home(trained, tmp_path / "home"), random.Random()
    acknowledged: list[str] = []
    for _ in range(KILLS):
        running = start_service(home)
        clients = [Load(running.port) for _ in range(4)]
        for client in clients:
            client.start()
        time.sleep(random_moment.uniform(0.2, 2.5))
        stop_service(running, signal.SIGKILL)
        for client in clients:
            client.join(60)
            acknowledged += client.acknowledged
    stop_service(start_service(home))
    ids = connect().execute("SELECT event_id FROM read_parquet(?)", [EventLog(home, ZONE).files()]).fetchall()
    stored = [event_id for (event_id,) in ids]
    print(f"{KILLS} kills: {len(acknowledged)} acknowledged, {len(set(acknowledged) & set(stored))} of them stored, "
          f"{len(stored) - len(set(stored))} stored twice")  # fmt: skip
    assert len(acknowledged) > 100 * KILLS
    assert set(acknowledged) <= set(stored), "acknowledged and lost"
    assert len(stored) == len(set(stored)), "stored twice"
    with sqlite3.connect(home.inbox) as inbox:
        assert inbox.execute("SELECT count(*) FROM waiting").fetchone() == (0,)


def test_the_disk_is_synced_before_the_answer_is_written(own_service: Service, tmp_path: Path) -> None:
    """A trace of system calls: between reading a request and writing its answer lies a sync of the inbox."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed (apt-get install strace)")
    worker = worker_of(own_service)
    trace = tmp_path / "trace.txt"
    tracer = subprocess.Popen(
        [
            strace,
            "-f",
            "-y",
            "-tt",
            "-e",
            "trace=fsync,fdatasync,sendto,sendmsg,write,writev,recvfrom,read",
            "-s",
            "64",
            "-o",
            str(trace),
            "-p",
            str(worker),
        ],
        stderr=subprocess.PIPE,
    )
    try:
        assert tracer.stderr is not None
        assert b"attached" in tracer.stderr.readline()
        for _ in range(5):
            answer = own_service.ask("events", {"events": batch(3)})
            assert answer["accepted"] == 3
        time.sleep(0.3)
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.wait(30)
    requests = 0
    synced = asked = False
    for line in trace.read_text().splitlines():
        if "POST /v1/events" in line:
            asked, synced = True, False
        elif re.search(r"f(data)?sync\(\d+<[^>]*inbox\.db", line) or ("sync resumed" in line and asked):
            synced = True
        elif asked and "HTTP/1.1 200" in line:
            assert synced, "the answer left before the inbox was on the disk"
            requests, asked = requests + 1, False
    assert requests == 5


def worker_of(service: Service) -> int:
    """The process that listens for requests."""
    import psutil

    family = [psutil.Process(service.process.pid), *psutil.Process(service.process.pid).children(recursive=True)]
    for process in family[::-1]:
        if any("inbox.db" in each.path for each in process.open_files()):
            return int(process.pid)
    raise AssertionError("no process has the inbox open")


def test_a_full_inbox_asks_to_come_again_and_takes_nothing(trained: Home, tmp_path: Path) -> None:
    small = start_service(copy_home(trained, tmp_path / "home"), UBIQUO_MAX_WAITING="50")
    try:
        events = batch(60)
        connection = http.client.HTTPConnection("127.0.0.1", small.port, timeout=30)
        connection.request("POST", "/v1/events", json.dumps({"events": events}), {"content-type": "application/json"})
        with connection.getresponse() as response:
            problem = json.load(response)
            assert response.status == 429
            assert int(response.headers["retry-after"]) >= 1
            assert "send again" in problem["detail"]
        assert small.ask("events", {"events": events[:40]})["accepted"] == 40, "none of the sixty was taken"
    finally:
        stop_service(small)


class TestIntakeItself:
    """Without HTTP, on an invented shop."""

    @pytest.fixture
    def intake(self, tiny: TinyShop) -> Any:
        tiny.add(
            {
                "event_id": "first",
                "name": "login",
                "occurred_at": (NEW_YEAR - timedelta(days=3)).isoformat(),
                "identifiers": {"loyalty_card": "1"},
            }
        )
        store = FeatureStore(tiny.home)
        store.apply()
        identities = Identities(tiny.home)
        intake = Intake(
            tiny.home,
            fixed_clock(NEW_YEAR),
            Inbox(tiny.home, fixed_clock(NEW_YEAR)),
            store,
            identities,
            Consents(tiny.home, tiny.shop.consent),
        )
        yield intake
        intake.close()

    def test_the_features_of_who_came_while_they_were_computed_are_computed_again(
        self, intake: Intake, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        drain = intake._drain.drain

        def late() -> int:
            assert intake.accept(batch(1)).accepted == 1
            return drain()

        with monkeypatch.context() as patch:
            patch.setattr(intake._drain, "drain", late)
            assert intake.refresh_aggregates() == 1
        assert intake.refresh_aggregates() == 1
        assert intake.refresh_aggregates() == 0

    def test_who_reads_the_log_waits_until_it_tells_all_that_was_accepted(self, intake: Intake) -> None:
        wait_until_moved(intake._home, 0)
        assert intake.accept(batch(2)).accepted == 2
        with pytest.raises(MissingStateError, match=r"2 events that were accepted are not in the log yet.*start one"):
            wait_until_moved(intake._home, 0)
        waiting = threading.Thread(target=wait_until_moved, args=(intake._home,))
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
        intake.drain()
        waiting.join(30)
        assert not waiting.is_alive()
        # a place without an event, as an erasure takes one, is not waited for
        intake.inbox.moment()
        wait_until_moved(intake._home, 0)

    def test_what_the_log_took_though_it_failed_afterwards_is_in_the_online_rows(
        self, intake: Intake, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        log, [event] = intake._log, batch(1, who="regular")
        event = {**event, "name": "purchase", "currency": "USD"}
        append = log.append

        def full_disk(rows: Any, identities: Identities) -> Any:
            append(rows, identities)
            raise OSError("no space left on device")

        assert intake.accept([event]).accepted == 1
        with monkeypatch.context() as patch:
            patch.setattr(log, "append", full_disk)
            with pytest.raises(OSError, match="no space"):
                intake.drain()
        intake.drain()
        regular = intake.identities.resolve({"cookie": "regular"})
        assert regular is not None
        row = told(FeatureStore(intake._home), regular)
        assert row["bought_item_ids"] == ["1082185"]

    @pytest.mark.parametrize(
        ("source", "odd"),
        [
            ("segment", {"context": {"externalIds": 5}}),
            ("segment", {"properties": {"currency": "USD", "products": [{"sku": "1", "price": "1e999999"}]}}),
            ("segment", {"properties": {"currency": "USD", "products": [{"sku": "1", "quantity": "1e99999"}]}}),
            ("segment", {"originalTimestamp": "0001-01-01T00:00:00Z", "sentAt": "9990-01-01T00:00:00Z"}),
            ("ga4", {"consent": {"ad_user_data": ["x"]}}),
            ("ga4", {"event": {"name": "purchase", "params": {"currency": "USD", "items": [{"item_id": "1", "price": "NaN"}]}}}),
        ],
    )
    def test_a_clients_odd_value_is_a_dead_letter_and_holds_no_other_up(self, intake: Intake, source: str, odd: dict[str, Any]) -> None:
        plain = {"segment": {"type": "identify", "userId": "u"}, "ga4": {"client_id": "c.1", "event": {"name": "login"}}}[source]
        track = {"type": "track", "event": "Order Completed"} if source == "segment" else {}
        answer = intake.accept([{**plain, **track, **odd}, plain], source, lambda raw, now: TRANSLATORS[source](raw, now, "USD"))
        assert (answer.accepted, answer.rejected) == (1, 1), answer

    def test_an_inbox_that_is_closed_while_it_is_busy_finishes_what_it_took(self, tmp_path: Path) -> None:
        inbox, begun, go_on = Inbox(Home(tmp_path), fixed_clock(NEW_YEAR)), threading.Event(), threading.Event()
        commit = inbox._commit

        def slow(jobs: Any) -> Any:
            begun.set()
            assert go_on.wait(30)
            return commit(jobs)

        inbox._commit = slow  # type: ignore[method-assign]
        first, second, third = (Future[None]() for _ in range(3))
        inbox.submit(Brought([Accepted("a", "h", NEW_YEAR, b"{}", "http")]), first)
        assert begun.wait(30)
        inbox.submit(Brought([Accepted("b", "h", NEW_YEAR, b"{}", "http")]), second)
        closing = threading.Thread(target=inbox.close, daemon=True)
        closing.start()
        while not inbox._closed:
            time.sleep(0.01)
        inbox.submit(Brought(), third)
        go_on.set()
        closing.join(30)
        assert not closing.is_alive()
        assert (first.result(1), second.result(1)) == (None, None)
        assert isinstance(third.exception(1), RuntimeError)
        assert len(Inbox(Home(tmp_path), fixed_clock(NEW_YEAR)).waiting()) == 2

    def test_a_repeat_of_what_the_log_holds_is_a_duplicate_whoever_stored_it(self, intake: Intake) -> None:
        old = {
            "event_id": "first",
            "name": "login",
            "occurred_at": (NEW_YEAR - timedelta(days=3)).isoformat(),
            "identifiers": {"loyalty_card": "1"},
        }
        assert intake.accept([old]).duplicates == 1
        assert intake.accept([{**old, "name": "call"}]).rejected == 1
        [new] = batch(1)
        assert [intake.accept([new, new]).accepted, intake.accept([new]).duplicates] == [1, 1]
        intake.drain()
        assert intake.accept([new]).duplicates == 1

    def test_an_answer_knows_the_event_before_the_log_does(self, intake: Intake) -> None:
        [view] = batch(1, who="c")
        receipt = intake.accept([{**view, "identifiers": {"loyalty_card": "1"}}]).events[0]
        assert receipt.customer_id == customer("1")
        reader = OnlineReader(FeatureStore(intake._home), "America/New_York", intake.recent)
        asked = ("state_v1", ("customer_state",), ("history", "session"), customer("1"), NEW_YEAR + timedelta(seconds=1))
        assert len(intake.recent.fresh(customer("1"))) == 1
        at_once = reader.features(*asked)
        assert at_once["recent_item_ids"] == ["1082185"]
        intake.drain()
        assert intake.recent.fresh(customer("1")) == []
        afterwards = reader.features(*asked)
        assert {**afterwards, "customer_state_at": None} == {**at_once, "customer_state_at": None}, "it is not folded in twice"

    def test_a_broken_disk_is_told_and_nothing_is_taken_for_stored(self, intake: Intake, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: Any) -> None:
            raise OperationalError("INSERT", {}, Exception("the disk went away"))

        [event] = batch(1)
        monkeypatch.setattr(intake.inbox, "_commit", full)
        with pytest.raises(NotStoredError, match="send the same again"):
            intake.accept([event])
        monkeypatch.undo()
        assert intake.accept([event]).accepted == 1, "sent again it is new"

    def test_a_repeat_of_what_never_got_to_the_disk_is_no_duplicate(self, intake: Intake, monkeypatch: pytest.MonkeyPatch) -> None:
        """The first is still being written when it is sent again, and then its write fails."""
        began, go_on = threading.Event(), threading.Event()
        commit = intake.inbox._commit

        def slow_and_broken(jobs: Any) -> Any:
            if not began.is_set():
                began.set()
                go_on.wait(10)
                raise OperationalError("INSERT", {}, Exception("the disk went away"))
            return commit(jobs)

        monkeypatch.setattr(intake.inbox, "_commit", slow_and_broken)
        [event] = batch(1)
        outcomes: list[Any] = []

        def send() -> None:
            try:
                outcomes.append(intake.accept([event]))
            except NotStoredError as error:
                outcomes.append(error)

        threads = [threading.Thread(target=send) for _ in range(2)]
        threads[0].start()
        assert began.wait(10)
        threads[1].start()
        time.sleep(0.1)
        go_on.set()
        for thread in threads:
            thread.join()
        [lost] = [each for each in outcomes if isinstance(each, NotStoredError)]
        [kept] = [each for each in outcomes if each is not lost]
        assert kept.accepted == 1, "what was sent again is the first of its kind that is stored"
        assert intake.accept([event]).duplicates == 1

    def test_a_failed_write_costs_no_contact(self, intake: Intake, tiny: TinyShop, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: Any) -> None:
            raise OperationalError("INSERT", {}, Exception("the disk went away"))

        event = {**batch(1)[0], "identifiers": {"email": "ada@shop.org"}}
        with monkeypatch.context() as patch:
            patch.setattr(intake.inbox, "_commit", full)
            with pytest.raises(NotStoredError):
                intake.accept([event])
        assert intake.accept([event]).accepted == 1
        intake.drain()
        identities = Identities(tiny.home)
        her = identities.resolve({"email": "ada@shop.org"})
        assert her is not None
        assert set(Contacts(tiny.home, identities.vault).identifiers(identities.members(her)).values()) == {"ada@shop.org"}

    def test_an_identifier_that_is_forgotten_is_kept_again_as_it_was(self, tiny: TinyShop, monkeypatch: pytest.MonkeyPatch) -> None:
        vault = Identities(tiny.home).vault
        people = [Personal(vault.key("email", f"{n}@shop.org"), IDENTIFIER, f"{n}@shop.org") for n in range(4)]
        monkeypatch.setattr("features.people.contacts.KEPT_AT_MOST", 2)
        contacts = Contacts(tiny.home, vault)
        contacts.remember((each, NEW_YEAR) for each in people[:3])
        assert contacts.news(people) == people[3:]
        contacts.remember([(people[3], NEW_YEAR)])
        assert contacts.news(people) == people[:3], "memory holds a few"
        contacts.remember((each, NEW_YEAR + timedelta(days=1)) for each in people)
        assert [each.known_at for each in contacts.of([each.identity_key for each in people])] == [NEW_YEAR] * 4
        contacts.close()

    @pytest.mark.parametrize("broken", ["push", "delete"])
    def test_a_fold_that_fails_once_leaves_no_wrong_row(
        self, intake: Intake, tiny: TinyShop, broken: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one, other = {"cookie": "c"}, {"user_id": "ada"}
        first = [{**batch(1)[0], "identifiers": who, "items": [{"item_id": f"i{k}"}]} for k, who in enumerate((one, other))]
        assert intake.accept(first).accepted == 2
        intake.drain()
        failed = []

        def once(*arguments: Any) -> Any:
            if not failed:
                failed.append(arguments)
                raise OSError("the store is away")
            return original(*arguments)

        original = getattr(intake._drain.rows._store, broken)
        monkeypatch.setattr(intake._drain.rows._store, broken, once)
        assert intake.accept([{**batch(1)[0], "identifiers": {**one, **other}, "items": [{"item_id": "i2"}]}]).accepted == 1
        with pytest.raises(OSError, match="away"):
            intake.drain()
        intake.drain()
        her = intake.identities.resolve({"cookie": "c"})
        assert her is not None
        store = FeatureStore(intake._home)
        assert sorted(told(store, her)["recent_item_ids"]) == ["i0", "i1", "i2"]
        [former] = intake.identities.former(her)
        assert told(store, former)["recent_item_ids"] is None

    def test_a_visitor_who_signs_in_is_known_at_the_next_request(self, intake: Intake) -> None:
        """What they did as somebody unknown, and what they had bought before: both in one answer, before anything is moved on."""
        store = FeatureStore(intake._home)
        reader = OnlineReader(store, "America/New_York", intake.recent)
        known = {"user_id": "ada"}
        [earlier] = batch(1, at=NEW_YEAR - timedelta(hours=1))
        bought = {**earlier, "name": "purchase", "currency": "USD", "identifiers": known, "items": [{"item_id": "i3"}]}
        assert intake.accept([bought]).accepted == 1
        intake.drain()
        intake.refresh_aggregates()
        looked = {**batch(1)[0], "identifiers": {"cookie": "c"}, "items": [{"item_id": "i7"}]}
        added = {**batch(1)[0], "name": "add_to_cart", "identifiers": {"cookie": "c"}, "items": [{"item_id": "i8"}]}
        assert intake.accept([looked, added]).accepted == 2
        signed_in = {**batch(1)[0], "name": "login", "identifiers": {**known, "cookie": "c"}, "items": []}

        def told(at: datetime) -> Any:
            her = intake.identities.resolve(known)
            return reader.features("customer_v1", ("customer_activity", "customer_state"), ("history", "cart", "session"), her, at)

        for moved_on in (False, True):
            if moved_on:
                # the visitor had rows of their own by then
                intake.drain()
                signed_in = {**batch(1)[0], "name": "login", "identifiers": {**known, "cookie": "d"}, "items": []}
                assert intake.accept([{**looked, "event_id": "more", "identifiers": {"cookie": "d"}}]).accepted == 1
                intake.drain()
            assert intake.accept([signed_in]).accepted == 1
            row = told(NEW_YEAR + timedelta(minutes=1))
            assert row["bought_item_ids"] == ["i3"]
            assert set(row["recent_item_ids"]) == {"i7", "i8"}
            assert row["cart_item_ids"] == ["i8"]
            assert row["recency_days"] == 1, "the day before, in New York"
            intake.drain()
            intake.refresh_aggregates()
            again = told(NEW_YEAR + timedelta(minutes=1))
            unstamped = {k: v for k, v in again.items() if not k.endswith("_at")}
            assert unstamped == {k: v for k, v in row.items() if not k.endswith("_at")}, "what is stored tells the same"
            her = intake.identities.resolve(known)
            assert her is not None
            assert intake.recent.formers(her) == ()

    def test_what_occurred_while_it_was_not_allowed_stays_unused_however_late_it_comes(self, intake: Intake) -> None:
        her = {"loyalty_card": "1"}

        def said(days: int, allowed: bool) -> dict[str, Any]:
            at = (NEW_YEAR - timedelta(days=days)).isoformat()
            return {
                "event_id": f"s{days}",
                "name": "consent_update",
                "occurred_at": at,
                "identifiers": her,
                "consent": {"purposes": {"personalization": allowed}},
            }

        assert intake.accept([said(9, False), said(3, True)]).accepted == 2
        intake.drain()
        late = {**batch(1, at=NEW_YEAR - timedelta(days=5))[0], "identifiers": her, "items": [{"item_id": "secret"}]}
        fine = {**batch(1, at=NEW_YEAR - timedelta(days=1))[0], "identifiers": her, "items": [{"item_id": "fine"}]}
        assert intake.accept([late, fine]).accepted == 2
        assert [[line.item_id for line in touch.lines] for _, touch in intake.recent.fresh(customer("1"))] == [["fine"]]
        intake.drain()
        assert told(FeatureStore(intake._home), customer("1"))["recent_item_ids"] == ["fine"]

    def test_the_tombstone_of_a_tablet_refuses_nobody_who_signs_in_on_it(self, intake: Intake, tiny: TinyShop) -> None:
        vault = intake.identities.vault
        erased = [vault.key("device", "tablet"), vault.key("email", "ada@shop.org")]
        Tombstones(tiny.home, vault).add(erased, NEW_YEAR)
        Tombstones(tiny.home, vault).settle(erased)
        bob = {**batch(1)[0], "identifiers": {"user_id": "bob", "device": "tablet"}}
        nobody, ada = ({**batch(1)[0], "identifiers": who} for who in ({"device": "tablet"}, {"email": "ada@shop.org", "device": "tablet"}))
        assert [each.status for each in intake.accept([bob, nobody, ada]).events] == ["accepted", "erased", "erased"]

    def test_a_translated_message_sent_again_is_the_same_message(self, intake: Intake) -> None:
        at = NEW_YEAR - timedelta(minutes=5)
        message = {"type": "track", "event": "Signed In", "messageId": "m1", "userId": "ada", "timestamp": at.isoformat()}

        def translate(raw: Any, received_at: datetime) -> Any:
            return segment.to_event(raw, received_at)

        first, again = ({**message, "sentAt": (at + timedelta(seconds=k)).isoformat()} for k in (1, 30))
        assert intake.accept([first], "segment", translate).accepted == 1
        assert intake.accept([again], "segment", translate).duplicates == 1

    def test_a_row_that_cannot_be_taken_is_kept_within_bounds(self, intake: Intake, tiny: TinyShop) -> None:
        assert intake.accept([{"event_id": "x", "note": "y" * 500_000}]).rejected == 1
        intake.drain()
        [letter] = tiny.log.letters.read()
        assert len(letter["raw"]) < 40_000

    def test_past_the_bound_none_is_taken(self, intake: Intake, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(intake, "_max_waiting", 10)
        with pytest.raises(InboxFullError):
            intake.accept(batch(11))
        assert intake.accept(batch(10)).accepted == 10
        with pytest.raises(InboxFullError):
            intake.accept(batch(1))
        intake.drain()
        assert intake.accept(batch(1)).accepted == 1

    def test_threads_together_lose_and_double_nothing(self, intake: Intake) -> None:
        shared = batch(40)
        accepted: list[str] = []

        def send() -> None:
            for start in range(0, 40, 8):
                answer = intake.accept(shared[start : start + 8])
                accepted.extend(e.event_id or "" for e in answer.events if e.status == "accepted")

        threads = [threading.Thread(target=send) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        intake.drain()
        assert sorted(accepted) == sorted(e["event_id"] for e in shared)

    def test_nothing_in_clear_lies_in_the_inbox(self, intake: Intake, tiny: TinyShop) -> None:
        marked = f"ada.{uuid.uuid4().hex}@example.org"
        event = {**batch(1)[0], "name": "identify", "identifiers": {"email": marked}, "traits": {"first_name": "Adalgisa"}, "items": []}
        assert intake.accept([event]).accepted == 1
        for path in tiny.home.root.rglob("*"):
            if path.is_file():
                assert marked.encode() not in path.read_bytes(), path
                assert b"Adalgisa" not in path.read_bytes(), path


def test_the_secret_is_made_once_and_missed_when_it_is_gone(tmp_path: Path) -> None:
    """In a process of its own, as the tests set a secret for themselves."""
    code = "from features.state.home import Home; from features.people.vault import Vault; print(Vault.open(Home.from_environment()).hash('user_id', '1'))"
    environment = {k: v for k, v in os.environ.items() if k != "UBIQUO_SECRET"} | {"UBIQUO_HOME": str(tmp_path)}

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=Path(__file__).parent.parent
        )

    first, second = run(), run()
    assert first.stdout == second.stdout != ""
    assert oct((tmp_path / "secret.key").stat().st_mode & 0o777) == "0o600"
    assert SECRET not in (tmp_path / "secret.key").read_text()
    Home(tmp_path).events.mkdir(parents=True)
    (tmp_path / "secret.key").unlink()
    assert "put it back" in run().stderr
    environment["UBIQUO_SECRET"] = "short"
    assert "32 characters" in run().stderr


@pytest.mark.parametrize("fit", [1, 3, 1_000])
def test_each_customer_gets_their_row_however_few_events_fit_into_memory(tiny: TinyShop, monkeypatch: pytest.MonkeyPatch, fit: int) -> None:
    monkeypatch.setattr("features.store.customer_rows.EVENTS_AT_ONCE", fit)
    store, identities = FeatureStore(tiny.home), Identities(tiny.home)
    store.apply()
    intake = Intake(
        tiny.home, fixed_clock(NEW_YEAR), Inbox(tiny.home, fixed_clock(NEW_YEAR)), store, identities, Consents(tiny.home, tiny.shop.consent)
    )
    counts = dict(zip("abcde", range(1, 6), strict=True))
    bought = [(card, k) for card, count in counts.items() for k in range(count)]
    intake.accept([event(f"{card}-{k}", "purchase", NEW_YEAR - timedelta(days=k + 1), card, [f"i{k}"]) for card, k in bought])
    assert intake.refresh_aggregates() == len(counts)
    rows = store.online("activity_v1", [identities.resolve({"loyalty_card": card}) or "" for card in counts])
    assert [row["baskets_28"] for row in rows] == list(counts.values())
    intake.close()
