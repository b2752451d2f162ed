"""What the console asks of the service that it is a part of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, Protocol, TypeVar

from serving.console.meters import Meters
from serving.intake.intake import SOURCE, Translate
from serving.privacy.keys import Key
from serving.runtime import Runtime

T = TypeVar("T")
P = ParamSpec("P")


class RefusedError(Exception):
    """The service would not answer a question; *detail* says why, for a person to read."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail


class Port(Protocol):
    """The service, as pages see it."""

    @property
    def runtime(self) -> Runtime:
        """What serves.

        Raises:
            RefusedError: it is starting.
        """

    async def ask(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """What POST *path* would answer, in its turn among the questions of others.

        Raises:
            RefusedError: it would be refused.
        """

    async def decide(self, task: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """Do what reads the models, in its turn among the questions of others.

        Raises:
            RefusedError: too many wait already.
        """

    async def take(self, events: Sequence[Mapping[str, Any]], source: str = SOURCE, translate: Translate | None = None) -> dict[str, Any]:
        """Take events in, as POST /v1/events would; what comes from another *source* is messages, which *translate* makes events.

        Raises:
            RefusedError: they would be refused.
        """

    async def work(self, task: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """Do what waits for a disk or computes, off the event loop.

        Raises:
            RefusedError: too many wait already.
        """

    def key_of(self, token: str) -> Key | None:
        """The key that a person typed, if it is one that is in force."""

    @property
    def metrics(self) -> Any:
        """The registry of the service's metrics."""

    @property
    def meters(self) -> Meters:
        """What those metrics were in the last hour."""

    def state(self) -> tuple[list[str], list[str]]:
        """Why no traffic should come here, and what answers less than it should."""
