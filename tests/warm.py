"""Processes that need not import everything anew: each is forked from one that has, and then runs and ends like any other.

What ``python -m serving`` and its like do first is import the same libraries, for three to five seconds of a processor. Run as a
script, this is the process that has done so and forks; imported, it is how the tests ask for one.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
REQUEST_BYTES = 200_000
IMPORTED = (
    "lightgbm", "mlflow.pyfunc", "mlflow.store.model_registry.sqlalchemy_store", "mlflow.store.tracking.sqlalchemy_store",
    "sklearn.linear_model", "serving.bootstrap", "training.bootstrap",
)  # fmt: skip
"""Not BentoML: it reads the environment as it is imported, so each process imports that for itself."""
NUMBER = struct.Struct("q")


class Forked:
    """A process that was forked for us: what ``subprocess.Popen`` tells of one, as far as tests ask."""

    def __init__(self, told: socket.socket) -> None:
        self._told = told
        self.returncode: int | None = None
        self.pid = self._next()

    def _next(self) -> int:
        said = self._told.recv(NUMBER.size, socket.MSG_WAITALL)
        if len(said) < NUMBER.size:
            raise ProcessLookupError("the process that forks is gone")
        [number] = NUMBER.unpack(said)
        return int(number)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end, and give its exit code.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        if self.returncode is None:
            self._told.settimeout(timeout)
            try:
                status = self._next()
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0) from None
            self.returncode = os.waitstatus_to_exitcode(status)
            self._told.close()
        return self.returncode

    def poll(self) -> int | None:
        """Its exit code, if it has ended."""
        try:
            return self.wait(0.0)
        except subprocess.TimeoutExpired:
            return None


class Forge:
    """The process that has imported everything, and forks."""

    def __init__(self) -> None:
        self._asked, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-W", "ignore", __file__, str(theirs.fileno())]
        self._process = subprocess.Popen(command, cwd=ROOT, pass_fds=[theirs.fileno()], start_new_session=True)
        theirs.close()

    def run(self, module: str, arguments: list[str], environment: Mapping[str, str], out: IO[bytes], err: IO[bytes]) -> Forked:
        """Begin ``python -m MODULE ARGUMENTS`` in the folder of the project, in a session of its own."""
        mine, theirs = socket.socketpair()
        request = json.dumps([module, arguments, dict(environment)]).encode()
        socket.send_fds(self._asked, [request], [out.fileno(), err.fileno(), theirs.fileno()])
        theirs.close()
        return Forked(mine)

    def close(self) -> None:
        """Fork no more; what was forked goes on."""
        self._asked.close()
        self._process.wait(60)


def _fork(asked: socket.socket) -> tuple[str, list[str]] | None:
    """Fork for each request until there are no more; the module and its arguments in what was forked, else nothing."""
    # those who wait for a process and tell of its end are not waited for
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        request, files, _, _ = socket.recv_fds(asked, REQUEST_BYTES, 3)
        if not request:
            return None
        if os.fork():
            for file in files:
                os.close(file)
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        asked.close()
        out, err, tell = files
        if pid := os.fork():
            os.write(tell, NUMBER.pack(pid))
            os.write(tell, NUMBER.pack(os.waitpid(pid, 0)[1]))
            os._exit(0)
        os.setsid()
        os.dup2(out, 1)
        os.dup2(err, 2)
        for file in files:
            os.close(file)
        module, arguments, environment = json.loads(request)
        os.environ.clear()
        os.environ.update(environment)
        time.tzset()
        return module, arguments


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    with socket.socket(fileno=int(sys.argv[1])) as requests:
        for name in IMPORTED:
            importlib.import_module(name)
        # what stays shared is not to be written to by who collects garbage
        gc.freeze()
        task = _fork(requests)
    if task is not None:
        sys.argv = [task[0], *task[1]]
        runpy.run_module(task[0], run_name="__main__", alter_sys=True)
