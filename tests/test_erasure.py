"""Erasure and export: every place, a proof by search, a crash in between, and nothing that comes back."""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO

import mlflow
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from mlflow.tracking._tracking_service.utils import _artifact_repos_cache
from scene import NEW_YEAR, Service, TinyShop, command, copy_home, customer, eventually, loyalty_cards, start_service, stop_service, told

from features.catalogue.shop import Shop
from features.people.consent import Consents
from features.people.contacts import Contacts
from features.people.hidden import Hidden
from features.people.identity import Identities
from features.people.vault import Vault
from features.sources.complete_journey import CompleteJourney
from features.state.clock import fixed_clock
from features.state.disk import NoSpaceError
from features.state.home import Home
from features.state.ports import UnreachableError, deriving
from features.state.settings import SettingError
from features.state.sqlite_file import SQLiteFile
from features.state.tables import DeltaFolder
from features.store.decision_log import DecisionLog
from features.store.event_log import EventLog, connect
from features.store.feature_store import FeatureStore
from features.store.profile import UnknownCustomerError, profile
from features.store.timeline import open_timeline
from models.registry import Registry
from serving.bootstrap import model_settings, open_office
from serving.intake.inbox import Inbox
from serving.intake.intake import Intake
from serving.privacy.erasure import ERASING, Office
from serving.privacy.holdings import Place, Subject, mentions
from serving.privacy.nightly import Nightly
from serving.privacy.orders import PENDING
from serving.privacy.proof import prove

PLACES = ("events", "inbox", "dead letters", "feature snapshots", "online store", "decisions", "batch files", "model runs",
          "import stages", "contacts", "reservations", "journeys", "identity")  # fmt: skip
HELD_NOWHERE_ELSE = ("inbox", "import stages")
"""Places that are empty once everything is drained and every import is done."""
PAGE_HEAD = 100
"""So many bytes stand before the first page of an SQLite file: docs of its format, section 1.3."""
FEW = 100
"""As many households bring the customer whom these tests are about."""


@pytest.fixture(scope="module")
def lived_in(trained: Home, tmp_path_factory: pytest.TempPathFactory) -> tuple[Home, str]:
    """A home in which one customer is known to every place, and her card."""
    home = copy_home(trained, tmp_path_factory.mktemp("lived") / "home")
    few = {str(number) for (number,) in CompleteJourney(households=FEW)._db.execute("SELECT household_id FROM chosen").fetchall()}
    card = next(card for card in loyalty_cards(home)[50:] if card in few)
    (home.root / "policy.yaml").write_text("contact: {caps: [{most: 9, per: day}]}")
    journey = {"name": "welcome", "start": {"on": ["identify"]}, "steps": [{"wait": "1d"}, {"offer": {"channels": ["email"]}}]}
    (home.root / "journeys.yaml").write_text(json.dumps({"journeys": [journey], "sinks": [{"name": "files", "channels": ["email"]}]}))
    running = start_service(home)
    her = {"loyalty_card": card}
    at = (NEW_YEAR - timedelta(hours=2)).isoformat()
    person = {
        "event_id": uuid.uuid4().hex, "name": "identify", "occurred_at": at, "channel": "web",
        "identifiers": {**her, "email": "Countess.Lovelace@example.org", "phone": "+44 20 7946 0958", "cookie": "cookie-of-ada"},
        "traits": {"first_name": "Augusta Ada", "street": "12 St James's Square"},
    }  # fmt: skip
    try:
        assert running.ask("events", person)["accepted"] == 1
        bad = {**person, "event_id": uuid.uuid4().hex, "name": "offer_view", "note": "call countess.lovelace@EXAMPLE.org on 020-7946 0958"}
        assert running.post("/v1/events", bad)[0] == 400
        for question in ("churn", "recommendations", "next-best-offer"):
            running.ask(question, {"identifiers": {"email": "countess.lovelace@example.org"}})
        assert running.ask("recommendations", {"identifiers": her, "channel": "mail"})["items"]
        eventually(lambda: running.ask("recommendations", {"identifiers": her})["fallback"] is None)
    finally:
        stop_service(running)
    for kind, suffix in (("recommendations", "parquet"), ("churn", "jsonl")):
        out = home.root / "batch" / f"{kind}.{suffix}"
        done = command("serving", "score", kind, "--out", str(out), "--limit", "2", home=home.root)
        assert done.returncode == 0, done.stdout + done.stderr
    return home, card


@pytest.fixture
def office(lived_in: tuple[Home, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Office, str, Home]]:
    home = copy_home(lived_in[0], tmp_path / "home")
    monkeypatch.setenv("UBIQUO_HOME", str(home.root))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    # MLflow remembers by run where its artifacts lie, and the copies' runs have the same ids
    _artifact_repos_cache.clear()
    with open_office(home, fixed_clock(NEW_YEAR + timedelta(hours=1))) as opened:
        yield opened, customer(lived_in[1]), home


class TestEveryPlace:
    """The contract of a place: it finds her, it takes out what it finds, and then neither it nor its files know her."""

    def place(self, office: Office, name: str) -> Place:
        [found] = [place for place in office.places if place.name == name]
        return found

    def test_there_is_none_that_no_test_knows(self, office: tuple[Office, str, Home]) -> None:
        assert {place.name for place in office[0].places} == set(PLACES)

    def test_each_finds_and_takes_out(self, office: tuple[Office, str, Home]) -> None:
        opened, her, _ = office
        subject = opened.subject(her)
        for name in PLACES:
            place = self.place(opened, name)
            before = list(place.find(subject))
            assert bool(before) == (name not in HELD_NOWHERE_ELSE), name
            place.erase(subject)
            assert list(place.find(subject)) == [], name


def test_she_is_taken_out_of_everything_and_the_others_stay(office: tuple[Office, str, Home]) -> None:
    opened, her, home = office
    log = EventLog(home, "America/New_York")
    count, mine = log.count(), len(opened.subject(her).event_ids)
    others = len(Identities(home).customers())
    subject = opened.subject(her)
    assert prove(home, subject).found, "the search finds her before"
    registry = Registry(model_settings(home))
    version = registry.version_of("churn", "champion")
    assert version is not None
    mlflow.MlflowClient().delete_run(registry.run_of("churn", version))
    receipt = opened.erase(her)
    assert receipt.proof.found == []
    assert receipt.proof.files > 100
    assert receipt.proof.values > mine
    assert receipt.tombstones == 4
    assert {name for name, rows in receipt.places.items() if not rows} == set(HELD_NOWHERE_ELSE)
    assert log.count() == count - mine
    assert len(Identities(home).customers()) == others - 1
    kept = (home.root / "erasures" / f"{receipt.receipt_id}.json").read_text()
    assert her not in kept
    assert "lovelace" not in kept.lower()


def test_the_proof_finds_what_is_left_behind(office: tuple[Office, str, Home]) -> None:
    """Each trace that one might overlook, put there on purpose."""
    opened, her, home = office
    subject = opened.subject(her)
    opened.erase(her)
    traces: dict[str, Any] = {
        "note.txt": b"ask countess.lovelace@example.org", "cache.bin": b"\x00\x01" + subject.keys[0].partition(":")[2].encode(),
        "old.json": json.dumps({"customer_id": her}).encode(),
    }  # fmt: skip
    for name, content in traces.items():
        (home.root / name).write_bytes(content)
    table = pa.table({"deep": [[{"who": "countess.lovelace@example.org"}]]})
    pq.write_table(table, home.root / "deep.parquet", compression="zstd")
    found = {Path(each.file).name: each.what for each in prove(home, subject).found}
    assert found == {"note.txt": "email", "cache.bin": "keyed hash", "old.json": "customer id", "deep.parquet": "email"}


def test_a_repeated_import_does_not_bring_her_back(office: tuple[Office, str, Home]) -> None:
    opened, her, home = office
    opened.erase(her)
    count = EventLog(home, "America/New_York").count()
    opened.close()
    again = command("features", "import", "complete-journey", "--households", str(FEW), "--again", home=home.root)
    assert again.returncode == 0, again.stdout + again.stderr
    assert EventLog(home, "America/New_York").count() == count
    assert her not in Identities(home).customers()
    assert "of erased people" in again.stdout


@pytest.mark.parametrize("broken", ["online store", "identity"])
def test_an_erasure_that_broke_off_is_carried_out_at_the_next_start(
    office: tuple[Office, str, Home], broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, her, home = office
    [place] = [each for each in opened.places if each.name == broken]
    subject = opened.subject(her)

    def crash(_: Subject) -> int:
        raise RuntimeError("the power went")

    with monkeypatch.context() as patch:
        patch.setattr(place, "erase", crash)
        with pytest.raises(RuntimeError, match="power"):
            opened.erase(her)
    [receipt_id] = opened.resume()
    receipt = opened.receipt(receipt_id, timeout=None)
    assert receipt.proof.found == []
    assert prove(home, subject).found == []
    assert opened.resume() == []


class TestByNight:
    """From the moment they ask nobody sees them; the files are purged of all of them in one run, when it is time."""

    @pytest.fixture
    def asked(self, office: tuple[Office, str, Home]) -> tuple[Office, list[Subject], Home, list[str]]:
        opened, her, home = office
        opened._nightly = Nightly.at("03:30", "America/New_York")
        other = customer(loyalty_cards(home)[41])
        subjects = [opened.subject(her), opened.subject(other)]
        return opened, subjects, home, [opened.begin(her), opened.begin(other)]

    def test_nobody_sees_anything_of_theirs_though_the_files_hold_it(self, asked: tuple[Office, list[Subject], Home, list[str]]) -> None:
        opened, subjects, home, receipts = asked
        log = EventLog(home, "America/New_York")
        store = FeatureStore(home)
        for identities in (opened._identities, Identities(home)):
            for subject in subjects:
                assert identities.owner_of(subject.keys) is None
                for her in subject.customer_ids:
                    assert identities.members(her) == []
                    assert told(store, her)["recency_days"] is None
                    with pytest.raises(UnknownCustomerError):
                        profile(home, identities, Consents(home, Shop.load(home).consent), opened._contacts, her)
            assert not {her for subject in subjects for her in subject.customer_ids} & {*identities.customers(), *identities.strongest()}
        gone = {event_id for subject in subjects for event_id in subject.event_ids}
        assert gone
        events = open_timeline(home, NEW_YEAR).events
        assert not gone & set(events.select("event_id").to_pyarrow()["event_id"].to_pylist()), "what is learnt from leaves them out"
        hidden = Identities(home)
        few = open_timeline(home, NEW_YEAR, [subjects[0].customer_ids[0]], identities=hidden)
        assert few.events.count().execute() == 0
        assert opened._contacts.of([*subjects[0].keys, *subjects[1].keys]) == []
        assert log.count() > 0
        assert prove(home, subjects[0]).found, "the files still hold it"
        for receipt_id in receipts:
            with pytest.raises(TimeoutError):
                opened.receipt(receipt_id)

    def test_one_run_purges_the_files_of_all_of_them(self, asked: tuple[Office, list[Subject], Home, list[str]]) -> None:
        opened, subjects, home, receipts = asked
        before = DeltaFolder(home.events).version()
        opened.purge()
        found = [opened.receipt(receipt_id, timeout=None) for receipt_id in receipts]
        assert DeltaFolder(home.events).version() - before <= 2, "the log is written anew once, not once a person"
        for receipt, subject in zip(found, subjects, strict=True):
            assert (receipt.together, receipt.proof.found) == (2, [])
            assert {name for name, rows in receipt.places.items() if not rows} <= set(HELD_NOWHERE_ELSE)
            assert prove(home, subject).found == []
        assert not Identities(home).hidden.events
        assert opened.resume() == []

    def test_a_crash_before_the_night_loses_no_order(self, asked: tuple[Office, list[Subject], Home, list[str]]) -> None:
        opened, subjects, home, receipts = asked
        opened._running.clear()
        (home.root / "hidden.db").unlink()
        assert sorted(opened.resume()) == sorted(receipts)
        assert Identities(home).owner_of(subjects[0].keys) is None, "they stay hidden meanwhile"
        opened.purge()
        assert [opened.receipt(receipt_id, timeout=None).proof.found for receipt_id in receipts] == [[], []]

    def test_nothing_of_theirs_comes_in_until_it_is_done(self, asked: tuple[Office, list[Subject], Home, list[str]]) -> None:
        opened, _, home, _ = asked
        now = (NEW_YEAR + timedelta(hours=1)).isoformat()
        back = {"event_id": "back", "name": "sign_up", "occurred_at": now, "identifiers": {"cookie": "cookie-of-ada"}}
        assert [each.status for each in opened._intake.accept([back]).events] == ["erased"]
        opened.purge()
        eventually(lambda: not list((home.root / "erasures").glob(f"*{PENDING}")))
        assert [each.status for each in opened._intake.accept([{**back, "event_id": "again"}]).events] == ["accepted"]


@pytest.mark.parametrize(
    ("hours", "due"),
    [
        # New York: 03:30 is 08:30 UTC
        ((7, 8, 9, 10), (False, False, True, False)),
        # a service that starts after it waits for the next night
        ((10, 20, 24 + 8, 24 + 9), (False, False, False, True)),
        # it stood still over the night
        ((7, 24 + 12, 24 + 13), (False, True, False)),
    ],
)
def test_the_nights_run_comes_once_a_day(hours: tuple[int, ...], due: tuple[bool, ...]) -> None:
    nightly = Nightly.at("03:30", "America/New_York")
    assert nightly is not None
    midnight = datetime(2018, 1, 2, tzinfo=UTC)
    assert tuple(nightly.is_due(midnight + timedelta(hours=hour)) for hour in hours) == due
    with pytest.raises(SettingError, match="UBIQUO_PURGE_AT"):
        Nightly.at("half past three", "America/New_York")
    assert Nightly.at("", "America/New_York") is None


def test_tables_of_models_that_are_no_longer_named_are_found_too(office: tuple[Office, str, Home]) -> None:
    assert office
    settings = model_settings(Home.from_environment())
    fewer = replace(settings, models={"churn": settings.models["churn"]})
    found = {(run, name) for run, name, _ in Registry(fewer).frames()}
    assert found == {(run, name) for run, name, _ in Registry(settings).frames()}
    assert len(found) > len(settings.models)


def test_the_export_holds_everything_as_json_lines(office: tuple[Office, str, Home]) -> None:
    opened, her, home = office
    lines = [json.loads(line) for line in opened.export(her)]
    places = {line["place"] for line in lines}
    assert places == set(PLACES) - set(HELD_NOWHERE_ELSE)
    by_place = {place: [line for line in lines if line["place"] == place] for place in places}
    files = EventLog(home, "America/New_York").files()
    [(mine,)] = (
        connect().execute("SELECT count(*) FROM read_parquet(?) WHERE identity_key = ?", [files, opened.subject(her).keys[0]]).fetchall()
    )
    assert len(by_place["events"]) == mine
    values = {line["value"] for line in by_place["contacts"]}
    assert {"countess.lovelace@example.org", "+442079460958", "Augusta Ada", "cookie-of-ada"} <= values


def test_a_letter_names_her_in_whatever_writing() -> None:
    her = [("email", "ada@shop.org"), ("phone", "+442079460958"), ("phone", "+4512345678"), ("loyalty_card", "1029"), ("user_id", "12")]
    named = mentions(Subject([], ["cookie:0123456789abcdef0123456789abcdef"], her))
    for text in ('{"email": "ADA@shop.org"}', "call 020 7946-0958", "call 12 34 56 78", '{"card": "1029"}', "card 1029, please",
                 '{"CustomerID": "12"}', '{"userId":12,"x":1}', '{"cookie": "0123456789abcdef0123456789abcdef"}'):  # fmt: skip
        assert named(text), text
    for text in (
        "ada@shop.org.uk.example"[1:],
        "canada@shop.org",
        "10290",
        "item 51029",
        "nobody",
        '{"quantity": 12}',
        '{"price": "1029"}',
    ):
        assert not named(text), text


def test_a_file_that_the_tables_checkpoint_has_forgotten_goes_too(tmp_path: Path) -> None:
    """A checkpoint drops what it remembers of removed files after a week, here at once."""
    path, known_at = tmp_path / "table", pa.array([NEW_YEAR], pa.timestamp("us", tz="UTC"))
    for name in ("ada", "bob"):
        DeltaFolder(path).append(pa.table({"who": [name], "known_at": known_at}))
    DeltaTable(str(path)).alter.set_table_properties({"delta.deletedFileRetentionDuration": "interval 1 second"})
    DeltaTable(str(path)).optimize.compact()
    time.sleep(1.1)
    DeltaTable(str(path)).create_checkpoint()
    assert DeltaFolder(path).erase("who", ["ada"]).rows == 1
    left = [pq.ParquetFile(each).read()["who"].to_pylist() for each in path.glob("*.parquet")]
    assert left == [["bob"]]


SIGN_UP: dict[str, Any] = {
    "event_id": "anew", "name": "sign_up", "occurred_at": NEW_YEAR.isoformat(), "identifiers": {"email": "ada.lovelace@shop.org"},
}  # fmt: skip


def without_erasing(way: Any, error: Exception) -> Any:
    """A way to a lease that leads to any but that of whoever carries erasures out."""

    def found(self: Any, name: str, **how: Any) -> Any:
        if name == ERASING:
            raise error
        return way(self, name, **how)

    return found


def write_between_rows(database: BinaryIO, content: bytes) -> None:
    """Put *content* in the first page of an SQLite file, after where its rows are found and before the rows, where nothing is read."""
    head = database.read(PAGE_HEAD + 8)
    cells, first = (int.from_bytes(head[PAGE_HEAD + at : PAGE_HEAD + at + 2], "big") for at in (3, 5))
    start = PAGE_HEAD + 8 + 2 * cells
    assert start + len(content) < first
    database.seek(start)
    database.write(content)


class TestOfASmallShop:
    """In one process, where what happens in between can be made to happen."""

    @pytest.fixture
    def intake(self, tiny: TinyShop, monkeypatch: pytest.MonkeyPatch) -> Iterator[Intake]:
        monkeypatch.setenv("UBIQUO_HOME", str(tiny.home.root))
        tiny.add({**SIGN_UP, "event_id": "first", "occurred_at": (NEW_YEAR - timedelta(days=3)).isoformat()})
        store = FeatureStore(tiny.home)
        store.apply()
        intake = Intake(
            tiny.home,
            fixed_clock(NEW_YEAR),
            Inbox(tiny.home, fixed_clock(NEW_YEAR)),
            store,
            Identities(tiny.home),
            Consents(tiny.home, tiny.shop.consent),
        )
        yield intake
        intake.close()

    @pytest.fixture
    def desk(self, tiny: TinyShop, intake: Intake) -> Iterator[Office]:
        decisions = DecisionLog(tiny.home)
        office = Office(tiny.home, fixed_clock(NEW_YEAR), FeatureStore(tiny.home), intake, decisions, Registry(model_settings(tiny.home)))
        yield office
        office.close()
        decisions.close()

    def her(self, intake: Intake) -> str:
        found = intake.identities.resolve({"email": "ada.lovelace@shop.org"})
        assert found is not None
        return found

    def test_it_waits_for_who_writes_what_follows_from_the_log_and_nobody_begins_anew_meanwhile(
        self, tiny: TinyShop, intake: Intake, desk: Office
    ) -> None:
        with deriving(tiny.home):
            receipt_id = desk.begin(self.her(intake))
            with pytest.raises(TimeoutError):
                desk.receipt(receipt_id, 0.5)
            assert intake.accept([SIGN_UP]).erased == 1
        assert desk.receipt(receipt_id, timeout=None).proof.found == []
        assert intake.accept([SIGN_UP]).accepted == 1
        intake.drain()
        key = intake.identities.vault.key("email", "ada.lovelace@shop.org")
        assert intake.contacts.identifiers([key]) == {key: "ada.lovelace@shop.org"}, "she is known by it again"

    def test_a_place_that_fails_keeps_no_other_from_being_emptied_and_is_tried_again(self, intake: Intake, desk: Office) -> None:
        [batches] = [place for place in desk.places if place.name == "batch files"]
        key = intake.identities.vault.key("email", "ada.lovelace@shop.org")
        assert intake.contacts.of([key])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(batches, "erase", lambda subject: 1 // 0)
            receipt_id = desk.begin(self.her(intake))
            with pytest.raises(ZeroDivisionError):
                desk.receipt(receipt_id, timeout=None)
            with pytest.raises(TimeoutError, match="will be tried again"):
                desk.receipt(receipt_id, timeout=1)
        assert not intake.contacts.of([key])
        assert intake.accept([SIGN_UP]).erased == 1, "she cannot begin anew yet"
        assert desk.resume() == [receipt_id]
        assert desk.receipt(receipt_id, timeout=None).proof.found == []
        assert intake.accept([SIGN_UP]).accepted == 1

    def test_a_service_that_ends_while_one_waits_carries_it_out_at_the_next_start(
        self, tiny: TinyShop, intake: Intake, desk: Office
    ) -> None:
        with deriving(tiny.home):
            receipt_id = desk.begin(self.her(intake))
            desk.close()
        decisions = DecisionLog(tiny.home)
        again = Office(tiny.home, fixed_clock(NEW_YEAR), FeatureStore(tiny.home), intake, decisions, Registry(model_settings(tiny.home)))
        assert again.resume() == [receipt_id]
        assert again.receipt(receipt_id, timeout=None).proof.found == []
        again.close()
        decisions.close()

    def test_what_the_proof_finds_is_told_once_and_her_new_life_is_let_be(self, tiny: TinyShop, intake: Intake, desk: Office) -> None:
        (tiny.home.root / "note.txt").write_text("ask ada.lovelace@shop.org")
        assert [each.what for each in desk.erase(self.her(intake)).proof.found] == ["email"]
        assert intake.accept([SIGN_UP]).accepted == 1
        assert desk.resume() == []
        assert self.her(intake)

    @pytest.mark.parametrize("name", ["step_index", "event_index", "inbox"])
    def test_what_a_database_shows_between_its_rows_goes_too(self, tiny: TinyShop, intake: Intake, desk: Office, name: str) -> None:
        """As SQLite may leave it behind where it has parted a page: it does not overwrite that when the row is deleted."""
        her, file = self.her(intake), tiny.home.file_of(name)
        with contextlib.closing(file.connect()) as session:
            session.scrub()
        # closed at the end, as that cancels the locks of this process
        with open(file.place, "r+b", buffering=0) as page:
            write_between_rows(page, her.encode())
            receipt = desk.erase(her)
            page.seek(0)
            assert her.encode() not in page.read()
        assert receipt.proof.found == []

    def test_one_that_cannot_be_written_anew_is_told_of(
        self, tiny: TinyShop, intake: Intake, desk: Office, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        her, file = self.her(intake), tiny.home.file_of("step_index")
        with contextlib.closing(file.connect()) as session:
            session.scrub()

        def full(self: SQLiteFile) -> None:
            raise NoSpaceError("the disk is full")

        monkeypatch.setattr(SQLiteFile, "rewrite", full)
        with open(file.place, "r+b", buffering=0) as page:
            write_between_rows(page, her.encode())
            receipt = desk.erase(her)
        assert [(each.file, each.what) for each in receipt.proof.found] == [(file.place, "customer id")]
        assert intake.accept([SIGN_UP]).accepted == 1, "they may begin anew"
        assert desk.resume() == []

    @pytest.mark.parametrize("broken", ["online store", "queue", "lease"])
    def test_one_that_fails_once_it_is_written_down_is_taken_up_again(self, intake: Intake, desk: Office, broken: str) -> None:
        her, away = self.her(intake), UnreachableError("the server does not answer")

        def fail(*_: Any, **__: Any) -> Any:
            raise away

        class OnceOnly:
            """The queue gives the order its time, and is away once the order is written."""

            def __init__(self, moment: Any) -> None:
                self.moment, self.asked = moment, 0

            def __call__(self) -> datetime:
                self.asked += 1
                return self.moment() if self.asked == 1 else fail()

        with pytest.MonkeyPatch.context() as patch:
            if broken == "online store":
                patch.setattr(desk._online, "delete", fail)
            elif broken == "queue":
                patch.setattr(intake.inbox, "moment", OnceOnly(intake.inbox.moment))
            else:
                lease = type(desk._home.lease)
                for way in ("take", "hold"):
                    patch.setattr(lease, way, without_erasing(getattr(lease, way), away))
            receipt_id = desk.begin(her)
            with pytest.raises(TimeoutError, match="will be tried again"):
                desk.receipt(receipt_id, timeout=20)
        assert desk.resume() == [receipt_id]
        assert desk.receipt(receipt_id, timeout=60).proof.found == []

    def test_one_that_fails_again_keeps_no_other_from_being_taken_up(self, intake: Intake, desk: Office) -> None:
        desk._nightly = Nightly.at("03:30", "America/New_York")
        at = (NEW_YEAR - timedelta(hours=1)).isoformat()
        bob = {"event_id": "bob", "name": "sign_up", "occurred_at": at, "identifiers": {"email": "bob@shop.org"}}
        assert intake.accept([bob]).accepted == 1
        whom = [self.her(intake), intake.identities.resolve({"email": "bob@shop.org"})]
        delete, fails = desk._online.delete, set(whom)

        def may_fail(subject: Subject) -> int:
            if fails & {*subject.customer_ids}:
                raise UnreachableError("the server does not answer")
            return delete(subject)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(desk._online, "delete", may_fail)
            receipts = {desk.begin(customer_id or ""): customer_id for customer_id in whom}
            first = min(receipts)
            fails -= {whose for receipt_id, whose in receipts.items() if receipt_id != first}
            assert desk.resume() == [max(receipts)]
            assert desk.failing() == [first], "an operator is told"
        assert desk.resume() == [first]
        assert desk.failing() == []
        desk.purge()
        assert [desk.receipt(receipt_id, timeout=60).proof.found for receipt_id in receipts] == [[], []]

    def test_one_that_broke_off_after_its_receipt_leaves_her_new_life_alone(self, tiny: TinyShop, intake: Intake, desk: Office) -> None:
        desk._nightly = Nightly.at("03:30", "America/New_York")
        receipt_id = desk.begin(self.her(intake))
        order = tiny.home.root / "erasures" / f"{receipt_id}{PENDING}"
        written = order.read_bytes()
        desk.purge()
        desk.receipt(receipt_id, timeout=60)
        eventually(lambda: not order.exists())
        assert intake.accept([SIGN_UP]).accepted == 1
        order.write_bytes(written)
        desk._running.clear()
        assert desk.resume() == []
        assert not order.exists()
        assert self.her(intake)
        assert intake.accept([{**SIGN_UP, "event_id": "more"}]).accepted == 1

    def test_a_service_ends_though_another_carries_erasures_out_for_long(self, tiny: TinyShop, intake: Intake, desk: Office) -> None:
        with ThreadPoolExecutor(1) as threads, Home(tiny.home.root).lease.hold(ERASING):
            receipt_id = desk.begin(self.her(intake))
            threads.submit(desk.close).result(10)
            with pytest.raises(TimeoutError):
                desk.receipt(receipt_id)

    def test_who_was_joined_through_a_thing_of_hers_keeps_what_was_joined(self, tiny: TinyShop, intake: Intake, desk: Office) -> None:
        at, phone = NEW_YEAR.isoformat(), "+442079460958"
        for k, who in enumerate(({"loyalty_card": "77"}, {"email": "bob.babbage@shop.org"})):
            event = {"event_id": f"b{k}", "name": "login", "occurred_at": at, "identifiers": {**who, "phone": phone}}
            assert intake.accept([event]).accepted == 1
        identities = intake.identities
        bob = identities.resolve({"loyalty_card": "77"})
        assert bob is not None
        theirs = identities.part(bob, [identities.vault.key("phone", phone)], NEW_YEAR, "his neighbour's")
        intake.drain()
        desk.erase(theirs)
        assert Identities(tiny.home).resolve({"email": "bob.babbage@shop.org"}) == bob


class TestOfASmallShopOnAServer(TestOfASmallShop):
    """The same where the databases lie on a server that many machines share."""

    # the same rows decide, wherever they lie
    test_what_the_proof_finds_is_told_once_and_her_new_life_is_let_be = None  # type: ignore[assignment]
    test_who_was_joined_through_a_thing_of_hers_keeps_what_was_joined = None  # type: ignore[assignment]
    test_a_service_that_ends_while_one_waits_carries_it_out_at_the_next_start = None  # type: ignore[assignment]
    test_one_that_fails_once_it_is_written_down_is_taken_up_again = None  # type: ignore[assignment]
    test_one_that_fails_again_keeps_no_other_from_being_taken_up = None  # type: ignore[assignment]

    @pytest.fixture
    def tiny(self, tiny: TinyShop, postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> TinyShop:
        monkeypatch.setenv("UBIQUO_DATABASE", postgres_url)
        return TinyShop(Home(tiny.home.root), tiny.shop)

    def test_the_tables_are_searched_too(self, tiny: TinyShop, intake: Intake, desk: Office) -> None:
        subject = desk.subject(self.her(intake))
        held = {each.file.rpartition(" ")[2] for each in prove(tiny.home, subject).found if "PostgreSQL" in each.file}
        assert held >= {"ubiquo_contacts.contacts", "ubiquo_event_index.keys", "ubiquo_event_index.events", "ubiquo_step_index.steps"}
        receipt = desk.erase(self.her(intake))
        assert receipt.proof.found == []
        assert receipt.proof.tables > len(held)
        Hidden(tiny.home).add(subject.keys, [], [])
        assert {each.file.rpartition(" ")[2] for each in prove(tiny.home, subject).found} == {"ubiquo_hidden.hidden"}


def test_what_comes_after_an_erasure_is_kept_though_somebody_looks_in_between(own_service: Service) -> None:
    """A search that opened the databases' files itself would cancel the locks of the service, and the next to leave delete its log."""
    home, vault = own_service.home, Vault.open(own_service.home)
    identify = {"name": "identify", "occurred_at": NEW_YEAR.isoformat(), "identifiers": {"user_id": "keeper-7"}}

    def held() -> dict[str, str]:
        contacts = Contacts(home, vault)
        try:
            return {c.field: c.value for c in contacts.of([vault.key("user_id", "keeper-7")])}
        finally:
            contacts.close()

    assert own_service.get(f"/v1/customers/{customer(loyalty_cards(home)[9])}", "DELETE")[0] in (200, 202)
    eventually(lambda: not list((home.root / "erasures").glob(f"*{PENDING}")))
    for field in ("first_name", "last_name"):
        assert own_service.ask("events", {**identify, "event_id": uuid.uuid4().hex, "traits": {field: "Grace"}})["accepted"] == 1
        eventually(lambda field=field: held().get(field) == "Grace")


class TestByCommand:
    def test_erased_exported_and_unknown(self, lived_in: tuple[Home, str], tmp_path: Path) -> None:
        home = copy_home(lived_in[0], tmp_path / "home")
        out = tmp_path / "ada.jsonl"
        done = command("serving", "export", "email:Countess.Lovelace@example.org", "--out", str(out), home=home.root)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Augusta Ada" in out.read_text()
        gone = command("serving", "erase", f"loyalty_card:{lived_in[1]}", "--yes", home=home.root)
        assert gone.returncode == 0, gone.stdout + gone.stderr
        assert ": 0 found" in gone.stdout
        again = command("serving", "erase", f"loyalty_card:{lived_in[1]}", "--yes", home=home.root)
        assert again.returncode == 1
        assert "nobody is known by that" in again.stdout
        assert "erase" in command("serving", "audit", home=home.root).stdout

    def test_not_behind_the_back_of_a_service(self, own_service: Service) -> None:
        card = loyalty_cards(own_service.home)[7]
        done = command("serving", "erase", f"loyalty_card:{card}", "--yes", home=own_service.home.root)
        assert done.returncode == 1
        assert "a service runs on this home" in done.stdout
