"""The models' reasons in the reader's language. Models speak English; what they say is made of few phrases, which are found again here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache

from serving.console.catalog import catalog

_FIELD = re.compile(r"\{[^{}]*\}")
_DECIMAL = re.compile(r"\d+\.\d+(%?)")
APART = "; "
"""What stands between two reasons."""


@lru_cache(8192)
def reason(text: str, language: str) -> str:
    """What a model said, in *language*; as it said it where no phrase fits."""
    book = _book(language)
    if not book:
        return text
    return APART.join(_said(part, language, book) for part in text.split(APART))


def _said(text: str, language: str, book: Sequence[tuple[re.Pattern[str], str]]) -> str:
    exact = catalog(language).get(text)
    if exact is not None:
        return exact
    if _DECIMAL.fullmatch(text):
        # both languages that there are beside English write a comma
        return text.replace(".", ",")
    for pattern, translated in book:
        if found := pattern.fullmatch(text):
            values = [_said(value, language, book) for value in found.groups()]
            parts = _FIELD.split(translated)
            return parts[0] + "".join(value + part for value, part in zip(values, parts[1:], strict=True))
    return text


@cache
def _book(language: str) -> Sequence[tuple[re.Pattern[str], str]]:
    """Every phrase with places for values, as a pattern of what it makes, with its translation; the longest first."""
    phrases: Mapping[str, str] = {text: said for text, said in catalog(language).items() if _FIELD.search(text)}
    return [(_pattern(text), phrases[text]) for text in sorted(phrases, key=len, reverse=True)]


def _pattern(phrase: str) -> re.Pattern[str]:
    parts = _FIELD.split(phrase)
    fields = _FIELD.findall(phrase)
    made = re.escape(parts[0])
    for field, part in zip(fields, parts[1:], strict=True):
        # a number or an amount of money, as {:.0f} and {:m} write them; or a name, or a phrase within
        made += (r"(-?[\d.,]+%?(?: [A-Z]{3})?)" if ":" in field else "(.+?)") + re.escape(part)
    return re.compile(made)
