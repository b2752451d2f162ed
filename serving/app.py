"""The HTTP surface as one small ASGI application: parse, read one row, decide, log, answer."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from datetime import datetime
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from features.clock import Clock, clock_from_environment
from features.decision_log import DecisionLog
from features.event_log import EventLog
from features.events import explain
from features.home import Home
from features.identity import Identities
from features.shop import Shop
from features.store import FeatureStore
from serving.access import MAX_BODY_BYTES
from serving.engine import Engine, OnlineReader
from serving.inbox import Inbox
from serving.intake import Intake
from serving.openapi import document
from serving.schemas import (
    ChurnRequest,
    CustomerRequest,
    EventsAnswer,
    HttpProblem,
    NextBestOfferRequest,
    Problem,
    RecommendationsRequest,
    SimilarItemsRequest,
)

logger = logging.getLogger("ubiquo")
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
MAX_EVENTS = 1_000
TICK_SECONDS = 1.0
AGGREGATE_SECONDS = 5.0
"""How often the windowed features of the customers just seen are recomputed."""
MODEL_CHECK_SECONDS = 30.0


class Runtime:
    """Everything that one serving process holds, and the thread that does what need not be done within a request."""

    def __init__(self, home: Home, clock: Clock | None = None) -> None:
        shop = Shop.load(home)
        inbox = Inbox(home)
        latest = [t for t in (EventLog(home, shop.timezone).latest_received(), inbox.last_received()) if t is not None]
        inbox.close()
        self.clock = clock or clock_from_environment(not_before=max(latest, default=None))
        self.identities = Identities(home)
        writer = FeatureStore(home)
        writer.apply()
        # a connection of its own: a reader must not see, nor wait within, what the intake is writing
        self.reader = OnlineReader(FeatureStore(home))
        self.engine = Engine(home)
        self.decisions = DecisionLog(home)
        self.intake = Intake(home, self.clock, writer, self.identities)
        self._chores: list[tuple[str, Callable[[], Any], float]] = [
            ("moving events to the log", self.intake.drain, TICK_SECONDS),
            ("flushing decisions", self.decisions.flush, TICK_SECONDS),
            ("recomputing aggregates", self.intake.refresh_aggregates, AGGREGATE_SECONDS),
            ("looking for new champions", self._refresh_models, MODEL_CHECK_SECONDS),
            # an import by another process makes customers known that this one has not met
            ("looking for new customers", self.identities.refresh, MODEL_CHECK_SECONDS),
        ]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="ubiquo-background", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the background work, having brought everything into the logs."""
        self._stop.set()
        self._thread.join()
        self.intake.close()
        self.decisions.close()

    def _work(self) -> None:
        due = {name: time.monotonic() for name, _, _ in self._chores}
        while not self._stop.wait(TICK_SECONDS):
            for name, chore, seconds in self._chores:
                if time.monotonic() < due[name]:
                    continue
                due[name] = time.monotonic() + seconds
                try:
                    chore()
                except Exception:
                    # it is tried again when next due, and keeps no other chore from its turn; nothing waiting is lost,
                    # as an event leaves the inbox only once it is in the log
                    logger.exception("%s failed; it will be tried again", name)

    def _refresh_models(self) -> None:
        for label in self.engine.refresh():
            logger.info("now serving %s", label)


class App:
    """The ASGI application. It answers 503 until a runtime is set."""

    def __init__(self) -> None:
        self.runtime: Runtime | None = None
        self._encode = msgspec.json.Encoder().encode
        self._decoders = {
            kind: msgspec.json.Decoder(kind) for kind in (RecommendationsRequest, SimilarItemsRequest, NextBestOfferRequest, ChurnRequest)
        }
        self._answers: dict[str, tuple[Any, Callable[[Any, datetime], Any]]] = {
            "/v1/recommendations": (RecommendationsRequest, self.recommendations),
            "/v1/similar-items": (SimilarItemsRequest, self.similar_items),
            "/v1/next-best-offer": (NextBestOfferRequest, self.next_best_offer),
            "/v1/churn": (ChurnRequest, self.churn),
        }
        self.metrics = CollectorRegistry()
        self._requests = Counter("ubiquo_requests", "Requests answered", ["route", "status"], registry=self.metrics)
        self._seconds = Histogram("ubiquo_request_seconds", "Time to answer", ["route"], registry=self.metrics)
        self._events = Counter("ubiquo_events", "Events received", ["outcome"], registry=self.metrics)
        self._fallbacks = Counter("ubiquo_fallbacks", "Answers that were general", ["route"], registry=self.metrics)
        self._ready = Gauge("ubiquo_champions", "Models that have a champion", registry=self.metrics)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        path, started = scope["path"], time.perf_counter()
        route = path if path in self._answers or path in ("/v1/events", "/metrics", "/openapi.json") else "other"
        kind = b"application/json"
        try:
            status, body, kind = await self._respond(scope, receive, path)
        except HttpProblem as error:
            status, body, kind = error.problem.status, self._encode(error.problem), b"application/problem+json"
        except Exception:
            logger.exception("request failed: %s", path)
            problem = Problem(title="Internal error", status=500, detail="The request could not be answered; the log tells why.")
            status, body, kind = 500, self._encode(problem), b"application/problem+json"
        headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(time.perf_counter() - started)

    def recommendations(self, request: RecommendationsRequest, as_of: datetime) -> Any:
        """Answer and log one question for recommendations."""
        runtime = self._live()
        customer = self._customer(runtime, request)
        return self._log(runtime, runtime.engine.recommendations(request, customer, runtime.reader.row("recommendations", customer), as_of))

    def similar_items(self, request: SimilarItemsRequest, as_of: datetime) -> Any:
        """Answer and log one question for similar items."""
        runtime = self._live()
        return self._log(runtime, runtime.engine.similar_items(request, as_of))

    def next_best_offer(self, request: NextBestOfferRequest, as_of: datetime) -> Any:
        """Answer and log one question for offers."""
        runtime = self._live()
        customer = self._customer(runtime, request)
        return self._log(runtime, runtime.engine.next_best_offer(request, customer, runtime.reader.row("next-best-offer", customer), as_of))

    def churn(self, request: ChurnRequest, as_of: datetime) -> Any:
        """Answer and log one question for churn."""
        runtime = self._live()
        customer = self._customer(runtime, request)
        return self._log(runtime, runtime.engine.churn(request, customer, runtime.reader.row("churn", customer), as_of))

    def events(self, body: Any) -> EventsAnswer:
        """Take one event, or a batch in ``{"events": [...]}``."""
        batch = body.get("events") if isinstance(body, dict) and "events" in body else [body]
        if not isinstance(batch, list) or not batch or len(batch) > MAX_EVENTS:
            raise HttpProblem(400, "Bad batch", f"events must be a list of 1 to {MAX_EVENTS} events", "events")
        answer = self._live().intake.accept(batch)
        for outcome, count in (("accepted", answer.accepted), ("duplicate", answer.duplicates), ("rejected", answer.rejected)):
            self._events.labels(outcome).inc(count)
        return answer

    def call(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Answer *body* as POST *path* would, without HTTP.

        Raises:
            HttpProblem: what HTTP would have answered with problem+json.
        """
        if path == "/v1/events":
            return dict(msgspec.to_builtins(self.events(body)))
        kind, handler = self._answers[path]
        return dict(msgspec.to_builtins(handler(_decode(self._decoders[kind], msgspec.json.encode(body)), self._live().clock())))

    async def _respond(self, scope: Scope, receive: Receive, path: str) -> tuple[int, bytes, bytes]:
        if path == "/openapi.json":
            return 200, self._encode(document()), b"application/json"
        if path == "/metrics":
            self._ready.set(3 - len(self._live().engine.missing()))
            return 200, generate_latest(self.metrics), b"text/plain; version=0.0.4"
        if path not in self._answers and path != "/v1/events":
            raise HttpProblem(404, "Not found", f"there is nothing at {path}: /openapi.json lists what there is")
        if scope["method"] != "POST":
            raise HttpProblem(405, "Method not allowed", f"{path} takes POST")
        body = await _read(receive)
        if path == "/v1/events":
            # the disk is waited for: on a thread, so that others are answered meanwhile
            answer = await asyncio.to_thread(self.events, _decode(msgspec.json.Decoder(), body))
            if len(answer.events) == 1 and answer.rejected:
                [receipt] = answer.events
                raise HttpProblem(400, "Event rejected", receipt.reason or "", receipt.field)
            return 200, self._encode(answer), b"application/json"
        kind, handler = self._answers[path]
        request = _decode(self._decoders[kind], body)
        answer = handler(request, self._live().clock())
        if answer.fallback is not None:
            self._fallbacks.labels(path).inc()
        return 200, self._encode(answer), b"application/json"

    def _live(self) -> Runtime:
        if self.runtime is None:
            raise HttpProblem(503, "Starting", "the service is loading its models: try again shortly")
        return self.runtime

    @staticmethod
    def _customer(runtime: Runtime, request: CustomerRequest) -> str | None:
        if request.customer_id is not None and request.identifiers:
            raise HttpProblem(400, "Ambiguous customer", "send customer_id or identifiers, not both", "customer_id")
        if request.customer_id is not None:
            return request.customer_id
        return runtime.identities.resolve(request.identifiers)

    @staticmethod
    def _log(runtime: Runtime, decided: tuple[Any, dict[str, Any]]) -> Any:
        answer, record = decided
        runtime.decisions.append(record)
        return answer


def _decode(decoder: msgspec.json.Decoder[Any], body: bytes) -> Any:
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        field, reason = explain(error)
        raise HttpProblem(400, "Bad request", reason, field) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise HttpProblem(400, "Bad request", f"the body is not valid JSON: {error}", "$") from None


async def _read(receive: Receive) -> bytes:
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise HttpProblem(400, "Bad request", "the client went away before the body was complete")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY_BYTES:
            raise HttpProblem(413, "Too large", f"a body may hold {MAX_BODY_BYTES} bytes: send fewer events at once")
        if not message.get("more_body"):
            return b"".join(parts)
