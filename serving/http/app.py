"""The HTTP surface as one small ASGI application: parse, read one row, decide, log, answer."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import cache, partial
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from features.events.event import EVENT_NAMES, explain
from features.events.identifiers import IdentifierError
from features.sources import page
from features.state.disk import NoSpaceError
from features.state.patience import be_impatient
from models.registry import ModelSettings, NoChampionError, RegistrySettings
from serving.console.address import is_console
from serving.console.application import Console
from serving.decide.questions import SHAPES, CustomerRequest, SimilarItemsRequest, UnknownAttributeError
from serving.decide.who import Who
from serving.http import docs_page
from serving.http.access import KEY, MAX_BODY_BYTES, RETRY_SECONDS
from serving.http.asgi import Message, Receive, Send
from serving.http.browser import PROJECTS, PUBLIC, segment_settings
from serving.http.console_port import ConsolePort
from serving.http.desk import ERASURES, CustomerDesk
from serving.http.lanes import CrowdedError, Lane, LateError, LongAnswers, Ticket
from serving.http.openapi import document
from serving.http.problems import HttpProblem, Problem
from serving.http.pulse import Pulse
from serving.http.rules_desk import RULES, RulesDesk
from serving.http.siblings import Siblings
from serving.http.trackers import TRACKERS, Tracker, TrackersAnswer
from serving.http.visitor import check_question, without_ids
from serving.intake.intake import SOURCE, InboxFullError, NotStoredError, Translate
from serving.intake.receipts import EventsAnswer
from serving.runtime import Runtime

logger = logging.getLogger("ubiquo")
MAX_EVENTS = 1_000
CUSTOMERS = "/v1/customers/"
RESULTS = "/v1/results/"
DOCS = "/v1/docs"
"""The description as a page to read."""
RESERVED = frozenset({*TRACKERS, "/v1/events", "/v1/profile", "/v1/customers", "/v1/erasures", "/v1/results", "/v1/projects", DOCS,
                      RULES, "/metrics", "/openapi.json"})  # fmt: skip
"""The addresses that are no model's."""
LAST = "ubiquo.last"
"""In the scope of a request after whose answer the connection ends."""
PATIENCE_SECONDS = 5.0
"""How long a long answer is waited for before the caller is told where to ask for it."""


class App:
    """The ASGI application. It answers 503 until a runtime is set."""

    def __init__(self, settings: RegistrySettings, siblings: str = "") -> None:
        """Prepare to answer by the models of *settings*; *siblings* is where the processes of one service tell their metrics."""
        self.runtime: Runtime | None = None
        self._encode = msgspec.json.Encoder().encode
        self._answers: dict[str, tuple[Any, Callable[[Any, datetime], Any]]] = {
            "/v1/similar-items": (SimilarItemsRequest, self.similar_items)
        }
        models = settings.models
        for name, model in models.items():
            path = f"/v1/{name}"
            if path in RESERVED or path in self._answers:
                raise ValueError(f"a model may not be called {name!r}: {path} is something else; rename it in mlflow.yaml")
            self._answers[path] = SHAPES[model.kind.answers][0], partial(self._asked, name, model)
        self._lists = frozenset(f"/v1/{name}" for name, model in models.items() if model.kind.answers == "items")
        self._decoders = {kind: msgspec.json.Decoder(kind) for kind in {request for request, _ in self._answers.values()}}
        self._models = len(models)
        self._describe = cache(lambda names: self._encode(document(models, names)))
        self._page = cache(lambda names: docs_page.page(document(models, names)))
        self._routes = {*self._answers, *RESERVED}
        self._desk, self._rules_desk = CustomerDesk(), RulesDesk()
        # one thread decides: more would only contend for the interpreter. What cannot be begun soon is refused at once
        self._decisions = Lane("questions", threads=1, waiting=32, patience_seconds=0.5, deadline_seconds=3.0, first=self.begin)
        # these wait for the disk, and share its syncs
        self._intakes = Lane("batches of events", threads=4, waiting=32, patience_seconds=1.0, deadline_seconds=5.0, first=be_impatient)
        self._desks = Lane(
            "profiles, exports and erasures", threads=1, waiting=16, patience_seconds=600.0, deadline_seconds=600.0, first=self.catch_up
        )
        self._long = LongAnswers(self._desks)
        self._aside = Lane("metrics", threads=1, waiting=4, patience_seconds=1.0, deadline_seconds=3.0)
        self._rules = Lane("rules", threads=1, waiting=16, patience_seconds=5.0, deadline_seconds=10.0)
        self._port = ConsolePort(self, self._decisions, self._intakes)
        self._console = Console(self._port)
        self.pulse = Pulse()
        self._watches: list[asyncio.Task[None]] = []
        self.metrics = CollectorRegistry()
        self._requests = Counter("ubiquo_requests", "Requests answered", ["route", "status"], registry=self.metrics)
        self._seconds = Histogram("ubiquo_request_seconds", "Time to answer", ["route"], registry=self.metrics)
        self._events = Counter("ubiquo_events", "Events received", ["outcome"], registry=self.metrics)
        self._fallbacks = Counter("ubiquo_fallbacks", "Answers that were general", ["route"], registry=self.metrics)
        for name, about, read in (
            ("ubiquo_champions", "Models that have a champion", self._champions),
            ("ubiquo_loop_stall_seconds", "The longest time that the event loop was late", lambda: self.pulse.longest),
            ("ubiquo_loop_busy_seconds", "The longest that the event loop's thread computed at once", lambda: self.pulse.longest_busy),
            ("ubiquo_loop_stalls", "How often the event loop was late by more than 100 ms", lambda: self.pulse.stalls),
            ("ubiquo_decisions_unlogged", "Decisions that could not be kept", self._unlogged),
            ("ubiquo_events_waiting", "Events that wait for the log", self._waiting),
        ):
            Gauge(name, about, registry=self.metrics).set_function(read)

        self._siblings = Siblings(self.metrics, siblings)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        if not self._watches:
            self._watches = [asyncio.create_task(each.beat()) for each in (self.pulse, self._port.meters)]
        path, started = scope["path"], time.perf_counter()
        if is_console(path):
            await self._console(scope, receive, send)
            self._seconds.labels("console").observe(time.perf_counter() - started)
            return
        known = {CUSTOMERS: "customers", PROJECTS: "projects", f"{RULES}/": RULES}
        route = path if path in self._routes else next((name for start, name in known.items() if path.startswith(start)), "other")
        kind, more = b"application/json", []
        try:
            status, body, kind = await self._respond(scope, receive, path)
        except HttpProblem as error:
            status, body, kind = error.problem.status, self._encode(error.problem), b"application/problem+json"
            if error.retry_after is not None:
                more.append((b"retry-after", str(error.retry_after).encode()))
        except (CrowdedError, LateError) as error:
            status = 429 if route in TRACKERS or route == "/v1/events" else 503
            problem = Problem(title="Busy", status=status, detail=f"{error}: send again shortly")
            body, kind = self._encode(problem), b"application/problem+json"
            more.append((b"retry-after", str(RETRY_SECONDS).encode()))
        except Exception:
            # the route, not the path, which may name a customer
            logger.exception("request failed: %s", route)
            problem = Problem(title="Internal error", status=500, detail="The request could not be answered; the log tells why.")
            status, body, kind = 500, self._encode(problem), b"application/problem+json"
        if scope.get(LAST):
            more.append((b"connection", b"close"))
        if path == DOCS:
            more += docs_page.HEADERS
        headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode()), *more]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(time.perf_counter() - started)

    def _champions(self) -> float:
        return 0 if self.runtime is None else self._models - len(self.runtime.engine.missing())

    def _unlogged(self) -> float:
        return 0 if self.runtime is None else self.runtime.decisions.unlogged

    def _waiting(self) -> float:
        return 0 if self.runtime is None else self.runtime.intake.waiting

    def problems(self) -> list[str]:
        """Why no traffic should come here; empty where it should."""
        return ["the service is loading its models"] if self.runtime is None else self.runtime.problems()

    def degraded(self) -> list[str]:
        """What answers less than it should, while everything else goes on."""
        return [] if self.runtime is None else self.runtime.degraded()

    def begin(self) -> None:
        """As ``catch_up``, on a thread that a page waits for: it does not wait for a server that has just not answered."""
        be_impatient()
        self.catch_up()

    def catch_up(self) -> None:
        """Know what other services of the installation have taken; what follows is answered from that."""
        if self.runtime is not None:
            self.runtime.catch_up()

    def lists(self) -> frozenset[str]:
        """The addresses of the models that recommend items."""
        return self._lists

    def close(self) -> None:
        """Finish what was begun."""
        self._siblings.close()
        self._port.close()
        for lane in (self._decisions, self._intakes, self._desks, self._aside, self._rules):
            lane.close()

    def _asked(self, name: str, model: ModelSettings, request: Any, as_of: datetime) -> Any:
        """Answer and log one question to a model."""
        runtime = self._live()
        who = self._who(runtime, request)
        engine = runtime.engine
        row, missing = runtime.row(engine.reading(name), who.customer_id, as_of, engine.reads(name, request.reached_by))
        ask = {"score": engine.score, "items": engine.recommendations, "offers": engine.next_best_offer}
        return self._log(runtime, ask[model.kind.answers](name, request, who, row, as_of), missing)  # type: ignore[operator]

    def similar_items(self, request: SimilarItemsRequest, as_of: datetime) -> Any:
        """Answer and log one question for similar items."""
        runtime = self._live()
        return self._log(runtime, runtime.engine.similar_items(request, as_of))

    def events(self, body: Any, is_public: bool = False) -> EventsAnswer:
        """Take one event, or a batch in ``{"events": [...]}``; with a key that everybody can read (*is_public*) what a page may tell."""
        batch = body.get("events") if isinstance(body, dict) and "events" in body else [body]
        if not isinstance(batch, list) or not batch or len(batch) > MAX_EVENTS:
            raise HttpProblem(400, "Bad batch", f"events must be a list of 1 to {MAX_EVENTS} events", "events")
        return self.accept(batch, page.SOURCE if is_public else SOURCE, None, is_public)

    def accept(self, batch: Sequence[Any], source: str, translate: Translate | None, is_public: bool) -> EventsAnswer:
        """Take a batch, count what became of it, and say why it was not taken; *is_public*, as from a page.

        Raises:
            HttpProblem: nothing of it was.
        """
        try:
            answer = self._live().intake.accept(batch, source, translate, page.admitted if is_public else None)
        except InboxFullError as error:
            raise HttpProblem(429, "Too many events wait", str(error), retry_after=RETRY_SECONDS) from None
        except NoSpaceError:
            raise HttpProblem(507, "Disk full", "no event can be stored: nothing of this request was taken", retry_after=30) from None
        except NotStoredError as error:
            raise HttpProblem(503, "Not stored", str(error), retry_after=5) from None
        for outcome in ("accepted", "duplicates", "rejected", "erased"):
            self._events.labels(outcome).inc(getattr(answer, outcome))
        return without_ids(answer) if is_public else answer

    def call(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Answer *body* as POST *path* would, without HTTP.

        Raises:
            HttpProblem: what HTTP would have answered with problem+json.
        """
        if path == "/v1/events":
            return dict(msgspec.to_builtins(self.events(body)))
        if path not in self._answers:
            raise HttpProblem(404, "Not found", "there is no such model: /openapi.json lists what there is", "model")
        return dict(msgspec.to_builtins(self._answer(path, msgspec.json.encode(body))))

    async def _respond(self, scope: Message, receive: Receive, path: str) -> tuple[int, bytes, bytes]:
        if path in ("/openapi.json", DOCS):
            if scope["method"] not in ("GET", "HEAD"):
                raise HttpProblem(405, "Method not allowed", f"{path} takes GET")
            names = (*EVENT_NAMES, *(self.runtime.intake.own_events if self.runtime else ()))
            # made once, and not on the event loop
            if path == DOCS:
                return 200, await self._aside.run(self._page, names), b"text/html; charset=utf-8"
            return 200, await self._aside.run(self._describe, names), b"application/json"
        if path == "/metrics":
            self._live()
            return 200, await self._aside.run(self._siblings.told), b"text/plain; version=0.0.4"
        if path.startswith((CUSTOMERS, ERASURES, RESULTS)) or path == "/v1/profile":
            return await self._answered_by_the_desk(scope, receive, path)
        if path == RULES or path.startswith(f"{RULES}/"):
            work = self._rules_desk.work(self._live(), scope, await _read(receive), scope.get(KEY, "local"))
            return await self._rules.run(work)
        if path.startswith(PROJECTS):
            if scope["method"] != "GET":
                raise HttpProblem(405, "Method not allowed", "this takes GET")
            return 200, self._encode(segment_settings(scope, path)), b"application/json"
        if path in TRACKERS:
            return await self._track(TRACKERS[path], scope, receive)
        if path not in self._answers and path != "/v1/events":
            raise HttpProblem(404, "Not found", "there is nothing here: /openapi.json lists what there is")
        if scope["method"] != "POST":
            raise HttpProblem(405, "Method not allowed", f"{path} takes POST")
        body = await _read(receive)
        if path == "/v1/events":
            # the disk is waited for: on a thread, so that others are answered meanwhile
            answer = await self._intakes.run(self._events_of, body, PUBLIC in scope)
            if len(answer.events) == 1 and answer.rejected:
                [receipt] = answer.events
                raise HttpProblem(400, "Event rejected", receipt.reason or "", receipt.field)
            return 200, self._encode(answer), b"application/json"
        fallback, encoded = await self._decisions.run(self._decided, path, body, PUBLIC in scope)
        if fallback:
            self._fallbacks.labels(path).inc()
        return 200, encoded, b"application/json"

    def _events_of(self, body: bytes, is_public: bool) -> EventsAnswer:
        return self.events(_decode(msgspec.json.Decoder(), body), is_public)

    def _decided(self, path: str, body: bytes, is_public: bool) -> tuple[bool, bytes]:
        """Whether the answer is general, and the answer itself."""
        answer = self._answer(path, body, is_public)
        return answer.fallback is not None, self._encode(answer)

    def _answer(self, path: str, body: bytes, is_public: bool = False) -> Any:
        kind, handler = self._answers[path]
        request = _decode(self._decoders[kind], body)
        if is_public:
            check_question(request)
        try:
            answer = handler(request, self._live().clock())
            return without_ids(answer) if is_public else answer
        except NoChampionError as error:
            raise HttpProblem(503, "No champion", str(error)) from None
        except UnknownAttributeError as error:
            raise HttpProblem(400, "Unknown attribute", error.reason, error.field) from None

    async def _answered_by_the_desk(self, scope: Message, receive: Receive, path: str) -> tuple[int, bytes, bytes]:
        key = scope.get(KEY, "local")
        runtime = self._live()
        if path.startswith(RESULTS):
            if scope["method"] != "GET":
                raise HttpProblem(405, "Method not allowed", "this takes GET")
            try:
                found = await self._long.fetch(path.removeprefix(RESULTS), key, PATIENCE_SECONDS)
            except LookupError as error:
                raise HttpProblem(404, "Not found", str(error)) from None
        else:
            body, method = await _read(receive), scope["method"]
            found = await self._long.ask(key, PATIENCE_SECONDS, lambda: self._desk.work(runtime, method, path, body, key)())
        if isinstance(found, Ticket):
            # over a new connection another process may be the one that is asked
            scope[LAST] = found.is_anothers
            state = {"state": "running", "ask": f"{RESULTS}{found.result_id}"}
            return 202, self._encode(state), b"application/json"
        status, encoded, kind = found
        return status, encoded, kind

    async def _track(self, tracker: Tracker, scope: Message, receive: Receive) -> tuple[int, bytes, bytes]:
        if scope["method"] != "POST":
            raise HttpProblem(405, "Method not allowed", "this takes POST")
        body = await _read(receive)
        left_out = await self._intakes.run(self._tracked, tracker, dict(scope["headers"]), body, PUBLIC in scope)
        answer = tracker.answer if not left_out else self._encode(TrackersAnswer(True, left_out))
        return tracker.status, answer, b"application/json"

    def _tracked(self, tracker: Tracker, headers: dict[bytes, bytes], body: bytes, is_public: bool) -> list[str]:
        """Take what a client sent; returns which fields were left out of what a page sent."""
        runtime, left_out = self._live(), dict[str, None]()

        def translate(message: Any, received_at: datetime) -> Any:
            event = tracker.to_event(message, received_at, runtime.currency)
            if is_public:
                event, names = page.left_out_of(event)
                left_out.update(dict.fromkeys(names))
            return event

        source = page.SEGMENT_SOURCE if is_public else tracker.source
        self.accept(tracker.messages(headers, body), source, translate, is_public)
        return list(left_out)

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
    def _log(runtime: Runtime, decided: tuple[Any, dict[str, Any]], missing: str | None = None) -> Any:
        answer, record = decided
        if missing is not None:
            answer.fallback = record["fallback"] = "; ".join(filter(None, (missing, answer.fallback)))
        answer.logged = runtime.decisions.append(record)
        return answer


def _decode(decoder: msgspec.json.Decoder[Any], body: bytes) -> Any:
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        field, reason = explain(error, decoder.type)
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
