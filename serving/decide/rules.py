"""Merchandising rules: what the shop puts to a place, raises or lowers, and keeps out of its lists, and when. A rule is never changed:
a change ends one and makes another, so that it can be told which held at any moment.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import closing
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, get_args

import msgspec
import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from features.events.event import RejectedEvent, Text, check_keys, explain
from features.state.clock import microseconds, moment_of
from features.state.disk import DamagedStateError
from features.state.ports import State
from features.state.sql import BIG
from models.recommender.listings import Listing
from models.recommender.recipes import RECIPES
from serving.decide.questions import MAX_VALUES_ASKED, Between, Values

logger = logging.getLogger("ubiquo")
Action = Literal["pin", "boost", "block"]
ABOUT_ITEMS: tuple[Listing, ...] = tuple(each for each in get_args(Listing) if RECIPES[each].asks_about == "needed")
"""The lists of an item's page."""
LAST_PLACE = 100
LEAST_FACTOR, MOST_FACTOR = 0.1, 10.0
FIRST_YEAR, LAST_YEAR = 1970, 9998
"""Within them a moment has a time in every zone."""
MOST_RULES = 1_000
"""How many rules may hold or wait at once."""
LOOK_SECONDS = 0.5
"""How soon a rule that another process made or ended counts."""
WAIT_SECONDS = 0.05
"""How long an answer waits for whoever writes rules; the rules before hold meanwhile."""
_Moment = Annotated[datetime, msgspec.Meta(tz=True)]
_ItemIds = Annotated[list[Text], msgspec.Meta(max_length=MAX_VALUES_ASKED)]


class WrongRuleError(RejectedEvent):
    """A rule that cannot be; ``field`` names what is wrong with it."""


class UnknownRuleError(ValueError):
    """There is no rule of that id."""


class EndedRuleError(ValueError):
    """The rule was ended before."""


class RuleContent(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What a rule does, where, for whom and when."""

    action: Action
    """``pin`` puts an item to a place, ``boost`` multiplies scores, ``block`` keeps items out."""
    item_ids: _ItemIds = []
    where: Values = {}
    """Instead of ``item_ids``, attribute to values: all items that have one of each, e.g. ``{"brand": ["Private"]}``."""
    place: Annotated[int, msgspec.Meta(extra_json_schema={"minimum": 1, "maximum": LAST_PLACE})] | None = None
    """Of a pin: the place in the list, counted from 1."""
    factor: Annotated[float, msgspec.Meta(extra_json_schema={"minimum": LEAST_FACTOR, "maximum": MOST_FACTOR})] | None = None
    """Of a boost: below 1 it lowers."""
    listings: list[Listing] = []
    """In which lists; none named: all, or those of an item's page where ``page_item_ids`` names pages."""
    page_item_ids: _ItemIds = []
    """On whose pages, in the lists that are about an item; none named: all."""
    condition: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    """For which customers: a condition in CEL, as segments have them."""
    begins: _Moment | None = msgspec.field(name="from", default=None)
    """From when it holds; at once if unsaid."""
    until: _Moment | None = None
    """Until when, that moment not included; until it is ended if unsaid."""
    note: Annotated[str, msgspec.Meta(max_length=500)] = ""
    """What it is for."""

    def holds(self, at: datetime) -> bool:
        """Whether *at* lies within its time."""
        return (self.begins is None or self.begins <= at) and (self.until is None or at < self.until)


class NewRule(RuleContent, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """A rule to be made, perhaps in the place of another."""

    instead_of: Text | None = None
    """The id of a rule that ends where this one begins to be."""

    def __post_init__(self) -> None:
        """Refuse what cannot be whatever the catalogue has: a ``WrongRuleError`` that names the field."""
        for field in ("item_ids", "page_item_ids"):
            check_keys((f"{field}[{k}]", text) for k, text in enumerate(getattr(self, field)))
        check_keys([("note", self.note), ("condition", self.condition)])
        for name, values in self.where.items():
            check_keys([(f"where.{name}", each) for each in (name, *values) if isinstance(each, str)] if isinstance(values, list) else [])
            if values in ([], Between()):
                raise WrongRuleError(f"where.{name}", "names no value: give at least one, or min or max of a number")
        if bool(self.item_ids) == bool(self.where):
            raise WrongRuleError("item_ids", "name either items or, under where, an attribute with its values")
        if self.action == "pin":
            if len(self.item_ids) != 1:
                raise WrongRuleError("item_ids", "a pin is of one item: make a rule for each")
            if self.place is None or not 1 <= self.place <= LAST_PLACE:
                raise WrongRuleError("place", f"a pin needs a place from 1 to {LAST_PLACE}")
        elif self.place is not None:
            raise WrongRuleError("place", f"is for a pin: leave it out of a {self.action}")
        if self.action == "boost":
            if self.factor is None or not LEAST_FACTOR <= self.factor <= MOST_FACTOR:
                raise WrongRuleError("factor", f"a boost needs a factor from {LEAST_FACTOR:g} to {MOST_FACTOR:g}")
        elif self.factor is not None:
            raise WrongRuleError("factor", f"is for a boost: leave it out of a {self.action}")
        if self.page_item_ids and (others := sorted({*self.listings} - {*ABOUT_ITEMS})):
            raise WrongRuleError("listings", f"{others[0]} is on no item's page: use {', '.join(ABOUT_ITEMS)}, or leave out page_item_ids")
        for name, moment in (("from", self.begins), ("until", self.until)):
            if moment is not None and not FIRST_YEAR <= moment.year <= LAST_YEAR:
                raise WrongRuleError(name, f"must lie in the years {FIRST_YEAR} to {LAST_YEAR}: leave it out for a rule without that bound")
        if self.begins is not None and self.until is not None and self.until <= self.begins:
            raise WrongRuleError("until", "is not after from: it would never hold")

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> NewRule:
        """The rule that plain values say.

        Raises:
            WrongRuleError: they say none.
        """
        try:
            return msgspec.convert(said, cls)
        except msgspec.ValidationError as error:
            raise mistaken(error) from None


def mistaken(error: msgspec.ValidationError) -> WrongRuleError:
    """What is wrong with values that say no rule."""
    field, reason = explain(error)
    known = {"action": Action, "listings": Listing}.get(field.partition("[")[0])
    is_told = known is None or not reason.startswith("Invalid enum value") or "use one of" in reason
    return WrongRuleError(field, reason if is_told else f"{reason}: use one of {', '.join(get_args(known))}")


class ShopRule(RuleContent, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """A rule that was made."""

    rule_id: str
    made_by: str
    """The name of the key, or the command line."""
    made_at: datetime
    ended_by: str | None = None
    ended_at: datetime | None = None

    def held(self, at: datetime) -> bool:
        """Whether it was in force at a moment: within its time, made and not ended by then."""
        return self.holds(at) and self.made_at <= at and (self.ended_at is None or at < self.ended_at)

    def state(self, at: datetime) -> Literal["in force", "waits", "over", "ended"]:
        """What becomes of it as things stand at *at*."""
        if self.ended_at is not None:
            return "ended"
        return "in force" if self.holds(at) else "waits" if self.until is None or at < self.until else "over"


_RULES = sa.Table(
    "rules",
    sa.MetaData(),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("said", sa.Text, nullable=False),
    sa.Column("made_by", sa.Text, nullable=False),
    sa.Column("made_at", BIG, nullable=False),
    sa.Column("ended_by", sa.Text),
    sa.Column("ended_at", BIG),
    sa.Index("rules_not_ended", "ended_at"),
)
_DECODE, _ENCODE = msgspec.json.Decoder(RuleContent).decode, msgspec.json.Encoder(order="sorted").encode


class Rules:
    """The rules of one installation. Those that have not ended are held in memory: a change by this process counts at once, by another
    one within a second.

    Args:
        state: what keeps them.
        check: sees that a rule fits the shop's catalogue and conditions, and raises ``WrongRuleError``.
    """

    def __init__(self, state: State, check: Callable[[NewRule], None] = lambda rule: None) -> None:
        self._database, self._check = state.database("rules", _RULES), check
        self._lock = threading.Lock()
        self._live: tuple[ShopRule, ...] = ()
        self._stamp: Hashable | None = None
        self._is_settled = True
        self._looked_at = float("-inf")
        self.unread: str | None = None
        """Why the rules cannot be read, where they cannot."""

    def add(self, rule: NewRule, by: str, at: datetime) -> ShopRule:
        """Make a rule, and end the one in whose place it comes; it counts in the next answer.

        Raises:
            WrongRuleError: it does not fit the shop, holds already, or there are too many.
            UnknownRuleError, EndedRuleError: as ``end``, of the rule that it is to replace.
        """
        self.check(rule, at)
        said = _content(rule)
        with self._database.begin() as connection:
            live = [_made(*row) for row in connection.execute(sa.select(_RULES).where(_RULES.c.ended_at.is_(None)))]
            others = [each for each in live if each.rule_id != rule.instead_of and (each.until is None or at < each.until)]
            if same := [each.rule_id for each in others if _content(each) == said]:
                raise WrongRuleError("action", f"{same[0]} says the same and is not over: end it first, or leave it")
            if len(others) >= MOST_RULES:
                raise WrongRuleError("action", f"{MOST_RULES} rules hold or wait already: end some, or name several items in one")
            if rule.instead_of is not None:
                _end(connection, rule.instead_of, by, at)
            row = {"said": said.decode(), "made_by": by, "made_at": microseconds(at)}
            number = connection.execute(sa.insert(_RULES).values(row)).inserted_primary_key[0]  # type: ignore[index]
            made = _made(*connection.execute(sa.select(_RULES).where(_RULES.c.number == number)).one())
        self._read_now()
        return made

    def check(self, rule: NewRule, at: datetime) -> None:
        """See that a rule fits the shop.

        Raises:
            WrongRuleError: it does not.
        """
        if rule.until is not None and rule.until <= at:
            raise WrongRuleError("until", "has passed already: it would never hold")
        self._check(rule)

    def end(self, rule_id: str, by: str, at: datetime) -> ShopRule:
        """End a rule; it counts in the next answer.

        Raises:
            UnknownRuleError: there is no such rule; the message names the last made.
            EndedRuleError: it was ended before.
        """
        with self._database.begin() as connection:
            ended = _end(connection, rule_id, by, at)
        self._read_now()
        return ended

    def in_force(self, at: datetime) -> list[ShopRule]:
        """The rules that hold at *at* as things stand, the last made first; of a moment gone by see ``then``."""
        return [rule for rule in self.live() if rule.holds(at)]

    def then(self, at: datetime) -> list[ShopRule]:
        """The rules that were in force at a moment gone by, those that have ended since among them, the last made first."""
        return [rule for rule in self.listed(with_ended=True) if rule.held(at)]

    def listed(self, with_ended: bool = False) -> list[ShopRule]:
        """Every rule that has not ended, or every rule there ever was, the last made first."""
        if not self._database.exists:
            return []
        query = sa.select(_RULES).order_by(_RULES.c.number.desc())
        with closing(self._database.connect()) as session:
            return [_made(*row) for row in session.read(query if with_ended else query.where(_RULES.c.ended_at.is_(None)))]

    def live(self) -> tuple[ShopRule, ...]:
        """The rules that have not ended, the last made first: always the same object as long as nothing has changed."""
        if time.monotonic() - self._looked_at > LOOK_SECONDS and self._lock.acquire(blocking=False):
            try:
                self._look()
            finally:
                self._lock.release()
        return self._live

    def _read_now(self) -> None:
        with self._lock:
            self._is_settled = False
            self._look()

    def _look(self) -> None:
        """Read the rules anew where the database has changed since they were read."""
        self._looked_at = time.monotonic()
        try:
            stamp = self._database.stamp()
            if stamp == self._stamp and self._is_settled:
                return
            # of two changes within one tick of the disk's clock the stamp shows one: what has changed is read once more at the next look
            settled = stamp == self._stamp
            live = self._read() if stamp is not None else ()
            self._live, self._stamp, self._is_settled, self.unread = live if live != self._live else self._live, stamp, settled, None
        except (SQLAlchemyError, DamagedStateError, OSError, msgspec.DecodeError) as error:
            # a look that comes in the midst of a change is followed by the next
            self.unread = f"{self._database.place} cannot be read, so the rules before hold: {error}"[:300]
            logger.warning("%s", self.unread)

    def _read(self) -> tuple[ShopRule, ...]:
        query = sa.select(_RULES).where(_RULES.c.ended_at.is_(None)).order_by(_RULES.c.number.desc())
        with closing(self._database.connect(WAIT_SECONDS, read_only=True)) as session:
            return tuple(_made(*row) for row in session.read(query))


def _content(rule: RuleContent) -> bytes:
    """What a rule says, always in the same words."""
    said = {name: getattr(rule, name) for name in RuleContent.__struct_fields__}
    moments = {name: said[name].astimezone(UTC) for name in ("begins", "until") if said[name] is not None}
    return _ENCODE(RuleContent(**{**said, **moments}))


def _made(number: int, said: str, made_by: str, made_at: int, ended_by: str | None, ended_at: int | None) -> ShopRule:
    content = _DECODE(said)
    return ShopRule(
        **{name: getattr(content, name) for name in RuleContent.__struct_fields__},
        rule_id=f"r{number}", made_by=made_by, made_at=moment_of(made_at), ended_by=ended_by,
        ended_at=None if ended_at is None else moment_of(ended_at),
    )  # fmt: skip


def _end(connection: sa.Connection, rule_id: str, by: str, at: datetime) -> ShopRule:
    number = int(rule_id[1:]) if rule_id[:1] == "r" and rule_id[1:].isdecimal() and len(rule_id) <= 10 else -1
    found = connection.execute(sa.select(_RULES).where(_RULES.c.number == number)).one_or_none()
    if found is None or f"r{number}" != rule_id:
        last = connection.execute(sa.select(sa.func.max(_RULES.c.number))).scalar()
        raise UnknownRuleError("there is no such rule: " + ("none was ever made" if last is None else f"the last made is r{last}"))
    if found.ended_at is not None:
        raise EndedRuleError(f"{rule_id} was ended before, by {found.ended_by}, {moment_of(found.ended_at):%Y-%m-%d %H:%M} UTC")
    connection.execute(sa.update(_RULES).where(_RULES.c.number == number).values(ended_by=by, ended_at=microseconds(at)))
    return _made(*connection.execute(sa.select(_RULES).where(_RULES.c.number == number)).one())
