"""What a page may do from a browser: from which origins, at which addresses, with a key that everybody can read."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from starlette.middleware.cors import CORSMiddleware
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from features.state.settings import SettingError
from serving.http.asgi import Application

PUBLIC = "ubiquo.public"
"""Where in an ASGI scope it stands that the caller's key is one that everybody can read."""
SEGMENT = ("identify", "track", "page", "screen", "alias", "group", "batch", "i", "t", "p", "s", "a", "g", "b")
"""Segment's calls, and as its library for browsers shortens them."""
FOR_PAGES = frozenset({"/v1/events", "/v1/similar-items", *(f"/v1/{call}" for call in SEGMENT)})
"""What a browser may call, beside the models that recommend items and the settings of Segment's library."""
PROJECTS = "/v1/projects/"
MAX_PAGE_BYTES = 65_536
"""What one request with a public key may hold; it is as much as browsers send of a page that closes."""
BYTES_A_REQUEST = 4_096
"""Each so many bytes of a body count as another request of its address."""
MAX_AGE_SECONDS = 600
_SETTINGS = re.compile(re.escape(PROJECTS) + r"([^/]{1,256})/settings")
_ORIGIN = re.compile(r"https?://(?:[a-z0-9-]{1,63}\.)*[a-z0-9-]{1,63}(?::[1-9][0-9]{0,4})?|https?://\[[0-9a-f:.]+\](?::[1-9][0-9]{0,4})?")


def cors_origins(text: str) -> tuple[str, ...]:
    """The origins that a setting names, each once.

    Raises:
        SettingError: one of them is no exact origin.
    """
    origins = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for origin in origins:
        if not _ORIGIN.fullmatch(origin):
            raise SettingError(
                f"UBIQUO_CORS_ORIGINS names {origin!r}: write each origin as a browser sends it, such as https://shop.example or "
                "http://localhost:8080, in small letters, without a path or a slash at its end; there is no wildcard"
            )
    return origins


def trusted_proxies(text: str) -> list[str]:
    """The addresses and networks that a setting names.

    Raises:
        SettingError: one of them is neither.
    """
    found = []
    for part in (part.strip() for part in text.split(",") if part.strip()):
        try:
            network = ipaddress.ip_network(part)
        except ValueError as error:
            raise SettingError(f"UBIQUO_TRUSTED_PROXIES names {part!r}: {error}; write 10.0.0.7 or 10.0.0.0/24") from None
        if network.prefixlen == 0:
            raise SettingError(f"UBIQUO_TRUSTED_PROXIES names {part!r}: that is everybody, who could then claim any address")
        found.append(part)
    return found


def answering_pages(application: Application, origins: tuple[str, ...]) -> Application:
    """*application*, with what browsers need to let pages of these origins read its answers; it answers their preflights itself."""
    if not origins:
        return application
    return CORSMiddleware(
        application,
        allow_origins=origins,
        allow_methods=("GET", "POST"),
        # what Segment's library sends, and what a page sends by hand
        allow_headers=("Authorization", "Content-Type", "X-Retry-Count"),
        expose_headers=("Retry-After",),
        max_age=MAX_AGE_SECONDS,
    )


def behind(application: Application, proxies: list[str]) -> Application:
    """*application*, told the client's own address and scheme where one of *proxies* hands the request on."""
    return ProxyHeadersMiddleware(application, proxies) if proxies else application  # type: ignore[arg-type, return-value]


def network_of(address: str) -> str:
    """What counts as one address: of IPv6 the /64 that a single customer of a provider is given."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return address
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.ip_network((int(found) >> 64 << 64, 64)))


def key_in(path: str) -> str | None:
    """The key in the address at which Segment's library asks for its settings; None of another address."""
    found = _SETTINGS.fullmatch(path)
    return None if found is None else unquote(found[1])


def segment_settings(scope: Mapping[str, Any], path: str) -> dict[str, Any]:
    """What Segment's library for browsers asks for first: here, that it sends everything to where it asked, and nothing to anybody else."""
    headers = dict(scope["headers"])
    secure = scope.get("scheme") == "https" or headers.get(b"origin", b"").startswith(b"https:")
    sends_to = {
        "apiKey": key_in(path),
        "apiHost": f"{headers.get(b'host', b'localhost').decode('latin-1')}{scope.get('root_path', '')}/v1",
        # a page under TLS can call nothing else
        "protocol": "https" if secure else "http",
        "addBundledMetadata": False,
    }
    return {"integrations": {"Segment.io": sends_to}, "metrics": {"sampleRate": 0}, "plan": {}, "enabledMiddleware": {}}
