"""The lists that a shop shows, as pages tell of them: what each is called, why an item stands where it does, and what a rule changes."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

import msgspec

from models.recommender.listings import Listing
from models.recommender.recipes import RECIPES
from serving.console.words import Words
from serving.decide.questions import RecommendationsRequest
from serving.decide.rules import ABOUT_ITEMS, NewRule, RuleContent, ShopRule
from serving.runtime import Runtime

APART = ", "
"""What stands between two sources of an item."""


@dataclass(frozen=True)
class ListName:
    """One list in the reader's language.

    Attributes:
        title: what to call it.
        about: what it holds.
        needs_item: whether it is about an item that the question names.
    """

    title: str
    about: str
    needs_item: bool


class ListChange(NamedTuple):
    """An item of a list, and by how many places it has moved up since another list; None where it was not there."""

    item: Mapping[str, Any]
    up: int | None


def list_names(words: Words) -> dict[Listing, ListName]:
    """Every list there is."""
    say = words.say
    titles: dict[Listing, str] = {
        "for_you": say("For you"),
        "also_like": say("You may also like"),
        "similar": say("Similar items"),
        "bought_together": say("Bought together"),
        "buy_again": say("Buy again"),
        "up_sell": say("Up-sell"),
        "trending": say("Trending"),
        "basket": say("To go with the basket"),
        "session": say("As looked at in this visit"),
        "email": say("For an e-mail"),
    }
    return {name: ListName(title, words.say(RECIPES[name].about), name in ABOUT_ITEMS) for name, title in titles.items()}


def source_said(source: str, words: Words) -> str:
    """Where an item of a list comes from, in the reader's language."""
    return APART.join(words.say(part) for part in source.split(APART))


def answered_under(runtime: Runtime, model: str, question: Mapping[str, Any], rules: Sequence[ShopRule], at: datetime) -> dict[str, Any]:
    """What would be answered under these rules, the strongest first. Nothing is promised, and nothing logged."""
    engine = runtime.engine.under(rules)
    request = msgspec.convert({**question, "dry_run": True}, RecommendationsRequest)
    who = runtime.who(request.customer_id)
    row = runtime.reader.row(engine.reading(model), who.customer_id, at, engine.reads(model, request.reached_by))
    answer, _ = engine.recommendations(model, request, who, row, at)
    return dict(msgspec.to_builtins(answer))


def tried(rule: NewRule, at: datetime) -> ShopRule:
    """The rule as if it had been made, and its time had come."""
    content = {name: getattr(rule, name) for name in RuleContent.__struct_fields__}
    # what a rule reaches is kept by its id: each trial is another rule
    return ShopRule(**{**content, "begins": None, "until": None}, rule_id=f"tried-{uuid.uuid4().hex}", made_by="", made_at=at)


def changes(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> list[ListChange]:
    """The items of a list with what has become of each since the list before."""
    was = {item["item_id"]: place for place, item in enumerate(before)}
    return [ListChange(item, was[item["item_id"]] - place if item["item_id"] in was else None) for place, item in enumerate(after)]
