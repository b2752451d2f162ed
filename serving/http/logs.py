"""What the service writes for its operator: a line that repeats ever more rarely, so that a bad hour does not fill the disk."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime

import msgspec

from features.state.settings import Settings
from serving.http.asgi import application

QUIET_SECONDS = 5.0
"""How long the second line of a kind waits after the first; each further one waits twice as long, up to ``TRACE_SECONDS``."""
TRACE_SECONDS = 60.0
"""How often the same error may bring its traceback, and after how long without a line a kind counts as new."""


@dataclass
class _Kind:
    shown_at: float
    wait_seconds: float = QUIET_SECONDS
    held_back: int = 0


class Sparing(logging.Filter):
    """Lets the first record of a kind through at once and repeats ever more rarely, with how many were held back."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._kinds: dict[tuple[str, str], _Kind] = {}
        self._traced: dict[tuple[str, str, str], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to write the record."""
        if record.name in ("uvicorn.error", "bentoml.serve") and application.failure is not None:
            # why it could not start is told once, in one line
            return False
        now, name = time.monotonic(), (record.name, str(record.msg))
        with self._lock:
            # the texts of messages are few; should a library make them up, they are forgotten
            if len(self._kinds) > 1_000:
                self._kinds.clear()
                self._traced.clear()
            kind = self._kinds.get(name)
            if kind is not None and now - kind.shown_at < kind.wait_seconds:
                kind.held_back += 1
                return False
            held_back = 0 if kind is None else kind.held_back
            if kind is None or now - kind.shown_at > max(TRACE_SECONDS, 2 * kind.wait_seconds):
                self._kinds[name] = _Kind(now)
            else:
                self._kinds[name] = _Kind(now, min(2 * kind.wait_seconds, TRACE_SECONDS))
            if record.exc_info and record.exc_info[0] is not None:
                trace = (*name, record.exc_info[0].__name__)
                if now - self._traced.get(trace, float("-inf")) < TRACE_SECONDS:
                    record.msg, record.args = f"{record.getMessage()} ({record.exc_info[0].__name__}: {record.exc_info[1]})", ()
                    record.exc_info = record.exc_text = None
                else:
                    self._traced[trace] = now
        if held_back:
            record.msg, record.args = f"{record.getMessage()} (and {held_back} more like it)", ()
        return True


class JsonLines(logging.Formatter):
    """One JSON object a line: ``time`` (UTC), ``level``, ``logger``, ``message`` and, where there is one, ``error``."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        said: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info and record.exc_info[0] is not None:
            kind, error, _ = record.exc_info
            said["error"] = {"type": kind.__name__, "message": str(error), "traceback": self.formatException(record.exc_info)}
        return msgspec.json.encode(said).decode()


def configure_logging() -> None:
    """Write warnings of every part, and what ubiquo itself tells, to standard error, sparingly, as ``UBIQUO_LOG`` says."""
    handler = logging.StreamHandler()
    as_text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonLines() if Settings.from_environment().log == "json" else as_text)
    handler.addFilter(Sparing())
    logging.root.handlers[:] = [handler]
    logging.root.setLevel(logging.WARNING)
    logging.getLogger("ubiquo").setLevel(logging.INFO)
