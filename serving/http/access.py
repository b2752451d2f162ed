"""The gate: key, rate, kind and size of a request, checked in one place before anything else sees it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import parse_qs

import msgspec
from limits import RateLimitItem, parse
from limits.strategies import FixedWindowRateLimiter

from features.state.home import Home
from features.state.settings import SettingError
from serving.http.asgi import Application, Message, Receive, Send, application
from serving.http.rates import Counters
from serving.privacy.keys import LOCAL, Key, Keys, Scope

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
MAX_BUFFERED_BYTES = 128_000_000
"""How much of all bodies is held while they arrive."""
BODY_SECONDS = 8.0
"""How long a body may take to arrive."""
MAX_DISCARDED_BYTES = 16_000_000
MAX_DISCARD_SECONDS = 5.0
WRONG_KEY_RATE = "60/minute"
"""How often one address may send a wrong key."""
RETRY_SECONDS = 1
BENTO = "/bento/"
MAX_AT_BENTO = 32
TRACKED = frozenset({*(f"/v1/{path}" for path in _INGEST if path != "events"), "/mp/collect"})
"""The endpoints whose clients send JSON as text/plain from browsers."""


class Refusal(NamedTuple):
    """Why a request is not passed on."""

    status: int
    title: str
    detail: str
    retry_after: int | None = None


class _Body:
    """The body of one request, of which an answer may leave a part unread.

    A client that sends its whole body before it reads loses the answer to a broken pipe when the connection closes on
    that body; so what is left is read and thrown away first, within bounds of size and time.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.ended = False

    async def receive(self) -> Message:
        message = await self._receive()
        self.ended = message["type"] != "http.request" or not message.get("more_body", False)
        return message

    async def discard(self) -> None:
        size = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(MAX_DISCARD_SECONDS):
                while not self.ended and size <= MAX_DISCARDED_BYTES:
                    size += len((await self.receive()).get("body", b""))


def scope_of(path: str, method: str) -> Scope:
    """What a key must hold to call *path*."""
    if path.startswith("/v1/customers/"):
        return "admin" if method == "DELETE" else "read_customer"
    if path.startswith("/v1/erasures/"):
        return "admin"
    if path.startswith("/v1/results/"):
        return "read_customer"
    if path == "/v1/rules" or path.startswith("/v1/rules/"):
        return "manage"
    if path.startswith("/bento/"):
        return scope_of(f"/v1/{path.removeprefix('/bento/')}", method)
    return SCOPE_OF.get(path, "decide")


def _rate(text: str) -> RateLimitItem:
    try:
        return parse(text)
    except ValueError:
        raise SettingError(f"UBIQUO_RATE_LIMIT={text!r}: give a number and a time, such as 1000/second") from None


class AccessControl:
    """ASGI middleware: 401 without a valid key where keys are in force, 403 where its scope does not reach, 429 above the rate,
    415 for a body that is not JSON, 413 for one too large, 408 for one too slow, 503 where too much arrives at once.

    A key comes as a bearer token, as the user name of basic authentication (Segment's write key), or as ``api_secret`` in the
    query (Google's measurement protocol). A page of another site cannot send JSON without asking first, so no browser can be
    made to send events. It answers ``/readyz`` itself, and refuses WebSockets.
    """

    def __init__(self, app: Application) -> None:
        self._app = app
        home = Home.from_environment()
        self._keys = Keys(home)
        self._limiter = FixedWindowRateLimiter(Counters())
        self._rate: RateLimitItem = _rate(home.settings.rate_limit)
        self._wrong: RateLimitItem = parse(WRONG_KEY_RATE)
        self._buffered = 0
        self._at_bento = 0
        """How many requests BentoML's own routes are answering: it would let any number wait."""

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http" or KEY in scope:
            # whoever stands in front has checked it already
            await self._app(scope, receive, send)
            return
        if scope["path"] in ("/readyz", "/livez", "/healthz") and scope["method"] in ("GET", "HEAD"):
            await _health(scope, send)
            return
        request = _Body(receive)
        refused = self._refusal(scope)
        if refused is None:
            content = await self._whole(request)
            if isinstance(content, bytes) and self._at_bento >= MAX_AT_BENTO and scope["path"].startswith(BENTO):
                self._buffered -= len(content)
                content = Refusal(503, "Busy", "too many questions wait: send again shortly", RETRY_SECONDS)
            if isinstance(content, bytes):
                self._at_bento += scope["path"].startswith(BENTO)
                try:
                    refused = _unreadable(scope, content)
                    if refused is None:
                        await self._app(scope, _replay(content, receive), send)
                        return
                finally:
                    self._buffered -= len(content)
                    self._at_bento -= scope["path"].startswith(BENTO)
            else:
                refused = content
        await request.discard()
        await _refuse(refused, send)

    def _refusal(self, scope: Message) -> Refusal | None:
        headers = dict(scope["headers"])
        address = scope["client"][0] if scope.get("client") else ""
        key = None
        if scope["path"] not in OPEN_PATHS:
            key = self._sent(scope, headers)
            if key is None:
                # to send none is a mistake, to send many wrong ones is not
                if (b"authorization" in headers or scope["query_string"]) and not self._limiter.hit(self._wrong, "wrong", address):
                    return Refusal(429, "Too many wrong keys", "too many wrong keys came from this address", 60)
                return Refusal(401, "No valid key", "send the API key as 'Authorization: Bearer KEY'")
            needed = scope_of(scope["path"], scope["method"])
            if not key.may(needed):
                return Refusal(403, "Not allowed", f"this key does not hold the scope {needed}")
            scope[KEY] = key.name
        who = ("address", address) if key is None or key is LOCAL else ("key", key.name)
        if not self._limiter.hit(self._rate, *who):
            return Refusal(429, "Too many requests", f"more than {self._rate} were sent", RETRY_SECONDS)
        length = headers.get(b"content-length")
        if length is not None and (not length.isdigit() or len(length) > 12 or int(length) > MAX_BODY_BYTES):
            return Refusal(413, "Too large", f"a body may hold {MAX_BODY_BYTES} bytes: send fewer events at once")
        if scope["method"] in ("POST", "PUT", "PATCH"):
            return _wrong_type(scope["path"], headers, key)
        return None

    def _sent(self, scope: Message, headers: Mapping[bytes, bytes]) -> Key | None:
        method, _, credentials = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        if method.lower() == "basic":
            try:
                credentials = base64.b64decode(credentials).decode().partition(":")[0]
            except ValueError:
                credentials = ""
        elif method.lower() != "bearer":
            query = parse_qs(scope.get("query_string", b"").decode("latin-1")) if scope["path"] == "/mp/collect" else {}
            credentials = query.get("api_secret", [""])[0]
        return self._keys.check(credentials)

    async def _whole(self, request: _Body) -> bytes | Refusal:
        """The whole body, counted as buffered until it is answered."""
        parts, size = [], 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while not request.ended:
                    message = await request.receive()
                    if message["type"] == "http.disconnect":
                        return self._given_up(size, Refusal(400, "Bad request", "the client went away before the body was complete"))
                    part = message.get("body", b"")
                    size += len(part)
                    self._buffered += len(part)
                    parts.append(part)
                    if size > MAX_BODY_BYTES:
                        large = Refusal(413, "Too large", f"a body may hold {MAX_BODY_BYTES} bytes: send fewer events at once")
                        return self._given_up(size, large)
                    if self._buffered > MAX_BUFFERED_BYTES:
                        return self._given_up(size, Refusal(503, "Busy", "too many large requests arrive at once", RETRY_SECONDS))
        except TimeoutError:
            return self._given_up(size, Refusal(408, "Too slow", f"a body must arrive within {BODY_SECONDS:g} s"))
        return b"".join(parts)

    def _given_up(self, size: int, refusal: Refusal) -> Refusal:
        self._buffered -= size
        return refusal


def _wrong_type(path: str, headers: Mapping[bytes, bytes], key: Key | None) -> Refusal | None:
    """A page of another site may make a browser send text or a form, but not JSON."""
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind == b"application/json" or (kind.startswith(b"application/") and kind.endswith(b"+json")):
        return None
    if kind == b"text/plain" and path in TRACKED and key is not None and key is not LOCAL:
        # Segment's client for browsers; the key is what another site's page does not have
        return None
    return Refusal(415, "Not JSON", "send the body as JSON, with the header 'Content-Type: application/json'")


def _unreadable(scope: Message, content: bytes) -> Refusal | None:
    """BentoML logs a body that it cannot read, and answers 500 for some: its routes see JSON objects only."""
    if not scope["path"].startswith("/bento/"):
        return None
    try:
        said = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return Refusal(400, "Bad request", "the body is not valid JSON")
    if not isinstance(said, dict) or set(said) != {"request"} or not isinstance(said["request"], dict):
        return Refusal(400, "Bad request", 'the body is {"request": {...}}')
    return None


def _replay(content: bytes, receive: Receive) -> Receive:
    """The whole body at once; then whatever the connection says."""
    left = [content]

    async def again() -> Message:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return again


async def _health(scope: Message, send: Send) -> None:
    problems = application.problems() if scope["path"] == "/readyz" else []
    body = msgspec.json.encode({"ready": not problems, "problems": problems, "degraded": application.degraded()})
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if problems:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": 503 if problems else 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})


async def _refuse(refused: Refusal, send: Send) -> None:
    body = msgspec.json.encode({"title": refused.title, "status": refused.status, "detail": refused.detail})
    headers = [(b"content-type", b"application/problem+json"), (b"content-length", str(len(body)).encode())]
    if refused.status == 401:
        headers.append((b"www-authenticate", b"Bearer, Basic"))
    if refused.retry_after is not None:
        headers.append((b"retry-after", str(refused.retry_after).encode()))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
