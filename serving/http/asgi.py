"""The application that BentoML mounts before the models are there to answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

Message = MutableMapping[str, Any]


class Answering(Protocol):
    """An ASGI application that tells how it is."""

    async def __call__(self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]) -> None:
        """Answer one request."""
        ...

    def problems(self) -> list[str]:
        """Why no traffic should come here; empty where it should."""
        ...

    def degraded(self) -> list[str]:
        """What answers less than it should, while everything else goes on."""
        ...


class Delegating:
    """Hands every request to ``delegate``; 503 until there is one."""

    def __init__(self) -> None:
        self.delegate: Answering | None = None
        self.failure: Exception | None = None
        """Why the service could not start."""

    def problems(self) -> list[str]:
        """Why no traffic should come here."""
        return ["the service is loading its models"] if self.delegate is None else self.delegate.problems()

    def degraded(self) -> list[str]:
        """What answers less than it should."""
        return [] if self.delegate is None else self.delegate.degraded()

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
