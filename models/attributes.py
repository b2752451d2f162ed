"""What is known of items, by catalogue position, to filter by: texts, numbers and lists of texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from models.spelling import Spelling

Truths = NDArray[np.bool_]
Arrays = Mapping[str, NDArray[Any]]


class Range(NamedTuple):
    """The numbers from *low* to *high*, both included; None is open."""

    low: float | None = None
    high: float | None = None


Wish = frozenset[str] | Range
"""Of which values an attribute must, or must not, have one."""


class WrongWishError(ValueError):
    """A wish does not fit the attribute; the message says what does."""


class Attribute(Protocol):
    """One attribute of all items."""

    kind: Literal["text", "number", "list"]

    def fits(self, wish: Wish, positions: NDArray[np.intp]) -> Truths:
        """Which items at *positions* have one of the values; what is unknown has none.

        Raises:
            WrongWishError: the wish is of another kind.
        """
        ...

    def arrays(self) -> Arrays:
        """What is to be kept, beside ``words``."""
        ...

    @property
    def words(self) -> list[str]:
        """The vocabulary, for what is coded."""
        ...

    def first(self, count: int) -> Attribute:
        """That of the first *count* items."""
        ...


class TextAttribute:
    """One text an item, or none."""

    kind: Literal["text", "number", "list"] = "text"

    def __init__(self, codes: NDArray[np.int32], words: list[str]) -> None:
        self.codes, self._words = codes, words
        self._code = {word: k for k, word in enumerate(words)}
        self.spelling = Spelling(words)

    @classmethod
    def of(cls, values: Sequence[str | None]) -> TextAttribute:
        """From one value an item."""
        words = sorted({value for value in values if value is not None})
        code = {word: k for k, word in enumerate(words)}
        return cls(np.array([-1 if value is None else code[value] for value in values], np.int32), words)

    @property
    def words(self) -> list[str]:
        """Every text that an item has."""
        return self._words

    def fits(self, wish: Wish, positions: NDArray[np.intp]) -> Truths:
        """Whose text is one of the wish."""
        if not self._words:
            # of nothing but unknown values nobody can say what they would be
            return np.zeros(len(positions), bool)
        if isinstance(wish, Range):
            raise WrongWishError("it holds texts: give a list of them")
        return np.isin(self.codes[positions], self.codes_of(wish))

    def knows(self, word: str) -> bool:
        """Whether any item has that text."""
        return word in self._code

    def codes_of(self, wish: frozenset[str]) -> list[int]:
        """The codes of those words of a wish that any item has."""
        return [code for word in wish if (code := self._code.get(word)) is not None]

    def arrays(self) -> Arrays:
        """The code of each item."""
        return {"codes": self.codes}

    def first(self, count: int) -> TextAttribute:
        """The texts of the first items."""
        return TextAttribute(self.codes[:count], self._words)

    def at(self, position: int) -> str | None:
        """The text of one item."""
        return self._words[self.codes[position]] if self.codes[position] >= 0 else None


class NumberAttribute:
    """One number an item; NaN is unknown."""

    kind: Literal["text", "number", "list"] = "number"

    def __init__(self, values: NDArray[np.float64]) -> None:
        self.values = values

    @property
    def words(self) -> list[str]:
        """None: numbers are not coded."""
        return []

    def fits(self, wish: Wish, positions: NDArray[np.intp]) -> Truths:
        """Whose number is one of the wish, or within its range."""
        here = self.values[positions]
        if isinstance(wish, Range):
            low, high = -np.inf if wish.low is None else wish.low, np.inf if wish.high is None else wish.high
            return np.asarray((here >= low) & (here <= high))
        try:
            return np.isin(here, [float(value) for value in wish])
        except ValueError:
            raise WrongWishError("it holds numbers: give numbers, or a range as min and max") from None

    def first(self, count: int) -> NumberAttribute:
        """The numbers of the first items."""
        return NumberAttribute(self.values[:count])

    def arrays(self) -> Arrays:
        """The numbers."""
        return {"values": self.values}


class ListAttribute:
    """Any number of texts an item."""

    kind: Literal["text", "number", "list"] = "list"

    def __init__(self, offsets: NDArray[np.int64], codes: NDArray[np.int32], words: list[str]) -> None:
        self.offsets, self.codes, self._words = offsets, codes, words
        self._code = {word: k for k, word in enumerate(words)}
        self.spelling = Spelling(words)

    @classmethod
    def of(cls, values: Sequence[Sequence[str] | None]) -> ListAttribute:
        """From one list an item."""
        words = sorted({word for value in values for word in (value if value is not None else ())})
        code = {word: k for k, word in enumerate(words)}
        lists = [[code[word] for word in (value if value is not None else ())] for value in values]
        offsets = np.cumsum([0, *map(len, lists)]).astype(np.int64)
        return cls(offsets, np.array([k for each in lists for k in each], np.int32), words)

    @property
    def words(self) -> list[str]:
        """Every text that an item has."""
        return self._words

    def fits(self, wish: Wish, positions: NDArray[np.intp]) -> Truths:
        """Who has any text of the wish."""
        if isinstance(wish, Range):
            raise WrongWishError("it holds lists of texts: give a list of them")
        wanted = [code for word in wish if (code := self._code.get(word)) is not None]
        starts, sizes = self.offsets[positions], self.offsets[positions + 1] - self.offsets[positions]
        owners = np.repeat(np.arange(len(positions)), sizes)
        # the codes of these items alone, one after the other
        at = np.arange(len(owners)) - np.repeat(np.cumsum(sizes) - sizes, sizes) + np.repeat(starts, sizes)
        kept = np.zeros(len(positions), bool)
        kept[owners[np.isin(self.codes[at], wanted)]] = True
        return kept

    def knows(self, word: str) -> bool:
        """Whether any item has that text."""
        return word in self._code

    def at(self, position: int) -> list[str]:
        """The texts of one item."""
        return [self._words[code] for code in self.codes[self.offsets[position] : self.offsets[position + 1]]]

    def first(self, count: int) -> ListAttribute:
        """The lists of the first items."""
        return ListAttribute(self.offsets[: count + 1], self.codes[: self.offsets[count]], self._words)

    def arrays(self) -> Arrays:
        """Where each item's codes begin, and the codes."""
        return {"offsets": self.offsets, "codes": self.codes}


class Attributes:
    """All attributes of the items of a catalogue."""

    def __init__(self, columns: Mapping[str, Attribute]) -> None:
        self.columns = dict(columns)

    @classmethod
    def of(cls, columns: Mapping[str, Sequence[Any]]) -> Attributes:
        """From one column of values an attribute; what it holds is told by the first value that is there."""
        return cls({name: _attribute(values) for name, values in columns.items()})

    def __getitem__(self, name: str) -> Attribute:
        return self.columns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def text(self, name: str, position: int) -> str | None:
        """A text attribute of one item; None where it has none."""
        column = self.columns.get(name)
        return column.at(position) if isinstance(column, TextAttribute) else None

    def keep(self, include: Mapping[str, Wish], exclude: Mapping[str, Wish], positions: NDArray[np.intp]) -> Truths:
        """Which items have every included and no excluded value."""
        kept = np.ones(len(positions), bool)
        for name, wish in include.items():
            kept &= self.columns[name].fits(wish, positions)
        for name, wish in exclude.items():
            kept &= ~self.columns[name].fits(wish, positions)
        return kept

    def check(self, name: str, wish: Wish) -> None:
        """See that a wish can be answered.

        Raises:
            WrongWishError: there is no such attribute, or it holds something else.
        """
        if name not in self.columns:
            near = Spelling(self.columns).nearest(name)
            hint = f": did you mean {near!r}?" if near is not None else ""
            raise WrongWishError(f"{name!r} is not an attribute to filter by: use one of {', '.join(self.columns)}{hint}")
        self.columns[name].fits(wish, np.empty(0, np.intp))

    def unknown(self, name: str, wish: Wish) -> Iterator[tuple[str, str | None]]:
        """The texts of a wish that no item has, by alphabet, each with the nearest that one has; the wish fits the attribute."""
        column = self.columns[name]
        if isinstance(wish, Range) or isinstance(column, NumberAttribute):
            return
        assert isinstance(column, TextAttribute | ListAttribute)
        # whoever asks takes the first few: no further ones are looked for
        for word in sorted(word for word in wish if not column.knows(word)):
            yield word, column.spelling.nearest(word)

    def first(self, count: int) -> Attributes:
        """Those of the first *count* items."""
        return Attributes({name: column.first(count) for name, column in self.columns.items()})

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything to keep as arrays, under ``<array>_<name>``."""
        return {f"{key}_{name}": array for name, column in self.columns.items() for key, array in column.arrays().items()}

    def about(self) -> dict[str, dict[str, Any]]:
        """Everything to keep beside: kind and vocabulary."""
        return {name: {"kind": column.kind, "words": column.words} for name, column in self.columns.items()}

    @classmethod
    def read(cls, about: Mapping[str, Any], arrays: Arrays) -> Attributes:
        """The inverse of ``about`` and ``arrays``; of the time before there were kinds, ``about`` is a vocabulary of texts."""
        columns: dict[str, Attribute] = {}
        for name, told in about.items():
            kind, words = (told["kind"], told["words"]) if isinstance(told, dict) else ("text", told)
            if kind == "text":
                columns[name] = TextAttribute(arrays[f"codes_{name}"], words)
            elif kind == "number":
                columns[name] = NumberAttribute(arrays[f"values_{name}"])
            else:
                columns[name] = ListAttribute(arrays[f"offsets_{name}"], arrays[f"codes_{name}"], words)
        return cls(columns)


def _attribute(values: Sequence[Any]) -> Attribute:
    first = next((value for value in values if value is not None), None)
    if isinstance(first, int | float) and not isinstance(first, bool):
        return NumberAttribute(np.array([np.nan if value is None else float(value) for value in values]))
    if isinstance(first, str) or first is None:
        return TextAttribute.of(values)
    return ListAttribute.of(values)
