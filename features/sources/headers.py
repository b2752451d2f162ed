"""What the header of a column tells, by the words in ``headers.yaml``: in five languages, and in the exports of common shop software."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import msgspec

from features.catalogue.yaml_file import load_yaml
from features.events.event import EventName
from features.sources.segment import EVENT_NAMES as SEGMENTS_NAMES

Content = Literal["text", "time", "number"]
"""What a column must hold to be taken: ``text`` may be numbers too, but no times."""
_HUMP = re.compile(r"(?<=[a-z])(?=[A-Z])")
_SIGNS = str.maketrans({"°": " ", "º": " ", "ß": "ss"})


def plain_header(name: str) -> str:
    """A header in small letters without accents and signs: ``N° Scontrino`` is ``n scontrino``, ``CustomerID`` is ``customer id``."""
    spelled = unicodedata.normalize("NFKD", _HUMP.sub(" ", name).translate(_SIGNS))
    letters = "".join(c for c in spelled if not unicodedata.combining(c)).lower()
    return " ".join(re.sub(r"[^\w]|_", " ", letters).split())


class HeaderRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a column is known that plays one role: the patterns of its plain header, the surest first, and what it never holds."""

    patterns: tuple[tuple[str, ...], ...]
    never: tuple[str, ...] = ()
    content: Content = "text"

    def rank(self, header: str) -> int | None:
        """How sure a plain header is, 0 the surest; None where it is none."""
        if any(re.search(pattern, header) for pattern in self.never):
            return None
        return next((rank for rank, told in enumerate(self.patterns) if any(re.search(pattern, header) for pattern in told)), None)


class Tongue(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A language by words of its headers, with the time zone, currency and country that are likely where it is spoken."""

    words: str
    zone: str
    currency: str
    country: str


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    words: dict[str, str]
    rules: dict[str, HeaderRule]
    languages: tuple[Tongue, ...]
    channels: dict[str, tuple[str, ...]]
    events: dict[EventName, tuple[str, ...]]
    cancelled: frozenset[str]


@dataclass(frozen=True)
class Headers:
    """All that ``headers.yaml`` says.

    Attributes:
        rules: by role (``event.id``), and by other names for what is no role of its own (``unit_price``), in the order to ask.
        channels, events: by the plain name that shops write, ours.
        cancelled: the plain words for an order that was none in the end.
    """

    rules: Mapping[str, HeaderRule]
    languages: tuple[Tongue, ...]
    channels: Mapping[str, str]
    events: Mapping[str, str]
    cancelled: frozenset[str]

    def tongue(self, columns: Iterable[str]) -> Tongue | None:
        """The language that most headers are in; None where they could be in English."""
        plain = [plain_header(column) for column in columns]
        counted = {each: sum(bool(re.search(each.words, header)) for header in plain) for each in self.languages}
        likeliest = max(counted, key=counted.__getitem__)
        return likeliest if counted[likeliest] >= 2 else None


@cache
def known_headers() -> Headers:
    """What ships with ubiquo.

    Raises:
        msgspec.ValidationError: the file says what it may not.
    """
    said = msgspec.convert(load_yaml(Path(__file__).with_name("headers.yaml").read_bytes()), _File)
    rules = {}
    for name, rule in said.rules.items():
        patterns = tuple(tuple(_spelled_out(pattern, said.words) for pattern in told) for told in rule.patterns)
        rules[name] = msgspec.structs.replace(rule, patterns=patterns)
    events = {name.replace("_", " "): name for name in get_args(EventName)} | dict(SEGMENTS_NAMES)
    events |= {theirs: ours for ours, names in said.events.items() for theirs in names}
    channels = {theirs: ours for ours, names in said.channels.items() for theirs in names}
    return Headers(rules, said.languages, channels, events, said.cancelled)


def _spelled_out(pattern: str, words: Mapping[str, str]) -> str:
    for name, told in words.items():
        pattern = pattern.replace(name, f"({told.replace(' |', '|')})")
    return pattern
