"""Where the counters of the rate limits stand: in this process, for as long as their windows last."""

from __future__ import annotations

import threading
import time

from limits.storage import Storage

TIDY_SECONDS = 10.0
"""How often windows that have passed are let go of."""


class Counters(Storage):
    """Fixed windows in memory. The library's own storage starts a thread for many a request, which costs more than the request.

    It holds one counter a key of the windows of the last seconds, whoever sends: those that have passed are let go of as requests come.
    """

    STORAGE_SCHEME = None

    def __init__(self) -> None:
        super().__init__()
        self._windows: dict[str, tuple[float, int]] = {}
        self._lock = threading.Lock()
        self._tidied_at = 0.0

    @property
    def base_exceptions(self) -> type[Exception]:
        """What may go wrong."""
        return ValueError

    def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        """Count *amount* in the key's window, which begins now where none runs, and lasts *expiry* seconds; returns the count."""
        now = time.monotonic()
        with self._lock:
            if now - self._tidied_at > TIDY_SECONDS:
                self._tidied_at = now
                self._windows = {name: window for name, window in self._windows.items() if window[0] > now}
            ends, count = self._windows.get(key, (0.0, 0))
            if ends <= now:
                ends, count = now + expiry, 0
            self._windows[key] = ends, count + amount
            return count + amount

    def get(self, key: str) -> int:
        """The count in the window that runs."""
        ends, count = self._windows.get(key, (0.0, 0))
        return count if ends > time.monotonic() else 0

    def get_expiry(self, key: str) -> float:
        """When the window ends (Unix seconds)."""
        ends, _ = self._windows.get(key, (0.0, 0))
        return time.time() + max(0.0, ends - time.monotonic())

    def check(self) -> bool:
        """Memory is always there."""
        return True

    def reset(self) -> int:
        """Forget every window; returns how many there were."""
        with self._lock:
            gone, self._windows = len(self._windows), {}
        return gone

    def clear(self, key: str) -> None:
        """Forget a key's window."""
        with self._lock:
            self._windows.pop(key, None)
