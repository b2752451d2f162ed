"""The log: nothing twice, nothing lost, conflicts kept; identities; decisions; the inbox."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest
from scene import NEW_YEAR, ROOT, SMALL_CUT, TinyShop, command, customer, event

from features.people.identity import Identities
from features.sources.complete_journey import CompleteJourney
from features.state.home import Home
from features.state.ports import DECISIONS
from features.state.settings import SettingError, Settings, described, shown, variable_of
from features.store import decision_log
from features.store.dead_letters import DeadLetter
from features.store.decision_log import DecisionLog
from features.store.event_log import EventLog, connect

BEFORE = NEW_YEAR - timedelta(days=10)


def test_a_repeat_is_stored_once_and_a_conflict_becomes_a_dead_letter(tiny: TinyShop) -> None:
    one = event("e1", "purchase", BEFORE, items=[("i1", 1, 100)])
    first = tiny.add(one, one, event("e2", "login", BEFORE))
    again = tiny.add(one, event("e1", "purchase", BEFORE, items=[("i1", 1, 999)]))
    assert (first.appended, first.repeated, first.conflicting) == (2, 1, 0)
    assert (again.appended, again.repeated, again.conflicting) == (0, 1, 1)
    assert tiny.log.count() == 2
    [letter] = tiny.log.letters.read()
    assert letter["field"] == "event_id"
    assert "999" in letter["raw"]


def test_the_same_dead_letter_is_kept_once(tiny: TinyShop) -> None:
    letter = DeadLetter(NEW_YEAR, "test", "name", "unknown", "{}")
    tiny.log.reject([letter, letter])
    tiny.log.reject([letter])
    assert len(tiny.log.letters.read()) == 1


def test_old_events_are_retired_some_at_a_time_and_what_was_said_of_consent_stays(tiny: TinyShop) -> None:
    said = {"consent": {"purposes": {"personalization": False}, "policy_version": "1", "source": "test"}}
    old = [event(f"old-{k}", "login", BEFORE - timedelta(days=400)) for k in range(3)]
    kept = {**event("said", "consent_update", BEFORE - timedelta(days=400)), **said}
    tiny.add(*old, kept, event("new", "login", BEFORE))
    keys = set(Identities(tiny.home).owners())
    before = NEW_YEAR - timedelta(days=365)
    assert [tiny.log.retire(before, 2), tiny.log.retire(before, 2), tiny.log.retire(before, 2)] == [2, 1, 0]
    stored = connect().execute("SELECT event_id FROM read_parquet(?)", [tiny.log.files()]).fetchall()
    assert {name for (name,) in stored} == {"said", "new"}
    assert set(tiny.log.hashes_of(["old-0", "said", "new"])) == {"said", "new"}
    assert set(Identities(tiny.home).owners()) == keys


def test_many_small_appends_are_compacted_without_loss(tiny: TinyShop) -> None:
    for k in range(70):
        tiny.add(event(f"e{k}", "login", BEFORE))
    assert tiny.log.count() == 70
    assert len(tiny.log.files()) < 30


def test_a_second_identifier_joins_the_customer_of_the_first(tiny: TinyShop) -> None:
    tiny.add(event("e1", "login", BEFORE, card="7"))
    tiny.add({**event("e2", "login", BEFORE, card=None), "identifiers": {"loyalty_card": "7", "cookie": "x"}})
    known = Identities(tiny.home)
    assert known.resolve({"cookie": "x"}) == known.resolve({"loyalty_card": "7"}) == customer("7")
    assert known.resolve({"cookie": "other"}) is None


def test_what_another_process_learns_is_known_after_a_refresh(tiny: TinyShop) -> None:
    tiny.add(event("e1", "login", BEFORE, card="7"))
    running = Identities(tiny.home)
    tiny.add(event("e2", "login", BEFORE, card="8"))
    assert running.resolve({"loyalty_card": "8"}) is None
    running.refresh()
    assert running.resolve({"loyalty_card": "8"}) == customer("8")
    assert running.resolve({"loyalty_card": "7"}) == customer("7")


def test_a_decision_is_flushed_once_and_a_cut_line_is_passed_over(tiny: TinyShop) -> None:
    record = {
        "decision_id": "d1", "kind": "churn", "customer_id": "c", "as_of": NEW_YEAR, "model": "churn/1", "feature_at": 1,
        "fallback": None, "request": {}, "choices": [{"probability": 0.5}], "features": {"a": 1},
    }  # fmt: skip
    log = DecisionLog(tiny.home)
    log.append(record)
    assert log.flush() == 1
    # a crash after the table was written, before the sealed spool was removed
    (tiny.home.decisions / "sealed-again.jsonl").write_bytes(msgspec.json.encode(record) + b'\n{"decision_id": "cut')
    assert log.flush() == 0
    [row] = log.read()
    assert row["features"] == {"a": 1}
    assert row["as_of"] == NEW_YEAR
    log.close()


def test_a_large_spool_is_moved_in_portions_and_what_cannot_be_read_holds_nothing_up(
    tiny: TinyShop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decision_log, "PORTION_BYTES", 1_000)
    log = DecisionLog(tiny.home)
    for number in range(40):
        log.append(
            {
                "decision_id": f"d{number}", "kind": "churn", "customer_id": None, "as_of": NEW_YEAR, "model": "churn/1", "feature_at": None,
                "fallback": None, "request": {}, "choices": [], "features": {"a": "x" * 200}, "assignment": {},
            }
        )  # fmt: skip
    cut = next(tiny.home.decisions.glob("*.jsonl"))
    with cut.open("ab") as spool:
        # the decoder copies this part without looking at it
        spool.write(cut.read_bytes().splitlines()[0].replace(b"d0", b"d-1").replace(b"x" * 200, b"\xff") + b"\n")
    assert log.flush_if_due() == 40, "a spool of that size is not kept waiting"
    assert {row["decision_id"] for row in log.read()} == {f"d{number}" for number in range(40)}
    assert tiny.home.tables[DECISIONS].version() >= 8, "portion by portion"
    log.append({**log.read()[0], "decision_id": "small"})
    assert log.flush_if_due() == 0, "a small one waits for its time"
    assert log.flush() == 1
    log.close()


class TestCompleteJourney:
    """The adapter against the source itself."""

    def test_every_row_falls_in_the_week_that_the_source_says_in_new_york(self) -> None:
        source = CompleteJourney()
        [(rows, right)] = source._db.execute(
            """SELECT count(*), count(*) FILTER (week = 1 + floor(datediff('day', DATE '2016-12-26',
               ((transaction_timestamp AT TIME ZONE 'UTC') AT TIME ZONE 'America/New_York')::DATE) / 7)) FROM transactions"""
        ).fetchall()
        assert rows == right == 1_469_307

    def test_money_and_lines_arrive_to_the_cent(self, trained: Home) -> None:
        source = CompleteJourney(households=SMALL_CUT)
        [(lines, cents, baskets)] = source._db.execute(
            """SELECT count(*), sum(round(sales_value * 100)::BIGINT), count(DISTINCT basket_id)
               FROM transactions SEMI JOIN chosen USING (household_id)"""
        ).fetchall()
        files = EventLog(trained, "America/New_York").files()
        stored = connect().execute(
            """SELECT sum(len(items)), sum(list_sum(list_transform(items, lambda i: i.amount_minor))), count(*)
               FROM read_parquet(?) WHERE name = 'purchase' AND source = 'complete-journey'""",
            [files],
        )
        assert stored.fetchall() == [(lines, cents, baskets)]

    def test_nobody_shopped_on_christmas_day(self, trained: Home) -> None:
        files = EventLog(trained, "America/New_York").files()
        query = "SELECT count(*) FROM read_parquet(?) WHERE name = 'purchase' AND local_date = DATE '2017-12-25'"
        assert connect().execute(query, [files]).fetchall() == [(0,)]

    def test_a_truncated_file_is_named_and_nothing_is_written(self, tmp_path: Path) -> None:
        folder = tmp_path / "data"
        shutil.copytree(CompleteJourney().folder, folder)
        with open(folder / "campaigns.parquet", "r+b") as handle:
            handle.truncate(5000)
        done = command("features", "import", "complete-journey", "--folder", str(folder), home=tmp_path / "home")
        assert done.returncode == 1
        assert "campaigns.parquet" in done.stdout
        assert "fetch it again" in done.stdout
        assert not (tmp_path / "home" / "log").exists()

    @pytest.mark.evidence
    def test_an_import_killed_half_way_and_repeated_equals_one_that_was_not(self, tmp_path: Path, trained: Home) -> None:
        # half of the small cut: three batches, of which one is stored by then
        households = SMALL_CUT // 2
        arguments = [sys.executable, "-m", "features", "import", "complete-journey", "--households", str(households)]
        home = Home(tmp_path / "home")
        process = subprocess.Popen(
            arguments, cwd=ROOT, env={**os.environ, "UBIQUO_HOME": str(home.root)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        log = EventLog(home, "America/New_York")
        while not log.exists and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        part = log.count()
        assert command(*arguments[2:], home=home.root).returncode == 0
        assert command(*arguments[2:], "--again", home=home.root).returncode == 0
        digest = """SELECT count(*), bit_xor(hash(event_id || content_hash)) FROM read_parquet($log) WHERE source = 'complete-journey'
                    AND identity_key IN (SELECT identity_key FROM read_parquet($of))"""
        whole = EventLog(trained, "America/New_York")
        repeated, straight = (connect().execute(digest, {"log": each.files(), "of": log.files()}).fetchall() for each in (log, whole))
        assert repeated == straight
        assert 0 < part < repeated[0][0] == CompleteJourney(households=households).count()


def test_commands_on_an_empty_home_tell_what_to_do_first(tmp_path: Path) -> None:
    for arguments in (
        ("features", "materialize"),
        ("training", "churn"),
        ("serving", "score", "churn", "--out", "x.parquet"),
        ("serving",),
    ):
        done = command(*arguments, home=tmp_path)
        assert done.returncode == 1, arguments
        assert "import" in done.stdout
        assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(("host", "said"), [("0.0.0.0", "UBIQUO_API_KEY"), ("not-an-address", "not an address")])
def test_a_wider_bind_without_a_key_is_refused(tmp_path: Path, host: str, said: str) -> None:
    done = command("serving", "--host", host, home=tmp_path)
    assert done.returncode == 1
    assert said in done.stdout


class TestSettings:
    @pytest.mark.parametrize(
        ("said", "told"),
        [
            ({"UBIQUO_MAX_WAITING": "many"}, "UBIQUO_MAX_WAITING='many': expected"),
            ({"UBIQUO_MAX_WAITING": "0"}, "UBIQUO_MAX_WAITING='0': expected `int` >= 1"),
            ({"UBIQUO_MAX_DECISION_BYTES": "5"}, "UBIQUO_MAX_DECISION_BYTES='5'"),
            ({"UBIQUO_REDDIS": "localhost:6379"}, "UBIQUO_REDDIS is no setting: did you mean UBIQUO_REDIS"),
        ],
    )
    def test_a_mistake_is_told_with_its_name(self, said: dict[str, str], told: str) -> None:
        with pytest.raises(SettingError, match=re.escape(told)):
            Settings.from_environment(said)

    @pytest.mark.parametrize(
        ("setting", "said", "told"),
        [
            ("redis", "redis:6379", "redis:6379"),
            ("redis", "one:6379,two:6379,ssl=true,password=hunter2", "one:6379,two:6379"),
            ("redis", "redis://:hunter2@redis:6379", "redis:6379"),
            ("tracking_uri", "http://mlflow:5000", "http://mlflow:5000"),
            ("tracking_uri", "http://u:hunter2@mlflow:5000/path", "http://(set)@mlflow:5000/path"),
            ("tracking_uri", "postgresql://u:hunter2@db:5432/mlflow", "postgresql://(set)@db:5432/mlflow"),
            ("tracking_uri", "http://u:hunter2/x@mlflow:5000", "(set)"),
            ("tracking_uri", "sqlite:////srv/a@b/mlflow.db", "sqlite:////srv/a@b/mlflow.db"),
            ("database", "postgresql://u:hunter2@db:5432/shop?password=hunter2", "postgresql://(set)@db:5432/shop"),
            ("secret", "hunter2", "(set)"),
            ("lake", "s3://ubiquo/log", "s3://ubiquo/log"),
        ],
    )
    def test_no_password_is_shown(self, setting: str, said: str, told: str) -> None:
        assert shown(setting, said) == told

    def test_what_is_not_said_is_as_it_is_described(self) -> None:
        plain = Settings.from_environment({"PATH": "/bin", "UBIQUO_SOMEBODY_ELSES": "1"})
        for variable, default, meaning in described():
            assert meaning
            if (name := variable.removeprefix("UBIQUO_").lower()) in Settings.__struct_fields__:
                assert f"{getattr(plain, name)}" == default

    def test_the_documents_name_every_variable_that_there_is(self) -> None:
        text = "".join(path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
        assert [name for name, _, _ in described() if variable_of(name) not in text] == []
