"""A PostgreSQL server of the tests' own: made, killed, started again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import psycopg
from scene import free_port


def programs() -> Path | None:
    """Where PostgreSQL's programs lie; the newest of several."""
    found = shutil.which("initdb")
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    return Path(found).parent if found else places[-1].parent if places else None


class PostgresCluster:
    """A server in a folder of its own on a free port; each test takes a database."""

    def __init__(self, bin_folder: Path, *settings: str) -> None:
        self._bin, self._settings = bin_folder, settings
        # its user must be able to reach it
        self.folder = Path(tempfile.mkdtemp(prefix="ubiquo-postgres-"))
        # the server refuses to be run by root
        self._user: dict[str, Any] = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.getuid() == 0 else {}
        if self._user:
            shutil.chown(self.folder, "postgres", "postgres")
        self.data = self.folder / "data"
        made = [self._bin / "initdb", "-D", self.data, "-U", "ubiquo", "--auth=trust", "--no-locale", "-E", "UTF8", "--no-sync"]
        self._run(made)
        self.port = free_port()
        self._emptied: list[str] = []
        self.start()

    def _run(self, command: list[Any]) -> None:
        done = subprocess.run([str(part) for part in command], cwd=self.folder, capture_output=True, text=True, **self._user)
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        said = [
            f"port={self.port}",
            "listen_addresses=127.0.0.1",
            "unix_socket_directories=",
            "fsync=on",
            "max_connections=200",
            *self._settings,
        ]
        command = [self._bin / "postgres", "-D", self.data, *(part for each in said for part in ("-c", each))]
        with open(self.folder / "log", "ab") as log:
            self._process = subprocess.Popen([str(part) for part in command], cwd=self.folder, stdout=log, stderr=log, **self._user)
        for _ in range(300):
            try:
                psycopg.connect(self.url("postgres"), connect_timeout=2).close()
                return
            except psycopg.OperationalError:
                assert self._process.poll() is None, (self.folder / "log").read_text()[-2_000:]
                time.sleep(0.05)
        raise AssertionError("PostgreSQL does not answer")

    def url(self, database: str) -> str:
        """The URL of a database of this server."""
        return f"postgresql://ubiquo@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        """The URL of a database that nothing lies in."""
        if self._emptied:
            return self._emptied.pop()
        name = f"t{uuid.uuid4().hex[:12]}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def give_back(self, url: str) -> None:
        """Empty a database for the next test: to make one, and to delete it, takes longer than most tests."""
        with psycopg.connect(url, autocommit=True) as connection:
            others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            connection.execute(others)
            for (schema,) in connection.execute("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'ubiquo%'").fetchall():
                connection.execute(f"DROP SCHEMA {schema} CASCADE")
        self._emptied.append(url)

    def kill(self) -> None:
        """Kill the server and all its processes, as a power cut of its machine would; what the disk holds stays."""
        children = subprocess.run(["ps", "--ppid", str(self._process.pid), "-o", "pid="], capture_output=True, text=True).stdout.split()
        os.kill(self._process.pid, signal.SIGKILL)
        for child in children:
            try:
                os.kill(int(child), signal.SIGKILL)
            except ProcessLookupError:
                continue
        self._process.wait()
        (self.data / "postmaster.pid").unlink(missing_ok=True)

    def stop(self) -> None:
        """End the server, and delete its folder."""
        # to end in order it would write to the disk what is deleted here
        if self._process.poll() is None:
            self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
