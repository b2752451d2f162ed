"""What somebody may have meant who wrote a name that is not known."""

from __future__ import annotations

import difflib
import re
from functools import lru_cache
from typing import Any

import msgspec.inspect

LONGEST = 64
"""Characters of a name for which another is looked for: a longer one costs more than the hint is worth."""
LIKE = 0.7
"""How alike two names must be, as a share of their letters."""
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_NO_LETTER = re.compile(r"[^a-z0-9]+")


@lru_cache(maxsize=4_096)
def nearest(said: str, known: tuple[str, ...]) -> str | None:
    """The known name that *said* resembles most: the same but for case, humps and dots, else one that few letters part from it."""
    if len(said) > LONGEST:
        return None
    plain = {_plain(name): name for name in known}
    if (same := plain.get(_plain(said))) is not None:
        return same
    found = difflib.get_close_matches(_plain(said), plain, 1, LIKE)
    return plain[found[0]] if found else None


def meant(said: str, known: tuple[str, ...]) -> str:
    """The end of a message about *said*: ``: did you mean 'page_view'?``, or nothing."""
    found = nearest(said, known)
    return f": did you mean {found!r}?" if found is not None else ""


def meant_field(said: str, path: str, shape: Any) -> str:
    """The end of a message about *said*, a field at *path* that the type *shape* does not have."""
    fields, words = words_of(shape)
    kinds = words.get("identifiers", ())
    kind, field = nearest(said, kinds), nearest(said, fields)
    if path != "identifiers" and kind is not None and (field is None or _plain(said) == _plain(kind) != _plain(field)):
        # what names a customer stands one floor below
        return f": did you mean {f'identifiers.{kind}'!r}?"
    return meant(said, fields)


def _plain(name: str) -> str:
    return _NO_LETTER.sub("_", _HUMP.sub("_", name).lower()).strip("_")


@lru_cache(maxsize=256)
def words_of(shape: Any) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """The names of all fields within a type, and by field the words that may stand in it (of a mapping, as its keys)."""
    fields: dict[str, None] = {}
    words: dict[str, tuple[str, ...]] = {}
    waiting: list[tuple[str, Any]] = [("", msgspec.inspect.type_info(shape))]
    seen: set[Any] = set()
    while waiting:
        name, found = waiting.pop()
        if isinstance(found, msgspec.inspect.LiteralType):
            words.setdefault(name, tuple(str(value) for value in found.values))
        elif isinstance(found, msgspec.inspect.StructType) and found.cls not in seen:
            seen.add(found.cls)
            fields.update(dict.fromkeys(field.encode_name for field in found.fields))
            waiting += [(field.encode_name, field.type) for field in found.fields]
        elif isinstance(found, msgspec.inspect.DictType):
            waiting += [(name, found.key_type), (name, found.value_type)]
        elif isinstance(found, msgspec.inspect.UnionType):
            waiting += [(name, each) for each in found.types]
        elif isinstance(found, msgspec.inspect.Metadata):
            waiting.append((name, found.type))
        elif isinstance(found, msgspec.inspect.ListType | msgspec.inspect.VarTupleType):
            waiting.append((name, found.item_type))
    return tuple(fields), words
