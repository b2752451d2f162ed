"""The HTTP server: one process, BentoML's application, and bounds on what a connection may take."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, ClassVar, cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.http.logs import configure_logging

MAX_CONNECTIONS = 1_000
"""How many connections are held; beyond that the one that has kept us waiting longest goes."""
MAX_HEADER_BYTES = 32_768
HEADER_SECONDS = 5.0
"""How long a request line and its headers may take to arrive, on a new connection and after each answer."""
KEEP_ALIVE_SECONDS = 30
WRITE_SECONDS = 30.0
"""How long a client may leave an answer unread."""
SWITCH_SECONDS = 0.001
"""How long a thread may hold the interpreter while the event loop waits for it."""
BACKLOG = 1_024
LEAVE_SECONDS = 1.5
"""How long a process that leaves goes on answering on the connections that it has."""
_M_ARENA_MAX = -8


class Connection(HttpToolsProtocol):
    """An HTTP/1.1 connection with deadlines for headers and for reading, and a bound on how many there are."""

    is_leaving: ClassVar[bool] = False
    """Whether this process is about to end: each connection gets one more answer, which says that it is the last."""
    waiting: ClassVar[dict[Connection, None]] = {}
    """Those of which no whole request is here, the one that has waited longest first."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._header_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._header_bytes = 0
        self._in_headers = True

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, in the place of the one that waits longest if there are too many."""
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            longest = next(iter(self.waiting), None)
            (longest or self).transport.abort()
            if longest is None:
                return
            self.waiting.pop(longest, None)
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go of it."""
        self.waiting.pop(self, None)
        for timer in (self._header_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on, as long as headers stay within their bounds."""
        if self._in_headers:
            if self._header_timer is None:
                # the first bytes of another request on a kept connection
                self._await_headers()
            self._header_bytes += len(data)
        super().data_received(data)
        if self._in_headers and self._header_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
            self._refuse(b"431 Request Header Fields Too Large", f"headers may hold {MAX_HEADER_BYTES} bytes")

    def on_headers_complete(self) -> None:
        """Hand the request on."""
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
        self._in_headers, self._header_bytes = False, 0
        super().on_headers_complete()
        if Connection.is_leaving and self.cycle is not None:
            cast(list[tuple[bytes, bytes]], self.cycle.scope["headers"]).append((b"connection", b"close"))
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        """The next bytes are another request's."""
        self._in_headers = True
        # as long as its body has not come it may have to go for others
        self.waiting.pop(self, None)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Wait for another request."""
        super().on_response_complete()
        if not self.transport.is_closing() and not self.pipeline:
            self.waiting[self] = None

    def pause_writing(self) -> None:
        """The client reads slower than we write: not for ever."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads again."""
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()

    def _unsupported_upgrade_warning(self) -> None:
        # the request is answered as if it asked for no upgrade (RFC 9110, 7.8); a line a request would be for the client to write
        pass

    def _await_headers(self) -> None:
        self.waiting[self] = None
        self._header_timer = self.loop.call_later(HEADER_SECONDS, self._too_slow)

    def _too_slow(self) -> None:
        if not self.transport.is_closing():
            self._refuse(b"408 Request Timeout", f"headers must arrive within {HEADER_SECONDS:g} s")

    def _refuse(self, status: bytes, detail: str) -> None:
        body = b'{"title":"%s","status":%s,"detail":"%s"}' % (status[4:], status[:3], detail.encode())
        head = b"HTTP/1.1 %s\r\ncontent-type: application/problem+json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        self.transport.write(head % (status, len(body)) + body)
        self.transport.close()


def allow_many_files() -> None:
    """Raise the bound on open files to what the system allows us: each connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = hard if hard != resource.RLIM_INFINITY else 65_536
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, 65_536), hard))


def _share_memory_between_threads() -> None:
    """Let glibc keep two arenas rather than eight a core: with dozens of threads each holds on to what only one of them needed."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2)


class Server(uvicorn.Server):
    """Leaves without a failed request: it takes no new connection, tells each that is there to go elsewhere, and then ends."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Leave on the first SIGTERM; at once on another signal, or before it answers."""
        if sig != signal.SIGTERM or Connection.is_leaving or self._loop is None or not self.started:
            super().handle_exit(sig, frame)
            return
        Connection.is_leaving = True
        self._captured_signals.append(sig)
        self._loop.call_soon_threadsafe(self._leave)

    def _leave(self) -> None:
        assert self._loop is not None
        for each in self.servers:
            each.close()
        self._loop.call_later(LEAVE_SECONDS, self._end)

    def _end(self) -> None:
        self.should_exit = True


def serve(host: str, port: int) -> int:
    """Answer HTTP until told to end; returns the exit code: other than 0 if the service could not start."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        # taken now, so that two services do not both begin to load, and listened on once there is something to answer
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        return answer_on(listener, lambda config: Server(config, lambda: None))


def work(listening: int, told: int) -> int:
    """Answer HTTP on a socket that other processes answer on too, and say by a byte on *told* that it is begun; returns the exit code."""

    def ready() -> None:
        os.write(told, b".")
        os.close(told)

    with socket.socket(fileno=listening) as listener:
        return answer_on(listener, lambda config: Server(config, ready))


def answer_on(listener: socket.socket, made: Callable[[uvicorn.Config], uvicorn.Server]) -> int:
    """Answer HTTP on a socket until told to end; returns the exit code."""
    # here, as everything heavy waits for it
    from threadpoolctl import threadpool_limits

    from serving.http.access import AccessControl
    from serving.http.asgi import Parted, application
    from serving.http.service import Ubiquo

    configure_logging()
    _share_memory_between_threads()
    sys.setswitchinterval(SWITCH_SECONDS)
    allow_many_files()
    # numpy is here by now: the environment comes too late for its threads
    threadpool_limits(1, "blas")
    host, port = listener.getsockname()[:2]
    config = uvicorn.Config(
        AccessControl(Parted(Ubiquo.to_asgi())),  # type: ignore[attr-defined]
        host=host,
        port=port,
        http=Connection,
        ws="none",
        loop="uvloop",
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=10,
        access_log=False,
        server_header=False,
        # the gate believes those that UBIQUO_TRUSTED_PROXIES names, and nobody else
        proxy_headers=False,
        log_config=None,
        lifespan="on",
    )
    server = made(config)
    # it ends what it has begun, and then passes on the signal that ended it; where it cannot start it exits
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        server.run(sockets=[listener])
    if application.failure is not None:
        raise application.failure
    return 0 if server.started else 1
