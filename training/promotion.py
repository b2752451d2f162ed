"""Which version serves: the rule that a challenger must pass, and the note of every time a version became the champion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pandas as pd

from features.state.clock import Clock, system_clock
from models.registry import Crowning, Promotion, Registry
from training.evaluation import Lead, leads, same_rows
from training.metrics import Estimate


class NotPromotedError(ValueError):
    """The rule does not let this version become the champion; the message holds the numbers."""


@dataclass(frozen=True)
class Verdict:
    """What the rule says of a challenger.

    Attributes:
        passed: whether it may become the champion.
        reason: one sentence with the numbers.
        leads: by metric, the promotion metric first; empty where there was nothing to compare with.
    """

    passed: bool
    reason: str
    leads: dict[str, Lead] = field(default_factory=dict)


def first(promotion: Promotion, lead: Estimate, beaten: str | None = None) -> Verdict:
    """The first champion must beat its simple baseline, and no other model of its own table may beat it; *beaten* says which does."""
    told = f"{promotion.metric}: lead over {promotion.baseline} {lead}"
    if not lead.low > 0:
        return Verdict(False, f"{told}, which may be noise; there is no champion to serve")
    if beaten:
        return Verdict(False, f"{told}, but {beaten}; there is no champion to serve")
    return Verdict(True, told)


def beaten_by(rivals: Mapping[str, Estimate]) -> str | None:
    """Which model of its own table lies clearly above the one to be served: the whole interval of the lead below zero."""
    clearly = {name: lead for name, lead in rivals.items() if lead.high < 0}
    if not clearly:
        return None
    worst = min(clearly, key=lambda name: clearly[name].value)
    return f"{worst} of its own table is better: lead over it {clearly[worst]}"


def rival(
    promotion: Promotion,
    champion: int,
    ours: pd.DataFrame,
    theirs: pd.DataFrame | None,
    beaten: str | None = None,
) -> Verdict:
    """A standing champion is replaced only by a clearly better one on the same customers, with no guard metric falling, and by none
    that another model of its own table beats.

    One paired bootstrap over a horizon fixed beforehand: the whole interval of the lead lies above zero, and of each guard
    metric above minus its margin.
    """
    both = None if theirs is None else same_rows(ours, theirs)
    if both is None:
        return Verdict(
            False, f"champion {champion} was judged on other cuts or for another horizon, and has learnt from these: nothing to compare on"
        )
    found = leads(both, [promotion.metric, *promotion.guards], promotion.draws, promotion.level)
    main = found[promotion.metric].lead
    told = f"{promotion.metric}: lead over champion {champion} {main} on {len(both)} rows"
    fallen = [
        f"guard {name}: {found[name].lead}, its lower bound below -{margin}"
        for name, margin in promotion.guards.items()
        if not found[name].lead.low > -margin
    ]
    if not main.low > 0:
        return Verdict(False, f"{told}, which may be noise", found)
    if fallen:
        return Verdict(False, f"{told}, but {'; '.join(fallen)}", found)
    if beaten:
        return Verdict(False, f"{told}, but {beaten}", found)
    held = ", ".join(f"{name} {found[name].lead}" for name in promotion.guards)
    return Verdict(True, told + (f"; guards held: {held}" if held else ""), found)


def promote(registry: Registry, model: str, version: int, verdict: Verdict, forced_because: str | None, clock: Clock = system_clock) -> str:
    """Make *version* the champion if the verdict allows or a reason to force it is given; returns what was done.

    Raises:
        NotPromotedError: the rule was not passed and no reason given.
    """
    if verdict.passed:
        registry.promote(model, version, clock(), "rule", verdict.reason)
        return f"Version {version} is the champion ({verdict.reason})."
    if forced_because is None:
        raise NotPromotedError(
            f"{model} version {version} is not promoted: {verdict.reason}. "
            "To do it all the same: --force --reason 'why', which is recorded."
        )
    registry.promote(model, version, clock(), "forced", f"{forced_because} (the rule said: {verdict.reason})")
    return f"Version {version} is the champion, forced: {forced_because} (the rule said: {verdict.reason})."


def standing(crownings: list[Crowning]) -> list[int]:
    """The champions of which each replaced the one before it and was not rolled back since, oldest first."""
    stack: list[int] = []
    for crowning in crownings:
        if crowning.how == "rollback" and crowning.version in stack:
            del stack[stack.index(crowning.version) + 1 :]
        elif not stack or stack[-1] != crowning.version:
            stack.append(crowning.version)
    return stack


def rollback(registry: Registry, model: str, reason: str, clock: Clock = system_clock) -> str:
    """Give the place back to the champion before the present one; returns what was done.

    Raises:
        NotPromotedError: there was none before.
    """
    champions = standing(registry.crownings(model))
    if len(champions) < 2:
        raise NotPromotedError(f"{model} has had no champion before the present one: there is nothing to roll back to")
    *_, before, now = champions
    registry.promote(model, before, clock(), "rollback", reason)
    return f"Version {before} is the champion again, in place of {now}: {reason}."
