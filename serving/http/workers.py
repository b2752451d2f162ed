"""Several processes that answer on one port: started, started again where one ends, and replaced one by one without a failed request."""

from __future__ import annotations

import logging
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from serving.http.logs import configure_logging

logger = logging.getLogger("ubiquo")
START_SECONDS = 300.0
"""How long a process may load before it counts as failed."""
END_SECONDS = 40.0
"""How long a process may take to bring everything into the logs."""
LOOK_SECONDS = 0.2
SHORT_LIFE_SECONDS, LONGEST_WAIT_SECONDS = 30.0, 30.0
"""A process that ends sooner than that waits ever longer for its next start, up to that."""


class Process:
    """One process that answers."""

    def __init__(self, listener: socket.socket, environment: dict[str, str]) -> None:
        self._ready, told = os.pipe()
        command = [sys.executable, *_warnings(), "-m", "serving", "worker", str(listener.fileno()), str(told)]
        self._is_told = False
        try:
            self._process = subprocess.Popen(command, pass_fds=[listener.fileno(), told], env=environment)
        except BaseException:
            os.close(self._ready)
            raise
        finally:
            os.close(told)
        self.began = time.monotonic()

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    def has_ended(self) -> int | None:
        """Its exit code, or None while it runs."""
        return self._process.poll()

    def wait_until_ready(self, is_over: Callable[[], bool] = lambda: False) -> bool:
        """Whether it answers; False where it has ended before, takes too long, or *is_over* says that it need not be waited for."""
        found: list[int] = []
        until = time.monotonic() + START_SECONDS
        while not found and not is_over() and time.monotonic() < until:
            found, _, _ = select.select([self._ready], [], [], LOOK_SECONDS)
        is_ready = bool(found) and os.read(self._ready, 1) != b""
        self.forget()
        return is_ready

    def forget(self) -> None:
        """Listen no more for whether it answers."""
        if not self._is_told:
            self._is_told = True
            os.close(self._ready)

    def leave(self) -> None:
        """Have it answer what it has begun, and end."""
        if self._process.poll() is None:
            self._process.terminate()

    def wait(self, seconds: float = END_SECONDS) -> int:
        """Its exit code, once it has ended; after so long it is killed."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            logger.error("process %d does not end: it is killed; what it had not moved on is taken up by another", self.pid)
            self._process.kill()
            return self._process.wait()


def _warnings() -> list[str]:
    return [part for option in sys.warnoptions for part in ("-W", option)]


class Supervisor:
    """Keeps *count* processes answering on one socket."""

    def __init__(self, listener: socket.socket, count: int, environment: Mapping[str, str]) -> None:
        self._listener, self._count = listener, count
        listener.set_inheritable(True)
        self._folder = tempfile.mkdtemp(prefix="ubiquo-workers-")
        self._environment: dict[str, str] = {**environment, "UBIQUO_SHARED": "1", "UBIQUO_SIBLINGS": self._folder}
        self._processes: list[Process] = []
        self._waits = 0.0
        self._start_at = 0.0
        self._is_leaving = self._replaces = False

    def run(self) -> int:
        """Answer until told to end (SIGTERM, SIGINT); replace every process on SIGHUP. Returns the exit code.

        Where the first cannot start, the whole does not.
        """
        for name, told in ((signal.SIGTERM, self._leave), (signal.SIGINT, self._leave), (signal.SIGHUP, self._replace)):
            signal.signal(name, told)
        try:
            first = self._start()
            if not first.wait_until_ready(self._leaves) and not self._is_leaving:
                first.leave()
                return first.wait() or 1
            others = [self._start() for _ in range(self._count - 1) if not self._is_leaving]
            for other in others:
                other.wait_until_ready(self._leaves)
            while not self._is_leaving:
                time.sleep(LOOK_SECONDS)
                self._start_again()
                if self._replaces:
                    self._replaces = False
                    self._replace_all()
        finally:
            for process in self._processes:
                process.leave()
            codes = [process.wait() for process in self._processes]
            shutil.rmtree(self._folder, ignore_errors=True)
        # a process that was told to leave ends by that signal
        return 0 if {*codes} <= {0, -signal.SIGTERM} else 1

    def _start(self) -> Process:
        process = Process(self._listener, self._environment)
        self._processes.append(process)
        return process

    def _start_again(self) -> None:
        ended = [process for process in self._processes if process.has_ended() is not None]
        for process in ended:
            logger.error("process %d has ended (%s): another takes its place", process.pid, process.has_ended())
            self._processes.remove(process)
            process.forget()
            (Path(self._folder) / f"{process.pid}.prom").unlink(missing_ok=True)
            self._wait_for_the_next(is_short=time.monotonic() - process.began < SHORT_LIFE_SECONDS)
        if len(self._processes) < self._count and time.monotonic() >= self._start_at:
            # nobody waits for it here: another may end meanwhile
            try:
                self._start()
            except OSError as error:
                logger.error("no process can be started now (%s): it is tried again", error)
                self._wait_for_the_next(is_short=True)

    def _wait_for_the_next(self, is_short: bool) -> None:
        self._waits = min(max(1.0, 2 * self._waits), LONGEST_WAIT_SECONDS) if is_short else 0.0
        self._start_at = time.monotonic() + self._waits

    def _replace_all(self) -> None:
        """One after the other: a new one answers before an old one leaves."""
        for old in list(self._processes):
            try:
                new = self._start()
            except OSError as error:
                logger.error("no process can be started now (%s): those before go on answering", error)
                return
            if not new.wait_until_ready(self._leaves):
                if self._is_leaving:
                    return
                logger.error("a new process does not start: those before go on answering")
                new.leave()
                new.wait()
                self._processes.remove(new)
                return
            old.leave()
            old.wait()
            self._processes.remove(old)
            (Path(self._folder) / f"{old.pid}.prom").unlink(missing_ok=True)
        logger.info("every process was replaced")

    def _leaves(self) -> bool:
        return self._is_leaving

    def _leave(self, *_: object) -> None:
        self._is_leaving = True

    def _replace(self, *_: object) -> None:
        self._replaces = True


def supervise(host: str, port: int, count: int, environment: Mapping[str, str]) -> int:
    """Answer HTTP by *count* processes until told to end; returns the exit code."""
    configure_logging()
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        return Supervisor(listener, count, environment).run()
