"""Power cuts, full disks, damaged files: what was promised is there, what is wrong is named, and no byte goes where it does not belong."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable
from scene import NEW_YEAR, ROOT, SECRET, TinyShop, command, event, surroundings

from features.people.vault import Vault, WrongSecretError
from features.state import delta_writes, disk
from features.state.clock import fixed_clock
from features.state.disk import AppendOnlyFile, DamagedStateError, NoSpaceError, write_atomically
from features.state.home import Home
from features.state.sqlite_file import WRITTEN_AHEAD, SQLiteFile
from features.store.decision_log import DecisionLog
from features.store.event_log import EventLog, connect
from serving.intake.inbox import Inbox

POWER_CUTS = int(os.environ.get("UBIQUO_POWER_CUTS", "4"))
BEFORE = NEW_YEAR - timedelta(days=1)


def decision(name: str, **more: Any) -> dict[str, Any]:
    return {
        "decision_id": name, "kind": "churn", "customer_id": "c_1", "as_of": NEW_YEAR, "model": "m/1", "feature_at": 1, "fallback": None,
        "request": {}, "choices": [], "features": {}, **more,
    }  # fmt: skip


@contextlib.contextmanager
def mounted(*arguments: str, at: Path) -> Iterator[Path]:
    at.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", *arguments, str(at)], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"this machine lets us mount nothing: {done.stderr.strip()}")
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


class TestPowerCut:
    def test_what_was_promised_is_on_the_disk_at_every_moment(self, tmp_path: Path) -> None:
        """The disk's image is copied under load, as a power cut would leave it, and what is on the copy is read."""
        if shutil.which("mkfs.ext4") is None:
            pytest.skip("mkfs.ext4 is not installed (apt-get install e2fsprogs)")
        image = tmp_path / "image"
        with open(image, "wb") as file:
            file.truncate(256 * 1024 * 1024)
        subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
        with mounted("-o", "loop", str(image), at=tmp_path / "disk") as place:
            environment = {**surroundings(), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "UBIQUO_SECRET": SECRET}
            writer = subprocess.Popen(
                [sys.executable, "-W", "ignore", str(ROOT / "tests" / "power_cut.py"), str(place / "home")],
                cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            assert writer.stdout is not None
            said: list[str] = []
            listener = threading.Thread(target=lambda: said.extend(iter(writer.stdout.readline, "")), daemon=True)
            listener.start()
            while not said:
                assert writer.poll() is None
                time.sleep(0.1)
            copies = []
            try:
                for k in range(POWER_CUTS):
                    time.sleep(1.3)
                    promised = list(said)
                    writer.send_signal(signal.SIGSTOP)
                    copy = tmp_path / f"copy-{k}"
                    shutil.copyfile(image, copy)
                    writer.send_signal(signal.SIGCONT)
                    copies.append((copy, promised))
                assert writer.poll() is None
            finally:
                writer.kill()
                writer.wait()
        assert len(copies[-1][1]) > 10, "the writer has written"
        for copy, promised in copies:
            with mounted("-o", "loop", str(copy), at=tmp_path / "after") as place:
                self.check(Home(place / "home"), promised)

    @staticmethod
    def check(home: Home, promised: list[str]) -> None:
        words = [line.split() for line in promised]
        stored = {name for first, *names in words if first == "stored" for name in names}
        erasing = {name for first, *names in words if first == "erasing" for name in names}
        erased = {name for first, *names in words if first == "erased" for name in names}
        log = EventLog(home, "America/New_York")
        log.recover()
        inbox = Inbox(home, fixed_clock(NEW_YEAR))
        waiting = {letter.event_id for letter in inbox.waiting(-1)}
        inbox.close()
        found: set[str] = set()
        if log.exists:
            rows = connect().execute("SELECT event_id FROM read_parquet(?)", [log.files()]).fetchall()
            assert len(rows) == len(set(rows)), "stored twice"
            found = {name for (name,) in rows}
        assert stored - erasing <= found | waiting, "promised and lost"
        assert not erased & found, "erased and there again"

    def test_each_file_is_synced_before_what_follows_from_it(self, tiny: TinyShop, tmp_path: Path) -> None:
        """A trace of system calls: data, commit and their folders are synced before the mark is written, and the mark before anything goes."""
        if shutil.which("strace") is None:
            pytest.skip("strace is not installed (apt-get install strace)")
        work = (
            "import sys; sys.path[:0] = ['tests']\n"
            "from pathlib import Path\n"
            "from datetime import timedelta\n"
            "import power_cut\n"
            "from features.state import delta_writes, tables\n"
            "from features.state.home import Home\n"
            "from scene import NEW_YEAR, TinyShop, event\n"
            "from features.catalogue.shop import Shop\n"
            "home = Home(Path(sys.argv[1])); shop = TinyShop(home, Shop.load(home))\n"
            "delta_writes.COMPACT_ABOVE_FILES = 3\n"
            "for k in range(5): shop.add(event(f'e{k}', 'login', NEW_YEAR - timedelta(days=1)))\n"
            "shop.log.maintain(kept_seconds=0.0)\n"
            "tables.DeltaFolder(home.events).erase('event_id', ['e1'])\n"
        )
        trace = tmp_path / "trace"
        calls = "trace=fsync,fdatasync,write,unlink,unlinkat"
        subprocess.run(
            ["strace", "-f", "-y", "-e", calls, "-o", str(trace), sys.executable, "-c", work, str(tiny.home.root)],
            cwd=ROOT, env={**surroundings(), "UBIQUO_SECRET": SECRET}, check=True, capture_output=True,
        )  # fmt: skip
        synced: set[str] = set()
        under_way: dict[str, str] = {}
        marks, deleted = 0, 0
        events = str(tiny.home.events)
        mark = f"{events}.synced"
        for line in trace.read_text().splitlines():
            thread = line.split()[0]
            if (sync := re.search(r"(?:fsync|fdatasync)\(\d+<([^>]*)>", line)) is not None:
                if "unfinished" in line:
                    under_way[thread] = sync.group(1)
                else:
                    synced.add(sync.group(1))
            elif "sync resumed" in line:
                synced.add(under_way.pop(thread))
            elif re.search(rf"write\(\d+<{mark}>", line) is not None:
                marks += 1
                commits = {name for name in synced if name.startswith(f"{events}/_delta_log/") and name.endswith(".json")}
                assert len(commits) >= marks, "the commit is synced before it is marked"
                assert {events, f"{events}/_delta_log"} <= synced, "and so are the folders"
                assert any(name.endswith(".parquet") and Path(name).parent == Path(events) for name in synced), "and the data"
                synced -= {events, f"{events}/_delta_log", mark}
            elif "unlink" in line and re.search(rf'"({events}/[^"]*\.parquet)"', line) is not None:
                deleted += 1
                assert marks >= 6, "no file goes before the version without it is on the disk"
                assert mark in synced, "and its mark"
        assert marks >= 7
        assert deleted >= 5

    def test_a_commit_that_was_never_finished_is_taken_back(self, tiny: TinyShop) -> None:
        tiny.add(event("a", "login", BEFORE))
        mark = tiny.home.events.with_name("events.synced")
        before = mark.read_bytes()
        tiny.add(event("b", "login", BEFORE))
        mark.write_bytes(before)
        last = tiny.home.events / "_delta_log" / "00000000000000000001.json"
        for content in (b"", last.read_bytes()[:40]):
            last.write_bytes(content)
            tiny.log.recover()
            assert tiny.log.count() == 1
            tiny.add(event("b", "login", BEFORE))
            assert tiny.log.count() == 2
            mark.write_bytes(before)

    @pytest.mark.parametrize("table", ["events", "identifiers"])
    @pytest.mark.parametrize("damage", ["empty", "cut", "missing"])
    def test_a_stored_commit_that_is_damaged_is_named_with_the_way_back(self, tiny: TinyShop, table: str, damage: str) -> None:
        for k in range(3):
            tiny.add(event(f"e{k}", "login", BEFORE, str(k)))
        path = getattr(tiny.home, table)
        last = sorted((path / "_delta_log").glob("*.json"))[-1]
        if damage == "missing":
            last.unlink()
        else:
            last.write_bytes(b"" if damage == "empty" else last.read_bytes()[:50])
        with pytest.raises(DamagedStateError, match=r"_delta_log.*repair"):
            tiny.log.recover()
        done = command("features", "repair", "--yes", home=tiny.home.root)
        assert done.returncode == 0, done.stdout + done.stderr
        tiny.log.recover()
        assert tiny.log.count() == (2 if table == "events" else 3)

    def test_a_data_file_that_is_gone_is_named_and_can_be_given_up(self, tiny: TinyShop) -> None:
        for k in range(3):
            tiny.add(event(f"e{k}", "login", BEFORE, str(k)))
        [gone, *_] = tiny.log.files()
        Path(gone).write_bytes(b"")
        with pytest.raises(DamagedStateError, match=re.escape(gone)):
            tiny.log.recover()
        done = command("features", "repair", "--yes", home=tiny.home.root)
        assert "given up" in done.stdout, done.stdout + done.stderr
        tiny.log.recover()
        assert tiny.log.count() == 2


class TestSpool:
    def test_a_closed_file_writes_nowhere(self, tmp_path: Path) -> None:
        file = AppendOnlyFile(tmp_path / "spool")
        file.close()
        with open(tmp_path / "another", "wb"), pytest.raises(ValueError, match="closed"):
            file.write(b"a record of somebody")
        assert (tmp_path / "another").read_bytes() == b""

    def test_with_no_inodes_left_the_old_spool_goes_on_and_no_record_reaches_another_file(self, tiny: TinyShop, tmp_path: Path) -> None:
        with mounted("-t", "tmpfs", "-o", "size=200m,nr_inodes=24", "tmpfs", at=tmp_path / "small") as place:
            log = DecisionLog(Home(place))
            log.append(decision("before"))
            fillers = []
            with contextlib.suppress(OSError):
                for k in range(100):
                    (place / f"filler-{k}").touch()
                    fillers.append(place / f"filler-{k}")
            pipes = []
            for k in range(200):
                assert log.append(decision(f"d{k}"))
                with contextlib.suppress(OSError):
                    log.flush()
                # a connection would get the number that a closed spool had
                pipes.append(os.pipe())
            for _, end in pipes:
                os.close(end)
            assert all(os.read(end, 100) == b"" for end, _ in pipes), "a record went into another file"
            for end, _ in pipes:
                os.close(end)
            for filler in fillers:
                filler.unlink()
            log.flush()
            assert {row["decision_id"] for row in log.read()} == {"before", *(f"d{k}" for k in range(200))}
            log.close()

    def test_a_full_disk_costs_the_record_and_not_the_answer(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with mounted("-t", "tmpfs", "-o", "size=256k", "tmpfs", at=tmp_path / "small") as place:
            monkeypatch.setattr(disk, "RESERVED_BYTES", 0)
            log = DecisionLog(Home(place))
            taken = [log.append(decision(f"d{k}", features={"x": "y" * 5_000})) for k in range(100)]
            assert taken[0]
            assert not taken[-1]
            assert log.unlogged == taken.count(False)
            lines = [json.loads(line) for path in place.rglob("*.jsonl") for line in path.read_bytes().splitlines()]
            assert len(lines) == taken.count(True), "no half line is left"

    def test_an_odd_line_is_named_and_the_others_are_kept(self, tiny: TinyShop, caplog: pytest.LogCaptureFixture) -> None:
        folder = tiny.home.decisions
        folder.mkdir(parents=True)
        log = DecisionLog(tiny.home)
        good = [decision(f"d{k}", as_of=NEW_YEAR.isoformat()) for k in range(2)]
        odd = ["7", "{}", '"text"', json.dumps({**good[0], "as_of": 5}), json.dumps({**good[0], "feature_at": "x"}), "{half"]
        (folder / "sealed-1.jsonl").write_text("\n".join([json.dumps(good[0]), *odd, json.dumps(good[1])]) + "\n")
        assert log.flush() == 2
        assert caplog.text.count("is no decision") == len(odd)
        assert "sealed-1.jsonl: line 2" in caplog.text
        assert log.flush() == 0
        log.close()


class TestRoom:
    def test_with_little_room_nothing_more_is_taken(self, tiny: TinyShop, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(disk, "free_bytes", lambda folder: 5_000_000)
        with pytest.raises(NoSpaceError, match="5 MB left"):
            disk.check_room(tiny.home.root)

    def test_growth_has_an_end(self, tiny: TinyShop) -> None:
        for k in range(90):
            tiny.add(event(f"e{k}", "login", BEFORE))
        tiny.log.maintain(kept_seconds=0.0)
        folder = tiny.home.events
        assert tiny.log.count() == 90
        assert len(list(folder.glob("*.parquet"))) <= delta_writes.COMPACT_ABOVE_FILES + 1
        assert len(list((folder / "_delta_log").glob("*.json"))) <= delta_writes.CHECKPOINT_EVERY + 4
        assert DeltaTable(str(folder)).version() >= 90
        tiny.log.recover()

    def test_the_oldest_go_once_a_table_holds_too_much(self, tiny: TinyShop) -> None:
        log = DecisionLog(tiny.home)
        for k in range(10):
            log.append(decision(f"d{k}", as_of=NEW_YEAR + timedelta(days=k)))
        log.flush()
        assert log.table.keep_newest("as_of", most_bytes=100)
        assert {row["decision_id"] for row in log.read()} == {f"d{k}" for k in range(4, 10)}
        log.close()


class TestDamage:
    def test_what_a_wrong_clock_stamped_with_a_time_to_come_is_known_from_now_on(self, tiny: TinyShop) -> None:
        tiny.add(event("a", "login", BEFORE), event("b", "login", BEFORE), known_at=NEW_YEAR + timedelta(days=30))
        tiny.add(event("c", "login", BEFORE))
        assert tiny.log.known_before(NEW_YEAR + timedelta(hours=1)) == 1
        done = command("features", "repair", "--yes", "--clock", home=tiny.home.root, UBIQUO_CLOCK=f"fixed:{NEW_YEAR.isoformat()}")
        assert done.returncode == 0, done.stderr
        assert "2 events from a time to come are known from now on" in done.stdout
        assert tiny.log.known_before(NEW_YEAR + timedelta(hours=1)) == 3

    def test_a_service_keeps_a_repair_out(self, tiny: TinyShop) -> None:
        with tiny.home.lease.take("serving"):
            done = command("features", "repair", "--yes", home=tiny.home.root)
        assert done.returncode == 1
        assert "another process holds serving.lock" in done.stdout

    def test_a_file_that_is_no_database_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "inbox.db"
        path.write_bytes(b"this is no database, though it is long enough to be taken for the head of one" * 20)
        with pytest.raises(DamagedStateError, match=r"inbox\.db is damaged"):
            SQLiteFile(path, [], WRITTEN_AHEAD).connect()

    def test_databases_are_their_owners_alone(self, tiny: TinyShop) -> None:
        old = tiny.home.inbox
        old.parent.mkdir(exist_ok=True)
        old.touch(0o644)
        Inbox(tiny.home, fixed_clock(NEW_YEAR)).close()
        tiny.add(event("a", "login", BEFORE))
        found = {path.name: path.stat().st_mode & 0o077 for path in tiny.home.root.glob("*.db*")}
        assert {"inbox.db", "contacts.db"} <= found.keys()
        assert not any(found.values())

    def test_another_secret_is_refused_at_once(self, tiny: TinyShop, monkeypatch: pytest.MonkeyPatch) -> None:
        Vault.open(tiny.home)
        monkeypatch.setenv("UBIQUO_SECRET", "another secret that is long enough for it")
        with pytest.raises(WrongSecretError, match=r"put secret\.key or UBIQUO_SECRET back"):
            Vault.open(Home(tiny.home.root))

    def test_a_home_without_the_note_is_checked_by_its_contacts(self, tiny: TinyShop, monkeypatch: pytest.MonkeyPatch) -> None:
        tiny.add(event("a", "login", BEFORE))
        (tiny.home.root / "secret.check").unlink()
        monkeypatch.setenv("UBIQUO_SECRET", "another secret that is long enough for it")
        with pytest.raises(WrongSecretError):
            Vault.open(Home(tiny.home.root))

    def test_an_atomic_write_leaves_no_part(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_atomically(tmp_path / "file", b"old")

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(disk, "sync_file", full)
        with pytest.raises(OSError, match="No space"):
            write_atomically(tmp_path / "file", b"new")
        assert (tmp_path / "file").read_bytes() == b"old"
        assert [path.name for path in tmp_path.iterdir()] == ["file"]
