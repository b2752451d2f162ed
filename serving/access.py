"""The gate: the API key with its scope and the size of a body, checked before anything else sees the request."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qs

from features.home import Home
from serving.keys import Key, Keys, Scope

Message = MutableMapping[str, Any]
OPEN_PATHS = frozenset({"/livez", "/healthz", "/readyz", "/openapi.json"})
"""What a load balancer and a developer may read without a key."""
KEY = "ubiquo.key"
"""Where in an ASGI scope the name of the caller's key stands."""
_INGEST = ("events", "identify", "track", "page", "screen", "alias", "group", "batch", "import")
SCOPE_OF: dict[str, Scope] = {
    **{f"/v1/{path}": "ingest" for path in _INGEST},
    "/mp/collect": "ingest",
    **{f"/v1/{path}": "decide" for path in ("recommendations", "similar-items", "next-best-offer", "churn")},
    "/v1/profile": "read_customer",
    "/metrics": "decide",
}
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


def scope_of(path: str, method: str) -> Scope:
    """What a key must hold to call *path*."""
    if path.startswith("/v1/customers/"):
        return "admin" if method == "DELETE" else "read_customer"
    if path.startswith("/v1/erasures/"):
        return "admin"
    if path.startswith("/bento/"):
        return scope_of(f"/v1/{path.removeprefix('/bento/')}", method)
    return SCOPE_OF.get(path, "decide")


class Gate:
    """ASGI middleware: 401 without a valid key where keys are in force, 403 where its scope does not reach, 413 for a body
    declared too large.

    A key comes as a bearer token, as the user name of basic authentication (Segment's write key), or as ``api_secret`` in the
    query (Google's measurement protocol). BentoML reads the bodies of its own routes whole, so there a body must declare its length (411).
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app
        self._keys = Keys(Home.from_environment())

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
            headers.append((b"www-authenticate", b"Bearer, Basic"))
        body = b'{"title":"Refused","status":%d,"detail":"%s"}' % (status, detail.encode())
        await answer({"type": "http.response.start", "status": status, "headers": headers})
        await answer({"type": "http.response.body", "body": body})

    def _refusal(self, scope: Message) -> tuple[int, str]:
        if scope["path"] not in OPEN_PATHS:
            key = self._sent(scope)
            if key is None:
                return 401, "send the API key as 'Authorization: Bearer KEY'"
            needed = scope_of(scope["path"], scope["method"])
            if not key.may(needed):
                return 403, f"this key does not hold the scope {needed}"
            scope[KEY] = key.name
        length = next((value for name, value in scope["headers"] if name.lower() == b"content-length"), None)
        if length is not None and int(length) > MAX_BODY_BYTES:
            return 413, f"a body may hold {MAX_BODY_BYTES} bytes: send fewer events at once"
        if length is None and scope["path"].startswith("/bento/") and scope["method"] == "POST":
            return 411, "send a Content-Length"
        return 0, ""

    def _sent(self, scope: Message) -> Key | None:
        given = next((value for name, value in scope["headers"] if name.lower() == b"authorization"), b"")
        method, _, credentials = given.decode("latin-1").partition(" ")
        if method.lower() == "basic":
            try:
                credentials = base64.b64decode(credentials).decode().partition(":")[0]
            except (binascii.Error, UnicodeDecodeError):
                credentials = ""
        elif method.lower() != "bearer":
            query = parse_qs(scope.get("query_string", b"").decode("latin-1")) if scope["path"] == "/mp/collect" else {}
            credentials = query.get("api_secret", [""])[0]
        return self._keys.check(credentials)
