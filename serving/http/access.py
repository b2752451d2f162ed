"""The gate: key, rate, kind and size of a request, checked in one place before anything else sees it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import math
import time
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import parse_qs

import msgspec
from limits import RateLimitItem, parse
from limits.strategies import FixedWindowRateLimiter

from features.state.home import Home
from features.state.settings import SettingError
from serving.console.address import READER, SIGN_IN, STATIC, is_console
from serving.http.asgi import Application, Message, Receive, Send, application
from serving.http.browser import (
    BYTES_A_REQUEST,
    FOR_PAGES,
    MAX_PAGE_BYTES,
    PROJECTS,
    PUBLIC,
    SEGMENT,
    answering_pages,
    behind,
    cors_origins,
    key_in,
    network_of,
    trusted_proxies,
)
from serving.http.console_gate import cookie_of, is_this_machine, not_ours
from serving.http.rates import Counters
from serving.privacy.keys import LOCAL, Key, Keys, Scope

OPEN_PATHS = frozenset({"/livez", "/healthz", "/readyz", "/openapi.json", "/v1/docs"})
"""What a load balancer and a developer may read without a key."""
KEY = "ubiquo.key"
"""Where in an ASGI scope the name of the caller's key stands."""
_INGEST = ("events", "import", *SEGMENT)
SCOPE_OF: dict[str, Scope] = {
    **{f"/v1/{path}": "ingest" for path in _INGEST},
    "/mp/collect": "ingest",
    **{f"/v1/{path}": "decide" for path in ("recommendations", "similar-items", "next-best-offer", "churn")},
    "/v1/profile": "read_customer",
    "/metrics": "decide",
}
ABOUT_PEOPLE: frozenset[Scope] = frozenset({"read_customer", "manage", "admin"})
"""What whoever speaks to a service without keys may do by this machine's own names alone: else any page could in a browser on it."""
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
    if path.startswith(PROJECTS):
        return "browser"
    if path.startswith("/v1/results/"):
        return "read_customer"
    if path == "/v1/rules" or path.startswith("/v1/rules/"):
        return "manage"
    if path.startswith("/bento/"):
        return scope_of(f"/v1/{path.removeprefix('/bento/')}", method)
    return SCOPE_OF.get(path, "decide")


def _rate(variable: str, text: str) -> RateLimitItem:
    try:
        return parse(text)
    except ValueError:
        raise SettingError(f"{variable}={text!r}: give a number and a time, such as 1000/second") from None


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
        self._rate: RateLimitItem = _rate("UBIQUO_RATE_LIMIT", home.settings.rate_limit)
        self._page_rate: RateLimitItem = _rate("UBIQUO_BROWSER_RATE_LIMIT", home.settings.browser_rate_limit)
        self._wrong: RateLimitItem = parse(WRONG_KEY_RATE)
        self._buffered = 0
        self._at_bento = 0
        """How many requests BentoML's own routes are answering: it would let any number wait."""
        proxies = trusted_proxies(home.settings.trusted_proxies)
        self._behind = behind(self._checked, proxies)
        self._for_pages = behind(answering_pages(self._checked, cors_origins(home.settings.cors_origins)), proxies)

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
        is_for_pages = scope["path"] in FOR_PAGES or scope["path"] in application.lists() or key_in(scope["path"]) is not None
        await (self._for_pages if is_for_pages else self._behind)(scope, receive, send)

    async def _checked(self, scope: Message, receive: Receive, send: Send) -> None:
        request = _Body(receive)
        refused = self._refusal(scope)
        if refused is None:
            content = await self._whole(request, _most(scope))
            if isinstance(content, bytes) and self._at_bento >= MAX_AT_BENTO and scope["path"].startswith(BENTO):
                self._buffered -= len(content)
                content = Refusal(503, "Busy", "too many questions wait: send again shortly", RETRY_SECONDS)
            if isinstance(content, bytes) and PUBLIC in scope and (crowd := self._page_too_often(scope, len(content) // BYTES_A_REQUEST)):
                self._buffered -= len(content)
                content = crowd
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
        if is_console(scope["path"]):
            return self._before_the_console(scope, headers, address)
        key = None
        if scope["path"] not in OPEN_PATHS:
            key = self._sent(scope, headers)
            if key is None:
                # to send none is a mistake, to send many wrong ones is not
                sent = b"authorization" in headers or scope["query_string"] or key_in(scope["path"]) is not None
                if sent and not self._limiter.hit(self._wrong, "wrong", address):
                    return Refusal(429, "Too many wrong keys", "too many wrong keys came from this address", 60)
                return Refusal(401, "No valid key", "send the API key as 'Authorization: Bearer KEY'")
            if (refused := self._not_allowed(scope, key)) is not None:
                return refused
            if key is LOCAL and scope_of(scope["path"], scope["method"]) in ABOUT_PEOPLE and not is_this_machine(headers):
                return Refusal(
                    403, "Not allowed", "without keys this answers to localhost alone: make a key (python -m serving keys create)"
                )
            scope[KEY] = key.name
        who = ("address", address) if key is None or key is LOCAL else ("key", key.name)
        if not self._limiter.hit(self._rate, *who):
            return Refusal(429, "Too many requests", f"more than {self._rate} were sent", RETRY_SECONDS)
        if PUBLIC in scope and (crowd := self._page_too_often(scope, 1)):
            return crowd
        length, most = headers.get(b"content-length"), _most(scope)
        if length is not None and (not length.isdigit() or len(length) > 12 or int(length) > most):
            return _too_large(most)
        if scope["method"] in ("POST", "PUT", "PATCH"):
            return _wrong_type(scope["path"], headers, key)
        return None

    def _before_the_console(self, scope: Message, headers: Mapping[bytes, bytes], address: str) -> Refusal | None:
        """Whoever has not signed in is let through, to be asked to: what they may see is for the pages to say."""
        token = cookie_of(headers)
        key = None if scope["path"].startswith(STATIC) else self._keys.check(token)
        guesses = (token and key is None) or (scope["path"] == SIGN_IN and scope["method"] == "POST")
        if guesses and not self._limiter.hit(self._wrong, "wrong", address):
            return Refusal(429, "Too many wrong keys", "too many wrong keys came from this address", 60)
        scope[READER], scope[KEY] = key, "nobody" if key is None else key.name
        if (why := not_ours(scope["method"], headers, key is LOCAL)) is not None:
            return Refusal(403, "Not allowed", why)
        who = ("address", address) if key is None or key is LOCAL else ("key", key.name)
        if not self._limiter.hit(self._rate, *who):
            return Refusal(429, "Too many requests", f"more than {self._rate} were sent", RETRY_SECONDS)
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 12 or int(length) > MAX_BODY_BYTES:
            return Refusal(413, "Too large", f"a form may hold {MAX_BODY_BYTES} bytes")
        return None

    def _not_allowed(self, scope: Message, key: Key) -> Refusal | None:
        path = scope["path"]
        if path.startswith(PROJECTS):
            if key_in(path) is None:
                return Refusal(404, "Not found", "the settings of Segment's library are at /v1/projects/KEY/settings")
            # a key that is no page's does not belong in an address
            if not key.is_public:
                return Refusal(403, "Not allowed", "a page needs a key of its own: python -m serving keys create NAME --scope browser")
        elif not key.is_public:
            needed = scope_of(path, scope["method"])
            return None if key.may(needed) else Refusal(403, "Not allowed", f"this key does not hold the scope {needed}")
        elif path not in FOR_PAGES and path not in application.lists():
            return Refusal(403, "Not allowed", "a page's key sends events of its visitor and asks for lists of items: ask from your server")
        scope[PUBLIC] = True
        return None

    def _page_too_often(self, scope: Message, cost: int) -> Refusal | None:
        """Why an address may ask no more for now with a key that everybody can read."""
        address = network_of(scope["client"][0] if scope.get("client") else "")
        if cost == 0 or self._limiter.hit(self._page_rate, "page", address, cost=cost):
            return None
        ends = self._limiter.get_window_stats(self._page_rate, "page", address).reset_time
        detail = f"more than {self._page_rate} were sent from this address, each {BYTES_A_REQUEST} bytes counted as one"
        return Refusal(429, "Too many requests", detail, max(1, math.ceil(ends - time.time())))

    def _sent(self, scope: Message, headers: Mapping[bytes, bytes]) -> Key | None:
        method, _, credentials = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        if (in_path := key_in(scope["path"])) is not None:
            return self._keys.check(in_path)
        if method.lower() == "basic":
            try:
                credentials = base64.b64decode(credentials).decode().partition(":")[0]
            except ValueError:
                credentials = ""
        elif method.lower() != "bearer":
            query = parse_qs(scope.get("query_string", b"").decode("latin-1")) if scope["path"] == "/mp/collect" else {}
            credentials = query.get("api_secret", [""])[0]
        return self._keys.check(credentials)

    async def _whole(self, request: _Body, most: int) -> bytes | Refusal:
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
                    if size > most:
                        return self._given_up(size, _too_large(most))
                    if self._buffered > MAX_BUFFERED_BYTES:
                        return self._given_up(size, Refusal(503, "Busy", "too many large requests arrive at once", RETRY_SECONDS))
        except TimeoutError:
            return self._given_up(size, Refusal(408, "Too slow", f"a body must arrive within {BODY_SECONDS:g} s"))
        return b"".join(parts)

    def _given_up(self, size: int, refusal: Refusal) -> Refusal:
        self._buffered -= size
        return refusal


def _most(scope: Message) -> int:
    """How many bytes the request's body may hold."""
    return MAX_PAGE_BYTES if PUBLIC in scope else MAX_BODY_BYTES


def _too_large(most: int) -> Refusal:
    return Refusal(413, "Too large", f"a body may hold {most} bytes: send fewer events at once")


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
