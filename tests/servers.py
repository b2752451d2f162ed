"""Servers of the tests' own that fail when they are told to, and networks that hang."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

from scene import free_port


class RedisServer:
    """A Redis on a free port that keeps what it was told once a second."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which("redis-server")
        assert program is not None
        self._program, self.folder, self.port = program, folder, free_port()
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        told = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder), "--save", "", "--appendonly", "yes"]
        self._process = subprocess.Popen([self._program, *told], stdout=subprocess.DEVNULL)
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        raise AssertionError("Redis does not answer")

    def kill(self) -> None:
        """Kill it: what it was told in the last second may be lost."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def forget(self) -> None:
        """Lose all that it keeps; it must be killed."""
        shutil.rmtree(self.folder / "appendonlydir", ignore_errors=True)

    def stop(self) -> None:
        """End it."""
        if self._process.poll() is None:
            self.kill()


class Proxy:
    """What lies between a client and the server: it passes on what is said, until it stalls or cuts."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.passes = threading.Event()
        self.passes.set()
        self._pairs: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(("127.0.0.1", self._target))
                except OSError:
                    client.close()
                    continue
                self._pairs += [client, server]
                for one, other in ((client, server), (server, client)):
                    threading.Thread(target=self._pass_on, args=(one, other), daemon=True).start()

    def _pass_on(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while said := one.recv(65_536):
                self.passes.wait()
                other.sendall(said)
            other.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        """End every connection."""
        for each in self._pairs:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._pairs.clear()

    def close(self) -> None:
        """Let nobody pass any more."""
        self._listener.close()
        self.passes.set()
        self.cut()
