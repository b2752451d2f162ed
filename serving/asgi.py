"""The application that BentoML mounts before the models are there to answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]


class Delegating:
    """Hands every request to ``delegate``; 503 until there is one."""

    def __init__(self) -> None:
        self.delegate: Callable[..., Awaitable[None]] | None = None

    async def __call__(self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]) -> None:
        """Answer or delegate one request."""
        if self.delegate is not None:
            await self.delegate(scope, receive, send)
        elif scope["type"] == "http":
            body = b'{"title":"Starting","status":503,"detail":"the service is loading its models: try again shortly"}'
            headers = [(b"content-type", b"application/problem+json"), (b"retry-after", b"1")]
            await send({"type": "http.response.start", "status": 503, "headers": headers})
            await send({"type": "http.response.body", "body": body})


application = Delegating()
