"""The folds that there are, and one customer's state under all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from features.definitions.feature import Moment
from features.definitions.folds.cart import CartFold
from features.definitions.folds.daily_activity import DailyActivityFold
from features.definitions.folds.fold import Fold, OutdatedStateError, Touch
from features.definitions.folds.history import HistoryFold
from features.definitions.folds.last_touch import LastTouchFold
from features.definitions.folds.messages import MessagesFold
from features.definitions.folds.session import SessionFold

FOLDS: tuple[Fold[Any], ...] = (HistoryFold(), SessionFold(), CartFold(), LastTouchFold(), DailyActivityFold(), MessagesFold())
NAMES = tuple(fold.name for fold in FOLDS)


class CustomerState:
    """What all folds keep of one customer; a fold's state is read once it is asked for."""

    def __init__(self, texts: Mapping[str, str | None] | None = None) -> None:
        self._texts = dict(texts or {})
        self._states: dict[str, Any] = {}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> CustomerState:
        """The state that a row of ``customer_state`` holds; an unknown customer's row of nulls gives an empty one."""
        return cls({name: row.get(name) for name in NAMES})

    def to_row(self) -> dict[str, str]:
        """The columns of ``customer_state``.

        Raises:
            OutdatedStateError: another definition made one of them.
        """
        return {fold.name: fold.encode(self._state(fold)) for fold in FOLDS}

    def step(self, touch: Touch) -> CustomerState:
        """Take in one more event; changes this state, and returns it."""
        for fold in FOLDS:
            if fold.reads is None or touch.name in fold.reads:
                fold.step(self._state(fold), touch)
        return self

    def joined(self, other: CustomerState) -> CustomerState:
        """The state of a customer who proved to be both."""
        both = CustomerState()
        both._states = {fold.name: fold.joined(self._state(fold), other._state(fold)) for fold in FOLDS}
        return both

    def features(self, moment: Moment, folds: Sequence[str] = NAMES) -> dict[str, Any]:
        """What the folds of those names tell at *moment*."""
        told: dict[str, Any] = {}
        for fold in FOLDS:
            if fold.name in folds:
                told |= fold.features(self._state(fold), moment)
        return told

    def check(self) -> None:
        """See that every state was made by the fold's present definition.

        Raises:
            OutdatedStateError: one was not.
        """
        for fold in FOLDS:
            self._state(fold)

    def _state(self, fold: Fold[Any]) -> Any:
        if fold.name not in self._states:
            self._states[fold.name] = fold.decode(self._texts.get(fold.name))
        return self._states[fold.name]


def nothing(folds: Sequence[str] = NAMES) -> dict[str, Any]:
    """What the folds tell where there is no customer."""
    return {name: value for fold in FOLDS if fold.name in folds for name, value in fold.nothing().items()}


__all__ = ["FOLDS", "NAMES", "CustomerState", "OutdatedStateError", "Touch", "nothing"]
