"""The HTTP surface as one small ASGI application: parse, read one row, decide, log, answer."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from datetime import datetime
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from features.clock import Clock, clock_from_environment
from features.consent import Consents, standing
from features.contacts import Contacts
from features.decision_log import DecisionLog
from features.event_log import EventLog
from features.events import explain
from features.home import Home
from features.identifiers import IdentifierError
from features.identity import Identities
from features.shop import Shop
from features.store import FeatureStore
from serving.access import KEY, MAX_BODY_BYTES
from serving.customers import ERASURES, CustomerDesk
from serving.engine import Engine, OnlineReader, Who
from serving.erasure import Office
from serving.inbox import Inbox
from serving.intake import SOURCE, InboxFullError, Intake, Translate
from serving.keys import Audit
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
from serving.trackers import TRACKERS, Tracker

logger = logging.getLogger("ubiquo")
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
MAX_EVENTS = 1_000
CUSTOMERS = "/v1/customers/"
TICK_SECONDS = 1.0
AGGREGATE_SECONDS = 5.0
"""How often the windowed features of the customers just seen are recomputed."""
MODEL_CHECK_SECONDS = 30.0
RETRY_SECONDS = 2
"""When to come again while the inbox is full."""


class Runtime:
    """Everything that one serving process holds, and the thread that does what need not be done within a request."""

    def __init__(self, home: Home, clock: Clock | None = None) -> None:
        shop = Shop.load(home)
        inbox = Inbox(home)
        self.home, self.currency, self.phone_region = home, shop.currency, shop.phone_region
        # whoever erases from outside must know that a service remembers
        self._held = home.held("serving")
        latest = [t for t in (EventLog(home, shop.timezone).latest_received(), inbox.last_received()) if t is not None]
        inbox.close()
        self.clock = clock or clock_from_environment(not_before=max(latest, default=None))
        self.identities = Identities(home)
        self.consents = Consents(home, shop.consent)
        writer = FeatureStore(home)
        writer.apply()
        # a connection of its own: a reader must not see, nor wait within, what the intake is writing
        self.engine = Engine(home)
        self.decisions = DecisionLog(home)
        self.intake = Intake(home, self.clock, writer, self.identities, self.consents)
        self.contacts = Contacts(home, self.identities.vault)
        self.office = Office(home, self.clock, writer, self.intake, self.decisions)
        self.office.resume()
        self.audit = Audit(home, self.identities.vault)
        self.reader = OnlineReader(FeatureStore(home), self.intake.fresh)
        self._chores: list[tuple[str, Callable[[], Any], float]] = [
            ("moving events to the log", self.intake.drain_if_due, TICK_SECONDS),
            ("flushing decisions", self.decisions.flush, TICK_SECONDS),
            ("recomputing aggregates", self.intake.refresh_aggregates, AGGREGATE_SECONDS),
            ("looking for new champions", self._refresh_models, MODEL_CHECK_SECONDS),
            # an import by another process makes customers known that this one has not met
            ("looking for new customers", self._refresh_customers, MODEL_CHECK_SECONDS),
        ]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="ubiquo-background", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the background work, having brought everything into the logs."""
        self._stop.set()
        self._thread.join()
        self.office.close()
        self.intake.close()
        self.decisions.close()
        self._held.close()

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

    def who(self, customer_id: str | None) -> Who:
        """The customer with what she allows now."""
        if customer_id is None:
            return Who(None, True, self.consents.forbidden_channels(()))
        customer_id = self.identities.current(customer_id)
        if not self.identities.members(customer_id):
            # whatever text was sent: what nobody is known by is not repeated, nor logged
            return Who(None, True, self.consents.forbidden_channels(()))
        allowed = standing(self.consents, self.identities, customer_id)
        return Who(customer_id, allowed.personalization, allowed.forbidden_channels)

    def _refresh_customers(self) -> None:
        self.identities.refresh()
        self.consents.refresh()

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
        self._routes = {*self._answers, *TRACKERS, "/v1/events", "/v1/profile", "/metrics", "/openapi.json"}
        self._desk = CustomerDesk()
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
        route = path if path in self._routes else "customers" if path.startswith(CUSTOMERS) else "other"
        kind, more = b"application/json", []
        try:
            status, body, kind = await self._respond(scope, receive, path)
        except HttpProblem as error:
            status, body, kind = error.problem.status, self._encode(error.problem), b"application/problem+json"
            if error.retry_after is not None:
                more.append((b"retry-after", str(error.retry_after).encode()))
        except Exception:
            # the route, not the path, which may name a customer
            logger.exception("request failed: %s", route)
            problem = Problem(title="Internal error", status=500, detail="The request could not be answered; the log tells why.")
            status, body, kind = 500, self._encode(problem), b"application/problem+json"
        headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode()), *more]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(time.perf_counter() - started)

    def recommendations(self, request: RecommendationsRequest, as_of: datetime) -> Any:
        """Answer and log one question for recommendations."""
        runtime = self._live()
        who = self._who(runtime, request)
        row = runtime.reader.row("recommendations", who.customer_id)
        return self._log(runtime, runtime.engine.recommendations(request, who, row, as_of))

    def similar_items(self, request: SimilarItemsRequest, as_of: datetime) -> Any:
        """Answer and log one question for similar items."""
        runtime = self._live()
        return self._log(runtime, runtime.engine.similar_items(request, as_of))

    def next_best_offer(self, request: NextBestOfferRequest, as_of: datetime) -> Any:
        """Answer and log one question for offers."""
        runtime = self._live()
        who = self._who(runtime, request)
        row = runtime.reader.row("next-best-offer", who.customer_id)
        return self._log(runtime, runtime.engine.next_best_offer(request, who, row, as_of))

    def churn(self, request: ChurnRequest, as_of: datetime) -> Any:
        """Answer and log one question for churn."""
        runtime = self._live()
        who = self._who(runtime, request)
        return self._log(runtime, runtime.engine.churn(request, who, runtime.reader.row("churn", who.customer_id), as_of))

    def events(self, body: Any) -> EventsAnswer:
        """Take one event, or a batch in ``{"events": [...]}``."""
        batch = body.get("events") if isinstance(body, dict) and "events" in body else [body]
        if not isinstance(batch, list) or not batch or len(batch) > MAX_EVENTS:
            raise HttpProblem(400, "Bad batch", f"events must be a list of 1 to {MAX_EVENTS} events", "events")
        answer = self._accept(batch)
        return answer

    def _accept(self, batch: Sequence[Any], source: str = SOURCE, translate: Translate | None = None) -> EventsAnswer:
        try:
            answer = self._live().intake.accept(batch, source, translate)
        except InboxFullError as error:
            raise HttpProblem(429, "Too many events wait", str(error), retry_after=RETRY_SECONDS) from None
        for outcome in ("accepted", "duplicates", "rejected", "erased"):
            self._events.labels(outcome).inc(getattr(answer, outcome))
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
        if path.startswith((CUSTOMERS, ERASURES)) or path == "/v1/profile":
            body = await _read(receive)
            return await asyncio.to_thread(self._desk.answer, self._live(), scope["method"], path, body, scope.get(KEY, "local"))
        if path in TRACKERS:
            return await self._track(TRACKERS[path], scope, receive)
        if path not in self._answers and path != "/v1/events":
            raise HttpProblem(404, "Not found", "there is nothing here: /openapi.json lists what there is")
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

    async def _track(self, tracker: Tracker, scope: Scope, receive: Receive) -> tuple[int, bytes, bytes]:
        if scope["method"] != "POST":
            raise HttpProblem(405, "Method not allowed", "this takes POST")
        runtime = self._live()
        messages = tracker.messages(dict(scope["headers"]), await _read(receive))

        def translate(message: Any, received_at: datetime) -> Any:
            return tracker.to_event(message, received_at, runtime.currency)

        await asyncio.to_thread(self._accept, messages, tracker.source, translate)
        return tracker.status, tracker.answer, b"application/json"

    def _live(self) -> Runtime:
        if self.runtime is None:
            raise HttpProblem(503, "Starting", "the service is loading its models: try again shortly")
        return self.runtime

    @staticmethod
    def _who(runtime: Runtime, request: CustomerRequest) -> Who:
        if request.customer_id is not None and request.identifiers:
            raise HttpProblem(400, "Ambiguous customer", "send customer_id or identifiers, not both", "customer_id")
        if request.customer_id is not None:
            return runtime.who(request.customer_id)
        try:
            return runtime.who(runtime.identities.resolve(request.identifiers, runtime.phone_region))
        except IdentifierError as error:
            kind, _, mend = str(error).partition(": ")
            raise HttpProblem(400, "Bad request", mend, f"identifiers.{kind}") from None

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
