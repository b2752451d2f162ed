"""Keys and the audit log: who may do what here, and who did what with whom."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, get_args
from urllib.parse import urlencode

from starlette.responses import Response

from serving.console.port import RefusedError
from serving.console.visit import Page, Visit
from serving.privacy.keys import LOCAL, REFRESH_SECONDS, Keys, Scope

A_PAGE = 100
MAX_PAGE = 100_000
MAX_KEYS_SHOWN = 500
_KEY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._@-]{0,63}")


async def keys(visit: Visit) -> Response:
    """The keys that there are, and a form for a new one."""
    return await _keys_page(visit)


async def create(visit: Visit) -> Response:
    """Make a key, and show it this once."""
    name, scopes = visit.said("name"), [scope for scope in get_args(Scope) if visit.said(f"scope_{scope}")]
    say = visit.words.say
    if not _KEY_NAME.fullmatch(name):
        wrong = say("Name: up to 64 letters, digits, spaces and . _ @ -, beginning with a letter or digit.")
        return await _keys_page(visit, 422, wrong=wrong, name=name, chosen=scopes)
    if not scopes:
        return await _keys_page(visit, 422, wrong=say("Choose at least one scope: a key without any opens nothing."), name=name)
    if "browser" in scopes and len(scopes) > 1:
        wrong = say("A key of the scope browser is read by everybody: make another key for the other scopes.")
        return await _keys_page(visit, 422, wrong=wrong, name=name, chosen=scopes)
    try:
        token = await visit.port.work(Keys(visit.runtime.home).create, name, scopes, visit.runtime.clock())
    except ValueError:
        wrong = say("There is a key of that name, in force or revoked: choose another name.")
        return await _keys_page(visit, 422, wrong=wrong, name=name, chosen=scopes)
    await _note(visit, "create key", name, f"done: {name} ({' '.join(scopes)})")
    return await _keys_page(visit, token=token, name=name)


async def revoke(visit: Visit) -> Response:
    """Let a key open nothing any more."""
    name = visit.said("name")
    assert visit.key is not None
    if name == visit.key.name:
        raise RefusedError(409, visit.words.say("You are signed in with this key: sign in with another one to revoke it."))
    try:
        await visit.port.work(Keys(visit.runtime.home).revoke, name, visit.runtime.clock())
    except ValueError:
        raise RefusedError(404, visit.words.say("No key of that name is in force.")) from None
    await _note(visit, "revoke key", name, f"done: {name}")
    return visit.go("/keys")


async def _keys_page(
    visit: Visit, status: int = 200, wrong: str = "", token: str = "", name: str = "", chosen: list[str] | None = None
) -> Response:
    listed = await visit.port.work(Keys(visit.runtime.home).listed)
    say = visit.words.say
    scopes = {
        "decide": say("ask for answers; see models, offers and items"),
        "read_customer": say("open customers: their data and their contacts"),
        "ingest": say("send events"),
        "manage": say("change rules, offers and texts; send dead letters again"),
        "browser": say("what a page may do for its own visitor; everybody can read such a key, so it goes with no other scope"),
        "admin": say("everything, with keys, the audit log and erasure"),
    }
    known = {scope: scopes.get(scope, scope) for scope in (*scopes, *get_args(Scope)) if scope in get_args(Scope)}
    return visit.page(
        "keys.html", status, keys=listed[::-1][:MAX_KEYS_SHOWN], scopes=known, wrong=wrong, token=token, name=name, chosen=chosen or [],
        is_first=visit.key is LOCAL, own=visit.key.name if visit.key else "", refresh=REFRESH_SECONDS, now=visit.runtime.clock(),
    )  # fmt: skip


async def audit(visit: Visit) -> Response:
    """The audit log, newest first."""
    wanted = {name: visit.query.get(name, "").strip()[:256] for name in ("key", "action", "customer")}
    said = visit.query.get("page", "1")
    number = min(max(int(said), 1), MAX_PAGE) if said.isascii() and said.isdigit() and len(said) < 8 else 1
    log = visit.runtime.audit

    def read() -> tuple[int, list[dict[str, Any]], list[str], list[str]]:
        count, lines = log.page(A_PAGE, (number - 1) * A_PAGE, wanted["key"], wanted["action"], wanted["customer"])
        return count, lines, *log.named()

    count, lines, names, actions = await visit.port.work(read)
    pages = -(-count // A_PAGE)
    links = {"before": _address(wanted, number - 1) if number > 1 else "", "after": _address(wanted, number + 1) if number < pages else ""}
    return visit.page(
        "audit.html", lines=lines, count=count, number=number, pages=pages, links=links, filter=wanted, names=names, actions=actions
    )


def _address(wanted: Mapping[str, str], number: int) -> str:
    return f"/audit?{urlencode([*((name, value) for name, value in wanted.items() if value), ('page', str(number))])}"


async def _note(visit: Visit, action: str, subject: str, outcome: str) -> None:
    assert visit.key is not None
    await visit.port.work(visit.runtime.audit.note, visit.runtime.clock(), visit.key.name, action, subject, outcome)


PAGES = [
    Page("/keys", keys, "admin", menu="Keys", group="Operations"),
    Page("/keys", create, "admin", method="POST"),
    Page("/keys/revoke", revoke, "admin", method="POST"),
    Page("/audit", audit, "admin", menu="Audit", group="Operations"),
]
