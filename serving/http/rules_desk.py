"""Merchandising rules over HTTP: shown, made and ended. Each is audited."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any, Literal
from urllib.parse import parse_qs, unquote
from zoneinfo import ZoneInfo

import msgspec
from sqlalchemy.exc import SQLAlchemyError

from features.catalogue.shop import Shop
from features.events.event import RejectedEvent
from features.state.disk import DamagedStateError, NoSpaceError
from features.state.ports import MissingStateError
from serving.decide.rules import EndedRuleError, NewRule, RuleContent, ShopRule, UnknownRuleError, mistaken
from serving.http.asgi import Message
from serving.http.problems import HttpProblem
from serving.runtime import Runtime

RULES = "/v1/rules"
WITH_ENDED = "with_ended"
"""The query parameter that asks for the rules that have ended too."""
Reply = tuple[int, bytes, bytes]
_JSON = b"application/json"


class ToldRule(RuleContent, kw_only=True, frozen=True):
    """A rule as it is shown: all times are the shop's own."""

    rule_id: str
    state: Literal["in force", "waits", "over", "ended"]
    made_by: str
    made_at: datetime
    ended_by: str | None
    ended_at: datetime | None


class ToldRules(msgspec.Struct, frozen=True):
    """Rules, the last made first: of two that claim one place the last made has it."""

    timezone: str
    rules: list[ToldRule]


class RulesDesk:
    """Answers ``GET`` and ``POST /v1/rules``, and ``DELETE /v1/rules/{rule_id}``."""

    def __init__(self) -> None:
        self._decoder = msgspec.json.Decoder(NewRule)

    def work(self, runtime: Runtime, scope: Message, body: bytes, key: str) -> Callable[[], Reply]:
        """What answers one request of the caller whose key is named *key*; it raises ``HttpProblem`` for mistakes.

        Raises:
            HttpProblem: the request asks for what there is not.
        """
        method, rule_id = scope["method"], unquote(scope["path"].removeprefix(RULES).removeprefix("/"))
        if rule_id:
            if method != "DELETE":
                raise HttpProblem(405, "Method not allowed", f"{RULES}/{{rule_id}} takes DELETE: a rule is not changed, but ended")
            return lambda: self._done(runtime, key, "end rule", rule_id, lambda at: self._end(runtime, rule_id, key, at))
        if method == "GET":
            asked = parse_qs(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True)
            with_ended = _truth(asked.get(WITH_ENDED, ["false"])[-1])
            return lambda: self._done(runtime, key, "list rules", "", lambda at: self._list(runtime, with_ended, at))
        if method == "POST":
            return lambda: self._done(runtime, key, "add rule", "", lambda at: self._add(runtime, body, key, at))
        raise HttpProblem(405, "Method not allowed", f"{RULES} takes GET and POST")

    def _done(self, runtime: Runtime, key: str, action: str, rule_id: str, act: Callable[[datetime], tuple[str, Any]]) -> Reply:
        """What *act* answers, written down whatever becomes of it: who tried what has to stand there too."""
        at = runtime.clock()
        try:
            about, told = act(at)
        except (UnknownRuleError, EndedRuleError, RejectedEvent, HttpProblem, MissingStateError) as error:
            # what was sent as an id may be anything: only what is a rule's is written down
            known = "" if isinstance(error, UnknownRuleError) else rule_id
            runtime.audit.note_rule(at, key, action, known, "refused")
            raise _problem(error) from None
        except (SQLAlchemyError, DamagedStateError, NoSpaceError, OSError) as error:
            runtime.audit.note_rule(at, key, action, "", "failed")
            raise HttpProblem(503, "Not stored", f"the rules cannot be read or written: {error}", retry_after=5) from None
        runtime.audit.note_rule(at, key, action, about, "done")
        return 200, msgspec.json.encode(told), _JSON

    def _add(self, runtime: Runtime, body: bytes, key: str, at: datetime) -> tuple[str, Any]:
        try:
            wanted = self._decoder.decode(body)
        except msgspec.ValidationError as error:
            raise mistaken(error) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise HttpProblem(400, "Bad request", f"the body is not valid JSON: {error}", "$") from None
        made = runtime.engine.rules.add(wanted, key, at)
        return made.rule_id, told(made, at, _zone(runtime))

    @staticmethod
    def _end(runtime: Runtime, rule_id: str, key: str, at: datetime) -> tuple[str, Any]:
        return rule_id, told(runtime.engine.rules.end(rule_id, key, at), at, _zone(runtime))

    @staticmethod
    def _list(runtime: Runtime, with_ended: bool, at: datetime) -> tuple[str, Any]:
        zone = _zone(runtime)
        return "", ToldRules(zone.key, [told(rule, at, zone) for rule in runtime.engine.rules.listed(with_ended)])


def told(rule: ShopRule, at: datetime, zone: ZoneInfo) -> ToldRule:
    """A rule as it stands at a moment, in the times of a zone."""

    def there(moment: datetime | None) -> datetime | None:
        return None if moment is None else moment.astimezone(zone)

    content = {name: getattr(rule, name) for name in RuleContent.__struct_fields__}
    return ToldRule(
        **{**content, "begins": there(rule.begins), "until": there(rule.until)},
        rule_id=rule.rule_id, state=rule.state(at), made_by=rule.made_by, made_at=rule.made_at.astimezone(zone),
        ended_by=rule.ended_by, ended_at=there(rule.ended_at),
    )  # fmt: skip


def _zone(runtime: Runtime) -> ZoneInfo:
    return ZoneInfo(Shop.load(runtime.home).timezone)


def _truth(text: str) -> bool:
    if text not in ("", "true", "false", "1", "0"):
        raise HttpProblem(400, "Bad request", "say true or false", WITH_ENDED)
    return text in ("", "true", "1")


def _problem(error: Exception) -> HttpProblem:
    if isinstance(error, HttpProblem):
        return error
    if isinstance(error, UnknownRuleError):
        return HttpProblem(404, "Not found", str(error), "rule_id")
    if isinstance(error, EndedRuleError):
        return HttpProblem(409, "Ended before", str(error), "rule_id")
    if isinstance(error, RejectedEvent):
        return HttpProblem(400, "Bad rule", error.reason, error.field)
    return HttpProblem(503, "No catalogue", str(error))
