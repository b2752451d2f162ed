"""A kind of model is one declaration: ``KIND`` in its file under ``models``. Whoever needs a kind finds it there by its name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

Answers = Literal["score", "items", "offers"]
"""What a kind answers: a number about a customer, a list of items, or offers."""


class UnknownKindError(ValueError):
    """There is no file for a kind of model; the message lists those that there are."""


@dataclass(frozen=True)
class ModelKind:
    """What training, serving, batch and the registry must know of a kind of model.

    Attributes:
        name: also that of its file under ``models`` and of its job under ``training``, hyphens as underscores.
        answers: what it answers.
        question: in words, for the description of the HTTP surface.
        views: the feature views that its rows come from.
        folds: of the state of the customer, what it reads.
        metrics: what it can be judged by.
        baseline: the simple model that its first champion must beat.
        load: reads a sealed folder.
        unranked: metrics that its baseline cannot be measured by.
    """

    name: str
    answers: Answers
    question: str
    views: tuple[str, ...]
    metrics: tuple[str, ...]
    baseline: str
    load: Callable[[Path], Any]
    folds: tuple[str, ...] = ()
    unranked: tuple[str, ...] = field(default=())

    @property
    def module(self) -> str:
        """The name of its file."""
        return self.name.replace("-", "_")


class Score(NamedTuple):
    """A number about a customer, and the reasons for it, strongest first."""

    value: float
    reasons: Sequence[Mapping[str, Any]]


class ScoreModel(Protocol):
    """What every model that answers with a score offers."""

    horizon_days: int
    unit: Literal["probability", "days"]
    """What its number is."""

    @property
    def source(self) -> str:
        """What computed the number."""

    def why_not(self, row: Mapping[str, Any]) -> str | None:
        """Why the question makes no sense for the customer of this feature row; None where it does."""

    def answer(self, row: Mapping[str, Any]) -> Score:
        """The score of one customer."""


def kind_named(name: str) -> ModelKind:
    """The kind of that name.

    Raises:
        UnknownKindError: no file under ``models`` declares it.
    """
    if name not in kind_names():
        raise UnknownKindError(f"there is no kind of model {name!r}: use one of {', '.join(kind_names())}")
    kind: ModelKind = importlib.import_module(f"models.{name.replace('-', '_')}").KIND
    return kind


def kind_names() -> list[str]:
    """The kinds that are declared, told without importing any."""
    folder = Path(__file__).parent
    files = [module.name for module in pkgutil.iter_modules([str(folder)]) if not module.ispkg]
    return sorted(name.replace("_", "-") for name in files if "\nKIND = ModelKind(" in (folder / f"{name}.py").read_text())
