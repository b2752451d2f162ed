"""The application that BentoML mounts before the models are there to answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any, Protocol

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]
OWN = ("/v1/", "/mp/", "/metrics", "/openapi.json", "/console")
"""How the addresses begin that are not BentoML's to answer."""


class Answering(Protocol):
    """An ASGI application that tells how it is."""

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request."""
        ...

    def problems(self) -> list[str]:
        """Why no traffic should come here; empty where it should."""
        ...

    def degraded(self) -> list[str]:
        """What answers less than it should, while everything else goes on."""
        ...

    def lists(self) -> Collection[str]:
        """The addresses of the models that recommend items."""
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

    def lists(self) -> Collection[str]:
        """The addresses of the models that recommend items; none until they are known."""
        return () if self.delegate is None else self.delegate.lists()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer or delegate one request."""
        if self.delegate is not None:
            await self.delegate(scope, receive, send)
        elif scope["type"] == "http":
            body = b'{"title":"Starting","status":503,"detail":"the service is loading its models: try again shortly"}'
            headers = [(b"content-type", b"application/problem+json"), (b"retry-after", b"1")]
            await send({"type": "http.response.start", "status": 503, "headers": headers})
            await send({"type": "http.response.body", "body": body})


class Parted:
    """Hands requests for ubiquo's own surface to it at once, and everything else to BentoML, whose layers cost more than most answers."""

    def __init__(self, bento: Application) -> None:
        self._bento = bento

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Hand one request on."""
        own = scope["type"] == "http" and scope["path"].startswith(OWN)
        await (application if own else self._bento)(scope, receive, send)


application = Delegating()
