"""A backup that is made while a service takes events, and the home that is made of it."""

from __future__ import annotations

import itertools
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from scene import NEW_YEAR, Service, TinyShop, command, event, loyalty_cards, start_service, stop_service

from features.people.identity import Identities
from features.state.backup import MANIFEST, back_up, restore, rows_of
from features.state.disk import DamagedStateError
from features.state.home import Home
from features.state.lake_tables import keep_in
from features.state.moving import MovedStateError, note_moved
from features.state.ports import MissingStateError
from features.state.settings import Settings
from features.store.event_log import EventLog


def view(number: int, card: str) -> dict[str, Any]:
    seen = event(f"seen-meanwhile-{number}", "view_item", NEW_YEAR, card, ["937292"], channel="web")
    return {name: value for name, value in seen.items() if name != "currency"}


def test_what_was_acknowledged_before_is_there_and_answers_are_the_same(own_service: Service, tmp_path: Path) -> None:
    home, stop, sent = own_service.home, threading.Event(), itertools.count()
    cards = loyalty_cards(home)[:3]
    for _ in range(5):
        own_service.ask("events", view(next(sent), cards[0]))
    certain = 5

    def go_on() -> None:
        while not stop.is_set():
            own_service.ask("events", view(next(sent), cards[1]))
            stop.wait(0.05)

    writer = threading.Thread(target=go_on)
    writer.start()
    made = command("serving", "backup", "--to", str(tmp_path / "kept"), home=home.root)
    stop.set()
    writer.join()
    assert made.returncode == 0, made.stdout + made.stderr
    manifest = json.loads((tmp_path / "kept" / MANIFEST).read_bytes())
    assert not list(home.root.glob("backup-*")), "nothing of it is left in the home"
    again = command("serving", "backup", "--to", str(tmp_path / "kept"), home=home.root)
    assert (again.returncode, "is not empty" in again.stdout) == (1, True)

    done = command("serving", "restore", "--from", str(tmp_path / "kept"), home=tmp_path / "again")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "erase again whom" in done.stdout
    back = Home(tmp_path / "again", home.settings)
    assert rows_of(back) == manifest["rows"]
    assert len(Identities(back).customers()) == len(Identities(home).customers())
    copy = start_service(back)
    try:
        assert copy.get("/readyz")[0] == 200
        # what waited in the inbox is in the log within seconds
        told = [json.loads(copy.get(f"/v1/customers/{customer}")[1]) for customer in Identities(back).customers()[:3]]
        assert [each["customer_id"] for each in told] == Identities(back).customers()[:3]
        log = EventLog(back, "America/New_York")
        seen = log.hashes_of([f"seen-meanwhile-{number}" for number in range(next(sent))])
        assert {f"seen-meanwhile-{number}" for number in range(certain)} <= set(seen)
        lists = []
        for card in cards:
            question = {"identifiers": {"loyalty_card": card}, "listing": "buy_again", "limit": 5}
            answers = [[item["item_id"] for item in each.ask("recommendations", question)["items"]] for each in (own_service, copy)]
            assert answers[0] == answers[1]
            lists.append(answers[0])
            churn = [each.ask("churn", {"identifiers": {"loyalty_card": card}})["probability"] for each in (own_service, copy)]
            assert churn[0] == pytest.approx(churn[1], abs=1e-3)
        assert any(lists)
    finally:
        stop_service(copy)


class TestRefused:
    @pytest.fixture
    def kept(self, tiny: TinyShop, tmp_path: Path) -> Path:
        tiny.add(event("e1", "login", NEW_YEAR), event("e2", "login", NEW_YEAR))
        back_up(tiny.home, tmp_path / "kept")
        return tmp_path / "kept"

    def test_the_whole_comes_back(self, tiny: TinyShop, kept: Path, tmp_path: Path) -> None:
        restore(kept, tmp_path / "again")
        assert EventLog(Home(tmp_path / "again"), "America/New_York").count() == 2
        assert Identities(Home(tmp_path / "again")).customers() == Identities(tiny.home).customers()
        with pytest.raises(ValueError, match="again is not empty"):
            restore(kept, tmp_path / "again")

    def test_a_volume_stays_the_folder_that_it_is(self, kept: Path, tmp_path: Path) -> None:
        volume = tmp_path / "volume"
        (volume / "lost+found").mkdir(parents=True)
        before = volume.stat().st_ino
        restore(kept, volume)
        assert volume.stat().st_ino == before, "a mounted folder can be replaced by nobody"
        assert EventLog(Home(volume), "America/New_York").count() == 2
        assert not list(volume.glob(".restoring-*"))

    def test_files_of_users_are_kept_whatever_their_names(self, tiny: TinyShop, tmp_path: Path) -> None:
        for name in ("exports/new-customers.csv", "exports/cache/backup-plan.csv", "notes-wal"):
            (path := tiny.home.root / name).parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
        (tiny.home.root / "cache").mkdir()
        (tiny.home.root / "cache" / "copy").write_text("made anew")
        assert {name for name in back_up(tiny.home, tmp_path / "kept").files if name.rpartition("/")[2] in ("copy", "notes-wal", "new-customers.csv", "backup-plan.csv")} == {
            "exports/new-customers.csv", "exports/cache/backup-plan.csv", "notes-wal"
        }  # fmt: skip

    def test_a_home_that_was_moved_is_not_copied_as_if_it_were_not(self, tiny: TinyShop, tmp_path: Path) -> None:
        keep_in(tiny.home.root, "s3://bucket")
        with pytest.raises(ValueError, match="lie in s3://bucket, whose own tools"):
            back_up(tiny.home, tmp_path / "kept")
        (tiny.home.root / "lake").unlink()
        note_moved(tiny.home.root, "a server")
        with pytest.raises(MovedStateError, match="were moved to a server: set UBIQUO_DATABASE"):
            back_up(tiny.home, tmp_path / "kept")
        assert not (tmp_path / "kept").exists()

    def test_what_was_not_finished_is_none(self, kept: Path, tmp_path: Path) -> None:
        (kept / MANIFEST).unlink()
        with pytest.raises(MissingStateError, match="no backup that was finished"):
            restore(kept, tmp_path / "again")

    @pytest.mark.parametrize("how", ["changed", "gone"])
    def test_what_was_damaged_since_is_named_and_nothing_is_made(self, kept: Path, tmp_path: Path, how: str) -> None:
        [path] = kept.glob("shop.json")
        if how == "gone":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:-1] + b" ")
        with pytest.raises(DamagedStateError, match=r"shop\.json is (missing|not as it was written): take another backup"):
            restore(kept, tmp_path / "again")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "kept"]

    def test_a_home_on_servers_is_backed_up_by_theirs(self, tmp_path: Path) -> None:
        for settings in (Settings(lake="s3://bucket"), Settings(database="postgresql://localhost/ubiquo")):
            with pytest.raises(ValueError, match="whose own tools"):
                back_up(Home(tmp_path, settings), tmp_path / "kept")
        with pytest.raises(MissingStateError, match="there is no home"):
            back_up(Home(tmp_path / "nowhere"), tmp_path / "kept")
