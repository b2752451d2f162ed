"""Whether a thread may wait for a server that has just not answered: somebody waits for it, or nobody does."""

from __future__ import annotations

import threading

_THREAD = threading.local()


def be_impatient() -> None:
    """From here on this thread asks no server that is known not to answer: another thread finds out when it answers again."""
    _THREAD.is_impatient = True


def is_impatient() -> bool:
    """Whether this thread is not to wait for such a server."""
    return getattr(_THREAD, "is_impatient", False)
