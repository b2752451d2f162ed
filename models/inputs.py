"""What a model takes: the features it was trained on, in their order, with what each says to people. A model carries its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray


class Input(msgspec.Struct, frozen=True):
    """One feature of a model.

    Attributes:
        phrase: what it says to a marketer, with one place for the value: ``{:.0f}``, ``{:.0%}``, or ``{:m}`` for money.
        unknown: what is said where there is no value.
        either: what is said instead of a phrase where the feature is a no or a yes.
        direction: which way more of it may move the answer: 1 up, -1 down, 0 is open.
        low, high: between what its values must lie; None is open.
        is_age: it grows with the calendar, so that a drift of it says nothing.
    """

    name: str
    phrase: str = ""
    unknown: str = ""
    either: tuple[str, str] | None = None
    direction: Literal[-1, 0, 1] = 0
    low: float | None = 0.0
    high: float | None = None
    is_age: bool = False


def matrix(rows: Sequence[Mapping[str, Any]], inputs: Sequence[Input]) -> NDArray[np.float64]:
    """Feature rows as floats in the order of *inputs*; None becomes NaN.

    Raises:
        KeyError: a row lacks a feature.
    """
    names = [each.name for each in inputs]
    found = [[float("nan") if row[name] is None else float(row[name]) for name in names] for row in rows]
    return np.array(found, dtype=np.float64).reshape(-1, len(names))


def read_inputs(about: Mapping[str, Any]) -> tuple[Input, ...]:
    """The inputs that an artifact describes; one of the time before models carried theirs tells their names alone."""
    if "inputs" in about:
        return msgspec.convert(about["inputs"], tuple[Input, ...])
    return tuple(Input(name) for name in about["features"])
