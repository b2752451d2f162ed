"""The console as one ASGI application: sign-in, the pages that a key may see, and the headers that keep them safe."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from features.catalogue.shop import Shop
from serving.console.address import COOKIE, READER, ROOT, SIGN_IN, STATIC
from serving.console.pages.access import PAGES as ACCESS
from serving.console.pages.associate import PAGES as ASSOCIATE
from serving.console.pages.dead_letters import PAGES as DEAD_LETTERS
from serving.console.pages.feature_catalogue import PAGES as FEATURES
from serving.console.pages.home import PAGES as HOME
from serving.console.pages.marketing import PAGES as MARKETING
from serving.console.pages.merchandise import PAGES as MERCHANDISE
from serving.console.pages.merchandise_rules import PAGES as MERCHANDISE_RULES
from serving.console.pages.models import PAGES as MODELS
from serving.console.pages.operations import PAGES as OPERATIONS
from serving.console.pages.shop import PAGES as SHOP
from serving.console.port import Port, RefusedError
from serving.console.visit import THEMES, Page, Visit
from serving.console.words import LANGUAGES, Words, language_of
from serving.privacy.keys import Key

logger = logging.getLogger("ubiquo")
FILES = Path(__file__).parent / "static"
PAGES: Sequence[Page] = (
    *HOME,
    *SHOP,
    *ASSOCIATE,
    *MERCHANDISE,
    *MERCHANDISE_RULES,
    *MARKETING,
    *MODELS,
    *FEATURES,
    *OPERATIONS,
    *DEAD_LETTERS,
    *ACCESS,
)
"""Every page, in the order of the menu."""
COOKIE_SECONDS = 12 * 3600
"""How long one stays signed in: a working day."""
YEAR_SECONDS = 365 * 86_400
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; connect-src 'self'; "
        "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "referrer-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}
"""On every page: nothing comes from another host, nothing is kept by a proxy."""


class Console:
    """Answers everything below ``/console``. Whoever stands in front tells in the scope whose key it is."""

    def __init__(self, port: Port) -> None:
        self._port = port
        routes: list[Any] = [
            Route(SIGN_IN, self._signing_in, methods=["GET", "POST"]),
            Route(f"{ROOT}/sign-out", self._signing_out, methods=["POST"]),
            Route(f"{ROOT}/look", self._looking, methods=["POST"]),
            Mount(STATIC, StaticFiles(directory=FILES)),
            *(Route(f"{ROOT}{page.path}", self._endpoint(page), methods=[page.method]) for page in PAGES),
            Route(f"{ROOT}/{{rest:path}}", self._nothing),
        ]
        self._pages = Starlette(routes=routes)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        if not scope["path"].startswith(STATIC):
            send = _with_headers(send)
        await self._pages(scope, receive, send)

    def _endpoint(self, page: Page) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            visit = await self._visit(request)
            if visit.key is None:
                here = request.url.path + (f"?{request.url.query}" if request.url.query else "")
                return visit.go(f"/sign-in?{urlencode({'next': here})}" if page.method == "GET" and not visit.is_partial else "/sign-in")
            if not visit.key.may(page.scope):
                return visit.problem(403, visit.words.say("Your key does not hold the scope that this page needs:") + f" {page.scope}")
            try:
                return await page.answer(visit)
            except RefusedError as error:
                return visit.problem(error.status, error.detail)
            except Exception:
                # the page's own address, not that of the request, which may name a customer
                logger.exception("a page failed: %s", page.path)
                return visit.problem(500, visit.words.say("The page could not be made; the log tells why."))

        return answer

    async def _visit(self, request: Request) -> Visit:
        key: Key | None = request.scope.get(READER)
        language = language_of(request.cookies.get("ubiquo_language"), request.headers.get("accept-language", ""))
        try:
            shop = Shop.load(self._port.runtime.home)
            words = Words(language, shop.timezone, shop.currency)
        except RefusedError:
            words = Words(language)
        menu: dict[str, list[Page]] = {}
        for page in PAGES:
            if page.menu and key is not None and key.may(page.scope):
                menu.setdefault(page.group, []).append(page)
        visit = Visit(request, self._port, key, words, menu)
        if request.method == "POST":
            visit.form = await request.form(max_files=1, max_fields=200)
        return visit

    async def _signing_in(self, request: Request) -> Response:
        visit = await self._visit(request)
        then = _below_the_console(request.query_params.get("next", ""))
        if request.method == "GET":
            return visit.go("") if visit.key is not None else visit.page("sign_in.html", wrong=False, then=then)
        token = visit.said("key")
        if not token or self._port.key_of(token) is None:
            return visit.page("sign_in.html", 401, wrong=True, then=then)
        found = RedirectResponse(then or ROOT, 303)
        # not lax: a link from elsewhere opens the sign-in page, and no page of another site acts in the reader's name
        secure = request.url.scheme == "https"
        found.set_cookie(COOKIE, token, max_age=COOKIE_SECONDS, path=ROOT, secure=secure, httponly=True, samesite="strict")
        return found

    async def _signing_out(self, request: Request) -> Response:
        found = RedirectResponse(SIGN_IN, 303)
        found.delete_cookie(COOKIE, path=ROOT, httponly=True, samesite="strict")
        return found

    async def _looking(self, request: Request) -> Response:
        """Keep the language or the colours that a reader chose."""
        visit = await self._visit(request)
        found = RedirectResponse(_below_the_console(visit.said("next")) or ROOT, 303)
        for name, known in (("language", LANGUAGES), ("theme", THEMES)):
            if (said := visit.said(name)) in known:
                found.set_cookie(f"ubiquo_{name}", said, max_age=YEAR_SECONDS, path=ROOT, samesite="strict")
        return found

    async def _nothing(self, request: Request) -> Response:
        visit = await self._visit(request)
        if visit.key is None:
            return visit.go("/sign-in")
        return visit.problem(404, visit.words.say("There is no such page."))


def _below_the_console(said: str) -> str:
    """An address of the console, or nothing: no link may send a reader elsewhere."""
    return said if said == ROOT or said.startswith((f"{ROOT}/", f"{ROOT}?")) else ""


def _with_headers(send: Any) -> Any:
    extra = [(name.encode(), value.encode()) for name, value in HEADERS.items()]

    async def sending(message: Any) -> None:
        if message["type"] == "http.response.start":
            told = {name for name, _ in message["headers"]}
            message = {**message, "headers": [*message["headers"], *(each for each in extra if each[0] not in told)]}
        await send(message)

    return sending
