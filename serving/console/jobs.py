"""What a page starts and does not wait for: one task after the other, the answer of each kept with its moment."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import urlencode

import msgspec

from features.state.disk import write_atomically
from serving.console.port import RefusedError
from serving.runtime import Runtime

logger = logging.getLogger("ubiquo")
T = TypeVar("T")
MOST_WAITING = 8
"""How many tasks wait at most: each is begun by a person who looks at a page."""
MOST_KEPT = 60
"""How many answers are kept at most: those not asked for the longest give way."""
TELL_SECONDS, FORGET_SECONDS = 0.5, 60.0
"""How often a task tells other processes how far it is, and after how long a silence it counts as broken off."""
Advance = Callable[[int, int], None]
"""Tells how much of how much is done."""


@dataclass(frozen=True)
class Kept(Generic[T]):
    """An answer, with the moment to which it belongs."""

    at: datetime
    value: T


@dataclass
class Running:
    """A task that waits for its turn or is at work; the file *told* tells other processes."""

    done: int = 0
    of: int = 0
    told: Path | None = None
    _told_at: float = 0.0

    def advance(self, done: int, of: int) -> None:
        """Note how much of how much is done."""
        self.done, self.of = done, of
        if self.told is not None and time.monotonic() - self._told_at > TELL_SECONDS:
            self._told_at = time.monotonic()
            write_atomically(self.told, msgspec.json.encode([done, of]))


@dataclass(frozen=True)
class JobView:
    """A task as a page shows it.

    Attributes:
        name: of the task.
        address: of the page that starts it and tells how far it is.
        button: what starts it.
        kept_at: the moment of the last answer, None where there is none.
        running: None where it is not at work.
        failed: why the last one brought nothing.
        fields: what the form sends along.
    """

    name: str
    address: str
    button: str
    kept_at: datetime | None
    running: Running | None
    failed: str | None
    fields: Mapping[str, str] = field(default_factory=dict)

    @property
    def query(self) -> str:
        """What the form sends along, as part of an address."""
        return urlencode(dict(self.fields))


class _File(msgspec.Struct, frozen=True):
    at: datetime
    value: msgspec.Raw


class Jobs:
    """The tasks of one service. Answers lie in its home as JSON, so that they outlive a restart; none names a customer.

    Args:
        folder: where answers are kept.
        clock: tells the moment of an answer.
    """

    def __init__(self, folder: Path, clock: Callable[[], datetime]) -> None:
        self._folder, self._clock = folder, clock
        self._lock = threading.Lock()
        self._running: dict[str, Running] = {}
        self._failed: dict[str, str] = {}
        self._waiting: queue.Queue[tuple[str, Callable[[Advance], Any]]] = queue.Queue(MOST_WAITING)
        self._thread: threading.Thread | None = None

    def start(self, name: str, task: Callable[[Advance], Any]) -> None:
        """Begin *task*, unless one of that name waits or is at work; its answer, a Struct, is kept under the name.

        Raises:
            RefusedError: too many wait already.
        """
        with self._lock:
            if self.running(name) is not None:
                return
            try:
                self._waiting.put_nowait((name, task))
            except queue.Full:
                raise RefusedError(503, "other counts wait for their turn already: try again in a minute") from None
            self._running[name] = Running(told=self._path(name, ".running"))
            self._failed.pop(name, None)
            self._path(name, ".failed").unlink(missing_ok=True)
            if self._thread is None:
                # a daemon: what is counted for a page holds up no end of the service
                self._thread = threading.Thread(target=self._work, name="ubiquo-console", daemon=True)
                self._thread.start()

    def running(self, name: str) -> Running | None:
        """How far a task is; None where none of that name is at work."""
        if (own := self._running.get(name)) is not None:
            return own
        told = self._path(name, ".running")
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            # another process is at it
            if time.time() - told.stat().st_mtime < FORGET_SECONDS:
                return Running(*msgspec.json.decode(told.read_bytes(), type=tuple[int, int]))
        return None

    def failed(self, name: str) -> str | None:
        """Why the last task of that name brought nothing; None where it did."""
        if (own := self._failed.get(name)) is not None:
            return own
        with contextlib.suppress(OSError):
            return self._path(name, ".failed").read_text() or None
        return None

    def found(self, name: str, kind: type[T]) -> Kept[T] | None:
        """The last answer of that name; None where there is none, or one of an earlier form."""
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            file = msgspec.json.decode(self._path(name).read_bytes(), type=_File)
            return Kept(file.at, msgspec.json.decode(file.value, type=kind))
        return None

    def view(self, name: str, address: str, button: str, kept: Kept[Any] | None = None, fields: Mapping[str, str] | None = None) -> JobView:
        """The task of that name as a page shows it."""
        return JobView(name, address, button, None if kept is None else kept.at, self.running(name), self.failed(name), dict(fields or {}))

    def _work(self) -> None:
        while True:
            name, task = self._waiting.get()
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._running[name].advance(0, 0)
                value = task(self._running[name].advance)
                text = msgspec.json.encode({"at": self._clock(), "value": value})
                write_atomically(self._path(name), text)
                self._tidy()
            except Exception as error:
                logger.exception("a count that a page began has failed: %s", name)
                self._failed[name] = str(error)[:300] or type(error).__name__
                with contextlib.suppress(OSError):
                    write_atomically(self._path(name, ".failed"), self._failed[name].encode())
                while len(self._failed) > MOST_KEPT:
                    self._failed.pop(next(iter(self._failed)), None)
            finally:
                self._running.pop(name, None)
                self._path(name, ".running").unlink(missing_ok=True)

    def _tidy(self) -> None:
        kept = sorted(self._folder.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
        failed = sorted(self._folder.glob("*.failed"), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in (*kept[MOST_KEPT:], *failed[MOST_KEPT:]):
            path.unlink(missing_ok=True)

    def _path(self, name: str, ending: str = ".json") -> Path:
        return self._folder / f"{name}{ending}"


_JOBS: weakref.WeakKeyDictionary[Runtime, Jobs] = weakref.WeakKeyDictionary()


def jobs_of(runtime: Runtime) -> Jobs:
    """The tasks of what serves."""
    return _JOBS.setdefault(runtime, Jobs(runtime.home.root / "console", runtime.clock))
