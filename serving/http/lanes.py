"""Bounded pools of threads: nothing that grows with a client's input runs on the event loop, and no queue grows without end."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
logger = logging.getLogger("ubiquo")


class CrowdedError(RuntimeError):
    """More wait than the lane may hold, or it was not this one's turn in time; nothing was begun."""


class LateError(RuntimeError):
    """The work was begun, and is not done by its deadline; it goes on."""


class Lane:
    """Some threads and a short queue before them. What cannot be begun in time is refused at once, rather than late.

    Args:
        name: for the threads' names and for the error.
        threads: how many work at once.
        waiting: how many may wait for a thread.
        patience_seconds: how long one may wait before it is begun.
        deadline_seconds: after how long its caller is told that it is not done.
        first: what is done on the thread before each piece of work.
    """

    def __init__(
        self,
        name: str,
        threads: int,
        waiting: int,
        patience_seconds: float,
        deadline_seconds: float,
        first: Callable[[], object] = lambda: None,
    ) -> None:
        self._first = first
        self.name, self._room, self._patience, self._deadline = name, threads + waiting, patience_seconds, deadline_seconds
        self._threads = ThreadPoolExecutor(threads, f"ubiquo-{name}")
        self._held = 0
        self._lock = threading.Lock()

    def enter(self) -> None:
        """Take a place, before anything is done for the request.

        Raises:
            CrowdedError: there is none left.
        """
        with self._lock:
            if self._held >= self._room:
                raise CrowdedError(f"too many {self.name} wait")
            self._held += 1

    def leave(self) -> None:
        """Give the place back."""
        with self._lock:
            self._held -= 1

    async def run(self, work: Callable[..., T], *arguments: Any) -> T:
        """What *work* answers, done on one of the threads.

        Raises:
            CrowdedError: no place, or not begun within the lane's patience.
            LateError: begun, and not done within the deadline.
        """
        self.enter()
        try:
            future = self._begin(work, *arguments)
        except BaseException:
            self.leave()
            raise
        loop = asyncio.get_running_loop()
        awake = loop.create_future()

        def wake() -> None:
            if not awake.done():
                awake.set_result(None)

        def done(_: Future[T]) -> None:
            self.leave()
            # nobody waits any more where the loop is closed
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(wake)

        future.add_done_callback(done)
        late = loop.call_later(self._deadline, wake)
        try:
            await awake
        finally:
            late.cancel()
        if future.cancel():
            raise CrowdedError(f"too many {self.name} wait")
        if future.done():
            return future.result()
        raise LateError(f"the {self.name} took longer than {self._deadline:g} s")

    def begin(self, work: Callable[..., T], *arguments: Any) -> Future[T]:
        """Begin without waiting for the end.

        Raises:
            CrowdedError: there is no place.
        """
        self.enter()
        future = self._threads.submit(contextvars.copy_context().run, self._first_then, work, *arguments)
        future.add_done_callback(lambda _: self.leave())
        return future

    def _begin(self, work: Callable[..., T], *arguments: Any) -> Future[T]:
        asked = time.monotonic()

        def in_turn() -> T:
            if time.monotonic() - asked > self._patience:
                raise CrowdedError(f"too many {self.name} wait")
            return self._first_then(work, *arguments)

        return self._threads.submit(in_turn)

    def _first_then(self, work: Callable[..., T], *arguments: Any) -> T:
        self._first()
        return work(*arguments)

    def close(self) -> None:
        """Finish what was begun."""
        self._threads.shutdown(cancel_futures=True)


@dataclass
class _Asked:
    by: str
    at: float
    future: Future[Any]


class Ticket(NamedTuple):
    """Where to ask for an answer that is not there yet."""

    result_id: str
    is_anothers: bool = False
    """Whether only another process of the service has it."""


ELSEWHERE_SECONDS = 0.5
"""How long whoever asks for another process's answer waits to be told to ask again."""


class LongAnswers:
    """Answers that may take long: whoever asks waits a little, and is then told where to ask again.

    A finished answer is kept for a while, and given only to the key that asked for it. It lies in the memory of the process that made it:
    any other tells whoever asks there to ask again, until they come to that one.
    """

    def __init__(self, lane: Lane, most: int = 64, kept_seconds: float = 600.0) -> None:
        self._lane, self._most, self._kept = lane, most, kept_seconds
        self._own = uuid.uuid4().hex[:8]
        """How the tickets of this process begin."""
        self._asked: OrderedDict[str, _Asked] = OrderedDict()
        self._lock = threading.Lock()

    async def ask(self, by: str, patience_seconds: float, work: Callable[..., Any], *arguments: Any) -> Any:
        """The answer, or a ticket for it.

        Raises:
            CrowdedError: too many answers are under way.
        """
        name = f"{self._own}{int(time.time()):08x}{uuid.uuid4().hex}"
        with self._lock:
            self._forget()
            if len(self._asked) >= self._most:
                raise CrowdedError("too many long answers are under way or not fetched")
            self._asked[name] = _Asked(by, time.monotonic(), self._lane.begin(work, *arguments))
        return await self.fetch(name, by, patience_seconds)

    async def fetch(self, name: str, by: str, patience_seconds: float = 0.0) -> Any:
        """The answer of that ticket, or the ticket again; a fetched answer is forgotten.

        Raises:
            LookupError: there is none of that name for this key.
        """
        with self._lock:
            self._forget()
            asked = self._asked.get(name)
        if asked is None and self._is_anothers(name):
            # whoever asks at once again would only ask the more often
            await asyncio.sleep(min(patience_seconds, ELSEWHERE_SECONDS))
            return Ticket(name, is_anothers=True)
        if asked is None or asked.by != by:
            raise LookupError("there is no result of that id")
        await asyncio.wait([asyncio.wrap_future(asked.future)], timeout=patience_seconds)
        if not asked.future.done():
            return Ticket(name)
        with self._lock:
            self._asked.pop(name, None)
        return asked.future.result()

    def _is_anothers(self, name: str) -> bool:
        """Whether a ticket may be one of another process of the service, and is young enough to be worth something there."""
        if len(name) != len(self._own) + 40 or name.startswith(self._own):
            return False
        try:
            made = int(name[len(self._own) : len(self._own) + 8], 16)
        except ValueError:
            return False
        return 0 <= time.time() - made + 60 < self._kept

    def _forget(self) -> None:
        due = [n for n, each in self._asked.items() if each.future.done() and time.monotonic() - each.at > self._kept]
        for name in due:
            del self._asked[name]
