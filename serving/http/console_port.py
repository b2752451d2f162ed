"""The console's way to the service."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import msgspec

from features.sources.replay import FROM_PAGES
from serving.console.meters import Meters
from serving.console.port import RefusedError
from serving.http.lanes import CrowdedError, Lane, LateError
from serving.http.problems import HttpProblem
from serving.intake.intake import SOURCE, Translate
from serving.privacy.keys import Key, Keys
from serving.runtime import Runtime

if TYPE_CHECKING:
    from serving.http.app import App

T = TypeVar("T")
P = ParamSpec("P")


class ConsolePort:
    """The service, as the console's pages see it."""

    def __init__(self, app: App, decisions: Lane, intakes: Lane) -> None:
        self._app, self._decisions, self._intakes = app, decisions, intakes
        self._pages = Lane("pages", threads=2, waiting=32, patience_seconds=2.0, deadline_seconds=10.0, first=app.begin)
        self._keys: Keys | None = None

    @property
    def runtime(self) -> Runtime:
        """What serves."""
        if self._app.runtime is None:
            raise RefusedError(503, "the service is loading its models: try again shortly")
        return self._app.runtime

    @property
    def metrics(self) -> Any:
        """The registry of the service's metrics."""
        return self._app.metrics

    @cached_property
    def meters(self) -> Meters:
        """What those metrics were in the last hour."""
        return Meters(self._app.metrics)

    async def ask(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """What POST *path* would answer."""
        return await self._run(self._decisions, self._app.call, path, dict(body))

    async def decide(self, task: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """Do what reads the models, in its turn among the questions."""
        return await self._run(self._decisions, lambda: task(*arguments, **named))

    async def take(self, events: Sequence[Mapping[str, Any]], source: str = SOURCE, translate: Translate | None = None) -> dict[str, Any]:
        """Take events in."""
        batch = [dict(each) for each in events] if translate is None else events
        told = await self._run(self._intakes, self._app.accept, batch, source, translate, source in FROM_PAGES)
        return dict(msgspec.to_builtins(told))

    async def work(self, task: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """Do what waits for a disk or computes."""
        return await self._run(self._pages, lambda: task(*arguments, **named))

    def key_of(self, token: str) -> Key | None:
        """The key that a person typed."""
        if self._keys is None:
            self._keys = Keys(self.runtime.home)
        return self._keys.check(token)

    def state(self) -> tuple[list[str], list[str]]:
        """Why no traffic should come here, and what answers less than it should."""
        return self._app.problems(), self._app.degraded()

    def close(self) -> None:
        """Finish what was begun."""
        self._pages.close()

    @staticmethod
    async def _run(lane: Lane, work: Callable[..., T], *arguments: Any) -> T:
        try:
            return await lane.run(work, *arguments)
        except HttpProblem as error:
            field = f"{error.problem.field}: " if error.problem.field else ""
            raise RefusedError(error.problem.status, field + error.problem.detail) from None
        except (CrowdedError, LateError) as error:
            raise RefusedError(503, f"{error}: try again shortly") from None
