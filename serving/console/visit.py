"""One request for a page: who asks, in which language, and how a page is made of a template."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from serving.console.address import ROOT
from serving.console.port import Port
from serving.console.words import LANGUAGES, Words
from serving.privacy.keys import LOCAL, Key, Scope
from serving.runtime import Runtime

FOLDER = Path(__file__).parent / "templates"
THEMES = ("light", "dark")


@dataclass(frozen=True)
class Page:
    """One address of the console, and what answers it.

    Attributes:
        path: below ``/console``; ``{name}`` is a part of it that the answer reads.
        answer: makes the response.
        scope: what the reader's key must hold.
        method: ``GET``, or ``POST`` for what changes something.
        menu: what the menu calls it, in English; left out of the menu if empty.
        group: under which heading of the menu it stands.
        also: what the key must hold besides.
    """

    path: str
    answer: Callable[[Visit], Awaitable[Response]]
    scope: Scope
    method: str = "GET"
    menu: str = ""
    group: str = ""
    also: tuple[Scope, ...] = ()

    def lacking(self, key: Key) -> Scope | None:
        """The first scope that it needs and *key* does not hold; None where it may be seen."""
        return next((scope for scope in (self.scope, *self.also) if not key.may(scope)), None)


@dataclass
class Visit:
    """One request for a page.

    Attributes:
        key: of the reader; None before they have signed in.
        menu: the pages that they may see, by group.
    """

    request: Request
    port: Port
    key: Key | None
    words: Words
    menu: Mapping[str, list[Page]] = field(default_factory=dict)
    form: FormData = field(default_factory=FormData)

    @property
    def runtime(self) -> Runtime:
        """What serves."""
        return self.port.runtime

    @property
    def query(self) -> Mapping[str, str]:
        """What stands behind the question mark."""
        return self.request.query_params

    def part(self, name: str) -> str:
        """A part of the address."""
        return str(self.request.path_params[name])

    def said(self, name: str, default: str = "") -> str:
        """One field of the form that was sent."""
        value = self.form.get(name, default)
        return value.strip() if isinstance(value, str) else default

    def may(self, scope: str) -> bool:
        """Whether the reader's key holds *scope*."""
        return self.key is not None and self.key.may(scope)

    @cached_property
    def is_partial(self) -> bool:
        """Whether only a part of a page is asked for (htmx)."""
        return self.request.headers.get("hx-request") == "true" and self.request.headers.get("hx-boosted") != "true"

    def page(self, template: str, status: int = 200, **values: Any) -> Response:
        """A page, or a part of one, of a template and *values*."""
        theme = self.request.cookies.get("ubiquo_theme")
        common = {
            "visit": self, "words": self.words, "root": ROOT, "languages": LANGUAGES, "theme": theme if theme in THEMES else "",
            "path": self.request.url.path, "is_local": self.key is LOCAL,
        }  # fmt: skip
        made = _environment(self.words).get_template(template).render(**common, **values)
        return HTMLResponse(made, status)

    def problem(self, status: int, detail: str) -> Response:
        """A page, or a line on one, that says why something was not done."""
        return self.page("_problem.html" if self.is_partial else "problem.html", status, detail=detail, status_code=status)

    def go(self, path: str) -> Response:
        """Send the reader on to another page of the console."""
        target = f"{ROOT}{path}"
        if self.is_partial:
            return Response(status_code=204, headers={"hx-redirect": target})
        return RedirectResponse(target, 303)


@lru_cache(16)
def _environment(words: Words) -> Environment:
    made = Environment(
        loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        extensions=["jinja2.ext.i18n"],
    )  # fmt: skip

    escape = made.filters["escape"]

    def say(text: str) -> str:
        # Jinja takes what comes back for markup, whatever it was made of
        return str(escape(words.say(text)))

    def many(one: str, more: str, n: int) -> str:
        return str(escape(words.many(one, more, n)))

    made.install_gettext_callables(say, many, newstyle=True)  # type: ignore[attr-defined]
    made.filters |= words.filters()
    return made
