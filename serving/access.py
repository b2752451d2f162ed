"""The API key: asked for before anything else sees the request."""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
OPEN_PATHS = frozenset({"/livez", "/healthz", "/readyz", "/openapi.json"})
"""What a load balancer and a developer may read without a key."""
_PROBLEM = b'{"title":"Unauthorized","status":401,"detail":"send the API key as \'Authorization: Bearer KEY\'"}'


class KeyRequired:
    """ASGI middleware that answers 401 unless ``UBIQUO_API_KEY`` is unset or sent as a bearer token."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app
        self._key = os.environ.get("UBIQUO_API_KEY", "").encode()

    async def __call__(self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]) -> None:
        """Pass the request on, or refuse it."""
        if self._key and scope["type"] == "http" and scope["path"] not in OPEN_PATHS and not self._is_sent(scope):
            headers = [(b"content-type", b"application/problem+json"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": _PROBLEM})
            return
        await self._app(scope, receive, send)

    def _is_sent(self, scope: Message) -> bool:
        given = next((value for name, value in scope["headers"] if name.lower() == b"authorization"), b"")
        return hmac.compare_digest(given.removeprefix(b"Bearer "), self._key)
