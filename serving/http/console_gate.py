"""The gate before the console's pages: the key in a cookie, and requests of this very site alone."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import SplitResult, urlsplit

from starlette.requests import cookie_parser

from serving.console.address import COOKIE

FORMS = (b"application/x-www-form-urlencoded", b"multipart/form-data")
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def cookie_of(headers: Mapping[bytes, bytes]) -> str:
    """The API key that a browser keeps for the console; empty where there is none."""
    # as browsers write them: what another application of this host keeps beside it may have any form
    return cookie_parser(headers.get(b"cookie", b"").decode("latin-1")).get(COOKIE, "")


def not_ours(method: str, headers: Mapping[bytes, bytes], is_local: bool) -> str | None:
    """Why a request for a page is not taken; None where it is.

    What changes something must say that a page of this very site sent it (``Origin``, which every browser tells, is this ``Host``), and be
    a form. Where no key is asked for, the host must be this machine: else a name of a stranger that points here would be this site.
    """
    host = headers.get(b"host", b"").decode("latin-1")
    if is_local and not is_this_machine(headers):
        return "without keys the console answers to localhost alone: make a key first (python -m serving keys create)"
    if method in ("GET", "HEAD"):
        return None
    origin = headers.get(b"origin", b"").decode("latin-1")
    if not host or _split(origin).netloc != host:
        return "only a page of this console may send that"
    kind, _, more = headers.get(b"content-type", b"").lower().partition(b";")
    if kind.strip() not in FORMS:
        return "a page sends a form"
    # other encodings can say what is no Unicode
    if b"charset" in more.replace(b"charset=utf-8", b""):
        return "a page sends its form in UTF-8"
    return None


def is_this_machine(headers: Mapping[bytes, bytes]) -> bool:
    """Whether a request names this machine as its host: a page of a stranger, whose name was made to point here, does not."""
    host = headers.get(b"host", b"").decode("latin-1")
    return _split(f"//{host}").hostname in LOOPBACK


def _split(address: str) -> SplitResult:
    """The parts of an address; none where it is no address."""
    try:
        return urlsplit(address)
    except ValueError:
        return urlsplit("")
