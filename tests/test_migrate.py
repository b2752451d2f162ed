"""Moving the databases of a home to a server: whole, once, and as far as a killed run had come."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from scene import NEW_YEAR, ROOT, SECRET, command, copy_home, surroundings

from features.people.contacts import Contacts
from features.people.hidden import Hidden
from features.people.tombstones import Tombstones
from features.people.vault import IDENTIFIER, Personal, Vault
from features.state.home import LASTING, Home
from features.state.moving import MovedStateError, moved_to, note_back
from features.state.ports import SERVING, LeaseTakenError
from features.state.postgres_moving import MOVING, MovingError, drop_files, move
from features.state.postgres_server import server_at
from features.state.settings import Settings
from features.state.sql import run_many
from serving.decide.ledger import TIMES, Ledger
from serving.decide.rules import NewRule, Rules
from serving.journeys.runs import Run, Runs
from serving.privacy.keys import Audit, Keys

VAULT = Vault(SECRET.encode())
PEOPLE = 1_300


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A home that has something in every lasting database but the inbox."""
    home = Home(tmp_path_factory.mktemp("settled") / "home", Settings(secret=SECRET))
    Vault.open(home)
    contacts = Contacts(home, VAULT)
    contacts.remember((Personal(f"email:{k:05}", IDENTIFIER, f"zoë.{k}@example.org"), NEW_YEAR) for k in range(PEOPLE))
    contacts.close()
    Tombstones(home, VAULT).add(["email:gone"], NEW_YEAR)
    Hidden(home).add(["email:gone"], ["c1"], ["é1", "E1", "e1"])
    Keys(home).create("shop", ["ingest"], NEW_YEAR)
    audit = Audit(home, VAULT)
    for k in range(3):
        audit.note(NEW_YEAR, f"key {k}", "read", "c1", "done")
    Rules(home).add(NewRule(action="block", item_ids=["i1"]), "command line", NEW_YEAR)
    Ledger(home).reached([], [("e1", "o1")])
    runs = Runs(home)
    with runs.changing() as change:
        assert change.begin(Run("r1", "welcome", "p1", "c1", 0, 5, 5, 5, {"says": "ünï\u0000code"}), "{}", "e1")
    runs.close()
    return home


def _moved(home: Home, url: str) -> Home:
    return Home(home.root, Settings(secret=SECRET, database=url))


def _told(home: Home) -> dict[str, Any]:
    """What the rooms above say of what is kept."""
    contacts, runs, ledger = Contacts(home, VAULT), Runs(home), Ledger(home)
    try:
        return {
            "contacts": contacts.everything(),
            "hidden": (Hidden(home).keys, Hidden(home).events),
            "keys": Keys(home).listed(),
            "audit": Audit(home, VAULT).lines(),
            "rules": Rules(home).listed(),
            "given": ledger.taken([], ["o1"], NEW_YEAR),
            "runs": (runs.active(["c1"]), runs.plan_text("p1")),
        }
    finally:
        contacts.close()
        runs.close()


def test_everything_is_there_and_goes_on(settled: Home, tmp_path: Path, postgres_url: str) -> None:
    home = copy_home(settled, tmp_path / "home")
    home = Home(home.root, Settings(secret=SECRET))
    before = _told(home)
    moved = {f"{each.database}.{each.table}": each.rows for each in move(home, postgres_url)}
    assert moved["contacts.contacts"] == PEOPLE
    assert {"tombstones.tombstones", "hidden.hidden", "access.audit", "rules.rules", "reservations.times", "journeys.runs"} <= set(moved)
    there = _moved(home, postgres_url)
    assert _told(there) == before
    # what is numbered goes on after what was moved
    assert Rules(there).add(NewRule(action="block", item_ids=["i2"]), "command line", NEW_YEAR).rule_id == "r2"
    Audit(there, VAULT).note(NEW_YEAR, "key 3", "read", "c1", "done")
    assert [line["key"] for line in Audit(there, VAULT).lines()] == ["key 0", "key 1", "key 2", "key 3"]
    assert Tombstones(there, VAULT).add(["email:other"], NEW_YEAR) == 1


def test_the_files_are_not_written_on_by_mistake_and_there_is_a_way_back(settled: Home, tmp_path: Path, postgres_url: str) -> None:
    home = copy_home(settled, tmp_path / "home")
    home = Home(home.root, Settings(secret=SECRET))
    with pytest.raises(MovedStateError, match=r"contacts\.db was not moved there: python -m serving migrate"):
        Contacts(_moved(home, postgres_url), VAULT)
    move(home, postgres_url)
    again = Home(home.root, Settings(secret=SECRET))
    with pytest.raises(MovedStateError, match=r"were moved to PostgreSQL at .*UBIQUO_DATABASE.*--back"):
        Contacts(again, VAULT)
    with pytest.raises(MovingError, match="before: set UBIQUO_DATABASE"):
        move(again, postgres_url)
    assert note_back(home.root)
    assert len(Contacts(Home(home.root, Settings(secret=SECRET)), VAULT).everything()) == PEOPLE
    with pytest.raises(MovingError, match="were not moved"):
        drop_files(again)
    # the server still holds the very same: it is only compared
    move(Home(home.root, Settings(secret=SECRET)), postgres_url)
    assert drop_files(again) >= 6
    assert len(Contacts(_moved(home, postgres_url), VAULT).everything()) == PEOPLE


def test_a_run_that_is_killed_goes_on_where_it_was(settled: Home, tmp_path: Path, postgres_url: str) -> None:
    home = copy_home(settled, tmp_path / "home")
    code = (
        "import os, signal, sys; from pathlib import Path; from features.state.home import Home; from features.state.settings import *\n"
        "from features.state.postgres_moving import move\n"
        "def tell(database, table, rows):\n"
        "    print(database, rows, flush=True)\n"
        "    if database == 'contacts' and rows >= 1000: os.kill(os.getpid(), signal.SIGKILL)\n"
        "move(Home(Path(sys.argv[1]), Settings(secret=sys.argv[2])), sys.argv[3], tell)"
    )
    run = [sys.executable, "-W", "ignore", "-c", code, str(home.root), SECRET, postgres_url]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, env=surroundings())
    assert done.stdout == "contacts 500\ncontacts 1000\n", done.stderr
    assert moved_to(home.root) is None
    told: list[tuple[str, str, int]] = []
    home = Home(home.root, Settings(secret=SECRET))
    before = _told(home)
    rows = {each.table: each.rows for each in move(home, postgres_url, lambda *batch: told.append(batch))}
    assert told[0] == ("contacts", "contacts", PEOPLE), "the last 300 are all that was left"
    assert rows["contacts"] == PEOPLE
    assert _told(_moved(home, postgres_url)) == before


def test_another_homes_server_is_left_alone(settled: Home, tmp_path: Path, postgres_url: str) -> None:
    move(Home(copy_home(settled, tmp_path / "one").root, Settings(secret=SECRET)), postgres_url)
    other = Home(tmp_path / "other", Settings(secret="another secret" * 3))
    vault = Vault.open(other)
    Contacts(other, vault).remember([(Personal("email:x", IDENTIFIER, "x@example.org"), NEW_YEAR)])
    with pytest.raises(MovingError, match="holds the state of another home"):
        move(other, postgres_url)
    assert len(Contacts(_moved(Home(tmp_path / "one"), postgres_url), VAULT).everything()) == PEOPLE


def test_a_server_that_is_already_in_use_is_left_alone(settled: Home, tmp_path: Path, postgres_url: str) -> None:
    used = Home(tmp_path / "used", Settings(secret=SECRET, database=postgres_url))
    with used.database("reservations", TIMES).begin() as connection:
        run_many(connection, sa.insert(TIMES), [("o1", 7)])
    with pytest.raises(MovingError, match="holds the state of another home"):
        move(Home(copy_home(settled, tmp_path / "home").root, Settings(secret=SECRET)), postgres_url)
    assert Ledger(used).gives


def test_what_was_changed_since_it_was_copied_is_noticed(settled: Home, tmp_path: Path, postgres_url: str) -> None:
    home = Home(copy_home(settled, tmp_path / "home").root, Settings(secret=SECRET))

    def meddle(database: str, table: str, rows: int) -> None:
        if database == "rules":
            with server_at(postgres_url).opened() as connection:
                connection.execute("UPDATE ubiquo_contacts.contacts SET known_at = known_at + 1 WHERE identity_key = 'email:00007'")

    with pytest.raises(MovingError, match=r"contacts\.contacts: the file holds 1300 rows and the server 1300, or not the same ones"):
        move(home, postgres_url, meddle)
    assert moved_to(home.root) is None


def test_not_behind_the_back_of_a_service(settled: Home, tmp_path: Path, postgres_url: str) -> None:
    home = Home(copy_home(settled, tmp_path / "home").root, Settings(secret=SECRET))
    with home.lease.take(SERVING, shared=True), pytest.raises(LeaseTakenError):
        move(home, postgres_url)


def test_by_command(settled: Home, tmp_path: Path, postgres_url: str) -> None:
    home = copy_home(settled, tmp_path / "home")
    wrong = command("serving", "migrate", "--to", "mysql://root@host/state", home=home.root)
    assert (wrong.returncode, "must read postgresql://" in wrong.stdout) == (1, True), wrong.stdout
    done = command("serving", "migrate", "--to", postgres_url, home=home.root)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1300" in done.stdout
    assert "UBIQUO_DATABASE=postgresql://(set)@" in done.stdout
    refused = command("serving", "keys", "list", home=home.root)
    assert (refused.returncode, "migrate --back" in refused.stdout.replace("\n", " ")) == (1, True), refused.stdout
    listed = command("serving", "keys", "list", home=home.root, UBIQUO_DATABASE=postgres_url)
    assert "shop" in listed.stdout, listed.stdout + listed.stderr
    assert "revision" in command("serving", "migrate", home=home.root, UBIQUO_DATABASE=postgres_url).stdout
    settings = command("features", "settings", home=home.root, UBIQUO_DATABASE=postgres_url.replace("ubiquo@", "ubiquo:hunter2@")).stdout
    assert "hunter2" not in settings
    dropped = command("serving", "migrate", "--drop-files", "--yes", home=home.root)
    assert "deleted" in dropped.stdout, dropped.stdout
    assert not [name for name in LASTING if home.file_of(name).exists]


def test_a_progress_row_says_how_far_each_table_is(settled: Home, tmp_path: Path, postgres_url: str) -> None:
    move(Home(copy_home(settled, tmp_path / "home").root, Settings(secret=SECRET)), postgres_url)
    with server_at(postgres_url).engine.connect() as connection:
        rows = connection.execute(sa.select(MOVING.c.database, MOVING.c.rows, MOVING.c.is_done)).fetchall()
    assert ("contacts", PEOPLE, True) in rows
    assert all(is_done for *_, is_done in rows)
