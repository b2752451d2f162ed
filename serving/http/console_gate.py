"""The gate before the console's pages: the key in a cookie, and requests of this very site alone."""

from __future__ import annotations

from collections.abc import Mapping
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from serving.console.address import COOKIE

FORMS = (b"application/x-www-form-urlencoded", b"multipart/form-data")
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def cookie_of(headers: Mapping[bytes, bytes]) -> str:
    """The API key that a browser keeps for the console; empty where there is none."""
    try:
        held = SimpleCookie(headers.get(b"cookie", b"").decode("latin-1"))
    except CookieError:
        return ""
    return held[COOKIE].value if COOKIE in held else ""


def not_ours(method: str, headers: Mapping[bytes, bytes], is_local: bool) -> str | None:
    """Why a request for a page is not taken; None where it is.

    What changes something must say that a page of this very site sent it (``Origin``, which every browser tells, is this ``Host``), and be
    a form. Where no key is asked for, the host must be this machine: else a name of a stranger that points here would be this site.
    """
    host = headers.get(b"host", b"").decode("latin-1")
    if is_local and urlsplit(f"//{host}").hostname not in LOOPBACK:
        return "without keys the console answers to localhost alone: make a key first (python -m serving keys create)"
    if method in ("GET", "HEAD"):
        return None
    origin = headers.get(b"origin", b"").decode("latin-1")
    if not origin or urlsplit(origin).netloc != host:
        return "only a page of this console may send that"
    if headers.get(b"content-type", b"").partition(b";")[0].strip().lower() not in FORMS:
        return "a page sends a form"
    return None
