"""YAML files that people write: read whole into a type, every mistake with its line, its field and its fix."""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec
import yaml

from features.events.event import explain

T = TypeVar("T")


HINTS = {
    "[smhd]": "is no duration: write 30s, 5m, 12h or 7d",
    "^[a-z][a-z0-9-]": "use small letters, digits and hyphens, a letter first",
    "^([01]": 'is no time of day: write it like "21:00"',
    "^https?:": "is no address of a web server: write it like https://example.org/hook",
}
"""What is to be written in place of what a pattern refuses, by a part of the pattern."""


class WrittenError(ValueError):
    """A file that somebody wrote cannot be read, or says something that it may not; the message names line, field and fix."""


def read_yaml(text: bytes, name: str, into: type[T]) -> T:
    """What a text says, as *into*; *name* is what messages call it.

    Raises:
        WrittenError: it is no YAML, or a field is not known or says something that it may not.
    """
    try:
        said = load_yaml(text) or {}
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise WrittenError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None
    try:
        return msgspec.convert(said, into)
    except msgspec.ValidationError as error:
        field, reason = explain(error, into)
        reason = next((hint for pattern, hint in HINTS.items() if pattern in reason), reason)
        raise wrong(text, name, _with_key(said, into, field), reason) from None


class _Loader(yaml.SafeLoader):
    """YAML 1.2 in its plain values: ``on``, ``off``, ``yes`` and ``no`` are words, and 21:00 is no number of minutes."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that stands twice: which of both was meant?"""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_OTHERWISE = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:int")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag not in _OTHERWISE]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def load_yaml(text: bytes) -> Any:
    """What a YAML text says.

    Raises:
        yaml.YAMLError, UnicodeDecodeError, RecursionError: it is none.
    """
    try:
        return yaml.load(text, _Loader)
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        # a date that there is not, such as 2018-02-31: where it stands is not told
        raise yaml.YAMLError(f"{error}: look for a date that there is not") from None


def wrong(text: bytes, name: str, field: str, reason: str) -> WrittenError:
    """The error for one field of a text that is YAML."""
    return WrittenError(f"{name}, line {line_of(text, field)}: {field}: {reason}")


def _with_key(said: Any, into: type[Any], field: str) -> str:
    """The path with the key that is wrong, where msgspec leaves it out (``context[...]``): the one that is wrong alone too."""
    before, dots, after = field.partition("[...]")
    if not dots or "." in before or "[" in before or not isinstance(said.get(before), dict):
        return field
    for key, value in said[before].items():
        try:
            msgspec.convert({before: {key: value}}, into)
        except msgspec.ValidationError as error:
            if explain(error)[0] == field:
                return f"{before}.{key}{after}"
    return field


def line_of(text: bytes, field: str) -> int:
    """The line, counted from 1, on which a field's path (``experiments[0].variants``) stands, or its nearest parent; for messages."""
    node, line = yaml.compose(text), 1
    for part in field.replace("[", ".").replace("]", "").split("."):
        found = _child(node, part)
        if found is None:
            break
        line, node = found
    return line


def _child(node: Any, part: str) -> tuple[int, Any] | None:
    if isinstance(node, yaml.MappingNode):
        return next(((key.start_mark.line + 1, value) for key, value in node.value if key.value == part), None)
    if isinstance(node, yaml.SequenceNode) and part.isdigit() and int(part) < len(node.value):
        value = node.value[int(part)]
        return value.start_mark.line + 1, value
    return None
