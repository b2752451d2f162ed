"""Why: a model's contributions in a marketer's words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from iso4217 import Currency
from numpy.typing import NDArray

from models.inputs import Input


def say(feature: Input, value: float, currency: str) -> str:
    """One feature's value as a phrase; money is given in minor units and shown in major ones."""
    plain = feature.name.replace("_", " ")
    if np.isnan(value):
        return feature.unknown or f"{plain} unknown"
    if feature.either is not None:
        return feature.either[value > 0]
    if not feature.phrase:
        return f"{plain}: {value:g}"
    if "{:m}" in feature.phrase:
        return feature.phrase.replace("{:m}", money(value, currency))
    return feature.phrase.format(value)


def money(minor: float, currency: str) -> str:
    """An amount of minor units as people write it, e.g. 12.50 GBP or 1250 JPY."""
    return f"{money_units(minor, currency):.{Currency(currency).exponent or 0}f} {currency}"


def money_units(minor: float, currency: str) -> float:
    """Minor units as major ones: pence as pounds."""
    return float(minor / 10 ** (Currency(currency).exponent or 0))


def strongest(
    inputs: Sequence[Input], values: NDArray[np.float64], contributions: NDArray[np.float64], currency: str, count: int = 3
) -> list[Mapping[str, str | float]]:
    """The *count* features that moved the answer most, each with its phrase and whether it raised or lowered it."""
    order = np.argsort(-np.abs(contributions), kind="stable")[:count]
    return [
        {
            "feature": inputs[k].name,
            "text": say(inputs[k], float(values[k]), currency),
            "effect": "raises" if contributions[k] > 0 else "lowers",
            "contribution": float(contributions[k]),
        }
        for k in order
        if contributions[k] != 0.0
    ]
