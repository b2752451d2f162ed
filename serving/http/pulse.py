"""How the event loop is: a watch that runs on it."""

from __future__ import annotations

import asyncio
import time


class Pulse:
    """How late the event loop runs what is due: a stall is everybody's."""

    EVERY_SECONDS = 0.02
    STALL_SECONDS = 0.1

    def __init__(self) -> None:
        self.longest = 0.0
        """The longest stall so far, in seconds of the clock on the wall."""
        self.longest_busy = 0.0
        """The longest that the loop's own thread computed between two beats, in seconds of the processor."""
        self.stalls = 0
        """How many lasted longer than ``STALL_SECONDS``."""

    async def beat(self) -> None:
        """Watch until cancelled."""
        due, busy = time.monotonic() + self.EVERY_SECONDS, time.thread_time()
        while True:
            await asyncio.sleep(self.EVERY_SECONDS)
            now, used = time.monotonic(), time.thread_time()
            late = now - due
            self.longest, self.longest_busy = max(self.longest, late), max(self.longest_busy, used - busy)
            if late > self.STALL_SECONDS:
                self.stalls += 1
            due, busy = now + self.EVERY_SECONDS, used
