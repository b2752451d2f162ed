"""The BentoML service: one process that answers the HTTP surface of ``serving.http.app`` and BentoML's own client.

The arbiter process imports this module too, so everything heavy waits for the service's construction in the worker.
"""

from __future__ import annotations

import signal
import sys
from typing import Any

import bentoml

from features.state.home import Home, configure_process
from serving.http.access import AccessControl
from serving.http.asgi import application
from serving.privacy.keys import Keys

GC_THRESHOLDS = 50_000, 20, 100
"""Events that wait for the log are many objects that live for seconds, and none of them is part of a circle. At Python's own thresholds
(700, 10, 10) they were looked at again and again, a third of the time that moving them into the log took."""
PR_SET_PDEATHSIG = 1


@bentoml.service(
    name="ubiquo",
    workers=1,
    # the last resort: bodies, lanes and long answers have deadlines of their own, all shorter
    traffic={"timeout": 15},
    metrics={"enabled": False},
    logging={"access": {"enabled": False}},
)
class Ubiquo:
    """Churn, next best offer and recommendations, for BentoML's client; browsers and shops use ``/v1``."""

    def __init__(self) -> None:
        import gc

        configure_process()
        home = Home.from_environment()
        _die_with_the_arbiter(home)
        if not home.settings.loopback and not Keys(home).any():
            raise RuntimeError("make an API key (python -m serving keys create): only a service on loopback may do without one")
        from serving.bootstrap import model_settings, start
        from serving.http.app import App

        self._app = App(model_settings(home), home.settings.siblings)
        try:
            self._app.runtime = start(home)
        except Exception as error:
            application.failure = error
            raise
        application.delegate = self._app
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)

    @bentoml.api(route="/bento/recommendations")
    def recommendations(self, request: dict[str, Any]) -> dict[str, Any]:
        """Like POST /v1/recommendations."""
        return self._call("/v1/recommendations", request)

    @bentoml.api(route="/bento/similar-items")
    def similar_items(self, request: dict[str, Any]) -> dict[str, Any]:
        """Like POST /v1/similar-items."""
        return self._call("/v1/similar-items", request)

    @bentoml.api(route="/bento/next-best-offer")
    def next_best_offer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Like POST /v1/next-best-offer."""
        return self._call("/v1/next-best-offer", request)

    @bentoml.api(route="/bento/churn")
    def churn(self, request: dict[str, Any]) -> dict[str, Any]:
        """Like POST /v1/churn."""
        return self._call("/v1/churn", request)

    @bentoml.api(route="/bento/events")
    def events(self, request: dict[str, Any]) -> dict[str, Any]:
        """Like POST /v1/events."""
        return self._call("/v1/events", request)

    @bentoml.on_shutdown
    def close(self) -> None:
        """Bring everything into the logs."""
        application.delegate = None
        self._app.close()
        if self._app.runtime is not None:
            self._app.runtime.close()
            self._app.runtime = None

    def _call(self, path: str, request: dict[str, Any]) -> dict[str, Any]:
        from bentoml.exceptions import BentoMLException, InvalidArgument, ServiceUnavailable

        from serving.http.problems import HttpProblem

        try:
            self._app.begin()
            return self._app.call(path, request)
        except HttpProblem as error:
            problem = error.problem
            kind: type[BentoMLException] = InvalidArgument if problem.status < 500 else ServiceUnavailable
            raise kind(f"{problem.field + ': ' if problem.field else ''}{problem.detail}") from None


def _die_with_the_arbiter(home: Home) -> None:
    """Under ``bentoml serve`` this is a worker: it must not go on answering once what started it is gone (prctl(2), Linux only)."""
    if not sys.platform.startswith("linux") or home.settings.single_process:
        return
    import ctypes

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


Ubiquo.add_asgi_middleware(AccessControl)  # type: ignore[attr-defined]
Ubiquo.mount_asgi_app(application, path="/")  # type: ignore[attr-defined]
