"""Conditions in CEL, the Common Expression Language, over what is known of a customer and of the question: checked before they count."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import cel

from features.definitions.domain import Domain
from features.definitions.folds.registered import FOLDS

ValueKind = Literal["number", "text", "truth", "list"]
Names = Mapping[str, ValueKind]
"""What a condition may name, and what each holds."""
MAX_LENGTH = 2_000
MAX_MACROS = 2
"""How often a condition may go through a list: within each other they cost as much as the lists' product."""
_MACRO = re.compile(r"\.\s*(?:all|exists|exists_one|map|filter)\s*\(\s*([A-Za-z_]\w*)\s*,")
_SAMPLES: dict[ValueKind, Any] = {"number": 1.0, "text": "x", "truth": True, "list": ["x"]}
_KINDS: dict[str, ValueKind] = {
    "integer": "number", "float": "number", "text": "text", "truth": "truth", "integers": "list", "floats": "list", "texts": "list",
}  # fmt: skip
OF_THE_QUESTION: Names = {
    "channel": "text", "store_id": "text", "hour": "number", "weekday": "number", "month": "number", "day": "number",
}  # fmt: skip
"""What every question tells: ``hour`` (0 to 23), ``weekday`` (1 is Monday), ``month`` and ``day`` of the month are the shop's own."""


class ConditionError(ValueError):
    """A condition is no CEL, names what is not known, or gives neither true nor false; the message says which."""


@dataclass(frozen=True)
class CelCondition:
    """One condition, compiled; two of the same text are equal."""

    text: str
    names: frozenset[str]
    program: Any = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CelCondition) and other.text == self.text

    def __hash__(self) -> int:
        return hash(self.text)

    @classmethod
    def parse(cls, text: str, names: Names) -> CelCondition:
        """Compile *text*, which may name what *names* holds.

        Raises:
            ConditionError: see there.
        """
        if len(text) > MAX_LENGTH:
            raise ConditionError(f"is longer than {MAX_LENGTH} characters")
        try:
            program = cel.compile(text)
        except (ValueError, RuntimeError) as error:
            raise ConditionError(f"is no CEL expression: {_first_line(error)}") from None
        if len(of_macros := _MACRO.findall(text)) > MAX_MACROS:
            raise ConditionError(f"goes through lists more than {MAX_MACROS} times: make it simpler")
        used = frozenset(program.variables()) - frozenset(of_macros)
        if unknown := sorted(used - names.keys()):
            near = difflib.get_close_matches(unknown[0], names, 3)
            known = f"such as {', '.join(near)}" if near else "of which `python -m features list` tells"
            raise ConditionError(f"names {unknown[0]!r}, which is neither a feature nor a segment nor declared: use one {known}")
        try:
            given = program.execute({name: _SAMPLES[names[name]] for name in used})
        except (TypeError, RuntimeError) as error:
            # KeyError and ValueError depend on values; what the types do not allow never works
            raise ConditionError(f"cannot be computed: {_first_line(error)}") from None
        except (KeyError, ValueError):
            given = True
        if not isinstance(given, bool):
            raise ConditionError(f"gives {type(given).__name__}, neither true nor false: compare it with something")
        return cls(text, used, program)

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether it is true of *values*; false where something that decides it is not known."""
        try:
            told = {name: known(values.get(name)) for name in self.names}
            return self.program.execute(told) is True
        except (TypeError, RuntimeError, KeyError, ValueError):
            return False


def known(value: Any) -> Any:
    """A value as a condition reads it: numbers are all of one type, what is not known is null."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int | float):
        return None if math.isnan(value) else float(value)
    if isinstance(value, str):
        return value
    return [known(each) for each in value]


def names_of(domain: Domain, more: Names) -> dict[str, ValueKind]:
    """What conditions of a shop of that domain may name: features of the customer, what the question tells, and *more*."""
    features: dict[str, ValueKind] = {feature.name: _KINDS[feature.dtype] for feature in domain.customer}
    folded: dict[str, ValueKind] = {output.name: _KINDS[output.dtype] for fold in FOLDS for output in fold.outputs}
    return {**folded, **features, **OF_THE_QUESTION, **more}


def folds_of(names: frozenset[str]) -> tuple[str, ...]:
    """The folds that tell any of these names."""
    return tuple(fold.name for fold in FOLDS if names & {output.name for output in fold.outputs})


def _first_line(error: Exception) -> str:
    return " ".join(str(error).splitlines()[0].split())[:200]
