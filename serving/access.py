"""The gate: the API key and the size of a body, checked before anything else sees the request."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
OPEN_PATHS = frozenset({"/livez", "/healthz", "/readyz", "/openapi.json"})
"""What a load balancer and a developer may read without a key."""
MAX_BODY_BYTES = 1_000_000
MAX_DISCARDED_BYTES = 16_000_000
MAX_DISCARD_SECONDS = 5.0


class _Body:
    """The body of one request, of which an answer may leave a part unread.

    A client that sends its whole body before it reads loses the answer to a broken pipe when the connection closes on
    that body; so what is left is read and thrown away first, within bounds of size and time.
    """

    def __init__(self, receive: Callable[[], Awaitable[Message]]) -> None:
        self._receive = receive
        self._ended = False

    async def receive(self) -> Message:
        message = await self._receive()
        self._ended = message["type"] != "http.request" or not message.get("more_body", False)
        return message

    async def discard(self) -> None:
        size = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(MAX_DISCARD_SECONDS):
                while not self._ended and size <= MAX_DISCARDED_BYTES:
                    size += len((await self.receive()).get("body", b""))


class Gate:
    """ASGI middleware: 401 unless ``UBIQUO_API_KEY`` is unset or sent as a bearer token; 413 for a body declared too large.

    BentoML reads the bodies of its own routes whole, so there a body must declare its length (411).
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app
        self._key = os.environ.get("UBIQUO_API_KEY", "").encode()

    async def __call__(self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = _Body(receive)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                await request.discard()
            await send(message)

        status, detail = self._refusal(scope)
        if not status:
            await self._app(scope, request.receive, answer)
            return
        headers = [(b"content-type", b"application/problem+json")]
        if status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        body = b'{"title":"Refused","status":%d,"detail":"%s"}' % (status, detail.encode())
        await answer({"type": "http.response.start", "status": status, "headers": headers})
        await answer({"type": "http.response.body", "body": body})

    def _refusal(self, scope: Message) -> tuple[int, str]:
        if self._key and scope["path"] not in OPEN_PATHS and not self._is_sent(scope):
            return 401, "send the API key as 'Authorization: Bearer KEY'"
        length = next((value for name, value in scope["headers"] if name.lower() == b"content-length"), None)
        if length is not None and int(length) > MAX_BODY_BYTES:
            return 413, f"a body may hold {MAX_BODY_BYTES} bytes: send fewer events at once"
        if length is None and scope["path"].startswith("/bento/") and scope["method"] == "POST":
            return 411, "send a Content-Length"
        return 0, ""

    def _is_sent(self, scope: Message) -> bool:
        given = next((value for name, value in scope["headers"] if name.lower() == b"authorization"), b"")
        return hmac.compare_digest(given.removeprefix(b"Bearer "), self._key)
