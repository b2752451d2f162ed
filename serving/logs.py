"""What the service writes for its operator: one line a second at most of each kind, so that a bad hour does not fill the disk."""

from __future__ import annotations

import logging
import threading
import time

from serving.asgi import application

TRACE_SECONDS = 60.0
"""How often the same error may bring its traceback."""


class Sparing(logging.Filter):
    """Lets one record of a kind through a second, with how many were held back; a traceback of a kind once a minute."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._kinds: dict[tuple[str, str], tuple[float, int]] = {}
        self._traced: dict[tuple[str, str, str], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to write the record."""
        if record.name in ("uvicorn.error", "bentoml.serve") and application.failure is not None:
            # why it could not start is told once, in one line
            return False
        now, kind = time.monotonic(), (record.name, str(record.msg))
        with self._lock:
            # the texts of messages are few; should a library make them up, they are forgotten
            if len(self._kinds) > 1_000:
                self._kinds.clear()
                self._traced.clear()
            last, held_back = self._kinds.get(kind, (float("-inf"), 0))
            if now - last < 1.0:
                self._kinds[kind] = last, held_back + 1
                return False
            self._kinds[kind] = now, 0
            if record.exc_info and record.exc_info[0] is not None:
                trace = (*kind, record.exc_info[0].__name__)
                if now - self._traced.get(trace, float("-inf")) < TRACE_SECONDS:
                    record.msg, record.args = f"{record.getMessage()} ({record.exc_info[0].__name__}: {record.exc_info[1]})", ()
                    record.exc_info = record.exc_text = None
                else:
                    self._traced[trace] = now
        if held_back:
            record.msg, record.args = f"{record.getMessage()} (and {held_back} more like it)", ()
        return True


def configure_logging() -> None:
    """Write warnings of every part, and what ubiquo itself tells, to standard error, sparingly."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.addFilter(Sparing())
    logging.root.handlers[:] = [handler]
    logging.root.setLevel(logging.WARNING)
    logging.getLogger("ubiquo").setLevel(logging.INFO)
