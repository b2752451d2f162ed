"""An S3 server in memory: moto's, with each request to itself.

moto by itself looks whether an object is there and puts it in two steps, so that two conditional writes at once may both come through.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple

served = DomainDispatcherApplication(create_backend_app)
one_at_a_time = threading.Lock()


def answer(environment: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
    with one_at_a_time:
        return list(served(environment, start))


if __name__ == "__main__":
    run_simple("127.0.0.1", int(sys.argv[1]), answer, threaded=True)
