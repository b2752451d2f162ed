"""From the values that a question or a rule names to what the attributes of a catalogue are asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice

from models.attributes import Attributes, Range, Wish, WrongWishError
from serving.decide.questions import Between, UnknownAttributeError

MAX_NOTES = 5
"""How many values that nothing has are told of one question."""


Asked = Mapping[str, Sequence[str | float] | Between]


def wishes_of(field: str, values: Asked, attributes: Attributes) -> dict[str, Wish]:
    """By attribute what an item must, or must not, have; *field* is what mistakes are told of.

    Raises:
        UnknownAttributeError: there is no such attribute, or it holds something else.
    """
    wanted: dict[str, Wish] = {}
    for name, wish in values.items():
        wanted[name] = Range(wish.min, wish.max) if isinstance(wish, Between) else frozenset(map(plain, wish))
        try:
            attributes.check(name, wanted[name])
        except WrongWishError as error:
            raise UnknownAttributeError(f"{field}.{name}", str(error)) from None
    return wanted


def plain(value: str | float) -> str:
    """A value as a catalogue writes it: a whole number without a point."""
    return value if isinstance(value, str) else f"{int(value)}" if value.is_integer() else f"{value}"


def notes_on(include: Asked, exclude: Asked, attributes: Attributes) -> list[str]:
    """Which values of a question's filters nothing in the catalogue has: an answer all the same, for tomorrow something may."""
    notes: list[str] = []
    for field, wishes in (("include", include), ("exclude", exclude)):
        for name, wish in wishes.items():
            if isinstance(wish, Between):
                continue
            for value, near in islice(attributes.unknown(name, frozenset(map(plain, wish))), MAX_NOTES - len(notes)):
                hint = f": did you mean {near!r}?" if near is not None else ""
                notes.append(f"{field}.{name}: nothing in the catalogue has {value!r}{hint}")
    return notes
