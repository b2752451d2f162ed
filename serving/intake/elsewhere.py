"""What other processes have brought into the log and the rows, where this one has to read it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import datetime

from features.state.ports import UnreachableError

TakeIn = Callable[[datetime, bool], object]
"""Reads what was received before a moment and others have moved on; is told whether some of it could not be followed."""


class MovedElsewhere:
    """Notes at once what others have moved on, and reads it where there is time: the object store may take half a minute to answer.

    Whoever asks a question waits only for what could not be followed, and not for long. Safe to call from several threads.
    """

    def __init__(self, take_in: TakeIn) -> None:
        self._read = take_in
        self._noting, self._working = threading.Lock(), threading.RLock()
        self._until: datetime | None = None
        self._noted = self._taken = 0
        self.is_missing = False
        """Whether others have moved on what could not be followed before, and it was not read yet."""
        self._reading: Future[None] | None = None

    def note(self, until: datetime, is_missing: bool) -> None:
        """Others have moved on all that was received before a moment; *is_missing* says that some of it could not be followed."""
        with self._noting:
            self._until, self._noted = until, self._noted + 1
            self.is_missing |= is_missing

    def take_in(self) -> None:
        """Read what was noted, if it was not read before.

        Raises:
            OSError: it cannot be read; it is read the next time.
        """
        with self._working:
            with self._noting:
                noted, until, is_missing = self._noted, self._until, self.is_missing
            if noted == self._taken or until is None:
                return
            self._read(until, is_missing)
            with self._noting:
                self._taken = noted
                # what came meanwhile may be missing in its turn
                self.is_missing &= noted != self._noted

    def wait(self, seconds: float) -> None:
        """Wait until what could not be followed is read.

        Raises:
            OSError: it cannot be, or not within so many seconds.
        """
        latest = time.monotonic() + seconds
        while self.is_missing:
            with self._noting:
                if (reading := self._reading) is None or reading.done():
                    reading = self._reading = self._begin()
            try:
                reading.result(max(0.0, latest - time.monotonic()))
            except TimeoutError:
                raise UnreachableError("what another service has brought into the log cannot be read yet") from None

    def _begin(self) -> Future[None]:
        """Read on a thread of its own, for whoever cannot wait as long as it may take."""
        reading: Future[None] = Future()

        def read() -> None:
            try:
                self.take_in()
            except BaseException as error:
                reading.set_exception(error)
            else:
                reading.set_result(None)

        threading.Thread(target=read, name="ubiquo-reading", daemon=True).start()
        return reading
