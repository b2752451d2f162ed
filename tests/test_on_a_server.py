"""What holds of ledger, journeys, rules, keys and indexes in files holds of them on a PostgreSQL server: the same tests, run again."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import test_contact
import test_event_index
import test_identity
import test_journeys
import test_offers
import test_rules
from scene import NEW_YEAR, SECRET, TinyShop
from test_event_index import index as index
from test_event_index import shop as shop
from test_journeys import receiver as receiver
from test_journeys import scene as scene
from test_rules import book as book

from features.people.hidden import Hidden
from features.people.tombstones import Tombstones
from features.people.vault import Vault
from features.state.home import Home
from features.state.postgres_server import server_at
from features.state.sql import run_many
from features.store.event_log import EventLog
from serving.decide.rules import Rules
from serving.privacy.keys import LOCAL, Audit, Keys


@pytest.fixture(autouse=True)
def on_a_server(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("UBIQUO_DATABASE", postgres_url)
    return postgres_url


class TestLedgerThere(test_contact.TestLedger):
    """Reservations."""


class TestBudgetsThere(test_offers.TestBudgets):
    """What of an offer is given out; each homes' own, which a server does not begin anew with."""

    test_it_counts_as_a_plain_list_does = None  # type: ignore[assignment]
    test_nor_does_a_process_that_is_killed_give_out_more = None  # type: ignore[assignment]


class TestJourneysThere(test_journeys.TestSteps):
    """Runs."""

    # of two homes
    test_what_may_not_go_out_now_is_tried_for_as_long_as_it_has_patience = None  # type: ignore[assignment]


class TestOutboxThere(test_journeys.TestOutbox):
    """What waits to leave."""

    test_each_shape = None  # type: ignore[assignment]


class TestEventIndexThere(test_event_index.TestIndex):
    """The index of the log; without what is damage to a file."""

    test_a_file_that_is_lost_or_damaged_is_made_anew = None  # type: ignore[assignment]
    test_a_page_that_is_damaged_while_it_is_used_is_made_anew = None  # type: ignore[assignment]
    test_a_few = test_event_index.TestByKey.test_the_latest_come_first_and_no_more_than_asked_for

    def test_one_that_somebody_discarded_is_made_anew(self, shop: TinyShop) -> None:
        log = EventLog(shop.home, "UTC")
        before = log.count()
        log.index.catch_up()
        Home(shop.home.root).database("event_index").discard()
        with contextlib.suppress(Exception):
            log.index.catch_up()
        log.index.catch_up()
        assert log.index.version == shop.home.tables["events"].version()
        assert log.count() == before


class TestStepIndexThere(test_event_index.TestSteps):
    """How identifiers came to whom they belong to."""

    test_a_file_that_is_lost_or_behind_catches_up = None  # type: ignore[assignment]


class TestRulesThere:
    """Merchandising rules."""

    test_a_change = staticmethod(test_rules.test_a_change_ends_one_rule_and_makes_another_so_that_each_moment_is_told)
    test_another_process = staticmethod(test_rules.test_what_another_process_changes_counts_soon_and_what_this_one_changes_at_once)
    test_twice = staticmethod(test_rules.test_the_same_rule_twice_and_an_end_twice_are_told)

    def test_those_that_cannot_be_read_stay_as_they_were(self, book: Rules, on_a_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("serving.decide.rules.LOOK_SECONDS", 0.0)
        made = book.add(test_rules.rule("block", "i1"), "key", NEW_YEAR)
        before = book.live()
        with contextlib.closing(server_at(on_a_server).opened()) as connection:
            connection.execute("ALTER TABLE ubiquo_rules.rules RENAME TO away")
            connection.execute("UPDATE ubiquo.revisions SET revision = revision + 1 WHERE database = 'rules'")
            assert book.live() == before
            assert book.unread is not None
            connection.execute("ALTER TABLE ubiquo_rules.away RENAME TO rules")
        assert book.live() == before
        assert book.unread is None
        assert before == (made,)


def test_two_processes_agree_on_who_is_who(tmp_path: Path) -> None:
    test_identity.test_two_processes_that_learn_at_once_agree_in_the_end(tmp_path)


def test_the_doors_stay_shut_where_the_keys_are_gone(tmp_path: Path, on_a_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UBIQUO_LOOPBACK", "1")
    assert Keys(Home(tmp_path)).check("") == LOCAL, "no key was ever made"
    token = Keys(Home(tmp_path)).create("shop", ["ingest"], NEW_YEAR)
    with pytest.raises(ValueError, match="named 'shop' already"):
        Keys(Home(tmp_path)).create("shop", ["decide"], NEW_YEAR)
    opened = Keys(Home(tmp_path))
    found = opened.check(token)
    assert found is not None
    assert (found.name, opened.check("")) == ("shop", None)
    opened.revoke("shop", NEW_YEAR)
    assert Keys(Home(tmp_path)).check(token) is None
    assert Keys(Home(tmp_path)).check("") is None, "to revoke the last key opens no door"
    with contextlib.closing(server_at(on_a_server).opened()) as connection:
        connection.execute("DROP TABLE ubiquo_access.keys")
    assert Keys(Home(tmp_path)).check("") is None, "nor does a table that is gone"


def test_who_is_hidden_or_erased_is_known_to_every_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("features.people.hidden.LOOK_SECONDS", 0.0)
    one, other = Hidden(Home(tmp_path)), Hidden(Home(tmp_path))
    assert other.keys == frozenset()
    one.add(["email:x"], ["c1"], ["e1"])
    assert (other.keys, other.customers, other.events) == ({"email:x"}, {"c1"}, {"e1"})
    one.remove(["email:x"], ["c1"], ["e1"])
    assert other.keys == frozenset()
    vault = Vault(SECRET.encode())
    stones, others = Tombstones(Home(tmp_path), vault), Tombstones(Home(tmp_path), vault)
    assert others.welcome([]) == []
    stones.add(["email:x", "email:y"], NEW_YEAR)
    stones.settle(["email:x"])
    others.welcome([])
    assert {stone.settled for stone in others._stones.values()} == {True, False}


def test_lines_of_the_audit_log_keep_the_order_in_which_they_were_written(tmp_path: Path) -> None:
    audit = Audit(Home(tmp_path), Vault(SECRET.encode()))
    audit.note_all(NEW_YEAR, "key", "read", [f"c{k}" for k in range(30)], "done")
    audit.note_rule(NEW_YEAR, "key", "end rule", "r1", "done")
    subjects = [line["subject"] for line in audit.lines()]
    assert subjects[-1] == "r1"
    count, page = audit.page(5)
    assert (count, [line["subject"] for line in page]) == (31, subjects[:-6:-1])
    assert audit.named() == (["key"], ["end rule", "read"])


def test_many_rows_at_once_are_as_strict_as_a_few(tmp_path: Path) -> None:
    import sqlalchemy as sa

    rows: list[tuple[Any, ...]] = [(f"{k}", k, b"\0\\x" * k) for k in range(300)]
    things = sa.Table(
        "things", sa.MetaData(), sa.Column("name", sa.Text, primary_key=True), sa.Column("size", sa.Integer, nullable=False),
        sa.Column("content", sa.LargeBinary),
    )  # fmt: skip
    session = Home(tmp_path).database("letter_index", things).connect()
    for wrong in ([*rows, rows[0]], [*rows, ("more", None, None)]):
        with pytest.raises(sa.exc.IntegrityError), session.writing() as connection:
            run_many(connection, sa.insert(things), wrong)
    odd = ("tab\tline\nback\\N", 1, None)
    with session.writing() as connection:
        run_many(connection, sa.insert(things), [*rows, odd])
    assert session.read(sa.select(things).where(things.c.content.is_(None))) == [odd]
    assert sorted(session.read(sa.select(things).where(things.c.content.is_not(None))), key=lambda row: row[1]) == rows
